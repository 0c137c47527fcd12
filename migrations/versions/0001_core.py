"""Runs, iterations, units, state, events and cursors.

Revision: 0001, follows: nothing
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

Int = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "meta",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("value", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_meta")),
        sqlite_strict=True,
    )
    op.create_table(
        "lease",
        sa.Column("id", Int, autoincrement=False, nullable=False),
        sa.Column("token", Int, nullable=False),
        sa.Column("holder", sa.Text(), nullable=False),
        sa.Column("taken_us", Int, nullable=False),
        sa.CheckConstraint("id = 1", name=op.f("ck_lease_one_row")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_lease")),
        sqlite_strict=True,
    )
    op.create_table(
        "runs",
        sa.Column("id", Int, autoincrement=False, nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("started_us", Int, nullable=False),
        sa.Column("ended_us", Int, nullable=True),
        sa.Column("first_iteration", Int, nullable=False),
        sa.Column("last_iteration", Int, nullable=True),
        sa.Column("pid", Int, nullable=False),
        sa.Column("host", sa.Text(), nullable=False),
        sa.Column("version", sa.Text(), nullable=False),
        sa.Column("token", Int, nullable=False),
        sa.Column("tick_rate", sa.Text(), nullable=False),
        sa.CheckConstraint("status IN ('running', 'stopped', 'crashed')", name=op.f("ck_runs_status")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_runs")),
        sqlite_strict=True,
    )
    op.create_table(
        "commits",
        sa.Column("id", Int, autoincrement=False, nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("iteration", Int, nullable=False),
        sa.Column("run_id", Int, nullable=True),
        sa.Column("at_us", Int, nullable=False),
        sa.CheckConstraint("kind IN ('start', 'shutdown', 'command')", name=op.f("ck_commits_kind")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_commits")),
        sqlite_strict=True,
    )
    op.create_table(
        "iterations",
        sa.Column("id", Int, autoincrement=False, nullable=False),
        sa.Column("run_id", Int, nullable=False),
        sa.Column("commit_id", Int, nullable=False),
        sa.Column("clock", Int, nullable=False),
        sa.Column("started_us", Int, nullable=False),
        sa.Column("duration_us", Int, nullable=False),
        sa.Column("ticks", Int, nullable=False),
        sa.Column("errors", Int, nullable=False),
        sa.Column("events", Int, nullable=False),
        sa.Column("missed", Int, nullable=False),
        sa.Column("tick_id", Int, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_iterations")),
        sqlite_strict=True,
    )
    op.create_table(
        "keys",
        sa.Column("id", Int, autoincrement=False, nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_keys")),
        sa.UniqueConstraint("name", name=op.f("uq_keys_name")),
        sqlite_strict=True,
    )
    op.create_table(
        "event_types",
        sa.Column("id", Int, autoincrement=False, nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_event_types")),
        sa.UniqueConstraint("name", name=op.f("uq_event_types_name")),
        sqlite_strict=True,
    )
    op.create_table(
        "event_sources",
        sa.Column("id", Int, autoincrement=False, nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_event_sources")),
        sa.UniqueConstraint("name", name=op.f("uq_event_sources_name")),
        sqlite_strict=True,
    )
    op.create_table(
        "agents",
        sa.Column("id", Int, autoincrement=False, nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("class_path", sa.Text(), nullable=True),
        sa.Column("fingerprint", sa.Text(), nullable=True),
        sa.Column("priority", Int, nullable=False),
        sa.Column("enabled", Int, nullable=False),
        sa.Column("operator_enabled", Int, nullable=True),
        sa.Column("registered", Int, nullable=False),
        sa.Column("failures", Int, nullable=False),
        sa.Column("retry_us", Int, nullable=True),
        sa.Column("quarantined_us", Int, nullable=True),
        sa.Column("metadata", sa.Text(), nullable=False),
        sa.Column("last_error", sa.Text(), nullable=True),
        sa.Column("last_error_us", Int, nullable=True),
        sa.Column("created_us", Int, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_agents")),
        sa.UniqueConstraint("name", name=op.f("uq_agents_name")),
        sqlite_strict=True,
    )
    op.create_table(
        "agent_stats",
        sa.Column("agent_id", Int, autoincrement=False, nullable=False),
        sa.Column("ticks", Int, nullable=False),
        sa.Column("errors", Int, nullable=False),
        sa.Column("events", Int, nullable=False),
        sa.Column("measured", Int, nullable=False),
        sa.Column("total_us", Int, nullable=False),
        sa.Column("max_us", Int, nullable=False),
        sa.Column("ewma_us", Int, nullable=False),
        sa.Column("last_tick_us", Int, nullable=True),
        sa.ForeignKeyConstraint(["agent_id"], ["agents.id"], name=op.f("fk_agent_stats_agent_id")),
        sa.PrimaryKeyConstraint("agent_id", name=op.f("pk_agent_stats")),
        sqlite_strict=True,
    )
    op.create_table(
        "state",
        sa.Column("key_id", Int, autoincrement=False, nullable=False),
        sa.Column("value", sa.Text(), nullable=False),
        sa.Column("version", Int, nullable=False),
        sa.Column("change_id", Int, nullable=False),
        sa.Column("agent_id", Int, nullable=False),
        sa.ForeignKeyConstraint(["key_id"], ["keys.id"], name=op.f("fk_state_key_id")),
        sa.PrimaryKeyConstraint("key_id", name=op.f("pk_state")),
        sqlite_strict=True,
    )
    op.create_index(op.f("ix_state_agent_id"), "state", ["agent_id"])
    op.create_table(
        "state_changes",
        sa.Column("id", Int, autoincrement=False, nullable=False),
        sa.Column("key_id", Int, nullable=False),
        sa.Column("value", sa.Text(), nullable=True),
        sa.Column("previous_id", Int, nullable=True),
        sa.Column("tick_id", Int, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_state_changes")),
        sqlite_strict=True,
    )
    op.create_index(op.f("ix_state_changes_key_id"), "state_changes", ["key_id"])
    op.create_table(
        "events",
        sa.Column("id", Int, autoincrement=False, nullable=False),
        sa.Column("type_id", Int, nullable=False),
        sa.Column("source_id", Int, nullable=False),
        sa.Column("data", sa.Text(), nullable=True),
        sa.Column("metadata", sa.Text(), nullable=True),
        sa.Column("timestamp_us", Int, nullable=True),
        sa.Column("tick_id", Int, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_events")),
        sqlite_strict=True,
    )
    op.create_index(op.f("ix_events_source_id"), "events", ["source_id"])
    op.create_index(op.f("ix_events_type_id"), "events", ["type_id"])
    op.create_table(
        "ticks",
        sa.Column("id", Int, autoincrement=False, nullable=False),
        sa.Column("iteration", Int, nullable=False),
        sa.Column("place", Int, nullable=False),
        sa.Column("agent_id", Int, nullable=False),
        sa.Column("kind", Int, nullable=False),
        sa.Column("outcome", Int, nullable=False),
        sa.Column("started_us", Int, nullable=False),
        sa.Column("duration_us", Int, nullable=False),
        sa.Column("seed", Int, nullable=False),
        sa.Column("change_id", Int, nullable=False),
        sa.Column("event_id", Int, nullable=False),
        sa.Column("changes", Int, nullable=False),
        sa.Column("events", Int, nullable=False),
        sa.Column("seen_change_id", Int, nullable=True),
        sa.Column("cause_event_id", Int, nullable=True),
        sa.Column("subscription_id", Int, nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_ticks")),
        sqlite_strict=True,
    )
    op.create_index(op.f("ix_ticks_agent_id"), "ticks", ["agent_id"])
    op.create_table(
        "tick_errors",
        sa.Column("tick_id", Int, autoincrement=False, nullable=False),
        sa.Column("type", sa.Text(), nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
        sa.Column("traceback", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("tick_id", name=op.f("pk_tick_errors")),
        sqlite_strict=True,
    )
    op.create_table(
        "subscriptions",
        sa.Column("id", Int, autoincrement=False, nullable=False),
        sa.Column("subscriber", sa.Text(), nullable=False),
        sa.Column("agent_id", Int, nullable=True),
        sa.Column("cursor", Int, nullable=False),
        sa.Column("attempts", Int, nullable=False),
        sa.Column("attempt_event_id", Int, nullable=True),
        sa.Column("retry_us", Int, nullable=True),
        sa.Column("created_us", Int, nullable=False),
        sa.Column("seen_us", Int, nullable=False),
        sa.Column("ended_us", Int, nullable=True),
        sa.ForeignKeyConstraint(["agent_id"], ["agents.id"], name=op.f("fk_subscriptions_agent_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_subscriptions")),
        sqlite_strict=True,
    )
    op.create_table(
        "subscription_patterns",
        sa.Column("subscription_id", Int, autoincrement=False, nullable=False),
        sa.Column("pattern", sa.Text(), nullable=False),
        sa.Column("glob", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["subscription_id"], ["subscriptions.id"], name=op.f("fk_subscription_patterns_subscription_id")
        ),
        sa.PrimaryKeyConstraint("subscription_id", "pattern", name=op.f("pk_subscription_patterns")),
        sqlite_strict=True,
    )

    # Rows that are always there: nobody owns the database yet, and agent 0 stands for changes from outside.
    op.execute("INSERT INTO lease (id, token, holder, taken_us) VALUES (1, 0, '', 0)")
    op.execute(
        "INSERT INTO agents (id, name, priority, enabled, registered, failures, metadata, created_us) "
        "VALUES (0, '(outside)', 0, 0, 0, 0, '{}', 0)"
    )


def downgrade() -> None:
    op.drop_table("subscription_patterns")
    op.drop_table("subscriptions")
    op.drop_table("tick_errors")
    op.drop_table("ticks")
    op.drop_table("events")
    op.drop_table("state_changes")
    op.drop_table("state")
    op.drop_table("agent_stats")
    op.drop_table("agents")
    op.drop_table("event_sources")
    op.drop_table("event_types")
    op.drop_table("keys")
    op.drop_table("iterations")
    op.drop_table("commits")
    op.drop_table("runs")
    op.drop_table("lease")
    op.drop_table("meta")

"""Durable tasks with their attempts and limits, questions, replies.

Revision: 0005, follows: 0004
"""

from __future__ import annotations

import json

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

TASKS = sa.table("tasks", *(sa.column(name) for name in ("id", "args", "kind", "question")))
OVER = "status IN ('done', 'failed', 'cancelled')"
TO_COME = -1
"""The next time of a task that is over and whose result is still to be taken up, in the schema before this one."""

Int = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.add_column("events", sa.Column("target_id", Int, nullable=True))
    op.create_index(
        "ix_events_target_id",
        "events",
        ["target_id"],
        sqlite_where=sa.text("target_id IS NOT NULL"),
    )
    op.add_column("ticks", sa.Column("cause_task_id", Int, nullable=True))
    op.add_column("tasks", sa.Column("kind", sa.Text(), server_default="function", nullable=False))
    op.add_column("tasks", sa.Column("question", sa.Text(), nullable=True))
    op.add_column("tasks", sa.Column("failures", Int, server_default="0", nullable=False))
    op.add_column("tasks", sa.Column("interruptions", Int, server_default="0", nullable=False))
    op.add_column("tasks", sa.Column("held", sa.Text(), nullable=True))
    op.add_column("tasks", sa.Column("hops", Int, nullable=True))
    op.add_column("tasks", sa.Column("answered_by", sa.Text(), nullable=True))
    op.add_column("tasks", sa.Column("applied_us", Int, nullable=True))
    op.add_column("tasks", sa.Column("applied_tick_id", Int, nullable=True))
    op.add_column("tasks", sa.Column("apply_attempts", Int, server_default="0", nullable=False))
    op.add_column("tasks", sa.Column("apply_error", sa.Text(), nullable=True))
    op.add_column("tasks", sa.Column("digest", Int, nullable=True))
    # Only this schema and later ones run tasks: what an earlier one holds of them is what `downgrade` has left.
    op.execute(f"UPDATE tasks SET applied_us = ended_us WHERE {OVER} AND coalesce(next_us, 0) <> {TO_COME}")
    op.execute(f"UPDATE tasks SET next_us = NULL WHERE {OVER} AND next_us = {TO_COME}")
    asked = sa.select(TASKS.c.id, TASKS.c.args).where(TASKS.c.args.startswith("{"))  # those of a function are a list
    for number, args in op.get_bind().execute(asked).all():
        question = json.loads(args)["question"]
        op.execute(TASKS.update().where(TASKS.c.id == number).values(kind="question", question=question))
    op.create_index(
        "ix_tasks_live",
        "tasks",
        ["id"],
        sqlite_where=sa.text("applied_us IS NULL"),
    )
    op.create_table(
        "task_attempts",
        sa.Column("id", Int, autoincrement=False, nullable=False),
        sa.Column("task_id", Int, nullable=False),
        sa.Column("number", Int, nullable=False),
        sa.Column("run_id", Int, nullable=False),
        sa.Column("limit_name", sa.Text(), nullable=True),
        sa.Column("outcome", sa.Text(), nullable=False),
        sa.Column("started_us", Int, nullable=False),
        sa.Column("ended_us", Int, nullable=True),
        sa.Column("reserved_usd", sa.Text(), nullable=True),
        sa.Column("cost_usd", sa.Text(), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("traceback", sa.Text(), nullable=True),
        sa.Column("digest", Int, nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_task_attempts")),
        sqlite_strict=True,
    )
    op.create_index(op.f("ix_task_attempts_task_id"), "task_attempts", ["task_id"])
    op.create_index("ix_task_attempts_limit_name_started_us", "task_attempts", ["limit_name", "started_us"])
    op.create_index(
        "ix_task_attempts_open",
        "task_attempts",
        ["id"],
        sqlite_where=sa.text("ended_us IS NULL"),
    )
    op.create_table(
        "limits",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("concurrency", Int, nullable=True),
        sa.Column("per_minute", Int, nullable=True),
        sa.Column("per_day", Int, nullable=True),
        sa.Column("usd_per_day", sa.Text(), nullable=True),
        sa.Column("configured", sa.Text(), nullable=False),
        sa.Column("raised", sa.Text(), nullable=False),
        sa.Column("opened", Int, nullable=False),
        sa.Column("held_until_us", Int, nullable=True),
        sa.Column("held_because", sa.Text(), nullable=True),
        sa.Column("blocked_us", Int, nullable=True),
        sa.Column("blocked_because", sa.Text(), nullable=True),
        sa.Column("blocked_until_us", Int, nullable=True),
        sa.Column("digest", Int, nullable=True),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_limits")),
        sqlite_strict=True,
    )
    op.execute(
        "INSERT INTO meta (name, value) SELECT 'tasks_without_attempts', newest "
        "FROM (SELECT max(id) AS newest FROM tasks WHERE attempts > 0) WHERE newest IS NOT NULL"
    )


def downgrade() -> None:
    _unseal()
    op.execute("DELETE FROM meta WHERE name = 'tasks_without_attempts'")
    op.execute(f"UPDATE tasks SET next_us = {TO_COME} WHERE {OVER} AND applied_us IS NULL")
    op.drop_table("limits")
    op.drop_index("ix_task_attempts_open", "task_attempts")
    op.drop_index("ix_task_attempts_limit_name_started_us", "task_attempts")
    op.drop_index(op.f("ix_task_attempts_task_id"), "task_attempts")
    op.drop_table("task_attempts")
    op.drop_index("ix_tasks_live", "tasks")
    for column in (
        "digest",
        "apply_error",
        "apply_attempts",
        "applied_tick_id",
        "applied_us",
        "answered_by",
        "hops",
        "held",
        "interruptions",
        "failures",
        "question",
        "kind",
    ):
        op.drop_column("tasks", column)
    op.drop_column("ticks", "cause_task_id")
    op.drop_index("ix_events_target_id", "events")
    op.drop_column("events", "target_id")


def _unseal() -> None:
    """Take away the digests that count a cause or a recipient, which go: the rest can still be proven."""
    units = "SELECT id FROM ticks WHERE cause_task_id IS NOT NULL"
    events = "SELECT id FROM events WHERE target_id IS NOT NULL"
    iterations = (
        "SELECT iteration FROM ticks WHERE cause_task_id IS NOT NULL "
        "OR id IN (SELECT tick_id FROM events WHERE target_id IS NOT NULL)"
    )
    op.execute(
        "UPDATE iterations SET seal = NULL WHERE commit_id IN "
        f"(SELECT commit_id FROM iterations WHERE id IN ({iterations}))"
    )
    op.execute(f"UPDATE commits SET seal = NULL WHERE iteration IN ({iterations})")
    op.execute(f"DELETE FROM row_digests WHERE kind = 'ticks' AND row_id IN ({units})")
    op.execute(f"DELETE FROM row_digests WHERE kind = 'events' AND row_id IN ({events})")

"""Dead letters, delayed events, schedules, and what moves without a tick.

Revision: 0002, follows: 0001
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

Int = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.add_column("subscriptions", sa.Column("skipped", Int, server_default="0", nullable=False))
    op.create_table(
        "dead_letters",
        sa.Column("id", Int, autoincrement=False, nullable=False),
        sa.Column("subscription_id", Int, nullable=False),
        sa.Column("event_id", Int, nullable=False),
        sa.Column("attempts", Int, nullable=False),
        sa.Column("error", sa.Text(), nullable=False),
        sa.Column("tick_id", Int, nullable=False),
        sa.Column("failed_us", Int, nullable=False),
        sa.Column("redelivered_us", Int, nullable=True),
        sa.ForeignKeyConstraint(
            ["subscription_id"], ["subscriptions.id"], name=op.f("fk_dead_letters_subscription_id")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_dead_letters")),
        sqlite_strict=True,
    )
    op.create_table(
        "delayed_events",
        sa.Column("id", Int, autoincrement=False, nullable=False),
        sa.Column("due_us", Int, nullable=False),
        sa.Column("type", sa.Text(), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("data", sa.Text(), nullable=True),
        sa.Column("metadata", sa.Text(), nullable=True),
        sa.Column("tick_id", Int, nullable=False),
        sa.Column("event_id", Int, nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_delayed_events")),
        sqlite_strict=True,
    )
    op.create_table(
        "schedules",
        sa.Column("agent_id", Int, autoincrement=False, nullable=False),
        sa.Column("trigger", sa.Text(), nullable=False),
        sa.Column("next_us", Int, nullable=True),
        sa.Column("last_us", Int, nullable=True),
        sa.ForeignKeyConstraint(["agent_id"], ["agents.id"], name=op.f("fk_schedules_agent_id")),
        sa.PrimaryKeyConstraint("agent_id", name=op.f("pk_schedules")),
        sqlite_strict=True,
    )
    op.create_table(
        "positions",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("value", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_positions")),
        sqlite_strict=True,
    )
    # What `downgrade` has kept in a table that every revision has.
    op.execute(
        "INSERT INTO positions (name, value) SELECT substr(name, 10), value FROM meta WHERE name LIKE 'position/%'"
    )
    op.execute("DELETE FROM meta WHERE name LIKE 'position/%'")
    op.create_table(
        "moves",
        sa.Column("id", Int, autoincrement=False, nullable=False),
        sa.Column("commit_id", Int, nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("subject", sa.Text(), nullable=False),
        sa.Column("value", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_moves")),
        sqlite_strict=True,
    )


def downgrade() -> None:
    op.drop_table("moves")
    op.execute("INSERT INTO meta (name, value) SELECT 'position/' || name, value FROM positions")
    op.drop_table("positions")
    op.drop_table("schedules")
    op.drop_table("delayed_events")
    op.drop_table("dead_letters")
    op.drop_column("subscriptions", "skipped")

"""Commands from outside and durable tasks.

Revision: 0003, follows: 0002
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

Int = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "commands",
        sa.Column("id", Int, autoincrement=False, nullable=False),
        sa.Column("commit_id", Int, nullable=False),
        sa.Column("at_us", Int, nullable=False),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("arguments", sa.Text(), nullable=False),
        sa.Column("error", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_commands")),
        sqlite_strict=True,
    )
    op.create_table(
        "tasks",
        sa.Column("id", Int, autoincrement=False, nullable=False),
        sa.Column("agent_id", Int, nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("attempts", Int, nullable=False),
        sa.Column("priority", Int, nullable=False),
        sa.Column("limit_name", sa.Text(), nullable=True),
        sa.Column("args", sa.Text(), nullable=False),
        sa.Column("result", sa.Text(), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("cost_usd", sa.Text(), nullable=True),
        sa.Column("created_us", Int, nullable=False),
        sa.Column("next_us", Int, nullable=True),
        sa.Column("started_us", Int, nullable=True),
        sa.Column("ended_us", Int, nullable=True),
        sa.Column("tick_id", Int, nullable=False),
        sa.CheckConstraint(
            "status IN ('waiting', 'held', 'running', 'done', 'failed', 'cancelled')",
            name=op.f("ck_tasks_status"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_tasks")),
        sa.UniqueConstraint("key", name=op.f("uq_tasks_key")),
        sqlite_strict=True,
    )
    op.create_index(op.f("ix_tasks_agent_id"), "tasks", ["agent_id"])


def downgrade() -> None:
    op.drop_table("tasks")
    op.drop_table("commands")

"""Hourly marks of the agents' counters, and the view of causes.

Revision: 0006, follows: 0005
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

Int = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "agent_marks",
        sa.Column("agent_id", Int, autoincrement=False, nullable=False),
        sa.Column("hour_us", Int, autoincrement=False, nullable=False),
        sa.Column("iteration", Int, nullable=False),
        sa.Column("ticks", Int, nullable=False),
        sa.Column("errors", Int, nullable=False),
        sa.Column("events", Int, nullable=False),
        sa.Column("measured", Int, nullable=False),
        sa.Column("total_us", Int, nullable=False),
        sa.Column("digest", Int, nullable=True),
        sa.ForeignKeyConstraint(["agent_id"], ["agents.id"], name=op.f("fk_agent_marks_agent_id")),
        sa.PrimaryKeyConstraint("agent_id", "hour_us", name=op.f("pk_agent_marks")),
        sqlite_strict=True,
    )


def downgrade() -> None:
    op.drop_table("agent_marks")

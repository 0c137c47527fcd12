"""Indexes of the history that are caught up with, instead of being written by each commit.

Revision: 0008, follows: 0007
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

Int = sa.BigInteger().with_variant(sa.Integer(), "sqlite")

INDEXES = (
    ("ticks", "agent_id"),
    ("state_changes", "key_id"),
    ("events", "type_id"),
    ("events", "source_id"),
)


def upgrade() -> None:
    for table in ("ticks", "state_changes", "events"):
        op.add_column(table, sa.Column("recent", Int, nullable=True))  # what is there has all indexes: NULL
    for table, column in INDEXES:
        name = op.f(f"ix_{table}_{column}")
        op.drop_index(name, table)
        op.create_index(name, table, [column], sqlite_where=sa.text("recent IS NULL"))


def downgrade() -> None:
    for table, column in INDEXES:
        op.drop_index(op.f(f"ix_{table}_{column}"), table)
    for table in ("ticks", "state_changes", "events"):
        op.drop_column(table, "recent")
    for table, column in INDEXES:
        op.create_index(op.f(f"ix_{table}_{column}"), table, [column])

"""Digests of what was committed, redelivery, hops of events, deaths of the process.

Revision: 0004, follows: 0003
"""

from __future__ import annotations

import json

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

Int = sa.BigInteger().with_variant(sa.Integer(), "sqlite")

META = sa.table("meta", sa.column("name"), sa.column("value"))
TOTALS = sa.table("agent_totals", *(sa.column(name) for name in ("agent_id", "tick_id", "ticks", "errors", "events")))
KEPT = "agent_totals"
"""Where `meta`, a table that every revision has, keeps the totals: else nothing says what removed units counted."""

WITH_DIGEST = (
    "runs",
    "agents",
    "agent_stats",
    "subscriptions",
    "dead_letters",
    "delayed_events",
    "schedules",
    "positions",
)


def upgrade() -> None:
    op.add_column("commits", sa.Column("seal", sa.LargeBinary(), nullable=True))
    op.add_column("iterations", sa.Column("seal", sa.LargeBinary(), nullable=True))
    op.add_column("agents", sa.Column("deaths", Int, server_default="0", nullable=False))
    op.add_column("events", sa.Column("hops", Int, nullable=True))
    op.add_column("dead_letters", sa.Column("requested_us", Int, nullable=True))
    op.add_column("delayed_events", sa.Column("hops", Int, nullable=True))
    for table in WITH_DIGEST:
        op.add_column(table, sa.Column("digest", Int, nullable=True))
    op.create_table(
        "row_digests",
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("row_id", Int, autoincrement=False, nullable=False),
        sa.Column("digest", Int, nullable=False),
        sa.Column("why", sa.Text(), nullable=False),
        sa.CheckConstraint("why IN ('redacted', 'base')", name=op.f("ck_row_digests_why")),
        sa.PrimaryKeyConstraint("kind", "row_id", name=op.f("pk_row_digests")),
        sqlite_strict=True,
    )
    op.create_table(
        "agent_totals",
        sa.Column("agent_id", Int, autoincrement=False, nullable=False),
        sa.Column("tick_id", Int, nullable=False),
        sa.Column("ticks", Int, nullable=False),
        sa.Column("errors", Int, nullable=False),
        sa.Column("events", Int, nullable=False),
        sa.Column("digest", Int, nullable=True),
        sa.ForeignKeyConstraint(["agent_id"], ["agents.id"], name=op.f("fk_agent_totals_agent_id")),
        sa.PrimaryKeyConstraint("agent_id", name=op.f("pk_agent_totals")),
        sqlite_strict=True,
    )
    kept = op.get_bind().execute(sa.select(META.c.value).where(META.c.name == KEPT)).scalar()
    if kept is not None:
        op.bulk_insert(TOTALS, json.loads(kept))
        op.execute(META.delete().where(META.c.name == KEPT))


def downgrade() -> None:
    totals = [dict(row) for row in op.get_bind().execute(sa.select(TOTALS)).mappings()]
    if totals:
        op.execute(META.insert().values(name=KEPT, value=json.dumps(totals)))
    op.drop_table("agent_totals")
    op.drop_table("row_digests")
    for table in reversed(WITH_DIGEST):
        op.drop_column(table, "digest")
    op.drop_column("delayed_events", "hops")
    op.drop_column("dead_letters", "requested_us")
    op.drop_column("events", "hops")
    op.drop_column("agents", "deaths")
    op.drop_column("iterations", "seal")
    op.drop_column("commits", "seal")

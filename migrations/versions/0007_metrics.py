"""Metrics of agents, and the version of an agent's own data.

Revision: 0007, follows: 0006
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

Int = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
Real = sa.Double().with_variant(sa.REAL(), "sqlite")


def upgrade() -> None:
    op.add_column("agents", sa.Column("data_version", Int, nullable=True))
    op.create_table(
        "metrics",
        sa.Column("id", Int, autoincrement=False, nullable=False),
        sa.Column("channel", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("samples", Int, nullable=False),
        sa.Column("total", Real, nullable=False),
        sa.Column("value", Real, nullable=False),
        sa.Column("updated_us", Int, nullable=False),
        sa.Column("hour_us", Int, nullable=False),
        sa.Column("hour_samples", Int, nullable=False),
        sa.Column("hour_total", Real, nullable=False),
        sa.Column("hour_least", Real, nullable=False),
        sa.Column("hour_most", Real, nullable=False),
        sa.Column("digest", Int, nullable=True),
        sa.CheckConstraint("kind IN ('gauge', 'counter', 'timing')", name=op.f("ck_metrics_kind")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_metrics")),
        sa.UniqueConstraint("channel", "name", name=op.f("uq_metrics_channel_name")),
        sqlite_strict=True,
    )
    op.create_table(
        "metric_samples",
        sa.Column("id", Int, autoincrement=False, nullable=False),
        sa.Column("metric_id", Int, nullable=False),
        sa.Column("agent_id", Int, nullable=False),
        sa.Column("iteration", Int, nullable=False),
        sa.Column("at_us", Int, nullable=False),
        sa.Column("value", Real, nullable=False),
        sa.Column("digest", Int, nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_metric_samples")),
        sqlite_strict=True,
    )
    op.create_index(op.f("ix_metric_samples_metric_id"), "metric_samples", ["metric_id"])
    op.create_table(
        "metric_hours",
        sa.Column("metric_id", Int, autoincrement=False, nullable=False),
        sa.Column("hour_us", Int, autoincrement=False, nullable=False),
        sa.Column("samples", Int, nullable=False),
        sa.Column("total", Real, nullable=False),
        sa.Column("least", Real, nullable=False),
        sa.Column("most", Real, nullable=False),
        sa.Column("last", Real, nullable=False),
        sa.Column("digest", Int, nullable=True),
        sa.ForeignKeyConstraint(["metric_id"], ["metrics.id"], name=op.f("fk_metric_hours_metric_id")),
        sa.PrimaryKeyConstraint("metric_id", "hour_us", name=op.f("pk_metric_hours")),
        sqlite_strict=True,
    )


def downgrade() -> None:
    op.drop_table("metric_hours")
    op.drop_index(op.f("ix_metric_samples_metric_id"), "metric_samples")
    op.drop_table("metric_samples")
    op.drop_table("metrics")
    # The digest of such an agent counts the version, which goes.
    op.execute("UPDATE agents SET digest = NULL WHERE data_version IS NOT NULL")
    op.drop_column("agents", "data_version")

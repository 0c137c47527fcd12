"""The tables of the history as SQLAlchemy knows them, to be asked by an indexed column (`recent.py`)."""

from __future__ import annotations

from sqlalchemy import FromClause, func, literal_column, select, union_all

from ael_store.schema.recent import TABLES
from ael_store.schema.tables import metadata

__all__ = ["INDEXED"]


def _indexed(name: str) -> FromClause:
    t = metadata.tables[name]
    newest = (
        select(t.c.id)
        .where(t.c.recent.is_(None), t.c.id > literal_column("0"))
        .order_by(t.c.id.desc())
        .limit(1)
        .scalar_subquery()
    )
    recent = select(t).where(t.c.recent == literal_column("1"), t.c.id > func.coalesce(newest, literal_column("0")))
    return union_all(select(t).where(t.c.recent.is_(None)), recent).subquery(f"{name}_by_index")


INDEXED = {name: _indexed(name) for name in TABLES}
"""What `TICKS` and the others are for SQL as text: what the indexes have, and the recent rows."""

"""Puts recent history into its indexes, in bulk and off the path of a commit (`schema/recent.py` says why)."""

from __future__ import annotations

from typing import Any

from ael_store.schema.recent import TABLES, is_recent

__all__ = ["RECENT_ROWS", "catch_up", "count_recent"]

RECENT_ROWS = 1000
"""So many rows of all three tables may wait: reading them costs a question well below a millisecond."""


def catch_up(cursor: Any) -> None:
    """Have the indexes take up everything, within the transaction that is open.

    All tables at once, as the views count on it that a change is recent where its unit is.
    """
    for table in TABLES:
        cursor.execute(f"UPDATE {table} SET recent = NULL WHERE {is_recent(table, table)}")


def count_recent(connection: Any) -> int:
    """Return how many rows wait to be taken up."""
    counts = (f"(SELECT count(*) FROM {table} r WHERE {is_recent(table, 'r')})" for table in TABLES)
    (number,) = connection.execute(f"SELECT {' + '.join(counts)}").fetchone()
    return int(number)

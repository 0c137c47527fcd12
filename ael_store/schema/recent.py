"""History that its indexes do not have yet.

An index costs a commit more than the rows themselves: each entry lies in a page of its own, and the log takes whole
pages. So the indexes of the history are partial ones, over the rows whose `recent` is NULL; a commit writes rows with
`recent = 1` and touches no index, and every few thousand rows a transaction of its own sets them to NULL, which puts
them into the indexes in bulk (`store/catch_up.py`).

Who asks by key, type, source or agent asks twice, then: the index, and the few recent rows. `TICKS`, `CHANGES` and
`EVENTS` are that for the queries of this package; the views have it written out.
"""

from __future__ import annotations

__all__ = ["CHANGES", "EVENTS", "TABLES", "TICKS", "is_recent"]

TABLES = ("ticks", "state_changes", "events")
"""What has such a column. A unit's rows in these are always caught up together."""


def is_recent(table: str, alias: str) -> str:
    """Return the condition of the rows that no index has.

    They are the last ones, so their beginning is found by reading backwards: these rows, and one more. That ids are
    above 0 goes without saying, but not in a query plan, where it would look as if the whole table were read.
    """
    newest = f"SELECT id FROM {table} WHERE recent IS NULL AND id > 0 ORDER BY id DESC LIMIT 1"
    return f"{alias}.recent = 1 AND {alias}.id > coalesce(({newest}), 0)"


def _by_index(table: str) -> str:
    """Return a table as a subquery that is to be asked by an indexed column, which the planner hands down.

    For that the columns of an ORDER BY must be among those selected.
    """
    return (
        f"(SELECT * FROM {table} WHERE recent IS NULL UNION ALL SELECT * FROM {table} r WHERE {is_recent(table, 'r')})"
    )


TICKS, CHANGES, EVENTS = map(_by_index, TABLES)

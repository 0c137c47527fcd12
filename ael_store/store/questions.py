"""Questions to the long tables of the history, each by a name, at one moment.

Every statement looks rows up by number or walks an index as far as it needs; a test looks at the plans. What carries
the number of its commit, which grows with its own, is found by halving.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, text

from ael_store.store.moment import Horizon, Moment, horizon_of

__all__ = ["COMMON", "Questions", "Row"]

Row = dict[str, Any]

COMMON = {
    "unit": (
        "SELECT v.*, t.agent_id, t.started_us, t.duration_us, t.change_id, t.changes, t.event_id, t.events, "
        "t.cause_event_id, t.cause_task_id, t.subscription_id, s.subscriber FROM v_ticks v JOIN ticks t ON t.id = v.id "
        "LEFT JOIN subscriptions s ON s.id = t.subscription_id WHERE v.id = :id"
    ),
    "moves": (
        "SELECT id, commit_id, kind, subject, value FROM moves WHERE id > :after AND id <= :until "
        "AND kind IN ('flag', 'schedule', 'scheduler') AND subject IN (:agent, 'loop', 'priority') ORDER BY id"
    ),
    "commands": (
        "SELECT id, at_us, actor, name, arguments FROM commands "
        "WHERE id > :after AND id <= :until AND error IS NULL ORDER BY id"
    ),
}


class Questions:
    """Questions to one database at one moment; None stands for now."""

    queries = COMMON

    def __init__(self, connection: Connection, moment: Moment | None) -> None:
        self.connection = connection
        self.moment = moment
        self.horizon: Horizon = horizon_of(connection)

    def rows(self, question: str, **parameters: Any) -> list[Row]:
        return [dict(row) for row in self.connection.execute(text(self.queries[question]), parameters).mappings()]

    def row(self, question: str, **parameters: Any) -> Row | None:
        found = self.connection.execute(text(self.queries[question]), parameters).mappings().first()
        return None if found is None else dict(found)

    def scalar(self, question: str, **parameters: Any) -> Any:
        return self.connection.execute(text(self.queries[question]), parameters).scalar()

    # -- rows of a commit, by halving --

    def span(self, table: str, first: int, last: int) -> tuple[int, int]:
        """Return the number before the first row of these commits, and that of the last one."""
        return self.last(table, "commit_id", first - 1), self.last(table, "commit_id", last)

    def last(self, table: str, column: str, value: int, low: int = 0, high: int | None = None) -> int:
        """Return the last row whose column, which grows with its number, is at most this; `low` where there is none."""
        probe = text(f"SELECT id, {column} FROM {table} WHERE id >= :id AND id <= :high ORDER BY id LIMIT 1")
        if high is None:
            high = self.connection.execute(text(f"SELECT max(id) FROM {table}")).scalar() or 0
        while low < high:
            middle = (low + high + 1) // 2
            found = self.connection.execute(probe, {"id": middle, "high": high}).first()
            if found is not None and found[1] <= value:
                low = found[0]
            else:
                high = middle - 1
        return low

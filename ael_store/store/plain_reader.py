"""What the dashboard reads: the present, through the driver alone.

SQLAlchemy would double the memory of a process that does nothing but answer `SELECT`s. Each question is one short
read-only transaction, so it never keeps the log from being emptied, and none may take longer than a few seconds.
A database that was replaced meanwhile (a restore) is opened anew.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ael_store.errors import AelError, DatabaseNotUsable
from ael_store.model.event import glob_of
from ael_store.store.answers import Answers, Ask, Row, literal
from ael_store.store.foreign_code import refuse_foreign_views
from ael_store.store.revision import explain, refuse_half_restored, refuse_other
from ael_store.store.sqlite import connect_to_read

__all__ = ["PlainReader", "Position", "TookTooLong"]

LONGEST_S = 5.0
"""How long one question may take."""

STEPS = 10_000
"""Instructions of SQLite between two looks at the clock."""

CACHE_KIB = 1024

SEARCHED = 20_000
"""How many events a search for a text looks at, from the newest back."""


class TookTooLong(AelError):
    """A question took too long and was ended; ask for less."""


@dataclass(frozen=True, slots=True)
class Position:
    """The newest number of each kind; 0 where there is none."""

    commit: int
    iteration: int
    event: int
    change: int


class PlainReader(Answers):
    """Read-only questions to one database. May be used from any thread, by one at a time; close it when done."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._file: tuple[int, int] | None = None
        self._deadline = 0.0

    def close(self) -> None:
        with self._lock:
            self._close()

    @contextlib.contextmanager
    def asking(self) -> Iterator[Ask]:
        with self._lock:
            try:
                connection = self._open()
                self._deadline = time.monotonic() + LONGEST_S
                connection.execute("BEGIN")
                try:
                    yield lambda sql, **parameters: [
                        dict(zip(row.keys(), row, strict=True)) for row in connection.execute(sql, parameters)
                    ]
                finally:
                    connection.execute("ROLLBACK")
            except (sqlite3.Error, UnicodeDecodeError) as error:
                if getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_INTERRUPT:
                    raise TookTooLong(f"the question took longer than {LONGEST_S:g} s: ask for less") from None
                self._close()
                raise explain(error, self.path) from error

    def _open(self) -> sqlite3.Connection:
        try:
            status = os.stat(self.path)
        except FileNotFoundError:
            self._close()
            raise DatabaseNotUsable(f"{self.path} does not exist; `ael run` creates it") from None
        file = status.st_dev, status.st_ino
        if self._connection is not None and file == self._file:
            return self._connection
        self._close()
        refuse_half_restored(self.path)
        refuse_other(self.path)
        connection = connect_to_read(self.path, check_same_thread=False)
        try:
            for pragma in ("query_only = ON", "trusted_schema = OFF", "cell_size_check = ON"):
                connection.execute(f"PRAGMA {pragma}")
            connection.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
            refuse_foreign_views(connection, self.path)
        except BaseException:
            connection.close()
            raise
        connection.row_factory = sqlite3.Row
        connection.set_progress_handler(self._is_over, STEPS)
        self._connection, self._file = connection, file
        return connection

    def _is_over(self) -> int:
        return time.monotonic() > self._deadline

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    # -- what has come --

    def data_version(self) -> tuple[int, int, int]:
        """Return what changes with each commit of another connection, and with the file itself."""
        with self._lock:
            try:
                connection = self._open()
                (version,) = connection.execute("PRAGMA data_version").fetchone()
            except sqlite3.Error as error:
                self._close()
                raise explain(error, self.path) from error
            assert self._file is not None
            return *self._file, version

    def position(self) -> Position:
        """Return how far the history has come."""
        row = self.rows(
            "SELECT max((SELECT coalesce(max(id), 0) FROM commits), coalesce((SELECT commit_id FROM iterations "
            "ORDER BY id DESC LIMIT 1), 0)) AS commit_id, (SELECT coalesce(max(id), 0) FROM iterations) AS iteration, "
            "(SELECT coalesce(max(id), 0) FROM events) AS event, "
            "(SELECT coalesce(max(id), 0) FROM state_changes) AS change"
        )[0]
        return Position(row["commit_id"], row["iteration"], row["event"], row["change"])

    def first_iteration(self) -> int:
        """Return the first iteration that is a moment one can look back to, 0 for the beginning."""
        found = self.rows("SELECT value ->> 'iteration' AS iteration FROM positions WHERE name = 'horizon'")
        return int(found[0]["iteration"]) if found else 0

    # -- lists, newest first, or what follows a number in order --

    def page(
        self,
        view: str,
        number: str,
        where: Sequence[str],
        parameters: Row,
        before: int | None,
        after: int | None,
        limit: int,
    ) -> list[Row]:
        """Return rows of a view: the newest `limit` below `before`, newest first, or the first that follow `after`."""
        conditions = list(where)
        if before is not None:
            conditions.append(f"{number} < :before")
        if after is not None:
            conditions.append(f"{number} > :after")
        wanted = f"WHERE {' AND '.join(conditions)} " if conditions else ""
        order = "ASC" if after is not None else "DESC"
        return self.rows(
            f"SELECT * FROM {view} {wanted}ORDER BY {number} {order} LIMIT :limit",
            **parameters,
            before=before,
            after=after,
            limit=limit,
        )

    def event_page(
        self,
        *,
        type: str | None = None,
        source: str | None = None,
        text: str | None = None,
        before: int | None = None,
        after: int | None = None,
        limit: int = 100,
    ) -> tuple[list[Row], int | None]:
        """Return events, and where a search for a text has ended for now: before this number it has not looked."""
        where: list[str] = []
        parameters: Row = {}
        if type:
            where.append("type GLOB :type" if "*" in type else "type = :type")
            parameters["type"] = glob_of(type) if "*" in type else type
        if source:
            where.append("source = :source")
            parameters["source"] = source
        stopped = None
        if text:
            where.append(
                "(instr(lower(data), lower(:text)) OR instr(lower(type), lower(:text)) "
                "OR instr(lower(source), lower(:text)))"
            )
            parameters["text"] = text
            if after is None:
                newest = self.position().event + 1 if before is None else before
                parameters["floor"] = floor = max(0, newest - 1 - SEARCHED)
                where.append("id > :floor")
                stopped = floor + 1 if floor else None
        rows = self.page("v_events", "id", where, parameters, before, after, limit)
        if len(rows) == limit:
            stopped = None  # the next page begins after the last row
        return rows, stopped

    def iteration_page(
        self, *, only: str | None = None, before: int | None = None, after: int | None = None, limit: int = 100
    ) -> list[Row]:
        """Return iterations; `only` those with `errors`, `events` or `missed` slots."""
        where = [f"{only} > 0"] if only in ("errors", "events", "missed") else []
        return self.page("v_iterations", "iteration", where, {}, before, after, limit)

    def task_page(
        self,
        *,
        status: str | None = None,
        agent: str | None = None,
        name: str | None = None,
        before: int | None = None,
        limit: int = 100,
    ) -> list[Row]:
        """Return tasks, newest first, each with why it is held, its question and its choices."""
        wanted = {"status": status, "agent": agent, "name": name}
        parameters: Row = {column: value for column, value in wanted.items() if value is not None}
        where = [f"v.{column} = :{column}" for column in parameters]
        if status is not None and status not in ("done", "failed", "cancelled"):
            where.append("q.applied_us IS NULL")  # those are few, and their index is small
        if before is not None:
            where.append("q.id < :before")
            parameters["before"] = before
        return self.rows(
            "SELECT v.*, q.held AS held, q.question AS question, q.answered_by AS answered_by, "
            "q.apply_error AS apply_error FROM tasks q JOIN v_tasks v ON v.id = q.id "
            + (f"WHERE {' AND '.join(where)} " if where else "")
            + "ORDER BY q.id DESC LIMIT :limit",
            **parameters,
            limit=limit,
        )

    # -- the state --

    def key_page(self, *, prefix: str = "", after: str = "", limit: int = 500) -> list[Row]:
        """Return keys with their values in order of the keys: those that follow `after`."""
        return self.rows(
            "SELECT key, value, version, agent, iteration, updated_at FROM v_state "
            "WHERE key GLOB :glob AND key > :after ORDER BY key LIMIT :limit",
            glob=literal(prefix) + "*",
            after=after,
            limit=limit,
        )

    def key(self, name: str) -> Row | None:
        """Return a key with its value, None where there is none."""
        found = self.rows("SELECT * FROM v_state WHERE key = :name", name=name)
        return found[0] if found else None

    def changes(
        self, *, key: str | None = None, before: int | None = None, after: int | None = None, limit: int = 100
    ) -> list[Row]:
        """Return changes of a key, or of all keys."""
        where, parameters = (["key = :key"], {"key": key}) if key is not None else ([], {})
        return self.page("v_state_history", "id", where, parameters, before, after, limit)

    # -- what an iteration did --

    def iteration(self, number: int) -> Row | None:
        """Return an iteration with its units, changes and events; None where there is none."""
        with self.asking() as ask:
            found = ask("SELECT * FROM v_iterations WHERE iteration = :n", n=number)
            if not found:
                return None
            bounds = ask(
                "SELECT i.tick_id AS low, coalesce((SELECT tick_id FROM iterations WHERE id > :n ORDER BY id LIMIT 1), "
                "(SELECT max(id) FROM ticks), 0) AS high FROM iterations i WHERE i.id = :n",
                n=number,
            )[0]
            units = ask("SELECT * FROM v_ticks WHERE id > :low AND id <= :high ORDER BY id LIMIT 500", **bounds)
            ranges = ask(
                "SELECT min(change_id) AS first_change, max(change_id + changes) AS last_change, "
                "min(event_id) AS first_event, max(event_id + events) AS last_event FROM ticks "
                "WHERE id > :low AND id <= :high",
                **bounds,
            )[0]
            changes = ask(
                "SELECT * FROM v_state_history WHERE id > :first_change AND id <= :last_change ORDER BY id LIMIT 500",
                **ranges,
            )
            events = ask(
                "SELECT * FROM v_events WHERE id > :first_event AND id <= :last_event ORDER BY id LIMIT 500", **ranges
            )
        return {**found[0], "units": units, "changes": changes, "events_emitted": events}

    def recent_iterations(self, limit: int) -> list[Row]:
        """Return the last iterations in order, for plots."""
        return self.iteration_page(limit=limit)[::-1]

    def tick_durations(self, limit: int) -> list[Row]:
        """Return the last recorded ticks of agents, in order: agent, time and duration."""
        return self.rows(
            "SELECT a.name AS agent, t.iteration AS iteration, t.started_us / 1000000.0 AS at, "
            "t.duration_us / 1000.0 AS duration_ms, t.outcome AS outcome FROM ticks t "
            "JOIN agents a ON a.id = t.agent_id "
            "WHERE t.id > (SELECT max(id) FROM ticks) - :limit AND t.kind = 0 AND a.id > 0 ORDER BY t.id",
            limit=limit,
        )

    def durations_of(self, agent: str, limit: int) -> list[Row]:
        """Return the last recorded units of an agent, in order."""
        return self.rows(
            "SELECT id, iteration, kind, outcome, started_at, duration_ms, error FROM v_ticks WHERE agent = :agent "
            "ORDER BY id DESC LIMIT :limit",
            agent=agent,
            limit=limit,
        )[::-1]

    def agent_hours(self, agent: str, limit: int = 168) -> list[Row]:
        """Return what an agent did in each of the last hours."""
        return self.rows(
            "SELECT * FROM (SELECT * FROM v_agent_hours WHERE agent = :agent ORDER BY hour DESC LIMIT :limit) "
            "ORDER BY hour",
            agent=agent,
            limit=limit,
        )

    def health_of_agents(self) -> dict[str, Row]:
        """Return what the views do not tell of agents: errors in a row, when they are tried again, their trigger."""
        rows = self.rows(
            'SELECT a.name AS name, a.failures AS failures, a.retry_us AS retry_us, s."trigger" AS "trigger", '
            "s.next_us AS next_us FROM agents a LEFT JOIN schedules s ON s.agent_id = a.id WHERE a.id > 0"
        )
        return {row["name"]: row for row in rows}

    def tick_rate(self) -> float | None:
        """Return the period of the last run's clock, in seconds."""
        found = self.rows("SELECT tick_rate FROM runs ORDER BY id DESC LIMIT 1")
        return float(found[0]["tick_rate"]) if found else None

    def names_of_events(self, limit: int = 500) -> tuple[list[str], list[str]]:
        """Return event types and sources that there were."""
        with self.asking() as ask:
            types = ask("SELECT name FROM event_types ORDER BY name LIMIT :limit", limit=limit)
            sources = ask("SELECT name FROM event_sources ORDER BY name LIMIT :limit", limit=limit)
        return [row["name"] for row in types], [row["name"] for row in sources]

"""What a database has recorded of an agent's units: what each one saw, and what it did.

For `testing/replay.py`. One read-only connection, opened once and held, because nothing can be opened while a hook is
replayed; hooks ask for values from their threads, so there is a lock. Each question reads by itself: nothing keeps a
running loop from emptying its log, and rows of the past don't change. Where a prune or a redaction comes between, the
unit is found incomplete (`RecordedUnit.gone`) and never read wrong.

Numbers of units grow with iterations, those of delayed events, tasks and moves with the units and commits that made
them, so a span of any of these is found by halving, and no index is needed.
"""

from __future__ import annotations

import sqlite3
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from sqlalchemy import Select, bindparam, func, select, text
from sqlalchemy.exc import DBAPIError

from ael_store.clock import iso
from ael_store.errors import AgentNotFound, DatabaseNotUsable, HistoryGone, UsageError
from ael_store.model.event import REDACTED, EventRecord, compile_patterns
from ael_store.model.records import DelayedRecord, TaskRecord, TickError, TickRow
from ael_store.model.unit import Kind, Outcome
from ael_store.schema.indexed import INDEXED
from ael_store.schema.tables import KINDS, OUTCOMES, metadata
from ael_store.store.moment import Horizon, horizon_of
from ael_store.store.reader import _columns, _event_records, _records
from ael_store.store.revision import refuse_other
from ael_store.store.sqlite import read_engine, translate

__all__ = ["REMOVED", "Recorded", "RecordedAgent", "RecordedRun", "RecordedUnit", "Span"]

T = metadata.tables
BATCH = 256
"""Units that are read together."""
MOST_IN_A_COMMIT = 5
"""Moves of one agent's metadata in the commits of one unit that are considered."""
MOST_ITERATIONS = 6
LAST_NUMBER = 2**62

KIND_NAMES: dict[int, Kind] = {number: name for name, number in KINDS.items()}  # type: ignore[misc]
OUTCOME_NAMES: dict[int, Outcome] = {number: name for name, number in OUTCOMES.items()}  # type: ignore[misc]

REMOVED = "what it did was removed by retention"


@dataclass(frozen=True, slots=True)
class RecordedAgent:
    """An agent as the database knows it."""

    id: int
    name: str
    names: tuple[str, ...]
    """This name and earlier ones."""
    renamed_commit_id: int
    """The commit in which it got this name; 0 where it had no other."""


@dataclass(frozen=True, slots=True)
class Span:
    """Units of an agent: from one number to another, of some kinds."""

    agent: RecordedAgent
    first: int
    last: int
    kinds: tuple[int, ...]
    count: int


@dataclass(frozen=True, slots=True)
class RecordedRun:
    """A run: its number, and when it began."""

    id: int
    started_us: int
    first_iteration: int


@dataclass(slots=True)
class RecordedUnit:
    """One unit: what caused it, and what it did. Values are JSON text."""

    row: TickRow
    kind: Kind
    outcome: Outcome
    failure: TickError | None = None
    writes: dict[str, str | None] = field(default_factory=dict)
    """The keys that it changed; None where it removed one."""
    events: list[EventRecord] = field(default_factory=list)
    """Those of the loop itself are among them."""
    delayed: list[DelayedRecord] = field(default_factory=list)
    tasks: list[TaskRecord] = field(default_factory=list)
    cause: EventRecord | None = None
    task: TaskRecord | None = None
    """The task whose result it took up."""
    upgrade_from: int | None = None
    """The version of the agent's data that it was to bring up to date, where its hook was `on_upgrade`."""
    runs: tuple[RecordedRun, ...] = ()
    """The run that it belongs to; several where the times don't tell which."""
    iterations: tuple[int, ...] = ()
    """The iteration in which it began, the likely one first."""
    metadata: tuple[str | None, ...] = (None,)
    """The agent's metadata before it, the likely one first; None where there had been none yet."""
    redelivered: tuple[bool, ...] = (False,)
    """Whether its event came again from the dead letters, the likely answer first."""
    gone: str | None = None
    """Why it can't be replayed; None where it can."""

    @property
    def seen_change_id(self) -> int:
        """The last change that it could see when it began."""
        return self.row.change_id if self.row.seen_change_id is None else self.row.seen_change_id


class Recorded:
    """Read-only questions about recorded units. May be used from any thread; close it when done.

    Raises SchemaTooOld, SchemaTooNew, NotADatabase or DatabaseNotUsable where it is no database of this program's.
    """

    def __init__(self, path: Path) -> None:
        _check_revision(path)
        self.path = path
        self._engine = read_engine(path)
        self._lock = threading.RLock()
        try:
            self._connection = self._engine.connect()
        except DBAPIError as error:
            raise translate(error, path) from error
        self.horizon: Horizon = self._guarded(lambda: horizon_of(self._connection))
        self._runs: list[RecordedRun] | None = None
        self._iterations: dict[int, tuple[int, int, int, int] | None] = {}
        self._subscriptions: dict[int, bool] = {}
        self._upgrades: dict[int, int] | None = None

    def close(self) -> None:
        with self._lock:
            self._connection.close()
            self._engine.dispose()

    def _guarded(self, action: Any) -> Any:
        with self._lock:
            try:
                return action()
            except (DBAPIError, sqlite3.Error, UnicodeDecodeError) as error:
                raise translate(error, self.path) from error

    def _all(self, query: Any, **parameters: Any) -> Sequence[Any]:
        return self._guarded(lambda: self._connection.execute(query, parameters).fetchall())  # type: ignore[no-any-return]

    def _first(self, query: Any, **parameters: Any) -> Any:
        found = self._all(query, **parameters)
        return found[0] if found else None

    def _scalar(self, query: Any, **parameters: Any) -> Any:
        found = self._first(query, **parameters)
        return None if found is None else found[0]

    # -- which units --

    def agent(self, name: str) -> RecordedAgent:
        """Return what is known of an agent; raises AgentNotFound, naming those that exist."""
        a, m = T["agents"], T["moves"]
        number = self._scalar(select(a.c.id).where(a.c.name == name, a.c.id > 0))
        if number is None:
            known = ", ".join(self._scalars(select(a.c.name).where(a.c.id > 0).order_by(a.c.name))) or "none"
            raise AgentNotFound(f"no agent {name!r} is known to {self.path}; known are: {known}")
        renames = self._all(
            select(m.c.commit_id, m.c.subject, m.c.value)
            .where(m.c.kind == "flag", m.c.value.like('%"renamed_from"%'))
            .order_by(m.c.id.desc())
        )
        names, since = [name], 0
        for commit_id, subject, value in renames:
            if subject == names[-1]:
                from orjson import loads

                names.append(loads(value)["renamed_from"])
                since = since or commit_id
        return RecordedAgent(number, name, tuple(names), since)

    def _scalars(self, query: Any, **parameters: Any) -> list[Any]:
        return [row[0] for row in self._all(query, **parameters)]

    def span(
        self,
        agent: RecordedAgent,
        *,
        kinds: Sequence[Kind] = (),
        iterations: tuple[int, int] | None = None,
        unit: int | None = None,
        last: int | None = None,
    ) -> Span:
        """Return the units of an agent that are asked for: of kinds, of iterations, one, or the last ones of these.

        Raises HistoryGone where all of them were removed, UsageError where there never were any.
        """
        horizon = self.horizon
        first, end = horizon.tick_id + 1, LAST_NUMBER
        gone = ""
        if iterations is not None:
            low, high = iterations
            first = max(first, self._first_number("ticks", "iteration", low))
            end = self._first_number("ticks", "iteration", high + 1) - 1
            gone = f"iteration {high} is before that" if high <= horizon.iteration else ""
        if unit is not None:
            first, end = max(first, unit), unit
            gone = f"unit {unit} is before that" if unit <= horizon.tick_id else ""
        if gone and horizon.tick_id:
            began = "" if horizon.started_us is None else f", {iso(horizon.started_us)}"
            raise HistoryGone(f"history begins after iteration {horizon.iteration}{began}, and {gone}")
        numbers = tuple(KINDS[kind] for kind in kinds) or tuple(KINDS.values())
        t = INDEXED["ticks"]
        mine = (t.c.agent_id == agent.id, t.c.id >= first, t.c.id <= end, t.c.kind.in_(numbers))
        if last is not None:
            newest = select(t.c.id).where(*mine).order_by(t.c.id.desc()).limit(last).subquery()
            oldest = self._scalar(select(func.min(newest.c.id)))
            first = first if oldest is None else oldest
        count = self._scalar(select(func.count()).select_from(t).where(t.c.id >= first, *mine))
        newest_id = self._scalar(select(func.max(t.c.id)).where(*mine))
        if not count:
            what = "unit" if not kinds else f"unit of kind {' or '.join(kinds)}"
            where = f" number {unit}" if unit is not None else ""
            if iterations is not None:
                low, high = iterations
                where = f" in iteration {low}" if low == high else f" in iterations {low} to {high}"
            raise UsageError(
                f"agent {agent.name!r} has no recorded {what}{where}: what changed, emitted and consumed nothing and "
                "succeeded leaves no row"
            )
        return Span(agent, first, newest_id, numbers, count)

    def _first_number(self, table: str, column: str, value: int) -> int:
        """Return the first number of a table whose column has this value or a larger one; it grows with the number."""
        c = T[table].c
        probe = select(c.id, c[column]).where(c.id >= bindparam("low")).order_by(c.id).limit(1)
        low, high = 0, (self._scalar(select(func.max(c.id))) or 0) + 1
        while low < high:
            middle = (low + high) // 2
            found = self._first(probe, low=middle)
            if found is None or found[1] >= value:
                high = middle
            else:
                low = found[0] + 1
        return low

    # -- units --

    def units(self, span: Span) -> Iterator[RecordedUnit]:
        """Yield the units in order, each complete, or with what is missing in `gone`."""
        t = INDEXED["ticks"]
        query = (
            select(*_columns(t))
            .where(
                t.c.agent_id == span.agent.id,
                t.c.id > bindparam("after"),
                t.c.id <= span.last,
                t.c.kind.in_(span.kinds),
            )
            .order_by(t.c.id)
            .limit(BATCH)
        )
        log = _MetadataLog(self, span.agent)
        after = span.first - 1
        while rows := [TickRow(*row) for row in self._all(query, after=after)]:
            delayed: dict[int, list[DelayedRecord]] = {}
            for record in self._made_by("delayed_events", rows, DelayedRecord):
                delayed.setdefault(record.tick_id, []).append(record)
            tasks: dict[int, list[TaskRecord]] = {}
            for record in self._made_by("tasks", rows, TaskRecord):
                tasks.setdefault(record.tick_id, []).append(record)
            for row in rows:
                unit = RecordedUnit(row, KIND_NAMES[row.kind], OUTCOME_NAMES[row.outcome])
                unit.delayed, unit.tasks = delayed.get(row.id, []), tasks.get(row.id, [])
                unit.gone = self._complete(unit, span.agent, log)
                yield unit
            after = rows[-1].id
            self._iterations.clear()

    def _made_by(self, table: str, rows: list[TickRow], record: Any) -> list[Any]:
        """Return the rows of a table that these units, or others between them, have made."""
        low = self._first_number(table, "tick_id", rows[0].id)
        high = self._first_number(table, "tick_id", rows[-1].id + 1)
        if low >= high:
            return []
        query = _records(table).where(T[table].c.id >= low, T[table].c.id < high).order_by(T[table].c.id)
        return [record(*row) for row in self._all(query)]

    def _complete(self, unit: RecordedUnit, agent: RecordedAgent, log: _MetadataLog) -> str | None:
        """Fill in what belongs to a unit; returns why it can't be replayed."""
        row = unit.row
        commits = self._commits_of(row.iteration)
        if agent.renamed_commit_id and commits[0] < agent.renamed_commit_id:
            return f"before the agent was named {agent.name!r}"
        if unit.outcome == "cancelled":
            return "it was cut off"
        if unit.seen_change_id < self.horizon.change_id:
            return "it saw a moment before the history begins"
        if unit.kind == "start":
            unit.upgrade_from = self._upgrades_of(agent).get(row.id)
        if unit.outcome != "success":
            found = self._first(ERROR, tick=row.id)
            unit.failure = None if found is None else TickError(*found)
        if row.changes:
            changes = self._all(CHANGES, after=row.change_id, until=row.change_id + row.changes)
            if len(changes) != row.changes:
                return REMOVED
            if any(value == REDACTED and self._is_redacted("state_changes", number) for number, _, value in changes):
                return "a value that it wrote was redacted"
            unit.writes = {key: value for _, key, value in changes}
        if row.events:
            found = self._all(EVENTS, after=row.event_id, until=row.event_id + row.events)
            unit.events = [EventRecord(*event) for event in found]
            if len(unit.events) != row.events:
                return REMOVED
            if any(event.data == REDACTED and self._is_redacted("events", event.id) for event in unit.events):
                return "an event that it emitted was redacted"
        if any(record.data == REDACTED for record in unit.delayed):
            return "an event that it emitted was redacted"
        gone = self._find_cause(unit, agent)
        if gone is not None:
            return gone
        unit.runs = self._runs_of(unit)
        unit.iterations = self._iterations_of(unit)
        unit.metadata = log.around(*commits)
        return None

    def _upgrades_of(self, agent: RecordedAgent) -> dict[int, int]:
        """Return the units in which an agent's `on_upgrade` ran, each with the version that it came from."""
        if self._upgrades is None:
            from orjson import loads

            m = T["moves"]
            query = select(m.c.value).where(m.c.kind == "version", m.c.subject.in_(agent.names))
            moves = map(loads, self._scalars(query))
            self._upgrades = {move["unit"]: move["from"] for move in moves if move["unit"] is not None}
        return self._upgrades

    def _find_cause(self, unit: RecordedUnit, agent: RecordedAgent) -> str | None:
        row = unit.row
        if row.cause_event_id is not None:
            found = self._first(EVENTS, after=row.cause_event_id - 1, until=row.cause_event_id)
            if found is None or found[5] is None:
                return "the event that caused it was removed by retention"
            unit.cause = EventRecord(*found)
            if unit.cause.data == REDACTED and self._is_redacted("events", row.cause_event_id):
                return "the event that caused it was redacted"
        if unit.kind == "event":
            return self._find_delivery(unit, agent)
        if row.cause_task_id is not None:
            found = self._first(_records("tasks").where(T["tasks"].c.id == row.cause_task_id))
            if found is None:
                return "the task that caused it was removed"
            unit.task = TaskRecord(*found)
            if not unit.task.is_over or (unit.task.ended_us or 0) > row.started_us:
                return "the task that caused it was run again since"
        return None

    def _find_delivery(self, unit: RecordedUnit, agent: RecordedAgent) -> str | None:
        """Tell `on_event` from a callback, and a delivery from one of a dead letter."""
        row, cause = unit.row, unit.cause
        assert cause is not None
        callback = "it was a callback of `bus.subscribe`, which is not the agent's"
        s, p, d = T["subscriptions"], T["subscription_patterns"], T["dead_letters"]
        if row.subscription_id is not None:
            if row.subscription_id not in self._subscriptions:
                owner = self._scalar(select(s.c.agent_id).where(s.c.id == row.subscription_id))
                self._subscriptions[row.subscription_id] = owner is not None
            return None if self._subscriptions[row.subscription_id] else callback
        # Neither a failed delivery nor one of a dead letter moves a cursor, so the row does not say which it was.
        callbacks = select(p.c.pattern).join_from(s, p, p.c.subscription_id == s.c.id)
        patterns = self._scalars(callbacks.where(s.c.agent_id.is_(None), s.c.subscriber.in_(agent.names)))
        if patterns and compile_patterns(patterns)(cause.type):
            return "it may have been a callback of `bus.subscribe`"
        if unit.outcome == "success":
            unit.redelivered = (True,)
        elif self._scalar(select(func.count()).select_from(d).where(d.c.event_id == cause.id)):
            unit.redelivered = (False, True)
        return None

    def _is_redacted(self, kind: str, number: int) -> bool:
        return self._first(REDACTION, kind=kind, number=number) is not None

    # -- when a unit was --

    def _iteration(self, number: int) -> tuple[int, int, int, int] | None:
        """Return run, commit, begin and the last unit before an iteration; None where there is no row of it."""
        if number not in self._iterations:
            found = self._first(ITERATION, number=number)
            self._iterations[number] = None if found is None else tuple(found)
        return self._iterations[number]

    def _commits_of(self, iteration: int) -> tuple[int, int]:
        """Return the first and the last commit that can hold a unit of an iteration."""
        this, following = self._iteration(iteration), self._iteration(iteration + 1)
        first = 0 if this is None else this[1]
        return first, LAST_NUMBER if following is None else max(first, following[1] - 1)

    def _runs_of(self, unit: RecordedUnit) -> tuple[RecordedRun, ...]:
        if self._runs is None:
            r = T["runs"]
            rows = self._all(select(r.c.id, r.c.started_us, r.c.first_iteration).order_by(r.c.id))
            self._runs = [RecordedRun(*row) for row in rows]
        found = self._iteration(unit.row.iteration)
        if found is not None and unit.kind not in ("start", "shutdown"):
            return tuple(run for run in self._runs if run.id == found[0])
        began = [
            run
            for run in self._runs
            if run.first_iteration - 1 <= unit.row.iteration and run.started_us <= unit.row.started_us
        ]
        return tuple(run for run in reversed(began) if run.started_us == began[-1].started_us)

    def _iterations_of(self, unit: RecordedUnit) -> tuple[int, ...]:
        """Return the iteration in which a unit began; its row has the one in which it took effect."""
        row = unit.row
        number, found = row.iteration, self._iteration(row.iteration)
        if unit.kind in ("start", "shutdown"):
            return (number,)
        likely: list[int] = []
        while found is not None and len(likely) < MOST_ITERATIONS:
            if likely and found[2] != row.started_us:  # several are possible where the clock stood still
                break
            if found[2] <= row.started_us and (row.seen_change_id is None or self._began_by(found[3], unit)):
                likely.append(number)
            number -= 1
            found = self._iteration(number)
        return tuple(likely) or (row.iteration,)

    def _began_by(self, tick_id: int, unit: RecordedUnit) -> bool:
        """True where the iteration after a unit began with no more changes than this unit saw."""
        t = T["ticks"]
        first = self._scalar(select(t.c.change_id).where(t.c.id > tick_id).order_by(t.c.id).limit(1))
        return first is None or first <= unit.seen_change_id

    # -- what a unit saw --

    def value(self, key: str, change_id: int) -> tuple[str, bool] | None:
        """Return the JSON text of a key after a change, and whether it was redacted since; None where it had none."""
        found = self._first(VALUE, key=key, change=change_id)
        if found is None or found[1] is None:
            return None
        return found[1], found[1] == REDACTED and self._is_redacted("state_changes", found[0])

    def state(self, change_id: int) -> dict[str, str]:
        """Return the whole state after a change: one seek for each key."""
        return {key: value for key, value in self._all(STATE, change=change_id) if value is not None}

    def changes(self, after: int, until: int) -> list[tuple[str, str | None]]:
        """Return the changes with `after < id <= until`, in order."""
        return [(key, value) for _, key, value in self._all(CHANGES, after=after, until=until)]

    def changed(self, key: str, after: int, until: int) -> bool:
        """True where a key has a change with `after < id <= until`."""
        return self._first(CHANGED, key=key, after=after, until=until) is not None

    def history(self, key: str | None, change_id: int, limit: int) -> list[dict[str, Any]]:
        """Return the newest changes up to one, newest first, in the shape of `Reader.history`."""
        where = "" if key is None else "key = :key AND"
        query = text(
            "SELECT id, key, operation, old_value, new_value, agent, iteration, changed_at FROM v_state_history "
            f"WHERE {where} id <= :change ORDER BY id DESC LIMIT :limit"
        )
        parameters = {"change": change_id, "limit": limit} | ({} if key is None else {"key": key})
        return [dict(row._mapping) for row in self._all(query, **parameters)]

    def recent_events(self, event_id: int, limit: int) -> list[EventRecord]:
        """Return the newest events up to one, oldest first."""
        return [EventRecord(*row) for row in self._all(RECENT, until=event_id, limit=limit)][::-1]

    def failed_before(self, unit: RecordedUnit) -> TickError | None:
        """Return why the unit failed that an `on_error` was called for; None where that is not known."""
        t = INDEXED["ticks"]
        failed = (
            select(t.c.id, t.c.cause_event_id)
            .where(t.c.agent_id == unit.row.agent_id, t.c.id < unit.row.id, t.c.kind != KINDS["error"])
            .where(t.c.outcome.in_([OUTCOMES[name] for name in ("error", "timeout", "cancelled")]))
        )
        found = self._first(failed.order_by(t.c.id.desc()).limit(1))
        if found is None or found[1] != unit.row.cause_event_id:
            return None
        error = self._first(ERROR, tick=found[0])
        return None if error is None else TickError(*error)

    def before(self, unit: RecordedUnit) -> tuple[int, Outcome] | None:
        """Return number and outcome of the last unit of the agent before this one; None where there is none."""
        t = INDEXED["ticks"]
        mine = select(t.c.id, t.c.outcome).where(t.c.agent_id == unit.row.agent_id, t.c.id < unit.row.id)
        found = self._first(mine.order_by(t.c.id.desc()).limit(1))
        return None if found is None else (found[0], OUTCOME_NAMES[found[1]])

    # -- tasks --

    def had_task(self, key: str, tick_id: int) -> bool:
        """True where a unit before this one had submitted a task with this key."""
        t = T["tasks"]
        return self._first(select(t.c.id).where(t.c.key == key, t.c.tick_id < tick_id)) is not None

    def may_lack_tasks(self, tick_id: int, started_us: int, kept_us: int) -> bool:
        """True where tasks that a unit submitted may have been removed: it is old enough, and numbers are missing.

        `kept_us` is how long a task is kept once its result was taken up. A submission with a known key leaves a
        hole in the numbers as well.
        """
        t, i = T["tasks"], T["iterations"]
        newest_us = self._scalar(select(i.c.started_us).order_by(i.c.id.desc()).limit(1)) or 0
        if started_us > newest_us - kept_us:
            return False
        first = self._first_number("tasks", "tick_id", tick_id)
        end = self._first_number("tasks", "tick_id", tick_id + 1)
        before = self._scalar(select(func.max(t.c.id)).where(t.c.id < first)) or 0
        after = self._scalar(select(func.min(t.c.id)).where(t.c.id >= end))
        mine = self._scalar(select(func.count()).select_from(t).where(t.c.id >= first, t.c.id < end))
        return after is None or after - before - 1 > mine

    def is_gone(self, unit: RecordedUnit) -> bool:
        """True where retention has come to a unit since."""
        horizon: Horizon = self._guarded(lambda: horizon_of(self._connection))
        return horizon.tick_id >= unit.row.id


class _MetadataLog:
    """What an agent's `metadata` was before each commit; asked for in order of the commits."""

    def __init__(self, recorded: Recorded, agent: RecordedAgent) -> None:
        self._recorded = recorded
        m = T["moves"]
        mine = select(m.c.id, m.c.commit_id, m.c.value).where(m.c.kind == "metadata", m.c.subject.in_(agent.names))
        self._before = mine.where(m.c.id < bindparam("low")).order_by(m.c.id.desc()).limit(1)
        self._next = mine.where(m.c.id >= bindparam("low")).order_by(m.c.id).limit(BATCH)
        self._coming: deque[tuple[int, str]] = deque()
        """Moves that were read and belong to no commit before: commit and value."""
        self._low: int | None = None
        """The first move that was not read yet; None before the first question, LAST_NUMBER after the last move."""
        self._value: str | None = None

    def around(self, first: int, last: int) -> tuple[str | None, ...]:
        """Return the metadata before the first of these commits, then what it became in them."""
        if self._low is None:
            self._low = self._recorded._first_number("moves", "commit_id", first)
            before = self._recorded._first(self._before, low=self._low)
            self._value = None if before is None else before[2]
        while True:
            while self._coming and self._coming[0][0] < first:
                self._value = self._coming.popleft()[1]
            if len(self._coming) > MOST_IN_A_COMMIT or self._low == LAST_NUMBER:
                break
            self._read()
        inside = (value for commit_id, value in islice(self._coming, MOST_IN_A_COMMIT) if commit_id <= last)
        return tuple(dict.fromkeys((self._value, *inside)))

    def _read(self) -> None:
        rows = self._recorded._all(self._next, low=self._low)
        self._coming += [(commit_id, value) for _, commit_id, value in rows]
        self._low = rows[-1][0] + 1 if len(rows) == BATCH else LAST_NUMBER


def _check_revision(path: Path) -> None:
    if not path.exists():
        raise DatabaseNotUsable(f"{path} does not exist; name the database whose units are to be replayed")
    refuse_other(path)


# -- questions ----------------------------------------------------------------------------------------


def _queries() -> tuple[Select[Any], ...]:
    c, k, e, i = T["state_changes"], T["keys"], T["events"], T["iterations"]
    of_key = INDEXED["state_changes"]
    x, r = T["tick_errors"], T["row_digests"]
    number = select(k.c.id).where(k.c.name == bindparam("key")).scalar_subquery()
    after: Any = bindparam("after")
    until: Any = bindparam("until")
    newest = (
        select(of_key.c.id)
        .where(of_key.c.key_id == k.c.id, of_key.c.id <= bindparam("change"))
        .order_by(of_key.c.id.desc())
        .limit(1)
        .correlate(k)
        .scalar_subquery()
    )
    return (
        select(of_key.c.id, of_key.c.value)
        .where(of_key.c.key_id == number, of_key.c.id <= bindparam("change"))
        .order_by(of_key.c.id.desc())
        .limit(1),
        select(k.c.name, c.c.value).join_from(k, c, c.c.id == newest),
        select(c.c.id, k.c.name, c.c.value)
        .join_from(c, k, k.c.id == c.c.key_id)
        .where(c.c.id > after, c.c.id <= until)
        .order_by(c.c.id),
        select(of_key.c.id).where(of_key.c.key_id == number, of_key.c.id > after, of_key.c.id <= until).limit(1),
        _event_records().where(e.c.id > after, e.c.id <= until).order_by(e.c.id),
        _event_records().where(e.c.id <= until).order_by(e.c.id.desc()).limit(bindparam("limit")),
        select(i.c.run_id, i.c.commit_id, i.c.started_us, i.c.tick_id).where(i.c.id == bindparam("number")),
        select(x).where(x.c.tick_id == bindparam("tick")),
        select(r.c.row_id).where(
            r.c.kind == bindparam("kind"), r.c.row_id == bindparam("number"), r.c.why == "redacted"
        ),
    )


VALUE, STATE, CHANGES, CHANGED, EVENTS, RECENT, ITERATION, ERROR, REDACTION = _queries()

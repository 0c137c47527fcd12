"""One commit, one transaction: turns a `Commit` into rows and writes them.

The statements are SQLAlchemy constructs, compiled once; the transaction runs as one function on the driver's
connection, because a hop per statement costs more than the statements. Rows are tuples in the order of the
compiled parameters. Of what history gets most of, there are statements without the columns that are NULL: Python's
`sqlite3` takes as long for one NULL as for five numbers (it asks its adapters what to do with it), and twice as long
for a row that is no plain tuple.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from functools import cache
from operator import attrgetter
from typing import Any

from sqlalchemy import Table, bindparam, delete, insert, literal_column, select, update
from sqlalchemy.dialects import sqlite
from sqlalchemy.sql.expression import Executable

from ael_store.errors import OwnershipLost
from ael_store.model.event import EventRecord, glob_of
from ael_store.model.records import (
    AgentMark,
    AgentRecord,
    AgentStats,
    AgentTotals,
    AttemptRecord,
    CommandRecord,
    Commit,
    DeadLetterRecord,
    DelayedRecord,
    IterationRecord,
    LimitRecord,
    RunRecord,
    ScheduleRecord,
    SubscriptionRecord,
    TaskRecord,
    TickError,
    TickRow,
)
from ael_store.model.state import Cell
from ael_store.schema.tables import metadata
from ael_store.store.catch_up import catch_up
from ael_store.store.digest import agent_content, row_digest, seal

__all__ = ["Writer"]

TABLES = metadata.tables
DIALECT = sqlite.dialect(paramstyle="qmark")
NULLABLE_OF_TICK = TickRow._fields.index("seen_change_id")
"""This column of `ticks` and those after it may be NULL."""
EVENT_COLUMNS = ("id", "type_id", "source_id", "data", "timestamp_us", "tick_id")
NAMES_KEPT = 20_000

Rows = Iterable[tuple[Any, ...]]


def _columns(record: type) -> tuple[str, ...]:
    return getattr(record, "_fields", None) or tuple(item.name for item in fields(record) if item.name != "patterns")


# -- compiling: the same texts for every database, so a process that opens several makes them once --


def _sql(statement: Executable, parameters: tuple[str, ...]) -> str:
    compiled: Any = statement.compile(dialect=DIALECT)  # type: ignore[attr-defined]
    found = tuple(compiled.positiontup or ())
    if found != parameters:
        raise AssertionError(f"parameters of {compiled} are {found}, the rows are {parameters}")
    return str(compiled)


@cache
def _insert(table: str, columns: tuple[str, ...]) -> str:
    values: dict[str, Any] = {name: bindparam(name) for name in columns}
    if "recent" in TABLES[table].c:
        values["recent"] = literal_column("1")
    return _sql(insert(TABLES[table]).values(values), columns)


@cache
def _upsert(table: str, columns: tuple[str, ...]) -> str:
    target: Table = TABLES[table]
    statement = sqlite.insert(target).values({name: bindparam(name) for name in columns})
    primary = [column.name for column in target.primary_key]
    changed = {name: statement.excluded[name] for name in columns if name not in primary}
    return _sql(statement.on_conflict_do_update(index_elements=primary, set_=changed), columns)


class Writer:
    """The statements of a commit, and the numbers of interned names that it has met."""

    def __init__(self) -> None:
        self._names: dict[str, OrderedDict[str, int]] = {
            table: OrderedDict() for table in ("keys", "event_types", "event_sources")
        }
        self.fence = _sql(select(TABLES["lease"].c.token, TABLES["lease"].c.holder), ())
        self.take = _sql(
            update(TABLES["lease"]).values(
                token=bindparam("token"), holder=bindparam("holder"), taken_us=bindparam("at")
            ),
            ("token", "holder", "at"),
        )
        self.insert = {
            name: _insert(name.partition(" of ")[0], columns)
            for name, columns in {
                "ticks": TickRow._fields,
                "ticks of the clock": TickRow._fields[:NULLABLE_OF_TICK],
                "ticks of events": (*TickRow._fields[:NULLABLE_OF_TICK], "cause_event_id", "subscription_id"),
                "events": (*EVENT_COLUMNS[:4], "metadata", *EVENT_COLUMNS[4:], "hops", "target_id"),
                "events of ticks": EVENT_COLUMNS,
                "events of handlers": (*EVENT_COLUMNS, "hops"),
                "tick_errors": TickError._fields,
                "iterations": (*_columns(IterationRecord), "seal"),
                "commits": ("id", "kind", "iteration", "run_id", "at_us", "seal"),
                "state_changes": ("id", "key_id", "value", "previous_id", "tick_id"),
                "subscription_patterns": ("subscription_id", "pattern", "glob"),
                "moves": ("id", "commit_id", "kind", "subject", "value"),
            }.items()
        }
        self.upsert = {
            "runs": _upsert("runs", (*_columns(RunRecord), "digest")),
            "agents": _upsert("agents", (*_columns(AgentRecord)[:-1], "digest", "data_version")),
            "agent_stats": _upsert("agent_stats", (*_columns(AgentStats), "digest")),
            "agent_marks": _upsert("agent_marks", (*AgentMark._fields, "digest")),
            "agent_totals": _upsert("agent_totals", (*_columns(AgentTotals), "digest")),
            "subscriptions": _upsert("subscriptions", (*_columns(SubscriptionRecord), "digest")),
            "dead_letters": _upsert("dead_letters", (*_columns(DeadLetterRecord), "digest")),
            "delayed_events": _upsert("delayed_events", (*_columns(DelayedRecord), "digest")),
            "schedules": _upsert("schedules", (*_columns(ScheduleRecord), "digest")),
            "commands": _upsert("commands", _columns(CommandRecord)),
            "tasks": _upsert("tasks", (*_columns(TaskRecord), "digest")),
            "task_attempts": _upsert("task_attempts", (*_columns(AttemptRecord), "digest")),
            "limits": _upsert("limits", (*_columns(LimitRecord), "digest")),
            "positions": _upsert("positions", ("name", "value", "digest")),
            "state": _upsert("state", ("key_id", "value", "version", "change_id", "agent_id")),
        }
        tasks = TABLES["tasks"]
        columns = (*_columns(TaskRecord), "digest")
        self.insert_task = _sql(
            sqlite.insert(tasks)
            .values({name: bindparam(name) for name in columns})
            .on_conflict_do_nothing(index_elements=["key"]),
            columns,
        )
        attempts = TABLES["task_attempts"]
        self.delete_tasks = [
            _sql(delete(attempts).where(attempts.c.task_id == bindparam("task")), ("task",)),
            _sql(delete(tasks).where(tasks.c.id == bindparam("task")), ("task",)),
        ]
        self.task_of_key = _sql(select(tasks.c.id).where(tasks.c.key == bindparam("k")), ("k",))
        state = TABLES["state"]
        # the name of a parameter in WHERE must differ from the columns that are set
        self.update_state = _sql(
            update(state)
            .where(state.c.key_id == bindparam("key"))
            .values(value=bindparam("text"), version=bindparam("v"), change_id=bindparam("change")),
            ("text", "v", "change", "key"),
        )
        self.delete_state = _sql(delete(state).where(state.c.key_id == bindparam("key")), ("key",))
        stats = TABLES["agent_stats"]
        self.delete_stats = _sql(delete(stats).where(stats.c.agent_id == bindparam("agent")), ("agent",))
        patterns = TABLES["subscription_patterns"]
        self.delete_patterns = _sql(
            delete(patterns).where(patterns.c.subscription_id == bindparam("subscription")), ("subscription",)
        )
        self.intern = {name: _insert(name, ("id", "name")) for name in self._names}
        self.lookup = {
            name: _sql(select(TABLES[name].c.id).where(TABLES[name].c.name == bindparam("n")), ("n",))
            for name in self._names
        }
        self.last_ids = {table: 0 for table in (*self._names, "moves")}
        self.token = 0
        """The fencing token of the last commit."""

    # -- interning --

    def remember(self, table: str, name: str, number: int) -> int:
        """Keep the number of an interned name; the least recently used one goes when there are too many."""
        known = self._names[table]
        known[name] = number
        if len(known) > NAMES_KEPT:
            known.popitem(last=False)
        return number

    def _number(self, cursor: Any, table: str, name: str, fresh: dict[tuple[str, str], int]) -> int:
        known = self._names[table].get(name)
        if known is None:
            known = fresh.get((table, name))
        if known is None:
            cursor.execute(self.lookup[table], (name,))
            row = cursor.fetchone()
            if row is not None:
                known = int(row[0])
            else:
                known = self.last_ids[table] + 1
                self.last_ids[table] = known
                cursor.execute(self.intern[table], (known, name))
            fresh[table, name] = known
        return known

    # -- writing --

    def write(self, connection: Any, commit: Commit, take_from: int | None = None, holder: str = "") -> None:
        """Write a commit in one transaction; runs in the driver's thread.

        With `take_from` the fencing token moves from that value to the commit's. Raises OwnershipLost where
        another owner has moved it; nothing is written then.
        """
        cursor = connection.cursor()
        before = dict(self.last_ids)
        try:
            if commit.redactions:
                cursor.execute("PRAGMA secure_delete = ON")  # what is blanked goes from free space as well
            cursor.execute("BEGIN IMMEDIATE")
            try:
                fresh = self._write(cursor, commit, take_from, holder)
                cursor.execute("COMMIT")
            except BaseException:
                self.last_ids = before
                if getattr(connection, "in_transaction", True):
                    cursor.execute("ROLLBACK")
                raise
        finally:
            if commit.redactions:
                cursor.execute("PRAGMA secure_delete = OFF")
            cursor.close()
        for (table, name), number in fresh.items():
            self.remember(table, name, number)
        self.last_ids["moves"] += len(commit.moves)
        self.token = commit.token

    def catch_up(self, connection: Any) -> None:
        """Have the indexes take up the recent rows, unless another owner has taken the database over."""
        cursor = connection.cursor()
        try:
            cursor.execute("BEGIN IMMEDIATE")
            try:
                cursor.execute(self.fence)
                if cursor.fetchone()[0] == self.token:
                    catch_up(cursor)
                cursor.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    cursor.execute("ROLLBACK")
                raise
        finally:
            cursor.close()

    def _write(self, cursor: Any, commit: Commit, take_from: int | None, holder: str) -> dict[tuple[str, str], int]:
        many: Callable[[str, list[tuple[Any, ...]]], Any] = cursor.executemany
        cursor.execute(self.fence)
        token, owner = cursor.fetchone()
        if token != (commit.token if take_from is None else take_from):
            raise OwnershipLost(
                f"another owner ({owner}) has taken the database over (its token is {token}, this run's is "
                f"{commit.token}): nothing of this commit was written, and this run ends"
            )
        if take_from is not None:
            cursor.execute(self.take, (commit.token, holder, commit.at_us))
        fresh: dict[tuple[str, str], int] = {}
        if commit.agents:
            rows = _rows(AgentRecord, commit.agents.values())
            many(self.upsert["agents"], [(*row[:-1], row_digest(agent_content(row)), row[-1]) for row in rows])
        if commit.changes:
            self._write_changes(cursor, commit, fresh)
        if commit.events:
            self._insert_shaped(cursor, self._event_rows(cursor, commit.events, fresh))
        if commit.ticks:
            self._insert_shaped(cursor, _tick_rows(commit.ticks))
        if commit.errors:
            many(self.insert["tick_errors"], commit.errors)  # type: ignore[arg-type]
        if commit.forgotten:
            many(self.delete_stats, [(number,) for number in commit.forgotten])
        if commit.stats:
            many(self.upsert["agent_stats"], _rows_with_digest(AgentStats, commit.stats.values()))
        moves = [(self.last_ids["moves"] + place, commit.id, *move) for place, move in enumerate(commit.moves, 1)]
        if moves:
            many(self.insert["moves"], moves)
        sealed = seal(commit, moves).pack()
        if commit.iterations:
            iterations = _rows(IterationRecord, commit.iterations)
            last = len(iterations) - 1 if commit.kind == "iteration" else -1
            many(
                self.insert["iterations"],
                [(*row, sealed if place == last else None) for place, row in enumerate(iterations)],
            )
        if commit.kind != "iteration":
            cursor.execute(
                self.insert["commits"],
                (commit.id, commit.kind, commit.iteration, commit.run_id, commit.at_us, sealed),
            )
        if commit.commands:
            many(self.upsert["commands"], _rows(CommandRecord, commit.commands))
        if commit.subscriptions:
            many(
                self.upsert["subscriptions"],
                [
                    (*row, row_digest((*row, sorted(record.patterns))))
                    for row, record in zip(
                        _rows(SubscriptionRecord, commit.subscriptions.values()),
                        commit.subscriptions.values(),
                        strict=True,
                    )
                ],
            )
        for table, record, values in (
            ("runs", RunRecord, commit.runs),
            ("dead_letters", DeadLetterRecord, commit.dead_letters.values()),
            ("delayed_events", DelayedRecord, commit.delayed.values()),
            ("schedules", ScheduleRecord, commit.schedules.values()),
            ("agent_totals", AgentTotals, commit.totals),
        ):
            if values:
                many(self.upsert[table], _rows_with_digest(record, values))
        if commit.new_tasks or commit.tasks or commit.attempts or commit.limits:
            self._write_tasks(cursor, commit)
        if commit.pruned_tasks:
            for statement in self.delete_tasks:
                many(statement, [(number,) for number in commit.pruned_tasks])
        if commit.marks:
            many(self.upsert["agent_marks"], [(*mark, row_digest(tuple(mark))) for mark in commit.marks])
        if commit.patterns:
            many(self.delete_patterns, [(record.id,) for record in commit.patterns])
            many(
                self.insert["subscription_patterns"],
                [(record.id, pattern, glob_of(pattern)) for record in commit.patterns for pattern in record.patterns],
            )
        if commit.positions:
            many(self.upsert["positions"], [(*item, row_digest(item)) for item in commit.positions.items()])
        for redaction in commit.redactions:
            from ael_store.store.redact import redact

            redact(cursor, redaction)
        if commit.metrics or commit.pruned_samples:
            from ael_store.store.metric_rows import write_metrics  # many agents record none

            write_metrics(cursor, commit)
        if commit.prune is not None:
            self._prune(cursor, commit.prune)
        for _ in range(commit.shrink_pages):  # Python takes one step of this statement, which is one page
            cursor.execute("PRAGMA incremental_vacuum(1)")
        return fresh

    def _prune(self, cursor: Any, step: Any) -> None:
        from ael_store.store.prune import PRUNING, carry_out  # where nothing is removed it is not needed

        carry_out(cursor, step)
        position = (PRUNING, "null" if step.next is None else step.next.to_json())
        cursor.execute(self.upsert["positions"], (*position, row_digest(position)))

    def _write_tasks(self, cursor: Any, commit: Commit) -> None:
        """Write tasks, attempts and limits; a new task whose key the table has already is not written."""
        many = cursor.executemany
        commit.known_keys = known = {}
        if commit.new_tasks:
            many(self.insert_task, _rows_with_digest(TaskRecord, commit.new_tasks.values()))
            if cursor.rowcount != len(commit.new_tasks):
                for task in commit.new_tasks.values():
                    ((number,),) = cursor.execute(self.task_of_key, (task.key,)).fetchall()
                    if number != task.id:
                        known[task.id] = number
        for table, record, values in (
            ("tasks", TaskRecord, commit.tasks.values()),
            ("task_attempts", AttemptRecord, [a for a in commit.attempts.values() if a.task_id not in known]),
            ("limits", LimitRecord, commit.limits.values()),
        ):
            if values:
                many(self.upsert[table], _rows_with_digest(record, values))

    def _insert_shaped(self, cursor: Any, rows: Iterable[tuple[str, tuple[Any, ...]]]) -> None:
        """Insert rows in their order, each by the statement that it names."""
        batch: list[tuple[Any, ...]] = []
        current = ""
        for name, row in rows:
            if name != current:
                if batch:
                    cursor.executemany(self.insert[current], batch)
                current, batch = name, []
            batch.append(row)
        cursor.executemany(self.insert[current], batch)

    def _event_rows(
        self, cursor: Any, events: Iterable[EventRecord], fresh: dict[tuple[str, str], int]
    ) -> Iterator[tuple[str, tuple[Any, ...]]]:
        types, sources, number = self._names["event_types"], self._names["event_sources"], self._number
        for event in events:
            type_id = types.get(event.type) or number(cursor, "event_types", event.type, fresh)
            source_id = sources.get(event.source) or number(cursor, "event_sources", event.source, fresh)
            timestamp_us, tick_id, hops = event.timestamp_us, event.tick_id, event.hops
            if event.metadata is None and event.target is None:
                row = (event.id, type_id, source_id, event.data, timestamp_us, tick_id)
                yield ("events of ticks", row) if hops is None else ("events of handlers", (*row, hops))
            else:
                target = None if event.target is None else number(cursor, "event_sources", event.target, fresh)
                yield (
                    "events",
                    (event.id, type_id, source_id, event.data, event.metadata, timestamp_us, tick_id, hops, target),
                )

    def _write_changes(self, cursor: Any, commit: Commit, fresh: dict[tuple[str, str], int]) -> None:
        rows: list[tuple[Any, ...]] = []
        newest: dict[str, tuple[int, Cell | None]] = {}
        kept: dict[str, Cell | None] = {}
        for change in commit.changes:
            key, old, new = change.key, change.old, change.new
            known = newest.get(key)
            if known is not None:
                number = known[0]
            else:
                kept[key] = old
                if old is not None and old.key_id is not None:
                    number = old.key_id
                else:
                    number = self._number(cursor, "keys", key, fresh)
            if new is not None:
                new.key_id = number
            newest[key] = (number, new)
            rows.append(
                (
                    change.id,
                    number,
                    None if new is None else new.text,
                    None if old is None else old.change_id,
                    change.tick_id,
                )
            )
        cursor.executemany(self.insert["state_changes"], rows)
        updates: list[tuple[Any, ...]] = []
        upserts: list[tuple[Any, ...]] = []
        deletes: list[tuple[Any, ...]] = []
        for key, (number, cell) in newest.items():
            before = kept[key]
            if cell is None:
                if before is not None:
                    deletes.append((number,))
            elif before is not None and before.agent_id == cell.agent_id:
                updates.append((cell.text, cell.version, cell.change_id, number))
            else:
                upserts.append((number, cell.text, cell.version, cell.change_id, cell.agent_id))
        if deletes:
            cursor.executemany(self.delete_state, deletes)
        if updates:
            cursor.executemany(self.update_state, updates)
        if upserts:
            cursor.executemany(self.upsert["state"], upserts)


def _tick_rows(ticks: Iterable[TickRow]) -> Iterator[tuple[str, tuple[Any, ...]]]:
    for row in ticks:
        seen, event, subscription, task = row[NULLABLE_OF_TICK:]
        if seen is not None or task is not None or (event is None) is not (subscription is None):
            yield "ticks", tuple(row)
        elif event is None:
            yield "ticks of the clock", row[:NULLABLE_OF_TICK]
        else:
            yield "ticks of events", (*row[:NULLABLE_OF_TICK], event, subscription)


_GETTERS: dict[type, Callable[[Any], tuple[Any, ...]]] = {}


def _rows(record: type, values: Iterable[Any]) -> list[tuple[Any, ...]]:
    getter = _GETTERS.get(record)
    if getter is None:
        getter = _GETTERS[record] = attrgetter(*_columns(record))
    return [getter(value) for value in values]


def _rows_with_digest(record: type, values: Iterable[Any]) -> list[tuple[Any, ...]]:
    return [(*row, row_digest(row)) for row in _rows(record, values)]

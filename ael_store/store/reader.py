"""Everything that is read: what a run resumes with, and the answers to users' questions.

Read-only connections, so none of this can write, create a database, or wait for the loop. Questions of users go
through the public views; what a run resumes with comes from the tables.
"""

from __future__ import annotations

import gc
import json
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import ColumnElement, Connection, Engine, FromClause, Select, and_, func, select, text
from sqlalchemy.exc import DBAPIError

from ael_store.clock import iso
from ael_store.model.event import EventRecord, glob_of
from ael_store.model.records import (
    AgentRecord,
    AgentStats,
    AgentTotals,
    AttemptRecord,
    CopyRecord,
    DeadLetterRecord,
    DelayedRecord,
    LimitRecord,
    LimitUse,
    MetricRecord,
    Resumed,
    RunRecord,
    ScheduleRecord,
    SubscriptionRecord,
    TaskRecord,
)
from ael_store.model.state import Cell
from ael_store.model.values import decode
from ael_store.schema.indexed import INDEXED
from ael_store.schema.recent import CHANGES
from ael_store.schema.tables import metadata
from ael_store.store.answers import Answers, Ask, Row, literal
from ael_store.store.foreign_code import refuse_foreign_views
from ael_store.store.moment import REMOVED_TASKS, Horizon, Moment, horizon_of, moment_at, refuse_gone
from ael_store.store.revision import HEAD
from ael_store.store.sqlite import read_engine, translate

if TYPE_CHECKING:
    from ael_store.store.prune import PruneLimits, Pruning
    from ael_store.store.undo_plan import UndoPlan

__all__ = ["Reader", "history_entry"]

RECENT_RUNS = 100
"""How many runs a new one looks back on."""

MANY_CELLS = 100_000
"""So many are kept from the garbage collector."""
CELLS_AT_ONCE = 1000

T = metadata.tables


class Reader(Answers):
    """Read-only questions to one database. May be used from any thread; close it when done."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.engine: Engine = read_engine(path)
        self._views_are_ours = False

    def close(self) -> None:
        self.engine.dispose()

    @contextmanager
    def connect(self) -> Iterator[Connection]:
        """A connection for a few statements that see the same moment."""
        try:
            with self.engine.connect() as connection:
                connection.exec_driver_sql("BEGIN")
                if not self._views_are_ours:  # what they answer is what everything below believes
                    raw: Any = connection.connection.dbapi_connection
                    if raw.execute("SELECT version_num FROM alembic_version").fetchall() == [(HEAD,)]:
                        refuse_foreign_views(raw, self.path)
                    self._views_are_ours = True
                yield connection
        except (DBAPIError, sqlite3.Error, UnicodeDecodeError) as error:
            raise translate(error, self.path) from error

    @contextmanager
    def asking(self) -> Iterator[Ask]:
        with self.connect() as connection:
            yield lambda sql, **parameters: [dict(row) for row in connection.execute(text(sql), parameters).mappings()]

    # -- what a run resumes with --

    def resume(self, keys: Iterable[str] | None = None, *, tasks: bool = True, metrics: bool = True) -> Resumed:
        """Return what the database holds; with `keys` only these of the state (for a single command)."""
        with self.connect() as connection:
            connection.execution_options(compiled_cache=None)  # each of these is asked once in the life of a process
            state = select(
                T["keys"].c.name,
                T["state"].c.key_id,
                T["state"].c.value,
                T["state"].c.version,
                T["state"].c.change_id,
                T["state"].c.agent_id,
            ).join_from(T["state"], T["keys"], T["keys"].c.id == T["state"].c.key_id)
            if keys is not None:
                state = state.where(T["keys"].c.name.in_(list(keys)))
            cells = _cells(connection, state)
            agents = {row[1]: AgentRecord(*row) for row in connection.execute(_records("agents")) if row[0] > 0}
            stats = {row[0]: AgentStats(*row) for row in connection.execute(_records("agent_stats"))}
            patterns: dict[int, list[str]] = {}
            for number, pattern, _glob in connection.execute(
                select(T["subscription_patterns"]).order_by(T["subscription_patterns"].c.pattern)
            ):
                patterns.setdefault(number, []).append(pattern)
            subscriptions = [
                SubscriptionRecord(*row)
                for row in connection.execute(
                    _records("subscriptions").where(T["subscriptions"].c.ended_us.is_(None)).order_by("id")
                )
            ]
            for record in subscriptions:
                record.patterns = tuple(patterns.get(record.id, ()))
            delayed = [
                DelayedRecord(*row)
                for row in connection.execute(
                    _records("delayed_events").where(T["delayed_events"].c.event_id.is_(None)).order_by("due_us", "id")
                )
            ]
            letters = T["dead_letters"]
            live = select(T["subscriptions"].c.id).where(T["subscriptions"].c.ended_us.is_(None))
            requested = [
                DeadLetterRecord(*row)
                for row in connection.execute(
                    _records("dead_letters")
                    .where(letters.c.requested_us.is_not(None), letters.c.redelivered_us.is_(None))
                    .where(letters.c.subscription_id.in_(live))
                    .order_by("requested_us", "id")
                )
            ]
            schedules = {row[0]: ScheduleRecord(*row) for row in connection.execute(_records("schedules"))}
            positions = {row[0]: row[1] for row in connection.execute(select(T["positions"]))}
            runs = [
                RunRecord(*row)
                for row in connection.execute(_records("runs").order_by(T["runs"].c.id.desc()).limit(RECENT_RUNS))
            ]
            last = (
                connection.execute(select(T["iterations"]).order_by(T["iterations"].c.id.desc()).limit(1))
                .mappings()
                .first()
            )

            given = _given_out(connection)
            facts: dict[str, str] = {row[0]: row[1] for row in connection.execute(select(T["meta"]))}

            def newest(table: str) -> int:
                return max(connection.execute(select(func.max(T[table].c.id))).scalar() or 0, given[table])

            return Resumed(
                cells=cells,
                agents=agents,
                stats=stats,
                subscriptions=subscriptions,
                delayed=delayed,
                requested=requested,
                schedules=schedules,
                positions=positions,
                last_run=runs[0] if runs else None,
                recent_runs=runs,
                token=connection.execute(select(T["lease"].c.token)).scalar_one(),
                iteration=max(0 if last is None else last["id"], given["iterations"]),
                clock=0 if last is None else last["clock"],
                last_started_us=None if last is None else last["started_us"],
                commit_id=max(newest("commits"), 0 if last is None else last["commit_id"]),
                tick_id=newest("ticks"),
                change_id=newest("state_changes"),
                event_id=newest("events"),
                run_id=newest("runs"),
                agent_id=newest("agents"),
                subscription_id=newest("subscriptions"),
                delayed_id=newest("delayed_events"),
                dead_letter_id=newest("dead_letters"),
                command_id=newest("commands"),
                task_id=newest("tasks"),
                attempt_id=newest("task_attempts"),
                tasks=_live_tasks(connection) if tasks else [],
                attempts=_open_attempts(connection) if tasks else [],
                limits={row[0]: LimitRecord(*row) for row in connection.execute(_records("limits"))},
                metrics={(row[1], row[2]): MetricRecord(*row) for row in connection.execute(_records("metrics"))}
                if metrics
                else {},
                sample_id=newest("metric_samples"),
                copy=_copy_of(facts),
                marks=_last_marks(connection),
            )

    def last_ids(self, tables: Iterable[str]) -> dict[str, int]:
        """Return the newest number of each table."""
        with self.connect() as connection:
            return {table: connection.execute(select(func.max(T[table].c.id))).scalar() or 0 for table in tables}

    def event_types(self) -> list[str]:
        """Return every event type that was ever emitted."""
        with self.connect() as connection:
            return list(connection.execute(select(T["event_types"].c.name)).scalars())

    def pending(
        self, types: Sequence[str], after: int, until: int, limit: int, *, to: str = "", whatever: bool = False
    ) -> list[EventRecord]:
        """Return the first events of these types with `after < id <= until`, in order.

        Replies to somebody are left out, but for those `to` this name: of these types, or `whatever` their type.

        The index gives the events of one type in order, those of several have to be sorted: so the log is looked
        through in pieces, or a long backlog would be sorted for each handful that is taken from its beginning.
        """
        e, y = INDEXED["events"], T["event_types"]
        query = _event_records(e).where(e.c.target_id.is_(None)).order_by(e.c.id).limit(limit)
        records: list[EventRecord] = []
        start, step = after, until - after if len(types) == 1 else 4 * limit
        with self.connect() as connection:
            while types and start < until and len(records) < limit:
                end = min(until, start + step)
                found: list[EventRecord] = []
                for place in range(0, len(types), 500):
                    piece = query.where(e.c.id > start, e.c.id <= end, y.c.name.in_(types[place : place + 500]))
                    found += [EventRecord(*row) for row in connection.execute(piece)]
                if len(types) > 500:
                    found.sort(key=lambda record: record.id)
                records += found
                start, step = end, 4 * step
            log = T["events"]
            replies = _event_records().where(_is_reply_to(to), log.c.id > after, log.c.id <= until)
            for row in connection.execute(replies.order_by(log.c.id).limit(limit)):
                reply = EventRecord(*row)
                if whatever or reply.type in types:
                    records.append(reply)
        return sorted(records, key=lambda record: record.id)[:limit]

    def events_of(self, ids: Sequence[int]) -> list[EventRecord]:
        """Return the events with these numbers that are in the log, in order."""
        query = _event_records().where(T["events"].c.id.in_(ids)).order_by(T["events"].c.id)
        with self.connect() as connection:
            return [EventRecord(*row) for row in connection.execute(query)]

    def dead_letter_records(
        self,
        *,
        event_id: int | None = None,
        subscriber: str | None = None,
        type: str | None = None,
        limit: int = 100,
    ) -> list[tuple[DeadLetterRecord, str, bool]]:
        """Return open dead letters in order of the events, each with its subscriber and whether its cursor ended.

        With `event_id` all of that event, else those whose delivery is not asked for yet, of live cursors.
        """
        d, s, e, y = T["dead_letters"], T["subscriptions"], T["events"], T["event_types"]
        query = (
            _records("dead_letters")
            .add_columns(s.c.subscriber, s.c.ended_us)
            .join_from(d, s, s.c.id == d.c.subscription_id)
            .join(e, e.c.id == d.c.event_id)
            .join(y, y.c.id == e.c.type_id)
            .where(d.c.redelivered_us.is_(None))
            .order_by(d.c.event_id, d.c.id)
            .limit(limit)
        )
        if event_id is None:
            query = query.where(d.c.requested_us.is_(None), s.c.ended_us.is_(None))
        else:
            query = query.where(d.c.event_id == event_id)
        if subscriber is not None:
            query = query.where(s.c.subscriber == subscriber)
        if type is not None:
            query = query.where(y.c.name.op("GLOB")(glob_of(type)) if "*" in type else y.c.name == type)
        with self.connect() as connection:
            return [
                (DeadLetterRecord(*row[:-2]), row[-2], row[-1] is not None) for row in connection.execute(query).all()
            ]

    def task_record(self, task_id: int) -> TaskRecord | None:
        """Return a task, None where there is none."""
        with self.connect() as connection:
            row = connection.execute(_records("tasks").where(T["tasks"].c.id == task_id)).first()
            return None if row is None else TaskRecord(*row)

    def old_tasks(self, before_us: int, settled_us: int | None, limit: int) -> list[int]:
        """Return the oldest tasks whose result was taken up before an instant.

        However many tasks there are, this looks only at those that were submitted before it, found by their order.
        For `settled_us` see `PruneLimits`.
        """
        from ael_store.store.prune import is_settled

        t = T["tasks"]
        with self.connect() as connection:
            if not is_settled(connection, before_us, settled_us):
                return []
            low, high = connection.execute(select(func.min(t.c.id), func.max(t.c.id))).one()
            if low is None:
                return []
            while low < high:  # the first task that is submitted at the instant or later
                middle = (low + high) // 2
                later = select(t.c.id, t.c.created_us).where(t.c.id > middle).order_by(t.c.id).limit(1)
                task_id, created_us = connection.execute(later).one()
                low, high = (low, middle) if created_us >= before_us else (task_id, high)
            old = select(t.c.id).where(t.c.id <= high, t.c.applied_us < before_us)
            return list(connection.execute(old.order_by(t.c.id).limit(limit)).scalars())

    def old_samples(self, before_us: int, settled_us: int | None, too_large: bool, limit: int) -> range:
        """Return the numbers of the samples of metrics that are to be removed, no more than so many at once.

        They are those from before an instant, and the oldest where the file is too large. The newest one always stays,
        because it says which numbers were given out. For `settled_us` see `PruneLimits`.
        """
        from ael_store.store.prune import is_settled

        s = T["metric_samples"]
        with self.connect() as connection:
            first, last = connection.execute(select(func.min(s.c.id), func.max(s.c.id))).one()
            if first is None:
                return range(0)
            most = min(first + limit, last)
            if not too_large and is_settled(connection, before_us, settled_us):
                young = select(s.c.id).where(s.c.id < most, s.c.at_us >= before_us).order_by(s.c.id).limit(1)
                most = connection.execute(young).scalar() or most
            elif not too_large:
                return range(0)
            return range(first, most)

    def plan_prune(self, limits: PruneLimits) -> Pruning | None:
        """Return what history is to be removed next, None where there is nothing."""
        from ael_store.store.prune import plan_prune

        with self.connect() as connection:
            return plan_prune(connection, limits)

    def whole_prune(self, limits: PruneLimits) -> Row:
        """Return what removing everything that is not kept would take, as far as it can be told before."""
        from ael_store.store.prune import whole_prune

        with self.connect() as connection:
            return whole_prune(connection, limits)

    def totals_up_to(self, tick_id: int) -> list[AgentTotals]:
        """Return what units up to a number count, for each agent."""
        from ael_store.store.prune import totals_up_to

        with self.connect() as connection:
            return totals_up_to(connection, tick_id)

    def page_bytes(self) -> tuple[int, int]:
        """Return how many bytes of the file are in use, and how many are free pages."""
        with self.connect() as connection:
            pages, free, size = (
                int(connection.exec_driver_sql(f"PRAGMA {name}").scalar() or 0)
                for name in ("page_count", "freelist_count", "page_size")
            )
        return (pages - free) * size, free * size

    def limit_uses(self, names: Sequence[str], now_us: int) -> dict[str, LimitUse]:
        """Return what attempts have used of limits: those of the last minute, and of the day (UTC)."""
        a = T["task_attempts"]
        today_us = now_us // 86_400_000_000 * 86_400_000_000
        uses = {}
        with self.connect() as connection:
            for name in names:
                mine = a.c.limit_name == name
                starts = select(a.c.started_us).where(mine, a.c.started_us > now_us - 60_000_000)
                today = select(a.c.outcome, a.c.reserved_usd, a.c.cost_usd).where(mine, a.c.started_us >= today_us)
                rows = connection.execute(today).all()
                costs = [Decimal(cost or 0) for _, _, cost in rows]
                spent = [
                    cost if outcome in ("done", "failed", "postponed") else max(cost, Decimal(reserved or 0))
                    for (outcome, reserved, _), cost in zip(rows, costs, strict=True)
                ]
                uses[name] = LimitUse(
                    tuple(connection.execute(starts.order_by(a.c.started_us)).scalars()),
                    len(rows),
                    str(sum(spent, Decimal(0))),
                    str(max(costs, default=Decimal(0))),
                )
        return uses

    def recent_events(self, limit: int) -> list[EventRecord]:
        """Return the newest events, oldest first."""
        query = _event_records().order_by(T["events"].c.id.desc()).limit(limit)
        with self.connect() as connection:
            return [EventRecord(*row) for row in connection.execute(query)][::-1]

    def pending_count(self, limit: int = 10_000) -> int:
        """Return how many deliveries wait; counts no further than `limit`."""
        with self.connect() as connection:
            query = text("SELECT count(*) FROM (SELECT 1 FROM v_pending LIMIT :limit)")
            return int(connection.execute(query, {"limit": limit}).scalar_one())

    def last_event_before(self, moment_us: int) -> int:
        """Return the last event emitted before an instant, 0 where there is none.

        A search by halves over the ids, which grow with time: no index on the time is needed.
        """
        e, t = T["events"], T["ticks"]
        probe = select(e.c.id, t.c.started_us).join_from(e, t, t.c.id == e.c.tick_id).order_by(e.c.id).limit(1)
        with self.connect() as connection:
            low, high = 0, connection.execute(select(func.max(e.c.id))).scalar() or 0
            while low < high:
                middle = (low + high + 1) // 2
                found = connection.execute(probe.where(e.c.id >= middle)).first()
                if found is not None and found[1] < moment_us:
                    low = middle
                else:
                    high = middle - 1
            return low

    def count_events(self, types: Sequence[str], after: int, until: int, *, to: str = "") -> int:
        """Return how many events of these types, and replies `to` this name, have `after < id <= until`."""
        e, y, log = INDEXED["events"], T["event_types"], T["events"]
        others = (
            select(func.count())
            .select_from(e.join(y, y.c.id == e.c.type_id))
            .where(e.c.id > after, e.c.id <= until, e.c.target_id.is_(None))
        )
        replies = select(func.count()).where(_is_reply_to(to), log.c.id > after, log.c.id <= until)
        with self.connect() as connection:
            return connection.execute(replies).scalar_one() + sum(
                connection.execute(others.where(y.c.name.in_(types[start : start + 500]))).scalar_one()
                for start in range(0, len(types), 500)
            )

    # -- past moments --

    def moment(self, at: int | str | datetime | None) -> Moment:
        """Return a past moment by iteration, ISO text or time, None for now; raises HistoryGone, or UsageError."""
        with self.connect() as connection:
            return moment_at(connection, at)

    def horizon(self) -> Horizon:
        """Return where history begins."""
        with self.connect() as connection:
            return horizon_of(connection)

    def value_at(self, moment: Moment, key: str) -> str | None:
        """Return the JSON text that a key had at a moment, None where it had none: one seek in the index of the key."""
        c, k = INDEXED["state_changes"], T["keys"]
        number = select(k.c.id).where(k.c.name == key).scalar_subquery()
        query = select(c.c.id, c.c.value).where(c.c.key_id == number, c.c.id <= moment.change_id)
        with self.connect() as connection:
            refuse_gone(connection, moment)
            found = connection.execute(query.order_by(c.c.id.desc()).limit(1)).first()
            return None if found is None else found.value

    def state_at(self, moment: Moment, prefix: str = "") -> list[Row]:
        """Return the state at a moment in order of the keys, in the shape of `state`; one seek for each key."""
        query = text(
            "SELECT k.name, c.value, a.name, t.iteration, t.started_us, c.id FROM keys k "
            f"JOIN state_changes c ON c.id = (SELECT id FROM {CHANGES} "
            "WHERE key_id = k.id AND id <= :change ORDER BY id DESC LIMIT 1) "
            "LEFT JOIN ticks t ON t.id = c.tick_id LEFT JOIN agents a ON a.id = t.agent_id "
            "WHERE c.value IS NOT NULL AND k.name GLOB :glob ORDER BY k.name"
        )
        with self.connect() as connection:
            refuse_gone(connection, moment)
            found = connection.execute(query, {"change": moment.change_id, "glob": literal(prefix) + "*"})
            return [
                {
                    "key": key,
                    "value": value,
                    "agent": agent,
                    "iteration": iteration,
                    "updated_at": None if started_us is None else iso(started_us),
                    "change_id": change_id,
                }
                for key, value, agent, iteration, started_us, change_id in found
            ]

    def differences(self, one: Moment, other: Moment, prefix: str = "") -> list[Row]:
        """Return `key`, `old` and `new` (JSON text) of the keys that were changed between two moments, in order.

        Costs what was changed between them, whatever the size of the state; values may be equal.
        """
        value = (
            "(SELECT value FROM state_changes WHERE id = "
            f"(SELECT id FROM {CHANGES} WHERE key_id = k.id AND id <= :%s ORDER BY id DESC LIMIT 1))"
        )
        query = text(
            f"SELECT k.name AS key, {value % 'one'} AS old, {value % 'other'} AS new "
            "FROM (SELECT DISTINCT key_id FROM state_changes WHERE id > :low AND id <= :high) touched "
            "JOIN keys k ON k.id = touched.key_id WHERE k.name GLOB :glob ORDER BY k.name"
        )
        low, high = sorted((one.change_id, other.change_id))
        parameters = {"one": one.change_id, "other": other.change_id, "low": low, "high": high}
        with self.connect() as connection:
            refuse_gone(connection, min(one, other, key=lambda moment: moment.iteration))
            found = connection.execute(query, {**parameters, "glob": literal(prefix) + "*"})
            return [dict(row) for row in found.mappings()]

    def agents_at(self, moment: Moment) -> list[Row]:
        """Return the agents that were known at a moment, in the shape of `agents`: see `agent_rows.py`."""
        from ael_store.store.agent_rows import agents_at

        with self.connect() as connection:
            refuse_gone(connection, moment)
            return agents_at(connection, moment)

    def undo_plan(self, **scope: Any) -> UndoPlan:
        """Return what undoing changes would do to the committed state: see `undo_plan.py`."""
        from ael_store.store.undo_plan import plan_undo

        with self.connect() as connection:
            return plan_undo(connection, **scope)

    # -- what users ask --

    def history(self, key: str | None, limit: int, until: Moment | None = None) -> list[Row]:
        """Return the newest changes of a key (of all keys for None), newest first; those up to a moment."""
        conditions, parameters = [], {"limit": limit}
        if key is not None:
            conditions.append("key = :key")
            parameters["key"] = key  # type: ignore[assignment]
        if until is not None:
            conditions.append("id <= :change")
            parameters["change"] = until.change_id
        where = f"WHERE {' AND '.join(conditions)}" if conditions else ""
        query = text(
            f"SELECT id, key, operation, old_value, new_value, agent, iteration, changed_at "
            f"FROM v_state_history {where} ORDER BY id DESC LIMIT :limit"
        )
        with self.connect() as connection:
            if until is not None:
                refuse_gone(connection, until)
            return [dict(row) for row in connection.execute(query, parameters).mappings()]

    def held_tasks(self, task_id: int | None = None) -> list[Row]:
        """Return the tasks that `ael tasks release` would let go on."""
        with self.connect() as connection:
            facts: dict[str, str] = {row[0]: row[1] for row in connection.execute(select(T["meta"]))}
            p = T["positions"]
            held_us = connection.execute(select(p.c.value).where(p.c.name == "tasks_held_us")).scalar()
        copy = _copy_of(facts)
        all_of_them = copy is not None and str(copy.at_us) != held_us  # the next start, or a release, holds them first
        return self.rows(
            "SELECT q.id AS id, a.name AS agent, q.name AS name, coalesce(q.held, :why) AS held FROM tasks q "
            "JOIN agents a ON a.id = q.agent_id WHERE q.applied_us IS NULL AND (q.status = 'held' "
            "OR (:all AND q.status IN ('waiting', 'running'))) AND (:id IS NULL OR q.id = :id) ORDER BY q.id",
            id=task_id,
            all=all_of_them,
            why=None if copy is None else f"this database is a copy of {copy.source}",
        )


def _copy_of(facts: dict[str, str]) -> CopyRecord | None:
    """Return from what this database was restored, recovered or forked last; None where it was not."""
    restored, recovered = json.loads(facts.get("restored_us", "null")), json.loads(facts.get("recovered", "null"))
    copies = []
    if restored is not None:
        copies.append(CopyRecord(restored, str(json.loads(facts.get("restored_from", '""')))))
    if recovered is not None:
        copies.append(CopyRecord(recovered["at_us"], str(recovered["from"])))
    if (forked := json.loads(facts.get("forked", "null"))) is not None:
        copies.append(CopyRecord(forked["at_us"], str(forked["from"])))
    return max(copies, key=lambda copy: copy.at_us, default=None)


def _last_marks(connection: Connection) -> dict[int, tuple[int, ...]]:
    """Return the counters of each agent at its last hourly mark."""
    m = T["agent_marks"]
    found = {}
    for (agent_id,) in connection.execute(select(T["agents"].c.id).where(T["agents"].c.id > 0)).all():
        newest = select(m.c.ticks, m.c.errors, m.c.events, m.c.measured, m.c.total_us).where(m.c.agent_id == agent_id)
        row = connection.execute(newest.order_by(m.c.hour_us.desc()).limit(1)).first()
        if row is not None:
            found[agent_id] = tuple(row)
    return found


def _live_tasks(connection: Connection) -> list[TaskRecord]:
    """Return the tasks that are not over, or whose result is still to be taken up (index `ix_tasks_live`)."""
    query = _records("tasks").where(T["tasks"].c.applied_us.is_(None)).order_by("id")
    return [TaskRecord(*row) for row in connection.execute(query)]


def _open_attempts(connection: Connection) -> list[AttemptRecord]:
    """Return the attempts whose end is not known (index `ix_task_attempts_open`)."""
    query = _records("task_attempts").where(T["task_attempts"].c.ended_us.is_(None)).order_by("id")
    return [AttemptRecord(*row) for row in connection.execute(query)]


def history_entry(row: Row) -> Row:
    """Return a change in the shape that `StateContext.get_history()` gives it."""
    return {
        "timestamp": row["changed_at"],
        "operation": row["operation"],
        "key": row["key"],
        "old_value": None if row["old_value"] is None else decode(row["old_value"]),
        "new_value": None if row["new_value"] is None else decode(row["new_value"]),
        "agent": row["agent"],
        "iteration": row["iteration"],
    }


def _given_out(connection: Connection) -> Counter[str]:
    """Return the last numbers of tables whose newest rows were removed, or that `ael db recover` could not save."""
    meta, positions = T["meta"], T["positions"]
    horizon = horizon_of(connection)
    given = Counter(
        iterations=horizon.iteration,
        commits=horizon.commit_id,
        ticks=horizon.tick_id,
        state_changes=horizon.change_id,
        events=horizon.forgotten_event_id,
    )
    noted = connection.execute(select(meta.c.value).where(meta.c.name == "recovered")).scalar()
    if noted is not None:
        given |= Counter(json.loads(noted)["last"])
    removed = connection.execute(select(positions.c.value).where(positions.c.name == REMOVED_TASKS)).scalar()
    if removed is not None:
        given |= Counter(json.loads(removed))
    return given


def _cells(connection: Connection, query: Select[Any]) -> dict[str, Cell]:
    """Read the state, without the garbage collector looking at each of a million cells, now or later.

    Cells refer to nothing but text and numbers, so it would never find anything there, and each look takes as long as
    a twentieth of the reading. What else is garbage at this moment stays too; at a start that is little.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        compiled = query.compile(connection.engine, compile_kwargs={"render_postcompile": True})
        found = connection.exec_driver_sql(
            str(compiled), tuple(compiled.params[name] for name in compiled.positiontup or ())
        )
        cursor: Any = found.cursor
        cells: dict[str, Cell] = {}
        while rows := cursor.fetchmany(CELLS_AT_ONCE):  # quicker than row by row
            for name, key_id, value, version, change_id, agent_id in rows:
                cells[name] = Cell(key_id, value, version, change_id, agent_id)
        if len(cells) >= MANY_CELLS:
            gc.freeze()
        return cells
    finally:
        if was_on:
            gc.enable()


def _records(table: str) -> Select[Any]:
    """Select the columns that a record has."""
    return select(*_columns(T[table]))


def _columns(table: FromClause) -> list[ColumnElement[Any]]:
    return [column for column in table.c if column.name not in ("digest", "recent")]


def _event_records(e: FromClause = T["events"]) -> Select[Any]:
    y, o, t = T["event_types"], T["event_sources"], T["ticks"]
    to = o.alias("targets")
    return (
        select(
            e.c.id,
            y.c.name,
            o.c.name,
            e.c.data,
            e.c.metadata,
            func.coalesce(e.c.timestamp_us, t.c.started_us),
            e.c.tick_id,
            t.c.iteration,
            e.c.hops,
            to.c.name,
        )
        .join_from(e, y, y.c.id == e.c.type_id)
        .join(o, o.c.id == e.c.source_id)
        .join(to, to.c.id == e.c.target_id, isouter=True)
        .join(t, t.c.id == e.c.tick_id, isouter=True)
    )


def _is_reply_to(name: str) -> ColumnElement[bool]:
    """The condition that an event is a reply to this name (index `ix_events_target_id`)."""
    names = T["event_sources"].alias("recipients")
    number = select(names.c.id).where(names.c.name == name).scalar_subquery()
    return and_(T["events"].c.target_id.is_not(None), T["events"].c.target_id == number)

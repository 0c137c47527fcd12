"""Removing history before the horizon, in batches small enough to fit between two iterations.

What the present and any moment after the horizon is made of stays, each row with its digest in `row_digests`:

- of each key the newest change up to the horizon, where that is no deletion, with its unit;
- events that a subscriber, a dead letter or a redelivery still needs, with their units;
- of each kind and subject the newest move, and all moves of flags.

The horizon is moved first, in a commit of its own that also adds the units that will go to `agent_totals`; from then
on nothing is promised of what lies before it. Then batches follow the numbers of one table after another. Where they
have come to stands in the database too, so a pruning that a kill cut short goes on at the next start.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import Connection, func, select

from ael_store.model.records import AgentTotals, TickRow
from ael_store.schema.indexed import INDEXED
from ael_store.schema.recent import CHANGES
from ael_store.schema.tables import metadata
from ael_store.store.digest import change_content, event_content, row_digest, tick_content
from ael_store.store.moment import Horizon, Moment, horizon_of, moment_at, started_by

__all__ = [
    "PRUNING",
    "PruneLimits",
    "PruneStep",
    "Pruning",
    "carry_out",
    "count_units",
    "is_settled",
    "plan_prune",
    "pruning_of",
    "totals_up_to",
    "whole_prune",
]

PRUNING = "pruning"
"""Name of the row in `positions` that says how far the removal has come; `null` where none is under way."""

T = metadata.tables

PHASES = ("state_changes", "events", "ticks", "iterations", "commits", "moves")
"""What is removed, in this order: a unit goes when its changes and events have."""

LEAST_KEPT = 100
"""So many of the last iterations are never removed."""

MOST_UNITS = 20_000
"""How far the horizon moves at once: so many units are counted for `agent_totals` in one query."""


@dataclass(frozen=True, slots=True)
class PruneLimits:
    """What is kept, as the settings say; 0 stands for no bound."""

    history_before_us: int
    """History that began before this instant is removed."""
    events_before_us: int
    """The same for events alone, where that is later."""
    rows: int = 0
    """Most units, changes and events together."""
    bytes: int = 0
    """Most bytes of the file that are in use."""
    now_us: int = 2**62
    """What began after this instant does so by a clock that was wrong, and has no age."""
    settled_us: int | None = None
    """Nothing is too old unless an iteration began between the time it is compared with and this one; None for no such
    proof. Where a clock was set years ahead everything looks old."""


@dataclass(frozen=True, slots=True)
class Pruning:
    """A removal that is under way: from one horizon to the next, and how far it has come."""

    before: Horizon
    to: Horizon
    phase: int = 0
    done: int = 0
    """The last number of the phase's table that was looked at; 0 at the beginning of a phase."""

    def to_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Pruning | None:
        found = json.loads(text)
        if found is None:
            return None
        return cls(Horizon(**found["before"]), Horizon(**found["to"]), found["phase"], found["done"])


@dataclass(slots=True)
class PruneStep:
    """One batch, part of a commit; `next` says how far it has come once it was carried out, None at the end."""

    pruning: Pruning
    rows: int
    next: Pruning | None = None
    removed: int = 0


# -- deciding ---------------------------------------------------------------------------------------


def pruning_of(connection: Connection) -> Pruning | None:
    """Return the removal that is under way; None where there is none."""
    p = T["positions"]
    text = connection.execute(select(p.c.value).where(p.c.name == PRUNING)).scalar()
    return None if text is None else Pruning.from_json(text)


def whole_prune(connection: Connection, limits: PruneLimits) -> dict[str, Any]:
    """Return where history would begin, and about how many rows and bytes would go."""
    plan = plan_prune(connection, limits, most_units=2**62)
    before = horizon_of(connection)
    to = before if plan is None else plan.to
    spans = {
        "state_changes": to.change_id - before.change_id,
        "events": to.forgotten_event_id - before.forgotten_event_id,
        "ticks": to.tick_id - before.tick_id,
        "iterations": to.iteration - before.iteration,
        "commits": to.commit_id - before.commit_id,
    }
    rows = sum(spans.values())
    newest = sum(connection.execute(select(func.max(T[name].c.id))).scalar() or 0 for name in PHASES[:4])
    all_rows = newest - before.change_id - before.forgotten_event_id - before.tick_id - before.iteration
    size = used_bytes(connection) * rows // max(1, all_rows)
    return {"iteration": to.iteration, "started_us": to.started_us, "rows": rows, "bytes": size, "tables": spans}


def plan_prune(connection: Connection, limits: PruneLimits, *, most_units: int = MOST_UNITS) -> Pruning | None:
    """Return what is to be removed next, None where everything is to be kept."""
    before = horizon_of(connection)
    i = T["iterations"]
    last = connection.execute(select(func.max(i.c.id))).scalar() or 0
    most = last - LEAST_KEPT
    if most <= before.iteration:
        return None
    history = _by_age(connection, limits.history_before_us, limits, before.iteration, most)
    excess = _excess_rows(connection, limits, before)
    if excess > 0:
        history = max(history, _by_rows(connection, excess, before, most))
    to = _horizon_at(connection, history, before, most_units)
    e = T["events"]
    unit = select(e.c.tick_id).where(e.c.id > max(to.event_id, before.forgotten_event_id)).order_by(e.c.id).limit(1)
    empty = _iteration_before(connection, connection.execute(unit).scalar() or 0, to.iteration, most)
    events = _by_age(connection, limits.events_before_us, limits, empty, most)
    forgotten = max(to.event_id, before.forgotten_event_id)
    if events > to.iteration:
        forgotten = max(forgotten, _moment(connection, events).event_id)
    to = Horizon(**{**asdict(to), "forgotten_event_id": forgotten})
    return None if to == before else Pruning(before, to)


def _moment(connection: Connection, iteration: int) -> Moment:
    return moment_at(connection, iteration)


def _horizon_at(connection: Connection, iteration: int, before: Horizon, most_units: int) -> Horizon:
    """Return the horizon at the end of an iteration, or a little before: whole commits, and not too far at once."""
    i = T["iterations"]
    if iteration <= before.iteration:
        return before
    moment = _moment(connection, iteration)
    if moment.tick_id - before.tick_id > most_units:
        within = (
            select(i.c.id)
            .where(i.c.id > before.iteration, i.c.id <= iteration, i.c.tick_id <= before.tick_id + most_units)
            .order_by(i.c.id.desc())
            .limit(1)
        )
        iteration = max(before.iteration + 1, connection.execute(within).scalar() or 0)
        moment = _moment(connection, iteration)
    # Idle iterations share a commit with later ones: the last iteration of a whole commit.
    whole = select(i.c.id, i.c.started_us).where(i.c.id <= moment.iteration, i.c.commit_id <= moment.commit_id)
    found = connection.execute(whole.order_by(i.c.id.desc()).limit(1)).first()
    if found is None or found[0] <= before.iteration:
        return before
    moment = _moment(connection, found[0])
    return Horizon(
        found[0],
        found[1],
        moment.tick_id,
        moment.change_id,
        moment.event_id,
        moment.commit_id,
        max(moment.event_id, before.forgotten_event_id),
    )


def _by_age(connection: Connection, before_us: int, limits: PruneLimits, low: int, most: int) -> int:
    """Return the iteration up to which all after a first one began before an instant.

    Looked at one by one: where the clock was set back for a while, halving could find the end of that.
    """
    if low >= most or not is_settled(connection, before_us, limits.settled_us):
        return low
    i = T["iterations"]
    young = select(i.c.id).where(i.c.id > low, i.c.id <= most, i.c.started_us.between(before_us, limits.now_us))
    found = connection.execute(young.order_by(i.c.id).limit(1)).scalar()
    return most if found is None else found - 1


def is_settled(connection: Connection, before_us: int, settled_us: int | None) -> bool:
    """Say whether what began before an instant is old, by the proof that `PruneLimits.settled_us` describes."""
    if settled_us is None:
        return True
    i = T["iterations"]
    last = connection.execute(select(func.max(i.c.id))).scalar() or 0
    seen = started_by(connection, settled_us, horizon_of(connection).iteration, last)
    began_us = connection.execute(select(i.c.started_us).where(i.c.id == seen)).scalar()
    return began_us is not None and before_us <= began_us <= settled_us


def _iteration_before(connection: Connection, tick_id: int, low: int, high: int) -> int:
    """Return the last iteration that ended before a unit, between two."""
    i = T["iterations"]
    first = low
    while low < high:
        middle = (low + high + 1) // 2
        began_after = connection.execute(select(i.c.tick_id).where(i.c.id == middle)).scalar()
        low, high = (middle, high) if began_after is not None and began_after < tick_id else (low, middle - 1)
    return max(first, low - 1)


def _excess_rows(connection: Connection, limits: PruneLimits, horizon: Horizon) -> int:
    """Return how many rows of the history are too many."""
    newest = [connection.execute(select(func.max(T[name].c.id))).scalar() or 0 for name in PHASES[:3]]
    rows = sum(newest) - horizon.change_id - horizon.forgotten_event_id - horizon.tick_id
    excess = rows - limits.rows if limits.rows else 0
    if limits.bytes and rows > 0:
        used = used_bytes(connection)
        if used > limits.bytes:
            excess = max(excess, round(rows * (used - 0.97 * limits.bytes) / used))
    return excess


def _by_rows(connection: Connection, excess: int, horizon: Horizon, most: int) -> int:
    """Return the first iteration whose end leaves so many rows behind."""
    low, high = horizon.iteration, most
    while low < high:
        middle = (low + high) // 2
        moment = _moment(connection, max(middle, horizon.iteration))
        behind = moment.tick_id + moment.change_id + moment.event_id
        if behind - horizon.tick_id - horizon.change_id - horizon.event_id < excess:
            low = middle + 1
        else:
            high = middle
    return low


def used_bytes(connection: Connection) -> int:
    """Return how many bytes of the file hold something."""
    pages, free, size = (
        int(connection.exec_driver_sql(f"PRAGMA {name}").scalar() or 0)
        for name in ("page_count", "freelist_count", "page_size")
    )
    return (pages - free) * size


def totals_up_to(connection: Connection, tick_id: int) -> list[AgentTotals]:
    """Return what units up to a number count, those counted before included, for each agent: what recounting needs."""
    t, totals, stats = INDEXED["ticks"], T["agent_totals"], T["agent_stats"]
    known = {
        row[0]: AgentTotals(*row)
        for row in connection.execute(
            select(totals.c.agent_id, totals.c.tick_id, totals.c.ticks, totals.c.errors, totals.c.events)
        )
    }
    found: list[AgentTotals] = []
    for (agent_id,) in connection.execute(select(stats.c.agent_id).where(stats.c.agent_id > 0)).all():
        base = known.get(agent_id) or AgentTotals(agent_id, 0, 0, 0, 0)
        if base.tick_id >= tick_id:
            continue  # forgotten since
        counts = [base.ticks, base.errors, base.events]
        query = (
            select(t.c.kind, t.c.outcome, func.count())
            .where(t.c.agent_id == agent_id, t.c.id > base.tick_id, t.c.id <= tick_id)
            .group_by(t.c.kind, t.c.outcome)
        )
        for kind, outcome, number in connection.execute(query):
            count_units(counts, kind, outcome, number)
        found.append(AgentTotals(agent_id, tick_id, *counts))
    return found


def count_units(counts: list[int], kind: int, outcome: int, number: int) -> None:
    """Add units of a kind and an outcome to the ticks, errors and events of an agent."""
    if outcome == 0 and kind == 0:
        counts[0] += number
    elif outcome == 0 and kind == 1:
        counts[2] += number
    elif outcome in (1, 2):
        counts[1] += number


# -- removing, inside the transaction of a commit ---------------------------------------------------


def carry_out(cursor: Any, step: PruneStep) -> None:
    """Remove one batch, and say in the step how far that was; in the driver's thread."""
    pruning = step.pruning
    removed = 0
    phase, done = pruning.phase, pruning.done
    while phase < len(PHASES) and removed < step.rows:
        first, last = _range(cursor, pruning, phase)
        done = max(done, first)
        if done >= last:
            phase, done = phase + 1, 0
            continue
        until = min(last, done + max(1, step.rows - removed))
        removed += _REMOVE[PHASES[phase]](cursor, pruning, done, until) + (until - done) // 8
        done = until
    step.removed = removed
    step.next = None if phase >= len(PHASES) else Pruning(pruning.before, pruning.to, phase, done)


def _range(cursor: Any, pruning: Pruning, phase: int) -> tuple[int, int]:
    """Return after which number a phase begins, and the last one that it looks at."""
    before, to = pruning.before, pruning.to
    match PHASES[phase]:
        case "state_changes":
            return before.change_id, to.change_id
        case "events":
            return before.forgotten_event_id, to.forgotten_event_id
        case "ticks":
            return before.tick_id, to.tick_id
        case "iterations":
            return before.iteration, to.iteration
        case "commits":
            return before.commit_id, to.commit_id
        case _:
            found = cursor.execute("SELECT max(id) FROM moves WHERE commit_id <= ?", (to.commit_id,)).fetchone()
            return 0, found[0] or 0


def _keep(cursor: Any, kind: str, digests: list[tuple[int, int]]) -> None:
    cursor.executemany(
        "INSERT INTO row_digests (kind, row_id, digest, why) VALUES (?, ?, ?, 'base') ON CONFLICT DO NOTHING",
        [(kind, number, digest) for number, digest in digests],
    )


def _remove_changes(cursor: Any, pruning: Pruning, after: int, until: int) -> int:
    horizon = pruning.to.change_id
    # What was the newest change of its key at the horizon before, and is followed by one of these.
    bases = cursor.execute(
        "SELECT b.id, b.tick_id FROM state_changes c JOIN state_changes b ON b.id = c.previous_id "
        "WHERE c.id > ? AND c.id <= ? AND c.previous_id <= ?",
        (after, until, pruning.before.change_id),
    ).fetchall()
    newer = f"EXISTS (SELECT 1 FROM {CHANGES} n WHERE n.key_id = c.key_id AND n.id > c.id AND n.id <= ?)"  # index: key
    kept = cursor.execute(
        "SELECT c.id, k.name, c.value, c.previous_id, c.tick_id FROM state_changes c JOIN keys k ON k.id = c.key_id "
        f"WHERE c.id > ? AND c.id <= ? AND c.value IS NOT NULL AND NOT {newer}",
        (after, until, horizon),
    ).fetchall()
    _keep(cursor, "state_changes", [(row[0], row_digest(change_content(*row))) for row in kept])
    cursor.execute(
        f"DELETE FROM state_changes AS c WHERE c.id > ? AND c.id <= ? AND (c.value IS NULL OR {newer})",
        (after, until, horizon),
    )
    removed = int(cursor.rowcount)
    cursor.executemany("DELETE FROM state_changes WHERE id = ?", [(row[0],) for row in bases])
    _forget_digests(cursor, "state_changes", after, until, [row[0] for row in bases])
    return removed + len(bases) + _remove_empty_units(cursor, [row[1] for row in bases])


NEEDED = (
    "SELECT event_id FROM v_pending WHERE event_id > ? AND event_id <= ? "
    "UNION SELECT event_id FROM dead_letters WHERE redelivered_us IS NULL AND event_id > ? AND event_id <= ?"
)


def _remove_events(cursor: Any, pruning: Pruning, after: int, until: int) -> int:
    removed = 0
    if after == pruning.before.forgotten_event_id:  # those that were needed last time may not be any more
        old = cursor.execute(
            "SELECT d.row_id, e.tick_id FROM row_digests d JOIN events e ON e.id = d.row_id "
            f"WHERE d.kind = 'events' AND d.row_id <= ? AND d.row_id NOT IN ({NEEDED})",
            (after, 0, after, 0, after),
        ).fetchall()
        cursor.executemany("DELETE FROM events WHERE id = ?", [(row[0],) for row in old])
        _forget_digests(cursor, "events", after, after, [row[0] for row in old])
        removed = len(old) + _remove_empty_units(cursor, [row[1] for row in old if row[1] <= pruning.before.tick_id])
    span = (after, until)
    needed = [row[0] for row in cursor.execute(NEEDED, (*span, *span)).fetchall()]
    for number in needed:
        row = cursor.execute(
            "SELECT e.id, y.name, s.name, e.data, e.metadata, e.timestamp_us, e.tick_id, e.hops, o.name FROM events e "
            "JOIN event_types y ON y.id = e.type_id JOIN event_sources s ON s.id = e.source_id "
            "LEFT JOIN event_sources o ON o.id = e.target_id WHERE e.id = ?",
            (number,),
        ).fetchone()
        if row is not None:
            _keep(cursor, "events", [(number, row_digest(event_content(*row)))])
    cursor.execute(f"DELETE FROM events WHERE id > ? AND id <= ? AND id NOT IN ({NEEDED})", (*span, *span, *span))
    removed += int(cursor.rowcount)
    _forget_digests(cursor, "events", after, until, [])
    return removed


def _remove_ticks(cursor: Any, pruning: Pruning, after: int, until: int) -> int:
    columns = ", ".join(TickRow._fields)
    kept = cursor.execute(
        f"SELECT {columns} FROM ticks AS t WHERE id > ? AND id <= ? AND {HAS_ROWS}", (after, until)
    ).fetchall()
    _keep(cursor, "ticks", [(row[0], row_digest(tick_content(row))) for row in kept])
    cursor.execute(f"DELETE FROM ticks AS t WHERE id > ? AND id <= ? AND NOT {HAS_ROWS}", (after, until))
    removed = int(cursor.rowcount)
    cursor.execute("DELETE FROM tick_errors WHERE tick_id > ? AND tick_id <= ?", (after, until))
    if until == pruning.to.tick_id:
        removed += _remove_deliveries(cursor, pruning.to)
    return removed


def _remove_deliveries(cursor: Any, to: Horizon) -> int:
    """Remove delayed events and dead letters that were delivered up to the horizon; the newest keep their numbers."""
    gone: list[tuple[int]] = []
    rows = cursor.execute("SELECT id, tick_id, event_id FROM delayed_events ORDER BY id")
    while (row := rows.fetchone()) is not None and row[1] <= to.tick_id:  # in the order of the units that emitted them
        if row[2] is not None and row[2] <= to.event_id:
            gone.append((row[0],))
    cursor.executemany("DELETE FROM delayed_events WHERE id = ? AND id < (SELECT max(id) FROM delayed_events)", gone)
    cursor.execute(
        "DELETE FROM dead_letters WHERE redelivered_us IS NOT NULL AND event_id <= ? "
        "AND id < (SELECT max(id) FROM dead_letters)",
        (to.event_id,),
    )
    return len(gone) + int(cursor.rowcount)


HAS_ROWS = (
    "(EXISTS (SELECT 1 FROM state_changes c WHERE c.id > t.change_id AND c.id <= t.change_id + t.changes) "
    "OR EXISTS (SELECT 1 FROM events e WHERE e.id > t.event_id AND e.id <= t.event_id + t.events))"
)
"""A unit of which a change or an event is still there."""


def _remove_empty_units(cursor: Any, ticks: list[int]) -> int:
    """Remove units before the horizon of which nothing is left."""
    removed = 0
    for number in set(ticks):
        cursor.execute(f"DELETE FROM ticks AS t WHERE id = ? AND NOT {HAS_ROWS}", (number,))
        if cursor.rowcount:
            removed += 1
            cursor.execute("DELETE FROM row_digests WHERE kind = 'ticks' AND row_id = ?", (number,))
    return removed


def _remove_iterations(cursor: Any, _pruning: Pruning, after: int, until: int) -> int:
    cursor.execute("DELETE FROM iterations WHERE id > ? AND id <= ?", (after, until))
    return int(cursor.rowcount)


def _remove_commits(cursor: Any, _pruning: Pruning, after: int, until: int) -> int:
    cursor.execute("DELETE FROM commits WHERE id > ? AND id <= ?", (after, until))
    removed = int(cursor.rowcount)
    gone = cursor.execute(
        "SELECT id FROM commands WHERE id < (SELECT min(id) FROM commands) + 1000 AND commit_id <= ?", (until,)
    ).fetchall()
    cursor.executemany("DELETE FROM commands WHERE id = ?", gone)
    cursor.executemany("DELETE FROM row_digests WHERE kind = 'commands' AND row_id = ?", gone)
    return removed + len(gone)


def _remove_moves(cursor: Any, pruning: Pruning, after: int, until: int) -> int:
    rows = cursor.execute(
        "SELECT id, commit_id, kind, subject, value FROM moves WHERE id > ? AND id <= ?", (after, until)
    ).fetchall()
    newest = {
        row[0]
        for row in cursor.execute(
            # Of a cursor for each subscription; flags tell different things each, and are few.
            "SELECT max(id) FROM moves WHERE commit_id <= ? GROUP BY kind, subject, "
            "CASE kind WHEN 'cursor' THEN substr(value, 1, instr(value, ',')) WHEN 'flag' THEN id END",
            (pruning.to.commit_id,),
        ).fetchall()
    }
    _keep(cursor, "moves", [(row[0], row_digest(row)) for row in rows if row[0] in newest])
    gone = [(row[0],) for row in rows if row[0] not in newest]
    cursor.executemany("DELETE FROM moves WHERE id = ?", gone)
    cursor.executemany("DELETE FROM row_digests WHERE kind = 'moves' AND row_id = ?", gone)
    return len(gone)


def _forget_digests(cursor: Any, kind: str, after: int, until: int, more: list[int]) -> None:
    """Remove digests of rows that are gone."""
    cursor.execute(
        f"DELETE FROM row_digests WHERE kind = ? AND row_id > ? AND row_id <= ? "
        f"AND NOT EXISTS (SELECT 1 FROM {kind} r WHERE r.id = row_digests.row_id)",
        (kind, after, until),
    )
    cursor.executemany("DELETE FROM row_digests WHERE kind = ? AND row_id = ?", [(kind, number) for number in more])


_REMOVE: dict[str, Callable[[Any, Pruning, int, int], int]] = {
    "state_changes": _remove_changes,
    "events": _remove_events,
    "ticks": _remove_ticks,
    "iterations": _remove_iterations,
    "commits": _remove_commits,
    "moves": _remove_moves,
}

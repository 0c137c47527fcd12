"""Agents, their statistics and schedules, and the loop's positions, as they were at a past moment.

What the history does not say, because it is of no unit and no move: what an agent's class said of `enabled` and
`priority` at an earlier start, whether it was registered, and ticks that changed nothing, which only the hourly marks
count. The next start says the first two anew; of the ticks those are counted that are known of.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace

from ael_store.clock import to_us
from ael_store.model.records import AgentRecord, AgentStats, AgentTotals, ScheduleRecord
from ael_store.schema.recent import TICKS
from ael_store.settings import Settings
from ael_store.store.past import Past, PastMove, Rewind, records_of

__all__ = ["rewind_agents", "rewind_positions", "rewind_schedules"]

PROBE_S, LONGEST_BACKOFF_S = 3600, 300
"""How the loop lets agents with errors in a row wait (`runtime/roster.py`)."""

PROVES_NOTHING = "(3, 4)"
"""Kinds of units whose success does not end errors in a row: `error` and `shutdown`."""

WALKED = 1000
"""The moving average of durations is told from so many of the last ticks: older ones weigh nothing in it."""


def rewind_agents(past: Past, rewind: Rewind, settings: Settings) -> None:
    """Agents that came later go; of the others, flags, health, metadata and statistics are as they were."""
    flags: dict[int, list[PastMove]] = {}
    for move in past.moves("flag"):
        if move.agent_id is not None:
            flags.setdefault(move.agent_id, []).append(move)
    metadata, metadata_since = past.newest_moves("metadata"), past.moved_since("metadata")
    totals = {record.agent_id: record for record in records_of(past, "agent_totals", AgentTotals)}
    stats = {record.agent_id: record for record in records_of(past, "agent_stats", AgentStats)}
    known = records_of(past, "agents", AgentRecord, "id > 0")
    later = _later(past, known)
    versions: dict[int, int | None] = {}
    """What they were before their first change after the moment."""
    for move in past.moves("version"):
        if move.id > past.move_id and move.agent_id is not None:
            versions.setdefault(move.agent_id, move.value["from"] or None)
    for now in known:
        if now.id in later:
            for table in ("agents", "agent_stats", "agent_totals", "schedules"):
                rewind.remove(table, now.id)
            continue
        then = replace(now, name=past.names.get(now.id, now.name))
        base = totals.get(now.id)
        if base is not None and base.tick_id > past.moment.tick_id:  # it was forgotten later
            rewind.remove("agent_totals", now.id)
            base = None
        said = _Flags(past, flags.get(now.id, []))
        said.tell(then)
        if now.id in metadata:
            then.metadata = metadata[now.id].text
        elif now.id in metadata_since:
            then.metadata = "{}"
        then.data_version = versions.get(now.id, now.data_version)
        if past.is_after(then.created_us):  # forgotten, and registered again later
            then.created_us = past.number(f"SELECT min(started_us) FROM {TICKS} WHERE agent_id = :a", a=now.id)
        counted = _stats(past, now.id, base, stats.get(now.id), said)
        _tell_health(past, now, then, settings, said, counted)
        if then != now:
            rewind.commit.agents[now.id] = then
        if said.is_forgotten:
            rewind.remove("agent_stats", now.id)
        elif counted is not None and counted != stats.get(now.id):
            rewind.commit.stats[now.id] = counted


def _later(past: Past, known: Iterable[AgentRecord]) -> set[int]:
    """Return the agents that were first registered after the moment: numbers are given out in order."""
    last_with_units = past.number(
        f"SELECT agent_id, id FROM {TICKS} WHERE id <= :t ORDER BY agent_id DESC LIMIT 1", t=past.moment.tick_id
    )
    return {agent.id for agent in known if agent.id > last_with_units and past.is_after(agent.created_us)}


class _Flags:
    """What operators and code have said of an agent, in their order."""

    forgotten: PastMove | None = None
    """When it was forgotten last, up to the moment."""
    mended: PastMove | None = None
    """When its errors in a row were forgotten last, up to the moment, by an operator."""

    def __init__(self, past: Past, moves: list[PastMove]) -> None:
        self.past = past
        self.operator: int | None = None
        self.enabled: int | None = None
        self.priority: int | None = None
        self.changed: set[str] = set()
        """What was said after the moment."""
        self.is_forgotten = False
        for move in moves:
            if move.id > past.move_id:
                self.changed.update(move.value)
            else:
                self._take(move)
        if self.forgotten is not None:
            units = past.units_before(self.forgotten.commit_id)
            self.is_forgotten = not past.rows(
                f"SELECT 1 FROM {TICKS} WHERE agent_id = :a AND id > :after AND id <= :t LIMIT 1",
                **{"a": self.forgotten.agent_id, "after": units, "t": past.moment.tick_id},
            )

    def _take(self, move: PastMove) -> None:
        value = move.value
        if "forgotten" in value:
            self.operator, self.enabled, self.forgotten = None, None, move
        elif "released" in value:
            self.mended = move
        elif "priority" in value:  # code has changed its attributes
            self.enabled, self.priority = int(value["enabled"]), value["priority"]
        elif "enabled" in value:
            self.operator = int(value["enabled"])

    def tell(self, then: AgentRecord) -> None:
        """Bring an agent's flags to what they were, as far as anything has changed since."""
        if self.changed & {"enabled", "forgotten"}:
            then.operator_enabled = self.operator
            then.enabled = next((flag for flag in (self.operator, self.enabled) if flag is not None), 1)
        if "priority" in self.changed and self.priority is not None:
            then.priority = self.priority
        if not then.registered and self.past.rows(
            f"SELECT 1 FROM {TICKS} t JOIN iterations i ON i.id = t.iteration "
            "WHERE t.agent_id = :a AND t.id > :t AND i.run_id = :r LIMIT 1",
            **{"a": then.id, "t": self.past.moment.tick_id, "r": self.past.run_id},
        ):
            then.registered = 1

    @property
    def boundary(self) -> int:
        """The last unit before which errors in a row do not count."""
        commits = [move.commit_id for move in (self.mended, self.forgotten) if move is not None]
        return self.past.units_before(max(commits)) if commits else 0


def _tell_health(
    past: Past, now: AgentRecord, then: AgentRecord, settings: Settings, said: _Flags, stats: AgentStats | None
) -> None:
    """Bring errors in a row, back-off and quarantine, and the last error to what they were."""
    a, t = now.id, past.moment.tick_id
    if past.is_present:
        return
    if past.is_after(now.last_error_us) or (now.last_error_us is None and "forgotten" in said.changed):
        last = past.rows(
            f"SELECT id, started_us FROM {TICKS} WHERE agent_id = :a AND id <= :t AND id > :b AND outcome IN (1, 2) "
            "ORDER BY id DESC LIMIT 1",
            **{"a": a, "t": t, "b": 0 if said.forgotten is None else past.units_before(said.forgotten.commit_id)},
        )
        then.last_error_us = last[0][1] if last else None
        then.last_error = past.error_of(last[0][0]) if last else None
    failed_since = past.number(
        f"SELECT count(*) FROM {TICKS} WHERE agent_id = :a AND id > :t AND outcome IN (1, 2) AND kind <> 3",
        a=a,
        t=t,
    )
    later_runs = past.rows("SELECT 1 FROM runs WHERE id > :r LIMIT 1", r=past.run_id)
    ailing = now.failures or now.deaths or now.retry_us is not None
    if not failed_since and not later_runs and ailing and not past.is_after(now.quarantined_us):
        return  # a success or a failure since would have changed it
    if later_runs:
        then.deaths = 0
    errors = _errors_in_a_row(past, a, said.boundary)
    if now.failures > failed_since:  # nothing has ended them since
        then.failures = now.failures - failed_since
    elif (
        stats is not None
        and stats.ticks
        and past.number(
            f"SELECT count(*) FROM {TICKS} WHERE agent_id = :a AND id <= :t AND kind = 0 AND outcome = 0",
            a=a,
            t=t,
        )
        < stats.ticks
    ):  # successful ticks that left no row may lie between them
        then.failures = min(len(errors), settings.backoff_after - 1)
    else:
        then.failures = len(errors)
    then.retry_us = None
    if now.quarantined_us is None or past.is_after(now.quarantined_us):
        then.quarantined_us = None
        if then.failures >= settings.quarantine_after and errors:
            then.quarantined_us = errors[-min(settings.quarantine_after, len(errors))]
    if errors and then.failures:
        wait_s = 0
        if then.quarantined_us is not None:
            wait_s = PROBE_S
        elif then.failures >= settings.backoff_after:
            wait_s = min(LONGEST_BACKOFF_S, 2 ** (then.failures - settings.backoff_after))
        then.retry_us = errors[0] + wait_s * 1_000_000 if wait_s else None


def _errors_in_a_row(past: Past, agent_id: int, boundary: int) -> list[int]:
    """Return when the agent's last units up to the moment failed, the newest first, back to its last success."""
    success = past.number(
        f"SELECT id FROM {TICKS} WHERE agent_id = :a AND id <= :t AND outcome = 0 "
        f"AND kind NOT IN {PROVES_NOTHING} ORDER BY id DESC LIMIT 1",
        **{"a": agent_id, "t": past.moment.tick_id},
    )
    found = past.rows(
        f"SELECT started_us, id FROM {TICKS} WHERE agent_id = :a AND id > :b AND id <= :t AND outcome IN (1, 2) "
        "AND kind <> 3 ORDER BY id DESC",
        **{"a": agent_id, "b": max(success, boundary), "t": past.moment.tick_id},
    )
    return [row[0] for row in found]


# -- statistics -------------------------------------------------------------------------------------


def _stats(
    past: Past, agent_id: int, base: AgentTotals | None, now: AgentStats | None, said: _Flags
) -> AgentStats | None:
    """Return the counters at the moment: what the totals, the last hourly mark and the units up to it say."""
    if past.is_present:
        return now
    t = past.moment.tick_id
    after = 0 if base is None else base.tick_id
    ticks, errors, events, measured, total_us = _count(past, agent_id, after)
    if base is not None:
        ticks, errors, events = ticks + base.ticks, errors + base.errors, events + base.events
        measured += base.ticks
    marks = past.rows(
        "SELECT iteration, ticks, measured, total_us FROM agent_marks WHERE agent_id = :a AND iteration <= :n "
        "ORDER BY hour_us DESC LIMIT 1",
        **{"a": agent_id, "n": past.moment.iteration},
    )
    for iteration, marked, marked_measured, marked_us in marks:
        before = past.number("SELECT tick_id FROM iterations WHERE id > :n ORDER BY id LIMIT 1", n=iteration)
        if said.forgotten is not None and past.units_before(said.forgotten.commit_id) >= before:
            continue
        since = _count(past, agent_id, before)
        ticks, measured = max(ticks, marked + since[0]), max(measured, marked_measured + since[3])
        total_us = max(total_us, marked_us + since[4])
    ticked_since = (
        now is None
        or past.is_after(now.last_tick_us)
        or past.rows(f"SELECT 1 FROM {TICKS} WHERE agent_id = :a AND id > :t AND kind = 0 LIMIT 1", a=agent_id, t=t)
    )
    if now is not None and not ticked_since and "forgotten" not in said.changed:
        return replace(now, errors=errors, events=events)
    then = AgentStats(agent_id, ticks, errors, events, max(measured, ticks), total_us)
    durations = past.rows(
        f"SELECT duration_us, id FROM {TICKS} "
        "WHERE agent_id = :a AND id > :b AND id <= :t AND kind = 0 AND outcome < 3 "
        f"ORDER BY id DESC LIMIT {WALKED}",
        **{"a": agent_id, "b": after, "t": t},
    )
    average = AgentStats(agent_id)
    for duration_us, _ in reversed(durations):
        average.measure(duration_us)
    then.ewma_us = average.ewma_us
    then.max_us = past.number(
        f"SELECT max(duration_us) FROM {TICKS} "
        "WHERE agent_id = :a AND id > :b AND id <= :t AND kind = 0 AND outcome < 3",
        **{"a": agent_id, "b": after, "t": t},
    )
    then.last_tick_us = (
        past.number(
            f"SELECT started_us, id FROM {TICKS} WHERE agent_id = :a AND id > :b AND id <= :t AND kind = 0 "
            "ORDER BY id DESC LIMIT 1",
            **{"a": agent_id, "b": after, "t": t},
        )
        or None
    )
    return then


def _count(past: Past, agent_id: int, after: int) -> tuple[int, int, int, int, int]:
    """Return what an agent's units after another one say: ticks, errors, events, durations, and their sum."""
    found = past.rows(
        "SELECT coalesce(sum(kind = 0 AND outcome = 0), 0), coalesce(sum(outcome IN (1, 2)), 0), "
        "coalesce(sum(kind = 1 AND outcome = 0), 0), coalesce(sum(kind = 0 AND outcome < 3), 0), "
        "coalesce(sum((kind = 0 AND outcome < 3) * duration_us), 0) "
        f"FROM {TICKS} WHERE agent_id = :a AND id > :b AND id <= :t",
        **{"a": agent_id, "b": after, "t": past.moment.tick_id},
    )
    return tuple(found[0])


# -- schedules and positions ------------------------------------------------------------------------


def rewind_schedules(past: Past, rewind: Rewind) -> None:
    """Fire times are those of the last move; a schedule that was first moved later goes."""
    moves, since = past.newest_moves("schedule"), past.moved_since("schedule")
    gone = rewind.removed.get("agents", set())
    for now in records_of(past, "schedules", ScheduleRecord):
        if now.agent_id not in since or now.agent_id in gone:
            continue
        if now.agent_id not in moves:
            rewind.remove("schedules", now.agent_id)
            continue
        said = moves[now.agent_id].value
        then = ScheduleRecord(now.agent_id, said["trigger"], _instant(said["next_at"]), _instant(said["last_at"]))
        if then != now:
            rewind.commit.schedules[now.agent_id] = then


def _instant(text: str | None) -> int | None:
    from datetime import datetime

    return None if text is None else to_us(datetime.fromisoformat(text))


def rewind_positions(past: Past, rewind: Rewind) -> None:
    """The scheduler stands where it stood, and the loop is paused if it was."""
    then: dict[str, str | None] = {}
    for strategy, number in past.rows(
        "SELECT subject, max(CASE WHEN id <= :m THEN id END) FROM moves WHERE kind = 'scheduler' GROUP BY subject "
        "HAVING max(id) > :m",
        m=past.move_id,
    ):
        said = past.rows("SELECT value FROM moves WHERE id = :id", id=number)
        then[strategy] = json.loads(said[0][0])["position"] if said else None
    pauses = [move for move in past.moves("flag") if move.subject == "loop" and "paused" in move.value]
    if any(move.id > past.move_id for move in pauses):
        then |= {"paused": None, "paused_because": None, "paused_since": None}
        for move in pauses:
            if move.id <= past.move_id:
                then |= _paused(past, move)
    for name, value in then.items():
        if value is None:
            rewind.remove("positions", name)
        else:
            rewind.commit.positions[name] = value


def _paused(past: Past, move: PastMove) -> dict[str, str | None]:
    said = move.value
    if not said["paused"]:
        return {"paused": "false", "paused_because": "null"}
    if "reason" not in said:
        return {"paused": "true"}
    since = past.number(
        "SELECT r.started_us FROM commits c JOIN runs r ON r.id = c.run_id WHERE c.id = :c", c=move.commit_id
    )
    return {
        "paused": "true",
        "paused_because": json.dumps(said["reason"], ensure_ascii=False),
        "paused_since": str(since),
    }

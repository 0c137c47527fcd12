"""What the history tells of an agent and of the last iterations: the facts that `runtime/why.py` judges."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, text

from ael_store.clock import iso
from ael_store.schema.recent import EVENTS, TICKS
from ael_store.store.moment import Moment, moment_at
from ael_store.store.questions import COMMON, Questions, Row
from ael_store.store.reader import Reader

__all__ = ["QUERIES", "AgentFacts", "agent_facts"]

LOOK_BACK = 20_000
"""How many moves before the iterations asked for are looked at."""

MOST_TOGETHER = 1000
"""How many iterations share a commit at most (`runtime/iteration.py`)."""

UNITS_BEFORE = 50
"""How many units of an agent before these iterations are looked at, for errors in a row and long hooks."""

QUERIES = {
    "last iterations": (
        "SELECT id, run_id, commit_id, clock, started_us, duration_us, ticks, tick_id FROM iterations "
        "WHERE id <= :until ORDER BY id DESC LIMIT :most"
    ),
    "iteration of move": (
        "SELECT id, run_id FROM iterations WHERE id = :id AND commit_id = :commit UNION ALL "
        "SELECT id, run_id FROM iterations WHERE id = :id + 1 LIMIT 1"
    ),
    "iterations": (
        "SELECT id, run_id, commit_id, clock, started_us, duration_us, ticks, tick_id FROM iterations "
        "WHERE id > :after AND id <= :until ORDER BY id"
    ),
    "units of agent": (
        "SELECT t.id, t.iteration, t.kind, t.outcome, t.started_us, t.duration_us, t.changes, t.events, "
        f"t.cause_event_id, t.cause_task_id FROM {TICKS} t "
        "WHERE t.agent_id = :agent AND t.id > :after AND t.id <= :until "
        "ORDER BY t.id"
    ),
    "units before": (
        "SELECT t.id, t.iteration, t.kind, t.outcome, t.started_us, t.duration_us, t.changes, t.events, "
        f"t.cause_event_id, t.cause_task_id FROM {TICKS} t WHERE t.agent_id = :agent AND t.id <= :until "
        "ORDER BY t.id DESC LIMIT :most"
    ),
    "next unit": (  # a hook that ran long: its unit is later than what it kept its agent from
        "SELECT t.id, t.iteration, t.kind, t.outcome, t.started_us, t.duration_us, t.changes, t.events, "
        f"t.cause_event_id, t.cause_task_id FROM {TICKS} t WHERE t.agent_id = :agent AND t.id > :after "
        "ORDER BY t.id LIMIT 1"
    ),
    "ticks": (
        "SELECT t.iteration, t.started_us FROM ticks t WHERE t.id > :after AND t.id <= :until AND t.kind = 0 "
        "ORDER BY t.id"
    ),
    "starts of the loop": (
        f"SELECT e.id, e.data, t.started_us FROM {EVENTS} e JOIN ticks t ON t.id = e.tick_id "
        "WHERE e.type_id = (SELECT id FROM event_types WHERE name = 'ael_started') AND e.id <= :until "
        "ORDER BY e.id DESC LIMIT :most"
    ),
}
"""Every question that is asked of a long table; a test looks at their plans."""


@dataclass(slots=True)
class AgentFacts:
    """What the history tells of an agent and of the last iterations, for `runtime/why.py` to judge."""

    record: Row
    """Its row in `agents`, with `ticks`, `measured` and `last_tick_us` of its statistics."""
    schedule: Row | None
    iterations: list[Row]
    """Newest first, each with `clocked`: whether it was one of the clock (None where that is not known), and `asked`:
    false for those that are there only because they were committed together with one that was asked for."""
    units: list[Row]
    """Its units in these iterations, and a few before and after, oldest first."""
    ticks: dict[int, int]
    """How many rows there are of ticks that began in an iteration."""
    moves: list[Row]
    """Its flags and fire times, pauses of the loop and the turns of `priority`, oldest first; flags with the first
    iteration that they count for, its run, and `by` and `at_us` where a command made them."""
    runs: dict[int, Row]
    """By number: `started_us`, `ended_us`, and as the loop said when it started `strategy` (None where that is not
    known) and, since it says so, `max_agents`."""
    takers: int
    """How many agents the clock ticks now."""
    takers_ever: int
    """How many agents the clock can have ticked together, ever."""
    triggered: int
    """How many agents have, or had, a trigger."""
    paused: Row | None
    """`since` and `by` where the loop is paused now, as far as they are known."""
    history_begins: int
    """The iteration after which history begins; 0 where nothing was removed."""
    until_now: bool = True
    later: list[Row] = field(default_factory=list)
    """The moves that follow these iterations, where a past moment was asked for."""


class _Asker(Questions):
    queries = {**COMMON, **QUERIES}


def agent_facts(
    reader: Reader, name: str, *, at: int | str | datetime | None = None, limit: int = 10
) -> AgentFacts | None:
    """Return what the history tells of an agent's last iterations; None where no agent of that name is known."""
    with reader.connect() as connection:
        asker = _Asker(connection, None if at is None else moment_at(connection, at))
        moment = asker.moment or moment_at(connection, None)
        record = _one(
            connection,
            "SELECT a.*, s.ticks, s.measured, s.last_tick_us FROM agents a "
            "JOIN agent_stats s ON s.agent_id = a.id WHERE a.name = :name AND a.id > 0",
            name=name,
        )
        if record is None:
            return None
        iterations = _iterations(asker, moment, limit)
        first_unit = iterations[-1]["tick_id"] if iterations else moment.tick_id
        agent = {"agent": record["id"]}
        units = asker.rows("units before", **agent, until=first_unit, most=UNITS_BEFORE)[::-1]
        units += asker.rows("units of agent", **agent, after=first_unit, until=moment.tick_id)
        units += asker.rows("next unit", **agent, after=moment.tick_id)
        schedule = _one(
            connection, 'SELECT "trigger", next_us, last_us FROM schedules WHERE agent_id = :id', id=record["id"]
        )
        moves, later = _moves(asker, name, iterations, moment)
        return AgentFacts(
            record,
            schedule,
            iterations,
            units,
            _ticks_begun(asker, iterations, first_unit),
            moves,
            _runs(asker, {iteration["run_id"] for iteration in iterations}, moment),
            *_takers(connection),
            _paused(asker) if at is None else None,
            asker.horizon.iteration,
            at is None,
            later,
        )


def _one(connection: Connection, sql: str, **parameters: Any) -> Row | None:
    found = connection.execute(text(sql), parameters).mappings().first()
    return None if found is None else dict(found)


def _iterations(asker: _Asker, moment: Moment, limit: int) -> list[Row]:
    """Return the last iterations up to a moment, whole commits of them: idle iterations share one."""
    found = asker.rows("last iterations", until=moment.iteration, most=limit)
    for iteration in found:
        iteration["asked"] = True
    if not found:
        return []
    newest, oldest = found[0], found[-1]
    before = asker.rows("iterations", after=oldest["id"] - 1 - MOST_TOGETHER, until=oldest["id"] - 1)[::-1]
    after = asker.rows("iterations", after=newest["id"], until=newest["id"] + MOST_TOGETHER)[::-1]
    earlier = [one for one in before if one["commit_id"] != oldest["commit_id"]]
    found = [
        *(one for one in after if one["commit_id"] == newest["commit_id"]),
        *found,
        *(one for one in before if one["commit_id"] == oldest["commit_id"]),
    ]
    begins_here = found[-1]["id"] == 1
    clock = earlier[0]["clock"] if earlier else 0 if begins_here else None
    for iteration in reversed(found):
        iteration.setdefault("asked", False)
        iteration["clocked"] = None if clock is None else iteration["clock"] > clock
        clock = iteration["clock"]
    return found


def _ticks_begun(asker: _Asker, iterations: list[Row], after: int) -> dict[int, int]:
    """Count the rows of ticks by the iteration in which they began; hooks in the background have theirs later."""
    counts = {iteration["id"]: 0 for iteration in iterations}
    began = {iteration["id"]: iteration["started_us"] for iteration in reversed(iterations)}
    for row in asker.rows("ticks", after=after, until=2**62 if asker.moment is None else asker.moment.tick_id):
        number = row["iteration"]
        if began.get(number, 0) > row["started_us"]:
            number = max((one for one, at_us in began.items() if at_us <= row["started_us"]), default=0)
        if number in counts:
            counts[number] += 1
    return counts


def _moves(asker: _Asker, agent: str, iterations: list[Row], moment: Moment) -> tuple[list[Row], list[Row]]:
    """Return the moves up to a moment, and those that follow it."""
    if not iterations:
        return [], []
    after, until = asker.span("moves", iterations[-1]["commit_id"], max(moment.commit_id, iterations[0]["commit_id"]))
    found = asker.rows("moves", after=max(0, after - LOOK_BACK), until=until, agent=agent)
    later = [] if asker.moment is None else asker.rows("moves", after=until, until=until + LOOK_BACK, agent=agent)
    for move in (*found, *later):
        move["value"] = json.loads(move["value"])
        if move["kind"] == "flag":
            # Idle iterations are committed with the one in which something happened: that is the last of its commit.
            number = asker.last("iterations", "commit_id", move["commit_id"])
            row = asker.row("iteration of move", id=number, commit=move["commit_id"])
            move["iteration"], move["run_id"] = (number + 1, None) if row is None else (row["id"], row["run_id"])
            move["by"] = move["at_us"] = None
            _by_command(asker, move)
    return found, later


def _by_command(asker: _Asker, move: Row) -> None:
    """Note who has made a move, and when: a command of the same commit."""
    after, until = asker.span("commands", move["commit_id"], move["commit_id"])
    for command in asker.rows("commands", after=after, until=until):
        arguments = json.loads(command["arguments"])
        about = arguments.get("name") if isinstance(arguments, dict) else None
        wanted = ("loop.pause", "loop.resume") if move["subject"] == "loop" else ("agents.enable", "agents.disable")
        if command["name"] in (*wanted, "agents.release") and about in (None, move["subject"]):
            move["by"], move["at_us"] = command["actor"], command["at_us"]


def _runs(asker: _Asker, numbers: set[int], moment: Moment) -> dict[int, Row]:
    """Return the runs with what the loop said of itself when each began."""
    found: dict[int, Row] = {}
    starts = asker.rows("starts of the loop", until=moment.event_id, most=len(numbers) + 20)
    for number in numbers:
        run = _one(asker.connection, "SELECT id, started_us, ended_us FROM runs WHERE id = :id", id=number)
        if run is None:
            continue
        said = [start for start in starts if start["started_us"] >= run["started_us"]]
        facts = json.loads(said[-1]["data"]) if said else None
        facts = facts if isinstance(facts, dict) else {}  # it can be redacted
        run |= {"strategy": None, **{name: facts[name] for name in ("strategy", "max_agents") if name in facts}}
        found[number] = run
    return found


def _takers(connection: Connection) -> tuple[int, int, int]:
    """Return `takers`, `takers_ever` and `triggered`; agents that were forgotten have no statistics."""
    found = _one(
        connection,
        "SELECT coalesce(sum(a.registered = 1 AND a.enabled = 1 AND s.measured > 0), 0) AS takers, count(*) AS ever, "
        "(SELECT count(*) FROM schedules) AS triggered FROM agents a LEFT JOIN agent_stats s ON s.agent_id = a.id "
        "WHERE a.id > 0 AND coalesce(s.measured, 1) > 0 AND a.id NOT IN (SELECT agent_id FROM schedules)",
    )
    assert found is not None
    return found["takers"], found["ever"], found["triggered"]


def _paused(asker: _Asker) -> Row | None:
    """Return since when the loop is paused and by whom; None where it is not."""

    def position(name: str) -> Any:
        found = _one(asker.connection, "SELECT value FROM positions WHERE name = :name", name=name)
        return None if found is None else json.loads(found["value"])

    if position("paused") is not True:
        return None
    because = position("paused_because")
    if because is not None:
        since = position("paused_since")
        return {"since": None if since is None else iso(since), "by": None, "because": because}
    last = asker.connection.execute(text("SELECT max(id) FROM moves")).scalar() or 0
    moves = asker.rows("moves", after=max(0, last - LOOK_BACK), until=last, agent="loop")
    pauses = [move for move in moves if move["kind"] == "flag" and move["subject"] == "loop"]
    if not pauses:
        return {"since": None, "by": None, "because": None}
    pause = {**pauses[-1], "by": None, "at_us": None}
    _by_command(asker, pause)
    return {
        "since": None if pause["at_us"] is None else iso(pause["at_us"]),
        "by": pause["by"],
        "because": None,
    }

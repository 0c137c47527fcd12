"""Why something is as it is: chains of causes in the history.

Each change, event and task knows the unit that made it, and a unit the event or the task that it handled, so a chain
is a few seeks by primary key for each step, whatever the length of the history.

A chain ends where a unit has no cause: a turn of the clock or of a trigger, a command from outside, the start of a
run. What retention has removed ends it too, with a step that says so. `v_causes` tells the same to SQL, but for what
it has no row for: events that were emitted to happen later, units of `on_error`, commands and runs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from sqlalchemy import text

from ael_store.clock import iso
from ael_store.errors import HistoryGone
from ael_store.schema.recent import CHANGES, TICKS
from ael_store.store import event_fate
from ael_store.store.event_fate import deliveries
from ael_store.store.moment import moment_at
from ael_store.store.questions import COMMON, Questions, Row
from ael_store.store.reader import Reader

__all__ = ["QUERIES", "Chain", "Kind", "chain_of", "known_keys", "newest"]

Kind = Literal["state", "event", "task", "change", "tick"]

QUERIES = {
    "change of key": (
        f"SELECT id FROM {CHANGES} WHERE key_id = (SELECT id FROM keys WHERE name = :key) AND id <= :until "
        "ORDER BY id DESC LIMIT 1"
    ),
    "change": (
        "SELECT c.id AS id, k.name AS key, CASE WHEN c.value IS NULL THEN 'delete' ELSE 'set' END AS operation, "
        "p.value AS old_value, c.value AS new_value, c.previous_id IS NOT NULL AND p.id IS NULL AS old_is_gone, "
        "c.tick_id AS unit_id FROM state_changes c JOIN keys k ON k.id = c.key_id "
        "LEFT JOIN state_changes p ON p.id = c.previous_id WHERE c.id = :id"
    ),
    "event": (
        "SELECT v.*, e.tick_id AS unit_id, o.name AS target FROM v_events v JOIN events e ON e.id = v.id "
        "LEFT JOIN event_sources o ON o.id = e.target_id WHERE v.id = :id"
    ),
    "task": (
        "SELECT v.id, v.agent, v.name, v.key, v.status, v.attempts, v.args, v.result, v.error, v.created_at, "
        "v.ended_at, v.iteration, q.question, q.answered_by, q.held, q.tick_id AS unit_id, "
        "q.applied_tick_id AS applied_unit_id FROM v_tasks v JOIN tasks q ON q.id = v.id WHERE v.id = :id"
    ),
    "failed unit": (  # the index of the agent; `on_error` follows at once, so the first one found is it
        f"SELECT id FROM {TICKS} WHERE agent_id = :agent AND id < :id AND kind <> 3 AND outcome IN (1, 2, 4) "
        "AND iteration >= :iteration - 1 ORDER BY id DESC LIMIT 1"
    ),
    "iteration": (
        "SELECT id, run_id, commit_id, clock, started_us, duration_us, tick_id FROM iterations WHERE id = :id"
    ),
    "commit before": "SELECT id FROM iterations WHERE id <= :id ORDER BY id DESC LIMIT 1",
    "next commit": "SELECT commit_id FROM iterations WHERE id > :id ORDER BY id LIMIT 1",
    "run": "SELECT * FROM v_runs WHERE run_id = :id",
    "run at": "SELECT id FROM runs WHERE started_us <= :at_us ORDER BY id DESC LIMIT 1",
    "first change": (
        "SELECT k.name FROM state_changes c JOIN keys k ON k.id = c.key_id "
        "WHERE c.id > :after AND c.id <= :until ORDER BY c.id"
    ),
    "types": (
        "SELECT y.name FROM events e JOIN event_types y ON y.id = e.type_id WHERE e.id > :after AND e.id <= :until"
    ),
    "delayed": (  # by number, from those emitted last: what waits longest is the last to be found
        "SELECT id, tick_id, due_us FROM delayed_events WHERE id <= :until AND event_id = :id ORDER BY id DESC LIMIT 1"
    ),
}
"""Every question that is asked of a long table; a test looks at their plans."""


@dataclass(slots=True)
class Chain:
    """Steps from a subject to its first cause, newest first; each has `what` and `id`."""

    steps: list[Row]
    more: bool = False
    """True where there are more than were asked for."""


# -- chains -----------------------------------------------------------------------------------------


def chain_of(
    reader: Reader, kind: Kind, subject: int | str, *, at: int | str | datetime | None = None, limit: int = 50
) -> Chain | None:
    """Return the chain of causes of a subject; None where there is no such thing, or not yet at that moment.

    Raises HistoryGone where retention has removed the subject itself, or the moment.
    """
    with reader.connect() as connection:
        asker = _Asker(connection, None if at is None else moment_at(connection, at))
        number = asker.change_of(str(subject)) if kind == "state" else int(subject)
        if number is None:
            return None
        what = {"state": "change", "tick": "unit"}.get(kind, kind)
        if not asker.is_within(what, number):
            return None
        steps: list[Row] = []
        for step in asker.walk(what, number):
            if len(steps) == limit:
                return Chain(steps, more=True)
            if not steps:
                if step["what"] == "gone":
                    asker.refuse(what, number)
                    return None
                if what == "event":
                    step.update(deliveries(asker, step))
            steps.append(step)
        return Chain(steps)


def known_keys(reader: Reader) -> list[str]:
    """Return every key that the database has known, those that were deleted too."""
    return [row["name"] for row in reader.rows("SELECT name FROM keys ORDER BY name")]


def newest(reader: Reader, kind: Kind) -> int:
    """Return the newest number of a kind."""
    table = {"event": "events", "task": "tasks", "tick": "ticks"}.get(kind, "state_changes")
    return reader.last_ids([table])[table]


class _Asker(Questions):
    """Questions about causes."""

    queries = {**COMMON, **QUERIES, **event_fate.QUERIES}

    # -- the subject --

    def change_of(self, key: str) -> int | None:
        """Return the newest change of a key at the moment; raises HistoryGone where it was removed."""
        until = 2**62 if self.moment is None else self.moment.change_id
        found = self.scalar("change of key", key=key, until=until)
        if found is None and self.horizon.change_id:
            known = self.connection.execute(text("SELECT 1 FROM keys WHERE name = :key"), {"key": key}).scalar()
            if known is not None:
                raise HistoryGone(
                    f"key {key!r} had no value where the history begins ({self._begin()}), and did not change since; "
                    "what was before that was removed"
                )
        return None if found is None else int(found)

    def is_within(self, what: str, number: int) -> bool:
        """True where a thing of that number was there at the moment, as its number says."""
        if self.moment is None:
            return True
        if what == "task":
            unit = self.connection.execute(text("SELECT tick_id FROM tasks WHERE id = :id"), {"id": number}).scalar()
            return unit is None or unit <= self.moment.tick_id
        last = {"change": self.moment.change_id, "event": self.moment.event_id}.get(what, self.moment.tick_id)
        return number <= last

    def refuse(self, what: str, number: int) -> None:
        """Raise HistoryGone where the subject was there once."""
        if self._was_removed(what, number):
            why = (
                "its result was taken up longer ago than the setting task_days says"
                if what == "task"
                else f"history begins at {self._begin()}"
            )
            raise HistoryGone(f"{what} {number} was removed: {why}")

    def _was_removed(self, what: str, number: int) -> bool:
        if what == "task":
            last = self.connection.execute(text("SELECT max(id) FROM tasks")).scalar() or 0
            return 1 <= number < last
        horizon = self.horizon
        last = {"change": horizon.change_id, "event": max(horizon.event_id, horizon.forgotten_event_id)}.get(
            what, horizon.tick_id
        )
        return 1 <= number <= last

    def _begin(self) -> str:
        at = "" if self.horizon.started_us is None else f", {iso(self.horizon.started_us)}"
        return f"iteration {self.horizon.iteration}{at}"

    # -- from effect to cause --

    def walk(self, what: str, number: int) -> Iterator[Row]:
        """Yield the steps of a chain; every cause is older than its effect, so it ends."""
        place: tuple[str, int] | None = (what, number)
        while place is not None:
            what, number = place
            if what == "unit":
                unit = self.row("unit", id=number)
                if unit is None:
                    yield self._gone(what, number)
                    return
                step, place, last = self._unit(unit)
                yield step
                if last is not None:
                    yield last
            else:
                found = self.row(what, id=number)
                if found is None:
                    yield self._gone(what, number)
                    return
                yield self._thing(what, found)
                place = "unit", found["unit_id"]

    def _gone(self, what: str, number: int) -> Row:
        if self._was_removed(what, number):
            why = "removed with the tasks that are over" if what == "task" else "before the beginning of the history"
        else:
            why = "not in the database, which has lost rows"
        return {"what": "gone", "id": number, "subject": what, "why": f"{what} {number} is {why}"}

    def _thing(self, what: str, row: Row) -> Row:
        """Return a change, an event or a task as a step."""
        step: Row = {"what": what, **row}
        if what == "change":
            unit = self.row("unit", id=row["unit_id"])
            step["old_is_gone"] = bool(row["old_is_gone"])
            for name, column in (("agent", "agent"), ("iteration", "iteration"), ("changed_at", "started_at")):
                step[name] = None if unit is None else unit[column]
        names = {"change": ("old_value", "new_value"), "event": ("data", "metadata"), "task": ("args", "result")}[what]
        for name in names:
            if step[name] is not None:
                step[name] = json.loads(step[name])
        return step

    def _unit(self, unit: Row) -> tuple[Row, tuple[str, int] | None, Row | None]:
        """Return a unit as a step, where its chain goes on, and the step with which it ends."""
        last: Row | None = None
        cause: tuple[str, int] | None = None
        kind = unit["kind"]
        failed = None
        if kind == "error":
            span = {"agent": unit["agent_id"], "iteration": unit["iteration"]}
            failed = self.scalar("failed unit", id=unit["id"], **span)
        if failed is not None:
            cause, because = ("unit", failed), f"unit {failed} failed, and this is its on_error"
        elif unit["cause_event_id"] is not None:
            cause = "event", unit["cause_event_id"]
            because = f"it handled event {cause[1]}"
            if kind == "event" and unit["outcome"] == "success" and unit["subscription_id"] is None:
                because += ", a dead letter that was delivered again"
        elif unit["cause_task_id"] is not None:
            cause = "task", unit["cause_task_id"]
            because = f"it took up the result of task {cause[1]}"
        elif unit["id"] <= self.horizon.tick_id:
            because = "what led to it is before the beginning of the history"
            last = {"what": "gone", "id": None, "subject": "cause", "why": because}
        elif kind == "tick":
            because = self._turn(unit)
        elif kind == "start":
            run_id = self.scalar("run at", at_us=unit["started_us"])
            run = None if run_id is None else self.row("run", id=run_id)
            because = "the run began" if unit["agent_id"] == 0 else "its run began, or it joined it"
            if run is not None:
                last = {"what": "run", "id": run.pop("run_id"), **run}
        elif kind == "shutdown":
            because = "the run ended" if unit["agent_id"] == 0 else "the run ended, or the agent left it"
        elif kind == "outside":
            cause, because, last = self._from_outside(unit)
        else:
            because = "the history does not tell"
        step = {
            "what": "unit",
            **{
                name: unit[name]
                for name in ("id", "agent", "kind", "outcome", "iteration", "started_at", "duration_ms")
            },
            "changes": unit["changes"],
            "events": unit["events"],
            "error": unit["error"],
            "subscriber": unit["subscriber"],
            "because": because,
        }
        return step, cause, last

    def _turn(self, unit: Row) -> str:
        """Say what made a tick due: the clock, or the trigger whose fire time its commit has moved on."""
        iteration = self.row("iteration", id=unit["iteration"])
        if iteration is None:
            return "its turn came; by what is not in the history"
        after, until = self.span("moves", iteration["commit_id"], iteration["commit_id"])
        for move in self.rows("moves", after=after, until=until, agent=unit["agent"]):
            if move["kind"] == "schedule" and move["subject"] == unit["agent"]:
                value = json.loads(move["value"])
                return f"its trigger {value['trigger']!r}, due at {value['last_at']}"
        if unit["started_us"] < iteration["started_us"]:
            return f"its turn came at {unit['started_at']}, and it ran in the background"
        return f"its turn came with iteration {iteration['clock']} of the clock"

    def _from_outside(self, unit: Row) -> tuple[tuple[str, int] | None, str, Row | None]:
        command = self._command_of(unit)
        if command is not None:
            step = {"what": "command", "id": command["id"], "name": command["name"], "actor": command["actor"]}
            step |= {"arguments": json.loads(command["arguments"]), "at": iso(command["at_us"])}
            return None, f"a command from outside: {command['name']} by {command['actor']}", step
        if unit["events"] and not unit["changes"]:
            delayed = self._delayed(unit)
            if delayed is not None:
                because = f"an event of unit {delayed['tick_id']} was to happen at {iso(delayed['due_us'])}"
                return ("unit", delayed["tick_id"]), because, None
        return None, "the program that runs the loop, outside of hooks; no command was noted", None

    def _delayed(self, unit: Row) -> Row | None:
        """Return the delayed event that happened in a unit: it was emitted before, and numbers grow with units."""
        until = self.last("delayed_events", "tick_id", unit["id"] - 1)
        return self.row("delayed", id=unit["event_id"] + 1, until=until)

    def _command_of(self, unit: Row) -> Row | None:
        """Return the command whose unit this is: the last one of its commit by then, if it fits what the unit did."""
        low = self.scalar("commit before", id=unit["iteration"])
        begun = None if low is None else self.row("iteration", id=low)
        first = 0 if begun is None or low != unit["iteration"] else begun["commit_id"]
        following = self.scalar("next commit", id=unit["iteration"])
        last = 2**62 if following is None else max(first, following - 1)
        after, until = self.span("commands", first, last)
        until = self.last("commands", "at_us", unit["started_us"], after, until)
        for command in self.rows("commands", after=max(after, until - 1), until=until):
            if self._fits(command, unit):
                return command
        return None

    def _fits(self, command: Row, unit: Row) -> bool:
        name, arguments = command["name"], json.loads(command["arguments"])
        if not isinstance(arguments, dict):
            return False
        keys = self._names("first change", unit["change_id"], unit["changes"])
        match name:
            case "state.set" | "state.delete" | "state.redact":
                return arguments.get("key") in keys
            case "events.emit":
                return arguments.get("type") in self._names("types", unit["event_id"], unit["events"])
            case "agents.rename" | "agents.forget":
                return any(key.startswith(f"agent/{arguments.get('name')}/") for key in keys)
            case "tasks.submit":
                return not keys and not unit["events"]
            case _:  # several keys in one unit
                return name.startswith("state.") and bool(keys)

    def _names(self, question: str, after: int, count: int) -> list[str]:
        found = self.connection.execute(text(self.queries[question]), {"after": after, "until": after + count})
        return list(found.scalars())

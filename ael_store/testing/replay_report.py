"""What a replay found: where today's code does other things than were recorded."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from difflib import SequenceMatcher
from typing import Any, Literal

import orjson

from ael_store.model.event import Emission, EventRecord
from ael_store.model.records import TaskRecord
from ael_store.model.values import decode
from ael_store.runtime.journal import SOURCE
from ael_store.store.recorded import Recorded, RecordedUnit
from ael_store.testing.past_unit import Replayed

__all__ = ["Difference", "ReplayReport", "compare"]

What = Literal["outcome", "write", "event", "delayed", "task", "effect"]

LONGEST_SHOWN = 200
SHOWN = 20
"""Differences that a message tells; the others are counted."""

LACKING_TASK = "a task that it submitted may have been removed"


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that today's code does otherwise; None on the side where there is nothing."""

    unit: int
    """Number of the unit, the `id` of `v_ticks`."""
    iteration: int
    kind: str
    """Of the unit: `tick`, `event`, `task`, `start`, `error` or `shutdown`."""
    what: What
    """`write`, `event`, `delayed`, `task`, `outcome`, or `effect`: it touches the outside."""
    name: str
    """The key, the type of the event, the name of the task, or what was touched."""
    recorded: dict[str, Any] | None
    """`{"value": …}` or `{"deleted": true}` of a write; what is known of an event, a task, or an ending."""
    replayed: dict[str, Any] | None

    def __str__(self) -> str:
        where = f"iteration {self.iteration}, on_{self.kind} (unit {self.unit})"
        if self.what == "effect":
            return f"{where}: touches the outside: {self.name}"
        return f"{where}: {self.what} {self.name}: recorded {shown(self.recorded)}, now {shown(self.replayed)}"

    def to_dict(self) -> dict[str, Any]:
        """Return the difference as a JSON object."""
        return asdict(self)


@dataclass(slots=True)
class ReplayReport:
    """What `replay` found."""

    agent: str
    units: int = 0
    """How many were looked at."""
    same: int = 0
    different: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    """How many could not be replayed, by the reason."""
    differences: list[Difference] = field(default_factory=list)
    """Where today's code does other things, in order of the units."""
    notes: list[str] = field(default_factory=list)
    """What to know about it, a sentence each."""

    @property
    def compared(self) -> int:
        """How many units were replayed."""
        return self.same + self.different

    @property
    def ok(self) -> bool:
        """True where something was replayed, and all of it did as was recorded."""
        return self.same > 0 and not self.different

    def check(self) -> ReplayReport:
        """Return this report where it is `ok`; else raise AssertionError with the differences."""
        if not self.ok:
            lines = [str(difference) for difference in self.differences[:SHOWN]]
            if len(self.differences) > SHOWN:
                lines.append(f"… and {len(self.differences) - SHOWN} more")
            raise AssertionError("\n".join([f"agent {self.agent}: {self.summary}", *lines]))
        return self

    @property
    def summary(self) -> str:
        """The counts, as a sentence."""
        if not self.compared:
            parts = [f"{_units(self.units)}, nothing could be compared"]
        else:
            parts = [f"{_units(self.units)} replayed: {self.same} the same, {self.different} different"]
        parts += [f"{count} can't be replayed: {reason}" for reason, count in self.skipped.most_common()]
        return "; ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as a JSON object."""
        return {
            "units": self.units,
            "same": self.same,
            "different": self.different,
            "skipped": dict(self.skipped.most_common()),
            "differences": [difference.to_dict() for difference in self.differences],
            "notes": self.notes,
        }


def _units(number: int) -> str:
    return f"{number} unit{'' if number == 1 else 's'}"


def shown(value: dict[str, Any] | None) -> str:
    """Return a side of a difference for people."""
    if value is None:
        return "nothing"
    if value == {"deleted": True}:
        return "deleted"
    text = orjson.dumps(value["value"] if list(value) == ["value"] else value).decode()
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}…"


# -- comparing --------------------------------------------------------------------------------------


def compare(
    unit: RecordedUnit, replayed: Replayed, recorded: Recorded, tasks_kept_us: int = 0
) -> tuple[list[Difference], str | None]:
    """Return where a unit did other things than it does today, and what can't be compared."""

    def difference(what: What, name: str, before: Any, now: Any) -> Difference:
        return Difference(unit.row.id, unit.row.iteration, unit.kind, what, name, before, now)

    before, now = _ending(unit.outcome, unit.failure), _ending(replayed.outcome, replayed.failure)
    if not _same_ending(before, now):
        return [difference("outcome", unit.kind, before, now)], None
    if unit.outcome != "success":
        return [], None
    found = [
        difference("write", key, _write(unit.writes, key), _write(replayed.writes, key))
        for key in [*unit.writes, *(key for key in replayed.writes if key not in unit.writes)]
        if _plain(unit.writes.get(key, "")) != _plain(replayed.writes.get(key, ""))
    ]
    happened = [record for record in unit.events if not _is_of_the_loop(unit, record)]
    emitted = [emission for emission in replayed.emissions if emission.source != SOURCE]
    sides = (
        [_event(event) for event in happened],
        [_event(emission) for emission in emitted if not _is_delayed(emission, replayed.now_us)],
    )
    found += [difference("event", name, before, now) for name, before, now in _aligned(*sides)]
    sides = (
        [_delayed(record, record.due_us - unit.row.started_us) for record in unit.delayed],
        [
            _delayed(emission, (emission.due_us or 0) - replayed.now_us)
            for emission in emitted
            if _is_delayed(emission, replayed.now_us)
        ],
    )
    found += [difference("delayed", name, before, now) for name, before, now in _aligned(*sides)]
    tasks = list(_tasks(unit, replayed, recorded, tasks_kept_us))
    found += [difference("task", *sides) for sides in tasks if sides is not None]
    return found, LACKING_TASK if None in tasks else None


def _ending(outcome: str, failure: Any) -> dict[str, Any]:
    ending = {"outcome": outcome}
    if outcome == "error" and failure is not None:
        ending |= {"type": failure.type, "message": failure.message}
    return ending


def _same_ending(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """True where both ended alike; where a class lives, and where an object lay in memory, does not count."""
    if one["outcome"] != other["outcome"]:
        return False
    types = [ending.get("type", "").rpartition(".")[2] for ending in (one, other)]
    messages = [re.sub(r"\b0x[0-9a-f]+\b", "0x…", ending.get("message", "")) for ending in (one, other)]
    longest = min(map(len, messages)) - 2 if any(message.endswith(" …") for message in messages) else None
    return types[0] == types[1] and messages[0][:longest] == messages[1][:longest]


def _plain(text: str | None) -> Any:
    """Return JSON text in the one form that equal values have; what is no text as it is."""
    return _form(orjson.loads(text)) if text else text


def _write(writes: dict[str, str | None], key: str) -> Any:
    if key not in writes:
        return None
    text = writes[key]
    return {"deleted": True} if text is None else {"value": decode(text)}


def _is_delayed(emission: Emission, now_us: int) -> bool:
    return emission.due_us is not None and emission.due_us > now_us


def _is_of_the_loop(unit: RecordedUnit, record: EventRecord) -> bool:
    if record.source == SOURCE:
        return True
    if unit.task is None or record.type != "task_finished" or record.data is None:
        return False
    data = decode(record.data)  # the loop tells of results that no `on_task` takes up
    return isinstance(data, dict) and data.get("id") == unit.task.id


def _event(event: EventRecord | Emission) -> dict[str, Any]:
    return {**_told(event), "source": event.source, "to": event.target}


def _delayed(event: Any, after_us: int) -> dict[str, Any]:
    return {**_told(event), "after_s": after_us / 1e6}


def _told(event: Any) -> dict[str, Any]:
    return {
        "type": event.type,
        "data": None if event.data is None else decode(event.data),
        "metadata": {} if event.metadata is None else decode(event.metadata),
    }


def _aligned(
    before: Sequence[dict[str, Any]], now: Sequence[dict[str, Any]]
) -> Iterator[tuple[str, dict[str, Any] | None, dict[str, Any] | None]]:
    """Yield what differs between two sequences of events: name, and both sides."""
    if not before and not now:
        return
    for start, end, other_start, other_end in _unequal(*([_form(event) for event in side] for side in (before, now))):
        ones, others = before[start:end], now[other_start:other_end]
        matcher = SequenceMatcher(None, [one["type"] for one in ones], [one["type"] for one in others], autojunk=False)
        for tag, low, high, other_low, other_high in matcher.get_opcodes():
            if tag == "equal":  # of the same type, but other data
                pairs = zip(ones[low:high], others[other_low:other_high], strict=True)
                yield from ((one["type"], one, other) for one, other in pairs)
            else:
                yield from ((one["type"], one, None) for one in ones[low:high])
                yield from ((other["type"], None, other) for other in others[other_low:other_high])


def _unequal(before: list[bytes], now: list[bytes]) -> Iterator[tuple[int, int, int, int]]:
    """Yield the places of two sequences between which they are not the same."""
    for tag, *places in SequenceMatcher(None, before, now, autojunk=False).get_opcodes():
        if tag != "equal":
            yield tuple(places)  # type: ignore[misc]


def _tasks(
    unit: RecordedUnit, replayed: Replayed, recorded: Recorded, kept_us: int
) -> Iterator[tuple[str, dict[str, Any] | None, dict[str, Any] | None] | None]:
    """Yield submissions that differ, None for one that may have been recorded and is gone.

    One whose key was known already made no task, then and now.
    """
    before = {record.key: record for record in unit.tasks}
    now: dict[str, TaskRecord] = {}
    for submission in replayed.submissions:
        now.setdefault(submission.record.key, submission.record)
    for key in [*before, *(key for key in now if key not in before)]:
        one, other = before.get(key), now.get(key)
        if one is None and recorded.had_task(key, unit.row.id):
            continue
        if one is None and recorded.may_lack_tasks(unit.row.id, unit.row.started_us, kept_us):
            yield None
            continue
        # When a task starts is recorded until it does.
        with_due = one is None or (one.attempts == 0 and one.next_us is not None)
        told = None if one is None else _task(one, replayed.now_us, with_due)
        told_now = None if other is None else _task(other, replayed.now_us, with_due)
        if _form(told) != _form(told_now):
            yield (one or now[key]).name, told, told_now


def _form(value: Any) -> bytes:
    """Return the one form that equal values have."""
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)


def _task(task: TaskRecord, now_us: int, with_due: bool) -> dict[str, Any]:
    told: dict[str, Any] = {
        "name": task.name,
        "key": task.key,
        "args": decode(task.args),
        "priority": task.priority,
        "limit": task.limit_name,
    }
    if with_due:
        told["after_s"] = None if task.next_us is None else (task.next_us - now_us) / 1e6
    return told

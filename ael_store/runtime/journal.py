"""Numbers everything and gathers what the next commit writes.

`apply` is the moment at which a unit takes effect: its writes enter the state, its changes and events get their
numbers, and its tick row is laid down, all in memory and in one go. `take` hands the gathered commit to the store.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any

import orjson

from ael_store.clock import from_us
from ael_store.model.event import Emission, Event, EventRecord
from ael_store.model.records import (
    AgentRecord,
    AgentStats,
    CommandRecord,
    Commit,
    DeadLetterRecord,
    DelayedRecord,
    IterationRecord,
    Move,
    Resumed,
    SubscriptionRecord,
    TickError,
    TickRow,
)
from ael_store.model.state import State
from ael_store.model.task import Submission
from ael_store.model.unit import Failure, Unit
from ael_store.runtime.metric_book import MetricBook
from ael_store.schema.tables import KINDS, OUTCOMES

__all__ = ["SOURCE", "Journal"]

SOURCE = "ael_controller"
"""Source of the events that the loop itself emits."""

ERROR_BYTES = 8192

RUNTIME = os.path.dirname(__file__)
"""Where the frames come from that say nothing about an error of an agent."""

CHAIN_ENDS_US = 1_000_000
"""A delay of so much ends the count of hops: what comes once a second is a timer and no storm."""


class Journal:
    """Counters, and the commit that is being gathered. Belongs to the loop's task."""

    def __init__(self, resumed: Resumed, state: State, run_id: int) -> None:
        self.state = state
        self.token = resumed.token + 1
        self.run_id = run_id
        self.iteration = resumed.iteration
        self.clock = resumed.clock
        self.commit_id = resumed.commit_id
        self.tick_id = resumed.tick_id
        self.event_id = resumed.event_id
        self.agent_id = resumed.agent_id
        self.subscription_id = resumed.subscription_id
        self.delayed_id = resumed.delayed_id
        self.dead_letter_id = resumed.dead_letter_id
        self.command_id = resumed.command_id
        self.task_id = resumed.task_id
        self.attempt_id = resumed.attempt_id
        self.metrics = MetricBook(resumed.metrics, resumed.sample_id)
        self.on_submit: Callable[[Submission, Unit, int], None] = _no_tasks
        """Takes up what a unit submits when it is applied."""
        self.delayed: dict[int, DelayedRecord] = {record.id: record for record in resumed.delayed}
        self._counted: set[int] = set()
        """Delayed events of this run that happen after a length of time, not at a time."""
        self.place = 0
        self.committed_event_id = resumed.event_id
        self.commits = 0
        self.commit = self._fresh()

    def _fresh(self) -> Commit:
        return Commit("iteration", self.commit_id + 1, self.token, self.iteration, self.run_id, 0)

    # -- a unit takes effect --

    def apply(
        self,
        unit: Unit,
        agent_id: int,
        *,
        subscription: SubscriptionRecord | None = None,
        also: Sequence[Emission] = (),
        always: bool = False,
    ) -> list[EventRecord]:
        """Let a finished unit take effect, and return the events that happened with it.

        `also` are events of the loop itself, which happen whatever the outcome. A unit that changed, emitted and
        consumed nothing and succeeded leaves no row, unless `always`.
        """
        commit = self.commit
        if unit.measurements is not None:
            self.metrics.take(
                unit.measurements, commit, agent_id=agent_id, iteration=self.iteration, now_us=unit.now_us
            )
        self._merge_increments(unit)
        tick_id = self.tick_id + 1
        before, last_event = self.state.change_id, self.event_id
        changes = self.state.apply(unit.writes, tick_id, agent_id) if unit.writes else []
        if not (
            changes
            or unit.emissions
            or also
            or always
            or unit.submissions
            or subscription is not None
            or unit.outcome != "success"
        ):
            return []
        self.tick_id = tick_id
        commit.changes += changes
        events = self._emit((*unit.emissions, *also), unit, tick_id) if unit.emissions or also else []
        seen = unit.seen_change_id if unit.seen_change_id != before else None
        commit.ticks.append(
            TickRow(
                tick_id,
                self.iteration,
                self.place,
                agent_id,
                KINDS[unit.kind],
                OUTCOMES[unit.outcome],
                unit.now_us,
                unit.duration_us,
                unit.seed,
                before,
                last_event,
                len(changes),
                len(events),
                seen,
                None if unit.cause is None else unit.cause.id,
                None if subscription is None else subscription.id,
                unit.task_id,
            )
        )
        self.place += 1
        for submission in unit.submissions:
            self.on_submit(submission, unit, tick_id)
        if unit.failure is not None:
            failure = unit.failure
            commit.errors.append(
                TickError(tick_id, failure.type, _cut(failure.message), _cut(failure.traceback, keep_end=True))
            )
        return events

    def _merge_increments(self, unit: Unit) -> None:
        """Where another unit has changed a key since, an increment counts from the value of now."""
        if unit.shadow is None:
            return
        for key, by in unit.increments.items():
            if key in unit.shadow:
                cell = self.state.cells.get(key)
                value = 0 if cell is None else orjson.loads(cell.text)
                unit.writes[key] = orjson.dumps(value + by).decode()

    def _emit(self, emissions: Iterable[Emission], unit: Unit, tick_id: int) -> list[EventRecord]:
        """Let events happen, now or later, and count the handlers that led to each.

        A chain of handlers that never ends is stopped by the hop limit (`delivery.py`). One that waits for a
        second or longer in each round is left alone: `emit(…, after="1h")` in a handler is how agents make timers,
        for ever, and it is too slow to be a storm. How long the handlers themselves take does not count as waiting:
        two agents that answer each other with slow and costly calls are what the limit is for.
        """
        now_us = unit.now_us
        records: list[EventRecord] = []
        for emission in emissions:
            if emission.due_us is not None and emission.due_us > now_us:
                self.delayed_id += 1
                delayed = DelayedRecord(
                    self.delayed_id,
                    emission.due_us,
                    emission.type,
                    emission.source,
                    emission.data,
                    emission.metadata,
                    tick_id,
                    None,
                    unit.hops if emission.due_us - now_us < CHAIN_ENDS_US else None,
                )
                self.delayed[delayed.id] = delayed
                if emission.is_counted:
                    self._counted.add(delayed.id)
                self.commit.delayed[delayed.id] = delayed
                continue
            self.event_id += 1
            record = EventRecord(
                self.event_id,
                emission.type,
                emission.source,
                emission.data,
                emission.metadata,
                now_us if emission.timestamp_us is None else emission.timestamp_us,
                tick_id,
                self.iteration,
                unit.hops,
                emission.target,
            )
            emission.event.id = record.id
            emission.event.iteration = self.iteration
            records.append(record)
        self.commit.events += records
        return records

    # -- what belongs to the commit beside units --

    def changed(self, record: AgentRecord | AgentStats | SubscriptionRecord | DeadLetterRecord) -> None:
        """Have a record written with the next commit."""
        if isinstance(record, AgentRecord):
            self.commit.agents[record.id] = record
        elif isinstance(record, AgentStats):
            self.commit.stats[record.agent_id] = record
        elif isinstance(record, DeadLetterRecord):
            self.commit.dead_letters[record.id] = record
        else:
            self.commit.subscriptions[record.id] = record

    def move(self, kind: str, subject: str, value: object) -> None:
        """Log a move that no tick row tells."""
        self.commit.moves.append(Move(kind, subject, orjson.dumps(value).decode()))

    def command(self, at_us: int, actor: str, name: str, arguments: object, error: str | None) -> None:
        """Log a change from outside, done or refused."""
        self.command_id += 1
        try:
            text = orjson.dumps(arguments, default=repr).decode()
        except (TypeError, ValueError):  # refused for what no JSON of ours holds: it is told all the same
            text = json.dumps(_clean(repr(arguments)[:ERROR_BYTES]))
        name, error = _clean(name[:200]), None if error is None else _clean(error)
        self.commit.commands.append(CommandRecord(self.command_id, 0, at_us, actor, name, text, error))

    def due_delayed(self, now_us: int) -> list[DelayedRecord]:
        """Return the delayed events whose time has come, in order."""
        due = [record for record in self.delayed.values() if record.due_us <= now_us]
        return sorted(due, key=lambda record: (record.due_us, record.id))

    def jumped(self, by_us: int) -> None:
        """The wall clock was set: what was emitted with `after=30` comes 30 s later all the same.

        Delays of earlier runs stay on the wall: how the clock was moved between the runs is not known, and one
        that starts wrong and is then set right is the usual case.
        """
        self._counted.intersection_update(self.delayed)
        for number in self._counted:
            record = self.delayed[number]
            record.due_us += by_us
            self.commit.delayed[number] = record

    def next_delayed_us(self) -> int | None:
        return min((record.due_us for record in self.delayed.values()), default=None)

    # -- committing --

    def take(self, kind: str, now_us: int) -> Commit:
        """Return the gathered commit, numbered and dated; call `done` when it is durable."""
        commit = self.commit
        commit.kind = kind
        commit.iteration = self.iteration
        commit.at_us = now_us
        commit.tick_id = self.tick_id
        for record in commit.iterations:
            record.commit_id = commit.id
        for command in commit.commands:
            command.commit_id = commit.id
        return commit

    def done(self) -> None:
        """The commit that was taken is durable: begin the next one."""
        self.commit_id = self.commit.id
        self.commits += 1
        self.committed_event_id = self.event_id
        self.state.committed()
        self.commit = self._fresh()

    def waiting_since(self) -> IterationRecord | None:
        """Return the first idle iteration that is not committed yet."""
        return self.commit.iterations[0] if self.commit.iterations else None


def _no_tasks(submission: Submission, unit: Unit, tick_id: int) -> None:
    raise AssertionError("a unit has submitted a task where there are none")


def loop_event(type: str, data: dict[str, Any], source: str = SOURCE) -> Emission:
    """Return an event of the loop itself."""
    event = Event(type, source, data, timestamp=from_us(0))
    return Emission(type, source, orjson.dumps(data).decode(), None, None, None, event)


def failure_of(error: BaseException) -> Failure:
    """Return type, message and traceback of an exception, without values of variables."""
    import traceback

    kind = type(error)
    name = (
        kind.__qualname__ if kind.__module__ in ("builtins", "__main__") else f"{kind.__module__}.{kind.__qualname__}"
    )
    try:
        message = str(error)
    except BaseException:  # whatever it raises: this is an agent's code
        message = "(its message can't be read)"
    frames = "".join(traceback.format_exception(kind, error, _from_their_code(error.__traceback__)))
    return Failure(name, _clean(message), _clean(frames))


def _from_their_code(trace: TracebackType | None) -> TracebackType | None:
    """Return a traceback without the frames of this package that it begins with."""
    inner = trace
    while inner is not None and inner.tb_frame.f_code.co_filename.startswith(RUNTIME):
        inner = inner.tb_next
    return inner or trace


def _clean(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")


def _cut(text: str, keep_end: bool = False) -> str:
    if len(text) <= ERROR_BYTES:
        return text
    return "… " + text[-ERROR_BYTES:] if keep_end else text[:ERROR_BYTES] + " …"

"""One hook of one agent, run as the loop runs it, without a loop: no file, no clock, no waiting."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from inspect import iscoroutinefunction
from types import MappingProxyType
from typing import Any

from ael_store.clock import from_us, iso, to_us
from ael_store.errors import AelError, InvalidAgent, InvalidValueType, NotAllowedHere, UsageError
from ael_store.model.event import Emission, Event, EventRecord
from ael_store.model.state import State
from ael_store.model.task import Task, new_record
from ael_store.model.unit import Failure, Kind, Outcome, Unit
from ael_store.model.values import DEFAULT_LIMITS, decode, encode
from ael_store.runtime.agent import AgentBase, check_agent
from ael_store.runtime.attempt import Attempt
from ael_store.runtime.context import StateContext
from ael_store.runtime.hooks import reply
from ael_store.runtime.iteration import iter_jobs
from ael_store.runtime.journal import failure_of
from ael_store.runtime.tick import Job
from ael_store.settings import Settings
from ael_store.testing.routing import routed
from ael_store.testing.steady_workbench import SteadyWorkbench
from ael_store.testing.virtual_clock import START, VirtualClock, as_instant

__all__ = ["TickResult", "run_tick", "task_attempt"]

ITERATION = 1
"""What `context.iteration` answers."""

KINDS: dict[str, Kind] = {"on_start": "start", "on_tick": "tick", "on_shutdown": "shutdown"}
"""The hooks that can be asked for by name."""

NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class TickResult:
    """What a hook did, and how it ended. Values are decoded, and copies."""

    outcome: Outcome
    """`success`, `error`, `timeout` or `cancelled`."""
    writes: dict[str, Any]
    """The keys that it changed, with their new values; its private part is `agent/NAME/…`."""
    deletes: set[str]
    """The keys that it removed."""
    events: list[Event]
    """What it emitted, in order, delayed ones too."""
    delayed: list[tuple[Event, datetime]]
    """Those of the events that are to happen later, with their time."""
    tasks: list[Task] = field(default_factory=list)
    """The tasks that it submitted and the questions that it asked, in order."""
    metrics: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    """What it recorded of metrics, by channel and name; the channel of an agent is its name."""
    state: dict[str, Any]
    """The whole state after it."""
    error: BaseException | None
    """What the hook raised, None where it succeeded."""
    failure: Failure | None
    """The same as the loop would have recorded it: type, message, traceback."""

    def check(self) -> TickResult:
        """Return this result if the hook succeeded; else raise what the hook raised."""
        if self.outcome == "success":
            return self
        if isinstance(self.error, Exception):
            raise self.error
        raise AelError(f"the hook ended in {self.outcome}: {self.failure}") from self.error


async def run_tick(
    agent: AgentBase,
    state: Mapping[str, Any] = NOTHING,
    inbox: Sequence[Event | Mapping[str, Any]] = (),
    now: datetime | str | None = None,
    seed: int = 0,
    *,
    hook: str | None = None,
    error: Exception | None = None,
    task: Task | Mapping[str, Any] | None = None,
    upgrade_from: int | None = None,
    resumed: bool = False,
) -> TickResult:
    """Run one hook of an agent as the loop would, and return what it did; what the hook raises is in the result.

    Without an inbox that is `on_tick`, or the `hook` that is named (`on_start`, `on_shutdown`), or with an `error`
    `on_error`, or with a `task` `on_task`: one from `tasks` of another result, or a mapping with `name`, `result` and
    the like; with `upgrade_from`, the version of the data in `state`, it is `on_upgrade`. With an inbox it is
    `on_event` instead, for one event (or mapping of its fields) after another, each in a unit of its own that sees
    what those before it did; the first that fails is the last that runs.

    `now` (2026-01-01 UTC unless given) and `seed` are what `context.now` and `context.random` go by. Raises where
    the agent could not be registered, or state and inbox could not be stored.
    """
    check_agent(agent)
    if agent._host is not None:
        raise UsageError(f"agent {agent.name!r} runs in a loop; pass run_tick an instance of its own")
    now_us = to_us(START if now is None else as_instant(now))
    hooks = _hooks(inbox, now_us, hook, error, task, upgrade_from)
    session = _Session(agent, state, now_us, seed, resumed)
    agent._host = session
    try:
        with routed(session):
            return await session.run_hooks(hooks)
    finally:
        agent._host = None


def _hooks(
    inbox: Sequence[Event | Mapping[str, Any]],
    now_us: int,
    hook: str | None,
    error: Exception | None,
    task: Task | Mapping[str, Any] | None,
    upgrade_from: int | None,
) -> list[tuple[Kind, str, Any]]:
    """Return what is to run: kind of the unit, name of the hook, and what it gets beside the context."""
    asked = (bool(inbox), hook is not None, error is not None, task is not None, upgrade_from is not None)
    if sum(asked) > 1:
        raise UsageError("inbox, hook, error, task and upgrade_from each say which hook is to run: pass one of them")
    if isinstance(inbox, Event | str | Mapping):
        raise InvalidValueType(f"inbox is {type(inbox).__name__}, wanted is a list of events: [{inbox!r}]")
    if inbox:
        return [("event", "on_event", _received(event, place, now_us)) for place, event in enumerate(inbox, 1)]
    if error is not None:
        return [("error", "on_error", error)]
    if task is not None:
        return [("task", "on_task", task if isinstance(task, Task) else _ended(task, now_us))]
    if upgrade_from is not None:
        return [("start", "on_upgrade", upgrade_from)]
    name = "on_tick" if hook is None else hook
    if name not in KINDS:
        raise UsageError(
            f"hook {name!r} can't be asked for by name; choose one of {', '.join(KINDS)}, "
            "or pass an inbox for on_event, an error for on_error, a task for on_task, upgrade_from for on_upgrade"
        )
    return [(KINDS[name], name, None)]


def _ended(fields: Any, now_us: int) -> Task:
    """Return a task as `on_task` gets it; what is not said is as usual."""
    known = {"name", "key", "args", "status", "result", "error", "attempts", "question", "answered_by"}
    if not isinstance(fields, Mapping) or "name" not in fields or set(fields) - known:
        raise InvalidValueType(f"task is {fields!r}, wanted is a mapping with 'name' and some of {sorted(known)}")
    status = fields.get("status", "done" if fields.get("error") is None else "failed")
    if status not in ("done", "failed", "cancelled"):
        raise InvalidValueType(f"the status of the task is {status!r}, wanted is 'done', 'failed' or 'cancelled'")
    question = fields.get("question")
    args: Any = list(fields.get("args", ()))
    if question is not None:
        args = {"question": question, "data": args[0] if args else None, "choices": None, "default": None}
    record = new_record(
        name=fields["name"],
        key=fields.get("key", "test"),
        args=encode(args, "args of the task"),
        kind="function" if question is None else "question",
        question=question,
        now_us=now_us,
    )
    record.id, record.status, record.ended_us = 1, status, now_us
    record.attempts, record.answered_by = fields.get("attempts", 1), fields.get("answered_by")
    record.error = fields.get("error")
    if status == "done":
        record.result = encode(fields.get("result"), "result of the task")
    return Task(record)


def task_attempt(name: str = "task", *args: Any, key: str = "test", attempt: int = 1) -> Attempt:
    """Return what a task's function gets first, to call it directly: `await agent.think(task_attempt(), data)`.

    `cost_usd` tells what the function said that it cost.
    """
    return Attempt(new_record(name=name, key=key, args=encode(list(args), "args of the task")), attempt)


def _received(event: Event | Mapping[str, Any], number: int, now_us: int) -> Event:
    """Return an event as a handler gets it: checked, numbered, its data a copy."""
    if isinstance(event, Mapping):
        unknown = set(event) - {"type", "source", "data", "timestamp", "metadata"}
        if unknown or "type" not in event:
            raise InvalidValueType(
                f"inbox holds a mapping with {sorted(map(str, event))}, wanted are 'type' and optionally "
                "'source', 'data', 'timestamp', 'metadata'"
            )
        when = event.get("timestamp")
        event = Event(
            event["type"],
            event.get("source", "outside"),
            event.get("data"),
            from_us(now_us) if when is None else as_instant(when),
            event.get("metadata"),
        )
    if not isinstance(event, Event):
        raise InvalidValueType(f"inbox holds {event!r} ({type(event).__name__}), wanted is an Event or a mapping")
    sent = Emission.of(event, now_us=None)
    assert sent.timestamp_us is not None
    return Event.from_record(
        EventRecord(
            event.id or number,
            sent.type,
            sent.source,
            sent.data,
            sent.metadata,
            sent.timestamp_us,
            0,
            event.iteration or ITERATION,
        )
    )


class _Session:
    """Stands where a loop would: runs hooks, lets their units take effect, and answers context, bus and agent."""

    run = None
    """There is no loop."""

    def __init__(self, agent: AgentBase, state: Mapping[str, Any], now_us: int, seed: int, resumed: bool) -> None:
        self.agent = agent
        self.limits = DEFAULT_LIMITS
        self._now_us = now_us
        self._seed = seed
        self._resumed = resumed
        self._state = State()
        if not isinstance(state, Mapping):
            raise InvalidValueType(f"state is {type(state).__name__}, wanted is a mapping of keys and values")
        before = self.preview()
        StateContext._of_unit(before, None).update(state)
        self._state.apply(before.writes, 0, 0)
        self._outcome: Outcome = "success"
        self._failure: Failure | None = None
        self._error: BaseException | None = None
        self._writes: dict[str, str | None] = {}
        self._rows: list[dict[str, Any]] = []
        self._received: list[Event] = []
        self._emitted: list[EventRecord] = []
        self._due: list[tuple[EventRecord, int]] = []
        self._submitted: list[Task] = []
        self._measured: dict[tuple[str, str], list[float]] = {}

    # -- running hooks --

    async def run_hooks(self, hooks: list[tuple[Kind, str, Any]]) -> TickResult:
        """Run hooks one after another until one fails, and return what they did."""
        clock = VirtualClock(from_us(self._now_us), self._seed)
        bench = SteadyWorkbench(self._state, clock, 1.0, lambda job: None)
        try:
            for place, (kind, hook, argument) in enumerate(hooks):
                if kind == "event":
                    self._received.append(argument)
                unit = self._unit(kind, self._seed + place, argument if kind == "event" else None)
                if kind == "event":
                    argument._answer = partial(reply, unit)
                await self._run(bench, unit, hook, argument)
                if self._outcome != "success":
                    break
        finally:
            bench.threads.close()
        return self._result()

    async def _run(self, bench: SteadyWorkbench, unit: Unit, hook: str, argument: Any) -> None:
        agent = self.agent
        ticks, errors = agent.tick_count, agent.error_count
        if unit.kind == "tick":
            object.__setattr__(agent, "tick_count", ticks + 1)
        context = StateContext._of_unit(unit, self, agent=agent.name)
        arguments = (context,) if argument is None else (argument, context)
        limit_s = Settings().tick_timeout if agent.tick_timeout is None else float(agent.tick_timeout)
        threaded = not iscoroutinefunction(getattr(agent, hook))
        job = Job(unit, lambda: getattr(agent, hook)(*arguments), threaded=threaded, limit_s=limit_s)
        ended: list[Job] = []
        await bench.run(iter_jobs([job]), ended.append)
        if not ended:  # it does not end when it is cancelled, and is left alone
            job.error = TimeoutError(f"the hook ran longer than {job.limit_s:g} s")
            unit.fail("timeout", Failure("Timeout", str(job.error)))
        if unit.outcome == "success":
            try:
                if not isinstance(agent.metadata, dict):
                    raise InvalidAgent(f"metadata is {type(agent.metadata).__name__}, wanted is a dict")
                encode(agent.metadata, f"metadata of agent {agent.name!r}", self.limits)
            except Exception as error:
                job.error = error
                unit.fail("error", failure_of(error))
        self._outcome, self._failure, self._error = unit.outcome, unit.failure, job.error
        if unit.outcome != "success":
            object.__setattr__(agent, "tick_count", ticks)
            object.__setattr__(agent, "error_count", errors + (unit.outcome in ("error", "timeout")))
        self._apply(unit)

    def _apply(self, unit: Unit) -> None:
        """Let a finished unit take effect."""
        if unit.measurements is not None:
            for metric, (_, values) in unit.measurements.found.items():
                self._measured[metric] = [*self._measured.get(metric, []), *values]
        for change in self._state.apply(unit.writes, 0, 0):
            text = None if change.new is None else change.new.text
            self._writes[change.key] = text
            self._rows.append(
                {
                    "timestamp": iso(unit.now_us),
                    "operation": "delete" if text is None else "set",
                    "key": change.key,
                    "old_value": None if change.old is None else change.old.text,
                    "new_value": text,
                    "agent": unit.subject,
                    "iteration": unit.iteration,
                }
            )
        self._submitted += [submission.task for submission in unit.submissions]
        for emission in unit.emissions:
            due_us = emission.due_us if emission.due_us is not None and emission.due_us > unit.now_us else None
            happens_us = due_us or emission.timestamp_us or unit.now_us
            record = EventRecord(
                len(self._received) + len(self._emitted) + 1,
                emission.type,
                emission.source,
                emission.data,
                emission.metadata,
                happens_us,
                0,
                unit.iteration,
            )
            self._emitted.append(record)
            if due_us is not None:
                self._due.append((record, due_us))

    def _result(self) -> TickResult:
        events = {record.id: Event.from_record(record) for record in self._emitted}
        return TickResult(
            outcome=self._outcome,
            writes={key: decode(text) for key, text in self._writes.items() if text is not None},
            deletes={key for key, text in self._writes.items() if text is None},
            events=list(events.values()),
            delayed=[(events[record.id], from_us(due_us)) for record, due_us in self._due],
            tasks=self._submitted,
            metrics=self._measured,
            state={key: decode(text) for key, text in self._state.items()},
            error=self._error,
            failure=self._failure,
        )

    def _unit(self, kind: Kind, seed: int, cause: Event | None = None) -> Unit:
        return Unit(
            kind,
            self.agent.name,
            self._state,
            iteration=ITERATION,
            now_us=self._now_us,
            seed=seed,
            cause=cause,
            limits=self.limits,
            resumed=self._resumed,
        )

    # -- what context, bus and agent ask a loop --

    def owns(self, unit: Unit) -> bool:
        return unit.state is self._state

    def submit(self, name: str, action: Callable[[Unit], Any]) -> None:
        raise NotAllowedHere(
            f"{name} outside the hook of {self.agent.name!r}: there is no loop that could apply it; "
            "await what the hook starts, and use its `context`"
        )

    def preview(self) -> Unit:
        return self._unit("outside", 0)

    def virtual(self, key: str) -> Any:
        answers = {"ael_status": "running", "ael_start_time": iso(self._now_us), "ael_iteration": ITERATION}
        return answers.get(key)

    def history(self, key: str | None, limit: int) -> list[dict[str, Any]]:
        texts = ("old_value", "new_value")
        rows = [row for row in self._rows if key in (None, row["key"])]
        return [
            {**row, **{name: None if row[name] is None else decode(row[name]) for name in texts}}
            for row in rows[-limit:]
        ]

    def recent_events(self, limit: int) -> list[Event]:
        return [*self._received, *map(Event.from_record, self._emitted)][-limit:]

    def event_count(self) -> int:
        return len(self._received) + len(self._emitted)

    def agent_changed(self, agent: AgentBase) -> None:
        """Its flags are its own business here."""

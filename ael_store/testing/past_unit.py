"""One recorded unit, run again with today's code on what it saw then.

`Stage` stands where a loop would: it answers context, bus and agent from the recording, keeps what the hook does as
the unit's private values, and lets nothing of it take effect. The state of the past is read key by key, when it is
asked for; only a hook that looks through all keys has the whole of it loaded, which then follows the units forward.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from inspect import iscoroutinefunction
from typing import Any

import orjson

from ael_store.clock import iso
from ael_store.errors import AelError, InvalidAgent
from ael_store.model.event import REDACTED, Emission, Event
from ael_store.model.state import Cell, Shadow, State
from ael_store.model.task import Submission, Task
from ael_store.model.unit import Failure, Outcome, Unit
from ael_store.model.values import DEFAULT_LIMITS, INT_MAX, Limits, decode, encode, same
from ael_store.runtime.agent import AgentBase
from ael_store.runtime.contained_tasks import contain_tasks
from ael_store.runtime.context import StateContext
from ael_store.runtime.current import current_unit
from ael_store.runtime.hooks import reply
from ael_store.runtime.iteration import iter_jobs
from ael_store.runtime.journal import failure_of
from ael_store.runtime.tick import Job
from ael_store.store.reader import history_entry
from ael_store.store.recorded import Recorded, RecordedRun, RecordedUnit
from ael_store.testing.rebuilt_error import rebuild_error
from ael_store.testing.steady_workbench import SteadyWorkbench
from ael_store.testing.virtual_clock import VirtualClock

__all__ = ["CannotReplay", "Replayed", "Setting", "Stage"]

LEFT_PATIENCE_S = 1.0
"""How long asyncio tasks that a hook left behind may take to end once they are cancelled."""

NOT_RECORDED = "it asks for `ael_last_tick`, which is not recorded"
REDACTED_SINCE = "it reads a value that was redacted since"


class CannotReplay(AelError):
    """A unit can't be run again; the message says why."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What a unit found besides state and cause; of some of it the recording leaves several answers."""

    run: RecordedRun | None
    iteration: int
    metadata: str | None
    """JSON text; None for what a new instance has."""
    redelivered: bool


@dataclass(slots=True)
class Replayed:
    """What today's code did in a unit."""

    outcome: Outcome
    failure: Failure | None = None
    writes: dict[str, str | None] = field(default_factory=dict)
    """The keys that it changed, as JSON text; None where it removed one."""
    emissions: list[Emission] = field(default_factory=list)
    submissions: list[Submission] = field(default_factory=list)
    now_us: int = 0
    metadata: str | None = None
    """The agent's metadata after it, as JSON text; None where they are none."""
    doubts: list[str] = field(default_factory=list)
    """What it asked for and got no true answer to."""


class Stage:
    """Runs recorded units, one at a time; between `open` and `close` in the event loop that calls it."""

    run = None
    """There is no loop."""

    def __init__(self, recorded: Recorded, limits: Limits = DEFAULT_LIMITS, tick_timeout_s: float = 60.0) -> None:
        self.limits = limits
        self._recorded = recorded
        self._tick_timeout_s = tick_timeout_s
        self._clock = VirtualClock()
        self._bench = SteadyWorkbench(State(), self._clock, 1.0, lambda job: None)
        self._whole: tuple[int, dict[str, str]] | None = None
        self._left: set[asyncio.Future[Any]] = set()
        self._unit: Unit | None = None
        self._row: RecordedUnit | None = None
        self._setting = Setting(None, 0, None, False)
        self._doubts: dict[str, None] = {}

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Have asyncio tasks of hooks contained and noted, as long as the `with` block lasts."""
        loop = asyncio.get_running_loop()
        free = contain_tasks(loop)
        inner = loop.get_task_factory()
        assert inner is not None

        def make(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> Any:
            task = inner(loop, coroutine, **options)
            if current_unit.get() is not None and current_unit.get() is self._unit:
                self._left.add(task)
                task.add_done_callback(self._left.discard)
            return task

        loop.set_task_factory(make)
        try:
            yield
        finally:
            if loop.get_task_factory() is make:
                loop.set_task_factory(inner)
            free()
            self._bench.threads.close()

    @property
    def left_alone(self) -> int:
        """How many hooks did not end although they were cancelled."""
        return len(self._bench.background) + len(self._bench.left_alone)

    # -- one unit --

    async def replay(self, agent: AgentBase, row: RecordedUnit, setting: Setting) -> Replayed:
        """Run the hook of a unit on an agent that is used for nothing else; raises CannotReplay."""
        self._row, self._setting, self._doubts = row, setting, {}
        state = _PastState(self, row.seen_change_id)
        hops = row.cause.hops if row.cause is not None else row.task.hops if row.task is not None else None
        unit = Unit(
            row.kind,
            agent.name,
            state,
            iteration=setting.iteration,
            now_us=row.row.started_us,
            seed=row.row.seed,
            cause=None if row.cause is None else Event.from_record(row.cause),
            limits=self.limits,
            resumed=setting.run is not None and setting.run.id > 1,
            hops=None if row.cause is None and row.task is None else (hops or 0) + 1,
        )
        self._unit = unit
        agent._host = self
        if setting.metadata is not None:
            agent.metadata.clear()
            agent.metadata.update(orjson.loads(setting.metadata))
        arguments = self._arguments(agent, row, unit)
        hook = getattr(agent, f"on_{row.kind}" if row.upgrade_from is None else "on_upgrade")
        if row.kind == "tick":
            object.__setattr__(agent, "tick_count", agent.tick_count + 1)
        limit_s = self._tick_timeout_s if agent.tick_timeout is None else float(agent.tick_timeout)
        job = Job(unit, lambda: hook(*arguments), threaded=not iscoroutinefunction(hook), limit_s=limit_s)
        ended: list[Job] = []
        try:
            await self._bench.run(iter_jobs([job]), ended.append)
        finally:
            await self._end_left()
        if not ended:  # it does not end although it was cancelled
            unit.fail("timeout", Failure("Timeout", f"the hook ran longer than {job.limit_s:g} s"))
        if unit.outcome == "success":
            self._settle(agent, row, unit)
        return Replayed(
            unit.outcome,
            unit.failure,
            self._changes(row, unit),
            unit.emissions,
            unit.submissions,
            unit.now_us,
            _metadata_of(agent),
            list(self._doubts),
        )

    def _arguments(self, agent: AgentBase, row: RecordedUnit, unit: Unit) -> tuple[Any, ...]:
        """Return what the hook gets."""
        context = StateContext._of_unit(unit, self, agent=agent.name)
        if row.upgrade_from is not None:
            return row.upgrade_from, context
        if row.kind == "event":
            assert row.cause is not None
            event = Event.from_record(row.cause)
            if self._setting.redelivered:
                event.metadata["redelivered"] = True
                unit.hops = 1
            event._answer = partial(reply, unit)
            return event, context
        if row.kind == "task":
            if row.task is None:
                raise CannotReplay("it is not recorded which task it took up")
            unit.task_id = row.task.id
            return Task(row.task), context
        if row.kind == "error":
            failure = self._recorded.failed_before(row)
            error = None if failure is None else rebuild_error(failure.type, failure.message, type(agent).__module__)
            if error is None:
                raise CannotReplay("the exception that `on_error` got can't be built again")
            return error, context
        return (context,)

    async def _end_left(self) -> None:
        """Cancel the asyncio tasks that a hook has left behind; a loop would let them go on."""
        left = set(self._left)
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(left, timeout=LEFT_PATIENCE_S)
            self._left.clear()

    def _settle(self, agent: AgentBase, row: RecordedUnit, unit: Unit) -> None:
        """Judge a unit that succeeded as the loop would: other units may have been faster, metadata must be JSON."""
        if row.row.seen_change_id is not None:
            key = self._merge(row, unit)
            if key is not None:
                unit.fail("conflict", Failure("Conflict", f"another unit has changed {key!r} since this one began"))
                return
        try:
            if not isinstance(agent.metadata, dict):
                raise InvalidAgent(f"metadata is {type(agent.metadata).__name__}, wanted is a dict")
            encode(agent.metadata, f"metadata of agent {agent.name!r}", self.limits)
        except Exception as error:
            unit.fail("error", failure_of(error))

    def _merge(self, row: RecordedUnit, unit: Unit) -> str | None:
        """Add increments to what other units have written meanwhile; returns a key that can't be merged."""
        merged: dict[str, str | None] = {}
        for key in unit.writes:
            if not self._recorded.changed(key, row.seen_change_id, row.row.change_id):
                continue
            text = self._value(key, row.row.change_id)
            value, by = 0 if text is None else decode(text), unit.increments.get(key)
            if by is None or type(value) not in (int, float) or abs(value + by) > INT_MAX:
                return key
            merged[key] = orjson.dumps(value + by).decode()
        unit.writes.update(merged)
        return None

    def _changes(self, row: RecordedUnit, unit: Unit) -> dict[str, str | None]:
        """Return the writes of a unit that change something."""
        changes = {}
        for key, text in unit.writes.items():
            before = self._value(key, row.row.change_id)
            if before is None or text is None:
                if before != text:
                    changes[key] = text
            elif not same(before, text):
                changes[key] = text
        return changes

    # -- the past --

    def _value(self, key: str, change_id: int) -> str | None:
        found = self._recorded.value(key, change_id)
        if found is None:
            return None
        if found[1]:
            self._doubts[REDACTED_SINCE] = None
        return found[0]

    def _whole_state(self, change_id: int) -> dict[str, str]:
        """Return every key after a change."""
        if self._whole is None:
            self._whole = change_id, self._recorded.state(change_id)
        at, values = self._whole
        if at > change_id:  # a unit that began before others ended
            return self._recorded.state(change_id)
        for key, text in self._recorded.changes(at, change_id):
            if text is None:
                values.pop(key, None)
            else:
                values[key] = text
        self._whole = change_id, values
        return values

    # -- what context, bus and agent ask a loop --

    def owns(self, unit: Unit) -> bool:
        return unit is self._unit or (self._unit is not None and unit.state is self._unit.state)

    def submit(self, name: str, action: Callable[[Unit], Any]) -> None:
        """What is done outside the unit would be a unit of its own, and is none of this one's."""

    def preview(self) -> Unit:
        assert self._unit is not None and self._row is not None
        unit = self._unit
        return Unit(
            "outside", "outside", unit.state, iteration=unit.iteration, now_us=unit.now_us, seed=0, limits=self.limits
        )

    def virtual(self, key: str) -> Any:
        run, row = self._setting.run, self._row
        if key == "ael_status":
            return "stopping" if row is not None and row.kind == "shutdown" else "running"
        if key == "ael_iteration":
            return self._setting.iteration
        if key == "ael_start_time":
            return None if run is None else iso(run.started_us)
        self._doubts[NOT_RECORDED] = None
        return None

    def history(self, key: str | None, limit: int) -> list[dict[str, Any]]:
        assert self._row is not None
        rows = self._recorded.history(key, self._row.row.change_id, limit)
        return [history_entry(row) for row in reversed(rows)]

    def recent_events(self, limit: int) -> list[Event]:
        assert self._row is not None
        return [Event.from_record(record) for record in self._recorded.recent_events(self._row.row.event_id, limit)]

    def event_count(self) -> int:
        return 0 if self._row is None else self._row.row.event_id

    def agent_changed(self, agent: AgentBase) -> None:
        """Its flags are its own business here."""


def _metadata_of(agent: AgentBase) -> str | None:
    try:
        return orjson.dumps(agent.metadata).decode()
    except (TypeError, ValueError):
        return None


class _PastState(State):
    """The state after a change."""

    __slots__ = ("_stage",)

    def __init__(self, stage: Stage, change_id: int) -> None:
        cells: Any = _PastCells(stage, change_id)
        super().__init__(cells, change_id)
        self._stage = stage

    def items(self, shadow: Shadow | None = None, prefix: str = "") -> Iterator[tuple[str, str]]:
        values = self._stage._whole_state(self.change_id)
        for key in sorted(values):
            if key.startswith(prefix):
                text = values[key]
                if text == REDACTED:
                    self._stage._value(key, self.change_id)
                yield key, text


class _PastCells:
    """Cells that are looked up when they are asked for."""

    def __init__(self, stage: Stage, change_id: int) -> None:
        self._stage = stage
        self._change_id = change_id
        self._known: dict[str, Cell | None] = {}

    def get(self, key: str, default: Any = None) -> Cell | None:
        if key not in self._known:
            text = self._stage._value(key, self._change_id)
            self._known[key] = None if text is None else Cell(None, text, 0, 0, 0)
        return self._known[key]

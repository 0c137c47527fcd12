"""One run: one life of the process that owns the loop, with everything that lives as long.

What happens in one round is in `iteration.py`; when to go round, and how a run begins and ends, in `lifecycle.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from ael_store.clock import Bell, Clock, HeldClock, iso
from ael_store.errors import DiskFull, LoopNotRunning
from ael_store.model.records import Commit, Resumed
from ael_store.model.state import State
from ael_store.model.unit import Kind, Unit
from ael_store.model.values import Limits
from ael_store.runtime.agent import AgentBase, AgentHost, overrides
from ael_store.runtime.commands import PAUSED, Desk, move_own_keys
from ael_store.runtime.context import ContextHost, StateContext
from ael_store.runtime.delivery import Deliveries
from ael_store.runtime.hooks import hook_job
from ael_store.runtime.journal import Journal
from ael_store.runtime.live_settings import change_settings
from ael_store.runtime.marks import HOUR_US
from ael_store.runtime.measure import IterationSummary, Meter
from ael_store.runtime.outside import Outside
from ael_store.runtime.pruner import Pruner
from ael_store.runtime.roster import AgentSlot, Roster
from ael_store.runtime.schedules import Schedules
from ael_store.runtime.service_manager import ServiceManager
from ael_store.runtime.tasks import TaskBoard
from ael_store.runtime.tick import Job, Workbench

if TYPE_CHECKING:
    from ael_store.runtime.bus import EventBus
    from ael_store.runtime.manager import AgentManager
    from ael_store.runtime.scheduler import Scheduler
    from ael_store.settings import Settings
    from ael_store.store.prune import Pruning
    from ael_store.store.store import Store

__all__ = ["Parts", "Run"]

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0
"""How long a commit waits for room before it is tried again; twice as long each time."""

log = logging.getLogger("ael_store.loop")


class RunHost(ContextHost, AgentHost, Protocol):
    """What contexts and agents of a run are attached to."""

    outside: Outside
    service: ServiceManager
    observers: list[Callable[[IterationSummary], None]]


class Parts:
    """What a controller brings into each of its runs."""

    def __init__(
        self,
        host: RunHost,
        store: Store,
        settings: Settings,
        manager: AgentManager,
        bus: EventBus,
        scheduler: Scheduler,
        context: StateContext,
        clock: Clock,
    ) -> None:
        self.host = host
        self.store = store
        self.settings = settings
        self.manager = manager
        self.bus = bus
        self.scheduler = scheduler
        self.context = context
        self.clock = clock


def _pruning(text: str) -> Pruning | None:
    """Return the removal of history that was under way when the database was last written."""
    if text == "null":
        return None
    from ael_store.store.prune import Pruning

    return Pruning.from_json(text)


class Run:
    """Everything that lives as long as a run. Belongs to one task; `wake` may be called from any thread."""

    def __init__(self, parts: Parts, resumed: Resumed, limits: Limits) -> None:
        self.host = parts.host
        self.store = parts.store
        self.settings = parts.settings
        self.manager = parts.manager
        self.bus = parts.bus
        self.scheduler = parts.scheduler
        self.context = parts.context
        self.clock = HeldClock(parts.clock)
        self.limits = limits
        self.bell = Bell()
        self.meter = Meter()
        self.stopping = False
        self.roster_dirty = False
        self.flags_changed: deque[AgentBase] = deque()
        self.finished: deque[Job] = deque()
        self.followups: deque[Job] = deque()
        self.unstarted: set[str] = set()
        self.replies: list[tuple[Future[Any], Any, BaseException | None]] = []
        self.started_us = self.clock.now_us()
        self.began = self.clock.monotonic()
        self.last_tick_us: int | None = None
        self.overrun_us = 0
        """Lost slots are warned of again from this instant."""
        self.full_since_us: int | None = None
        """Since when a commit waits for room on the disk; None while none does."""
        self.expire_us = 0
        """When the backlog of absent subscribers is looked at next."""
        self.hour_us = self.started_us // HOUR_US * HOUR_US
        """When the hour began whose end is marked next."""
        self.marked: dict[int, tuple[int, ...]] = resumed.marks
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()

        self.resumed = resumed.last_run is not None
        self.state = State(resumed.cells, resumed.change_id)
        self.journal = Journal(resumed, self.state, resumed.run_id + 1)
        self.roster = Roster(self.journal, self.settings, resumed)
        self.schedules = Schedules(self.journal, resumed.schedules, self.settings.timezone)
        self.deliveries = Deliveries(self.journal, self.settings, resumed.subscriptions, resumed.requested)
        self.workbench = Workbench(self.state, self.clock, self.settings.slow_after, self._finished_late)
        self.workbench.threads.freed = self._thread_freed
        self.tasks = TaskBoard(self.journal, self.settings, self.roster, self.clock, resumed, limits, wake=self.wake)
        self.pruner = Pruner(self, None if (text := resumed.positions.get("pruning")) is None else _pruning(text))
        self.desk = Desk(
            self.state,
            self.journal,
            self.roster,
            self.deliveries,
            self.tasks,
            self.clock,
            limits,
            running=True,
            scheduler=self.scheduler,
            find_dead_letters=self.store.reader.dead_letter_records,
            find_task=self.store.reader.task_record,
            find_undo=self.store.reader.undo_plan,
            run_agent=self._run_agent,
            prune=self.pruner.look_now,
            change_settings=partial(change_settings, self),
            paused=resumed.positions.get(PAUSED) == "true",
        )

    def clock_was_set(self, by_us: int) -> None:
        """The wall clock was set: what counts from a moment of this run keeps its distance, the rest stays."""
        now_us = self.clock.now_us()
        self.schedules.jumped(by_us, now_us)
        self.roster.jumped(by_us)
        self.deliveries.jumped(by_us)
        self.journal.jumped(by_us)
        self.tasks.jumped(by_us)
        self.overrun_us += by_us

    def wake(self) -> None:
        """Have the loop look for what is due."""
        if threading.get_ident() == self._thread:
            self.bell.ring()
        else:
            with contextlib.suppress(RuntimeError):  # the event loop is closed, the run is over
                self._loop.call_soon_threadsafe(self.bell.ring)

    def new_unit(self, kind: Kind, subject: str, **more: Any) -> Unit:
        """Return a fresh unit of work on the state as it stands."""
        return Unit(
            kind,
            subject,
            self.state,
            iteration=self.journal.iteration,
            now_us=self.clock.now_us(),
            seed=self.clock.seed(),
            limits=self.limits,
            resumed=self.resumed,
            **more,
        )

    def next_followup(self) -> Job | None:
        """Return the next job that was put off, its unit as of now; None where there is none."""
        if not self.followups:
            return None
        job = self.followups.popleft()
        unit = job.unit
        unit.iteration, unit.now_us, unit.seen_change_id = (
            self.journal.iteration,
            self.clock.now_us(),
            self.state.change_id,
        )
        return job

    def _run_agent(self, slot: AgentSlot) -> None:
        """Tick an agent before the others in the iteration under way; the strategy and its trigger stay as they are."""
        if self.stopping:
            raise LoopNotRunning("the loop is stopping, so no agent begins anything: start it again first")
        job = hook_job(self, slot, "tick")
        job.by_hand = True
        self.followups.append(job)

    def add_agent(self, agent: AgentBase, now_us: int) -> None:
        """Register an agent with everything that belongs to it; `on_upgrade` and `on_start` are still to come."""
        slot, earlier_name = self.roster.add(agent, now_us)
        if earlier_name is not None:
            move_own_keys(self.desk, earlier_name, agent.name)
            self.deliveries.rename(earlier_name, agent.name)
        agent._host = self.host
        self.schedules.add(slot, now_us)
        self.deliveries.attach_agent(slot, now_us)
        if slot.refused is not None:
            return
        if slot.upgrade_from is not None or overrides(agent, "on_start"):
            self.unstarted.add(agent.name)
        else:
            slot.started = True

    def _finished_late(self, job: Job) -> None:
        self.finished.append(job)
        self.wake()

    def _thread_freed(self, job: Job) -> None:
        self.workbench.strike_out(job)
        if job.slot is not None and job.slot.busy is job:
            job.slot.busy = None
        self.wake()

    # -- committing --

    async def commit(self, kind: str, *, take_from: int | None = None) -> None:
        """Write what was gathered; durable when it returns. Answers those who waited for it."""
        self.schedules.log_moves()
        position = self.scheduler.take_position()
        if position is not None:
            self.journal.commit.positions[self.scheduler.strategy] = position
            self.journal.move("scheduler", self.scheduler.strategy, {"position": position})
        commit = self.journal.take(kind, self.clock.now_us())
        await self._write(commit, take_from)
        self.journal.done()
        self.alive()
        self.tasks.committed(commit.known_keys)
        replies, self.replies = self.replies, []
        for future, result, error in replies:
            if future.cancelled():
                continue
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)

    async def _write(self, commit: Commit, take_from: int | None) -> None:
        """Have the store write a commit; while the disk is full the same commit is tried again and no unit runs.

        A run that has not begun yet does not wait, and one that is to stop tries once more. Raises DiskFull then,
        or when the limit is over.
        """
        pause_s, is_last = FIRST_PAUSE_S, False
        began = self.clock.monotonic()
        limit_s = 0.0 if take_from is not None else self.settings.full_limit
        try:
            while True:
                try:
                    await self.store.commit(commit, take_from=take_from, holder=f"pid {os.getpid()}")
                except DiskFull as error:
                    left_s = began + limit_s - self.clock.monotonic()
                    if is_last or left_s <= 0:
                        raise
                    is_last = self.stopping
                    pause_s = min(FIRST_PAUSE_S if is_last else pause_s, left_s)
                    self.full_since_us = self.full_since_us or self.clock.now_us()
                    log.error("%s; trying again in %.0f s, no agent runs until then", error, pause_s)
                    await self._pause(pause_s)
                    pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
                else:
                    if self.full_since_us is not None:
                        log.warning("there is room again: committed after %.0f s", self.clock.monotonic() - began)
                    return
        finally:
            self.full_since_us = None

    async def _pause(self, length_s: float) -> None:
        """Wait; only a stop that comes meanwhile ends it early."""
        until, was_stopping = self.clock.monotonic() + length_s, self.stopping
        while self.stopping == was_stopping and self.clock.monotonic() < until:
            self.alive()
            await self.clock.wait(self.bell, min(until, self.next_sign_of_life() or until))
        self.bell.ring()  # for whoever rang it meanwhile

    # -- telling the service manager --

    def alive(self) -> None:
        """Give a sign of life: an iteration is committed, or nothing is due, or there is no room for a commit."""
        self.host.service.alive(self.status)

    @property
    def status(self) -> str:
        """How the loop is, in a few words."""
        word = "waiting for room on the disk" if self.full_since_us is not None else self.virtual("ael_status")
        return f"iteration {self.journal.iteration}, {word}"

    def next_sign_of_life(self) -> float | None:
        """Return the monotonic time by which the service manager wants the next one; None where it wants none."""
        period_s = self.host.service.period_s
        return None if period_s is None else self.clock.monotonic() + period_s

    # -- asking --

    @property
    def observed(self) -> bool:
        """True where somebody looks at each iteration."""
        return bool(self.host.observers)

    def show(self, summary: IterationSummary) -> None:
        """Tell those who look; one who fails is told no more."""
        for observer in list(self.host.observers):
            try:
                observer(summary)
            except Exception:
                log.exception("an observer of the loop failed and is not called any more")
                self.host.observers.remove(observer)

    def virtual(self, key: str) -> Any:
        """Return the value of a key that the loop answers itself."""
        if key == "ael_status":
            return "stopping" if self.stopping else "paused" if self.desk.paused else "running"
        if key == "ael_start_time":
            return iso(self.started_us)
        if key == "ael_iteration":
            return self.journal.iteration
        return None if self.last_tick_us is None else iso(self.last_tick_us)

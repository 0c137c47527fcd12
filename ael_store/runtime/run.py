"""One run: one life of the process that owns the loop, from taking the database over to giving it back.

`begin` resumes and starts the agents, `main` goes round until it is told to stop, `end` shuts down. What happens
in one round is in `iteration.py`; this file decides *when* to go round.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import threading
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ael_store._version import __version__
from ael_store.clock import Bell, Clock, iso
from ael_store.errors import AelError
from ael_store.model.records import Resumed, RunRecord
from ael_store.model.state import State
from ael_store.model.unit import Unit
from ael_store.model.values import Limits
from ael_store.runtime.agent import AgentBase, overrides
from ael_store.runtime.commands import PAUSED, Desk
from ael_store.runtime.context import StateContext
from ael_store.runtime.control import ControlServer
from ael_store.runtime.delivery import Deliveries
from ael_store.runtime.hooks import hook_job
from ael_store.runtime.iteration import Due, collect_outside, run_iteration, settle
from ael_store.runtime.journal import SOURCE, Journal, loop_event
from ael_store.runtime.measure import IterationSummary, Meter
from ael_store.runtime.roster import Roster
from ael_store.runtime.schedules import Schedules
from ael_store.runtime.tick import Job, Workbench
from ael_store.runtime.trigger import Alarm

if TYPE_CHECKING:
    from ael_store.runtime.bus import EventBus
    from ael_store.runtime.host import Host
    from ael_store.runtime.manager import AgentManager
    from ael_store.runtime.scheduler import Scheduler
    from ael_store.settings import Settings
    from ael_store.store.store import Store

__all__ = ["Recovery", "Run"]

SHORTEST_ALARM_S = 0.04
"""Waits shorter than this are timed by the loop itself; APScheduler's resolution and cost forbid them."""
GUARD_S = 0.02
"""How long after its time a wake-up by APScheduler may come before the loop helps itself."""
JUMP_S = 1.0
"""A wall clock that moves by more than this against the monotonic one was set."""
EARLY_S = 0.0005

log = logging.getLogger("ael_store.loop")


@dataclass(frozen=True, slots=True)
class Recovery:
    """What a run found when it began."""

    new: bool
    iteration: int
    crashed: bool
    pending: int
    missed: int
    down_s: float

    def __str__(self) -> str:
        if self.new:
            return "new database"
        parts = [f"resumed at iteration {self.iteration}{' after a crash' if self.crashed else ''}"]
        if self.pending:
            parts.append(f"{self.pending} event{'s' if self.pending != 1 else ''} pending")
        if self.crashed:
            parts.append(f"{self.down_s:.0f} s missed")
        return "; ".join(parts)


class Run:
    """Everything that lives as long as a run. Belongs to one task; `wake` may be called from any thread."""

    def __init__(
        self,
        host: Host,
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
        self.limits = Limits(settings.key_bytes, settings.value_bytes, settings.event_bytes, settings.value_depth)
        self.bell = Bell()
        self.meter = Meter()
        self.stopping = False
        self.iterations_left: int | None = None
        self.roster_dirty = False
        self.flags_changed: deque[AgentBase] = deque()
        self.finished: deque[Job] = deque()
        self.followups: deque[Job] = deque()
        self.unstarted: set[str] = set()
        self.replies: list[tuple[Future[Any], Any, BaseException | None]] = []
        self.started_us = 0
        self.last_tick_us: int | None = None
        self.recovery: Recovery | None = None
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._slot_at: float | None = None
        self._offset_s = 0.0
        self._alarm: Alarm | None = None
        self._control: ControlServer | None = None

    # -- waking --

    def wake(self) -> None:
        """Have the loop look for what is due."""
        if threading.get_ident() == self._thread:
            self.bell.ring()
        else:
            with contextlib.suppress(RuntimeError):  # the event loop is closed, the run is over
                self._loop.call_soon_threadsafe(self.bell.ring)

    # -- beginning --

    async def begin(self) -> None:
        """Take the database over, resume, and run `on_start` of every agent; durable when it returns."""
        resumed = await self.store.open(
            "loop",
            upgrade_schema=self.settings.upgrade == "auto",
            backup=self.settings.backup,
            progress=log.info,
        )
        now_us = self.clock.now_us()
        self.started_us = now_us
        crashed = resumed.last_run is not None and resumed.last_run.status == "running"
        self._build(resumed, now_us)
        self._announce(resumed, crashed, now_us)
        await self._take_over(resumed, crashed, now_us)
        await self._open_control()
        await self._start_agents()
        self._slot_at = self.clock.monotonic()
        self._offset_s = self.clock.now_us() / 1e6 - self.clock.monotonic()
        if self.clock.real:
            self._alarm = Alarm(self.clock, self.bell.ring)
            self._alarm.start()

    def _build(self, resumed: Resumed, now_us: int) -> None:
        self.state = State(resumed.cells, resumed.change_id)
        self.journal = Journal(resumed, self.state, resumed.run_id + 1)
        self.roster = Roster(self.journal, self.settings, resumed)
        self.schedules = Schedules(self.journal, resumed.schedules, self.settings.timezone)
        self.deliveries = Deliveries(self.journal, self.settings, resumed.subscriptions)
        self.workbench = Workbench(self.state, self.clock, self.settings.slow_after, self._finished_late)
        self.workbench.threads.freed = self._thread_freed
        self.resumed = resumed.last_run is not None
        self.desk = Desk(
            self.state,
            self.journal,
            self.roster,
            self.deliveries,
            self.clock,
            self.limits,
            running=True,
            paused=resumed.positions.get(PAUSED) == "true",
        )
        durations = {
            name: self.roster.stats[record.id].ewma_us / 1e6
            for name, record in resumed.agents.items()
            if record.id in self.roster.stats
        }
        self.scheduler.restore(resumed.positions.get(self.scheduler.strategy), durations)
        self.scheduler.budget_s = self.settings.tick_rate or 0.05

    def _announce(self, resumed: Resumed, crashed: bool, now_us: int) -> None:
        run = resumed.last_run
        pending = self.store.reader.pending_count() if run is not None else 0
        last_us = resumed.last_started_us or (run.started_us if run else now_us)
        down_s = max(0.0, (now_us - last_us) / 1e6) if crashed else 0.0
        missed = int(down_s / self.settings.tick_rate) if crashed and self.settings.tick_rate > 0 else 0
        self.first_missed = max(0, missed - 1)
        self.recovery = Recovery(run is None, resumed.iteration, crashed, pending, self.first_missed, down_s)
        kind = ", a private temporary file" if self.store.is_temporary else ", new" if self.store.is_new else ""
        log.info("database %s%s", self.store.path, kind)
        if run is not None:
            log.log(logging.WARNING if crashed else logging.INFO, "%s", self.recovery)
        if self.desk.paused:
            log.warning("the loop is paused by an operator; `ael resume` lets it go on")

    async def _take_over(self, resumed: Resumed, crashed: bool, now_us: int) -> None:
        """The first commit: this run owns the database, and the one before it is told how it ended."""
        journal = self.journal
        if crashed and resumed.last_run is not None:
            last = resumed.last_run
            last.status = "crashed"
            last.ended_us = max(last.started_us, resumed.last_started_us or 0)
            last.last_iteration = max(resumed.iteration, last.first_iteration - 1)
            journal.commit.runs.append(last)
        self.record = RunRecord(
            journal.run_id,
            "running",
            now_us,
            None,
            journal.iteration + 1,
            None,
            os.getpid(),
            socket.gethostname(),
            __version__,
            journal.token,
            f"{self.settings.tick_rate:g}",
        )
        journal.commit.runs.append(self.record)
        self.deliveries.known_types = set(await asyncio.to_thread(self.store.reader.event_types))
        self.host.attach(self)
        for agent in list(self.manager.agents.values()):
            self.add_agent(agent, now_us)
        self.roster.absent()
        for (subscriber, pattern), callback in list(self.bus._callbacks.items()):
            slot = self.roster.slots.get(subscriber)
            self.deliveries.attach_callback(subscriber, pattern, callback, slot, now_us)
        unit = self.desk.unit(SOURCE)
        unit.kind = "start"
        also = []
        if crashed and self.recovery is not None:
            also.append(
                loop_event(
                    "ael_recovered",
                    {
                        "run": journal.run_id - 1,
                        "iteration": resumed.iteration,
                        "missed": self.recovery.missed,
                        "down_seconds": round(self.recovery.down_s, 3),
                        "pending": self.recovery.pending,
                    },
                )
            )
        also.append(
            loop_event(
                "ael_started",
                {
                    "tick_rate": self.settings.tick_rate,
                    "strategy": self.scheduler.strategy,
                    "agent_count": len(self.roster.slots),
                },
            )
        )
        self.deliveries.route(journal.apply(unit, 0, also=also))
        collect_outside(self)
        await self.commit("start", take_from=resumed.token)

    def add_agent(self, agent: AgentBase, now_us: int) -> None:
        """Register an agent with everything that belongs to it; its `on_start` is still to come."""
        known = set(self.roster.records)
        slot = self.roster.add(agent, now_us)
        old = known - set(self.roster.records)
        if old:
            from ael_store.runtime.commands import move_own_keys

            move_own_keys(self.desk, old.pop(), agent.name)
        agent._host = self.host
        self.schedules.add(slot, now_us)
        self.deliveries.attach_agent(slot, now_us)
        if overrides(agent, "on_start"):
            self.unstarted.add(agent.name)
        else:
            slot.started = True

    async def _start_agents(self) -> None:
        """Run `on_start`, higher priority first, and commit what it did."""
        slots = sorted(self.roster, key=lambda slot: (-slot.record.priority, slot.order))
        waiting = deque(slots)

        def next_job() -> Job | None:
            if self.followups:
                return self.followups.popleft()
            while waiting:
                slot = waiting.popleft()
                if slot.name in self.unstarted and slot.ready(self.clock.now_us()):
                    return hook_job(self, slot, "start")
            return None

        await self.workbench.run(next_job, lambda job: settle(self, job))
        if self.journal.commit.ticks:
            await self.commit("start")

    async def _open_control(self) -> None:
        if self.store.is_temporary:
            return
        self._control = ControlServer(self.store.path, self.host)
        path = await self._control.start()
        self.store.lock.describe("loop", path)

    # -- going round --

    async def main(self) -> None:
        """Go round until `stopping`; each time something is due, one iteration."""
        while not self.stopping:
            self._watch_wall_clock()
            due = self.due()
            if due is not None:
                await run_iteration(self, due)
                if self.iterations_left is not None:
                    self.iterations_left -= 1
                    if self.iterations_left <= 0:
                        return
                await asyncio.sleep(0)
            elif self._idle_over():
                await self.commit("iteration")
            else:
                await self._wait(self._next_due())

    def due(self) -> Due | None:
        """Return what is due now, None where nothing is."""
        clock = False
        late_s = 0.0
        missed = 0
        mono = self.clock.monotonic()
        now_us = self.clock.now_us()
        desk = self.desk
        going = not desk.paused or desk.steps > 0
        if desk.paused:
            self._slot_at = None
        elif self._slot_at is None:
            self._slot_at = mono
        if desk.paused and desk.steps:
            clock = True
        elif going and self._slot_at is not None:
            period = self.settings.tick_rate
            if period <= 0:
                clock = True
            elif mono >= self._slot_at - EARLY_S:
                clock = True
                passed = int((mono - self._slot_at + EARLY_S) / period)
                late_s = max(0.0, mono - self._slot_at - passed * period)
                missed = passed
                self._slot_at += (passed + 1) * period
        self.deliveries.wake(now_us)
        if not (
            clock
            or self.host.outside.queue
            or self.finished
            or self.roster_dirty
            or self.flags_changed
            or (
                going
                and (
                    self.followups
                    or self._passed(self.schedules.next_us(now_us), now_us)
                    or self._passed(self.journal.next_delayed_us(), now_us)
                    or self.deliveries.pending_now(now_us)
                    or self._startable(now_us)
                )
            )
        ):
            return None
        missed += self.first_missed if clock else 0
        if clock:
            self.first_missed = 0
        return Due(clock, missed, late_s, now_us, mono, going)

    @staticmethod
    def _passed(moment_us: int | None, now_us: int) -> bool:
        return moment_us is not None and moment_us <= now_us

    def _startable(self, now_us: int) -> bool:
        return any(self.roster.slots[name].ready(now_us) for name in self.unstarted)

    def _next_due(self) -> float | None:
        """Return the monotonic time at which something will be due by itself."""
        now_us, mono = self.clock.now_us(), self.clock.monotonic()
        times: list[float] = []
        if not self.desk.paused:
            if self._slot_at is not None and self.settings.tick_rate > 0:
                times.append(self._slot_at)
            for moment_us in (
                self.schedules.next_us(now_us),
                self.journal.next_delayed_us(),
                self.deliveries.next_retry_us(now_us),
                self.roster.next_retry_us(now_us),
            ):
                if moment_us is not None:
                    times.append(mono + max(0.0, (moment_us - now_us) / 1e6))
        waiting = self.journal.waiting_since()
        if waiting is not None:
            times.append(mono + max(0.0, self.settings.idle_commit - (now_us - waiting.started_us) / 1e6))
        return min(times, default=None)

    def _idle_over(self) -> bool:
        waiting = self.journal.waiting_since()
        if waiting is None:
            return False
        waited_s = (self.clock.now_us() - waiting.started_us) / 1e6
        return waited_s >= self.settings.idle_commit or waited_s < 0

    async def _wait(self, until: float | None) -> None:
        alarm = self._alarm
        if alarm is None or until is None or until - self.clock.monotonic() < SHORTEST_ALARM_S:
            await self.clock.wait(self.bell, until)
            return
        alarm.arm(until)
        await self.clock.wait(self.bell, until + GUARD_S)
        if self.clock.monotonic() >= until + GUARD_S:
            alarm.rearm()

    def _watch_wall_clock(self) -> None:
        offset_s = self.clock.now_us() / 1e6 - self.clock.monotonic()
        jump_s = offset_s - self._offset_s
        if abs(jump_s) > JUMP_S:
            log.warning("the wall clock was set by %+.1f s; schedules are computed anew", jump_s)
            self.schedules.jumped(int(jump_s * 1e6), self.clock.now_us())
            if self._alarm is not None:
                self._alarm.rearm()
        self._offset_s = offset_s

    # -- late results --

    def _finished_late(self, job: Job) -> None:
        self.finished.append(job)
        self.wake()

    def _thread_freed(self, job: Job) -> None:
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
        await self.store.commit(commit, take_from=take_from, holder=f"pid {os.getpid()}")
        self.journal.done()
        replies, self.replies = self.replies, []
        for future, result, error in replies:
            if future.cancelled():
                continue
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)

    # -- ending --

    async def end(self) -> None:
        """Let running units finish, deliver what is pending, run every `on_shutdown`, and mark the run stopped."""
        deadline = self.clock.monotonic() + self.settings.grace
        await self._drain(deadline)
        await self._shut_down(deadline)
        uptime_s = (self.clock.now_us() - self.started_us) / 1e6
        unit = self.desk.unit(SOURCE)
        unit.kind = "shutdown"
        event = loop_event(
            "ael_shutdown",
            {"total_iterations": self.journal.iteration, "uptime_seconds": round(uptime_s, 3)},
        )
        self.deliveries.route(self.journal.apply(unit, 0, also=[event]))
        self.record.status = "stopped"
        self.record.ended_us = self.clock.now_us()
        self.record.last_iteration = self.journal.iteration
        self.journal.commit.runs.append(self.record)
        await self.commit("shutdown")
        log.info("stopped at iteration %d", self.journal.iteration)

    async def _drain(self, deadline: float) -> None:
        """Wait for the background and deliver, until nothing is left or the grace period is over."""
        if self.desk.paused:
            deadline = min(deadline, self.clock.monotonic())
        while self.clock.monotonic() < deadline:
            self.deliveries.wake(self.clock.now_us())
            now_us = self.clock.now_us()
            if (
                self.finished
                or self.followups
                or self.host.outside.queue
                or self.deliveries.pending_now(now_us)
                or self._passed(self.journal.next_delayed_us(), now_us)
            ):
                await run_iteration(self, Due(False, 0, 0.0, now_us, self.clock.monotonic(), True, draining=True))
            elif self.workbench.background:
                await self.bell.wait(min(deadline - self.clock.monotonic(), 0.5))
            else:
                break
        left = self.workbench.abort()
        if left:
            log.warning("%d hooks did not end within the grace period and are cancelled", len(left))
            tasks = list(self.workbench.background.values())
            if tasks:
                await asyncio.wait(tasks, timeout=1.0)
        for job in left:
            if not job.unit.closed:
                job.unit.fail("cancelled", None)
            if job not in self.finished:
                self.finished.append(job)
        if self.finished or self.followups:
            now_us = self.clock.now_us()
            await run_iteration(self, Due(False, 0, 0.0, now_us, self.clock.monotonic(), False, draining=True))

    async def _shut_down(self, deadline: float) -> None:
        slots = sorted(self.roster, key=lambda slot: (slot.record.priority, -slot.order))
        waiting = deque(slot for slot in slots if slot.started)

        def next_job() -> Job | None:
            while waiting:
                slot = waiting.popleft()
                if slot.busy is None:
                    left_s = max(1.0, deadline - self.clock.monotonic())
                    return hook_job(self, slot, "shutdown", limit_s=min(slot.limit_s or left_s, left_s))
            return self.followups.popleft() if self.followups else None

        await self.workbench.run(next_job, lambda job: settle(self, job))
        while self.workbench.background and self.clock.monotonic() < deadline + 1.0:
            await self.bell.wait(0.2)
            while self.finished:
                settle(self, self.finished.popleft())
        self.workbench.abort()
        while self.finished:
            settle(self, self.finished.popleft())

    async def close(self, error: BaseException | None = None) -> None:
        """Give everything back, whatever happened; the run is over for everyone."""
        if self._alarm is not None:
            self._alarm.stop()
        if self._control is not None:
            await self._control.stop()
        self.workbench_closed()
        self.host.detach(self)
        for agent in self.manager.agents.values():
            agent._host = None
        for future, _, _ in self.replies:
            if not future.done():
                future.set_exception(error if isinstance(error, AelError) else AelError("the loop has ended"))
        self.host.refuse_waiting(error)
        await self.store.close()

    def workbench_closed(self) -> None:
        """End what still runs in the background, and the idle threads."""
        workbench = getattr(self, "workbench", None)
        if workbench is not None:
            workbench.abort()
            workbench.threads.close()

    # -- asking --

    @property
    def observed(self) -> bool:
        """True where somebody looks at each iteration."""
        return bool(self.host.observers)

    def show(self, summary: IterationSummary) -> None:
        """Tell those who look."""
        for observer in self.host.observers:
            observer(summary)

    def virtual(self, key: str) -> Any:
        """Return the value of a key that the loop answers itself."""
        if key == "ael_status":
            return "stopping" if self.stopping else "paused" if self.desk.paused else "running"
        if key == "ael_start_time":
            return iso(self.started_us)
        if key == "ael_iteration":
            return self.journal.iteration
        return None if self.last_tick_us is None else iso(self.last_tick_us)

    def new_unit(self, kind: Any, subject: str, **more: Any) -> Unit:
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

"""How a run lives: it takes the database over and starts the agents, goes round until it is told to stop, and
shuts down.

When to go round is decided here, by the monotonic clock and our own tables; APScheduler only wakes the loop.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import orjson

from ael_store._version import __version__
from ael_store.errors import AelError
from ael_store.model.event import Emission
from ael_store.model.records import Resumed, RunRecord
from ael_store.model.unit import SubscriptionRequest
from ael_store.model.values import Limits
from ael_store.runtime.commands import PAUSED, PAUSED_BECAUSE, PAUSED_SINCE
from ael_store.runtime.contained_tasks import contain_tasks
from ael_store.runtime.control import ControlServer
from ael_store.runtime.hooks import hook_job, start_job
from ael_store.runtime.host import Host
from ael_store.runtime.iteration import EXPIRE_EVERY_US, Due, collect_outside, run_iteration, settle
from ael_store.runtime.journal import SOURCE, loop_event
from ael_store.runtime.run import Parts, Run
from ael_store.runtime.tick import Job
from ael_store.runtime.trigger import Alarm
from ael_store.runtime.watchdog import Watchdog
from ael_store.store.unit_note import UnitNote, note_path, read_note

__all__ = ["Lifecycle", "Recovery"]

SHORTEST_ALARM_S = 0.04
"""Waits shorter than this are timed by the loop itself; APScheduler's resolution and cost forbid them."""
GUARD_S = 0.02
"""How long after its time a wake-up by APScheduler may come before the loop helps itself."""
UNCLEAN_WITHIN_US = 60_000_000
"""Unclean ends in a row count where their runs began no longer ago than this."""
JUMP_US = 1_000_000
"""A wall clock that moves by so much against the monotonic one was set; by less, it was corrected."""
LOOK_S = 10.0
"""The loop waits no longer than this before it looks at the clocks again: the wall clock may have been set, or the
machine suspended, which the timers of the event loop do not notice."""
LOCK_WATCH_S = 0.5
"""How often the loop looks whether the lock is still its own; each commit makes sure by the fencing token."""
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


@dataclass(frozen=True, slots=True)
class _Slot:
    """A slot of the clock: how many were lost before it, and how late it is."""

    missed: int
    late_s: float


def _passed(moment_us: int | None, now_us: int) -> bool:
    return moment_us is not None and moment_us <= now_us


class Lifecycle:
    """Begins, keeps going and ends one run."""

    def __init__(self, parts: Parts, host: Host, limits: Limits, resumed: Resumed, iterations: int | None) -> None:
        self.host = host
        self.run = run = Run(parts, resumed, limits)
        self._resumed = resumed
        self._iterations_left = iterations
        self._slot_at: float | None = None
        self._period = run.settings.tick_rate
        """The period of the grid that `_slot_at` belongs to."""
        self._alarm: Alarm | None = None
        self._watchdog: Watchdog | None = None
        self._free_tasks: Callable[[], None] = lambda: None
        self._lock_seen_at = run.clock.monotonic()
        self._control: ControlServer | None = None
        self.recovery = self._recover(resumed)
        self.first_missed = self.recovery.missed
        durations = {
            name: run.roster.stats[record.id].ewma_us / 1e6
            for name, record in resumed.agents.items()
            if record.id in run.roster.stats
        }
        run.scheduler.restore(resumed.positions.get(run.scheduler.strategy), durations)
        run.scheduler.budget_s = run.settings.tick_rate or 0.05

    # -- beginning --

    def _recover(self, resumed: Resumed) -> Recovery:
        """Return what the run before left, and how long ago."""
        run, last = self.run, resumed.last_run
        if last is None:
            return Recovery(True, resumed.iteration, False, 0, 0, 0.0)
        crashed = last.status == "running"
        pending = run.store.reader.pending_count()
        if not crashed:
            return Recovery(False, resumed.iteration, False, pending, 0, 0.0)
        last_us = max(last.started_us, resumed.last_started_us or 0)  # its last iteration, if it had any
        down_s = max(0.0, (run.started_us - last_us) / 1e6)
        slots = int(down_s / run.settings.tick_rate) if run.settings.tick_rate > 0 else 0
        return Recovery(False, resumed.iteration, True, pending, max(0, slots - 1), down_s)

    async def begin(self) -> None:
        """Take the database over and run `on_start` of every agent; durable when it returns."""
        run = self.run
        self._announce()
        self._free_tasks = contain_tasks(asyncio.get_running_loop())
        if run.clock.real:
            self._watchdog = Watchdog(run.workbench, run.settings.stall_warn, run.settings.stall_limit)
            self._watchdog.start()
        await self._take_over()
        self._open_note()
        await self._open_control()
        await self._start_agents()
        self._slot_at = run.clock.monotonic()
        if run.clock.real:
            self._alarm = Alarm(run.clock, run.bell.ring)
            self._alarm.start()

    def _announce(self) -> None:
        store, recovery = self.run.store, self.recovery
        kind = ", a private temporary file" if store.is_temporary else ", new" if store.is_new else ""
        log.info("database %s%s", store.path, kind)
        for warning in store.warnings:
            log.warning("%s", warning)
        if not recovery.new:
            log.log(logging.WARNING if recovery.crashed else logging.INFO, "%s", recovery)
        if self.run.desk.paused:
            why = orjson.loads(self._resumed.positions.get(PAUSED_BECAUSE, "null"))
            reason = "by an operator" if why is None else f"because {why}"
            log.warning("the loop is paused %s; `ael resume` lets it go on", reason)

    async def _take_over(self) -> None:
        """The first commit: this run owns the database, and the one before it is told how it ended."""
        run, recovery, resumed = self.run, self.recovery, self._resumed
        journal = run.journal
        if recovery.crashed and resumed.last_run is not None:
            last = resumed.last_run
            last.status = "crashed"
            last.ended_us = max(last.started_us, resumed.last_started_us or 0)
            last.last_iteration = max(resumed.iteration, last.first_iteration - 1)
            journal.commit.runs.append(last)
        self.record = RunRecord(
            journal.run_id,
            "running",
            run.started_us,
            None,
            journal.iteration + 1,
            None,
            os.getpid(),
            socket.gethostname(),
            __version__,
            journal.token,
            f"{run.settings.tick_rate:g}",
        )
        journal.commit.runs.append(self.record)
        self._pause_after_unclean_starts()
        quarantined = self._blame()
        run.tasks.open_limits(
            await asyncio.to_thread(run.store.reader.limit_uses, run.tasks.limit_names(), run.started_us)
        )
        run.deliveries.known_types = set(await asyncio.to_thread(run.store.reader.event_types))
        self.host.attach(run)
        for name in run.manager.take_unregistered():
            run.bus._carry_out(SubscriptionRequest(name, None, None))
            record = run.roster.records.get(name)
            if record is not None:
                run.deliveries.end_agent(record.id, name, run.started_us)
        for agent in list(run.manager.agents.values()):
            run.add_agent(agent, run.started_us)
        run.roster.absent()
        for (subscriber, pattern), callback in list(run.bus._callbacks.items()):
            slot = run.roster.slots.get(subscriber)
            run.deliveries.attach_callback(subscriber, pattern, callback, slot, run.started_us)
        unit = run.new_unit("start", SOURCE)
        also = [*self._opening_events(), *quarantined, *run.roster.take_refusals()]
        run.deliveries.route(journal.apply(unit, 0, also=also))
        run.followups.extend(collect_outside(run))
        await run.commit("start", take_from=resumed.token)

    def _blame(self) -> list[Emission]:
        """Count the death of the last run against the agents whose hooks ran then; returns events that this makes."""
        run, last = self.run, self._resumed.last_run
        if not self.recovery.crashed or last is None or run.store.is_temporary or run.store.is_taken_over:
            return []
        note = read_note(run.store.path)
        if note is None or note.run_id != last.id or not note.same_boot or not note.units:
            return []
        log.error("run %d died while %s ran", last.id, " and ".join(map(str, note.units)))
        others = len(note.units) - 1
        also = f", {others} other{'s' if others > 1 else ''} too" if others else ""
        made: list[Emission] = []
        for unit in note.units:
            why = f"the process died while its on_{unit.kind} ran (run {last.id}{also})"
            if note.reason:
                why = f"{note.reason} in its on_{unit.kind}, and the process was ended (run {last.id})"
            made += run.roster.blame(unit, why, run.started_us)
        return made

    def _pause_after_unclean_starts(self) -> None:
        """Pause the loop where runs end without a clean stop as soon as they have begun."""
        run, limit = self.run, self.run.settings.unclean_starts
        number = 0
        for record in self._resumed.recent_runs:
            if record.status == "stopped" or not 0 <= run.started_us - record.started_us <= UNCLEAN_WITHIN_US:
                break
            number += 1
        if not limit or number < limit or run.desk.paused:
            return
        reason = f"{number} run{'s' if number > 1 else ''} that began within the last minute ended without a clean stop"
        log.error(
            "%s: the loop starts paused; look at the log before this line, then `ael resume` lets it go on", reason
        )
        run.desk.paused = True
        run.journal.commit.positions[PAUSED] = "true"
        run.journal.commit.positions[PAUSED_BECAUSE] = orjson.dumps(reason).decode()
        run.journal.commit.positions[PAUSED_SINCE] = str(run.started_us)
        run.journal.move("flag", "loop", {"paused": True, "reason": reason})

    def _open_note(self) -> None:
        """From here on it is noted which hooks run, for the case that one takes the process down."""
        run = self.run
        if run.store.is_temporary:
            return
        try:
            run.workbench.note = UnitNote.create(run.store.path, run.journal.run_id)
        except OSError as error:
            log.warning(
                "%s can't be written (%s): an agent that takes the process down will not be known at the next start",
                note_path(run.store.path),
                error,
            )

    def _opening_events(self) -> list[Emission]:
        run, recovery = self.run, self.recovery
        started: dict[str, object] = {
            "tick_rate": run.settings.tick_rate,
            "strategy": run.scheduler.strategy,
            "agent_count": len(run.roster.slots),
            "max_agents": run.settings.max_agents,
        }
        recovered: dict[str, object] = {
            "run": run.journal.run_id - 1,
            "iteration": recovery.iteration,
            "missed": recovery.missed,
            "down_seconds": round(recovery.down_s, 3),
            "pending": recovery.pending,
        }
        events = [loop_event("ael_started", started)]
        return [loop_event("ael_recovered", recovered), *events] if recovery.crashed else events

    async def _start_agents(self) -> None:
        """Run `on_upgrade` and `on_start`, higher priority first, and commit what they did.

        Paused, that waits for the first iteration.
        """
        run = self.run
        if run.desk.paused:
            return
        waiting = deque(sorted(run.roster, key=lambda slot: (-slot.record.priority, slot.order)))

        def next_job() -> Job | None:
            if (job := run.next_followup()) is not None:
                return job
            while waiting:
                slot = waiting.popleft()
                if slot.name in run.unstarted and slot.ready(run.clock.now_us()):
                    return start_job(run, slot)
            return None

        def started(job: Job) -> None:
            settle(run, job)
            run.host.service.extend(f"{job} has ended; {len(waiting)} agents still have to start")

        await run.workbench.run(next_job, started)
        if run.journal.commit.ticks:
            await run.commit("start")

    async def _open_control(self) -> None:
        store = self.run.store
        if store.is_temporary:
            return
        store.lock.confirm()  # before the socket of somebody who has taken over is replaced
        self._control = ControlServer(store.path, self.host)
        store.lock.describe("loop", await self._control.start())

    # -- going round --

    async def main(self) -> None:
        """Go round until the run is to stop; each time something is due, one iteration."""
        run = self.run
        while not run.stopping:
            self._watch_wall_clock()
            due = self.due()
            if due is not None:
                self._watch_lock(due.began)
                await run_iteration(run, due)
                if due.going and run.pruner.starved():
                    await run.pruner.step()
                if self._iterations_left is not None and due.going:
                    self._iterations_left -= 1
                    if self._iterations_left <= 0:
                        return
                await asyncio.sleep(0)
            elif self._idle_over():
                await run.commit("iteration")
            elif run.pruner.due(run.clock.now_us()) and not run.desk.paused:
                await run.pruner.step()
                await asyncio.sleep(0)
            else:
                run.alive()
                await self._wait(self._next_due())

    def due(self) -> Due | None:
        """Return what is due now, None where nothing is."""
        run = self.run
        mono, now_us = run.clock.monotonic(), run.clock.now_us()
        going = not run.desk.paused or run.desk.steps > 0
        slot = self._slot(mono)
        until = self._slot_at if run.settings.tick_rate > 0 else None
        run.deliveries.wake(now_us)
        if slot is None:
            if not (self._changed_outside() or (going and self._due_by_itself(now_us))):
                return None
            return Due(False, 0, 0.0, now_us, mono, going, until=until)
        missed = slot.missed + self.first_missed
        self.first_missed = 0
        return Due(True, missed, slot.late_s, now_us, mono, going, until=until)

    def _slot(self, mono: float) -> _Slot | None:
        """Return the slot of the clock that has come, None where none has; slots behind it are lost.

        The grid is counted from the start of the run, or from the end of a pause: paused time is not lost.
        """
        run = self.run
        if run.desk.paused:
            self._slot_at = None
            return _Slot(0, 0.0) if run.desk.steps else None
        period = run.settings.tick_rate
        if period != self._period:  # set anew while the loop runs: another grid begins
            self._period, self._slot_at = period, None
        if period <= 0:
            return _Slot(0, 0.0)
        if self._slot_at is None:
            self._slot_at = mono
        if mono < self._slot_at - EARLY_S:
            return None
        passed = int((mono - self._slot_at + EARLY_S) / period)
        late_s = max(0.0, mono - self._slot_at - passed * period)
        self._slot_at += (passed + 1) * period
        return _Slot(passed, late_s)

    def _changed_outside(self) -> bool:
        run = self.run
        return bool(
            run.host.outside.queue or run.finished or run.roster_dirty or run.flags_changed or run.tasks.has_ended
        )

    def _due_by_itself(self, now_us: int) -> bool:
        run = self.run
        return (
            bool(run.followups)
            or _passed(run.schedules.next_us(now_us), now_us)
            or _passed(run.journal.next_delayed_us(), now_us)
            or run.deliveries.pending_now(now_us)
            or run.tasks.pending_now(now_us)
            or any(run.roster.slots[name].ready(now_us) for name in run.unstarted)
        )

    def _next_due(self) -> float | None:
        """Return the monotonic time at which something will be due by itself."""
        run = self.run
        now_us, mono = run.clock.now_us(), run.clock.monotonic()
        times: list[float] = []
        if not run.desk.paused:
            if self._slot_at is not None and run.settings.tick_rate > 0:
                times.append(self._slot_at)
            for moment_us in (
                run.schedules.next_us(now_us),
                run.journal.next_delayed_us(),
                run.deliveries.next_retry_us(now_us),
                run.tasks.next_us(now_us),
                run.roster.next_retry_us(now_us),
            ):
                if moment_us is not None:
                    times.append(mono + max(0.0, (moment_us - now_us) / 1e6))
            times.append(mono + max(0.0, (run.pruner.next_us - now_us) / 1e6))
        waiting = run.journal.waiting_since()
        if waiting is not None:
            times.append(mono + max(0.0, run.settings.idle_commit - (now_us - waiting.started_us) / 1e6))
        return min(times, default=None)

    def _idle_over(self) -> bool:
        run = self.run
        waiting = run.journal.waiting_since()
        if waiting is None:
            return False
        waited_s = (run.clock.now_us() - waiting.started_us) / 1e6
        return waited_s >= run.settings.idle_commit or waited_s < 0

    async def _wait(self, until: float | None) -> None:
        run = self.run
        alarm = self._alarm
        if run.clock.real and until is not None:
            until = min(until, run.clock.monotonic() + LOOK_S)
        if (sign_at := run.next_sign_of_life()) is not None:
            until = sign_at if until is None else min(until, sign_at)
        if alarm is None or until is None or until - run.clock.monotonic() < SHORTEST_ALARM_S:
            await run.clock.wait(run.bell, until)
            return
        alarm.arm(until)
        await run.clock.wait(run.bell, until + GUARD_S)
        if run.clock.monotonic() >= until + GUARD_S:
            alarm.rearm()

    def _watch_lock(self, mono: float) -> None:
        """After standing still, see whether somebody has taken over, before any agent runs again."""
        if mono > self._lock_seen_at + LOCK_WATCH_S:
            self.run.store.lock.confirm()
            self._lock_seen_at = mono

    def _watch_wall_clock(self) -> None:
        """Look at the wall; between two looks time runs with the monotonic clock."""
        run = self.run
        jump_us = run.clock.look()
        if not jump_us:
            return
        run.clock_was_set(jump_us)
        if abs(jump_us) < JUMP_US:
            return
        log.warning("the wall clock was set by %+.1f s; schedules are computed anew", jump_us / 1e6)
        run.expire_us = run.clock.now_us() + EXPIRE_EVERY_US  # time to set it right before a backlog is skipped for age
        if self._alarm is not None:
            self._alarm.rearm()

    # -- ending --

    async def end(self) -> None:
        """Let running units finish, deliver what is pending, run every `on_shutdown`, and mark the run stopped."""
        run = self.run
        deadline = run.clock.monotonic() + run.settings.grace
        await self._drain(deadline)
        await self._shut_down(deadline)
        uptime_s = run.clock.monotonic() - run.began
        unit = run.desk.unit(SOURCE)
        unit.kind = "shutdown"
        event = loop_event(
            "ael_shutdown",
            {"total_iterations": run.journal.iteration, "uptime_seconds": round(uptime_s, 3)},
        )
        run.deliveries.route(run.journal.apply(unit, 0, also=[event]))
        self.record.status = "stopped"
        self.record.ended_us = run.clock.now_us()
        self.record.last_iteration = run.journal.iteration
        run.journal.commit.runs.append(self.record)
        await run.commit("shutdown")
        log.info("stopped at iteration %d", run.journal.iteration)

    async def _drain(self, deadline: float) -> None:
        """Wait for the background and deliver, until nothing is left or the grace period is over."""
        run = self.run
        if run.desk.paused:
            deadline = min(deadline, run.clock.monotonic())
        while run.clock.monotonic() < deadline:
            run.deliveries.wake(run.clock.now_us())
            now_us = run.clock.now_us()
            if (
                run.finished
                or run.followups
                or run.host.outside.queue
                or run.deliveries.pending_now(now_us)
                or run.tasks.pending_now(now_us)
                or _passed(run.journal.next_delayed_us(), now_us)
            ):
                due = Due(False, 0, 0.0, now_us, run.clock.monotonic(), True, draining=True, until=deadline)
                await run_iteration(run, due)
            elif run.workbench.background or run.tasks.running:
                await run.clock.wait(run.bell, min(deadline, run.clock.monotonic() + 0.5))
            else:
                break
        cut_off = run.tasks.interrupt()
        if cut_off:
            log.warning("%d tasks did not end within the grace period; they run again at the next start", len(cut_off))
            await asyncio.wait({running.work for running in cut_off if running.work is not None}, timeout=1.0)
        left = run.workbench.abort()
        if left:
            log.warning("%d hooks did not end within the grace period and are cancelled", len(left))
            tasks = list(run.workbench.background.values())
            if tasks:
                await asyncio.wait(tasks, timeout=1.0)
        for job in left:
            if not job.unit.closed:
                job.unit.fail("cancelled", None)
            if job not in run.finished:
                run.finished.append(job)
        if run.finished or run.followups or run.tasks.has_ended:
            now_us = run.clock.now_us()
            await run_iteration(run, Due(False, 0, 0.0, now_us, run.clock.monotonic(), False, draining=True))

    async def _shut_down(self, deadline: float) -> None:
        run = self.run
        slots = sorted(run.roster, key=lambda slot: (slot.record.priority, -slot.order))
        waiting = deque(slot for slot in slots if slot.started)

        def next_job() -> Job | None:
            while waiting:
                slot = waiting.popleft()
                if slot.busy is None:
                    left_s = max(1.0, deadline - run.clock.monotonic())
                    return hook_job(run, slot, "shutdown", limit_s=min(slot.limit_s or left_s, left_s))
            return run.next_followup()

        await run.workbench.run(next_job, lambda job: settle(run, job))
        while run.workbench.background and run.clock.monotonic() < deadline + 1.0:
            await run.clock.wait(run.bell, run.clock.monotonic() + 0.2)
            while run.finished:
                settle(run, run.finished.popleft())
        run.workbench.abort()
        while run.finished:
            settle(run, run.finished.popleft())

    async def close(self, error: BaseException | None) -> None:
        """Give everything back, whatever happened; the run is over for everyone."""
        run = self.run
        if self._alarm is not None:
            self._alarm.stop()
        if self._control is not None:
            await self._control.stop()
        await run.tasks.close()
        await run.workbench.close()
        self._free_tasks()
        if self._watchdog is not None:
            self._watchdog.stop()
        if run.workbench.note is not None:
            run.workbench.note.close()
        self.host.detach(run)
        for agent in run.manager.agents.values():
            agent._host = None
        for future, _, _ in run.replies:
            if not future.done():
                future.set_exception(error if isinstance(error, AelError) else AelError("the loop has ended"))
        self.host.refuse_waiting(error)

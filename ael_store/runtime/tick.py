"""Runs hooks, each in its unit of work, one after another, and never waits for a slow one.

A *lane* is an asyncio task that takes jobs and awaits their hooks directly, so a quick hook costs no task of its
own. The workbench watches the lane: when a hook takes longer than `slow_after`, the lane with this one hook is set
aside into the background and a new lane goes on with the rest; when it takes longer than its limit, it is
cancelled. Plain `def` hooks run in threads of the loop's own, which can be abandoned: a thread can't be ended, so
its unit is closed and its agent stays busy until the thread is done.

A hook that asks its own task to cancel would hit whatever the lane runs next, so a lane with a pending
cancellation is thrown away. `SystemExit` and `KeyboardInterrupt` raised by a hook are failures of the hook.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from inspect import isawaitable
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from ael_store.clock import Clock
from ael_store.model.state import State
from ael_store.model.unit import Failure, Unit
from ael_store.runtime.current import current_unit
from ael_store.runtime.journal import failure_of

if TYPE_CHECKING:
    from ael_store.model.records import DeadLetterRecord, TaskRecord
    from ael_store.runtime.delivery import Subscription
    from ael_store.runtime.outside import Request
    from ael_store.runtime.roster import AgentSlot
    from ael_store.store.unit_note import UnitNote

__all__ = ["HookThreads", "Job", "Workbench"]

log = logging.getLogger("ael_store.agents")

CANCEL_PATIENCE_S = 1.0
"""How long a cancelled hook may take to end before it is left alone."""


@dataclass(slots=True, eq=False)
class Job:
    """One hook to run: its unit, how to call it, and whose it is."""

    unit: Unit
    call: Callable[[], Any]
    threaded: bool = False
    limit_s: float = 0.0
    background: bool = False
    slot: AgentSlot | None = None
    subscription: Subscription | None = None
    letter: DeadLetterRecord | None = None
    """The dead letter that is delivered again, beside the subscription's cursor."""
    task: TaskRecord | None = None
    """The task whose result is taken up."""
    result: Any = None
    error: BaseException | None = None
    started: float = 0.0
    timed_out: bool = False
    aborted: bool = False
    detached: bool = False
    still_runs: bool = False
    """Its code runs: in a thread, or in a task that was left alone."""
    limit: asyncio.TimerHandle | None = None
    """What ends it in the background when it has run too long."""
    request: Request | None = None
    """The `transact` that waits for the result."""
    by_hand: bool = False
    """Somebody has asked for it, so it leaves a row whatever it does."""
    upgrade_from: int | None = None
    """The version of the data that `on_upgrade` brings up to date; None for all other hooks."""
    noted: int = 0
    """Where the note of what runs has it; 0 for nowhere."""

    @property
    def hook(self) -> str:
        """The name of the hook."""
        return f"on_{self.unit.kind}" if self.upgrade_from is None else "on_upgrade"

    def __str__(self) -> str:
        unit = self.unit
        hook = "a function of transact" if self.request is not None else f"{self.hook} of {unit.subject!r}"
        return f"{hook} (iteration {unit.iteration})"


class _Lane:
    __slots__ = ("job", "poisoned", "task")

    def __init__(self) -> None:
        self.task: asyncio.Task[None]
        self.job: Job | None = None
        self.poisoned = False


class Workbench:
    """Runs jobs in lanes; `finished_late` gets, on the loop's thread, each job that ends in the background."""

    def __init__(self, state: State, clock: Clock, slow_after_s: float, finished_late: Callable[[Job], None]) -> None:
        self.state = state
        self.clock = clock
        self.slow_after_s = slow_after_s
        self.threads: HookThreads[Job] = HookThreads()
        self.background: dict[Job, asyncio.Task[None]] = {}
        self.left_alone: dict[Job, asyncio.Task[None]] = {}
        """Hooks that do not end although they were cancelled."""
        self.note: UnitNote | None = None
        """Where units are noted as long as they run, for the case that one of them takes the process down."""
        self._finished_late = finished_late
        self._lane = _Lane()

    async def run(self, next_job: Callable[[], Job | None], settle: Callable[[Job], None]) -> None:
        """Run jobs until there are none; `settle` is called with each before the next begins."""
        while True:
            self._lane = lane = _Lane()
            lane.task = asyncio.create_task(self._work(lane, next_job, settle), name="ael-lane")
            await self._watch(lane)
            if lane.task.done() and not lane.poisoned:
                lane.task.result()
                return

    async def _work(self, lane: _Lane, next_job: Callable[[], Job | None], settle: Callable[[Job], None]) -> None:
        task = asyncio.current_task()
        assert task is not None
        while not lane.poisoned:
            job = next_job()
            if job is None:
                return
            if job.background:
                self._begin_in_background(job)
                continue
            lane.job = job
            timer = None
            if 0 < job.limit_s < self.slow_after_s and self.clock.real:  # before the watch looks
                timer = asyncio.get_running_loop().call_later(job.limit_s, self._time_out_in_lane, lane, job)
            await self._execute(job)
            if timer is not None:
                timer.cancel()
            lane.job = None
            if job.detached:
                self._end_in_background(job)
                return
            lane.poisoned = task.cancelling() > 0
            settle(job)

    @staticmethod
    def _time_out_in_lane(lane: _Lane, job: Job) -> None:
        if lane.job is job and not job.timed_out:
            job.timed_out = True
            lane.task.cancel()

    async def _watch(self, lane: _Lane) -> None:
        """Wait until the lane is through, or until its job was set aside."""
        await asyncio.sleep(0)  # quick hooks are through after this one turn, without a timer
        while not lane.task.done():
            job = lane.job
            wait_s = self.slow_after_s
            if job is not None:
                ran_s = self.clock.monotonic() - job.started if self.clock.real else 0.0
                if job.limit_s and ran_s >= job.limit_s:
                    job.timed_out = True
                    lane.task.cancel()
                    await asyncio.wait({lane.task}, timeout=CANCEL_PATIENCE_S)
                    if not lane.task.done() and lane.job is job:
                        self._set_aside(lane, job)
                        self._leave_alone(job)
                        return
                    continue
                if ran_s >= self.slow_after_s:
                    self._set_aside(lane, job)
                    return
                wait_s -= ran_s
                if job.limit_s:
                    wait_s = min(wait_s, job.limit_s - ran_s)
            await asyncio.wait({lane.task}, timeout=max(wait_s, 0.001))

    def running(self) -> list[Job]:
        """Return the jobs whose hooks have begun and not ended. From any thread."""
        job = self._lane.job
        return [*list(self.background), *([job] if job is not None and not job.detached else [])]

    # -- in the background --

    def _set_aside(self, lane: _Lane, job: Job) -> None:
        job.detached = True
        if job.unit.shadow is None:
            job.unit.shadow = self.state.open_shadow()
        self.background[job] = lane.task
        self._limit(job)

    def _begin_in_background(self, job: Job) -> None:
        job.detached = True
        job.unit.shadow = self.state.open_shadow()

        async def work() -> None:
            await self._execute(job)
            self._end_in_background(job)

        self.background[job] = asyncio.create_task(work(), name="ael-background")
        job.started = self.clock.monotonic()
        self._limit(job)

    def _limit(self, job: Job) -> None:
        if job.limit_s and not job.timed_out:
            left_s = job.limit_s - (self.clock.monotonic() - job.started)
            job.limit = asyncio.get_running_loop().call_later(max(0.0, left_s), self._time_out, job)

    def _time_out(self, job: Job) -> None:
        task = self.background.get(job)
        if task is not None and not job.timed_out:
            job.timed_out = True
            task.cancel()
            asyncio.get_running_loop().call_later(CANCEL_PATIENCE_S, self._leave_alone, job)

    def _leave_alone(self, job: Job) -> None:
        """It has swallowed its cancellation: its unit ends without it, its agent is busy until it ends as well."""
        task = self.background.get(job)
        if task is None or task.done() or job.aborted:
            return
        log.warning("%s does not end although it was cancelled: it is left alone, and its agent waits for it", job)
        del self.background[job]
        self.left_alone[job] = task
        job.still_runs = True
        self._fail_late(job)
        self._finished_late(job)

    def _end_in_background(self, job: Job) -> None:
        if job.limit is not None:
            job.limit.cancel()  # else it keeps the job until its time has come
        if self.left_alone.pop(job, None) is not None:
            job.still_runs = False
            self.threads.freed(job)
            return
        self.background.pop(job, None)
        self._finished_late(job)

    def abort(self) -> list[Job]:
        """Cancel everything in the background and return the jobs; what does not end is left alone."""
        jobs = list(self.background)
        for job, task in [*self.background.items(), *self.left_alone.items()]:
            job.aborted = True
            task.cancel()
        return jobs

    async def close(self) -> None:
        """End the threads and tasks of hooks, as far as they end; nothing waits for the others any more."""
        self.abort()
        self.threads.close()
        tasks = {*self.background.values(), *self.left_alone.values()}
        if tasks:
            await asyncio.wait(tasks, timeout=CANCEL_PATIENCE_S)
        for task in tasks:
            if not task.done():  # `asyncio.run` would wait for it for ever
                asyncio._unregister_task(task)
                task._log_destroy_pending = False  # type: ignore[attr-defined]

    # -- one hook --

    async def _execute(self, job: Job) -> None:
        unit = job.unit
        token = current_unit.set(unit)
        note = self.note
        if note is not None:
            subject = unit.subject if job.slot is not None else f"({unit.subject})"
            job.noted = note.begin(unit.iteration, unit.kind, subject)
        job.started = started = self.clock.monotonic()
        try:
            if job.threaded:
                result = await self.threads.run(job)
            else:
                result = job.call()
            if isawaitable(result):
                result = await result
            job.result = result
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if job.timed_out or job.aborted:
                assert task is not None
                while task.cancelling():
                    task.uncancel()
            if job.timed_out:
                self._fail_late(job)
            else:
                job.error = error
                unit.fail("cancelled", failure_of(error))
        except BaseException as error:
            job.error = error
            unit.fail("error", failure_of(error))
        else:
            if job.timed_out:  # it swallowed the cancellation and came back late
                self._fail_late(job)
            else:
                unit.closed = True
        finally:
            try:  # noqa: SIM105 (a context manager costs more than all of this)
                current_unit.reset(token)
            except ValueError:  # it was left alone, and is thrown away in another context
                pass
            unit.duration_us = int((self.clock.monotonic() - started) * 1_000_000)
            if note is not None and not job.still_runs:
                self.strike_out(job)

    def strike_out(self, job: Job) -> None:
        """Its code does not run any more: it can't be what takes the process down."""
        if self.note is not None:
            self.note.end(job.noted)
            job.noted = 0

    @staticmethod
    def _fail_late(job: Job) -> None:
        job.error = TimeoutError(f"the hook ran longer than {job.limit_s:g} s")
        job.unit.fail("timeout", Failure("Timeout", str(job.error)))


T = TypeVar("T")
"""What a thread runs, a `Job` or an attempt at a task: it has `call` and `still_runs`."""


class HookThreads(Generic[T]):
    """Daemon threads for plain `def` functions; idle ones are used again, one that hangs is left alone.

    `freed` is called on the loop's thread when a thread that was abandoned has ended its function.
    """

    def __init__(self, freed: Callable[[T], None] = lambda job: None) -> None:
        self._idle: list[_HookThread] = []
        self._closed = False
        self.freed = freed

    async def run(self, job: T) -> Any:
        """Run the job's function in a thread, in a copy of this context."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[tuple[Any, BaseException | None]] = loop.create_future()
        work: Any = job
        context = contextvars.copy_context()
        thread = self._idle.pop() if self._idle else _HookThread()
        work.still_runs = True

        def ended(result: Any, error: BaseException | None) -> None:
            if self._closed:
                thread.close()
            else:
                self._idle.append(thread)
            work.still_runs = False
            if future.cancelled():
                self.freed(job)
            elif not future.done():
                future.set_result((result, error))  # a future would not carry every error as it is

        thread.submit(loop, lambda: context.run(work.call), ended)
        try:
            result, error = await future
        finally:
            future.cancel()
        if error is not None:
            raise error
        return result

    def close(self) -> None:
        """End the idle threads now, and the others as soon as their hooks have ended."""
        self._closed = True
        for thread in self._idle:
            thread.close()
        self._idle.clear()


Ended = Callable[[Any, "BaseException | None"], None]


class _HookThread:
    def __init__(self) -> None:
        self._work: queue.SimpleQueue[tuple[asyncio.AbstractEventLoop, Callable[[], Any], Ended] | None] = (
            queue.SimpleQueue()
        )
        threading.Thread(target=self._main, name="ael-hook", daemon=True).start()

    def submit(self, loop: asyncio.AbstractEventLoop, call: Callable[[], Any], ended: Ended) -> None:
        self._work.put((loop, call, ended))

    def close(self) -> None:
        self._work.put(None)

    def _main(self) -> None:
        while (work := self._work.get()) is not None:
            loop, call, ended = work
            result: Any = None
            error: BaseException | None = None
            try:
                result = call()
            except BaseException as raised:
                error = raised
            try:
                loop.call_soon_threadsafe(ended, result, error)
            except RuntimeError:  # the event loop is closed; nobody waits any more
                return
            del work, call, ended, result, error

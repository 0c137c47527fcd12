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
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from inspect import isawaitable
from typing import TYPE_CHECKING, Any

from ael_store.clock import Clock
from ael_store.model.state import State
from ael_store.model.unit import Failure, Unit
from ael_store.runtime.current import current_unit
from ael_store.runtime.journal import failure_of

if TYPE_CHECKING:
    from ael_store.runtime.delivery import Subscription
    from ael_store.runtime.outside import Request
    from ael_store.runtime.roster import AgentSlot

__all__ = ["HookThreads", "Job", "Workbench"]

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
    result: Any = None
    error: BaseException | None = None
    started: float = 0.0
    timed_out: bool = False
    aborted: bool = False
    detached: bool = False
    thread_busy: bool = False
    request: Request | None = None
    """The `transact` that waits for the result."""


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
        self.threads = HookThreads()
        self.background: dict[Job, asyncio.Task[None]] = {}
        self._finished_late = finished_late

    async def run(self, next_job: Callable[[], Job | None], settle: Callable[[Job], None]) -> None:
        """Run jobs until there are none; `settle` is called with each before the next begins."""
        while True:
            lane = _Lane()
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
                        return
                    continue
                if ran_s >= self.slow_after_s:
                    self._set_aside(lane, job)
                    return
                wait_s -= ran_s
                if job.limit_s:
                    wait_s = min(wait_s, job.limit_s - ran_s)
            await asyncio.wait({lane.task}, timeout=max(wait_s, 0.001))

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
            asyncio.get_running_loop().call_later(max(0.0, left_s), self._time_out, job)

    def _time_out(self, job: Job) -> None:
        task = self.background.get(job)
        if task is not None and not job.timed_out:
            job.timed_out = True
            task.cancel()

    def _end_in_background(self, job: Job) -> None:
        self.background.pop(job, None)
        self._finished_late(job)

    def abort(self) -> list[Job]:
        """Cancel everything in the background and return the jobs; what does not end is left alone."""
        jobs = list(self.background)
        for job, task in self.background.items():
            job.aborted = True
            task.cancel()
        return jobs

    # -- one hook --

    async def _execute(self, job: Job) -> None:
        unit = job.unit
        token = current_unit.set(unit)
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
            current_unit.reset(token)
            unit.duration_us = int((self.clock.monotonic() - started) * 1_000_000)

    @staticmethod
    def _fail_late(job: Job) -> None:
        job.error = TimeoutError(f"the hook ran longer than {job.limit_s:g} s")
        job.unit.fail("timeout", Failure("Timeout", str(job.error)))


class HookThreads:
    """Daemon threads for plain `def` hooks; idle ones are used again, one that hangs is left alone."""

    def __init__(self) -> None:
        self._idle: list[_HookThread] = []
        self._closed = False
        self.freed: Callable[[Job], None] = lambda job: None
        """Called on the loop's thread when a thread that was abandoned has ended its hook."""

    async def run(self, job: Job) -> Any:
        """Run the job's hook in a thread, in a copy of this context."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        context = contextvars.copy_context()
        thread = self._idle.pop() if self._idle else _HookThread()
        job.thread_busy = True

        def ended(result: Any, error: BaseException | None) -> None:
            if self._closed:
                thread.close()
            else:
                self._idle.append(thread)
            job.thread_busy = False
            if future.cancelled():
                self.freed(job)
            elif not future.done():
                if error is None:
                    future.set_result(result)
                elif isinstance(error, StopIteration):
                    future.set_exception(RuntimeError(f"the hook raised {error!r}"))
                else:
                    future.set_exception(error)

        thread.submit(loop, lambda: context.run(job.call), ended)
        try:
            return await future
        finally:
            future.cancel()

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

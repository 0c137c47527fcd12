"""Attempts at tasks: functions that run beside the loop, after the commit that says they do.

A coroutine runs as an asyncio task of the loop's event loop, so it shares clients with the hooks; a plain function
runs in a thread; `process=True` in a process of its own (`task_process.py`). An attempt has no context: what it
returns is written with the next commit, and only then anything is done with it.

One that is cancelled, or takes longer than its timeout, and does not end is left alone: its task goes on without it,
but it counts against `concurrency` for as long as it runs.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from decimal import Decimal
from inspect import isawaitable, iscoroutinefunction
from typing import TYPE_CHECKING, Any, Literal

from ael_store.errors import Fatal, InvalidValue, InvalidValueType, RetryAfter
from ael_store.model.duration import due_us
from ael_store.model.records import AttemptRecord, TaskRecord
from ael_store.model.task import Task
from ael_store.model.unit import Failure
from ael_store.model.values import Limits, encode
from ael_store.runtime.current import in_attempt
from ael_store.runtime.journal import failure_of
from ael_store.runtime.task_function import TaskFunction
from ael_store.runtime.tick import CANCEL_PATIENCE_S, HookThreads

if TYPE_CHECKING:
    from ael_store.runtime.task_process import Processes

__all__ = ["Attempt", "Attempts", "Ending", "Outcome", "Running"]

Outcome = Literal["done", "failed", "timeout", "postponed", "cancelled", "interrupted"]

NOTE_LENGTH = 200

log = logging.getLogger("ael_store.tasks")


class Attempt(Task):
    """What the function of a task gets first: its task, and how to tell how it is going. From any thread."""

    __slots__ = ("_cancelled", "_cost", "_lock", "_number", "_progress", "resolve")

    def __init__(self, record: TaskRecord, number: int = 1) -> None:
        super().__init__(record)
        self._number = number
        self._lock = threading.Lock()
        self._cancelled = threading.Event()
        self._cost: Decimal | None = None
        self._progress: tuple[float | None, str] | None = None
        self.resolve: Callable[[str], TaskFunction] | None = None
        """Finds another function as that of this task was found."""

    @property
    def attempt(self) -> int:
        """Which attempt this is, from 1; those that a crash or a stop cut off are counted."""
        return self._number

    @property
    def cancelled(self) -> bool:
        """True once it should end: it was cancelled, has taken too long, or the loop is to stop."""
        return self._cancelled.is_set()

    @property
    def cost_usd(self) -> float:
        """What this attempt, and those before it, said they cost."""
        return float(Decimal(self._record.cost_usd or 0) + (self._cost or 0))

    def progress(self, fraction: float | None, note: str = "") -> None:
        """Say how far it is, 0 to 1, and what it is doing; `ael tasks` shows it at once. Not stored."""
        if fraction is not None and (type(fraction) not in (int, float) or not 0 <= fraction <= 1):
            raise InvalidValue(f"progress is {fraction!r}, wanted is a number from 0 to 1, or None")
        self._progress = (fraction, str(note)[:NOTE_LENGTH])

    def cost(self, usd: float | str | Decimal) -> None:
        """Add to what this attempt costs, in USD; stored when it ends, whatever its outcome."""
        try:
            amount = Decimal(str(usd))
        except ArithmeticError:
            amount = Decimal(-1)
        if isinstance(usd, bool) or not amount.is_finite() or amount < 0:
            raise InvalidValue(f"cost is {usd!r}, wanted is an amount of USD, 0 or more")
        with self._lock:
            self._cost = amount + (self._cost or 0)


@dataclass(slots=True)
class Ending:
    """How an attempt ended."""

    outcome: Outcome
    result: str | None = None
    """What it returned, as JSON text."""
    failure: Failure | None = None
    is_final: bool = False
    """True where no further attempt can succeed."""
    retry_us: int | None = None
    """When to try again, as it said itself."""


@dataclass(slots=True, eq=False)
class Running:
    """An attempt that runs: its records, its function, and how it ended once it has."""

    task: TaskRecord
    record: AttemptRecord
    function: TaskFunction
    timeout_s: float
    reserved: Decimal
    handle: Attempt
    arguments: list[Any]
    work: asyncio.Task[None] | None = None
    timer: asyncio.TimerHandle | None = None
    ending: Ending | None = None
    timed_out: bool = False
    is_cancelled: bool = False
    """Somebody does not want the task any more."""
    is_interrupted: bool = False
    """The loop ends."""
    call: Callable[[], Any] = field(default=lambda: None)
    still_runs: bool = False
    """Its code runs in a thread, or in a coroutine that was left alone."""
    is_settled: bool = False
    """Its end was taken up."""
    is_free: bool = False
    """It takes no room of its limit any more."""


class Attempts:
    """The attempts that run. `ended` gets each when it has ended, `freed` those whose code ended only after that."""

    def __init__(
        self,
        limits: Limits,
        now_us: Callable[[], int],
        fakes: Mapping[str, Any],
        ended: Callable[[Running], None],
        freed: Callable[[Running], None],
    ) -> None:
        self.limits = limits
        self.now_us = now_us
        self.fakes = fakes
        """Answers in place of functions, by name: for tests."""
        self.running: dict[int, Running] = {}
        """By task."""
        self.left_alone: set[Running] = set()
        self._ended = ended
        self._freed = freed
        self._threads: HookThreads[Running] = HookThreads(freed)
        self._processes: Processes | None = None

    def has_fake(self, name: str) -> bool:
        """True where a test answers in place of a function, under its name or what stands behind the colon."""
        return name in self.fakes or name.rpartition(":")[2] in self.fakes

    def start(self, running: Running) -> None:
        """Begin an attempt whose start is committed."""
        self.running[running.task.id] = running
        loop = asyncio.get_running_loop()
        context = contextvars.Context()
        context.run(in_attempt.set, True)
        name = f"ael-task {running.task.id} {running.task.name}"
        running.work = loop.create_task(self._work(running), name=name, context=context)
        if running.timeout_s:
            running.timer = loop.call_later(running.timeout_s, self._time_out, running)

    def cancel(self, running: Running) -> None:
        """Have an attempt end because its task is not wanted any more."""
        running.is_cancelled = True
        self._end(running)

    def interrupt(self) -> list[Running]:
        """Have everything end, because the loop does; returns what ran."""
        found = list(self.running.values())
        for running in found:
            running.is_interrupted = True
            self._end(running)
        return found

    async def close(self) -> None:
        """End threads and processes, as far as they end."""
        works = [running.work for running in (*self.interrupt(), *self.left_alone) if running.work is not None]
        if works:
            await asyncio.wait(works, timeout=CANCEL_PATIENCE_S)
        for work in works:
            if not work.done():  # `asyncio.run` would wait for it for ever
                asyncio._unregister_task(work)
                work._log_destroy_pending = False  # type: ignore[attr-defined]
        self._threads.close()
        if self._processes is not None:
            await self._processes.close()

    # -- one attempt --

    async def _work(self, running: Running) -> None:
        ending: Ending
        try:
            result = await self._result(running)
            ending = Ending("done", self._encoded(running, result))
        except asyncio.CancelledError as error:
            ending = Ending("failed", failure=failure_of(error))  # it has cancelled itself, unless …
        except RetryAfter as error:
            ending = self._postponed(error)
        except Fatal as error:
            ending = Ending("failed", failure=_failure_of(error), is_final=True)
        except BaseException as error:
            ending = Ending("failed", failure=_failure_of(error))
        if running.timed_out:
            why = f"it ran longer than {running.timeout_s:g} s"
            ending = Ending("timeout", failure=Failure("Timeout", why))
        elif ending.outcome != "done" and running.is_cancelled:
            ending = Ending("cancelled")
        elif ending.outcome != "done" and running.is_interrupted:
            ending = Ending("interrupted")
        self._finish(running, ending)

    async def _result(self, running: Running) -> Any:
        handle, function = running.handle, running.function
        if self.has_fake(name := running.task.name):
            return await self._of_fake(self.fakes.get(name, self.fakes.get(name.rpartition(":")[2])), running)
        if handle.attempt > 1 and function.reconcile is not None:
            happened = await self._call(running, function.reconcile, handle.key)
            if happened is not None and happened is not False:
                return happened
        if function.policy.process:
            return await self._in_process(function, handle, running.arguments)
        return await self._call(running, function.call, handle, *running.arguments)

    async def _call(self, running: Running, function: Callable[..., Any], *arguments: Any) -> Any:
        if iscoroutinefunction(function):
            return await function(*arguments)
        running.call = lambda: function(*arguments)
        result = await self._threads.run(running)
        return await result if isawaitable(result) else result

    async def _in_process(self, function: TaskFunction, handle: Attempt, arguments: list[Any]) -> Any:
        from ael_store.runtime.task_process import Processes  # brings multiprocessing with it

        assert function.path is not None
        if self._processes is None:
            self._processes = Processes()
        return await self._processes.run(function.path, handle, arguments)

    @staticmethod
    async def _of_fake(fake: Any, running: Running) -> Any:
        result = fake(running.handle, *running.arguments) if callable(fake) else fake
        return await result if isawaitable(result) else result

    def _encoded(self, running: Running, result: Any) -> str:
        try:
            return encode(result, f"the result of task {running.task.name}", self.limits)
        except (InvalidValue, InvalidValueType) as error:  # another attempt would return the same
            raise Fatal(f"{error}; return what is JSON") from None

    def _postponed(self, error: RetryAfter) -> Ending:
        now_us = self.now_us()
        try:
            return Ending("postponed", failure=_failure_of(error), retry_us=due_us(error.after, now_us))
        except (InvalidValue, InvalidValueType) as wrong:
            return Ending("failed", failure=failure_of(wrong))

    def _finish(self, running: Running, ending: Ending) -> None:
        if running.timer is not None:
            running.timer.cancel()
        if running in self.left_alone:  # it was given up, and ends now
            self.left_alone.discard(running)
            running.still_runs = False
            self._freed(running)
            return
        running.ending = ending
        self.running.pop(running.task.id, None)
        self._ended(running)

    # -- one that should end --

    def _time_out(self, running: Running) -> None:
        if running.ending is None:
            running.timed_out = True
            self._end(running)

    def _end(self, running: Running) -> None:
        running.handle._cancelled.set()
        if running.work is not None and running.ending is None:
            running.work.cancel()
            asyncio.get_running_loop().call_later(CANCEL_PATIENCE_S, self._leave_alone, running)

    def _leave_alone(self, running: Running) -> None:
        """It has swallowed its cancellation: its task goes on without it."""
        if running.ending is not None:
            return
        outcome: Outcome = "timeout" if running.timed_out else "cancelled" if running.is_cancelled else "interrupted"
        task = running.task
        log.warning("task %d (%s) does not end although it should: it is left alone", task.id, task.name)
        failure = Failure("Timeout", f"it ran longer than {running.timeout_s:g} s") if running.timed_out else None
        running.still_runs = True
        self._finish(running, Ending(outcome, failure=failure))
        self.left_alone.add(running)


def _failure_of(error: BaseException) -> Failure:
    """Return what an attempt raised; of one in a process what was raised there, of our own the plain name."""
    told = getattr(error, "failure", None)
    if isinstance(told, Failure):
        return told
    failure = failure_of(error)
    return replace(failure, type=type(error).__name__) if isinstance(error, Fatal | RetryAfter) else failure

"""Notices when the event loop itself stands still, names who holds it, and ends the process if it stays so.

A hook that waits is the workbench's to watch; but a blocking call or an endless loop in an `async def` holds the
thread in which everything runs, the timeouts too. So a thread of its own asks the event loop to answer, every few
seconds, and waits. While there is no answer it reports, each time twice as long after the last, and at the limit it
ends the process with `os._exit`: what is committed is whole, the service manager starts it again, and the note of
what runs tells the next start who it was.

Time in which the whole process stood (SIGSTOP, a suspended machine, one that is overloaded) does not count: the
watchdog then slept too long itself. Only where the process was busy meanwhile does it: native code that keeps the
interpreter's lock stops this thread too, so it is told of afterwards. Nothing in the process can end such a hang; a
watchdog of the service manager can.

Log handlers may be what the loop hangs in, so every report has a thread of its own and is given up after a while.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import PurePath
from types import FrameType

from ael_store.runtime.current import current_unit
from ael_store.runtime.tick import Job, Workbench

__all__ = ["STALLED", "Watchdog"]

STALLED = 70
"""Exit code of a process whose event loop stood still for too long."""

LONGEST_PERIOD_S = 2.5
LATE_S = 0.5
"""How much later than asked a thread of a running process wakes at most."""
REPORT_PATIENCE_S = 2.0
DEBUGGERS = frozenset(("pdb", "bdb", "pydevd", "_pydevd_bundle", "debugpy"))
FRAMES = 40
_OURS = (Workbench._execute.__code__, asyncio.Handle._run.__code__)
"""Code that calls hooks and their tasks: what is outside of it tells nothing."""

log = logging.getLogger("ael_store.watchdog")


class Watchdog:
    """Watches the event loop in which it is started, from a daemon thread. With both limits 0 it does nothing."""

    def __init__(
        self, bench: Workbench, warn_s: float, limit_s: float, *, end: Callable[[int], object] = os._exit
    ) -> None:
        self.bench = bench
        self.warn_s = warn_s
        self.limit_s = limit_s
        self._end = end
        self._over = threading.Event()
        self._loop: asyncio.AbstractEventLoop
        self._thread_id = 0

    @property
    def period_s(self) -> float:
        """How often the event loop is asked, and looked at while it does not answer."""
        return min(LONGEST_PERIOD_S, *(limit / 2 for limit in (self.warn_s, self.limit_s) if limit))

    def start(self) -> None:
        """Begin to watch the running event loop and the thread that it runs in."""
        if self.warn_s or self.limit_s:
            self._loop = asyncio.get_running_loop()
            self._thread_id = threading.get_ident()
            threading.Thread(target=self._main, name="ael-watchdog", daemon=True).start()

    def stop(self) -> None:
        """End the watch; returns at once."""
        self._over.set()

    # -- in its own thread --

    def _main(self) -> None:
        while not self._over.wait(self.period_s):
            answered = threading.Event()
            try:
                self._loop.call_soon_threadsafe(answered.set)
            except RuntimeError:  # the event loop is closed
                return
            self._await_answer(answered)

    def _await_answer(self, answered: threading.Event) -> None:
        still_s, report_at, where = 0.0, self.warn_s, ""
        while not self._over.is_set():
            began, busy = time.monotonic(), time.process_time()
            done = answered.wait(self.period_s)
            passed_s = time.monotonic() - began
            late = passed_s > self.period_s + LATE_S
            if late:  # the process did not run, or native code let no other thread run
                passed_s = min(passed_s, max(self.period_s, time.process_time() - busy))
            still_s += passed_s
            if done:
                if where or (self.warn_s and still_s >= self.warn_s):
                    self._tell(_report_over, still_s, where)
                return
            if late or not self._loop.is_running() or self._is_debugged():
                continue
            if self.limit_s and still_s >= self.limit_s:
                self._give_up(still_s)
            elif self.warn_s and still_s >= report_at:
                report_at = 2 * still_s
                where = self._where()
                self._tell(self._report, still_s)

    def _report(self, still_s: float) -> None:
        stack, where = self._stack(), self._where()
        at = f", at {_place(stack[-1])}" if stack else ""
        limit = f"; at {self.limit_s:g} s the process ends" if self.limit_s else ""
        log.error(
            "the event loop stands still for %.1f s%s%s: no agent runs meanwhile%s; "
            "write what blocks as a plain `def` hook, which runs in a thread",
            still_s,
            where,
            at,
            limit,
            extra={"stack": "".join(traceback.format_list(stack)).rstrip()},
        )

    def _give_up(self, still_s: float) -> None:
        job = self._running_job()
        note = self.bench.note
        if note is not None:
            note.convict(0 if job is None else job.noted, f"the event loop stood still for {still_s:.0f} s")
        self._tell(self._report_end, still_s)
        self._end(STALLED)

    def _report_end(self, still_s: float) -> None:
        stack, where = self._stack(), self._where()
        at = f", at {_place(stack[-1])}" if stack else ""
        log.critical(
            "the event loop stood still for %.1f s%s%s: the process ends with exit code %d; "
            "what is committed stays, the next start goes on from there",
            still_s,
            where,
            at,
            STALLED,
            extra={"stack": "".join(traceback.format_list(stack)).rstrip()},
        )
        for handler in logging.getLogger().handlers:
            handler.flush()
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()

    @staticmethod
    def _tell(report: Callable[..., None], *arguments: object) -> None:
        """Have a report written, and go on without it where that blocks."""
        teller = threading.Thread(target=report, args=arguments, name="ael-watchdog-report", daemon=True)
        teller.start()
        teller.join(REPORT_PATIENCE_S)

    # -- looking at the loop's thread --

    def _frames(self) -> Iterator[FrameType]:
        """Yield the frames of the loop's thread, innermost first."""
        frame = sys._current_frames().get(self._thread_id)
        while frame is not None:
            yield frame
            frame = frame.f_back

    def _stack(self) -> traceback.StackSummary:
        """Return the stack of the loop's thread from the hook inwards, without values of variables."""
        found: list[tuple[FrameType, int]] = []
        for frame in self._frames():
            if frame.f_code in _OURS or len(found) == FRAMES:
                break
            found.append((frame, frame.f_lineno))
        return traceback.StackSummary.extract(reversed(found), limit=FRAMES)

    def _running_job(self) -> Job | None:
        """Return the job whose code holds the loop's thread; None where it is no hook's."""
        for frame in self._frames():
            if frame.f_code is Workbench._execute.__code__:
                job = frame.f_locals.get("job")
                return job if isinstance(job, Job) else None
        return self._job_of_task()

    def _job_of_task(self) -> Job | None:
        """Return the job that made the asyncio task which runs now, as a hook does with `asyncio.gather`."""
        task = asyncio.current_task(self._loop)
        jobs = self.bench.running()
        if task is None or task.get_name().startswith("ael-"):
            return None
        if not hasattr(task, "get_context"):  # before Python 3.12 it can't be told whose it is, unless there is but one
            return jobs[0] if len(jobs) == 1 else None
        unit = task.get_context().get(current_unit)
        return next((job for job in jobs if job.unit is unit), None)

    def _where(self) -> str:
        job = self._running_job()
        if job is not None:
            return f" in {job}"
        running = asyncio.current_task(self._loop)
        name = "" if running is None else running.get_name()
        return f" in task {name.removeprefix('ael-task ')}" if name.startswith("ael-task ") else " outside of hooks"

    def _is_debugged(self) -> bool:
        """True where somebody looks at the process step by step; a standstill is what they want."""
        monitoring = getattr(sys, "monitoring", None)  # Python 3.12
        if monitoring is not None and monitoring.get_tool(monitoring.DEBUGGER_ID) is not None:
            return True
        if sys.gettrace() is not None:
            return True
        return any(
            frame.f_trace is not None or str(frame.f_globals.get("__name__")).partition(".")[0] in DEBUGGERS
            for frame in self._frames()
        )


def _report_over(still_s: float, where: str) -> None:
    log.warning("the event loop stood still for %.1f s%s; it goes on", still_s, where)


def _place(frame: traceback.FrameSummary) -> str:
    return f"{PurePath(frame.filename).name}:{frame.lineno} in {frame.name}"

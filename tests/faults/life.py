"""A life of the crash agents in a process of its own: forked, watched through a shared page, and killed.

A fork costs a few milliseconds, a fresh Python that imports ael_store half a second; so the process that forks has
imported everything, has no threads and no database open, and ends after one series (`python -m tests.faults.kills`).
"""

from __future__ import annotations

import asyncio
import faulthandler
import mmap
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import Any

from ael_store import AELController
from ael_store.errors import LoopNotRunning
from ael_store.runtime.lifecycle import Lifecycle
from ael_store.runtime.run import Run
from ael_store.runtime.tick import Workbench
from ael_store.store import checkpoint, sqlite
from ael_store.store.store import Store
from ael_store.store.writer import Writer
from tests.faults.agents import controller_on, order

__all__ = ["HANG_S", "STEPS", "Life", "Notes", "live", "note_steps", "shorten_log"]

HANG_S = 60.0
"""After so long without what it should do, a life hangs."""

STEPS = ("forked", "opening", "starting", "running", "ending", "closing")
"""How far a life has come."""


class _Number:
    """A whole number in the shared page."""

    def __init__(self, place: int) -> None:
        self.place = place

    def __get__(self, notes: Notes, owner: type) -> int:
        return notes.cells[self.place]

    def __set__(self, notes: Notes, value: int) -> None:
        notes.cells[self.place] = value


class Notes:
    """What a life notes about itself, in memory that outlives it."""

    step = _Number(0)
    """Place in STEPS."""
    committing = _Number(1)
    """1 while a transaction is being written."""
    units = _Number(2)
    """How many hooks run."""
    iterations = _Number(3)
    """Iterations of this life."""
    commit_id = _Number(4)
    """The last commit that the store reported as durable."""
    orders = _Number(5)
    """The last number that `transact` returned."""
    crossings = _Number(6)
    """For `points.py`: how often the point was crossed."""

    def __init__(self) -> None:
        self._page = mmap.mmap(-1, mmap.PAGESIZE)
        self.cells = memoryview(self._page).cast("Q")

    def clear(self) -> None:
        """Begin a new life; what was promised before is remembered."""
        self.step = self.committing = self.units = self.iterations = self.crossings = 0

    @property
    def where(self) -> str:
        """In words, what a life was doing."""
        if self.committing:
            return "inside a commit"
        if self.units:
            return "inside a unit"
        step = STEPS[self.step]
        return "before the first commit" if step in ("forked", "opening") else step


class Life:
    """A forked process; it ends with its parent, and does not outlive the `with` block."""

    def __init__(self, task: Callable[[], None], log: Path) -> None:
        self.log = log
        self.status: int | None = None
        """How it ended, as `waitpid` says; None while it lasts."""
        reading, self._held = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        self.began = time.monotonic()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._held)
            _become(task, log, reading)
        os.close(reading)

    def __enter__(self) -> Life:
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()
        os.close(self._held)

    def is_over(self) -> bool:
        """True once the process has ended."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = status
        return self.status is not None

    def kill(self) -> None:
        """SIGKILL; the process is gone when this returns."""
        if not self.is_over():
            os.kill(self.pid, signal.SIGKILL)
            self.status = os.waitpid(self.pid, 0)[1]

    @property
    def was_killed(self) -> bool:
        return self.status is not None and os.WIFSIGNALED(self.status) and os.WTERMSIG(self.status) == signal.SIGKILL

    def wait_for(self, condition: Callable[[], bool], what: str) -> str | None:
        """Wait until it is true or the life is over; returns what is wrong where neither comes."""
        give_up = time.monotonic() + HANG_S
        while not (condition() or self.is_over()):
            if time.monotonic() > give_up:
                os.kill(self.pid, signal.SIGUSR1)  # its stacks go to the log
                time.sleep(0.5)
                return f"wrong: no {what} in {HANG_S:.0f} s, see the stacks in {self.log}"
            time.sleep(0.0003)
        return None


def _become(task: Callable[[], None], log: Path, parent: int) -> None:
    """Turn the forked process into a life; never returns."""
    code = 70
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(output, 1)
        os.dup2(output, 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        faulthandler.enable(file=2)
        faulthandler.register(signal.SIGUSR1, file=2)
        threading.Thread(target=_end_with_parent, args=(parent,), daemon=True).start()
        task()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(OSError):
            sys.stderr.flush()
        os._exit(code)


def _end_with_parent(parent: int) -> None:
    os.read(parent, 1)
    os._exit(71)


def live(path: Path, notes: Notes, *, iterations: int | None = None, **settings: Any) -> None:
    """Run the crash agents, with a customer who orders by `transact`, for so many iterations or for ever."""
    asyncio.run(_live(path, notes, iterations, settings))


async def _live(path: Path, notes: Notes, iterations: int | None, settings: dict[str, Any]) -> None:
    controller = controller_on(path, **settings)
    customers: list[asyncio.Task[None]] = []

    def observe(_summary: object) -> None:
        notes.iterations += 1
        if not customers:
            customers.append(asyncio.create_task(_order(controller, notes)))

    controller.observe(observe)
    if iterations is None:
        await controller.start()
    else:
        await controller.run(iterations)
    for customer in customers:
        await customer


async def _order(controller: AELController, notes: Notes) -> None:
    """Order again and again; what came back is committed."""
    with suppress(LoopNotRunning):
        while controller.running:
            notes.orders = await controller.transact(order)


def shorten_log(pages: int) -> None:
    """Have this process move the write-ahead log into the database each time it has grown by so many pages."""
    for module in (checkpoint, sqlite):
        vars(module)["CHECKPOINT_PAGES"] = pages


def note_steps(notes: Notes) -> None:
    """Have this process note what it is doing; for a life, before its loop is made."""

    def during(owner: type, name: str, enter: Callable[[], None], leave: Callable[[], None]) -> None:
        original = getattr(owner, name)

        if asyncio.iscoroutinefunction(original):

            @wraps(original)
            async def noting(*arguments: Any, **options: Any) -> Any:
                enter()
                try:
                    return await original(*arguments, **options)
                finally:
                    leave()
        else:

            @wraps(original)
            def noting(*arguments: Any, **options: Any) -> Any:
                enter()
                try:
                    return original(*arguments, **options)
                finally:
                    leave()

        setattr(owner, name, noting)

    def step(name: str) -> Callable[[], None]:
        return lambda: setattr(notes, "step", STEPS.index(name))

    def nothing() -> None:
        pass

    def add(cell: str, by: int) -> Callable[[], None]:
        return lambda: setattr(notes, cell, getattr(notes, cell) + by)

    during(Store, "open", step("opening"), nothing)
    during(Lifecycle, "begin", step("starting"), nothing)
    during(Lifecycle, "main", step("running"), nothing)
    during(Lifecycle, "end", step("ending"), nothing)
    during(Lifecycle, "close", step("closing"), nothing)
    during(Writer, "write", add("committing", 1), add("committing", -1))
    during(Workbench, "_execute", add("units", 1), add("units", -1))
    _note_commits(notes)


def _note_commits(notes: Notes) -> None:
    """Note which commits the loop believes to be durable."""
    original: Callable[..., Awaitable[None]] = Run.commit

    async def commit(self: Run, *arguments: Any, **options: Any) -> None:
        await original(self, *arguments, **options)
        notes.commit_id = self.journal.commit_id

    Run.commit = commit  # type: ignore[method-assign]

"""Processes under the shim that have imported everything already, and run `ael` in forks of themselves.

    with Crew("tests.faults.calls", workers=2, folder=tmp_path) as crew:
        for answer in crew.map(tasks): ...

A worker is `python -m tests.faults.workers MODULE CONTROL`: it hands each task, a line of JSON, to the function
`handle(worker, task)` of that module, and prints what that returns. A fork begins where a freshly started `ael` is
after its imports: with no thread, no open file and no event loop.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import mmap
import os
import queue
import random
import select
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

from tests.faults.shim import Shim

__all__ = ["AGENTS", "COMMITTING", "REPORTS", "Crew", "Ended", "Worker", "memory", "often_move_the_log"]

ROOT = Path(__file__).parents[2]
AGENTS = Path(__file__).with_name("agents.py")

HANG_S = 60.0
"""A job that takes longer hangs; the usual is a tenth of a second."""

REPORTS = "reports"
"""A file that is no part of the database: what was reported as committed, among the calls of the log."""

LOG_PAGES = 20

PAUSE_S = 0.01
"""How long a job waits for room on the disk before it tries again; more than a second without haste."""

PATIENCE = 3
"""So often a job finds the disk full in a commit before it is told to stop."""

COMMITTING, BEGINNING_OR_ENDING = 1, 2
"""The phases of calls made inside a commit of the loop: of an iteration, and of another kind."""


def memory() -> Path | None:
    """Return a folder in memory, for what would only wear a disk; None where there is none."""
    place = Path("/dev/shm")
    return place if place.is_dir() and os.access(place, os.W_OK) else None


def often_move_the_log() -> None:
    """Have this process move its log into the database after a few commits instead of a thousand."""
    from ael_store.store import checkpoint, sqlite

    for module in (checkpoint, sqlite):
        setattr(module, "CHECKPOINT_PAGES", LOG_PAGES)  # noqa: B010


class _Notes(ctypes.Structure):
    """What a job tells before it dies, in memory that outlives it."""

    _fields_ = (
        ("commit_id", ctypes.c_int64),
        ("iteration", ctypes.c_int64),
        ("full", ctypes.c_int64),
        ("failed", ctypes.c_int64),
        ("again", ctypes.c_int64),
    )


@dataclass(frozen=True, slots=True)
class Ended:
    """How a job ended, and what it had told until then."""

    status: int | None
    """Its exit code, or the signal that killed it as a negative number; None where it hung."""
    stdout: str
    stderr: str
    commit_id: int
    """The last commit that had returned."""
    iteration: int
    """The last iteration whose commit had returned."""
    full: int
    """Commits that found the disk full."""
    again: int
    """Commits that were begun after one had failed in another way."""


class Worker:
    """The inside of a worker process."""

    def __init__(self, shim: Shim, folder: Path) -> None:
        self.shim = shim
        self.folder = folder
        """For what this worker makes; its jobs work in folders below."""
        self._notes_map = mmap.mmap(-1, ctypes.sizeof(_Notes))
        self._notes = _Notes.from_buffer(self._notes_map)
        self._reports: int | None = None

    def fork(
        self,
        folder: Path,
        arguments: Sequence[str],
        *,
        reports: bool = False,
        meddle: Callable[[], None] | None = None,
    ) -> Ended:
        """Run `ael` with these arguments in a fork, and wait for its end.

        With `reports` it appends the number of each commit that has returned to `folder/reports`, and `done` in
        the end, for the log of the shim. `meddle` is called in the fork first.
        """
        ctypes.memset(ctypes.addressof(self._notes), 0, ctypes.sizeof(_Notes))
        out, err = self.folder / "stdout", self.folder / "stderr"
        out.write_bytes(b"")
        err.write_bytes(b"")
        pid = os.fork()
        if pid == 0:
            self._be_job(folder, arguments, out, err, reports, meddle)
        status = self._wait(pid)
        notes = self._notes
        return Ended(
            status,
            out.read_text(errors="replace"),
            err.read_text(errors="replace"),
            notes.commit_id,
            notes.iteration,
            notes.full,
            notes.again,
        )

    def _wait(self, pid: int) -> int | None:
        descriptor = os.pidfd_open(pid)
        try:
            poll = select.poll()
            poll.register(descriptor, select.POLLIN)
            hangs = not poll.poll(1000 * HANG_S)
            if hangs:
                os.kill(pid, signal.SIGKILL)
        finally:
            os.close(descriptor)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        return None if hangs else status

    def _be_job(
        self,
        folder: Path,
        arguments: Sequence[str],
        out: Path,
        err: Path,
        reports: bool,
        meddle: Callable[[], None] | None,
    ) -> NoReturn:
        code = 99
        try:
            for path, number in ((out, 1), (err, 2)):
                descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
                os.dup2(descriptor, number)
                os.close(descriptor)
            os.chdir(folder)
            if meddle is not None:
                meddle()
            if reports:
                self._reports = os.open(folder / REPORTS, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            self._watch_commits()
            from ael_store.cli.main import main

            code = main(arguments)
            if reports and code == 0:
                self._report("done")
            sys.stdout.flush()
            threading._shutdown()  # type: ignore[attr-defined]  # a thread that does not end keeps `ael` from ending
        finally:
            os._exit(code)

    def _report(self, line: str) -> None:
        if self._reports is not None:
            os.write(self._reports, f"{line}\n".encode())

    def _watch_commits(self) -> None:
        """Note what each commit of this process comes to, and hurry where it waits for room on the disk."""
        from ael_store.clock import SystemClock
        from ael_store.errors import DiskFull
        from ael_store.runtime import run
        from ael_store.store.store import Store

        notes, shim = self._notes, self.shim
        real_commit: Any = Store.commit
        source = random.Random(7)

        async def commit(store: Store, commit: Any, **more: Any) -> None:
            if notes.failed:
                notes.again += 1
            shim.phase = COMMITTING if commit.kind == "iteration" else BEGINNING_OR_ENDING
            try:
                await real_commit(store, commit, **more)
            except DiskFull:
                notes.full += 1
                if notes.full == PATIENCE:
                    os.kill(os.getpid(), signal.SIGTERM)
                raise
            except BaseException:
                notes.failed += 1
                raise
            finally:
                shim.phase = 0
            notes.iteration = max((record.id for record in commit.iterations), default=notes.iteration)
            notes.commit_id = commit.id
            self._report(str(commit.id))

        def seed(clock: SystemClock) -> int:
            return source.getrandbits(31)

        replacements: list[tuple[Any, str, Any]] = [
            (Store, "commit", commit),
            (SystemClock, "seed", seed),
            (run, "FIRST_PAUSE_S", PAUSE_S),
            (run, "LONGEST_PAUSE_S", PAUSE_S),
        ]
        for owner, name, replacement in replacements:
            setattr(owner, name, replacement)


def _warm_up(worker: Worker) -> None:
    """Import all that a run imports, so that its forks need not; freeze it, so that they share its memory."""
    from ael_store.store import store
    from ael_store.store.writer import Writer

    listing, place = worker.folder / "modules", worker.folder / "warm-up"
    place.mkdir()

    def list_modules() -> None:
        from ael_store.cli import main as module

        real = module.main

        def main(argv: Sequence[str] | None = None) -> int:
            code = real(argv)
            listing.write_text("\n".join(sys.modules))
            return code

        module.main = main

    arguments = ["run", str(AGENTS), "--tick-rate", "0", "--quiet", "--iterations", "1"]
    path = str(place / "ael.db")
    for command in (arguments, ["db", "upgrade"], ["db", "downgrade", "0001", "--no-backup", "--yes"]):
        ended = worker.fork(place, ["--db", path, *command], meddle=list_modules)
        assert ended.status == 0, ended.stderr
        for name in listing.read_text().split():
            if name != AGENTS.stem:
                with contextlib.suppress(ImportError):
                    importlib.import_module(name)
    importlib.import_module("tests.migrations.fill")
    writer = Writer()  # its statements are compiled once
    setattr(store, "Writer", lambda: writer)  # noqa: B010
    gc.collect()
    gc.freeze()


def _serve(module: str, control: Path) -> None:
    """Answer tasks until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    handle = importlib.import_module(module).handle
    worker = Worker(Shim(control), control.parent)
    _warm_up(worker)
    for line in sys.stdin:
        answers.write(json.dumps(handle(worker, json.loads(line))) + "\n")
        answers.flush()


class Crew:
    """Several workers, from outside. They end with the block."""

    def __init__(self, module: str, *, workers: int, folder: Path) -> None:
        self._stack = contextlib.ExitStack()
        self._processes: list[subprocess.Popen[str]] = []
        place = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="ael-crew-", dir=memory() or folder)))
        environment = {name: value for name, value in os.environ.items() if not name.startswith("AEL_")}
        for number in range(workers):
            home = place / str(number)
            home.mkdir()
            shim = Shim(home / "control")
            self._processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "tests.faults.workers", module, str(shim.control)],
                    cwd=ROOT,
                    env={**environment, **settings(), **shim.environment(), "TMPDIR": str(home)},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _t: TracebackType | None
    ) -> None:
        for process in self._processes:
            assert process.stdin is not None and process.stdout is not None
            with contextlib.suppress(OSError):
                process.stdin.close()
            try:
                process.wait(HANG_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()
        self._stack.close()

    def map(self, tasks: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Hand out tasks in order, and yield the answers as they come."""
        waiting, lock = iter(tasks), threading.Lock()
        answers: queue.Queue[dict[str, Any] | Exception | None] = queue.Queue()
        stopped = threading.Event()

        def feed(process: subprocess.Popen[str]) -> None:
            assert process.stdin is not None and process.stdout is not None
            try:
                while not stopped.is_set():
                    with lock:
                        task = next(waiting, None)
                    if task is None:
                        break
                    process.stdin.write(json.dumps(task) + "\n")
                    process.stdin.flush()
                    line = process.stdout.readline()
                    if not line:
                        raise RuntimeError(f"a worker ended with {process.wait()} at {task}")
                    answers.put(json.loads(line))
            except Exception as error:
                answers.put(error)
            finally:
                answers.put(None)

        threads = [threading.Thread(target=feed, args=(process,)) for process in self._processes]
        for thread in threads:
            thread.start()
        try:
            for _ in threads:
                while (answer := answers.get()) is not None:
                    if isinstance(answer, Exception):
                        raise answer
                    yield answer
        finally:
            stopped.set()
            for thread in threads:
                thread.join()


def settings() -> dict[str, str]:
    """Return the variables under which the crash agents may be killed as often as one likes."""
    from tests.faults.agents import crash_settings

    return {f"AEL_{name.upper()}": str(value) for name, value in crash_settings().items()}


if __name__ == "__main__":
    _serve(sys.argv[1], Path(sys.argv[2]))

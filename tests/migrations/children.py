"""Child processes for tests: forked, so that they begin at once, and able to die at a given statement."""

from __future__ import annotations

import os
import pickle
import signal
import sqlite3
from collections.abc import Callable
from typing import Any

from ael_store.errors import AelError

NOBODY = 65534


def run_in_child(work: Callable[[], object], *, unprivileged: bool = False) -> object:
    """Return what `work` returns in a child process, or the AelError that it raises there."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        _be_child(work, writing, unprivileged)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        raw = pipe.read()
    os.waitpid(pid, 0)
    result = pickle.loads(raw)
    if isinstance(result, BaseException) and not isinstance(result, AelError):
        raise result
    return result


def run_together(work: Callable[[], object], processes: int) -> list[int]:
    """Run `work` in several child processes that begin at the same moment; return their exit statuses."""
    waiting, opening = os.pipe()
    pids = []
    for _ in range(processes):
        pid = os.fork()
        if pid == 0:
            os.close(opening)
            os.read(waiting, 1)
            _be_child(work, os.open(os.devnull, os.O_WRONLY), False)
        pids.append(pid)
    os.close(waiting)
    os.close(opening)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def killed_at(statement: str, work: Callable[[], object]) -> None:
    """Run `work` in a child process that is killed when SQLite begins the first statement starting so.

    The child's page cache is so small that pages of its open transaction are on the disk already.
    """
    pid = os.fork()
    if pid == 0:
        _die_at(statement)
        _be_child(work, os.open(os.devnull, os.O_WRONLY), False)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status == -signal.SIGKILL, f"ended with {status}, not at {statement!r}"


def _be_child(work: Callable[[], object], writing: int, unprivileged: bool) -> None:
    status = 1
    try:
        result: object
        try:
            if unprivileged and os.geteuid() == 0:
                os.setgroups([])
                os.setgid(NOBODY)
                os.setuid(NOBODY)
            result = work()
            status = 0
        except BaseException as error:
            error.__cause__ = error.__context__ = None
            result = error.with_traceback(None)
        with os.fdopen(writing, "wb") as pipe:
            pickle.dump(result, pipe)
    finally:
        os._exit(status)


def _die_at(statement: str) -> None:
    real = sqlite3.connect

    def trace(text: str) -> None:
        if text.lstrip().startswith(statement):
            os.kill(os.getpid(), signal.SIGKILL)

    def connect(*args: Any, **options: Any) -> sqlite3.Connection:
        connection: sqlite3.Connection = real(*args, **options)
        connection.execute("PRAGMA cache_size = 1")
        connection.set_trace_callback(trace)
        return connection

    sqlite3.connect = connect  # type: ignore[assignment]

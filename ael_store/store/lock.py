"""The lock of a database: one owner at a time, freed by the kernel when its process ends.

The lock is an exclusive `flock` on a file of its own beside the database (`ael.db.lock`), because descriptors of
the database itself belong to SQLite. Its content tells who holds it and which socket takes commands; the content
is advice, the lock is the truth. The file stays when the owner ends, so that nobody locks a deleted one.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from ael_store.clock import iso
from ael_store.errors import DatabaseNotUsable, OwnedElsewhere

try:
    import fcntl
except ImportError:
    raise ImportError(
        "ael_store runs on Linux and macOS; this platform has no flock, which guards its databases"
    ) from None

__all__ = ["LOOP", "DatabaseLock", "Holder", "current_holder", "lock_path"]

LOOP = "loop"
"""What an owner calls itself that stays."""


@dataclass(frozen=True, slots=True)
class Holder:
    """Who owns a database."""

    pid: int
    host: str
    since_us: int
    what: str
    """`loop`, or the command that holds the lock for a moment."""
    socket: str | None = None
    """Path of the socket that takes commands; None where there is none."""

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.host} ({self.what}) since {iso(self.since_us)}"


def lock_path(database: Path) -> Path:
    """Return the path of the lock file of a database."""
    return database.with_name(database.name + ".lock")


class DatabaseLock:
    """The exclusive right to write a database; `acquire` before anything else, `release` last."""

    def __init__(self, database: Path) -> None:
        self.database = database
        self.path = lock_path(database)
        self._descriptor: int | None = None

    def acquire(self, what: str, wait_s: float = 0.0) -> None:
        """Take the lock; wait up to `wait_s` seconds for a command that holds it for a moment.

        Raises OwnedElsewhere, naming the holder, where another process has it; a loop does not wait for a loop.
        """
        deadline = time.monotonic() + wait_s
        peek_deadline = time.monotonic() + 1.0
        while True:
            try:
                descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            except OSError as error:
                raise DatabaseNotUsable(
                    f"{self.path} can't be created ({error.strerror}): the folder of a database must exist and be "
                    "writable; name another file with --db or AEL_DB"
                ) from None
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                holder = current_holder(self.database)
                if holder is None:  # freed just now, or held for an instant by somebody who looked
                    deadline = max(deadline, peek_deadline)
                # A loop that has a socket stays, and takes commands there; another loop would not go either.
                in_vain = holder is not None and (holder.socket is not None or (what == LOOP and holder.what == LOOP))
                if time.monotonic() < deadline and not in_vain:
                    time.sleep(0.02)
                    continue
                who = str(holder) if holder else "another process"
                raise OwnedElsewhere(
                    f"{self.database} is owned by {who}; stop it first, or name another database with --db or AEL_DB"
                ) from None
            self._descriptor = descriptor
            self.describe(what)
            return

    def describe(self, what: str, socket_path: str | None = None) -> None:
        """Write who holds the lock, for messages and for commands that look for the socket."""
        assert self._descriptor is not None
        holder = Holder(os.getpid(), socket.gethostname(), time.time_ns() // 1000, what, socket_path)
        raw = json.dumps(asdict(holder)).encode()
        os.pwrite(self._descriptor, raw.ljust(512), 0)
        os.ftruncate(self._descriptor, max(512, len(raw)))

    def release(self) -> None:
        """Give the lock back; does nothing where it is not held."""
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, 0)
            os.close(self._descriptor)
            self._descriptor = None

    @contextlib.contextmanager
    def held(self, what: str, wait_s: float = 0.0) -> Iterator[None]:
        """Hold the lock for the length of a `with` block."""
        self.acquire(what, wait_s)
        try:
            yield
        finally:
            self.release()


def current_holder(database: Path) -> Holder | None:
    """Return who owns the database now, None where nobody does. Takes nothing and creates nothing."""
    try:
        descriptor = os.open(lock_path(database), os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raw = os.pread(descriptor, 4096, 0).strip()
            try:
                values = json.loads(raw)
                return Holder(**{item.name: values[item.name] for item in fields(Holder)})
            except (ValueError, KeyError, TypeError):
                return Holder(0, "?", 0, "starting")
        return None
    finally:
        os.close(descriptor)

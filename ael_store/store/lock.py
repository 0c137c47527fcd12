"""The lock of a database: one owner at a time, freed by the kernel when its process ends.

The lock is an exclusive `flock` on a file of its own beside the database (`ael.db.lock`), because descriptors of
the database itself belong to SQLite. Its content tells who holds it and which socket takes commands; the content
is advice, the lock is the truth. The file stays when the owner ends, so that nobody locks a deleted one.

Only a take-over gives the name to another file, whose lock is taken before it has the name. So whoever has locked
a file looks whether it is still the one of that name, and tries again where it is not. Take-overs exclude each
other by a lock on the folder, for as long as they last.

A lock belongs to the process that took it. A child made by `fork` would keep it alive after its parent, so it
closes its copy at once.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from ael_store.clock import iso
from ael_store.errors import DatabaseNotUsable, OwnedElsewhere, OwnershipLost, StorageFailed
from ael_store.store.place import real_path
from ael_store.store.whole_file import discard, reserve

try:
    import fcntl
except ImportError:
    raise ImportError(
        "ael_store runs on Linux and macOS; this platform has no flock, which guards its databases"
    ) from None

__all__ = ["LOOP", "DatabaseLock", "Holder", "current_holder", "lock_path"]

LOOP = "loop"
"""What an owner calls itself that stays."""

TAKE_OVER_WAIT_S = 10.0
"""How long a take-over waits for another one."""


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

    @property
    def is_here(self) -> bool:
        """True where it runs on this machine, so that its pid means something here."""
        return self.host == socket.gethostname()


UNKNOWN = Holder(0, "?", 0, "starting")
"""Somebody who has the lock and has not yet written who it is."""


def lock_path(database: Path) -> Path:
    """Return the path of the lock file of a database; every name of the database has the same."""
    database = real_path(database)
    return database.with_name(database.name + ".lock")


class DatabaseLock:
    """The exclusive right to write a database; `acquire` before anything else, `release` last."""

    def __init__(self, database: Path) -> None:
        self.database = database
        self.path = lock_path(database)
        self._descriptor: int | None = None

    def acquire(self, what: str, wait_s: float = 0.0, *, given_up: threading.Event | None = None) -> None:
        """Take the lock; wait up to `wait_s` seconds for a command that holds it for a moment.

        Raises OwnedElsewhere, naming the holder, where another process has it; a loop does not wait for a loop.
        Setting `given_up` in another thread ends the wait early.
        """
        deadline = time.monotonic() + wait_s
        peek_deadline = time.monotonic() + 1.0
        while True:
            descriptor = self._open()
            if _is_taken(descriptor):
                os.close(descriptor)
                holder = current_holder(self.database)
                if holder is None:  # freed just now, or held for an instant by somebody who looked
                    deadline = max(deadline, peek_deadline)
                # A loop that has a socket stays, and takes commands there; another loop would not go either.
                in_vain = holder is not None and (holder.socket is not None or (what == LOOP and holder.what == LOOP))
                if time.monotonic() < deadline and not in_vain and not (given_up is not None and given_up.is_set()):
                    time.sleep(0.02)
                    continue
                raise self._refusal(holder)
            if _has_name(descriptor, self.path):
                self._keep(descriptor)
                try:
                    self.describe(what)
                except BaseException:
                    self.release()
                    raise
                return
            os.close(descriptor)  # a take-over was quicker, or somebody has removed the file

    def take_over(
        self, what: str, wait_s: float, fence: Callable[[Holder], None], *, given_up: threading.Event | None = None
    ) -> Holder | None:
        """Take the lock, also from an owner that no longer does anything with it; returns that owner.

        `fence(holder)` is called before the lock changes hands: it must make sure that this owner can write
        nothing more, or raise what forbids the take-over. None is returned where the lock was free.
        """
        before = current_holder(self.database)
        with contextlib.suppress(OwnedElsewhere):
            self.acquire(what, wait_s, given_up=given_up)
            return None
        with self._alone():
            holder = current_holder(self.database)
            if holder is None or (before is not None and holder != before):
                self.acquire(what)  # it has ended, or another take-over was quicker, which is refused
                return None
            fence(holder)
            self._replace(what)
            return holder

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other take-overs out."""
        folder = os.open(self.path.parent, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
        try:
            deadline = time.monotonic() + TAKE_OVER_WAIT_S
            while _is_taken(folder):
                if time.monotonic() > deadline:
                    raise OwnedElsewhere(f"{self.database} is being taken over by another process; try again later")
                time.sleep(0.02)
            yield
        finally:
            os.close(folder)

    def _replace(self, what: str) -> None:
        """Give the name to a file of our own, locked and described before it is seen."""
        temporary = reserve(self.path, "new")
        try:
            descriptor = os.open(temporary, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            self._keep(descriptor)
            self.describe(what)
            os.rename(temporary, self.path)
        except BaseException:
            self.release()
            raise
        finally:
            discard(temporary)

    def _open(self) -> int:
        try:
            return os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise DatabaseNotUsable(
                    f"{self.path} is a link, and a lock must be a file of its own: remove it"
                ) from None
            if self.path.exists():
                raise DatabaseNotUsable(
                    f"{self.path} can't be opened ({error.strerror}): whoever may write the database must be allowed "
                    "to write its lock too"
                ) from None
            raise DatabaseNotUsable(
                f"{self.path} can't be created ({error.strerror}): the folder of a database must exist and be "
                "writable; name another file with --db or AEL_DB"
            ) from None

    def _refusal(self, holder: Holder | None) -> OwnedElsewhere:
        who = str(holder) if holder else "another process"
        hung = "; where it hangs, `ael run` takes it over with --take-over" if holder and holder.what == LOOP else ""
        return OwnedElsewhere(
            f"{self.database} is owned by {who}; stop it first, or name another database with --db or AEL_DB{hung}"
        )

    def _keep(self, descriptor: int) -> None:
        self._descriptor = descriptor
        _held.add(self)

    def describe(self, what: str, socket_path: str | None = None) -> None:
        """Write who holds the lock, for messages and for commands that look for the socket."""
        assert self._descriptor is not None
        holder = Holder(os.getpid(), socket.gethostname(), time.time_ns() // 1000, what, socket_path)
        raw = json.dumps(asdict(holder)).encode()
        try:
            os.pwrite(self._descriptor, raw.ljust(512), 0)
            os.ftruncate(self._descriptor, max(512, len(raw)))
        except OSError as error:
            raise StorageFailed(
                f"{self.path} can't be written ({error.strerror}): free some space or check the disk"
            ) from error

    def confirm(self) -> None:
        """Raise OwnershipLost where another process has taken the lock over; does nothing where it is not held."""
        if self._descriptor is None or _has_name(self._descriptor, self.path):
            return
        holder = current_holder(self.database)
        if holder is not None:  # without one the file was only removed, and the fencing token still guards
            raise OwnershipLost(
                f"{self.database} was taken over by {holder} while this process stood still: it ends, and writes "
                "nothing more; what it had committed is there"
            )

    def is_ours(self) -> bool:
        """Say whether this process still holds the lock; no longer once it was overtaken."""
        return self._descriptor is not None and _has_name(self._descriptor, self.path)

    def release(self) -> None:
        """Give the lock back; does nothing where it is not held."""
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, 0)
            os.close(self._descriptor)
            self._descriptor = None
            _held.discard(self)

    @contextlib.contextmanager
    def held(self, what: str, wait_s: float = 0.0) -> Iterator[None]:
        """Hold the lock for the length of a `with` block."""
        self.acquire(what, wait_s)
        try:
            yield
        finally:
            self.release()

    def _leave_to_parent(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


_held: weakref.WeakSet[DatabaseLock] = weakref.WeakSet()


def _leave_to_parent() -> None:
    for lock in list(_held):
        lock._leave_to_parent()
    _held.clear()


os.register_at_fork(after_in_child=_leave_to_parent)


def current_holder(database: Path) -> Holder | None:
    """Return who owns the database now, None where nobody does. Takes nothing and creates nothing."""
    path = lock_path(database)
    while True:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            return None
        try:
            taken = _is_taken(descriptor, fcntl.LOCK_SH)
            if _has_name(descriptor, path):
                return _read(descriptor) if taken else None
        finally:
            os.close(descriptor)
        # a take-over has put another file there: look at that one


def _is_taken(descriptor: int, how: int = fcntl.LOCK_EX) -> bool:
    """Lock a file and say False, or say True where somebody else has it."""
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


def _has_name(descriptor: int, path: Path) -> bool:
    """Say whether an open file is still the one of that name."""
    ours = os.fstat(descriptor)
    try:
        named = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return (ours.st_dev, ours.st_ino) == (named.st_dev, named.st_ino)


def _read(descriptor: int) -> Holder:
    try:
        values = json.loads(os.pread(descriptor, 4096, 0).strip())
        return Holder(**{item.name: values[item.name] for item in fields(Holder)})
    except (ValueError, KeyError, TypeError):
        return UNKNOWN

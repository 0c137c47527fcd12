"""The note of what runs: a small file beside the lock that tells, after a process died, which hooks it was in.

A process that is taken down from inside a hook (a crash in native code, `os._exit`, no memory left) can't say so
any more. So each unit is noted before it begins and struck out when it has ended, in a file that is mapped into
memory: one copy of a few bytes and no system call. The kernel owns the page, so the note survives SIGKILL. It need
not survive a power cut, so nothing is synced, and a note that another boot of the machine left is not believed.

Each run makes a file of its own (`ael.db.unit`, 0600) and removes it at its end, whatever the end is, as long as
it can. What is found in it is advice: a missing, foreign or damaged file is no note.

The blocks are written before they are mapped, because a page that gets no room on the disk ends the process
(SIGBUS), and the file is made anew, because a run that was overtaken may still write into the one before.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import stat
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Note", "NotedUnit", "UnitNote", "note_path", "read_note"]

FORMAT = "ael-units-1"
HEADER_BYTES = 1024
REASON_AT = 256
ENTRY_BYTES = 1024
ENTRIES = 32
"""Units that run at the same time: one in the lane, the others in the background. More are not noted."""
SIZE = HEADER_BYTES + ENTRIES * ENTRY_BYTES
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
END = b"\n"


@dataclass(frozen=True, slots=True)
class NotedUnit:
    """A unit that had begun and not ended. `subject` is an agent, or in parentheses what else it was."""

    iteration: int
    kind: str
    subject: str

    def __str__(self) -> str:
        return f"on_{self.kind} of {self.subject!r} (iteration {self.iteration})"


@dataclass(frozen=True, slots=True)
class Note:
    """What a run left."""

    run_id: int
    units: tuple[NotedUnit, ...]
    reason: str
    """Why the process ended itself; empty where it did not."""
    same_boot: bool
    """False where the machine was started again since, so that the note may be older than the end of the run."""


def note_path(database: Path) -> Path:
    """Return the path of the note of a database."""
    return database.with_name(database.name + ".unit")


class UnitNote:
    """The note of a run. Belongs to the loop's thread, but for `convict`. Nothing in it raises after `create`."""

    def __init__(self, path: Path, pages: mmap.mmap, identity: tuple[int, int]) -> None:
        self.path = path
        self._pages: mmap.mmap | None = pages
        self._identity = identity
        self._free = [HEADER_BYTES + number * ENTRY_BYTES for number in reversed(range(ENTRIES))]

    @classmethod
    def create(cls, database: Path, run_id: int) -> UnitNote:
        """Return the empty note of a run; what lay there is gone. Raises OSError. The lock must be held."""
        path = note_path(database)
        path.unlink(missing_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            header = f"{FORMAT} {run_id} {_boot_id()}\n".encode()
            if os.write(descriptor, header + END * (SIZE - len(header))) != SIZE:
                raise OSError("there is no room for it")
            status = os.fstat(descriptor)
            return cls(path, mmap.mmap(descriptor, SIZE), (status.st_dev, status.st_ino))
        except BaseException:
            with contextlib.suppress(OSError):
                path.unlink()
            raise
        finally:
            os.close(descriptor)

    def begin(self, iteration: int, kind: str, subject: str) -> int:
        """Note a unit that is about to run; returns its place, for `end`."""
        if not self._free or self._pages is None:
            return 0
        place = self._free.pop()
        text = f"{iteration} {kind} {subject}\n".encode()
        self._pages[place : place + len(text)] = text
        return place

    def end(self, place: int) -> None:
        """Strike a unit out; 0 is no unit."""
        if place and self._pages is not None:
            self._pages[place] = 10
            self._free.append(place)

    def convict(self, place: int, reason: str) -> None:
        """Leave only this unit (0: none) and say why the process ends, which must be at once. From any thread."""
        pages = self._pages
        if pages is None:
            return
        for other in range(HEADER_BYTES, SIZE, ENTRY_BYTES):
            if other != place:
                pages[other] = 10
        text = reason.encode("utf-8", "replace")[: HEADER_BYTES - REASON_AT - 1] + END
        pages[REASON_AT : REASON_AT + len(text)] = text

    def close(self) -> None:
        """Remove the note: the process has not died in a hook. May be called twice."""
        pages, self._pages = self._pages, None
        if pages is None:
            return
        pages.close()
        with contextlib.suppress(OSError):
            status = os.lstat(self.path)
            if (status.st_dev, status.st_ino) == self._identity:  # else it is that of a run that took over
                os.unlink(self.path)


def read_note(database: Path) -> Note | None:
    """Return the note that lies beside a database, None where there is none that makes sense. Never raises."""
    try:
        descriptor = os.open(note_path(database), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return None
        raw = os.pread(descriptor, SIZE, 0)
    except OSError:
        return None
    finally:
        os.close(descriptor)
    try:
        if len(raw) != SIZE:
            return None
        form, run_id, boot = _line(raw, 0).split(" ")
        if form != FORMAT:
            return None
        places = range(HEADER_BYTES, SIZE, ENTRY_BYTES)
        units = tuple(_unit(line) for place in places if (line := _line(raw, place)))
        return Note(int(run_id), units, _line(raw, REASON_AT), boot == _boot_id())
    except ValueError:  # no UTF-8, no numbers
        return None


def _line(raw: bytes, place: int) -> str:
    end = raw.find(END, place, place + ENTRY_BYTES)
    if end < 0:
        raise ValueError("a line without an end")
    return raw[place:end].decode()


def _unit(line: str) -> NotedUnit:
    iteration, kind, subject = line.split(" ", 2)
    return NotedUnit(int(iteration), kind, subject)


def _boot_id() -> str:
    """Return what tells one boot of the machine from another, `-` where there is nothing of the kind."""
    try:
        return BOOT_ID.read_text("ascii").strip().replace(" ", "") or "-"
    except (OSError, ValueError):
        return "-"

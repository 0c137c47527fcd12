"""The shim that stands between a process under test and the C library: compiled here, and commanded from here.

    shim = Shim(tmp_path / "control")
    process = subprocess.Popen([...], env={**os.environ, **shim.environment(tmp_path)})
    shim.set_clock(-7200)            # its wall clock goes back by two hours, now
    shim.fail(17, Mode.ERROR_ONCE, errno.EIO)
    shim.calls()                     # every call so far that could change a file below the folder

Orders go through a page that is mapped into both processes: they count from the next call on, and a process that
was killed leaves its count. A forked child shares the page of its parent. Linux only; needs a C compiler.
"""

from __future__ import annotations

import atexit
import ctypes
import enum
import functools
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Call", "Missing", "Mode", "Op", "Record", "Shim", "library", "read_log", "require", "why_missing"]

SOURCE = Path(__file__).with_name("shim.c")
MAGIC = 0xAE15417
PATH, TAIL, CALLS = 1024, 104, 16384


class Missing(RuntimeError):
    """There is no shim on this machine."""


class Op(enum.IntEnum):
    """What a call does."""

    OPEN = 0
    """Opens an existing file for writing."""
    CREATE = 1
    WRITE = 2
    TRUNCATE = 3
    ALLOCATE = 4
    FSYNC = 5
    RENAME = 6
    LINK = 7
    UNLINK = 8


class Mode(enum.IntEnum):
    """What becomes of the chosen call."""

    NOTHING = 0
    ERROR_ONCE = 1
    ERROR_FOR_EVER = 2
    TORN_KILL = 3
    """Half of the bytes are written, then the process is killed."""
    TORN_ERROR = 4
    """Half of the bytes are written, and the call fails."""
    KILL_BEFORE = 5
    KILL_AFTER = 6


class _Call(ctypes.Structure):
    _fields_ = (
        ("op", ctypes.c_uint32),
        ("phase", ctypes.c_uint32),
        ("offset", ctypes.c_int64),
        ("length", ctypes.c_int64),
        ("path", ctypes.c_char * TAIL),
    )


class _Control(ctypes.Structure):
    _fields_ = (
        ("magic", ctypes.c_uint32),
        ("mode", ctypes.c_uint32),
        ("at", ctypes.c_uint64),
        ("error", ctypes.c_int32),
        ("phase", ctypes.c_uint32),
        ("kinds", ctypes.c_uint32),
        ("recording", ctypes.c_uint32),
        ("count", ctypes.c_uint64),
        ("struck", ctypes.c_uint64),
        ("wall_ns", ctypes.c_int64),
        ("boot_ns", ctypes.c_int64),
        ("folder", ctypes.c_char * PATH),
        ("log", ctypes.c_char * PATH),
        ("calls", _Call * CALLS),
    )


class _Head(ctypes.Structure):
    _fields_ = (
        ("op", ctypes.c_uint32),
        ("path", ctypes.c_uint32),
        ("second", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
        ("file", ctypes.c_uint64),
        ("offset", ctypes.c_int64),
        ("data", ctypes.c_int64),
    )


@dataclass(frozen=True, slots=True)
class Call:
    """A call that could change a file."""

    op: Op
    path: str
    """Its last 103 bytes."""
    offset: int
    length: int
    phase: int
    """What the process said it was doing."""

    @property
    def name(self) -> str:
        return os.path.basename(self.path)


@dataclass(frozen=True, slots=True)
class Record:
    """A call that succeeded, as the log has it."""

    op: Op
    file: int
    """The inode: the same file under all its names."""
    path: str
    second: str
    """The new name, of RENAME and LINK."""
    offset: int
    """Where a WRITE begins; the new size, of TRUNCATE and ALLOCATE."""
    data: bytes


def why_missing() -> str | None:
    """Say why there can be no shim here; None where there can."""
    if sys.platform != "linux":
        return "faults of system calls are injected on Linux only"
    if shutil.which("cc") is None and shutil.which("gcc") is None:
        return "NO C COMPILER: no fault of a system call is injected; install gcc and libc6-dev"
    return None


def require() -> None:
    """Skip a test where there can be no shim; on CI a missing compiler fails it."""
    import pytest

    why = why_missing()
    if why is not None and sys.platform == "linux" and os.environ.get("CI"):
        pytest.fail(why)
    if why is not None:
        pytest.skip(why)


@functools.cache
def library() -> Path:
    """Compile the shim, once for this process and those that it starts. Raises Missing."""
    why = why_missing()
    if why is not None:
        raise Missing(why)
    folder = tempfile.mkdtemp(prefix="ael-shim-")
    atexit.register(_remove, folder, os.getpid())
    target = Path(folder) / "shim.so"
    compiler = shutil.which("cc") or "gcc"
    made = subprocess.run(
        [compiler, "-shared", "-fPIC", "-O2", "-Wall", "-Wextra", "-o", target, SOURCE, "-ldl", "-lpthread"],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    if made.returncode:
        raise Missing(f"{compiler} can't compile {SOURCE}: {made.stderr}")
    return target


def _remove(folder: str, pid: int) -> None:
    if os.getpid() == pid:  # not a forked child
        shutil.rmtree(folder, ignore_errors=True)


class Shim:
    """The control page of a process, or of a process and its forks."""

    def __init__(self, control: Path) -> None:
        self.control = control
        if not control.exists():
            with control.open("wb") as file:
                file.truncate(ctypes.sizeof(_Control))
        with control.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), ctypes.sizeof(_Control))
        self._page = _Control.from_buffer(self._map)
        self._page.magic = MAGIC

    def environment(self, folder: Path | None = None) -> dict[str, str]:
        """Return the variables of a process that is to be under the shim; calls below `folder` count.

        Without a folder only the clocks are under control.
        """
        if folder is not None:
            self.watch(folder)
        return {"LD_PRELOAD": str(library()), "FAULTS_CONTROL": str(self.control)}

    # -- clocks --

    def set_clock(self, offset_s: float) -> None:
        """Shift the wall clock of the process (CLOCK_REALTIME, gettimeofday, time) from now on."""
        self._page.wall_ns = round(offset_s * 1_000_000_000)

    def set_boottime(self, offset_s: float) -> None:
        """Shift its CLOCK_BOOTTIME, as a machine does that was suspended; CLOCK_MONOTONIC stays as it is."""
        self._page.boot_ns = round(offset_s * 1_000_000_000)

    # -- faults --

    def watch(self, folder: Path) -> None:
        """Count calls below this folder, from 1 again, and let them all pass."""
        self.fail(0, Mode.NOTHING)
        self._page.folder = os.fsencode(folder.resolve())
        self._page.phase = 0
        self._page.count = self._page.struck = 0

    def unwatch(self) -> None:
        """Let everything pass uncounted; what was counted stays."""
        self.fail(0, Mode.NOTHING)
        self._page.folder = b""

    def fail(self, at: int, mode: Mode, error: int = 0, *, kinds: frozenset[Op] = frozenset(Op)) -> None:
        """Have the call number `at`, counted from 1, end as `mode` says; later ones too for ERROR_FOR_EVER.

        `kinds` are those that fail for ever; the one at `at` fails whatever it is.
        """
        self._page.at = 0
        self._page.mode = mode
        self._page.error = error
        self._page.kinds = sum(1 << kind for kind in kinds)
        self._page.at = at

    @property
    def count(self) -> int:
        """Calls so far."""
        return int(self._page.count)

    @property
    def struck(self) -> int:
        """Calls that failed, or were the death of the process."""
        return int(self._page.struck)

    @property
    def phase(self) -> int:
        """A number that the process under test may set, to tell what it is doing; each call notes it."""
        return int(self._page.phase)

    @phase.setter
    def phase(self, phase: int) -> None:
        self._page.phase = phase

    def calls(self) -> list[Call]:
        """Return all calls since `watch`."""
        return [
            Call(Op(call.op), os.fsdecode(call.path), call.offset, call.length, call.phase)
            for call in self._page.calls[: min(self.count, CALLS)]
        ]

    # -- the log --

    def record(self, log: Path | None) -> None:
        """Append every successful call below the folder to a file from now on, with its data; None ends that.

        The process opens the file once: another one needs another process.
        """
        self._page.recording = 0
        if log is not None:
            self._page.log = os.fsencode(log)
            self._page.recording = 1


def read_log(log: Path) -> Iterator[Record]:
    """Yield the records of a log, in the order in which the calls took effect."""
    raw = log.read_bytes()
    place, size = 0, ctypes.sizeof(_Head)
    while place < len(raw):
        head = _Head.from_buffer_copy(raw, place)
        place += size
        path = raw[place : place + head.path]
        place += head.path
        second = raw[place : place + head.second]
        place += head.second
        length = head.data if head.op == Op.WRITE else 0
        data = raw[place : place + length]
        place += length
        yield Record(Op(head.op), head.file, os.fsdecode(path), os.fsdecode(second), head.offset, data)

"""What a figure was measured on: without it a figure says nothing."""

from __future__ import annotations

import os
import platform
import sqlite3
import statistics
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

__all__ = ["Machine", "describe", "is_in_memory"]

PACKAGES = ("ael-store", "sqlalchemy", "aiosqlite", "apscheduler", "orjson")
SYNCS = 60
FASTEST_DISK_US = 20.0
"""No disk syncs faster than this."""


@dataclass(frozen=True)
class Machine:
    """The machine, the folder measured in, and the versions of everything that takes part."""

    cpus: int
    processor: str
    load: float
    kernel: str
    folder: str
    filesystem: str
    fsync_p50_us: float
    fsync_p99_us: float
    python: str
    sqlite: str
    packages: dict[str, str]

    def to_dict(self) -> dict[str, object]:
        return asdict(self)

    def __str__(self) -> str:
        packages = ", ".join(f"{name} {number}" for name, number in self.packages.items())
        return (
            f"{self.cpus} CPUs ({self.processor}), load {self.load:.2f}, {self.kernel}\n"
            f"{self.folder} on {self.filesystem}: fsync p50 {self.fsync_p50_us / 1000:.2f} ms, "
            f"p99 {self.fsync_p99_us / 1000:.2f} ms\n"
            f"Python {self.python}, SQLite {self.sqlite}, {packages}"
        )


def describe(folder: Path) -> Machine:
    """Look at the machine, and time some syncs in the folder."""
    syncs = sorted(_time_syncs(folder))
    return Machine(
        os.cpu_count() or 0,
        _processor(),
        os.getloadavg()[0],
        f"{platform.system()} {platform.release()}",
        str(folder),
        _filesystem(folder),
        round(statistics.median(syncs), 1),
        round(syncs[int(len(syncs) * 0.99)], 1),
        platform.python_version(),
        sqlite3.sqlite_version,
        {name: version(name) for name in PACKAGES},
    )


def is_in_memory(machine: Machine) -> bool:
    """True where the folder lies in memory: there a commit costs nothing, and its time says nothing."""
    return machine.filesystem in ("tmpfs", "ramfs") or machine.fsync_p50_us < FASTEST_DISK_US


def _time_syncs(folder: Path) -> list[float]:
    """Append a page and sync, again and again; in microseconds."""
    path = folder / "fsync.tmp"
    times = []
    with path.open("wb", buffering=0) as file:
        for _ in range(SYNCS):
            file.write(b"\0" * 4096)
            began = time.perf_counter()
            os.fsync(file.fileno())
            times.append((time.perf_counter() - began) * 1e6)
    path.unlink()
    return times


def _filesystem(folder: Path) -> str:
    """Return the type of the file system, as the kernel calls it."""
    mounts = Path("/proc/self/mounts")
    if not mounts.exists():
        return "unknown file system"
    found = {}
    for line in mounts.read_text().splitlines():
        _, mounted, kind, *_ = line.split(" ")
        if folder.resolve().is_relative_to(mounted.encode().decode("unicode_escape")):
            found[len(mounted)] = kind
    return found[max(found)]


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()

"""What a loop costs its machine beside time: memory, the time to start, and what an idle day writes to the disk.

Each figure comes from a process of its own, `python -m benchmarks.process MEASUREMENT FOLDER`.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.spread import Spread
from benchmarks.usage import resident_mb, written_bytes

__all__ = ["Process", "measure_process", "report_process"]

AGENTS = 10
IDLE_S = 7200
"""How much idle time is run through, on a clock that does not wait."""
DAY_S = 86_400


@dataclass(frozen=True)
class Process:
    """What was measured, each over the rounds."""

    bare_mb: Spread
    """Resident memory of a Python that has imported nothing of ours."""
    resident_mb: Spread
    """Resident memory of a loop with ten agents after some hundred iterations."""
    import_ms: Spread
    """From the start of the process to the end of its imports."""
    start_ms: Spread
    """From the start of the process to its first committed iteration, on a new database."""
    restart_ms: Spread
    """The same on the database that is there then."""
    idle_mb_per_day: Spread
    """What SQLite writes in a day of ten idle agents at 1 Hz, its log included."""
    idle_disk_mb_per_day: Spread
    """The same as the kernel counts it, in whole pages of its cache."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure_process(folder: Path, rounds: int, progress: Callable[[str], None]) -> Process:
    """Measure everything; `progress` is told what comes next."""
    bare: list[float] = []
    resident: list[float] = []
    imports: list[float] = []
    starts: list[float] = []
    restarts: list[float] = []
    idle: list[float] = []
    idle_disk: list[float] = []
    for number in range(1, rounds + 1):
        progress(f"round {number} of {rounds}")
        place = folder / str(number)
        place.mkdir()
        bare += _child("bare", place)
        resident += _child("memory", place)
        imported, started = _child("start", place)
        imports.append(imported)
        starts.append(started)
        restarts.append(_child("start", place)[1])
        by_sqlite, by_kernel = _child("idle", place)
        idle.append(by_sqlite)
        idle_disk.append(by_kernel)
    return Process(*(Spread.of(figures) for figures in (bare, resident, imports, starts, restarts, idle, idle_disk)))


def report_process(process: Process) -> str:
    """Return the figures as text."""
    return "\n".join(
        (
            f"Resident memory: a bare Python {process.bare_mb:.1f} MB, a loop with {AGENTS} agents "
            f"{process.resident_mb:.1f} MB",
            f"Start: imports {process.import_ms:.0f} ms, first commit of a new database {process.start_ms:.0f} ms, "
            f"of one that is there {process.restart_ms:.0f} ms (each from the start of the process)",
            f"A day of {AGENTS} idle agents at 1 Hz: SQLite writes {process.idle_mb_per_day:.1f} MB, "
            f"counted in whole pages {process.idle_disk_mb_per_day:.1f} MB",
        )
    )


def _child(measurement: str, folder: Path) -> list[float]:
    began = time.monotonic()
    command = [sys.executable, "-m", "benchmarks.process", measurement, str(folder), str(began)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return [float(word) for word in done.stdout.split()]


# -- in the child -----------------------------------------------------------------------------------


def _memory(folder: Path) -> list[float]:
    from benchmarks.loop import time_loop

    time_loop(folder / "memory.db", AGENTS, 5, 500, "normal")
    return [resident_mb()]


def _start(folder: Path, began: float) -> list[float]:
    from ael_store import AELController
    from benchmarks.loop import Sensor

    imported = time.monotonic()
    moments: list[float] = []
    controller = AELController(store=folder / "start.db")
    for number in range(AGENTS):
        controller.agent_manager.register(Sensor(number))
    controller.observe(lambda summary: moments.append(time.monotonic()))
    asyncio.run(controller.run(1))
    return [1000 * (imported - began), 1000 * (moments[0] - began)]


def _idle(folder: Path) -> list[float]:
    """Run two idle hours at 1 Hz on a clock that jumps to whatever is waited for."""
    from ael_store import AELController
    from benchmarks.jump import JumpingClock
    from benchmarks.loop import Idler

    controller = AELController(store=folder / "idle.db", tick_rate=1.0, clock=JumpingClock())
    for number in range(AGENTS):
        controller.agent_manager.register(Idler(f"idler_{number}"))
    written: list[tuple[int, int]] = []
    controller.observe(lambda summary: written.append(written_bytes()))
    asyncio.run(controller.run(IDLE_S))
    idle_s = IDLE_S - 60
    return [(after - before) / idle_s * DAY_S / 1e6 for before, after in zip(written[59], written[-1], strict=True)]


def _measure(measurement: str, folder: Path, began: float) -> list[float]:
    match measurement:
        case "bare":
            return [resident_mb()]
        case "memory":
            return _memory(folder)
        case "start":
            return _start(folder, began)
        case "idle":
            return _idle(folder)
    raise SystemExit(f"no measurement {measurement!r}: there are bare, memory, start and idle")


if __name__ == "__main__":
    print(*_measure(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3])))

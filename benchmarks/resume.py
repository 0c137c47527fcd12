"""How long a loop takes to begin: on a new database, and on one with many keys, beside a plain `SELECT` of the rows.

Each figure comes from a process of its own, `python -m benchmarks.resume MEASUREMENT FOLDER BEGAN`; in a round the
contestants take turns in an order shuffled anew.
"""

from __future__ import annotations

import asyncio
import random
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.spread import Spread

__all__ = ["Resume", "measure_resume", "report_resume"]

AT_ONCE = 10_000
"""Keys set in one iteration."""
START_GOAL_MS, RESUME_GOAL = 1000.0, 2.0
ROWS = (
    "SELECT k.name, s.key_id, s.value, s.version, s.change_id, s.agent_id "
    "FROM state AS s JOIN keys AS k ON k.id = s.key_id"
)


@dataclass(frozen=True)
class Resume:
    """What was measured, each over the rounds."""

    keys: int
    start_ms: Spread
    """From the start of the process, imports included, to the first commit of an iteration in a new database."""
    resume_ms: Spread
    """From `run` to the first commit of an iteration, in a database with that many keys."""
    select_ms: Spread
    """What plain `sqlite3` takes to fetch the same rows."""
    ratio: Spread

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "start_goal_ms": START_GOAL_MS, "resume_goal": RESUME_GOAL}


def measure_resume(folder: Path, rounds: int, keys: int, progress: Callable[[str], None]) -> Resume:
    """Measure everything; `progress` is told what comes next."""
    progress(f"setting {keys:,} keys")
    _child("fill", folder, keys)
    shuffle = random.Random(0)
    found: dict[str, list[float]] = {"start": [], "resume": [], "select": []}
    for number in range(1, rounds + 1):
        progress(f"round {number} of {rounds}")
        for what in shuffle.sample(list(found), len(found)):
            found[what].append(_child(what, folder, keys))
    ratios = [ours / plain for ours, plain in zip(found["resume"], found["select"], strict=True)]
    start, resume, select = (Spread.of(found[what]) for what in ("start", "resume", "select"))
    return Resume(keys, start, resume, select, Spread.of(ratios))


def report_resume(found: Resume) -> str:
    """Return the figures as text."""
    return "\n".join(
        (
            f"Start of a process to the first commit in a new database: {found.start_ms:.0f} ms "
            f"(at most {START_GOAL_MS:.0f}: {_met(found.start_ms, START_GOAL_MS)})",
            f"{found.keys:,} keys: resumed and committed after {found.resume_ms:.0f} ms, "
            f"a plain SELECT of the rows takes {found.select_ms:.0f} ms: {found.ratio:.2f} times "
            f"(at most {RESUME_GOAL:g}: {_met(found.ratio, RESUME_GOAL)})",
        )
    )


def _met(found: Spread, goal: float) -> str:
    return "met" if found.max <= goal else "NOT met" if found.min > goal else "not shown, rounds differ"


def _child(what: str, folder: Path, keys: int) -> float:
    began = time.monotonic()
    command = [sys.executable, "-m", "benchmarks.resume", what, str(folder), str(keys), str(began)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout)


# -- in the child -----------------------------------------------------------------------------------


def _fill(path: Path, keys: int) -> float:
    from ael_store import AgentBase, StateContext
    from benchmarks.workload import key, value

    class Filler(AgentBase):
        name = "filler"
        priority = 10

        async def on_tick(self, context: StateContext) -> None:
            first = (self.tick_count - 1) * AT_ONCE
            context.update({key(number): value(number, 1) for number in range(first, min(first + AT_ONCE, keys))})

    _run(path, Filler(), (keys + AT_ONCE - 1) // AT_ONCE)
    return 0.0


def _start(path: Path, began: float) -> float:
    """Begin on a new database, and return the milliseconds since the process began."""
    from benchmarks.loop import Sensor

    for file in path.parent.glob(f"{path.name}*"):
        file.unlink()
    return 1000 * (_run(path, Sensor(0), 1) - began)


def _resume(path: Path, keys: int) -> float:
    """Go on with a database, and return the milliseconds to the first commit of an iteration."""
    from ael_store import AgentBase, StateContext
    from benchmarks.workload import key, value

    class Changer(AgentBase):
        name = "changer"
        priority = 10

        async def on_tick(self, context: StateContext) -> None:
            if context.get(key(keys - 1)) != value(keys - 1, 1):
                raise AssertionError("the last key is not what it was")
            context.increment("resumed")

    began = time.monotonic()
    return 1000 * (_run(path, Changer(), 1) - began)


def _select(path: Path, keys: int) -> float:
    """Fetch the rows of the state by plain `sqlite3`, and return the milliseconds."""
    began = time.monotonic()
    with closing(sqlite3.connect(path)) as connection:
        rows = connection.execute(ROWS).fetchall()
        took = time.monotonic() - began
    if len(rows) < keys:
        raise AssertionError(f"{len(rows)} rows, wanted are {keys}")
    return 1000 * took


def _run(path: Path, agent: Any, iterations: int) -> float:
    """Run an agent back to back, and return the monotonic time of the first commit."""
    from ael_store import AELController, AgentManager, EventBus, StateContext

    manager = AgentManager()
    manager.register(agent)
    controller = AELController(
        manager, EventBus(), state_context=StateContext(), tick_rate=0, store=path, durability="full"
    )
    moments: list[float] = []
    controller.observe(lambda summary: moments.append(time.monotonic()))
    asyncio.run(controller.run(iterations))
    if agent.error_count:
        raise AssertionError("the agent failed")
    return moments[0]


def _measure(what: str, folder: Path, keys: int, began: float) -> float:
    match what:
        case "fill":
            return _fill(folder / "many.db", keys)
        case "start":
            return _start(folder / "new.db", began)
        case "resume":
            return _resume(folder / "many.db", keys)
        case "select":
            return _select(folder / "many.db", keys)
    raise SystemExit(f"no measurement {what!r}: there are fill, start, resume and select")


if __name__ == "__main__":
    print(_measure(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])))

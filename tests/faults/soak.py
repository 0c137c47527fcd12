"""A long life: many iterations in one process, with memory, file handles and threads staying flat.

The agents do a little of everything that a loop can do: they write, delete, emit, fail, run too long, run in the
background and in threads, come and go, are switched off and on, and a visitor orders by `transact` and subscribes
callbacks. Most iterations are light, so that a million of them take minutes.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import IO

from ael_store import AELController, AgentBase, AgentManager, Event, EventBus, Settings, StateContext
from ael_store.errors import LoopNotRunning
from tests.acceptance.database import reading
from tests.faults.life import HANG_S
from tests.faults.trial import Report, Tell

__all__ = ["Sample", "growth", "run", "violations"]

NAME = "a long life of one process"
ROOT = Path(__file__).parents[2]
MOST_GROWTH_KB = 1024.0
"""How much memory may grow in 100,000 iterations, after the first tenth."""
LEAST_FOR_GROWTH = 20_000
"""With fewer iterations, growth is noise and not judged."""
SAMPLES = 200
VISIT_EVERY = 100
"""Iterations between two visits."""
POT = 1_000_000


@dataclass(frozen=True)
class Sample:
    """What the process held at an iteration."""

    iteration: int
    memory_kb: int
    files: int
    threads: int
    log_bytes: int
    """Size of the write-ahead log."""


def run(*, count: int, seed: int, workers: int, tell: Tell, folder: Path) -> Report:
    """Run so many iterations in one process, whatever `workers` says, and watch what it holds."""
    path, began = folder / "ael.db", time.monotonic()
    samples: list[Sample] = []
    found: list[str] = []
    with (folder / "log").open("wb") as log, _process(path, count, log) as process:
        assert process.stdout is not None
        guard = threading.Timer(60 + count / 50, process.kill)
        guard.start()
        try:
            for line in process.stdout:
                samples.append(Sample(**json.loads(line)))
                if len(samples) % (SAMPLES // 20) == 0:
                    pace = samples[-1].iteration / (time.monotonic() - began)
                    tell(f"{samples[-1]}, {pace:,.0f} iterations a second")
            status = process.wait(HANG_S)
        finally:
            guard.cancel()
            process.kill()
    if status != 0:
        found.append(f"wrong: the process ended with {status}, see {folder / 'log'}")
    found += violations(path, count)
    rate = growth(samples)
    later = samples[len(samples) // 10 :]
    if count >= LEAST_FOR_GROWTH and rate > MOST_GROWTH_KB:
        found.append(f"wrong: memory grows by {rate:,.0f} kB in 100,000 iterations")
    for what in ("files", "threads"):
        # the last fifth beside the fifth after the start: a leak grows, a peak goes again
        fifth = max(1, len(later) // 5)
        first, last = (max(getattr(item, what) for item in part) for part in (later[:fifth], later[-fifth:]))
        if last > first + 1:
            found.append(f"wrong: {what} grew from {first} to {last}")
    seconds = time.monotonic() - began
    return Report(
        NAME,
        samples[-1].iteration if samples else 0,
        silent=len(found),
        note=f"memory {later[0].memory_kb / 1024:.1f} MB, then {later[-1].memory_kb / 1024:.1f} MB, "
        f"{rate:+,.0f} kB per 100,000 iterations; {later[-1].files} files, {later[-1].threads} threads; "
        f"write-ahead log at most {max(item.log_bytes for item in samples) / 1e6:.1f} MB, "
        f"database {path.stat().st_size / 1e6:.0f} MB; {count / seconds:,.0f} iterations a second; seed {seed}",
        failures=tuple(f"{text} (seed {seed}, {path})" for text in found),
    )


def growth(samples: list[Sample]) -> float:
    """Return by how many kB memory grows in 100,000 iterations: the straight line through the last nine tenths."""
    later = samples[len(samples) // 10 :]
    if len(later) < 2:
        return 0.0
    middle = sum(item.iteration for item in later) / len(later)
    mean = sum(item.memory_kb for item in later) / len(later)
    above = sum((item.iteration - middle) * (item.memory_kb - mean) for item in later)
    return 100_000 * above / sum((item.iteration - middle) ** 2 for item in later)


def violations(path: Path, count: int) -> list[str]:
    """Return what is wrong with the database of a life that has ended, by queries that need little memory."""
    found: list[str] = []
    with reading(path) as connection:

        def equal(what: str, query: str, wanted: object = 0) -> None:
            (value,) = connection.execute(query).fetchone()
            if value != wanted:
                found.append(f"wrong: {what} is {value!r}, wanted is {wanted!r}")

        equal("quick_check", "SELECT * FROM pragma_quick_check", "ok")
        equal("the status of the run", "SELECT status FROM v_runs", "stopped")
        for view, key in (
            ("v_iterations", "iteration"),
            ("v_state_history", "id"),
            ("v_events", "id"),
            ("v_ticks", "id"),
        ):
            equal(f"the number of gaps in {view}", f"SELECT max({key}) - count(*) FROM {view}")
        (iterations,) = connection.execute("SELECT max(iteration) FROM v_iterations").fetchone()
        if iterations < count:
            found.append(f"wrong: there are {iterations} iterations, wanted were {count}")
        last = connection.execute("SELECT key, new_value, max(id) FROM v_state_history GROUP BY key")
        replayed = {key: value for key, value, _ in last if value is not None}
        now = dict(connection.execute("SELECT key, value FROM v_state").fetchall())
        if now != replayed:
            found.append(f"wrong: the state is {now}, its history says {replayed}")
        equal("all money", "SELECT sum(CAST(value AS INTEGER)) FROM v_state WHERE key GLOB 'pot/*'", POT)
        equal("the number of leaks", "SELECT count(*) FROM v_state_history WHERE key = 'leak'")
        equal(
            "what the reader counted less what was sent",
            "SELECT CAST(value AS INTEGER) - (SELECT count(*) FROM v_events WHERE type GLOB 'letter.*') "
            "FROM v_state WHERE key = 'letters'",
        )
        equal("what waits for the reader", "SELECT count(*) FROM v_pending WHERE subscriber = 'reader'")
        equal("what was given up", "SELECT count(*) FROM v_dead_letters")
    return found


# -- in the process ------------------------------------------------------------------------------------


class Bank(AgentBase):
    """Moves money between pots, and makes and deletes keys."""

    priority = 2

    async def on_tick(self, context: StateContext) -> None:
        if not context.has("pot/0"):
            context.update({"pot/0": POT, "pot/1": 0, "pot/2": 0})
        giver, taker = context.random.sample(range(3), 2)
        context.increment(f"pot/{giver}", -1)
        context.increment(f"pot/{taker}")
        key = f"note/{context.random.randrange(8)}"
        if not context.delete(key):
            context.set(key, [context.iteration])


class Sender(AgentBase):
    """Sends letters, now and then a late one."""

    priority = 2

    async def on_tick(self, context: StateContext) -> None:
        late = 0.01 if context.random.random() < 0.1 else None
        context.emit("letter.late" if late else "letter.now", {"at": context.iteration}, after=late)


class Reader(AgentBase):
    """Counts the letters."""

    subscriptions = ("letter.*",)

    async def on_event(self, event: Event, context: StateContext) -> None:
        context.increment("letters")


class Faulty(AgentBase):
    """Fails now and then, and leaves nothing."""

    priority = 1

    async def on_tick(self, context: StateContext) -> None:
        if context.random.random() < 0.2:
            context.set("leak", context.iteration)
            raise ValueError("out of order")

    async def on_error(self, error: Exception, context: StateContext) -> None:
        context.set("last error", str(error))


class Late(AgentBase):
    """Runs out of time now and then."""

    priority = 1
    tick_timeout = 0.01

    async def on_tick(self, context: StateContext) -> None:
        if context.random.random() < 0.01:
            context.set("leak", context.iteration)
            await asyncio.sleep(10)


class Threaded(AgentBase):
    """A plain hook, which runs in a thread."""

    priority = 0

    def on_tick(self, context: StateContext) -> None:  # type: ignore[override]
        if context.random.random() < 0.1:
            context.increment("threaded")


class Background(AgentBase):
    """Takes longer than the iterations beside it."""

    priority = 0
    background = True

    async def on_tick(self, context: StateContext) -> None:
        await asyncio.sleep(0.001)
        if context.random.random() < 0.1:
            context.increment("background")


class Light(AgentBase):
    """Is due in each iteration, and does nothing."""

    priority = 10

    async def on_tick(self, context: StateContext) -> None:
        context.get("letters")


class Guest(AgentBase):
    """Comes and goes."""

    priority = 10

    async def on_start(self, context: StateContext) -> None:
        context.own.increment("stays")

    async def on_shutdown(self, context: StateContext) -> None:
        context.own.increment("ends")


class Visitor:
    """What other code of the process does while the loop runs: something else at each visit."""

    def __init__(self, controller: AELController, fills: bool) -> None:
        self.controller = controller
        self.fills = fills
        self.bell = asyncio.Event()
        self.number = 0

    async def stay(self) -> None:
        """Visit each time the bell rings."""
        if self.fills:
            await self.bell.wait()
            await self.fill()
        while True:
            await self.bell.wait()
            self.bell.clear()
            await self.visit()

    async def fill(self) -> None:
        """Write 32 MB, so that SQLite's page cache is full (16 MB) and does not look like growth later."""
        for number in range(24):
            text = chr(ord("a") + number) * 700_000
            await self.controller.transact(partial(StateContext.set, key="fill", value=text))
        await self.controller.transact(partial(StateContext.delete, key="fill"))

    async def visit(self) -> None:
        manager, bus = self.controller.agent_manager, self.controller.event_bus
        self.number += 1
        guest, caller = f"guest-{self.number // 8 % 3}", f"caller-{self.number // 8 % 3}"
        match self.number % 8:
            case 0:
                manager.register(Guest(guest))
            case 1:
                bus.subscribe("letter.*", caller, lambda event: None)
            case 2:
                self._agent("light").enabled = False
            case 3:
                await self.controller.transact(lambda context: context.increment("visits"))
            case 4:
                self._agent("light").enabled = True
            case 5:
                bus.unsubscribe("letter.*", caller)
            case 6:
                manager.unregister(guest)
            case 7:
                bus.emit("visited", "visitor", {"number": self.number})

    def _agent(self, name: str) -> AgentBase:
        agent = self.controller.agent_manager.get_agent(name)
        assert agent is not None
        return agent


async def live(path: str, count: int) -> None:
    """Run so many iterations, and print a sample now and then."""
    manager = AgentManager()
    for kind in (Bank, Sender, Reader, Faulty, Late, Threaded, Background, Light):
        manager.register(kind(kind.__name__.lower()))
    controller = AELController(manager, EventBus(), tick_rate=0, store=path, settings=Settings())
    visitor = Visitor(controller, fills=count >= LEAST_FOR_GROWTH)
    iterations = 0

    def observe(_summary: object) -> None:
        nonlocal iterations
        iterations += 1
        if iterations % VISIT_EVERY == 0:
            visitor.bell.set()
        if iterations % max(1, count // SAMPLES) == 0:
            print(json.dumps(asdict(_sample(Path(path), iterations))), flush=True)

    controller.observe(observe)
    staying = asyncio.create_task(visitor.stay())
    await controller.run(count)
    staying.cancel()
    results = await asyncio.gather(staying, return_exceptions=True)
    for result in results:
        if not isinstance(result, asyncio.CancelledError | LoopNotRunning):
            raise AssertionError(f"the visitor ended with {result!r}")


def _sample(path: Path, iteration: int) -> Sample:
    statm = Path("/proc/self/statm")
    if statm.exists():
        memory_kb = int(statm.read_text().split()[1]) * resource.getpagesize() // 1024
    else:  # macOS tells the peak only, in bytes
        memory_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    wal = path.with_name(path.name + "-wal")
    return Sample(
        iteration,
        memory_kb,
        len(os.listdir("/dev/fd")),
        threading.active_count(),
        wal.stat().st_size if wal.exists() else 0,
    )


@contextmanager
def _process(path: Path, count: int, log: IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """The process of the long life; it does not outlive the block."""
    command = [sys.executable, "-m", "tests.faults.soak", str(path), str(count)]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("AEL_")}
    with subprocess.Popen(command, cwd=ROOT, env=clean, stdout=subprocess.PIPE, stderr=log) as process:
        try:
            yield process
        finally:
            process.kill()


if __name__ == "__main__":
    logging.getLogger("ael_store").setLevel(logging.CRITICAL)  # thousands of failures are meant
    asyncio.run(live(sys.argv[1], int(sys.argv[2])))

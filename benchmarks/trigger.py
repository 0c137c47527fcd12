"""Whether the loop is there when it should be: slots of the clock, a stop, an event from outside, one among many.

The clock is measured beside a plain asyncio loop that keeps deadlines and does nothing, in a process of its own that
runs at the same time, so that both meet what else the machine does. Lost slots are counted by SQL.
"""

from __future__ import annotations

import asyncio
import math
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ael_store import AELController, AgentBase, AgentManager, Event, EventBus, StateContext, connect
from benchmarks.loop import Sensor

__all__ = ["Clock", "Trigger", "TriggerOptions", "measure_trigger", "report_trigger"]

STOP_RATES = (0.0, 0.001, 0.01, 0.05, 1.0)
STOP_GOAL_MS, EVENT_GOAL_MS, LATE_GOAL_MS = 10.0, 25.0, 20.0


@dataclass(frozen=True)
class TriggerOptions:
    """What to measure."""

    folder: Path
    seconds: float = 60.0
    """Of each rate of the clock, and of the agent among others."""
    stops: int = 10
    """At each tick rate."""
    events: int = 200
    """At each tick rate."""
    event_rates: Sequence[float] = (0.1, 1.0, 60.0)
    others: int = 1000
    """Agents beside the one whose lateness is measured; 0 leaves that out."""


@dataclass(frozen=True)
class Clock:
    """What became of the slots of the clock at one rate."""

    hertz: float
    slots: int
    """Slots from the first iteration to the last."""
    iterations: int
    missed: int
    """As `v_iterations.missed` says."""
    plain_slots: int
    plain_missed: int

    @property
    def is_complete(self) -> bool:
        """True where each slot is an iteration or counted as lost.

        How many there were is reckoned from the first and the last iteration, which may be late: to within one.
        """
        return abs(self.iterations + self.missed - self.slots) <= 1


@dataclass(frozen=True)
class Trigger:
    """Everything measured."""

    clocks: list[Clock]
    begun_after_stop_ms: dict[str, float]
    """By tick rate: how long after `stop()` the last tick began, the worst of all stops; 0 where none did."""
    event_ms: dict[str, dict[str, float]]
    """By tick rate: from before `emit` in another process to the handler; median, p99, largest."""
    others: int
    late_ms: dict[str, dict[str, float]]
    """Of an agent at 1 Hz among the others: by how it is made due; median, p99, largest."""

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "complete": [clock.is_complete for clock in self.clocks]}


def measure_trigger(options: TriggerOptions, progress: Callable[[str], None]) -> Trigger:
    """Measure everything; `progress` is told what comes next."""
    clocks = []
    for hertz in (20.0, 100.0):
        progress(f"{hertz:.0f} Hz for {options.seconds:.0f} s")
        clocks.append(_clock(options.folder / f"{hertz:.0f}.db", hertz, options.seconds))
    stops = {}
    for rate in STOP_RATES:
        progress(f"stops at a tick rate of {rate:g} s")
        path = options.folder / f"stop {rate:g}.db"
        stops[f"{rate:g}"] = max(_stop(path, rate, number) for number in range(options.stops))
    events = {}
    for rate in options.event_rates:
        progress(f"events from outside at a tick rate of {rate:g} s")
        events[f"{rate:g}"] = _quantiles(_events(options.folder / f"events {rate:g}.db", rate, options.events))
    late = {}
    for how, trigger in (("by the clock", None), ("by a trigger", "every 1s")) if options.others else ():
        progress(f"an agent at 1 Hz among {options.others:,}, {how}")
        path = options.folder / f"late {how}.db"
        late[how] = _quantiles(_late(path, trigger, options.others, options.seconds))
    return Trigger(clocks, stops, events, options.others, late)


def report_trigger(found: Trigger) -> str:
    """Return the figures as text."""
    lines = []
    for clock in found.clocks:
        lines.append(
            f"{clock.hertz:.0f} Hz: {clock.slots} slots, {clock.iterations} iterations and {clock.missed} missed "
            f"{'are all of them' if clock.is_complete else 'are NOT all of them'}; "
            f"a plain loop beside it kept {clock.plain_slots - clock.plain_missed} of {clock.plain_slots}"
        )
    for rate, worst in found.begun_after_stop_ms.items():
        lines.append(
            f"Tick rate {rate} s: the last tick began {worst:.2f} ms after stop() at the latest "
            f"({_met(worst, STOP_GOAL_MS)})"
        )
    for rate, event in found.event_ms.items():
        lines.append(
            f"Tick rate {rate} s: an event from another process reaches its handler after {_shown(event)} "
            f"({_met(event['p99'], EVENT_GOAL_MS)})"
        )
    for how, late in found.late_ms.items():
        lines.append(
            f"An agent at 1 Hz {how} among {found.others:,}: late by {_shown(late)} ({_met(late['p99'], LATE_GOAL_MS)})"
        )
    return "\n".join(lines)


def _met(found: float, goal: float) -> str:
    return f"at most {goal:g} ms: {'met' if found <= goal else 'NOT met'}"


def _shown(figures: dict[str, float]) -> str:
    return f"{figures['p50']:.1f} ms, p99 {figures['p99']:.1f}, largest {figures['max']:.1f}"


def _quantiles(figures: Sequence[float]) -> dict[str, float]:
    found = sorted(figures)
    return {"p50": found[len(found) // 2], "p99": found[math.ceil(0.99 * len(found)) - 1], "max": found[-1]}


# -- the clock --------------------------------------------------------------------------------------


def _clock(path: Path, hertz: float, seconds: float) -> Clock:
    command = [sys.executable, "-m", "benchmarks.trigger", "plain", str(hertz), str(seconds)]
    plain = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    asyncio.run(_run_for(_controller(path, [Sensor(0)], 1 / hertz), seconds))
    plain_slots, plain_missed = map(int, plain.communicate()[0].split())
    query = (
        "SELECT count(*), sum(missed), (julianday(max(started_at)) - julianday(min(started_at))) * 86400 "
        "FROM v_iterations"
    )
    with closing(sqlite3.connect(path)) as connection:
        iterations, missed, lasted_s = connection.execute(query).fetchone()
    return Clock(hertz, math.floor(lasted_s * hertz + 0.5) + 1, iterations, missed, plain_slots, plain_missed)


async def _run_for(controller: AELController, seconds: float) -> None:
    begun = asyncio.create_task(controller.start())
    await asyncio.wait({begun}, timeout=seconds)
    await controller.stop()
    await begun


async def keep_deadlines(period: float, seconds: float) -> tuple[int, int]:
    """Keep the deadlines of a clock and do nothing; returns its slots and how many of them were lost."""
    began = time.monotonic()
    slots = missed = 0
    while time.monotonic() < began + seconds:
        await asyncio.sleep(max(0.0, began + slots * period - time.monotonic()))
        late = int((time.monotonic() - began - slots * period) / period)
        missed += late
        slots += late + 1
    return slots, missed


# -- a stop -----------------------------------------------------------------------------------------


class Ticker(AgentBase):
    """Notes when its ticks begin."""

    priority = 10

    def __init__(self, name: str, trigger: str | None = None) -> None:
        super().__init__(name, trigger=trigger)
        self.moments: list[float] = []

    async def on_tick(self, context: StateContext) -> None:
        self.moments.append(time.monotonic())
        context.set("tick", self.tick_count)


def _stop(path: Path, rate: float, number: int) -> float:
    """Return by how many milliseconds the last tick began after `stop()`, asked by a task and a thread in turn."""
    ticker = Ticker("ticker")
    controller = _controller(path, [ticker, *(Sensor(n) for n in range(10))], rate)
    asked = [math.inf]

    async def run() -> None:
        begun = asyncio.create_task(controller.start())
        while not ticker.moments and not begun.done():
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05 + 0.013 * number)
        if number % 2:
            thread = threading.Thread(target=ask)
            thread.start()
            await begun
            await asyncio.to_thread(thread.join)
        else:
            asked[0] = time.monotonic()
            await controller.stop()
            await begun

    def ask() -> None:
        asked[0] = time.monotonic()
        asyncio.run(controller.stop())

    asyncio.run(run())
    return max(0.0, 1000 * (ticker.moments[-1] - asked[0]))


# -- an event from outside ---------------------------------------------------------------------------


class Handler(AgentBase):
    """Notes how long ago the event was about to be emitted."""

    name = "handler"
    subscriptions = ("asked",)

    def __init__(self) -> None:
        super().__init__()
        self.took_ms: list[float] = []

    async def on_event(self, event: Event, context: StateContext) -> None:
        self.took_ms.append(1000 * (time.monotonic() - event.data["at"]))


def _events(path: Path, rate: float, number: int) -> list[float]:
    handler = Handler()
    controller = _controller(path, [handler, Sensor(0)], rate)

    async def run() -> None:
        begun = asyncio.create_task(controller.start())
        while controller.get_stats()["iteration"] < 1:
            await asyncio.sleep(0.01)
        command = [sys.executable, "-m", "benchmarks.trigger", "emit", str(path), str(number)]
        emitting = await asyncio.create_subprocess_exec(*command)
        await emitting.wait()
        await controller.stop()
        await begun

    asyncio.run(run())
    if len(handler.took_ms) != number:
        raise AssertionError(f"{len(handler.took_ms)} events were handled, wanted are {number}")
    return handler.took_ms


def emit(path: str, number: int) -> None:
    """Emit events through a client, each with the moment before, at moments that fit to no clock."""
    with connect(path) as client:
        for count in range(number):
            time.sleep(0.011 + 0.007 * (count % 7))
            client.emit("asked", {"at": time.monotonic()})


# -- one among many ----------------------------------------------------------------------------------


def _late(path: Path, trigger: str | None, others: int, seconds: float) -> list[float]:
    """Return by how many milliseconds the ticks of an agent came after their slot; the earliest sets the slots."""
    ticker = Ticker("ticker", trigger)
    beside: list[AgentBase] = [Sensor(number) for number in range(others)]
    for number, other in enumerate(beside):
        other.priority = number % 10
    asyncio.run(_run_for(_controller(path, [*beside, ticker], 1.0), seconds))
    moments = ticker.moments[1:]  # the first one comes with the start
    offsets = [moment - round(moment - moments[0]) for moment in moments]
    return [1000 * (offset - min(offsets)) for offset in offsets]


def _controller(path: Path, agents: Sequence[AgentBase], rate: float) -> AELController:
    manager = AgentManager()
    for agent in agents:
        manager.register(agent)
    return AELController(manager, EventBus(), state_context=StateContext(), tick_rate=rate, store=path)


if __name__ == "__main__":
    if sys.argv[1] == "plain":
        print(*asyncio.run(keep_deadlines(1 / float(sys.argv[2]), float(sys.argv[3]))))
    else:
        emit(sys.argv[2], int(sys.argv[3]))

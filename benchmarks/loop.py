"""The contestant: real loops on real files, through the public API only."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from ael_store import AELController, AgentBase, AgentManager, Event, EventBus, StateContext
from benchmarks.workload import event_data, event_type, key, value

__all__ = ["LoopTimes", "OperationTimes", "time_dispatch", "time_loop", "time_operations", "time_updates"]


class Sensor(AgentBase):
    """Sets one key and emits one event."""

    priority = 10

    def __init__(self, number: int) -> None:
        super().__init__(f"sensor_{number}")
        self.number = number
        self.key = key(number)
        self.type = event_type(number)

    async def on_tick(self, context: StateContext) -> None:
        iteration = self.tick_count
        context.set(self.key, value(self.number, iteration))
        context.emit(self.type, event_data(self.number, iteration))


class Idler(AgentBase):
    """Does nothing."""

    priority = 10

    async def on_tick(self, context: StateContext) -> None:
        pass


@dataclass
class LoopTimes:
    """Seconds of each iteration, and what of them was the commit, as the loop says."""

    iterations: list[float]
    commits: list[float]


@dataclass
class OperationTimes:
    """Seconds of one call inside a hook."""

    set: float
    get: float
    emit: float


def time_loop(
    path: Path, agents: int, warm_up: int, iterations: int, durability: str, *, idle: bool = False
) -> LoopTimes:
    """Run agents back to back: so many iterations after some to warm up. `idle` ones do nothing."""
    made: list[AgentBase] = [Idler(f"idler_{n}") if idle else Sensor(n) for n in range(agents)]
    controller = _controller(path, made, durability)
    commits: list[float] = []
    controller.observe(lambda summary: commits.append(summary.commit_s))
    times = _run(controller, warm_up, iterations)
    if not idle:
        _verify(
            path,
            {
                "v_state": agents,
                "v_state_history": agents * (warm_up + iterations),
                "v_events WHERE type GLOB 'measured.*'": agents * (warm_up + iterations),
                "v_ticks WHERE kind = 'tick' AND outcome = 'success'": agents * (warm_up + iterations),
                "v_iterations": warm_up + iterations,
                f"v_agents WHERE tick_count = {warm_up + iterations}": agents,
            },
        )
    return LoopTimes(times, commits[warm_up:])


def time_updates(path: Path, changes: int, iterations: int) -> list[float]:
    """Return the seconds of iterations in which one agent changes so many keys."""

    class Setter(AgentBase):
        name = "setter"
        priority = 10

        async def on_tick(self, context: StateContext) -> None:
            for number in range(changes):
                context.set(key(number), value(number, self.tick_count))

    times = _run(_controller(path, [Setter()], "full"), 1, iterations)
    _verify(path, {"v_state_history": changes * (iterations + 1)})
    return times


def time_dispatch(path: Path, events: int, iterations: int) -> list[float]:
    """Return the seconds of iterations in which one agent emits so many events and another one handles them."""

    class Emitter(AgentBase):
        name = "emitter"
        priority = 10

        async def on_tick(self, context: StateContext) -> None:
            for number in range(events):
                context.emit("measured", event_data(number, self.tick_count))

    class Handler(AgentBase):
        name = "handler"
        subscriptions = ("measured",)

        async def on_event(self, event: Event, context: StateContext) -> None:
            pass

    times = _run(_controller(path, [Emitter(), Handler()], "full"), 1, iterations)
    _verify(path, {f"v_agents WHERE event_count = {events * (iterations + 1)}": 1, "v_pending": 0})
    return times


def time_operations(path: Path, calls: int, durability: str) -> OperationTimes:
    """Time single calls inside a hook, each many times."""
    times: dict[str, float] = {}

    def measure(name: str, call: Callable[[int], Any]) -> None:
        began = time.perf_counter()
        for number in range(calls):
            call(number)
        times[name] = (time.perf_counter() - began) / calls

    class Caller(AgentBase):
        name = "caller"
        priority = 10

        async def on_tick(self, context: StateContext) -> None:
            readings = [value(0, number) for number in range(calls)]
            measure("set", lambda number: context.set("reading", readings[number]))
            measure("get", lambda number: context.get("reading"))
            measure("emit", lambda number: context.emit("measured", readings[number]))

    asyncio.run(_controller(path, [Caller()], durability).run(1))
    return OperationTimes(**times)


def _controller(path: Path, agents: list[AgentBase], durability: str) -> AELController:
    manager = AgentManager()
    for agent in agents:
        manager.register(agent)
    return AELController(
        manager, EventBus(), state_context=StateContext(), tick_rate=0, store=path, durability=durability
    )


def _run(controller: AELController, warm_up: int, iterations: int) -> list[float]:
    """Run, and return the seconds of each iteration after the warm-up, from the end of the one before."""
    moments: list[float] = []
    controller.observe(lambda summary: moments.append(time.perf_counter()))
    asyncio.run(controller.run(warm_up + iterations))
    return [after - before for before, after in pairwise(moments[warm_up - 1 :])]


def _verify(path: Path, rows: dict[str, int]) -> None:
    """Raise AssertionError unless the database holds so many rows."""
    with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as connection:
        found = {view: connection.execute(f"SELECT count(*) FROM {view}").fetchone()[0] for view in rows}
    if found != rows:
        raise AssertionError(f"the loop wrote {found}, wanted are {rows}")

"""Whether costs stay where they are as agents, keys, events and years grow.

Each figure comes from a process of its own, `python -m benchmarks.scale MEASUREMENT FOLDER NUMBERS…`, which prints one
number or several; contestants of the same question take turns within a round, in an order shuffled anew.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.spread import Spread

__all__ = ["Figure", "ScaleOptions", "measure_scale", "report_scale"]

STRATEGIES = ("priority", "round_robin", "load_aware")
DAY_S = 86_400
KEYS = 10
"""Keys of each agent whose memory is measured."""


@dataclass(frozen=True)
class ScaleOptions:
    """What to measure."""

    folder: Path
    rounds: int = 3
    age: int = 1_000_000
    """Iterations of the old database."""
    agents: int = 10_000
    """The many."""
    simulated_s: int = 3600
    idle_s: float = 30.0
    """How long idle agents run by the real clock."""
    seed: int = 0


@dataclass(frozen=True)
class Figure:
    """One measured figure with its goal."""

    what: str
    unit: str
    found: Spread
    at_most: float | None = None

    @property
    def verdict(self) -> str:
        """What can be said, given how far the rounds lie apart."""
        if self.at_most is None:
            return ""
        low, high = self.found.min, self.found.max
        met = "met" if high <= self.at_most else "NOT met" if low > self.at_most else "not shown, rounds differ"
        return f"at most {self.at_most:g}: {met}"

    def to_dict(self) -> dict[str, Any]:
        found = {"median": self.found.median, "min": self.found.min, "max": self.found.max}
        return {"what": self.what, "unit": self.unit, **found, "at_most": self.at_most, "verdict": self.verdict}


def measure_scale(options: ScaleOptions, progress: Callable[[str], None]) -> list[Figure]:
    """Measure everything; `progress` is told what comes next."""
    figures: list[Figure] = []
    for measure in (_memory, _calls, _selection, _subscribers, _linear, _days, _age):
        progress((measure.__doc__ or "").partition(".")[0])
        figures += measure(options)
    return figures


def report_scale(figures: Sequence[Figure]) -> str:
    """Return the figures as text."""
    return "\n".join(f"{f.what:<72} {format(f.found, '.3g'):>24} {f.unit:<10} {f.verdict}" for f in figures)


# -- the questions ----------------------------------------------------------------------------------


def _memory(options: ScaleOptions) -> list[Figure]:
    """Memory of a loop of ten, and of each agent of a thousand with its keys.

    The loop of one makes as many ticks as that of a thousand, so that SQLite's cache of pages is as full: it has a
    bound of its own, and belongs to what is written, not to how many write it.
    """
    ten, each = [], []
    for _ in range(options.rounds):
        place = _place(options)
        ten.append(_child("memory", place / "ten", 10, KEYS, 500)[0])
        one = _child("memory", place / "one", 1, KEYS, 3000 * KEYS)[0]
        many = _child("memory", place / "many", 1000, KEYS, 3 * KEYS)[0]
        each.append((many - one) * 1024 / 999)
    return [
        Figure("a loop with ten agents", "MB", Spread.of(ten), 60),
        Figure(f"each agent with {KEYS} keys, of 1,000", "kB", Spread.of(each), 10),
    ]


def _calls(options: ScaleOptions) -> list[Figure]:
    """Single calls in a hook, and the dispatch of an event."""
    rounds = [_child("calls", _place(options)) for _ in range(options.rounds)]
    what = (("state.get of a number", 1), ("state.set", 5), ("emit", 5), ("dispatch of an event, commit included", 50))
    return [
        Figure(name, "µs", Spread.of([found[place] for found in rounds]), at_most)
        for place, (name, at_most) in enumerate(what)
    ]


def _selection(options: ScaleOptions) -> list[Figure]:
    """Selection of many agents by each strategy."""
    rounds = [_child("selection", _place(options), options.agents) for _ in range(options.rounds)]
    return [
        Figure(
            f"selection of {options.agents:,} agents, {strategy}",
            "ms",
            Spread.of([found[place] for found in rounds]),
            10,
        )
        for place, strategy in enumerate(STRATEGIES)
    ]


def _subscribers(options: ScaleOptions) -> list[Figure]:
    """An iteration beside many agents that only subscribe."""
    found: dict[int, list[float]] = {0: [], options.agents: []}
    shuffle = random.Random(options.seed)
    for _ in range(2 * options.rounds):
        for others in shuffle.sample(list(found), len(found)):
            found[others].append(_child("beside", _place(options), others)[0])
    with_them, alone = found[options.agents], found[0]
    added = [100 * (slow / quick - 1) for slow, quick in zip(with_them, alone, strict=True)]
    return [Figure(f"{options.agents:,} that only subscribe add to an iteration of 10", "%", Spread.of(added), 5)]


def _linear(options: ScaleOptions) -> list[Figure]:
    """An iteration of few and of many agents."""
    sizes = (options.agents // 100, options.agents // 10, options.agents)
    found: dict[int, list[float]] = {size: [] for size in sizes}
    shuffle = random.Random(options.seed)
    for _ in range(options.rounds):
        for size in shuffle.sample(sizes, len(sizes)):
            found[size].append(_child("iteration", _place(options), size, max(3, 3 * sizes[-1] // size))[0] / size)
    figures = [Figure(f"an iteration, for each of {size:,} agents", "µs", Spread.of(found[size])) for size in sizes]
    ratios = [many / fewer for many, fewer in zip(found[sizes[2]], found[sizes[1]], strict=True)]
    return [*figures, Figure(f"each of {sizes[2]:,} beside each of {sizes[1]:,}", "times", Spread.of(ratios))]


def _days(options: ScaleOptions) -> list[Figure]:
    """Idle and busy days: bytes of simulated hours, and the processor by the real clock."""
    share, idle, busy, size = [], [], [], []
    for _ in range(options.rounds):
        share.append(100 * _child("idle", _place(options), options.idle_s)[0])
        idle.append(_child("day", _place(options), options.simulated_s, 100, 0)[0])
        written, grown = _child("day", _place(options), options.simulated_s, 0, 10)
        busy.append(written)
        size.append(grown)
    return [
        Figure("100 idle agents at 1 Hz", "% of core", Spread.of(share), 0.5),
        Figure("100 idle agents at 1 Hz write in a day", "MB", Spread.of(idle), 100),
        Figure("10 agents that change a key and emit an event at 1 Hz write in a day", "MB", Spread.of(busy), 4000),
        Figure("the file grows by, for each change and event", "bytes", Spread.of(size), 400),
    ]


def _age(options: ScaleOptions) -> list[Figure]:
    """An old database beside a young one, both beside plain sqlite3 of the same age."""
    ages = {"young": 1000, "old": options.age}
    place = _place(options)
    for age, iterations in ages.items():
        _child("live", place / f"{age}.db", iterations)
        _child("plain", place / f"{age} plain.db", iterations)
    shuffle = random.Random(options.seed)
    found: dict[tuple[str, str], list[float]] = {(kind, age): [] for kind in ("live", "plain") for age in ages}
    for _ in range(2 * options.rounds):
        for kind, age in shuffle.sample(list(found), len(found)):
            path = place / (f"{age}.db" if kind == "live" else f"{age} plain.db")
            found[kind, age].append(_child(kind, path, 300)[0])
    ratios = {
        age: [ours / plain for ours, plain in zip(found["live", age], found["plain", age], strict=True)] for age in ages
    }
    growth = [old / young for old, young in zip(ratios["old"], ratios["young"], strict=True)]
    return [
        *(
            Figure(f"an iteration of 1 agent beside plain sqlite3, at {ages[age]:,}", "times", Spread.of(ratios[age]))
            for age in ages
        ),
        Figure("of these the latter beside the former", "times", Spread.of(growth), 1.2),
    ]


_places = 0


def _place(options: ScaleOptions) -> Path:
    """Return a folder of its own."""
    global _places
    _places += 1
    place = options.folder / f"scale{_places}"
    place.mkdir()
    return place


def _child(what: str, place: Path, *numbers: float) -> list[float]:
    command = [sys.executable, "-m", "benchmarks.scale", what, str(place), *map(str, numbers)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return [float(word) for word in done.stdout.split()]


# -- in the child -----------------------------------------------------------------------------------


def _controller(path: Path, agents: Sequence[Any], **more: Any) -> Any:
    from ael_store import AELController, AgentManager, EventBus, StateContext

    manager = AgentManager()
    for agent in agents:
        manager.register(agent)
    return AELController(
        manager,
        EventBus(),
        state_context=StateContext(),
        store=path,
        **{"tick_rate": 0, "durability": "normal", **more},
    )


def _run(controller: Any, iterations: int) -> float:
    """Run iterations after the first, and return the mean of them in microseconds."""
    moments: list[float] = []
    controller.observe(lambda summary: moments.append(time.perf_counter()))
    asyncio.run(controller.run(iterations + 1))
    return 1e6 * (moments[-1] - moments[0]) / iterations


def measure_memory(place: Path, agents: int, keys: int, iterations: int) -> list[float]:
    """Return the MB of a loop in which each agent has set so many keys of its own, one in each tick."""
    from ael_store import AgentBase, StateContext
    from benchmarks.usage import resident_mb
    from benchmarks.workload import event_data, event_type, value

    class Keeper(AgentBase):
        priority = 10

        async def on_tick(self, context: StateContext) -> None:
            number = self.tick_count % keys
            context.own.set(f"reading {number}", value(number, self.tick_count))
            context.emit(event_type(number), event_data(number, self.tick_count))

    place.mkdir()
    _run(_controller(place / "ael.db", [Keeper(f"keeper_{n}") for n in range(agents)]), iterations)
    return [resident_mb()]


def measure_calls(place: Path) -> list[float]:
    """Return the microseconds of a get, a set, an emit, and of an event with its handler."""
    from ael_store import AgentBase, StateContext
    from benchmarks.loop import time_dispatch, time_operations

    class Getter(AgentBase):
        name = "getter"
        priority = 10
        took = 0.0

        async def on_tick(self, context: StateContext) -> None:
            context.set("number", 42)
            began = time.perf_counter()
            for _ in range(5000):
                context.get("number")
            self.took = time.perf_counter() - began

    getter = Getter()
    asyncio.run(_controller(place / "get.db", [getter]).run(2))  # the second time it is committed
    times = time_operations(place / "calls.db", 5000, "normal")
    events = time_dispatch(place / "events.db", 500, 10)
    return [getter.took / 5000 * 1e6, times.set * 1e6, times.emit * 1e6, sum(events) / len(events) / 500 * 1e6]


def measure_selection(place: Path, agents: int) -> list[float]:
    """Return the milliseconds in which each strategy selects: with a limit or without one, whichever is slower."""
    from ael_store import AgentBase, Scheduler

    made = [AgentBase(f"agent_{number}", priority=number % 11) for number in range(agents)]
    found = []
    for strategy in STRATEGIES:
        scheduler = Scheduler(strategy)
        for number, agent in enumerate(made):
            scheduler.record_execution(agent.name, 0.0001 * (number % 7 + 1))
        medians = []
        for limit in (None, agents // 10):
            times = []
            for iteration in range(1, 21):
                began = time.thread_time()  # nothing waits here, and others may have the processor meanwhile
                chosen = scheduler.select_agents(made, limit, iteration=iteration)
                times.append(time.thread_time() - began)
                assert chosen
            medians.append(statistics.median(times))
        found.append(1000 * max(medians))
    return found


def measure_beside(place: Path, others: int) -> list[float]:
    """Return the processor's microseconds of an iteration of ten, beside others that subscribe to something else."""
    from ael_store import AgentBase, Event, StateContext
    from benchmarks.loop import Sensor

    class Listener(AgentBase):
        subscriptions = ("nothing.of.this",)

        async def on_event(self, event: Event, context: StateContext) -> None:
            pass

    agents = [*(Sensor(number) for number in range(10)), *(Listener(f"listener_{number}") for number in range(others))]
    controller, iterations = _controller(place / "ael.db", agents), 500
    taken: list[float] = []
    controller.observe(lambda summary: taken.append(time.process_time()))
    asyncio.run(controller.run(iterations + 1))
    return [1e6 * (taken[-1] - taken[0]) / iterations]


def measure_iteration(place: Path, agents: int, iterations: int) -> list[float]:
    """Return the microseconds of an iteration."""
    from benchmarks.loop import Sensor

    return [_run(_controller(place / "ael.db", [Sensor(number) for number in range(agents)]), iterations)]


def measure_idle(place: Path, seconds: float) -> list[float]:
    """Return which part of a core 100 idle agents at 1 Hz take by the real clock."""
    from benchmarks.loop import Idler

    controller = _controller(place / "ael.db", [Idler(f"idler_{n}") for n in range(100)], tick_rate=1.0)
    taken: list[tuple[float, float]] = []
    controller.observe(lambda summary: taken.append((time.process_time(), time.monotonic())))
    asyncio.run(controller.run(round(seconds) + 2))
    (began_cpu, began), (ended_cpu, ended) = taken[1], taken[-1]
    return [(ended_cpu - began_cpu) / (ended - began)]


def measure_day(place: Path, seconds: int, idle: int, busy: int) -> list[float]:
    """Return the MB that a day at 1 Hz writes, its log included, and the bytes kept for each busy tick."""
    from benchmarks.jump import JumpingClock
    from benchmarks.loop import Idler, Sensor
    from benchmarks.usage import written_bytes

    path = place / "ael.db"
    agents = [*(Idler(f"idler_{n}") for n in range(idle)), *(Sensor(n) for n in range(busy))]
    clock = JumpingClock()
    controller = _controller(path, agents, tick_rate=1.0, clock=clock, durability="full")
    asyncio.run(controller.run(60))
    size, began = path.stat().st_size, clock.monotonic()
    written: list[int] = []
    controller.observe(lambda summary: written.append(written_bytes()[0]))
    asyncio.run(controller.run(seconds))
    grown = (path.stat().st_size - size) / max(1, busy * seconds)
    return [(written[-1] - written[0]) / (clock.monotonic() - began) * DAY_S / 1e6, grown]


def measure_live(path: Path, iterations: int) -> list[float]:
    """Go on with a database of one agent, and return the microseconds of an iteration."""
    from benchmarks.loop import Sensor

    return [_run(_controller(path, [Sensor(0)]), iterations)]


def measure_plain(path: Path, iterations: int) -> list[float]:
    """Go on with a database of plain sqlite3, and return the microseconds of an iteration."""
    from benchmarks.plain import go_on_plainly

    times = go_on_plainly(path, iterations, "normal")
    return [1e6 * sum(times) / len(times)]


MEASUREMENTS: dict[str, Callable[..., list[float]]] = {
    "memory": measure_memory,
    "calls": measure_calls,
    "selection": measure_selection,
    "beside": measure_beside,
    "iteration": measure_iteration,
    "idle": measure_idle,
    "day": measure_day,
    "live": measure_live,
    "plain": measure_plain,
}


if __name__ == "__main__":
    numbers = [float(word) if "." in word else int(word) for word in sys.argv[3:]]
    print(*MEASUREMENTS[sys.argv[1]](Path(sys.argv[2]), *numbers))

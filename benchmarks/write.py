"""How long an iteration takes, beside plain `sqlite3` writing the same rows.

In each round the contestants run in an order shuffled anew, in this process, each on a file of its own that is
removed afterwards; so what else the machine does meanwhile meets all of them. A round's figure is its mean over all
iterations, because that includes the checkpoints, which a median would hide. Ratios are taken within a round, and
of these the median is shown, with the smallest and the largest.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.loop import OperationTimes, time_dispatch, time_loop, time_operations, time_updates
from benchmarks.plain import write_plainly
from benchmarks.spread import Spread

__all__ = ["Claim", "WriteOptions", "WriteResult", "measure_writing", "report_writing"]

CLAIMED_MS = {1: 15.0, 10: 50.0, 100: 200.0}
"""What the ancestor claimed of an iteration, by number of agents; it kept everything in memory."""
BULK = 500


@dataclass(frozen=True)
class WriteOptions:
    """What to measure."""

    folder: Path
    agents: Sequence[int] = (1, 10, 100)
    durability: Sequence[str] = ("full", "normal")
    rounds: int = 5
    iterations: int | None = None
    """Measured in each round; None takes fewer the more agents there are."""
    calls: int = 5000
    seed: int = 0

    def iterations_of(self, agents: int) -> int:
        return self.iterations or max(100, 1000 // agents)

    @property
    def warm_up(self) -> int:
        return 5


@dataclass(frozen=True)
class WriteResult:
    """One number of agents at one durability; each spread is over the rounds."""

    agents: int
    durability: str
    iterations: int
    iteration_ms: Spread
    p99_ms: float
    """99 of 100 iterations of all rounds took no longer."""
    plain_ms: Spread
    ratio: Spread
    """The whole iteration to plain sqlite3."""
    commit_ms: Spread
    commit_ratio: Spread
    """The commit alone to plain sqlite3."""
    own_us_per_tick: Spread
    """What is not the commit, hooks included, for each agent."""


@dataclass(frozen=True)
class Claim:
    """What the ancestor claimed, and what was measured."""

    what: str
    claimed_ms: float
    measured_ms: float

    @property
    def is_met(self) -> bool:
        return self.measured_ms < self.claimed_ms


@dataclass(frozen=True)
class Writing:
    """Everything measured."""

    results: list[WriteResult]
    empty_ms: dict[int, Spread]
    """An iteration in which nothing changes, by number of agents."""
    calls: OperationTimes
    """One call in a hook, without the commit."""
    set_ms: Spread
    """A change of the state, its share of the commit included, 500 in an iteration."""
    dispatch_ms: Spread
    """An event from `emit` to the end of its `on_event`, its share of the commit included, 500 in an iteration."""

    @property
    def claims(self) -> list[Claim]:
        at_default = {result.agents: result for result in self.results if result.durability == "full"}
        claims = [
            Claim(f"iteration of {agents} agents", claimed, at_default[agents].iteration_ms.median)
            for agents, claimed in CLAIMED_MS.items()
            if agents in at_default
        ]
        return [
            *claims,
            Claim("event, emitted and handled", 1.0, self.dispatch_ms.median),
            Claim("state operation", 1.0, self.set_ms.median),
            Claim("empty iteration", 10.0, self.empty_ms[0].median),
        ]

    def to_dict(self) -> dict[str, Any]:
        return {
            "results": [asdict(result) for result in self.results],
            "empty_ms": {str(agents): asdict(spread) for agents, spread in self.empty_ms.items()},
            "call_us": {name: seconds * 1e6 for name, seconds in asdict(self.calls).items()},
            "set_ms": asdict(self.set_ms),
            "dispatch_ms": asdict(self.dispatch_ms),
            "claims": [{**asdict(claim), "met": claim.is_met} for claim in self.claims],
        }


def measure_writing(options: WriteOptions, progress: Callable[[str], None]) -> Writing:
    """Measure everything; `progress` is told what comes next."""
    shuffle = random.Random(options.seed)
    results = []
    for agents in options.agents:
        for durability in options.durability:
            progress(f"iterations of {agents} agents, {durability}")
            results.append(_compare(options, agents, durability, shuffle))
    progress("empty iterations, single operations")
    empty_ms = {agents: Spread.of(_empty(options, agents)) for agents in (0, 10)}
    calls = [time_operations(_fresh(options.folder, "calls"), options.calls, "full") for _ in range(options.rounds)]
    best = OperationTimes(*(statistics.median(getattr(c, name) for c in calls) for name in ("set", "get", "emit")))
    set_ms = _each(options, time_updates)
    dispatch_ms = _each(options, time_dispatch)
    return Writing(results, empty_ms, best, set_ms, dispatch_ms)


def _compare(options: WriteOptions, agents: int, durability: str, shuffle: random.Random) -> WriteResult:
    iterations, warm_up = options.iterations_of(agents), options.warm_up
    all_s: list[float] = []
    rounds: list[tuple[float, float, float]] = []
    for _ in range(options.rounds):
        plain_ms = ours_ms = commit_ms = 0.0
        for contestant in shuffle.sample(("ours", "plain"), 2):
            path = _fresh(options.folder, contestant)
            if contestant == "plain":
                plain_ms = 1000 * statistics.fmean(write_plainly(path, agents, warm_up, iterations, durability))
            else:
                times = time_loop(path, agents, warm_up, iterations, durability)
                all_s += times.iterations
                ours_ms, commit_ms = 1000 * statistics.fmean(times.iterations), 1000 * statistics.fmean(times.commits)
            _remove(path)
        rounds.append((ours_ms, plain_ms, commit_ms))
    all_s.sort()
    return WriteResult(
        agents,
        durability,
        iterations,
        Spread.of([ours for ours, _, _ in rounds]),
        1000 * all_s[int(len(all_s) * 0.99)],
        Spread.of([plain for _, plain, _ in rounds]),
        Spread.of([ours / plain for ours, plain, _ in rounds]),
        Spread.of([commit for _, _, commit in rounds]),
        Spread.of([commit / plain for _, plain, commit in rounds]),
        Spread.of([1000 * (ours - commit) / agents for ours, _, commit in rounds]),
    )


def _empty(options: WriteOptions, agents: int) -> list[float]:
    """Return milliseconds of an iteration in which nothing happens, round by round."""
    iterations = 2 * options.iterations_of(1)
    figures = []
    for _ in range(options.rounds):
        path = _fresh(options.folder, "empty")
        times = time_loop(path, agents, options.warm_up, iterations, "full", idle=True)
        figures.append(1000 * statistics.fmean(times.iterations))
        _remove(path)
    return figures


def _each(options: WriteOptions, measure: Callable[[Path, int, int], list[float]]) -> Spread:
    """Return milliseconds of one of many operations of an iteration."""
    figures = []
    for _ in range(options.rounds):
        path = _fresh(options.folder, "each")
        figures.append(1000 * statistics.fmean(measure(path, BULK, 10)) / BULK)
        _remove(path)
    return Spread.of(figures)


def _fresh(folder: Path, name: str) -> Path:
    path = folder / f"{name}.db"
    _remove(path)
    return path


def _remove(path: Path) -> None:
    for file in path.parent.glob(f"{path.name}*"):
        file.unlink()


def report_writing(writing: Writing) -> str:
    """Return the figures as text."""
    lines = [
        "An iteration of N agents, each of which sets a key and emits an event; mean of a round, median over rounds:",
        "",
        f"{'N':>4} {'durability':<10} {'iteration ms':>22} {'p99 ms':>8} {'plain sqlite3 ms':>22} {'ratio':>19} "
        f"{'commit ms':>22} {'its ratio':>19} {'loop µs/tick':>20}",
    ]
    for r in writing.results:
        lines.append(
            f"{r.agents:>4} {r.durability:<10} {format(r.iteration_ms, '.2f'):>22} {r.p99_ms:>8.2f} "
            f"{format(r.plain_ms, '.2f'):>22} {format(r.ratio, '.2f'):>19} {format(r.commit_ms, '.2f'):>22} "
            f"{format(r.commit_ratio, '.2f'):>19} {format(r.own_us_per_tick, '.0f'):>20}"
        )
    calls = writing.calls
    lines += [
        "",
        *(f"Empty iteration, {agents} agents: {ms:.3f} ms" for agents, ms in writing.empty_ms.items()),
        f"One call in a hook: set {calls.set * 1e6:.1f} µs, get {calls.get * 1e6:.1f} µs, "
        f"emit {calls.emit * 1e6:.1f} µs",
        f"With its share of the commit, {BULK} in an iteration: change of the state {writing.set_ms:.3f} ms, "
        f"event emitted and handled {writing.dispatch_ms:.3f} ms",
        "",
        "What the ancestor claimed, in memory, beside the median at durability full:",
        *(
            f"  {claim.what:<28} {claim.measured_ms:>9.3f} ms   below {claim.claimed_ms:g} ms: "
            f"{'met' if claim.is_met else 'NOT MET'}"
            for claim in writing.claims
        ),
    ]
    return "\n".join(lines)

"""One durable step of an agent beside what a peer calls a step, a checkpoint, a save, a task or a job.

All of them run in one go: each contestant is a process of its own (`peer.py`) on a file of its own in the same
folder, and within a round they take several turns, in an order shuffled anew each time. Ratios are taken within a
round, at the same durability, and after each turn the rows are counted.

Three comparisons are kept apart, because they say different things:

- alone: an iteration of one agent beside one operation of the peer. Nothing is batched.
- step: the tenth part of an iteration of ten agents beside one operation of the peer. The loop commits ten agents
  at once, the peer each for itself: most of this ratio is that.
- together: an iteration of ten agents beside an operation of the peer that takes ten agents at once too.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.environment import PACKAGES, ROOT, find_packages, peers_python
from benchmarks.spread import Spread

__all__ = ["Comparison", "PeerOptions", "Peers", "measure_peers", "report_peers"]

Kind = Literal["alone", "step", "together"]

OPERATIONS = {
    "ael 1": 300,
    "ael 10": 100,
    "ancestor 1": 2000,
    "ancestor 10": 500,
    "dbos": 40,
    "dbos 10": 40,
    "langgraph": 200,
    "langgraph 10": 100,
    "eventsourcing": 200,
    "eventsourcing 10": 60,
    "huey": 100,
    "apscheduler": 60,
}
"""How many each contestant does in a round: about as long a time for each."""
TURNS = 4
"""In a round each comes so often: what a disk's sync takes changes within seconds."""

UNITS = {
    "dbos": "a step of a workflow",
    "dbos 10": "a step that does the work of ten agents",
    "langgraph": "a checkpoint of one agent's value",
    "langgraph 10": "a checkpoint of ten values, and their writes",
    "eventsourcing": "a save of an aggregate",
    "eventsourcing 10": "a save of ten aggregates",
    "huey": "a task, enqueued and executed",
    "apscheduler": "a job, added",
    "ancestor 1": "an iteration of one agent in memory",
    "ancestor 10": "an iteration of ten agents in memory",
}
SHIPPED = ("dbos", "apscheduler")
"""Those that leave SQLite a rollback journal, unless they are made to use a log; both are measured."""

GOALS: dict[tuple[str, Kind], float] = {
    ("dbos", "alone"): 3.0,
    ("langgraph", "alone"): 1.0,
    ("eventsourcing", "alone"): 1.0,
    ("huey", "alone"): 1.0,
    ("apscheduler", "alone"): 1.0,
    ("dbos", "step"): 20.0,
    ("langgraph", "step"): 10.0,
    ("eventsourcing", "step"): 10.0,
    ("huey", "step"): 10.0,
    ("ancestor 10", "together"): 0.5,
}
"""At least so many times as fast."""


@dataclass(frozen=True)
class PeerOptions:
    """What to measure."""

    folder: Path
    levels: Sequence[str] = ("full", "normal")
    rounds: int = 5
    share: float = 1.0
    """Of the operations of a round: less than 1 for a quick look."""
    seed: int = 0


@dataclass(frozen=True)
class Comparison:
    """How many times as fast the loop is, at one level of durability."""

    peer: str
    kind: Kind
    level: str
    pragmas: str
    """Journal mode and `synchronous` of the peer, read back from its own connections."""
    peer_us: Spread
    """One operation of the peer."""
    times: Spread
    """Ratios of the rounds: above 1 the loop is faster."""
    goal: float | None

    @property
    def verdict(self) -> str:
        """What can be said, given how far the rounds lie apart."""
        low, high = self.times.min, self.times.max
        if self.goal is None:
            if low > 1.05:
                return "faster"
            return "slower" if high < 1 / 1.05 else "no difference shown"
        if low >= self.goal:
            return f"at least {self.goal:g}: met"
        return f"at least {self.goal:g}: {'NOT met' if high < self.goal else 'not shown, rounds differ'}"

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "verdict": self.verdict}


@dataclass(frozen=True)
class Peers:
    """Everything measured."""

    versions: dict[str, str]
    absent: list[str]
    failed: dict[str, str]
    """Peers that are there and did not run, with what they said."""
    loop_us: dict[str, dict[str, Spread]]
    """An iteration, by durability and number of agents."""
    loop_pragmas: dict[str, str]
    comparisons: list[Comparison]

    def to_dict(self) -> dict[str, Any]:
        return {
            "versions": self.versions,
            "absent": self.absent,
            "failed": self.failed,
            "loop_us": {level: {n: asdict(s) for n, s in found.items()} for level, found in self.loop_us.items()},
            "loop_pragmas": self.loop_pragmas,
            "comparisons": [comparison.to_dict() for comparison in self.comparisons],
        }


class ContestantFailed(Exception):
    """A contestant ended or wrote other rows than it should have."""


class _Process:
    """A contestant in a process of its own, driven round by round."""

    def __init__(self, name: str, level: str, folder: Path, share: float) -> None:
        self.name = name
        self.agents = int(name.partition(" ")[2] or 1)
        self.operations = max(2, round(OPERATIONS[name] * share))
        self.done = 0
        self.pragmas = ""
        self.seconds: list[float] = []
        folder.mkdir()
        ours = name.startswith(("ael ", "ancestor "))
        python = sys.executable if ours else str(peers_python())
        self._errors = (folder / "stderr").open("w+")
        self._process = subprocess.Popen(
            [python, "-m", "benchmarks.peer", name, str(folder), level],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def start(self) -> None:
        """Wait until it is there, and warm it up."""
        self._answer()
        self._do(max(2, self.operations // 10))

    def begin_round(self) -> None:
        self.seconds.append(0.0)

    def turn(self) -> None:
        """Have it do its share of a round, and add the seconds to those of one operation."""
        operations = max(1, self.operations // TURNS)
        self.seconds[-1] += self._do(operations) / operations / TURNS

    def _do(self, operations: int) -> float:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{operations}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # what it said is read below
        answer = self._answer()
        self.done += operations
        self.pragmas = ", ".join(answer["pragmas"])
        if answer["rows"] != self.agents * self.done:
            raise ContestantFailed(f"{answer['rows']} rows after {self.done} operations of {self.agents}")
        return float(answer["seconds"])

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._errors.seek(0)
            said = self._errors.read().strip().splitlines()
            raise ContestantFailed(said[-1] if said else f"it ended with {self._process.returncode}")
        found: dict[str, Any] = json.loads(line)
        return found

    def stop(self) -> None:
        """End the process."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()


def measure_peers(options: PeerOptions, progress: Callable[[str], None]) -> Peers:
    """Measure everything; `progress` is told what comes next."""
    versions = find_packages()
    shuffle = random.Random(options.seed)
    failed: dict[str, str] = {}
    loop_us: dict[str, dict[str, Spread]] = {}
    loop_pragmas: dict[str, str] = {}
    comparisons: list[Comparison] = []
    for level in options.levels:
        ran = _measure_level(options, level, list(versions), shuffle, failed, progress)
        alone, ten = ran["ael 1", level], ran["ael 10", level]
        loop_us[level] = {"1": _us(alone.seconds), "10": _us(ten.seconds)}
        loop_pragmas[level] = alone.pragmas
        for (name, at), contestant in ran.items():
            if not name.startswith("ael "):
                comparisons += _compare(contestant, at, alone, ten)
    absent = [PACKAGES[peer] for peer in PACKAGES if peer not in versions]
    return Peers(versions, absent, failed, loop_us, loop_pragmas, comparisons)


def _measure_level(
    options: PeerOptions,
    level: str,
    peers: Sequence[str],
    shuffle: random.Random,
    failed: dict[str, str],
    progress: Callable[[str], None],
) -> dict[tuple[str, str], _Process]:
    """Run all rounds of one level; returns those that came through, by name and level."""
    wanted = [(name, level) for name in OPERATIONS if name.split(" ")[0] in ("ael", "ancestor", *peers)]
    if level == "full":
        wanted += [(name, "shipped") for name in SHIPPED if name in peers]
    ran: dict[tuple[str, str], _Process] = {}

    def attempt(place: tuple[str, str], step: Callable[[], None]) -> None:
        try:
            step()
        except ContestantFailed as error:
            if place[0].startswith(("ael ", "ancestor ")):
                raise
            failed[" ".join(place)] = str(error)
            ran.pop(place).stop()

    try:
        progress(f"starting {len(wanted)} contestants, {level}")
        for name, at in wanted:
            folder = options.folder / f"{name} {at} of {level}"
            ran[name, at] = process = _Process(name, at, folder, options.share)
            attempt((name, at), process.start)
        for number in range(1, options.rounds + 1):
            progress(f"round {number} of {options.rounds}, {level}")
            for process in ran.values():
                process.begin_round()
            for _ in range(TURNS):
                for place in shuffle.sample(list(ran), len(ran)):
                    attempt(place, ran[place].turn)
    finally:
        for process in ran.values():
            process.stop()
    return ran


def _compare(peer: _Process, level: str, alone: _Process, ten: _Process) -> list[Comparison]:
    def comparison(kind: Kind, ours: Sequence[float]) -> Comparison:
        times = [theirs / mine for theirs, mine in zip(peer.seconds, ours, strict=True)]
        pragmas = "in memory" if peer.name.startswith("ancestor") else peer.pragmas
        goal = GOALS.get((peer.name, kind))
        return Comparison(peer.name, kind, level, pragmas, _us(peer.seconds), Spread.of(times), goal)

    if peer.agents == 10:
        return [comparison("together", ten.seconds)]
    if peer.name.startswith("ancestor"):
        return [comparison("alone", alone.seconds)]
    return [comparison("alone", alone.seconds), comparison("step", [seconds / 10 for seconds in ten.seconds])]


def _us(seconds: Sequence[float]) -> Spread:
    return Spread.of([1e6 * figure for figure in seconds])


TITLES: dict[Kind, str] = {
    "alone": "One agent, nothing batched: an iteration beside one operation of the peer",
    "step": "Ten agents in one commit: a tenth of the iteration beside one operation, which the peer commits by itself",
    "together": "Ten agents on both sides: an iteration beside one operation that takes all ten",
}


def report_peers(found: Peers) -> str:
    """Return the figures as text."""
    lines = []
    for level, iterations in found.loop_us.items():
        lines.append(
            f"The loop, {level} ({found.loop_pragmas[level]}): an iteration of 1 agent {iterations['1']:.0f} µs, "
            f"of 10 agents {iterations['10']:.0f} µs"
        )
    for kind, title in TITLES.items():
        lines += ["", f"{title}; times as fast:"]
        for c in found.comparisons:
            if c.kind == kind:
                lines.append(
                    f"  {c.peer.split(' ')[0]:<14} {UNITS[c.peer]:<46} {c.level:<8} {c.pragmas:<14} "
                    f"{format(c.peer_us, '.0f'):>22} µs {format(c.times, '.2f'):>22}  {c.verdict}"
                )
    lines.append("")
    if found.versions:
        lines.append(f"Peers: {', '.join(f'{PACKAGES[peer]} {number}' for peer, number in found.versions.items())}")
    if found.absent:
        lines.append(f"Absent, not measured: {', '.join(found.absent)} (`./dev bench peers --install` installs them)")
    lines += [f"Failed: {name}: {said}" for name, said in found.failed.items()]
    return "\n".join(lines)

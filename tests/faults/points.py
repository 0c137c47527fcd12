"""SIGKILL at each named point between the first unit and the end of the commit, and at those of start and stop.

A point is a place before or after a step of the product: a function (`Run.commit`), or a statement that a commit
makes (`INSERT ticks`). The process under test wraps these at run time and kills itself at the n-th crossing. One
life without a kill shows which points there are and how often they are crossed; then there is one life for each
point and the first, the second and the last crossing, on a new database and on one that a crash has left.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial, wraps
from importlib import import_module
from pathlib import Path
from typing import Any

from ael_store.clock import SystemClock
from ael_store.runtime import iteration, lifecycle
from ael_store.store.writer import Writer
from tests.faults.invariants import Ledger, tally
from tests.faults.life import Life, Notes, live, note_steps, shorten_log
from tests.faults.trial import Report, Tell

__all__ = ["Case", "Verdict", "cases_of", "run", "run_cases", "watch"]

NAME = "SIGKILL at named points"
ROOT = Path(__file__).parents[2]
ITERATIONS = 5
"""How long the lives are, where nobody kills them."""
BATCH = 40
"""Cases that one process does."""

PLACES = {
    "ael_store.store.store": ("create_database", "current_revision", "empty_log"),
    "ael_store.store.store:Store": ("open", "_prepare", "commit", "close"),
    "ael_store.store.checkpoint": ("_move", "_checkpoint"),
    "ael_store.store.unit_note:UnitNote": ("begin", "end"),
    "ael_store.store.lock:DatabaseLock": ("acquire", "describe", "release"),
    "ael_store.store.reader:Reader": ("resume", "last_ids", "pending_count", "event_types", "pending"),
    "ael_store.store.writer:Writer": ("write", "_write", "_write_changes"),
    "ael_store.model.state:State": ("apply", "committed"),
    "ael_store.runtime.journal:Journal": ("apply", "take", "done"),
    "ael_store.runtime.outside:Outside": ("take",),
    "ael_store.runtime.run:Run": ("add_agent", "commit", "_write"),
    "ael_store.runtime.roster:Roster": ("count", "save_metadata"),
    "ael_store.runtime.delivery:Deliveries": ("route", "settle", "ended", "refilled"),
    "ael_store.runtime.tick:Workbench": ("run", "_execute"),
    "ael_store.runtime.control:ControlServer": ("start", "stop"),
    "ael_store.runtime.iteration": (
        "run_iteration",
        "reconcile",
        "collect_late",
        "collect_outside",
        "select",
        "tick",
        "deliver",
        "_refill",
        "settle",
        "commit",
    ),
    "ael_store.runtime.lifecycle:Lifecycle": (
        "begin",
        "_take_over",
        "_blame",
        "_open_note",
        "_open_control",
        "_start_agents",
        "main",
        "end",
        "_drain",
        "_shut_down",
        "close",
    ),
}
"""Where the points are: modules and classes, and functions in them. One that is renamed is named here anew."""

STATEMENT = re.compile(r"(BEGIN|COMMIT|ROLLBACK)|(INSERT|UPDATE|DELETE|SELECT)\s(?:.*?(?:INTO|FROM)\s+)?(\w+)", re.S)

Cross = Callable[[str], None]


@dataclass(frozen=True)
class Case:
    """One life: on what, and where it ends."""

    base: str
    """`new` database, or one `left` by a crash."""
    point: str
    crossing: int
    broken: str | None = None
    """How the store is broken on purpose."""

    def __str__(self) -> str:
        how = f", with the store broken by {self.broken}" if self.broken else ""
        return f"{self.point} for the {self.crossing}. time on a database {self.base}{how}"


@dataclass(frozen=True)
class Verdict:
    """What came of a case."""

    case: Case
    reached: bool
    """False where the life ended before it came to the point so often."""
    found: tuple[str, ...]


def run(*, count: int, seed: int, workers: int, tell: Tell, folder: Path) -> Report:
    """Kill a life at each point; with `count`, at so many of them, drawn by the seed."""
    began = time.monotonic()
    every = cases_of(folder, seed)
    points = {case.point for case in every}
    chosen = every if count == 0 else random.Random(seed).sample(every, min(count, len(every)))
    tell(f"{len(chosen)} of {len(every)} cases at {len(points)} points")
    verdicts = run_cases(chosen, folder, seed=seed, workers=workers, tell=tell)
    found = [text for verdict in verdicts for text in verdict.found]
    reached = [verdict for verdict in verdicts if verdict.reached]
    missed = len(verdicts) - len(reached)
    return Report(
        NAME,
        len(reached),
        **tally(found),
        note=f"{len({verdict.case.point for verdict in reached})} of {len(points)} points, {missed} cases not reached, "
        f"{time.monotonic() - began:.0f} s; seed {seed}",
        failures=tuple(found),
    )


def cases_of(folder: Path, seed: int, broken: str | None = None) -> list[Case]:
    """Return all cases there are: one life on each kind of database shows which points it crosses, and how often."""
    crossed = _in_a_process(folder, seed, {"broken": broken})
    return [
        Case(base, point, crossing, broken)
        for base, points in crossed.items()
        for point, times in points.items()
        for crossing in sorted({1, min(2, times), times})
    ]


def run_cases(
    cases: Sequence[Case], folder: Path, *, seed: int, workers: int, tell: Tell, until_caught: bool = False
) -> list[Verdict]:
    """Do the cases in processes of their own, each until its first violation if so wished; return what came of each."""
    batches = [cases[start : start + BATCH] for start in range(0, len(cases), BATCH)]
    done: list[Verdict] = []

    def one(number: int) -> None:
        place = folder / f"batch-{number}"
        place.mkdir()
        answer = _in_a_process(
            place, seed, {"cases": [asdict(case) for case in batches[number]], "until_caught": until_caught}
        )
        done.extend(Verdict(Case(**item["case"]), item["reached"], tuple(item["found"])) for item in answer["verdicts"])
        tell(f"{len(done)} of {len(cases)} cases, {sum(bool(item.found) for item in done)} with violations")

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(one, range(len(batches))))
    return done


def _in_a_process(place: Path, seed: int, order: dict[str, Any]) -> Any:
    """Have a fresh process, which may fork because it has no threads, carry out an order."""
    command = [sys.executable, "-m", "tests.faults.points", str(place), str(seed)]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("AEL_")}
    with subprocess.Popen(
        command, cwd=ROOT, env=clean, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        try:
            output, errors = process.communicate(json.dumps(order).encode(), timeout=60 + 60 * BATCH)
        except BaseException:
            process.kill()
            raise
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{errors.decode()}")
    return json.loads(output)


# -- in the process that forks the lives ---------------------------------------------------------------


class Bench:
    """Runs lives that end at a point, each on a fresh copy of a database."""

    def __init__(self, place: Path, seed: int) -> None:
        self.place, self.seed, self.log = place, seed, place / "log"
        self.left = place / "left" / "ael.db"
        for owner, name in _places():  # a point that is not there any more is no violation of the product
            if not hasattr(owner, name):
                raise AssertionError(f"PLACES in {__file__} names {owner.__name__}.{name}, which is not there any more")
        self.number = 0

    def prepare(self) -> None:
        """Make the database that a crash has left: some iterations, then a kill between two statements."""
        self.left.parent.mkdir()
        self._live(self.left, Notes(), Case("left", "INSERT ticks after", 14), iterations=None)

    def crossed(self, base: str, broken: str | None) -> dict[str, int]:
        """Return how often each point is crossed in a life that nobody kills."""
        path, file = self._database(base), self.place / f"points-{base}.json"
        notes = Notes()

        def task() -> None:
            points: Counter[str] = Counter()
            self._set_up(notes, lambda point: points.update((point,)), broken)
            live(path, notes, iterations=ITERATIONS, durability="normal")
            file.write_text(json.dumps(points))

        with Life(task, self.log) as life:
            hang = life.wait_for(lambda: False, "clean end")
            if hang is not None or life.status != 0:
                raise RuntimeError(f"a life without a kill ended with {life.status}: {hang or self.log.read_text()}")
        found: dict[str, int] = json.loads(file.read_text())
        return found

    def judge(self, case: Case) -> Verdict:
        """Run a life that ends at the point, start again, and return what is wrong."""
        path = self._database(case.base)
        ledger, notes = Ledger(path), Notes()
        found = ledger.look()  # what was there before it
        reached, problem = self._live(path, notes, case, iterations=ITERATIONS)
        found += problem + ledger.look()
        if ledger.commit_id < notes.commit_id:
            found.append(f"lost: commit {notes.commit_id} was durable, the last one is {ledger.commit_id}")
        orders = int(ledger.value("orders") or 0)
        if orders < notes.orders:
            found.append(f"lost: transact returned {notes.orders}, the state says {orders}")
        if not case.broken:  # it is the invariants that must notice a broken store, not the next start
            before = ledger.iteration
            with Life(partial(live, path, notes, iterations=3, durability="normal"), self.log) as again:
                problem = [text] if (text := again.wait_for(lambda: False, "clean end")) else []
            found += problem + ledger.look() + ledger.check()
            if again.status != 0:
                found.append(f"wrong: the next start ended with status {again.status}, see {self.log}")
            elif ledger.iteration < before + 3:
                found.append(f"wrong: after the next start there are {ledger.iteration} iterations, before {before}")
        if not found:
            shutil.rmtree(path.parent)
        where = f"(killed at {case}, seed {self.seed}; {path})"
        return Verdict(case, reached, tuple(f"{text} {where}" for text in found))

    def _database(self, base: str) -> Path:
        """Return the path of a database of this kind that nobody else has."""
        self.number += 1
        folder = self.place / f"case-{self.number}"
        if base == "left":
            shutil.copytree(self.left.parent, folder, ignore=shutil.ignore_patterns("*.sock"))
        else:
            folder.mkdir()
        return folder / "ael.db"

    def _live(self, path: Path, notes: Notes, case: Case, iterations: int | None) -> tuple[bool, list[str]]:
        """Run a life to its point; returns whether it came there, and what is wrong with how it ended."""

        def cross(point: str) -> None:
            if point == case.point:
                notes.crossings += 1
                if notes.crossings == case.crossing:
                    os.kill(os.getpid(), signal.SIGKILL)

        def task() -> None:
            self._set_up(notes, cross, case.broken)
            live(path, notes, iterations=iterations, durability="normal")

        with Life(task, self.log) as life:
            hang = life.wait_for(lambda: False, "end")
        if hang is not None:
            return False, [hang]
        if life.was_killed or life.status == 0:
            return life.was_killed, []
        return False, [f"wrong: a life ended by itself with status {life.status}, see {self.log}"]

    def _set_up(self, notes: Notes, cross: Cross, broken: str | None) -> None:
        numbers = random.Random(self.seed)
        SystemClock.seed = lambda self: numbers.getrandbits(31)  # type: ignore[method-assign]
        note_steps(notes)
        shorten_log(30)
        if broken is not None:
            import_module("tests.faults.broken_store").break_store(broken)
        watch(cross)


def watch(cross: Cross) -> None:
    """Have this process call `cross` with the name of each point that it comes to."""
    for owner, name in _places():
        label = f"{owner.__name__.rpartition('.')[2]}.{name}"
        setattr(owner, name, _watched(getattr(owner, name), label, cross))
    for name in ("run_iteration", "settle"):  # which the lifecycle has imported by name
        setattr(lifecycle, name, getattr(iteration, name))
    write = Writer.write
    Writer.write = lambda self, connection, *more: write(self, _Connection(connection, cross), *more)  # type: ignore[method-assign]


def _places() -> Iterator[tuple[Any, str]]:
    """Yield each module or class with each name in it that is a point."""
    for place, names in PLACES.items():
        module, _, kind = place.partition(":")
        owner = import_module(module)
        for name in names:
            yield (getattr(owner, kind) if kind else owner), name


def _watched(function: Callable[..., Any], label: str, cross: Cross) -> Callable[..., Any]:
    if asyncio.iscoroutinefunction(function):

        @wraps(function)
        async def watched(*arguments: Any, **options: Any) -> Any:
            cross(f"{label} before")
            result = await function(*arguments, **options)
            cross(f"{label} after")
            return result
    else:

        @wraps(function)
        def watched(*arguments: Any, **options: Any) -> Any:
            cross(f"{label} before")
            result = function(*arguments, **options)
            cross(f"{label} after")
            return result

    return watched


class _Connection:
    """The driver's connection, each of its statements a point."""

    def __init__(self, connection: Any, cross: Cross) -> None:
        self._connection = connection
        self._cross = cross

    def cursor(self) -> _Cursor:
        return _Cursor(self._connection.cursor(), self._cross)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)


class _Cursor:
    def __init__(self, cursor: Any, cross: Cross) -> None:
        self._cursor = cursor
        self._cross = cross

    def execute(self, sql: str, *more: Any) -> Any:
        return self._crossing(self._cursor.execute, sql, *more)

    def executemany(self, sql: str, *more: Any) -> Any:
        return self._crossing(self._cursor.executemany, sql, *more)

    def _crossing(self, function: Callable[..., Any], sql: str, *more: Any) -> Any:
        label = _label(sql)
        self._cross(f"{label} before")
        result = function(sql, *more)
        self._cross(f"{label} after")
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cursor, name)


def _label(sql: str) -> str:
    """Return what a statement does to which table."""
    match = STATEMENT.match(sql)
    if match is None:
        raise AssertionError(f"a commit makes a statement that has no name here: {sql}")
    return match[1] or f"{match[2]} {match[3]}"


def main(place: str, seed: str) -> None:
    """Carry out an order that comes as JSON: name all points, or run cases."""
    order = json.load(sys.stdin)
    bench = Bench(Path(place), int(seed))
    bench.prepare()
    if "cases" in order:
        verdicts: list[Verdict] = []
        for case in order["cases"]:
            verdicts.append(bench.judge(Case(**case)))
            if verdicts[-1].found and order["until_caught"]:
                break
        print(json.dumps({"verdicts": [asdict(verdict) for verdict in verdicts]}))
    else:
        print(json.dumps({base: bench.crossed(base, order["broken"]) for base in ("new", "left")}))


if __name__ == "__main__":
    main(*sys.argv[1:])

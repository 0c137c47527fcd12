"""What tasks cost: the clock beside a hundred that are open, a submit, and the way from a submit to its `on_task`.

Everything is measured through the public API on real files, and beside something: the clock without tasks, an empty
table, the same rows by plain `sqlite3`.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import sqlite3
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson

from ael_store import AELController, AgentBase, AgentManager, EventBus, Settings, StateContext, task
from benchmarks.spread import Spread

__all__ = ["TaskOptions", "Tasks", "measure_tasks", "report_tasks", "time_plain_rows", "time_submits", "time_way"]

OPEN = 100
SUBMITS = 100
"""Tasks submitted in one iteration."""
CHUNK = 50_000
LONG_S = 30.0


@dataclass(frozen=True)
class TaskOptions:
    """What to measure."""

    folder: Path
    rounds: int = 5
    ticks: int = 100
    """Of the agent of 1 Hz, in each of the two measurements."""
    period: float = 1.0
    finished: int = 1_000_000
    """Tasks that have ended, in the table of the second contestant."""
    tasks: int = 2_000
    """Submitted, run and taken up in each round."""


@dataclass(frozen=True)
class Tasks:
    """What was measured."""

    lateness_alone_ms: dict[str, float]
    """Of a tick after its slot: median, p99 and largest."""
    lateness_beside_ms: dict[str, float]
    """The same beside a hundred open tasks."""
    submit_empty_us: Spread
    """Of a submit: an iteration with a hundred, less one with none, for each."""
    submit_long_us: Spread
    """The same with a long table."""
    submit_ratio: Spread
    """Long by empty, round by round, with keys that `submit` makes, which grow with time."""
    random_ratio: Spread
    """The same with random keys, each of which is on another page of a long index."""
    finished: int
    way_per_s: Spread
    """Tasks a second from submit over attempt to on_task, back to back."""
    plain_per_s: Spread
    """The same rows by plain sqlite3, as many commits for each task in turn."""
    way_ratio: Spread
    """Time of the loop by time of plain sqlite3, round by round."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure_tasks(options: TaskOptions, progress: Callable[[str], None]) -> Tasks:
    """Measure everything; `progress` is told what comes next."""
    folder = options.folder
    progress(f"lateness of {options.ticks} ticks of {options.period:g} s")
    alone = _lateness(folder / "alone.db", 0, options)
    progress(f"the same beside {OPEN} open tasks")
    beside = _lateness(folder / "beside.db", OPEN, options)

    empty, long = folder / "empty.db", folder / "long.db"
    time_submits(empty, 1)
    time_submits(long, 1)
    progress(f"{options.finished:,} finished tasks")
    fill(long, options.finished)
    submits: list[tuple[float, float]] = []
    randomly: list[tuple[float, float]] = []
    for number in range(1, options.rounds + 1):
        progress(f"submits, round {number} of {options.rounds}")
        submits.append((time_submits(empty, 20), time_submits(long, 20)))
        randomly.append((time_submits(empty, 20, random_keys=True), time_submits(long, 20, random_keys=True)))

    ways: list[tuple[float, float]] = []
    for number in range(1, options.rounds + 1):
        progress(f"submit, attempt and on_task, round {number} of {options.rounds}")
        took, iterations = time_way(folder / f"way-{number}.db", options.tasks)
        ways.append((took, time_plain_rows(folder / f"plain-{number}.db", options.tasks, iterations)))
    return Tasks(
        alone,
        beside,
        Spread.of([one * 1e6 for one, _ in submits]),
        Spread.of([other * 1e6 for _, other in submits]),
        Spread.of([other / one for one, other in submits]),
        Spread.of([other / one for one, other in randomly]),
        options.finished,
        Spread.of([options.tasks / took for took, _ in ways]),
        Spread.of([options.tasks / plain for _, plain in ways]),
        Spread.of([took / plain for took, plain in ways]),
    )


def report_tasks(tasks: Tasks) -> str:
    """Return the figures as text."""

    def late(figures: dict[str, float]) -> str:
        return f"p50 {figures['p50']:.2f}, p99 {figures['p99']:.2f}, largest {figures['max']:.2f} ms"

    return "\n".join(
        (
            f"Lateness of an agent of 1 Hz: {late(tasks.lateness_alone_ms)}; beside {OPEN} open tasks of "
            f"{LONG_S:.0f} s: {late(tasks.lateness_beside_ms)}",
            f"A submit, {SUBMITS} in an iteration, with its part of the commit: {tasks.submit_empty_us:.1f} µs with an "
            f"empty table, {tasks.submit_long_us:.1f} µs with {tasks.finished:,} finished tasks; ratio "
            f"{tasks.submit_ratio:.2f}, with random keys {tasks.random_ratio:.2f}",
            f"Submit, attempt and on_task, back to back: {tasks.way_per_s:,.0f} tasks/s; the same rows by plain "
            f"sqlite3: {tasks.plain_per_s:,.0f} tasks/s; ratio of times {tasks.way_ratio:.2f}",
        )
    )


# -- the clock beside open tasks --------------------------------------------------------------------


class Sleeper(AgentBase):
    """Submits tasks that only wait, and after its first ticks says how late each comes."""

    name = "sleeper"
    priority = 10

    def __init__(self, open: int) -> None:
        super().__init__()
        self.open = open
        self.moments: list[float] = []

    async def on_start(self, context: StateContext) -> None:
        for _ in range(self.open):
            context.submit(self.wait)

    async def on_tick(self, context: StateContext) -> None:
        self.moments.append(time.monotonic())
        context.set("tick", self.tick_count)

    @task(timeout=0)
    async def wait(self, attempt: Any) -> None:
        await asyncio.sleep(LONG_S)


def lateness(moments: Sequence[float], period: float) -> list[float]:
    """Return by how many seconds each came after its slot; the slots begin with the earliest that fits all."""
    offsets = [moment - number * period for number, moment in enumerate(moments)]
    return [offset - min(offsets) for offset in offsets]


def _lateness(path: Path, open: int, options: TaskOptions) -> dict[str, float]:
    """Run an agent on the clock, and return how late its ticks came, in milliseconds."""
    sleeper, warm_up = Sleeper(open), 2
    controller = _controller(path, [sleeper], tick_rate=options.period, grace=0.05, tasks_at_once=max(1, open))

    async def run() -> None:
        begun = asyncio.create_task(controller.start())
        while len(sleeper.moments) < warm_up + options.ticks:
            await asyncio.sleep(options.period / 4)
            if begun.done():
                begun.result()
        if open:
            running = _count(path, "SELECT count(*) FROM v_tasks WHERE attempts > 0")
            if running != open:
                raise AssertionError(f"{running} tasks were started, wanted are {open}")
        await controller.stop()
        await begun

    asyncio.run(run())
    late = sorted(1000 * seconds for seconds in lateness(sleeper.moments[warm_up:], options.period))
    return {"p50": statistics.median(late), "p99": late[math.ceil(0.99 * len(late)) - 1], "max": late[-1]}


# -- submitting -------------------------------------------------------------------------------------


class Submitter(AgentBase):
    """Submits a hundred tasks in every other iteration; none of them starts for a long time."""

    name = "submitter"
    priority = 10

    def __init__(self, random_keys: bool) -> None:
        super().__init__()
        self.random_keys = random_keys
        self.submits = False

    async def on_tick(self, context: StateContext) -> None:
        context.set("tick", self.tick_count)
        self.submits = not self.submits
        if self.submits:
            for number in range(SUBMITS):
                key = os.urandom(16).hex() if self.random_keys else None
                context.submit(self.work, number, {"text": "a new reading was taken"}, key=key, after=100_000.0)

    @task
    async def work(self, attempt: Any, number: int, data: Any) -> int:
        return number


def time_submits(path: Path, iterations: int, *, random_keys: bool = False) -> float:
    """Return the seconds of a submit: of iterations with and without them, the difference; then cancels them all."""
    moments: list[float] = []
    submitted: list[bool] = []
    agent = Submitter(random_keys)
    controller = _controller(path, [agent], tick_rate=0)

    def observe(_summary: object) -> None:
        moments.append(time.perf_counter())
        submitted.append(agent.submits)

    controller.observe(observe)
    asyncio.run(controller.run(4 + 2 * iterations))
    took: dict[bool, list[float]] = {True: [], False: []}
    for place in range(4, len(moments)):
        took[submitted[place]].append(moments[place] - moments[place - 1])
    with closing(sqlite3.connect(path)) as connection, connection:
        # between two runs of the loop, so that the next does not load them: only ended tasks are in the table
        connection.execute(
            "UPDATE tasks SET status = 'cancelled', ended_us = created_us, applied_us = created_us "
            "WHERE applied_us IS NULL"
        )
    return (statistics.median(took[True]) - statistics.median(took[False])) / SUBMITS


def fill(path: Path, count: int) -> None:
    """Multiply the tasks of a database, all of them ended, until there are so many."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        columns = [row[1] for row in connection.execute("PRAGMA table_info(tasks)")]
        ((first,),) = connection.execute("SELECT min(id) FROM tasks").fetchall()
        ((newest,),) = connection.execute("SELECT max(id) FROM tasks").fetchall()
        values = {name: f"t.{name}" for name in columns}
        values |= {"id": "n.i", "key": "lower(hex(randomblob(16)))"}  # all over the index
        for begin in range(newest + 1, newest + count + 1, CHUNK):
            end = min(begin + CHUNK, newest + count + 1)
            connection.execute(
                f"WITH RECURSIVE n(i) AS (SELECT {begin} UNION ALL SELECT i + 1 FROM n WHERE i + 1 < {end}) "
                f"INSERT INTO tasks ({', '.join(columns)}) SELECT {', '.join(values.values())} "
                f"FROM n JOIN tasks t ON t.id = {first}"
            )
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    found = _count(path, "SELECT count(*) FROM tasks WHERE applied_us IS NOT NULL")
    if found < count:
        raise AssertionError(f"the table has {found} ended tasks, wanted are {count}")


# -- the whole way ----------------------------------------------------------------------------------


class Worker(AgentBase):
    """Submits tasks while few are open, and counts their results."""

    name = "worker"
    priority = 10

    def __init__(self, tasks: int) -> None:
        super().__init__()
        self.tasks = tasks
        self.submitted = self.applied = 0

    async def on_tick(self, context: StateContext) -> None:
        for _ in range(min(SUBMITS, self.tasks - self.submitted)):
            self.submitted += 1
            context.submit(self.work, self.submitted, {"text": "a new reading was taken"})

    @task
    async def work(self, attempt: Any, number: int, data: Any) -> dict[str, Any]:
        return {"number": number, "answer": "it is all right"}

    async def on_task(self, attempt: Any, context: StateContext) -> None:
        self.applied += 1
        context.set("answer", attempt.result)


def time_way(path: Path, tasks: int) -> tuple[float, int]:
    """Return the seconds from the first submit to the last commit of an `on_task`, and how many commits that took."""
    worker = Worker(tasks)
    controller = _controller(path, [worker], tick_rate=0)
    moments: list[float] = []
    ends: list[asyncio.Task[None]] = []

    def observe(_summary: object) -> None:
        moments.append(time.perf_counter())
        if worker.applied >= tasks and not ends:
            ends.append(asyncio.create_task(controller.stop()))
            moments.append(-1.0)

    async def run() -> None:
        begun = time.perf_counter()
        moments.append(begun)
        await controller.start()
        with contextlib.suppress(asyncio.CancelledError):
            await ends[0]

    controller.observe(observe)
    asyncio.run(run())
    found = _count(path, "SELECT count(*) FROM tasks WHERE status = 'done' AND applied_us IS NOT NULL")
    if found != tasks:
        raise AssertionError(f"{found} tasks are done and taken up, wanted are {tasks}")
    last = moments.index(-1.0) - 1
    return moments[last] - moments[1], last - 1  # the first iteration ends the start


SCHEMA = """
CREATE TABLE task (id INTEGER PRIMARY KEY, agent_id INTEGER NOT NULL, name TEXT NOT NULL, key TEXT NOT NULL UNIQUE,
                   status TEXT NOT NULL, attempts INTEGER NOT NULL, args TEXT NOT NULL, result TEXT,
                   created_us INTEGER NOT NULL, started_us INTEGER, ended_us INTEGER, applied_us INTEGER);
CREATE INDEX task_agent ON task (agent_id);
CREATE INDEX task_live ON task (id) WHERE applied_us IS NULL;
CREATE TABLE attempt (id INTEGER PRIMARY KEY, task_id INTEGER NOT NULL, number INTEGER NOT NULL, outcome TEXT NOT NULL,
                      started_us INTEGER NOT NULL, ended_us INTEGER);
CREATE INDEX attempt_task ON attempt (task_id);
CREATE INDEX attempt_open ON attempt (id) WHERE ended_us IS NULL;
CREATE TABLE state (key_id INTEGER PRIMARY KEY, value TEXT NOT NULL, version INTEGER NOT NULL);
CREATE TABLE change (id INTEGER PRIMARY KEY, key_id INTEGER NOT NULL, value TEXT, tick_id INTEGER NOT NULL);
CREATE INDEX change_key ON change (key_id);
CREATE TABLE tick (id INTEGER PRIMARY KEY, iteration INTEGER NOT NULL, kind INTEGER NOT NULL, task_id INTEGER,
                   started_us INTEGER NOT NULL, duration_us INTEGER NOT NULL);
CREATE TABLE iteration (id INTEGER PRIMARY KEY, started_us INTEGER NOT NULL, duration_us INTEGER NOT NULL);
INSERT INTO state VALUES (1, 'null', 0);
"""


def time_plain_rows(path: Path, tasks: int, commits: int) -> float:
    """Return the seconds that plain `sqlite3` takes to write the same rows in about as many commits.

    Each task is inserted as running with its attempt in one commit, both are updated in the next, and it is marked
    with a change of the state and a row for the unit in the one after: as durable as what the loop does.
    """
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = full")
        connection.executescript(SCHEMA)
        took = _write_plain_rows(connection, tasks, max(1, math.ceil(tasks / max(1, commits - 2))))
        ((found,),) = connection.execute("SELECT count(*) FROM task WHERE status = 'done' AND applied_us IS NOT NULL")
        if found != tasks:
            raise AssertionError(f"plain sqlite3 has {found} tasks, wanted are {tasks}")
    finally:
        connection.close()
    return took


def _write_plain_rows(connection: sqlite3.Connection, tasks: int, at_once: int) -> float:
    numbers = list(range(1, tasks + 1))
    batches = [numbers[start : start + at_once] for start in range(0, tasks, at_once)]
    execute, many = connection.execute, connection.executemany
    now_us = time.time_ns() // 1000
    took, changes = 0.0, 0
    for iteration in range(len(batches) + 2):
        new = batches[iteration] if iteration < len(batches) else []
        ended = batches[iteration - 1] if 0 <= iteration - 1 < len(batches) else []
        taken = batches[iteration - 2] if iteration >= 2 else []
        args = [orjson.dumps([number, {"text": "a new reading was taken"}]).decode() for number in new]
        results = [orjson.dumps({"number": number, "answer": "it is all right"}).decode() for number in taken]
        rows = [
            (n, 1, "work", f"{n:032x}", "running", 1, text, None, now_us, now_us, None, None)
            for n, text in zip(new, args, strict=True)
        ]
        written = [orjson.dumps({"number": number, "answer": "it is all right"}).decode() for number in ended]
        began = time.perf_counter()
        execute("BEGIN IMMEDIATE")
        many("INSERT INTO task VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)
        many("INSERT INTO attempt VALUES (?, ?, 1, 'running', ?, NULL)", [(n, n, now_us) for n in new])
        many(
            "UPDATE task SET status = 'done', result = ?, ended_us = ? WHERE id = ?",
            [(text, now_us, n) for n, text in zip(ended, written, strict=True)],
        )
        many("UPDATE attempt SET outcome = 'done', ended_us = ? WHERE id = ?", [(now_us, n) for n in ended])
        many("UPDATE task SET applied_us = ? WHERE id = ?", [(now_us, n) for n in taken])
        many("INSERT INTO tick VALUES (?, ?, 1, ?, ?, 10)", [(n, iteration, n, now_us) for n in taken])
        many("INSERT INTO change VALUES (?, 1, ?, ?)", [(n, text, n) for n, text in zip(taken, results, strict=True)])
        if taken:
            changes += len(taken)
            execute("UPDATE state SET value = ?, version = ? WHERE key_id = 1", (results[-1], changes))
        execute("INSERT INTO iteration VALUES (?, ?, 100)", (iteration + 1, now_us))
        execute("COMMIT")
        took += time.perf_counter() - began
    return took


def _controller(path: Path, agents: list[AgentBase], **settings: Any) -> AELController:
    manager = AgentManager()
    for agent in agents:
        manager.register(agent)
    return AELController(
        manager, EventBus(), state_context=StateContext(), store=path, settings=Settings(durability="full", **settings)
    )


def _count(path: Path, query: str) -> int:
    with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as connection:
        return int(connection.execute(query).fetchone()[0])

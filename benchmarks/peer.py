"""One contestant in a process of its own: `python -m benchmarks.peer NAME FOLDER LEVEL`.

It is driven line by line: each number read from standard input is so many operations to do, each line written to
standard output is what came of it, as JSON. So contestants with threads and environments of their own can still
take turns within a round. This file runs in the peers' environment too, and imports nothing before it is needed.

`LEVEL` is `full` or `normal`: each connection that the contestant opens gets a write-ahead log and this
`synchronous`. `shipped` leaves connections as the contestant makes them. Both are read back from its connections.
"""

from __future__ import annotations

import asyncio
import json
import os
import queue
import sqlite3
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, ClassVar, Protocol

from benchmarks.workload import event_data, value

__all__ = ["CONTESTANTS", "Contestant", "nothing"]

TOGETHER = 10
"""Agents of a contestant that takes several in one commit."""
SYNCHRONOUS = ("off", "normal", "full", "extra")


class Contestant(Protocol):
    """Something that does operations which survive the process, and can count them afterwards."""

    def run(self, operations: int) -> float:
        """Do so many operations, and return the seconds that they took."""
        ...

    def rows(self) -> int:
        """Return how many of its rows there are in its database: one for each agent and operation."""
        ...


class _Loop:
    """Iterations of this project's loop, back to back, through its public API.

    The loop runs from the beginning to the end in a thread, as the connections of the others stay open too; between
    two turns it stands still in an observer. Its first iteration begins it, and is not counted.
    """

    agents: ClassVar[int]

    def __init__(self, folder: Path, level: str) -> None:
        from ael_store import AELController, AgentManager, EventBus, Settings, StateContext
        from benchmarks.loop import Sensor

        self.path = folder / "ael.db"
        manager = AgentManager()
        for number in range(self.agents):
            manager.register(Sensor(number))
        self.controller = AELController(
            manager,
            EventBus(),
            state_context=StateContext(),
            tick_rate=0,
            store=self.path,
            durability=level,
            settings=Settings(stall_warn=0.0, stall_limit=0.0),
        )
        self.controller.observe(self._went_round)
        self.left, self.began = 1, time.perf_counter()
        self.turns: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.seconds: queue.SimpleQueue[float] = queue.SimpleQueue()
        threading.Thread(target=asyncio.run, args=(self.controller.start(),), daemon=True).start()
        self.seconds.get()

    def _went_round(self, _summary: object) -> None:
        self.left -= 1
        if self.left == 0:
            self.seconds.put(time.perf_counter() - self.began)
            self.left = self.turns.get()
            self.began = time.perf_counter()

    def run(self, operations: int) -> float:
        self.turns.put(operations)
        return self.seconds.get()

    def rows(self) -> int:
        return _count(self.path, "v_state_history WHERE key GLOB 'sensor/*'") - self.agents


class LoopOfOne(_Loop):
    agents = 1


class LoopOfTen(_Loop):
    agents = TOGETHER


class _Ancestor:
    """Iterations of the ancestor's design: nothing survives, the rows are counts in memory."""

    agents: ClassVar[int]

    def __init__(self, folder: Path, level: str) -> None:
        from benchmarks.ancestor import AncestorLoop

        self.loop = AncestorLoop(self.agents)

    def run(self, operations: int) -> float:
        return asyncio.run(self.loop.run(operations))

    def rows(self) -> int:
        return self.loop.bus.emitted


class AncestorOfOne(_Ancestor):
    agents = 1


class AncestorOfTen(_Ancestor):
    agents = TOGETHER


class DbosStep:
    """Steps of one workflow, each a result that survives."""

    agents = 1

    def __init__(self, folder: Path, level: str) -> None:
        from dbos import DBOS

        self.path = folder / "dbos.db"
        agents = self.agents
        DBOS(
            config={
                "name": "benchmark",
                "system_database_url": f"sqlite:///{self.path}",
                "log_level": "ERROR",
                "run_admin_server": False,
            }
        )

        def step(number: int) -> Any:
            readings = [value(agent, number) for agent in range(agents)]
            return readings if agents > 1 else readings[0]

        step = DBOS.step()(step)

        def workflow(operations: int) -> float:
            began = time.perf_counter()
            for number in range(operations):
                step(number)
            return time.perf_counter() - began

        self.workflow = DBOS.workflow()(workflow)
        DBOS.launch()

    def run(self, operations: int) -> float:
        return float(self.workflow(operations))

    def rows(self) -> int:
        return self.agents * _count(self.path, "operation_outputs")


class DbosStepOfTen(DbosStep):
    agents = TOGETHER


class Langgraph:
    """Checkpoints of one thread with the value of one agent."""

    agents = 1

    def __init__(self, folder: Path, level: str) -> None:
        from langgraph.checkpoint.base import empty_checkpoint
        from langgraph.checkpoint.sqlite import SqliteSaver

        self.path = folder / "langgraph.db"
        self.saver = SqliteSaver(sqlite3.connect(self.path, check_same_thread=False))
        self.saver.setup()
        self.empty = empty_checkpoint
        self.config: Any = {"configurable": {"thread_id": "1", "checkpoint_ns": ""}}
        self.number = 0

    def run(self, operations: int) -> float:
        began = time.perf_counter()
        for _ in range(operations):
            self.number += 1
            checkpoint = self.empty()
            versions = {f"agent_{agent}": self.number for agent in range(self.agents)}
            checkpoint["channel_values"] = {f"agent_{agent}": value(agent, self.number) for agent in range(self.agents)}
            checkpoint["channel_versions"] = versions
            self.config = self.saver.put(self.config, checkpoint, {"source": "loop", "step": self.number}, versions)
            if self.agents > 1:
                writes = [(name, checkpoint["channel_values"][name]) for name in versions]
                self.saver.put_writes(self.config, writes, "task")
        return time.perf_counter() - began

    def rows(self) -> int:
        return self.agents * _count(self.path, "checkpoints")


class LanggraphOfTen(Langgraph):
    agents = TOGETHER


class Eventsourcing:
    """Saves of aggregates, each with one new event."""

    agents = 1

    def __init__(self, folder: Path, level: str) -> None:
        self.path = folder / "eventsourcing.db"
        os.environ["PERSISTENCE_MODULE"] = "eventsourcing.sqlite"
        os.environ["SQLITE_DBNAME"] = str(self.path)
        from eventsourcing.application import Application
        from eventsourcing.domain import Aggregate, event

        class Agent(Aggregate):  # type: ignore[misc]  # not installed where types are checked
            def __init__(self) -> None:
                self.value: Any = None

            @event("Set")  # type: ignore[untyped-decorator]
            def set(self, value: Any) -> None:
                self.value = value

        self.application = Application()
        self.aggregates: list[Any] = [Agent() for _ in range(self.agents)]
        self.application.save(*self.aggregates)
        self.number = 0

    def run(self, operations: int) -> float:
        began = time.perf_counter()
        for _ in range(operations):
            self.number += 1
            for agent, aggregate in enumerate(self.aggregates):
                aggregate.set(value(agent, self.number))
            self.application.save(*self.aggregates)
        return time.perf_counter() - began

    def rows(self) -> int:
        return _count(self.path, "stored_events") - self.agents  # their beginnings


class EventsourcingOfTen(Eventsourcing):
    agents = TOGETHER


class Huey:
    """Tasks, each enqueued, taken, executed and its result kept, in this process."""

    def __init__(self, folder: Path, level: str) -> None:
        from huey import SqliteHuey

        self.path = folder / "huey.db"
        self.huey = SqliteHuey("benchmark", filename=str(self.path))
        self.task = self.huey.task()(value)

    def run(self, operations: int) -> float:
        began = time.perf_counter()
        for number in range(operations):
            self.task(0, number)
            self.huey.execute(self.huey.dequeue())
        return time.perf_counter() - began

    def rows(self) -> int:
        return _count(self.path, "kv")


def nothing(**data: Any) -> None:
    """What the jobs of APScheduler would run."""


class Apscheduler:
    """Jobs added to its SQLAlchemy job store; they are not run."""

    def __init__(self, folder: Path, level: str) -> None:
        from apscheduler.jobstores.sqlalchemy import SQLAlchemyJobStore
        from apscheduler.schedulers.background import BackgroundScheduler

        self.path = folder / "apscheduler.db"
        self.scheduler = BackgroundScheduler(
            jobstores={"default": SQLAlchemyJobStore(url=f"sqlite:///{self.path}")}, timezone="UTC"
        )
        self.scheduler.start(paused=True)

    def run(self, operations: int) -> float:
        began = time.perf_counter()
        for number in range(operations):
            self.scheduler.add_job(
                "benchmarks.peer:nothing", "date", run_date="2100-01-01 00:00:00", kwargs=event_data(0, number)
            )
        return time.perf_counter() - began

    def rows(self) -> int:
        return _count(self.path, "apscheduler_jobs")


CONTESTANTS: dict[str, Callable[[Path, str], Contestant]] = {
    "ael 1": LoopOfOne,
    "ael 10": LoopOfTen,
    "ancestor 1": AncestorOfOne,
    "ancestor 10": AncestorOfTen,
    "dbos": DbosStep,
    "dbos 10": DbosStepOfTen,
    "langgraph": Langgraph,
    "langgraph 10": LanggraphOfTen,
    "eventsourcing": Eventsourcing,
    "eventsourcing 10": EventsourcingOfTen,
    "huey": Huey,
    "apscheduler": Apscheduler,
}


def _count(path: Path, table: str) -> int:
    with closing(_connect(f"{path.as_uri()}?mode=ro", uri=True)) as connection:
        return int(connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0])


# -- the connections of a contestant ------------------------------------------------------------------

_connect = sqlite3.connect
_connections: list[sqlite3.Connection] = []
_pragmas: set[str] = set()


def watch_connections(level: str) -> None:
    """Have each connection made from now on remembered, and set to a level of durability."""

    def connect(*arguments: Any, **more: Any) -> sqlite3.Connection:
        more["check_same_thread"] = False  # to be asked from another thread
        connection: sqlite3.Connection = _connect(*arguments, **more)
        if level != "shipped":
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute(f"PRAGMA synchronous = {level}")
        if "mode=ro" not in str(arguments or more):
            _connections.append(connection)
        return connection

    sqlite3.connect = sqlite3.dbapi2.connect = connect  # type: ignore[assignment]


def note_pragmas() -> None:
    """Read journal mode and level back from every connection that is open now and may write."""
    for connection in list(_connections):
        try:
            mode = connection.execute("PRAGMA journal_mode").fetchone()[0]
            level = SYNCHRONOUS[connection.execute("PRAGMA synchronous").fetchone()[0]]
        except sqlite3.ProgrammingError:  # it is closed
            _connections.remove(connection)
        else:
            _pragmas.add(f"{mode} {level}")


def main(name: str, folder: Path, level: str) -> None:
    """Do what standard input asks for, until it ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what contestants print is no answer

    def answer(**facts: Any) -> None:
        answers.write(json.dumps(facts) + "\n")
        answers.flush()

    watch_connections("shipped" if name.startswith("ael ") else level)  # the loop is told by its own setting
    contestant = CONTESTANTS[name](folder, level)
    answer(ready=True)
    for line in sys.stdin:
        seconds = contestant.run(int(line))
        note_pragmas()
        answer(seconds=seconds, rows=contestant.rows(), pragmas=sorted(_pragmas))


if __name__ == "__main__":
    status = 0
    try:
        main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
    except Exception:
        traceback.print_exc()
        status = 1
    sys.stderr.flush()
    os._exit(status)  # threads of a contestant that do not end must not keep its process

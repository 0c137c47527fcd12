"""Recorded units, run again: the same code does the same, other code shows where it differs, nothing is touched."""

from __future__ import annotations

import asyncio
import hashlib
import multiprocessing
import os
import random
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from ael_store import AgentBase, Event, Settings, StateContext, Task, get_event_bus, get_state_context
from ael_store.errors import AgentNotFound, DatabaseNotUsable, EffectBlocked, HistoryGone, UsageError
from ael_store.store.moment import HORIZON, Horizon
from ael_store.testing import Harness, ReplayReport, replay
from ael_store.testing.no_effects import NoEffects
from ael_store.testing.rebuilt_error import rebuild_error

ROOT = Path(__file__).parents[2]
OUTSIDE = "touches the outside"


class Boom(Exception):
    """An exception whose argument is not its message."""

    def __init__(self, code: int) -> None:
        super().__init__(f"boom {code}")


def add(task: Any, one: int, two: int) -> int:
    return one + two


class Sensor(AgentBase):
    """Does a bit of everything, each iteration something else."""

    name = "sensor"
    priority = 10

    async def on_start(self, context: StateContext) -> None:
        context.increment("starts")
        context.set("resumed", context.resumed)

    async def on_tick(self, context: StateContext) -> None:
        number = context.iteration
        self.metadata["ticks"] = self.metadata.get("ticks", 0) + 1
        context.set("temperature", context.random.random())
        context.own.set("last", [number, context.now.isoformat(), self.metadata["ticks"]])
        if number % 5 == 0:
            context.emit("hot", {"celsius": context.get("temperature"), "by": self.name}, {"unit": "C"})
            context.emit("later", 1, after="10s")
            context.submit(add, 1, 2, key=None if number % 10 else "known", after="2s", priority=7)
        if number % 7 == 0:
            context.set("lost", True)
            raise Boom(number)
        if number % 11 == 0:
            context.delete("never")
            keys = len(context.get_all())
            context.own.clear()
            context.set("keys", [keys, context.get("ael_status"), context.get("ael_iteration")])
            context.ask("on?", {"a": 1}, choices=("yes", "no"), timeout="20s", default="no")

    async def on_error(self, error: Exception, context: StateContext) -> None:
        context.set("error", [type(error).__name__, str(error)])

    async def on_task(self, task: Task, context: StateContext) -> None:
        self.metadata["results"] = self.metadata.get("results", 0) + 1
        context.set("result", [task.name, task.result, task.key, task.id, task.attempts, self.metadata["results"]])

    async def on_shutdown(self, context: StateContext) -> None:
        context.set("ended_at", context.now.isoformat())


class Fan(AgentBase):
    """Answers; its hook is a plain function, so it runs in a thread."""

    name = "fan"
    subscriptions = ("hot", "later")

    def on_event(self, event: Event, context: StateContext) -> None:  # type: ignore[override]
        assert threading.current_thread() is not threading.main_thread()
        get_state_context().increment("runs")
        if event.type == "later" and not event.metadata.get("redelivered"):
            raise ValueError("too late")
        event.reply({"hops": event.iteration})
        context.set("seen", [len(context.get_history("temperature")), len(get_event_bus().get_event_history())])


class Slow(AgentBase):
    """Runs in the background, so others write what it writes."""

    name = "slow"
    priority = 10
    background = True

    async def on_tick(self, context: StateContext) -> None:
        await asyncio.sleep(0)
        context.increment("shared")
        context.own.set("seen", [context.get("temperature"), context.iteration])
        if context.iteration % 4 == 0:
            context.set("contended", "slow")


class Quick(AgentBase):
    name = "quick"
    priority = 10

    async def on_tick(self, context: StateContext) -> None:
        context.increment("shared", 10)
        if context.iteration % 8 == 0:
            context.set("contended", context.iteration)


CREW = (Sensor, Fan, Slow, Quick)
NAMES = [cls.name for cls in CREW]


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database in which all of them have run, through a restart and a crash."""
    path = tmp_path_factory.mktemp("recording") / "ael.db"

    async def run() -> None:
        h = Harness([cls() for cls in CREW], store=path, tick_rate=1)
        h.set("from outside", 1)
        await h.advance("40s")
        await h.restart(down=5)
        await h.advance("2 min")
        letters = h.sql("SELECT DISTINCT event_id FROM v_dead_letters")
        assert letters
        for letter in letters[:3]:
            h.controller._host.request("events.redeliver", {"event_id": letter["event_id"]}, "test")
        await h.advance("10s")
        await h.crash(down=5)
        await h.advance("10s")
        await h.stop()

    asyncio.run(run())
    return path


@pytest.fixture(scope="module")
def emitting(recording: Path) -> int:
    """An iteration in which the sensor emitted and submitted, with a key of its own."""
    return next(number for number in ticks(recording) if number % 10 == 5 and number % 7 and number % 11)


@pytest.fixture(scope="module")
def failing(recording: Path) -> int:
    """An iteration in which the sensor failed."""
    return next(number for number in ticks(recording) if number % 7 == 0 and number % 5)


def ticks(path: Path) -> list[int]:
    """The iterations in which the sensor ticked."""
    connection = sqlite3.connect(path)
    rows = connection.execute("SELECT iteration FROM v_ticks WHERE agent = 'sensor' AND kind = 'tick' ORDER BY id")
    numbers = [number for (number,) in rows if number > 10]
    connection.close()
    return numbers


class Settable(AgentBase):
    """An agent of one hook, which each test gives."""

    name = "one"
    priority = 10


def one(hook: Callable[..., Any] | None = None, *, name: str = "on_tick", **attributes: Any) -> AgentBase:
    made = Settable(**attributes)
    if hook is not None:
        setattr(made, name, hook)
    return made


async def recorded(path: Path, *agents: AgentBase, seconds: float = 3, **options: Any) -> Path:
    """Let agents run, and return the database."""
    async with Harness(agents, store=path, **options) as h:
        await h.advance(seconds)
    return path


def whats(report: ReplayReport) -> list[tuple[str, str]]:
    return [(difference.what, difference.name) for difference in report.differences]


def hashes(path: Path) -> dict[str, str]:
    """Digests of what lies in the folder of a database; an empty log is as good as none, and so is its index."""
    files = [file for file in path.parent.iterdir() if not file.name.endswith("-shm") and file.stat().st_size]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def change(path: Path, sql: str, *parameters: Any) -> None:
    """Change a database behind everybody's back."""
    connection = sqlite3.connect(path)
    with connection:
        connection.execute(sql, parameters)
    connection.close()


# -- the same code ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
async def test_all_units_of_the_same_code_are_the_same(recording: Path, name: str) -> None:
    report = await replay(recording, CREW, agent=name)

    assert report.check() is report
    assert report.same == report.units > 40
    assert report.differences == [] and report.notes == [] and not report.skipped


async def test_recording_holds_what_is_worth_replaying(recording: Path) -> None:
    """Else the test above would prove little."""
    connection = sqlite3.connect(recording)

    def count(sql: str) -> int:
        return int(connection.execute(f"SELECT count(*) FROM {sql}").fetchone()[0])

    assert count("v_ticks WHERE kind IN ('start', 'error', 'shutdown')") > 20
    assert count("ticks WHERE kind = 1 AND outcome = 0 AND subscription_id IS NULL") == 3  # redelivered
    assert count("ticks WHERE kind = 5") > 10
    assert count("ticks WHERE seen_change_id IS NOT NULL") > 50
    assert count("v_ticks WHERE outcome = 'conflict'") > 5
    assert count("v_ticks WHERE outcome = 'error' AND kind = 'event'") > 20
    assert count("events WHERE target_id IS NOT NULL") > 5
    assert count("runs") == 3
    connection.close()


async def test_nothing_is_written(recording: Path) -> None:
    before = hashes(recording)

    await replay(recording, CREW, agent="sensor")

    assert hashes(recording) == before


async def test_thousand_units_take_a_moment(tmp_path: Path) -> None:
    path = await recorded(tmp_path / "ael.db", Quick(), seconds=1100)
    began = time.monotonic()

    report = await replay(path, Quick)

    assert report.same == 1000
    assert time.monotonic() - began < 5


async def test_loop_may_run_on_the_database(tmp_path: Path) -> None:
    async with Harness([Quick()], store=tmp_path / "ael.db") as h:
        await h.advance("10s")

        report = await replay(h.path, Quick)
        await h.advance("10s")

    assert report.same == 11
    assert h.iteration >= 21


# -- other code -------------------------------------------------------------------------------------


async def test_other_code_shows_exactly_what_it_does_otherwise(recording: Path, emitting: int) -> None:
    class Warmer(Sensor):
        async def on_tick(self, context: StateContext) -> None:
            await super().on_tick(context)
            if context.iteration == emitting:
                context.set("hotter", 1)
                context.set("temperature", 1)
                context.set("new", [2])
                context.delete("starts")

    report = await replay(recording, Warmer, iterations=(1, emitting + 5))

    (unit,) = {difference.unit for difference in report.differences}
    assert report.different == 1
    assert [(d.iteration, d.kind, d.what, d.name) for d in report.differences] == [
        (emitting, "tick", "write", name) for name in ("temperature", "hotter", "new", "starts")
    ]
    temperature, _, new, starts = report.differences
    assert list(temperature.recorded or ()) == ["value"] and temperature.replayed == {"value": 1}
    assert (new.recorded, new.replayed) == (None, {"value": [2]})
    assert (starts.recorded, starts.replayed) == (None, {"deleted": True})
    assert str(starts) == f"iteration {emitting}, on_tick (unit {unit}): write starts: recorded nothing, now deleted"
    with pytest.raises(AssertionError, match=f"the same, 1 different\niteration {emitting}, on_tick"):
        report.check()


async def test_events_delayed_events_and_tasks_are_compared(recording: Path, emitting: int) -> None:
    class Other(Sensor):
        async def on_tick(self, context: StateContext) -> None:
            self.metadata["ticks"] = self.metadata.get("ticks", 0) + 1
            context.set("temperature", context.random.random())
            context.own.set("last", [emitting, context.now.isoformat(), self.metadata["ticks"]])
            context.emit("first")
            context.emit("hot", {"by": self.name, "celsius": context.get("temperature")}, {"unit": "F"})
            context.emit("later", 1, after="11s")
            context.submit(add, 1, 3, after="2s", priority=6)
            context.submit(add, 1, 3, key="fresh")
            context.submit(add, 9, 9, key="known")

    report = await replay(recording, Other, iterations=emitting, kinds=["tick"])

    assert sorted(whats(report)) == [
        ("delayed", "later"),
        ("event", "first"),
        ("event", "hot"),
        ("task", "tests.testing.test_replay:add"),
        ("task", "tests.testing.test_replay:add"),
    ]
    by_what = {(d.what, d.name): d for d in report.differences}
    later = by_what["delayed", "later"]
    assert ((later.recorded or {})["after_s"], (later.replayed or {})["after_s"]) == (10.0, 11.0)
    changed, new = (d for d in report.differences if d.what == "task")
    assert ((changed.recorded or {})["args"], (changed.replayed or {})["args"]) == ([1, 2], [1, 3])
    assert new.recorded is None and (new.replayed or {})["key"] == "fresh"


async def test_replies_are_compared(recording: Path) -> None:
    class Mute(Fan):
        def on_event(self, event: Event, context: StateContext) -> None:  # type: ignore[override]
            event.reply = lambda data: event  # type: ignore[method-assign,misc,assignment]
            super().on_event(event, context)

    class Silent(Fan):
        def on_event(self, event: Event, context: StateContext) -> None:  # type: ignore[override]
            event._answer = lambda reply, to: None
            super().on_event(event, context)

    mute = await replay(recording, Mute, last=40)
    report = await replay(recording, Silent, last=40)

    assert {difference.what for difference in mute.differences} == {"outcome"}  # an event takes no new attributes
    assert {difference.name for difference in report.differences} == {"hot.reply", "later.reply"}
    (first, *_) = report.differences
    assert first.recorded is not None and first.recorded["to"] == "sensor" and first.replayed is None


async def test_endings_are_compared(recording: Path, emitting: int, failing: int) -> None:
    class Mended(Sensor):
        async def on_tick(self, context: StateContext) -> None:
            if context.iteration == emitting:
                raise KeyError(context.iteration)

    broken = await replay(recording, Mended, iterations=emitting, kinds=["tick"])
    mended = await replay(recording, Mended, iterations=failing, kinds=["tick"])

    assert [(d.what, d.recorded, d.replayed) for d in broken.differences] == [
        ("outcome", {"outcome": "success"}, {"outcome": "error", "type": "KeyError", "message": str(emitting)})
    ]
    assert [(d.what, d.recorded, d.replayed) for d in mended.differences] == [
        (
            "outcome",
            {"outcome": "error", "type": "tests.testing.test_replay.Boom", "message": f"boom {failing}"},
            {"outcome": "success"},
        )
    ]


async def test_equal_values_and_writes_of_what_was_there_are_no_difference(tmp_path: Path) -> None:
    def then(context: StateContext) -> None:
        context.set("a", {"x": 1, "y": [context.iteration]})

    def now(context: StateContext) -> None:
        before = context.get("a")
        context.set("a", before)
        context.set("gone", 1)
        context.delete("gone")
        context.set("a", {"y": [context.iteration], "x": 1})

    path = await recorded(tmp_path / "ael.db", one(then))

    (await replay(path, one(now))).check()


async def test_timeout_is_an_ending(tmp_path: Path) -> None:
    path = await recorded(tmp_path / "ael.db", one(lambda context: context.increment("n")), seconds=0)

    async def hang(context: StateContext) -> None:
        await asyncio.sleep(60)

    report = await replay(path, one(hang, tick_timeout=0.05))

    assert [d.replayed for d in report.differences] == [{"outcome": "timeout"}]


async def test_units_in_the_background_conflict_as_they_did(recording: Path) -> None:
    class Greedy(Slow):
        async def on_tick(self, context: StateContext) -> None:
            await super().on_tick(context)
            context.set("shared", 0)

    report = await replay(recording, Greedy, kinds=["tick"])

    endings = {((d.recorded or {}).get("outcome"), (d.replayed or {}).get("outcome")) for d in report.differences}
    assert ("success", "conflict") in endings


# -- what a unit finds ------------------------------------------------------------------------------


async def test_each_unit_gets_an_agent_of_its_own(tmp_path: Path) -> None:
    class Counting(AgentBase):
        name = "counting"
        priority = 10

        def __init__(self) -> None:
            super().__init__()
            self.seen = [0]

        async def on_tick(self, context: StateContext) -> None:
            self.seen.append(context.iteration)
            context.set("seen", len(self.seen))

    path = await recorded(tmp_path / "ael.db", Counting())

    report = await replay(path, Counting())

    assert report.same == 1
    assert [(d.recorded, d.replayed) for d in report.differences] == [
        ({"value": 3}, None),  # 2 was there
        ({"value": 4}, {"value": 2}),
        ({"value": 5}, {"value": 2}),
    ]


async def test_agent_that_can_not_be_copied_is_made_anew_or_shares_what_it_must(tmp_path: Path) -> None:
    class Locked(AgentBase):
        name = "locked"
        priority = 10

        def __init__(self) -> None:
            super().__init__()
            self.lock = threading.Lock()
            self.seen: list[int] = []

        async def on_tick(self, context: StateContext) -> None:
            with self.lock:
                self.seen.append(1)
            context.set("n", [context.iteration, self.metadata.get("x"), len(self.seen) > 0])

    path = await recorded(tmp_path / "ael.db", Locked())
    instance = Locked()

    shared = (await replay(path, [instance])).check()
    anew = (await replay(path, lambda: [Locked()])).check()

    assert shared.notes == ["lock of agent 'locked' can't be copied: all units shared it"]
    assert instance.seen == []
    assert anew.notes == []


async def test_whole_state_is_that_of_then(tmp_path: Path) -> None:
    def look(context: StateContext) -> None:
        context.set(f"key {context.iteration}", sorted(context.get_all()))
        if context.iteration % 3 == 0:
            context.delete("key 2")

    path = await recorded(tmp_path / "ael.db", Quick(), one(look), seconds=20)

    (await replay(path, one(look))).check()
    (await replay(path, one(look), last=3)).check()


async def test_metadata_that_another_unit_of_the_same_commit_changed_is_found(tmp_path: Path) -> None:
    class Both(AgentBase):
        name = "both"
        priority = 10
        subscriptions = ("ping",)

        async def on_tick(self, context: StateContext) -> None:
            self.metadata["n"] = self.metadata.get("n", 0) + 1  # leaves no row
            if context.iteration % 2:
                context.emit("ping")

        async def on_event(self, event: Event, context: StateContext) -> None:
            context.set("n", self.metadata["n"])

    path = await recorded(tmp_path / "ael.db", Both(), seconds=9)

    report = (await replay(path, Both)).check()

    assert report.same == 10


async def test_metadata_that_a_failed_unit_left_are_found_or_excuse_a_difference(tmp_path: Path) -> None:
    class Stubborn(AgentBase):
        name = "stubborn"
        priority = 10

        async def on_tick(self, context: StateContext) -> None:
            self.metadata["n"] = self.metadata.get("n", 0) + 1
            context.set("n", [self.metadata["n"], context.iteration])
            if context.iteration % 3 == 0:
                raise ValueError("once more")

    path = await recorded(tmp_path / "ael.db", Stubborn(), seconds=9)

    (await replay(path, Stubborn)).check()
    alone = await replay(path, Stubborn, iterations=4)

    assert not alone.differences
    assert alone.skipped == {"a unit before it failed and may have changed the agent's metadata": 1}


async def test_initial_metadata_of_an_agent_is_kept(tmp_path: Path) -> None:
    class Named(AgentBase):
        name = "named"
        priority = 10

        def __init__(self) -> None:
            super().__init__()
            self.metadata["by"] = "init"

        async def on_tick(self, context: StateContext) -> None:
            context.set("by", [self.metadata["by"], context.iteration])
            self.metadata["by"] = f"iteration {context.iteration}"

    path = await recorded(tmp_path / "ael.db", Named())

    (await replay(path, Named)).check()


async def test_what_a_hook_leaves_behind_is_cancelled(tmp_path: Path) -> None:
    path = await recorded(tmp_path / "ael.db", one(lambda context: context.increment("n")), seconds=1)
    left: list[asyncio.Task[None]] = []

    async def hook(context: StateContext) -> None:
        left.append(asyncio.create_task(asyncio.sleep(60)))
        context.increment("n")

    (await replay(path, one(hook))).check()

    assert len(left) == 2 and all(task.cancelled() for task in left)


async def test_process_wide_context_outside_the_unit_changes_nothing(tmp_path: Path) -> None:
    def hook(context: StateContext) -> None:
        context.increment("n")
        thread = threading.Thread(target=lambda: get_state_context().set("outside", 1))
        thread.start()
        thread.join()

    path = await recorded(tmp_path / "ael.db", one(hook))

    report = (await replay(path, one(hook))).check()

    assert report.same == 4


# -- what is asked for ------------------------------------------------------------------------------


async def test_units_are_chosen_by_iteration_number_kind_or_from_the_end(recording: Path, failing: int) -> None:
    async def count(**asked: Any) -> int:
        return (await replay(recording, CREW, agent="sensor", **asked)).check().units

    connection = sqlite3.connect(recording)
    (unit,) = connection.execute("SELECT max(id) FROM v_ticks WHERE agent = 'sensor' AND kind = 'error'").fetchone()
    (starts,) = connection.execute("SELECT count(*) FROM v_ticks WHERE agent = 'sensor' AND kind = 'start'").fetchone()
    connection.close()

    assert await count(iterations=failing, kinds=["tick"]) == 1
    assert await count(iterations=failing) >= 2  # and `on_error`
    assert await count(iterations=(failing, failing + 9)) > 4
    assert await count(unit=unit) == 1
    assert await count(last=3) == 3
    assert await count(kinds=["start"]) == starts == 3
    assert await count(kinds=["start", "shutdown"]) == 5


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"iterations": 1, "last": 2}, "pass one of them"),
        ({"last": 0}, "from 1"),
        ({"kinds": ["outside"]}, "choose of tick"),
        ({"iterations": (5, 4)}, "5 to 4"),
        ({"iterations": 99_999}, "no recorded unit in iteration 99999"),
        ({"unit": 99_999}, "no recorded unit number 99999"),
        ({"agent": "nobody"}, "no agent is named 'nobody'; there are: 'sensor'"),
        ({"agent": None}, "several agents"),
    ],
)
async def test_what_can_not_be_asked_for_is_refused(recording: Path, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        await replay(recording, CREW, **{"agent": "sensor", **asked})


async def test_unknown_agents_and_databases_are_refused(recording: Path, tmp_path: Path) -> None:
    with pytest.raises(AgentNotFound, match="known are: fan"):
        await replay(recording, one())
    with pytest.raises(DatabaseNotUsable, match="does not exist"):
        await replay(tmp_path / "none.db", Quick)
    with pytest.raises(UsageError, match="wanted are agents"):
        await replay(recording, 5)  # type: ignore[arg-type]
    async with Harness([agent := Quick()]):
        with pytest.raises(UsageError, match="runs in a loop"):
            await replay(recording, agent)


async def test_nothing_compared_is_no_success(tmp_path: Path) -> None:
    path = await recorded(tmp_path / "ael.db", one(lambda context: context.increment("n")), seconds=0)
    change(path, "UPDATE ticks SET outcome = 4")

    report = await replay(path, one())

    assert (report.units, report.skipped) == (1, {"it was cut off": 1})
    with pytest.raises(AssertionError, match="1 unit, nothing could be compared; 1 can't be replayed: it was cut off"):
        report.check()


# -- what can't be replayed -------------------------------------------------------------------------


async def test_units_before_the_horizon_are_left_out(tmp_path: Path) -> None:
    path = await recorded(tmp_path / "ael.db", Quick(), seconds=9)
    horizon = Horizon(iteration=4, tick_id=6, change_id=5)
    change(path, "INSERT INTO positions (name, value) VALUES (?, ?)", HORIZON, horizon.to_json())

    report = (await replay(path, Quick, iterations=(1, 10))).check()

    assert 0 < report.units < 10
    assert report.notes == ["history begins after iteration 4; what was before was removed"]
    with pytest.raises(HistoryGone, match="history begins after iteration 4, and iteration 3 is before that"):
        await replay(path, Quick, iterations=(2, 3))
    with pytest.raises(HistoryGone, match="unit 2 is before that"):
        await replay(path, Quick, unit=2)


async def test_rows_that_were_removed_or_redacted_are_no_difference(tmp_path: Path) -> None:
    class Listener(AgentBase):
        name = "listener"
        subscriptions = ("said",)

        async def on_event(self, event: Event, context: StateContext) -> None:
            context.set("heard", event.data)

    def say(context: StateContext) -> None:
        context.set("secret", f"word {context.iteration}")
        context.emit("said", context.iteration)

    path = tmp_path / "ael.db"
    async with Harness([one(say), Listener()], store=path) as h:
        await h.advance(5)
        numbers = [event.id for event in h.events("said")]
        h.controller._host.request("events.redact", {"id": numbers[1]}, "test")
        h.controller._host.request("state.redact", {"key": "secret"}, "test")
        await h.advance(1)
    change(path, "DELETE FROM events WHERE id = ?", numbers[0])

    speaker, listener = await replay(path, one(say)), await replay(path, Listener)

    assert not speaker.differences and not listener.differences
    assert set(speaker.skipped) == {"a value that it wrote was redacted"}
    assert listener.skipped == {
        "the event that caused it was removed by retention": 1,
        "the event that caused it was redacted": 1,
    }


async def test_redacted_value_that_is_read_excuses_differences(tmp_path: Path) -> None:
    def read(context: StateContext) -> None:
        context.set("length", [len(context.get("secret", "")), context.iteration])

    path = tmp_path / "ael.db"
    async with Harness([one(read)], store=path) as h:
        h.set("secret", "12345")
        await h.advance(2)
        h.controller._host.request("state.redact", {"key": "secret"}, "test")
        await h.advance(0)

    report = await replay(path, one(read))

    assert not report.differences
    assert set(report.skipped) == {"it reads a value that was redacted since"}


async def test_removed_tasks_are_no_difference(recording: Path, tmp_path: Path) -> None:
    path = tmp_path / "ael.db"
    path.write_bytes(recording.read_bytes())
    change(path, "DELETE FROM tasks WHERE id IN (2, 3, 4)")
    change(path, "UPDATE tasks SET status = 'waiting', ended_us = NULL WHERE id = 5")

    report = await replay(path, CREW, agent="sensor", settings=Settings(task_days=1e-6))

    assert not report.differences
    assert set(report.skipped) == {
        "a task that it submitted may have been removed",
        "the task that caused it was removed",
        "the task that caused it was run again since",
    }


async def test_callbacks_of_the_bus_are_not_the_agents(tmp_path: Path) -> None:
    class Subscriber(AgentBase):
        name = "subscriber"
        priority = 10

        async def on_start(self, context: StateContext) -> None:
            get_event_bus().subscribe("tell", "subscriber", lambda event: get_state_context().increment("told"))

        async def on_tick(self, context: StateContext) -> None:
            context.emit("tell")

    path = await recorded(tmp_path / "ael.db", Subscriber())

    report = await replay(path, Subscriber)

    assert not report.differences
    assert report.skipped == {"it was a callback of `bus.subscribe`, which is not the agent's": 4}


async def test_results_that_the_loop_told_of_are_not_the_agents(tmp_path: Path) -> None:
    def submit(context: StateContext) -> None:
        context.submit(add, 1, context.iteration)

    path = await recorded(tmp_path / "ael.db", one(submit))

    report = await replay(path, one(submit))

    assert not report.differences
    assert report.skipped == {"the agent has no `on_task`": 4}


async def test_errors_that_can_not_be_built_again_are_counted(tmp_path: Path) -> None:
    class Odd(Exception):
        def __str__(self) -> str:
            return "always this"

    class Failing(Settable):
        async def on_tick(self, context: StateContext) -> None:
            raise OSError(2, "no such thing") if context.iteration % 2 else Odd(context.iteration)

        async def on_error(self, error: Exception, context: StateContext) -> None:
            context.set("error", [str(error), context.iteration])

    path = await recorded(tmp_path / "ael.db", Failing())

    report = await replay(path, Failing)

    assert not report.differences
    assert report.skipped == {"the exception that `on_error` got can't be built again": 2}


@pytest.mark.parametrize(
    ("error", "name"),
    [
        (ValueError("x"), "ValueError"),
        (ValueError(), "ValueError"),
        (KeyError("k"), "KeyError"),
        (FileNotFoundError(2, "gone"), "FileNotFoundError"),
        (Boom(3), f"{__name__}.Boom"),
        (Boom(3), "Boom"),  # of a script
        (sqlite3.OperationalError("locked"), "sqlite3.OperationalError"),
    ],
)
def test_exceptions_are_built_from_class_and_message(error: Exception, name: str) -> None:
    built = rebuild_error(name, str(error), __name__)

    assert type(built) is type(error)
    assert str(built) == str(error)


def test_exceptions_that_no_class_is_known_of_are_not_built() -> None:
    assert rebuild_error("gone.module.Error", "x", __name__) is None
    assert rebuild_error("SystemExit", "1", __name__) is None
    assert isinstance(rebuild_error("Timeout", "the hook ran longer than 1 s", __name__), TimeoutError)


async def test_units_before_an_agent_got_its_name_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "ael.db"

    def hook(context: StateContext) -> None:
        context.own.increment("n")
        context.emit("told")

    def named() -> AgentBase:
        made = Settable("two", aliases=("one",))
        made.on_tick = hook  # type: ignore[method-assign,assignment]
        return made

    await recorded(path, one(hook), seconds=2)
    await recorded(path, named(), seconds=2, start="2026-01-03T00:00:00Z")

    report = await replay(path, named)

    assert not report.differences
    assert report.same == 3
    assert set(report.skipped) == {"before the agent was named 'two'"}


# -- the outside ------------------------------------------------------------------------------------


def connect() -> None:
    socket.create_connection(("127.0.0.1", 1), timeout=1)


def ask_for_an_address() -> None:
    socket.getaddrinfo("example.invalid", 80)


def send() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        one.sendto(b"x", ("127.0.0.1", 9))


def write_a_file() -> None:
    Path("written").write_text("x")


def open_a_database() -> None:
    sqlite3.connect("other.db")


def start_a_shell() -> None:
    subprocess.run(["true"], check=False)


def start_by_system() -> None:
    os.system("true")


def start_a_process() -> None:
    multiprocessing.get_context("spawn").Process(target=print).start()


def fork() -> None:
    if os.fork() == 0:
        os._exit(0)


EFFECTS: list[tuple[Callable[[], None], str]] = [
    (connect, "socket.connect"),
    (ask_for_an_address, "socket.getaddrinfo"),
    (send, "socket.sendto"),
    (write_a_file, "open"),
    (open_a_database, "sqlite3.connect"),
    (lambda: os.mkdir("made"), "os.mkdir"),
    (lambda: os.mkfifo("pipe"), "os.mkfifo"),
    (lambda: os.remove("kept"), "os.remove"),
    (lambda: os.replace("kept", "moved"), "os.rename"),
    (start_by_system, "os.system"),
    (start_a_shell, "subprocess.Popen"),
    (start_a_process, "subprocess.fork_exec"),
    (fork, "os.fork"),
    (lambda: os.kill(os.getpid(), 0), "os.kill"),
]


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("counted") / "ael.db"
    return asyncio.run(recorded(path, one(lambda context: context.increment("n")), seconds=1))


@pytest.fixture
def quiet(counted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recording of a hook that only counts, in the folder in which one works."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kept").write_text("kept")
    (tmp_path / "db").mkdir()
    shutil.copy(counted, tmp_path / "db/ael.db")
    return tmp_path / "db/ael.db"


@pytest.mark.parametrize(("effect", "name"), EFFECTS, ids=[name for _, name in EFFECTS])
async def test_what_touches_the_outside_is_refused(
    quiet: Path, tmp_path: Path, effect: Callable[[], None], name: str
) -> None:
    async def async_hook(context: StateContext) -> None:
        context.increment("n")
        effect()

    def plain_hook(context: StateContext) -> None:
        context.increment("n")
        effect()

    def hook_with_a_thread(context: StateContext) -> None:
        context.increment("n")
        with ThreadPoolExecutor() as threads:
            threads.submit(effect).result()

    async def hook_with_a_task(context: StateContext) -> None:
        context.increment("n")
        await asyncio.create_task(asyncio.to_thread(effect))

    for hook in (async_hook, plain_hook, hook_with_a_thread, hook_with_a_task):
        report = await replay(quiet, one(hook))

        assert whats(report) == [("effect", name)] * 2
        assert str(report.differences[0]).endswith(f"{OUTSIDE}: {name}")
    assert sorted(os.listdir(tmp_path)) == ["db", "kept"]


async def test_effect_that_a_hook_swallows_is_told_too(quiet: Path) -> None:
    async def hook(context: StateContext) -> None:
        context.increment("n")
        try:
            await asyncio.open_connection("127.0.0.1", 1)
        except RuntimeError as error:
            assert isinstance(error, EffectBlocked)
            context.set("swallowed", str(error).partition(":")[0])

    report = await replay(quiet, one(hook), iterations=1)

    assert whats(report) == [("effect", "socket.connect"), ("write", "swallowed")]


async def test_effects_can_be_allowed(quiet: Path, tmp_path: Path) -> None:
    def hook(context: StateContext) -> None:
        context.increment("n")
        write_a_file()

    (await replay(quiet, one(hook), allow_effects=True)).check()

    assert (tmp_path / "written").read_text() == "x"


async def test_reading_is_no_effect(quiet: Path, tmp_path: Path) -> None:
    def hook(context: StateContext) -> None:
        context.increment("n")
        assert (tmp_path / "kept").read_text() == "kept"
        with open(os.devnull, "w") as nowhere:
            nowhere.write("x")
        sqlite3.connect(":memory:").close()
        sqlite3.connect(f"file:{quiet}?mode=ro", uri=True).close()
        import_module("colorsys")  # writes no bytecode either

    (await replay(quiet, one(hook))).check()


async def test_effect_that_was_refused_then_too_is_the_same(quiet: Path) -> None:
    async def recorded_error(context: StateContext) -> None:
        raise EffectBlocked("open: not allowed")

    change(quiet, "UPDATE ticks SET outcome = 1, changes = 0")
    for number in (1, 2, 3, 4):
        change(
            quiet,
            "INSERT OR REPLACE INTO tick_errors SELECT id, 'ael_store.errors.EffectBlocked', 'open: not allowed', '' "
            "FROM ticks WHERE id = ?",
            number,
        )

    (await replay(quiet, one(recorded_error))).check()


async def test_everything_may_be_touched_again_afterwards(quiet: Path) -> None:
    await replay(quiet, one(lambda context: context.increment("n")))

    write_a_file()
    start_a_shell()
    assert not sys.dont_write_bytecode or os.environ.get("PYTHONDONTWRITEBYTECODE")


def test_blocks_are_counted_by_each_of_several() -> None:
    with NoEffects() as one, NoEffects() as other:
        with pytest.raises(EffectBlocked, match=r"os\.mkdir: a replay touches nothing"):
            os.mkdir("nowhere")
        assert one.take() == other.take() == ["os.mkdir"]
        assert one.take() == []


# -- as users have it -------------------------------------------------------------------------------

AGENTS = """
from ael_store import AgentBase

class Counter(AgentBase):
    name = "counter"
    priority = 10

    async def on_tick(self, context):
        context.increment("count", {by})
"""


async def test_target_may_be_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    name = f"agents_{random.randrange(10**9)}"
    (tmp_path / f"{name}.py").write_text(AGENTS.format(by=1))

    class Counter(AgentBase):
        name = "counter"
        priority = 10

        async def on_tick(self, context: StateContext) -> None:
            context.increment("count", 1)

    path = await recorded(tmp_path / "ael.db", Counter())

    report = await replay(path, str(tmp_path / f"{name}.py"))

    assert report.check().agent == "counter"
    assert not (tmp_path / "__pycache__").exists()
    del sys.modules[name]


TEST = """
import asyncio

def test_plain(replay):
    replay("ael.db", "agents.py", agent="counter").check()

def test_inside_an_event_loop(replay):
    async def scenario():
        return replay("ael.db", "agents.py", last=2).check().units

    assert asyncio.run(scenario()) == 2

def test_other_code(replay):
    from agents import Counter

    class Other(Counter):
        async def on_tick(self, context):
            context.increment("count", 2)

    assert replay("ael.db", Other).different == 4
"""


async def test_pytest_has_a_fixture(tmp_path: Path) -> None:
    class Counter(AgentBase):
        name = "counter"
        priority = 10

        async def on_tick(self, context: StateContext) -> None:
            context.increment("count", 1)

    await recorded(tmp_path / "ael.db", Counter())
    (tmp_path / "agents.py").write_text(AGENTS.format(by=1))
    (tmp_path / "test_agents.py").write_text(TEST)
    plugin = "ael_store.testing.pytest_plugin"

    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", plugin, "-p", "no:cacheprovider", "test_agents.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert done.returncode == 0 and "3 passed" in done.stdout, done.stdout + done.stderr
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["pytest11"] == {"ael_store": plugin}
    assert not any(name.startswith("pytest") for name in project["dependencies"])


def test_plugin_imports_nothing_heavy() -> None:
    code = (
        "import sys, pytest; before = set(sys.modules); import ael_store.testing.pytest_plugin; "
        "print(*sorted(name for name in set(sys.modules) - before))"
    )

    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)

    names = set(done.stdout.split())
    assert "ael_store.testing.pytest_plugin" in names
    assert {name for name in names if name.startswith("ael_store")} <= {
        "ael_store",
        "ael_store._version",
        "ael_store.testing",
        "ael_store.testing.pytest_plugin",
    }
    assert not names & {"sqlalchemy", "orjson", "typer", "apscheduler"}

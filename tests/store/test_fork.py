"""Forks: the past as it was, told from the history and compared with backups that were made then."""

from __future__ import annotations

import asyncio
import json
import shutil
import sqlite3
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from ael_store import AgentBase, Event, Settings, StateContext, Task, get_event_bus
from ael_store.errors import DatabaseDamaged, HistoryGone, NotADatabase, SchemaTooNew, StorageFailed, UsageError
from ael_store.schema.tables import metadata
from ael_store.store.backup import make_backup
from ael_store.store.fork import fork
from ael_store.store.moment import HORIZON, Horizon
from ael_store.store.verify import verify
from ael_store.testing import Harness
from tests.loops import agent, controller_on, iterations_of, rows, running, until, worker
from tests.store.files import checksums, fill, public, quiet


def forked(path: Path, at: int, *, tmp_path: Path, **options: Any) -> Path:
    out = tmp_path / "fork.db"
    fork(path, out, quiet, at=at, **options)
    return out


def rows_changed(path: Path, sql: str, *parameters: Any) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute(sql, parameters)
    connection.close()


# -- a life in which everything happens -------------------------------------------------------------


class Writer(AgentBase):
    name = "writer"
    priority = 10

    async def on_tick(self, context: StateContext) -> None:
        n = context.increment("n")
        context.set(f"key/{n % 5}", {"n": n})
        context.metrics.gauge("n", n)
        context.metrics.count("writes")
        context.own.set("last", n)
        if n % 7 == 3:
            context.delete(f"key/{(n + 1) % 5}")
        context.emit("wrote", {"n": n})
        if n % 4 == 0:
            context.emit("later", {"n": n}, after=6.5)
        self.metadata["written"] = self.metadata.get("written", 0) + 1


class Reader(AgentBase):
    """Fails at some events, until it is repaired."""

    name = "reader"
    priority = 5
    subscriptions = ("wrote", "later")

    async def on_event(self, event: Event, context: StateContext) -> None:
        if event.type == "wrote" and event.data["n"] % 17 == 5 and not context.get("repaired"):
            raise ValueError(f"can't read {event.data['n']}")
        context.increment(f"read/{event.type}")


class Flaky(AgentBase):
    """Has errors in a row, so that it backs off."""

    name = "flaky"
    priority = 10

    async def on_tick(self, context: StateContext) -> None:
        if 20 <= context.iteration < 60:
            raise RuntimeError(f"broken in {context.iteration}")
        context.increment("flaky")


class Timer(AgentBase):
    name = "timer"
    trigger = "every 7s"

    async def on_start(self, context: StateContext) -> None:
        get_event_bus().subscribe("wrote", "listener", lambda event: None)

    async def on_tick(self, context: StateContext) -> None:
        context.increment("timer")
        self.metadata["rung"] = self.metadata.get("rung", 0) + 1


class Idle(AgentBase):
    name = "idle"
    priority = 10

    async def on_tick(self, context: StateContext) -> None:
        pass


class Late(AgentBase):
    """Joins and goes while the loop runs."""

    name = "late"
    priority = 10
    subscriptions = ("wrote",)

    async def on_event(self, event: Event, context: StateContext) -> None:
        context.set("late", event.data["n"])


class Thinker(AgentBase):
    name = "thinker"
    priority = 10

    async def on_tick(self, context: StateContext) -> None:
        if context.iteration % 9 == 0:
            context.submit("think", context.iteration, key=f"think/{context.iteration}")

    async def on_task(self, task: Task, context: StateContext) -> None:
        context.set("thought", task.result)


class Sensor(AgentBase):
    name = "sensor"
    priority = 10

    async def on_tick(self, context: StateContext) -> None:
        context.own.increment("seen")
        self.metadata["seen"] = context.now.second


class NewSensor(Sensor):
    name = "sensor_2"
    aliases = ("sensor",)


def think(task: Any, number: int) -> int:
    return number * number


LOOKED_AT = (0, 6, 14, 24, 30, 34, 47, 60, 64, 75, 85)
"""Seconds; none is just before a step, which on a clock that stands still would be the same instant."""


@dataclass(frozen=True)
class Life:
    path: Path
    backups: dict[int, Path]
    """What the database was, by iteration."""


@pytest.fixture(scope="module")
def life(tmp_path_factory: pytest.TempPathFactory) -> Life:
    """A loop of some eighty iterations, with a backup of several."""
    return asyncio.run(_live(tmp_path_factory.mktemp("life")))


async def _live(folder: Path) -> Life:
    backups: dict[int, Path] = {}
    agents = [Writer(), Reader(), Flaky(), Timer(), Idle(), Thinker()]
    h = Harness([*agents, Sensor()], store=folder / "ael.db", tick_rate=1.0, strategy="round_robin", max_agents=4)
    h._fakes["think"] = think

    def request(command: str, **arguments: Any) -> None:
        h.controller._host.request(command, arguments, "test")

    late = Late()
    steps: dict[int, Callable[[], Any]] = {
        12: lambda: request("agents.disable", name="idle"),
        22: lambda: h.controller.agent_manager.register(late),
        28: lambda: request("agents.enable", name="idle"),
        33: lambda: setattr(late, "priority", 3),
        36: lambda: request("events.redeliver", all=True),
        42: lambda: h.controller.agent_manager.unregister("late"),
        50: lambda: request("agents.release", name="flaky"),
        56: lambda: h.set("repaired", True),
        58: lambda: request("events.redeliver", all=True),
        62: lambda: request("agents.disable", name="timer"),
        66: lambda: h.controller.event_bus.unsubscribe("wrote", "listener"),
        74: lambda: request("agents.enable", name="timer"),
        78: lambda: request("loop.pause"),
        80: lambda: request("loop.resume"),
    }
    await h.start()
    for second in range(90):
        if second in steps:
            steps[second]()
        if second == 54:  # with the agent under another name
            await h.restart(down=2, agents=[*agents, NewSensor()])
        if second == 70:
            await h.crash(down=3)
        await h.advance(1)
        if second in LOOKED_AT:
            backups[h.iteration] = folder / f"{h.iteration}.db"
            make_backup(h.path, backups[h.iteration], quiet, prove=False)
    await h.stop()
    return Life(folder / "ael.db", backups)


def rows_of(path: Path, table: str) -> dict[Any, dict[str, Any]]:
    """Return the rows of a table by their keys, without digests."""
    columns = [column.name for column in metadata.tables[table].c if column.name != "digest"]
    keys = [column.name for column in metadata.tables[table].primary_key]
    connection = sqlite3.connect(path)
    found = connection.execute('SELECT "{}" FROM {}'.format('", "'.join(columns), table)).fetchall()
    connection.close()
    table_rows = [dict(zip(columns, row, strict=True)) for row in found]
    return {tuple(row[key] for key in keys): row for row in table_rows}


def differences(one: Path, other: Path, table: str) -> Iterator[tuple[Any, str]]:
    """Yield key and column of each difference; `+` and `-` for rows that only one of them has.

    Whether the indexes have a row already (`recent`) is no difference.
    """
    here, there = rows_of(one, table), rows_of(other, table)
    for key in sorted(here.keys() | there.keys(), key=str):
        if key in here and key in there:
            columns = here[key].keys() - {"recent"}
            yield from ((key, column) for column in columns if here[key][column] != there[key][column])
        else:
            yield key, "+" if key in here else "-"


NAMES = ("keys", "event_types", "event_sources")
"""Interned names may stay."""

IDLE, TIMER, SENSOR, LATE = 5, 4, 7, 8
EXPECTED = {
    # A fork has an identity, an owner to come, and no run.
    *((("forked",), "+"), (("instance",), "value")),
    *(((1,), column) for column in ("token", "holder", "taken_us")),
    # What the class says at a start is told by nobody.
    *(((SENSOR,), column) for column in ("class_path", "fingerprint")),
    ((LATE,), "priority"),
    # Ticks that changed nothing are counted by the hour.
    *(((IDLE,), column) for column in ("ticks", "measured", "last_tick_us")),
    *(((6,), column) for column in ("ticks", "measured", "last_tick_us")),
}


@pytest.mark.parametrize("place", range(len(LOOKED_AT)))
def test_fork_is_what_the_database_was(life: Life, tmp_path: Path, place: int) -> None:
    at, then = list(life.backups.items())[place]
    out = tmp_path / "fork.db"

    fork(life.path, out, quiet, at=at)

    assert verify(out).problems == []
    found = {table: set(differences(out, then, table)) for table in metadata.tables if table not in NAMES}
    run = max(rows_of(then, "runs"))
    assert found.pop("runs") == {(run, column) for column in ("status", "ended_us", "last_iteration")}
    assert {table: odd for table, rows in found.items() if (odd := rows - EXPECTED)} == {}


def test_fork_of_now_differs_in_nothing(life: Life, tmp_path: Path) -> None:
    out = tmp_path / "fork.db"

    report = fork(life.path, out, quiet)

    assert public(out) == public(life.path)
    assert (report.removed, report.untold) == ({}, [])


def test_every_moment_can_be_left_from(life: Life, tmp_path: Path) -> None:
    """Starts, stops, crashes and pauses lie between them."""
    ends = rows(life.path, "SELECT last_iteration FROM runs ORDER BY id")
    for at in (0, ends[0] - 1, ends[0], ends[0] + 1, ends[1], ends[1] + 1):
        out = tmp_path / f"{at}.db"
        fork(life.path, out, quiet, at=at)  # which verifies it
        assert rows(out, "SELECT coalesce(max(id), 0) FROM iterations") == [at]


async def test_fork_of_a_database_whose_old_history_was_removed(tmp_path: Path) -> None:
    """What the horizon keeps of the time before it is enough."""
    path, then, out = tmp_path / "ael.db", tmp_path / "then.db", tmp_path / "fork.db"
    h = Harness([Writer(), Reader(), Sensor()], store=path, settings=Settings(history_rows=300), tick_rate=60)
    await h.advance(60)
    h.controller._host.request("agents.disable", {"name": "sensor"}, "test")
    await h.advance(5 * 3600)
    at = h.iteration
    make_backup(path, then, quiet, prove=False)
    h.controller._host.request("agents.enable", {"name": "sensor"}, "test")
    await h.advance(600)
    await h.stop()

    fork(path, out, quiet, at=at)

    [horizon] = rows(out, "SELECT json_extract(value, '$.iteration') FROM positions WHERE name = 'horizon'")
    assert 10 < horizon < at
    assert verify(out).problems == []
    event = rows(out, "SELECT json_extract(value, '$.event_id') FROM positions WHERE name = 'horizon'")[0]
    for table in ("dead_letters", "delayed_events"):  # deliveries from before the horizon are history, too
        gone = [number for number, _ in differences(out, then, table)]
        assert all(sign == "-" for _, sign in differences(out, then, table))
        numbers = ", ".join(str(key[0]) for key in gone)
        delivered = rows(then, f"SELECT event_id FROM {table} WHERE id IN ({numbers}) ORDER BY id")
        assert all(number <= event for number in delivered)
    for table in ("state", "agents", "subscriptions"):
        # How often a key had changed that was deleted since is told by what is left of its history.
        assert {column for _, column in differences(out, then, table)} <= {"version"}


# -- going on ---------------------------------------------------------------------------------------


async def test_fork_goes_on_as_the_original_did(tmp_path: Path) -> None:
    """The same agents on the same clock; the callback and the timer come from before the fork."""

    def agents() -> list[AgentBase]:
        return [Writer(), Reader(), Timer(), Idle(), Sensor()]

    path, out = tmp_path / "ael.db", tmp_path / "fork.db"
    h = Harness(agents(), store=path)
    await h.advance(30)
    at, moment = h.iteration, h.now  # the reader fails at an event just then
    assert h.sql("SELECT attempts FROM v_pending WHERE attempts > 0")
    await h.advance(40)
    fork(path, out, quiet, at=at)

    async with Harness(agents(), store=out, start=moment + timedelta(seconds=1)) as again:
        await again.advance(39)
        assert again.state == h.state
        for sql in (
            "SELECT name, metadata, tick_count, event_count, error_count FROM v_agents WHERE name <> 'idle'",
            "SELECT subscriber, event_id IS NULL FROM v_pending",
            "SELECT source, data FROM v_events WHERE type IN ('wrote', 'later') ORDER BY id",
            "SELECT next_us, last_us FROM schedules",
            "SELECT due_us, type, data FROM delayed_events WHERE event_id IS NULL ORDER BY id",
            "SELECT subscriber, attempts FROM v_dead_letters",
        ):
            assert again.sql(sql) == h.sql(sql)
    await h.stop()
    assert verify(out).problems == []


async def test_first_run_follows_the_runs_that_are_kept_and_recovers_from_nothing(life: Life, tmp_path: Path) -> None:
    [(_, at), (first, _), _] = rows(life.path, "SELECT first_iteration, last_iteration FROM runs ORDER BY id")
    out = forked(life.path, first + 3, tmp_path=tmp_path)

    await controller_on(out, agent("other"), tick_rate=0).run(2)

    assert rows(out, "SELECT id, status, last_iteration FROM runs ORDER BY id") == [
        (1, "stopped", at),
        (2, "stopped", first + 3),
        (3, "stopped", first + 5),
    ]
    assert rows(out, "SELECT count(*) FROM v_events WHERE type = 'ael_recovered'") == [0]
    assert verify(out).problems == []


async def test_running_a_fork_never_touches_the_original(tmp_path: Path) -> None:
    folder = tmp_path / "original"
    folder.mkdir()
    path = await asyncio.to_thread(fill, folder / "ael.db", 10)
    out = forked(path, 5, tmp_path=tmp_path)
    connection = sqlite3.connect(path)  # keeps the log and the shared memory there
    connection.execute("SELECT * FROM runs").fetchall()
    before = checksums(folder)

    async with running(controller_on(out, Writer())):
        await until(lambda: rows(out, "SELECT 1 FROM iterations WHERE id > 20"))
        during = checksums(folder)

    assert during == before == checksums(folder)
    connection.close()


async def test_fork_beside_a_running_loop(tmp_path: Path) -> None:
    path = tmp_path / "ael.db"
    async with running(controller_on(path, Writer(), Idle())):
        await until(lambda: rows(path, "SELECT 1 FROM iterations WHERE id > 30"))

        report = await asyncio.to_thread(fork, path, tmp_path / "fork.db", quiet, at=20)

    assert report.moment.iteration == 20
    assert verify(tmp_path / "fork.db").problems == []
    assert stat.S_IMODE((tmp_path / "fork.db").stat().st_mode) == 0o600
    assert rows(tmp_path / "fork.db", "SELECT status, last_iteration FROM runs") == [("stopped", 20)]


async def test_idle_iterations_that_share_a_commit_are_parted(tmp_path: Path) -> None:
    """What is kept of the commit has no seal, because that was of all of it."""
    path = tmp_path / "ael.db"
    async with Harness([Idle()], store=path) as h:
        await h.advance(35)
    [shared] = rows(
        path, "SELECT max(commit_id) FROM iterations GROUP BY commit_id HAVING count(*) > 5 ORDER BY 1 LIMIT 1"
    )
    [first] = rows(path, "SELECT min(id) FROM iterations WHERE commit_id = ?", shared)

    out = forked(path, first + 2, tmp_path=tmp_path)

    before = verify(out)
    assert (before.problems, before.commits - before.sealed) == ([], 1)
    await controller_on(out, Writer(), tick_rate=0).run(3)
    assert verify(out).problems == []
    assert rows(out, "SELECT max(id) FROM iterations") == [first + 5]


async def test_loop_that_was_paused_is_paused_in_the_fork(tmp_path: Path) -> None:
    path, out = tmp_path / "ael.db", tmp_path / "fork.db"
    async with Harness([Sensor()], store=path) as h:
        await h.advance(3)
        for command, arguments in (("loop.pause", {}), ("loop.step", {"iterations": 2}), ("loop.resume", {})):
            h.controller._host.request(command, arguments, "test")
            await h.advance(3)
        at = h.iteration

    for iteration, paused in ((2, []), (5, ["true"]), (at, ["false"])):
        fork(path, out, quiet, at=iteration, force=True)
        assert rows(out, "SELECT value FROM positions WHERE name = 'paused'") == paused


# -- setting keys -----------------------------------------------------------------------------------


def test_keys_are_set_in_an_audited_commit_of_their_own(tmp_path: Path) -> None:
    path = fill(tmp_path / "ael.db", 10)
    values = {"key/1/0": '"other"', "brand new": "[1]", "read": "4"}

    out = forked(path, 4, values=values, actor="me", tmp_path=tmp_path)

    assert verify(out).problems == []
    assert rows(out, "SELECT key, value, agent FROM v_state WHERE agent = '(outside)' ORDER BY key") == [
        ("brand new", "[1]", "(outside)"),
        ("key/1/0", '"other"', "(outside)"),
    ]
    assert rows(out, "SELECT kind, iteration FROM commits ORDER BY id DESC LIMIT 1") == [("command", 4)]
    assert rows(out, "SELECT actor, name, arguments, error FROM commands") == [
        ("me", "fork.set", '{"keys": ["key/1/0", "brand new", "read"]}', None)
    ]
    assert rows(out, "SELECT old_value FROM v_state_history WHERE key = 'key/1/0' ORDER BY id DESC LIMIT 1") == [
        json.dumps("x" * 10)
    ]


# -- tasks ------------------------------------------------------------------------------------------


async def test_task_that_ran_is_interrupted_and_held(tmp_path: Path) -> None:
    path, goes_on = tmp_path / "ael.db", asyncio.Event()
    calls: list[str] = []

    async def work(self: AgentBase, task: Task, name: str) -> str:
        calls.append(name)
        await goes_on.wait()
        return name

    made = worker(work)
    async with running(controller_on(path, made)) as controller:
        controller.event_bus.emit("go", "test", {"args": ["one"], "key": "one"})
        await until(lambda: calls)
        await iterations_of(controller, 2)
        [at] = rows(path, "SELECT max(id) FROM iterations")
        await iterations_of(controller, 2)
        goes_on.set()
        await until(lambda: rows(path, "SELECT 1 FROM tasks WHERE applied_us IS NOT NULL"))
        controller.event_bus.emit("go", "test", {"args": ["two"], "key": "two"})
        await until(lambda: rows(path, "SELECT 1 FROM tasks WHERE key = 'two' AND applied_us IS NOT NULL"))
    out = tmp_path / "fork.db"

    report = fork(path, out, quiet, at=at)

    assert report.tasks_held == 1
    assert report.removed["tasks"] == report.removed["task_attempts"] == 1
    assert verify(out).problems == []
    assert rows(out, "SELECT key, status, attempts, result, applied_us FROM tasks") == [
        ("one", "waiting", 1, None, None)
    ]
    assert rows(out, "SELECT outcome FROM task_attempts") == ["interrupted"]
    calls.clear()
    async with running(controller_on(out, worker(work))) as controller:
        await iterations_of(controller, 3)
    assert calls == []
    [(status, why)] = rows(out, "SELECT status, held FROM tasks")
    assert (status, why) == (
        "held",
        f"this database is a copy of {path}; `ael tasks release --all` lets them go on",
    )


# -- what can't be done -----------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return fill(tmp_path / "ael.db", 10)


def test_moment_before_the_history_is_gone(path: Path) -> None:
    [(tick, change, event, commit)] = rows(path, "SELECT 5, 5, 5, 5")
    horizon = Horizon(5, 1, tick, change, event, commit, event)
    rows_changed(path, "INSERT INTO positions (name, value) VALUES (?, ?)", HORIZON, horizon.to_json())

    with pytest.raises(HistoryGone, match="history begins at iteration 5"):
        fork(path, path.with_name("fork.db"), quiet, at=4)

    assert not path.with_name("fork.db").exists()


def test_moment_that_has_not_been_yet_is_refused(path: Path) -> None:
    with pytest.raises(UsageError, match="there is no iteration 11 yet; the last one is 10"):
        fork(path, path.with_name("fork.db"), quiet, at="11")


def test_time_means_the_last_iteration_that_had_started(path: Path) -> None:
    [started] = rows(path, "SELECT started_at FROM v_iterations WHERE iteration = 7")

    assert fork(path, path.with_name("fork.db"), quiet, at=started).moment.iteration == 7


def test_file_that_exists_is_replaced_with_force_only(path: Path) -> None:
    out = path.with_name("fork.db")
    out.write_text("mine")

    with pytest.raises(UsageError, match="exists; name another file"):
        fork(path, out, quiet)
    assert out.read_text() == "mine"
    fork(path, out, quiet, force=True)

    assert public(out) == public(path)


@pytest.mark.parametrize("name", ["ael.db", "ael.db-wal", "ael.db.lock"])
def test_files_of_the_database_itself_are_never_replaced(path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="belongs to the database itself"):
        fork(path, path.with_name(name), quiet, force=True)


def test_folder_is_no_name_for_a_fork(path: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a folder: name a file in it"):
        fork(path, tmp_path, quiet)


async def test_database_of_a_newer_program_is_told_from_an_old_one(tmp_path: Path) -> None:
    path = tmp_path / "ael.db"
    async with Harness([Writer()], store=path) as h:
        await h.advance(1)
    rows_changed(path, "UPDATE alembic_version SET version_num = '9999'")

    with pytest.raises(SchemaTooNew, match="9999"):
        fork(path, tmp_path / "fork.db", quiet)
    assert not (tmp_path / "fork.db").exists()


def test_empty_file_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "ael.db").touch()

    with pytest.raises(NotADatabase, match="is empty: `ael run`"):
        fork(tmp_path / "ael.db", tmp_path / "fork.db", quiet)


def test_short_of_space_nothing_is_begun(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type(shutil.disk_usage("/"))(10**9, 10**9 - 1000, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)

    with pytest.raises(StorageFailed, match=r"the fork of .* needs"):
        fork(path, path.with_name("fork.db"), quiet)


def test_value_that_has_changed_silently_gets_no_new_digest(path: Path) -> None:
    """An agent's row is written anew by a fork, so what is wrong with it has to be found before."""
    rows_changed(path, "UPDATE agents SET failures = 7 WHERE name = 'writer'")

    with pytest.raises(DatabaseDamaged, match="does not pass the check"):
        fork(path, path.with_name("fork.db"), quiet, at=4)

    assert not [file for file in path.parent.iterdir() if "fork" in file.name]


def test_dry_run_says_what_goes_and_writes_nothing(path: Path) -> None:
    before, out = checksums(path.parent), path.with_name("fork.db")

    told = fork(path, out, quiet, at=4, dry_run=True)

    assert checksums(path.parent).keys() - {"ael.db-wal", "ael.db-shm"} == before.keys()
    assert not out.exists()
    assert fork(path, out, quiet, at=4) == told

"""The store alone: one value in, one transaction; a token that is checked; an owner that is named."""

from __future__ import annotations

import asyncio
import gc
import os
import sqlite3
from dataclasses import fields
from pathlib import Path

import pytest

from ael_store.clock import SystemClock
from ael_store.errors import DatabaseNotUsable, NotADatabase, OwnedElsewhere, OwnershipLost, UsageError
from ael_store.model import records
from ael_store.model.event import Emission, Event
from ael_store.model.records import Resumed
from ael_store.model.state import State
from ael_store.model.unit import Unit
from ael_store.runtime.journal import Journal
from ael_store.schema.tables import metadata
from ael_store.store import reader
from ael_store.store.lock import DatabaseLock, current_holder
from ael_store.store.sqlite import Driver, database_path
from ael_store.store.store import Store
from tests.loops import until


def make_journal(resumed: Resumed) -> Journal:
    return Journal(resumed, State(resumed.cells, resumed.change_id), run_id=1)


def apply(journal: Journal, **values: str | None) -> None:
    """Let a unit from outside write some keys and emit one event."""
    clock = SystemClock()
    unit = Unit("outside", "test", journal.state, iteration=0, now_us=clock.now_us(), seed=1)
    for key, text in values.items():
        unit.write(key, text)
    unit.emit(Emission.of(Event("changed", "test", {"keys": sorted(values)}), now_us=unit.now_us))
    unit.closed = True
    journal.apply(unit, 0)


def rows(path: Path, sql: str) -> list[tuple[object, ...]]:
    with sqlite3.connect(path) as connection:
        return connection.execute(sql).fetchall()


async def test_committed_unit_is_in_the_file_when_commit_returns(tmp_path: Path) -> None:
    store = Store(tmp_path / "ael.db")
    journal = make_journal(resumed := await store.open("test"))
    apply(journal, a="1", b='"two"')

    await store.commit(journal.take("command", 1), take_from=resumed.token)

    assert rows(store.path, "SELECT key, value, version FROM v_state ORDER BY key") == [
        ("a", "1", 1),
        ("b", '"two"', 1),
    ]
    assert rows(store.path, "SELECT type, source, data FROM v_events") == [("changed", "test", '{"keys":["a","b"]}')]
    await store.close()


async def test_history_keeps_old_and_new_values_over_delete_and_set_again(tmp_path: Path) -> None:
    store = Store(tmp_path / "ael.db")
    journal = make_journal(resumed := await store.open("test"))
    token: int | None = resumed.token
    for text in ("1", "2", None, "3"):
        apply(journal, a=text)
        await store.commit(journal.take("command", 1), take_from=token)
        journal.done()
        token = None

    history = rows(store.path, "SELECT operation, old_value, new_value FROM v_state_history ORDER BY id")
    await store.close()

    assert history == [("set", None, "1"), ("set", "1", "2"), ("delete", "2", None), ("set", None, "3")]
    assert rows(store.path, "SELECT value, version FROM v_state") == [("3", 1)]


async def test_several_changes_of_a_key_in_one_commit_leave_the_newest_in_the_state(tmp_path: Path) -> None:
    store = Store(tmp_path / "ael.db")
    journal = make_journal(resumed := await store.open("test"))
    for text in ("1", "2", None, "4"):
        apply(journal, a=text)

    await store.commit(journal.take("command", 1), take_from=resumed.token)
    await store.close()

    assert rows(store.path, "SELECT value FROM v_state") == [("4",)]
    assert len(rows(store.path, "SELECT * FROM v_state_history")) == 4


async def test_commit_of_an_overtaken_owner_writes_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path / "ael.db")
    journal = make_journal(resumed := await store.open("test"))
    apply(journal, a="1")
    await store.commit(journal.take("command", 1), take_from=resumed.token)
    journal.done()
    with sqlite3.connect(store.path) as connection:
        connection.execute("UPDATE lease SET token = token + 1")
    connection.close()
    apply(journal, a="2")

    with pytest.raises(OwnershipLost, match="another owner"):
        await store.commit(journal.take("command", 1))

    await store.close()
    assert rows(store.path, "SELECT value FROM v_state") == [("1",)]


async def test_failing_commit_leaves_no_row_and_can_be_made_again(tmp_path: Path) -> None:
    store = Store(tmp_path / "ael.db")
    journal = make_journal(resumed := await store.open("test"))
    apply(journal, fresh="1")
    commit = journal.take("command", 1)
    tick, commit.ticks[0] = commit.ticks[0], commit.ticks[0]._replace(agent_id="no number")  # type: ignore[arg-type]

    with pytest.raises(Exception, match="ticks"):
        await store.commit(commit, take_from=resumed.token)
    assert rows(store.path, "SELECT * FROM keys") == []
    commit.ticks[0] = tick
    await store.commit(commit, take_from=resumed.token)

    await store.close()
    assert rows(store.path, "SELECT key, value FROM v_state") == [("fresh", "1")]


async def test_commit_without_the_private_entry_of_the_driver_writes_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one hop uses a private entry of aiosqlite; the public way must stay equal."""
    found = {}
    for name, private in (("hop", True), ("statements", False)):
        if not private:
            monkeypatch.setattr(Driver, "run", Driver.run_by_statement)
        store = Store(tmp_path / f"{name}.db")
        journal = make_journal(resumed := await store.open("test"))
        apply(journal, a="1", b="2")
        await store.commit(journal.take("command", 1), take_from=resumed.token)
        with pytest.raises(OwnershipLost):
            await store.commit(journal.take("command", 1), take_from=resumed.token + 7)
        await store.close()
        found[name] = rows(store.path, "SELECT key, value, version, agent FROM v_state ORDER BY key")

    assert found["hop"] == found["statements"] == [("a", "1", 1, "(outside)"), ("b", "2", 1, "(outside)")]


async def test_second_owner_is_refused_with_the_first_one_named(tmp_path: Path) -> None:
    first = DatabaseLock(tmp_path / "ael.db")
    first.acquire("loop")

    with pytest.raises(OwnedElsewhere, match=rf"pid {os.getpid()} on .* \(loop\) since 20"):
        DatabaseLock(tmp_path / "ael.db").acquire("loop")

    first.release()
    DatabaseLock(tmp_path / "ael.db").acquire("loop")


def test_looking_at_the_holder_neither_creates_nor_keeps_a_lock(tmp_path: Path) -> None:
    assert current_holder(tmp_path / "ael.db") is None
    assert list(tmp_path.iterdir()) == []
    lock = DatabaseLock(tmp_path / "ael.db")
    lock.acquire("ael state set")

    holder = current_holder(tmp_path / "ael.db")

    assert holder is not None and (holder.pid, holder.what) == (os.getpid(), "ael state set")
    lock.release()
    assert current_holder(tmp_path / "ael.db") is None


async def test_new_files_belong_to_their_owner_alone(tmp_path: Path) -> None:
    store = Store(tmp_path / "ael.db")
    await store.open("test")

    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}

    await store.close()
    assert set(modes.values()) == {0o600}, modes


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda path: path.mkdir(), DatabaseNotUsable, "folder"),
        (
            lambda path: path.write_text("this is not a database, only a text of some length\n" * 50),
            NotADatabase,
            "not",
        ),
        (lambda path: sqlite3.connect(path).execute("CREATE TABLE notes (text)").close(), NotADatabase, "ael"),
    ],
    ids=["folder", "text", "foreign"],
)
async def test_what_is_no_database_of_ours_is_refused_and_left_alone(
    tmp_path: Path, make: object, error: type[Exception], words: str
) -> None:
    path = tmp_path / "ael.db"
    make(path)  # type: ignore[operator]
    before = path.read_bytes() if path.is_file() else None

    with pytest.raises(error, match=words):
        await Store(path).open("test")

    assert (path.read_bytes() if path.is_file() else None) == before
    assert current_holder(path) is None


async def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DatabaseNotUsable, match="missing"):
        await Store(tmp_path / "missing" / "ael.db").open("test")

    assert not (tmp_path / "missing").exists()


def test_address_may_be_a_path_or_a_url(tmp_path: Path) -> None:
    assert database_path(f"sqlite:///{tmp_path}/a.db") == tmp_path / "a.db"
    assert database_path(f"sqlite+aiosqlite:///{tmp_path}/a.db") == tmp_path / "a.db"
    assert database_path(tmp_path / "a.db") == tmp_path / "a.db"
    with pytest.raises(UsageError, match="postgresql"):
        database_path("postgresql://localhost/a")


async def test_temporary_database_can_be_opened_again_and_goes_with_its_store() -> None:
    store = Store(":memory:")
    await store.open("test")
    await store.close()
    await store.open("test")
    path = store.path
    await store.close()

    del store

    await until(lambda: not path.exists())  # the thread that closed it lets go of it a moment later


async def test_many_keys_resume_as_they_are_and_the_garbage_collector_leaves_them_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "CELLS_AT_ONCE", 2)
    monkeypatch.setattr(reader, "MANY_CELLS", 5)
    store = Store(tmp_path / "ael.db")
    journal = make_journal(empty := await store.open("test"))
    apply(journal, **{f"key {number}": str(number) for number in range(5)})
    await store.commit(journal.take("command", 1), take_from=empty.token)
    await store.close()
    frozen = gc.get_freeze_count()

    resumed = await store.open("test")
    frozen = gc.get_freeze_count() - frozen
    gc.unfreeze()
    await store.close()

    assert {key: cell.text for key, cell in resumed.cells.items()} == {f"key {n}": str(n) for n in range(5)}
    assert frozen >= 5
    assert gc.isenabled()


async def test_interned_names_beyond_the_cache_are_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ael_store.store.writer.NAMES_KEPT", 2)
    store = Store(tmp_path / "ael.db")
    journal = make_journal(resumed := await store.open("test"))
    token: int | None = resumed.token
    for name in "abcdabcd":
        apply(journal, **{name: None if name in journal.state.cells else "1"})
        await store.commit(journal.take("command", 1), take_from=token)
        journal.done()
        token = None
    await store.close()

    assert rows(store.path, "SELECT name FROM keys ORDER BY id") == [("a",), ("b",), ("c",), ("d",)]


@pytest.mark.parametrize(
    ("record", "table"),
    [
        (records.TickRow, "ticks"),
        (records.TickError, "tick_errors"),
        (records.IterationRecord, "iterations"),
        (records.RunRecord, "runs"),
        (records.AgentRecord, "agents"),
        (records.AgentStats, "agent_stats"),
        (records.SubscriptionRecord, "subscriptions"),
        (records.DeadLetterRecord, "dead_letters"),
        (records.DelayedRecord, "delayed_events"),
        (records.ScheduleRecord, "schedules"),
        (records.CommandRecord, "commands"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_fields_of_a_record_are_the_columns_of_its_table(record: type, table: str) -> None:
    names = getattr(record, "_fields", None) or [item.name for item in fields(record) if item.name != "patterns"]

    of_the_store = ("digest", "seal", "recent")
    columns = [column.name for column in metadata.tables[table].columns if column.name not in of_the_store]
    assert list(names) == columns


PLANS = {
    "key of the state": "SELECT * FROM v_state WHERE key = 'a'",
    "agent of the state": "SELECT * FROM v_state WHERE agent = 'a'",
    "key of the history": "SELECT * FROM v_state_history WHERE key = 'a' ORDER BY id DESC LIMIT 100",
    "agent of the history": "SELECT * FROM v_state_history WHERE agent = 'a'",
    "id of the history": "SELECT * FROM v_state_history WHERE id = 1",
    "type of events": "SELECT * FROM v_events WHERE type = 'a' ORDER BY id DESC LIMIT 100",
    "source of events": "SELECT * FROM v_events WHERE source = 'a'",
    "id of events": "SELECT * FROM v_events WHERE id = 1",
    "agent of ticks": "SELECT * FROM v_ticks WHERE agent = 'a' ORDER BY id DESC LIMIT 100",
    "id of ticks": "SELECT * FROM v_ticks WHERE id = 1",
    "name of agents": "SELECT * FROM v_agents WHERE name = 'a'",
    "number of iterations": "SELECT * FROM v_iterations WHERE iteration = 1",
    "number of runs": "SELECT * FROM v_runs WHERE run_id = 1",
    "key of tasks": "SELECT * FROM v_tasks WHERE key = 'a'",
    "agent of tasks": "SELECT * FROM v_tasks WHERE agent = 'a'",
    "number of a sample": "SELECT * FROM v_metrics WHERE id = 1",
    "metric of samples": "SELECT * FROM v_metrics WHERE channel = 'a' AND name = 'b' ORDER BY id DESC LIMIT 10",
    "metric of hours": "SELECT * FROM v_metric_hours WHERE channel = 'a' AND name = 'b'",
    "channel of metrics": "SELECT * FROM v_metric_series WHERE channel = 'a'",
}


@pytest.mark.parametrize("question", PLANS)
async def test_view_answers_without_a_scan(tmp_path: Path, question: str) -> None:
    store = Store(tmp_path / "ael.db")
    await store.open("test")
    await store.close()

    plan = [str(row[3]) for row in rows(store.path, f"EXPLAIN QUERY PLAN {PLANS[question]}")]

    assert not [step for step in plan if step.startswith("SCAN")], plan


async def test_newest_samples_of_a_metric_come_in_the_order_of_the_index(tmp_path: Path) -> None:
    """So the newest ten cost ten rows, however many there are."""
    store = Store(tmp_path / "ael.db")
    await store.open("test")
    await store.close()

    plan = [str(row[3]) for row in rows(store.path, f"EXPLAIN QUERY PLAN {PLANS['metric of samples']}")]

    assert any("ix_metric_samples_metric_id (metric_id=?)" in step for step in plan), plan
    assert not any("TEMP B-TREE" in step for step in plan), plan


async def test_pending_is_found_through_the_index_of_the_type(tmp_path: Path) -> None:
    """Subscriptions and event types are few; events are many."""
    store = Store(tmp_path / "ael.db")
    await store.open("test")
    await store.close()

    plan = [str(row[3]) for row in rows(store.path, "EXPLAIN QUERY PLAN SELECT * FROM v_pending")]

    assert any("ix_events_type_id (type_id=? AND rowid>?)" in step for step in plan), plan


def test_commit_waits_for_a_command_that_holds_the_lock_for_a_moment(tmp_path: Path) -> None:
    held = DatabaseLock(tmp_path / "ael.db")
    held.acquire("ael state set")

    async def both() -> None:
        asyncio.get_running_loop().call_later(0.1, held.release)
        store = Store(tmp_path / "ael.db")
        await store.open("loop")
        await store.close()

    asyncio.run(both())

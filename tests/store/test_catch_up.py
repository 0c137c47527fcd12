"""No commit writes the indexes of the history; they catch up, and whoever asks sees no difference."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pytest

from ael_store.schema.recent import TABLES
from ael_store.store import catch_up, checkpoint
from ael_store.store.catch_up import count_recent
from ael_store.store.store import Store
from ael_store.store.verify import verify
from tests.loops import agent, controller_on, rows

QUESTIONS = {
    "key": "SELECT * FROM v_state_history WHERE key = 'a' ORDER BY id DESC LIMIT 100",
    "agent of changes": "SELECT * FROM v_state_history WHERE agent = 'busy' ORDER BY id",
    "type": "SELECT * FROM v_events WHERE type = 'done' ORDER BY id DESC LIMIT 100",
    "source": "SELECT * FROM v_events WHERE source = 'busy' ORDER BY id",
    "agent": "SELECT * FROM v_ticks WHERE agent = 'listener' ORDER BY id",
    "id": "SELECT * FROM v_events WHERE id = 7",
    "newest": "SELECT * FROM v_events ORDER BY id DESC LIMIT 5",
    "count": "SELECT type, count(*) FROM v_events GROUP BY type ORDER BY type",
    "subject": "SELECT * FROM v_causes WHERE subject = 'a' ORDER BY effect_id",
}


async def make_history(path: Path, iterations: int) -> None:
    """Run an agent that changes one of four keys in each iteration, and one that hears of it."""

    def tick(context: Any) -> None:
        context.set("abcd"[context.iteration % 4], context.iteration)
        context.emit("done", {"n": context.iteration})

    def event(event: Any, context: Any) -> None:
        context.increment("heard")

    busy, listener = agent("busy", tick=tick), agent("listener", event=event, subscriptions=("done",))
    await controller_on(path, busy, listener, tick_rate=0).run(iterations=iterations)


def recent_rows(path: Path) -> dict[str, int]:
    return {table: rows(path, f"SELECT count(*) FROM {table} WHERE recent = 1")[0] for table in TABLES}


def answers(path: Path) -> dict[str, list[Any]]:
    connection = sqlite3.connect(path)
    try:
        return {name: connection.execute(question).fetchall() for name, question in QUESTIONS.items()}
    finally:
        connection.close()


async def test_answers_are_the_same_before_and_after_catching_up(tmp_path: Path) -> None:
    path = tmp_path / "ael.db"
    await make_history(path, 40)
    before = answers(path)
    assert all(before.values())
    assert all(recent_rows(path).values())

    connection = sqlite3.connect(path)
    half = {table: rows(path, f"SELECT max(id) / 2 FROM {table}")[0] for table in TABLES}
    with connection:  # as it is after the first half was caught up with
        connection.execute("UPDATE ticks SET recent = NULL WHERE id <= ?", (half["ticks"],))
        for table in ("state_changes", "events"):
            connection.execute(f"UPDATE {table} SET recent = NULL WHERE tick_id <= ?", (half["ticks"],))
    assert answers(path) == before
    assert verify(path).problems == []

    with connection:
        catch_up.catch_up(connection)
    connection.close()

    assert set(recent_rows(path).values()) == {0}
    assert answers(path) == before
    assert verify(path).problems == []
    assert rows(path, "PRAGMA integrity_check") == ["ok"]


async def test_loop_catches_up_while_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "RECENT_ROWS", 50)
    path = tmp_path / "ael.db"

    await make_history(path, 60)
    await make_history(path, 60)  # what the first run left is counted

    assert sum(recent_rows(path).values()) < 100
    assert rows(path, "SELECT count(*) FROM ticks")[0] > 200
    assert verify(path).problems == []


async def test_question_reads_recent_rows_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "RECENT_ROWS", 50)
    path = tmp_path / "ael.db"

    def steps(question: str) -> int:
        counted = 0

        def count() -> None:
            nonlocal counted
            counted += 1

        connection = sqlite3.connect(path)
        connection.set_progress_handler(count, 10)
        connection.execute(question).fetchall()
        connection.close()
        return counted

    rare = [
        "SELECT * FROM v_state_history WHERE key = 'a' ORDER BY id DESC LIMIT 3",
        "SELECT * FROM v_events WHERE type = 'ael_started' ORDER BY id DESC LIMIT 1",
        "SELECT * FROM v_ticks WHERE agent = 'busy' ORDER BY id DESC LIMIT 3",
    ]
    await make_history(path, 100)
    few = [steps(question) for question in rare]
    await make_history(path, 900)
    many = [steps(question) for question in rare]

    assert all(later < 3 * early + 100 for early, later in zip(few, many, strict=True)), (few, many)


async def test_owner_that_was_taken_over_does_not_catch_up(tmp_path: Path) -> None:
    path = tmp_path / "ael.db"
    await make_history(path, 5)
    store = Store(path)
    await store.open("test")
    assert store._driver is not None
    recent = recent_rows(path)
    assert sum(recent.values()) == await store._driver.run(count_recent)

    await store._driver.run(store._writer.catch_up)  # it has committed nothing yet: this token is not known to be its

    assert recent_rows(path) == recent
    await store.close()


async def test_rows_that_would_be_hidden_are_found(tmp_path: Path) -> None:
    path = tmp_path / "ael.db"

    await make_history(path, 5)
    connection = sqlite3.connect(path)
    with connection:
        catch_up.catch_up(connection)
        connection.execute("UPDATE events SET recent = 1 WHERE id = 3")
    connection.close()

    assert verify(path).problems == ["table events: 1 rows before indexed ones are in no index"]

"""Tasks in the database: verified like the rest, and found by index among any number of old ones."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from ael_store import connect
from ael_store.cli.main import main
from ael_store.store.reader import Reader
from ael_store.store.verify import verify
from ael_store.testing import Harness
from tests.loops import controller_on, rows, running, until, worker

OLD = 200_000
LIVE_PLAN = "SELECT * FROM tasks WHERE applied_us IS NULL"
HOT = {
    "what a start loads": (LIVE_PLAN, "ix_tasks_live"),
    "the task of a key": ("SELECT id FROM tasks WHERE key = 'k'", "key=?"),
    "attempts that have not ended": ("SELECT * FROM task_attempts WHERE ended_us IS NULL", "ix_task_attempts_open"),
    "starts of a limit": (
        "SELECT count(*) FROM task_attempts WHERE limit_name = 'llm' AND started_us > 0",
        "ix_task_attempts_limit_name_started_us",
    ),
    "attempts of a task": ("SELECT * FROM task_attempts WHERE task_id = 1", "task_id=?"),
    "a task by its number": ("SELECT * FROM v_tasks WHERE id = 1", "rowid=?"),
    "a task by its key": ("SELECT * FROM v_tasks WHERE key = 'k'", "key=?"),
    "tasks of an agent": ("SELECT * FROM v_tasks WHERE agent = 'worker'", "agent_id=?"),
    "limits": ("SELECT * FROM v_limits WHERE name = 'llm'", "ix_task_attempts_limit_name_started_us"),
}


async def double(self: Any, task: Any, number: int) -> int:
    task.cost("0.5")
    if number < 0:
        raise ValueError("negative")
    return number * 2


@pytest.fixture
async def path(tmp_path: Path) -> Path:
    """A database with tasks: done, failed after two attempts, waiting; and with a limit."""
    path = tmp_path / "ael.db"
    async with Harness([worker(double, limit="llm", attempts=2)], store=path, tick_rate=3600) as h:
        for key, number, after in (("good", 4, None), ("bad", -1, None), ("late", 1, "10 days")):
            h.emit("go", {"key": key, "args": [number], "after": after})
        await h.advance("1h")
    return path


def change(path: Path, statement: str, *parameters: Any) -> None:
    with closing(sqlite3.connect(path)) as connection:
        changed = connection.execute(statement, parameters).rowcount
        connection.commit()
    assert changed > 0


@pytest.mark.parametrize(
    ("table", "assignment", "where"),
    [
        ("tasks", "result = '9'", "key = 'good'"),
        ("tasks", "status = 'waiting'", "key = 'good'"),
        ("tasks", "status = 'done'", "key = 'late'"),
        ("tasks", "key = 'other'", "key = 'good'"),
        ("tasks", "args = '[5]'", "key = 'late'"),
        ("tasks", "cost_usd = '0.1'", "key = 'bad'"),
        ("tasks", "applied_us = NULL", "key = 'good'"),
        ("tasks", "next_us = 1", "key = 'late'"),
        ("tasks", "agent_id = 0", "key = 'good'"),
        ("tasks", "priority = 9", "key = 'late'"),
        ("task_attempts", "outcome = 'done'", "outcome = 'failed'"),
        ("task_attempts", "cost_usd = '0.0'", "number = 2"),
        ("task_attempts", "started_us = started_us - 1", "number = 1"),
        ("task_attempts", "ended_us = NULL", "number = 2"),
        ("task_attempts", "limit_name = NULL", "number = 1"),
        ("task_attempts", "task_id = 77", "number = 2"),
        ("limits", "raised = '{\"per_day\": 100}'", "name = 'llm'"),
    ],
    ids=lambda value: str(value),
)
def test_value_that_was_changed_behind_the_back_of_the_loop_is_found(
    path: Path, table: str, assignment: str, where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify(path).problems == []

    change(path, f"UPDATE {table} SET {assignment} WHERE {where}")

    problems = verify(path).problems
    assert any(table in str(problem) or "task" in str(problem) for problem in problems), problems
    assert main(["db", "verify", "--db", str(path)]) != 0
    captured = capsys.readouterr()
    assert "task" in captured.out + captured.err or table in captured.out + captured.err


@pytest.mark.parametrize("table", ["tasks", "task_attempts"])
def test_row_that_is_gone_is_found(path: Path, table: str) -> None:
    change(path, f"DELETE FROM {table} WHERE id = 1")

    assert verify(path).problems != []


def test_backup_recovery_and_verify_keep_tasks_as_they_are(path: Path) -> None:
    everything = "SELECT id, key, name, args, result, error, cost_usd, applied_us FROM tasks ORDER BY id"
    backup, out = path.with_name("backup.db"), path.with_name("out.db")
    assert main(["db", "backup", str(backup), "--db", str(path)]) == 0
    assert main(["db", "recover", str(path), "--to", str(out)]) == 0

    assert rows(backup, everything) == rows(out, everything) == rows(path, everything)
    assert len(rows(out, "SELECT id FROM task_attempts")) == len(rows(path, "SELECT id FROM task_attempts")) == 3
    assert verify(out).problems == verify(backup).problems == []


def add_old(path: Path) -> None:
    """Add finished tasks with an attempt each, as plain SQL."""
    with closing(sqlite3.connect(path)) as connection:
        columns = [row[1] for row in connection.execute("PRAGMA table_info(tasks)")]
        own = {"id": "1000 + n", "key": "'old ' || n", "digest": "NULL"}
        source = ", ".join(own.get(column, column) for column in columns)
        numbers = f"WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c WHERE n < {OLD})"
        connection.execute(
            f"INSERT INTO tasks ({', '.join(columns)}) {numbers} SELECT {source} FROM c, tasks WHERE key = 'good'"
        )
        columns = [row[1] for row in connection.execute("PRAGMA table_info(task_attempts)")]
        own = {"id": "1000 + n", "task_id": "1000 + n", "digest": "NULL"}
        source = ", ".join(own.get(column, column) for column in columns)
        connection.execute(
            f"INSERT INTO task_attempts ({', '.join(columns)}) {numbers} "
            f"SELECT {source} FROM c, task_attempts WHERE id = 1"
        )
        connection.commit()


def plans(path: Path) -> dict[str, str]:
    found = {}
    for name, (query, _index) in HOT.items():
        steps = [str(row[3]) for row in rows(path, f"EXPLAIN QUERY PLAN {query}")]
        found[name] = "\n".join(steps)
    return found


async def test_many_finished_tasks_change_no_plan_and_are_not_loaded_at_a_start(path: Path) -> None:
    before = plans(path)
    add_old(path)
    after = plans(path)

    assert after == before
    for name, (_query, index) in HOT.items():
        assert index in after[name], (name, after[name])
        whole = [step for step in after[name].split("\n") if step.startswith("SCAN") and "INDEX ix_" not in step]
        assert whole == [], name
    reader = Reader(path)
    try:
        live = [record.key for record in reader.resume().tasks]
    finally:
        reader.close()
    assert live == ["late"]
    assert rows(path, "SELECT count(*) FROM tasks") == [OLD + 3]


async def test_old_keys_are_known_among_many_and_new_tasks_run(path: Path) -> None:
    add_old(path)
    runs: list[str] = []

    async def work(self: Any, task: Any, number: int) -> int:
        runs.append(task.key)
        return number

    controller = controller_on(path, worker(work), tick_rate=3600)
    async with running(controller):
        with connect(path) as client:
            known = await asyncio.to_thread(client.submit, "work", 1, agent="worker", key="old 777")
            new = await asyncio.to_thread(client.submit, "work", 1, agent="worker", key="new")
        await until(lambda: controller.state_context.get("applied new"))

    assert known == 1777
    assert new > 1000 + OLD
    assert [key for key in runs if key != "late"] == ["new"]

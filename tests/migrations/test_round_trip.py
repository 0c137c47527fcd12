"""A database that a loop has written goes down to each earlier revision and up again, and can still be proven."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ael_store import AgentBase, Event, Settings, StateContext, Task
from ael_store.runtime.prune_alone import prune_alone
from ael_store.store.revision import reading
from ael_store.store.upgrade import downgrade, upgrade
from ael_store.store.verify import NEWEST, look_at_newest, verify, verify_newest
from tests.loops import controller_on
from tests.migrations.conftest import REVISIONS
from tests.migrations.fill import ask, execute, fill

OLDER = REVISIONS[:-1]


class Clerk(AgentBase):
    """Submits tasks, replies, and asks one question."""

    name = "clerk"
    priority = 10
    subscriptions = ("order",)

    async def on_tick(self, context: StateContext) -> None:
        number = context.increment("orders")
        context.emit("order", {"number": number})
        if number % 5 == 0:
            context.submit(self.pack, number, key=f"pack {number}")
        if number == 1:
            context.ask("Shall it be wrapped?", choices=["yes", "no"], key="wrapped")

    async def on_event(self, event: Event, context: StateContext) -> None:
        if event.type == "order":
            event.reply({"number": context.increment("handled")}, type="packed")

    async def pack(self, attempt: object, number: int) -> int:
        return number

    async def on_task(self, task: Task, context: StateContext) -> None:
        context.increment(f"applied {task.key}")


@pytest.fixture
async def lived(tmp_path: Path) -> Path:
    """A database with tasks, replies, and a history whose beginning is removed."""
    path = tmp_path / "lived.db"
    await controller_on(path, Clerk()).run(iterations=250)
    await prune_alone(path, Settings(history_rows=50), lambda line: None)
    assert ask(path, "SELECT min(iteration) FROM v_iterations")[0][0] > 1
    assert ask(path, "SELECT count(*) FROM v_tasks WHERE status = 'done'")[0][0] > 5
    assert ask(path, "SELECT count(*) FROM events WHERE target_id IS NOT NULL")[0][0] > 5
    assert verify(path).problems == []
    return path


async def test_downgrade_and_upgrade_leave_a_database_that_is_proven_and_goes_on(lived: Path, tmp_path: Path) -> None:
    counted = ask(lived, "SELECT tick_count, error_count, event_count FROM v_agents")
    for revision in OLDER:
        path = tmp_path / f"{revision}.db"
        shutil.copyfile(lived, path)

        downgrade(path, revision, backup=False)
        upgrade(path, backup=False)

        assert verify(path).problems == [], revision
        verify_newest(path)
        assert ask(path, "SELECT tick_count, error_count, event_count FROM v_agents") == counted
        await controller_on(path, Clerk()).run(iterations=3)
        assert verify(path).problems == [], revision
        again = ask(path, "SELECT key, value FROM v_state WHERE key LIKE 'applied %' AND value <> '1'")
        assert again == [], f"from {revision}: results were taken up twice"


def test_task_whose_result_was_not_taken_up_keeps_it_for_the_next_start(lived: Path) -> None:
    execute(lived, "UPDATE tasks SET applied_us = NULL, digest = NULL WHERE key = 'pack 5'")
    tasks = ask(lived, "SELECT id, status, kind, question, next_us, applied_us IS NULL FROM tasks ORDER BY id")

    downgrade(lived, "0003", backup=False)
    upgrade(lived, backup=False)

    assert ask(lived, "SELECT id, status, kind, question, next_us, applied_us IS NULL FROM tasks ORDER BY id") == tasks
    assert ("question", "Shall it be wrapped?") in [(row[2], row[3]) for row in tasks]


def test_positions_survive_the_first_schema(lived: Path) -> None:
    positions = ask(lived, "SELECT name, value FROM positions ORDER BY 1")
    totals = ask(lived, "SELECT agent_id, tick_id, ticks, errors, events FROM agent_totals")
    facts = "SELECT name, value FROM meta WHERE name <> 'tasks_without_attempts' ORDER BY 1"
    meta = ask(lived, facts)
    assert "horizon" in dict(positions)
    assert totals

    downgrade(lived, "0001", backup=False)
    upgrade(lived, backup=False)

    assert ask(lived, "SELECT name, value FROM positions ORDER BY 1") == positions
    assert ask(lived, "SELECT agent_id, tick_id, ticks, errors, events FROM agent_totals") == totals
    assert ask(lived, facts) == meta


def test_start_after_a_crash_looks_at_the_newest_commits_only_where_none_has_a_digest(tmp_path: Path) -> None:
    path = tmp_path / "ael.db"
    path.touch(0o600)
    upgrade(path, revision="0001", backup=False)
    fill(path, "0001", iterations=2000)
    upgrade(path, backup=False)

    with reading(path) as connection:
        report = look_at_newest(connection)

    assert report.problems == []
    assert 0 < report.commits <= NEWEST

"""A disk without room: the loop waits with the same commit, runs nobody twice, and goes on when there is room."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from ael_store import AELController, AgentBase, AgentManager, StateContext
from ael_store.errors import DiskFull
from ael_store.store.store import Store


class Counter(AgentBase):
    name = "counter"
    priority = 10
    calls = 0

    async def on_tick(self, context: StateContext) -> None:
        Counter.calls += 1
        context.increment("n")
        context.set("blob", "x" * 20_000 + str(context.get("n")))


async def limit_pages(store: Store, pages: int) -> None:
    """SQLite's own limit answers like a full disk does."""

    def pragma(connection: Any) -> None:
        connection.cursor().execute(f"PRAGMA max_page_count = {pages}").fetchall()

    assert store._driver is not None
    await store._driver.run(pragma)


def fill_after_third_iteration(controller: AELController) -> asyncio.Event:
    """Take the room away once three iterations are committed; the event says when."""
    full = asyncio.Event()

    def observe(summary: Any) -> None:
        if summary.iteration == 3:
            task = asyncio.get_running_loop().create_task(limit_pages(controller.store, 1))
            task.add_done_callback(lambda _: full.set())

    controller.observe(observe)
    return full


async def test_commit_on_a_full_disk_is_tried_again_and_no_agent_runs_twice(tmp_path: Path) -> None:
    Counter.calls = 0
    manager = AgentManager()
    manager.register(Counter())
    controller = AELController(manager, tick_rate=0, store=tmp_path / "ael.db")
    full = fill_after_third_iteration(controller)
    running = asyncio.create_task(controller.run(iterations=40))
    await full.wait()
    await asyncio.sleep(0.2)
    calls = Counter.calls
    await asyncio.sleep(0.2)
    assert Counter.calls == calls < 40, "no unit may run while a commit waits for room"
    await limit_pages(controller.store, 1_000_000)
    await running

    with sqlite3.connect(tmp_path / "ael.db") as connection:
        assert connection.execute("SELECT value FROM v_state WHERE key = 'n'").fetchall() == [("40",)]
        assert connection.execute("SELECT count(*), max(iteration) FROM v_iterations").fetchall() == [(40, 40)]
    assert Counter.calls == 40


async def test_stop_on_a_full_disk_ends_with_the_error_and_loses_no_commit(tmp_path: Path) -> None:
    manager = AgentManager()
    manager.register(Counter())
    controller = AELController(manager, tick_rate=0, store=tmp_path / "ael.db")
    full = fill_after_third_iteration(controller)
    running = asyncio.create_task(controller.start())
    await full.wait()
    await asyncio.sleep(0.1)
    await controller.stop()

    with pytest.raises(DiskFull, match="disk is full"):
        await running
    with sqlite3.connect(tmp_path / "ael.db") as connection:
        found = connection.execute("SELECT count(*), max(iteration) FROM v_iterations").fetchone()
        value = connection.execute("SELECT value FROM v_state WHERE key = 'n'").fetchone()[0]
    assert found[0] == found[1] == int(value) >= 3

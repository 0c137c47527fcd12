"""A hundred tasks that wait do not make the clock late."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

from ael_store import AgentBase, StateContext, task
from tests.acceptance.database import ask
from tests.loops import controller_on

OPEN = 100
TICKS = 60
PERIOD_S = 0.05
LATE_S = 0.1
"""Far more than is measured (`./dev bench tasks`); less than one stall of a second."""


class Waiting(AgentBase):
    """Submits tasks of 30 s, and notes when it ticks."""

    name = "waiting"
    priority = 10

    def __init__(self) -> None:
        super().__init__()
        self.moments: list[float] = []

    async def on_start(self, context: StateContext) -> None:
        for _ in range(OPEN):
            context.submit(self.wait)

    async def on_tick(self, context: StateContext) -> None:
        self.moments.append(time.monotonic())
        context.set("tick", self.tick_count)

    @task
    async def wait(self, attempt: Any) -> None:
        await asyncio.sleep(30)


async def test_hundred_open_tasks_leave_the_clock_alone(tmp_path: Path) -> None:
    agent = Waiting()
    controller = controller_on(tmp_path / "ael.db", agent, tick_rate=PERIOD_S, grace=0.05)
    begun = time.monotonic()

    loop = asyncio.create_task(controller.start())
    while len(agent.moments) < TICKS and not loop.done():
        await asyncio.sleep(PERIOD_S)
    statuses = ask(tmp_path / "ael.db", "SELECT status, count(*) FROM v_tasks GROUP BY status")
    await controller.stop()
    await loop

    assert statuses == [("running", OPEN)]
    assert time.monotonic() - begun < 20, "the end did not wait for them"
    offsets = [moment - number * PERIOD_S for number, moment in enumerate(agent.moments[:TICKS])]
    late = sorted(offset - min(offsets) for offset in offsets)
    assert late[TICKS // 2] < LATE_S, late
    assert ask(tmp_path / "ael.db", "SELECT status, count(*), max(attempts) FROM v_tasks GROUP BY status") == [
        ("waiting", OPEN, 1)
    ]

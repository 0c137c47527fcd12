"""What waits for a subscriber that is away is kept for `backlog_days`, then skipped, and that is reported."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path

from ael_store import AgentBase, Event, StateContext
from ael_store.testing import Harness
from tests.loops import controller_on

START = datetime(2026, 1, 1, tzinfo=UTC)


class Emitter(AgentBase):
    name = "emitter"
    priority = 10

    async def on_tick(self, context: StateContext) -> None:
        context.emit("hour", {"n": context.increment("hours")})


class Reader(AgentBase):
    name = "reader"
    subscriptions = ("hour",)

    async def on_event(self, event: Event, context: StateContext) -> None:
        context.set("read", [*context.get("read", []), event.data["n"]])


async def test_backlog_of_an_absent_subscriber_ends_after_its_time_and_is_reported(tmp_path: Path) -> None:
    store = tmp_path / "ael.db"
    async with Harness([Emitter(), Reader()], tick_rate=3600, store=store, start=START) as h:
        await h.advance("3 hours")
    async with Harness([Emitter()], tick_rate=3600, store=store, start=START + timedelta(hours=4)) as h:
        await h.advance("9 days")
        hours = h.state["hours"]
        problems = h.sql("SELECT kind, subject, detail FROM v_problems WHERE kind = 'expired_subscriber'")

    async with Harness([Reader()], tick_rate=3600, store=store, start=START + timedelta(days=9, hours=5)) as h:
        await h.advance("2 hours")
        read = h.state["read"]

    assert [row["subject"] for row in problems] == ["reader"]
    kept = [n for n in read if n > 4]
    assert read[:4] == [1, 2, 3, 4]
    assert kept == list(range(kept[0], hours + 1)), "what is kept comes in order and without a gap"
    assert 7 * 24 <= len(kept) <= 7 * 24 + 2


async def test_backlog_of_a_subscriber_that_is_there_is_never_skipped(tmp_path: Path) -> None:
    async with Harness([Emitter(), Reader()], tick_rate=3600, store=tmp_path / "ael.db", start=START) as h:
        await h.advance("10 days")

        assert h.state["read"] == list(range(1, h.state["hours"] + 1))
        assert h.sql("SELECT * FROM v_problems") == []


async def test_summary_tells_how_many_deliveries_wait_whatever_keeps_them(tmp_path: Path) -> None:
    class Three(AgentBase):
        name = "three"
        priority = 10

        async def on_tick(self, context: StateContext) -> None:
            if self.tick_count == 1:
                for number in range(3):
                    context.emit("hour", {"n": number})

    class Failing(Reader):
        name = "failing"

        async def on_event(self, event: Event, context: StateContext) -> None:
            raise ValueError("not today")

    class Slow(Reader):
        name = "slow"
        background = True

        async def on_event(self, event: Event, context: StateContext) -> None:
            await released.wait()

    released = asyncio.Event()
    controller = controller_on(tmp_path / "ael.db", Three(), Failing(), Slow(), Reader(), tick_rate=0)
    pending: list[int] = []
    controller.observe(lambda summary: pending.append(summary.pending))
    asyncio.get_running_loop().call_later(0.2, released.set)

    await controller.run(2)

    assert pending[0] == 6, "three of one that failed, three of one that still runs; the other has got its own"

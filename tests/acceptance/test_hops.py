"""Events that beget events come to an end, and a storm of them takes no ticks from other agents."""

from __future__ import annotations

import asyncio
import logging
import time
from pathlib import Path
from typing import Any

import pytest

from ael_store import AELController, StateContext
from ael_store.client import change
from ael_store.model.event import Event
from tests.loops import ShiftClock, agent, controller_on, iterations_of, rows, running, until

DEAD = "SELECT subscriber, attempts, error FROM v_dead_letters ORDER BY event_id, subscriber"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ael.db"


def echo(heard: list[int], *, after: Any = None) -> Any:
    """Answers each event with the next number of the same type, for ever."""

    async def event(event: Event, context: StateContext) -> None:
        heard.append(event.data)
        context.emit(event.type, event.data + 1, after=after)

    return event


async def set_off(controller: AELController, data: int = 0, type: str = "ping") -> None:
    controller.event_bus.emit(type, "test", data)
    await iterations_of(controller)


# -- the limit ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 5, 64])
async def test_endless_chain_ends_in_a_dead_letter_and_others_are_delivered(path: Path, limit: int) -> None:
    heard: list[int] = []
    controller = controller_on(path, agent("echo", event=echo(heard), subscriptions=["ping"]), hop_limit=limit)
    async with running(controller):
        await set_off(controller)
        await until(lambda: rows(path, DEAD))
        await set_off(controller, 1000)
        await until(lambda: len(rows(path, DEAD)) == 2)

    once = list(range(limit + 1))
    assert heard == [*once, *(1000 + number for number in once)]
    error = f"hop limit: {limit + 1} handlers led to it, one after another"
    assert rows(path, DEAD) == [("echo", 0, error)] * 2
    assert rows(path, "SELECT * FROM v_pending") == []
    assert rows(path, "SELECT hops FROM events WHERE hops IS NOT NULL ORDER BY id") == [*range(1, limit + 2)] * 2
    assert rows(path, "SELECT subject FROM v_problems WHERE kind = 'dead_letters'") == ["echo"]


async def test_event_beyond_the_limit_is_a_dead_letter_of_each_who_wants_it_in_the_commit_of_the_cursor(
    path: Path,
) -> None:
    heard: list[int] = []
    agents = [
        agent("echo", event=echo(heard), subscriptions=["ping"]),
        agent("other", event=lambda event, context: None, subscriptions=["pi*"]),
        agent("deaf", event=lambda event, context: None, subscriptions=["pong"]),
    ]
    controller = controller_on(path, *agents, hop_limit=3)
    controller.event_bus.subscribe("ping", "outsider", lambda event: None)
    async with running(controller):
        await set_off(controller)
        await until(lambda: rows(path, DEAD))
        assert [name for name, *_ in rows(path, DEAD)] == ["echo", "other", "outsider"]
        assert rows(path, "SELECT * FROM v_pending") == []

    moves = rows(path, "SELECT count(DISTINCT commit_id) FROM moves WHERE kind = 'cursor'")
    assert moves == [1]


async def test_no_limit_where_it_is_switched_off(path: Path) -> None:
    heard: list[int] = []
    controller = controller_on(path, agent("echo", event=echo(heard), subscriptions=["ping"]), hop_limit=0, grace=0.1)
    async with running(controller):
        await set_off(controller)
        await until(lambda: len(heard) > 70)

    assert rows(path, DEAD) == []


async def test_delivering_it_again_starts_the_count_anew(path: Path) -> None:
    heard: list[int] = []
    controller = controller_on(path, agent("echo", event=echo(heard), subscriptions=["ping"]), hop_limit=4)
    async with running(controller):
        await set_off(controller)
        await until(lambda: rows(path, DEAD))
        await asyncio.to_thread(change, path, "events.redeliver", {"all": True})
        await until(lambda: len(heard) == 10)
        await until(lambda: len(rows(path, DEAD)) == 1)

    assert heard == list(range(10))


async def test_chain_goes_through_several_agents_callbacks_failures_and_restarts(path: Path) -> None:
    """Every kind of unit that a delivery leads to counts: handlers, callbacks, `on_error`, events of the loop."""
    calls: list[str] = []

    async def fail(event: Event, context: StateContext) -> None:
        calls.append("agent")
        raise ValueError("no")

    async def error(error: Exception, context: StateContext) -> None:
        calls.append("on_error")
        context.emit("failed")

    def build() -> AELController:
        failing = agent("failing", event=fail, error=error, subscriptions=["ping"])
        controller = controller_on(
            path, failing, hop_limit=9, delivery_attempts=1, backoff_after=100, quarantine_after=100
        )
        bus = controller.event_bus

        async def callback(event: Event) -> None:
            calls.append("callback")
            bus.emit("ping", "callback")

        bus.subscribe("failed", "callback", callback)
        return controller

    first = build()
    first.event_bus.emit("ping", "test")
    await first.run(iterations=2)
    for _ in range(10):
        await build().run(iterations=3)

    hops = rows(path, "SELECT type, hops FROM events e JOIN v_events v ON v.id = e.id WHERE hops > 0 ORDER BY e.id")
    assert [hop for type, hop in hops if type == "failed"] == [1, 3, 5, 7, 9]
    assert [hop for type, hop in hops if type == "ping"] == [2, 4, 6, 8, 10]
    assert [hop for type, hop in hops if type == "agent_error"] == [1, 3, 5, 7, 9]
    assert "hop limit: 10" in rows(path, DEAD)[-1][2]
    assert calls[:3] == ["agent", "on_error", "callback"]


async def test_what_is_no_answer_to_an_event_has_no_hops(path: Path) -> None:
    async def tick(context: StateContext) -> None:
        context.emit("x")

    async def transact(context: StateContext) -> None:
        context.emit("x")

    controller = controller_on(path, agent("a", tick=tick, start=tick, shutdown=tick))
    async with running(controller):
        controller.event_bus.emit("x", "test")
        await controller.transact(transact)
        await iterations_of(controller)

    assert rows(path, "SELECT count(*) FROM events WHERE hops IS NOT NULL") == [0]


# -- delays ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", ["1h", 1, "1s"])
async def test_timer_that_a_handler_keeps_going_is_no_endless_chain(path: Path, after: Any) -> None:
    heard: list[int] = []
    clock = ShiftClock()
    hearer = agent("echo", event=echo(heard, after=after), subscriptions=["ping"])
    controller = controller_on(path, hearer, hop_limit=2, clock=clock)
    async with running(controller):
        await set_off(controller)
        for number in range(8):
            await until(lambda number=number: len(heard) > number)
            clock.skip(3600)

    assert heard[:8] == list(range(8))
    assert rows(path, DEAD) == []


async def test_shorter_delay_counts_as_a_hop_also_over_a_restart(path: Path) -> None:
    heard: list[int] = []
    for ahead_s in range(0, 20, 2):
        clock = ShiftClock()
        clock.ahead_s = ahead_s
        hearer = agent("echo", event=echo(heard, after=0.9), subscriptions=["ping"])
        controller = controller_on(path, hearer, hop_limit=2, clock=clock)
        if not ahead_s:
            controller.event_bus.emit("ping", "test", 0)
        await controller.run(iterations=1)

    assert heard == [0, 1, 2]
    assert len(rows(path, DEAD)) == 1


# -- what is said ------------------------------------------------------------------------------------


async def test_warning_comes_once_in_ten_seconds_for_each_type(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    clock = ShiftClock()

    def warnings() -> list[str]:
        found = [record.getMessage() for record in caplog.records if "does not get event" in record.getMessage()]
        return [text.split("(")[1].split(")")[0] for text in found]

    hearer = agent("echo", event=echo([]), subscriptions=["p*"])
    controller = controller_on(path, hearer, hop_limit=1, clock=clock)
    async with running(controller):
        for number, type in enumerate(["ping", "ping", "pong", "ping"], 1):
            await set_off(controller, 0, type)
            await until(lambda number=number: len(rows(path, DEAD)) == number)
        assert warnings() == ["ping", "pong"]
        clock.skip(11)
        await set_off(controller)
        await until(lambda: len(rows(path, DEAD)) == 5)

    assert warnings() == ["ping", "pong", "ping"]


# -- storms ------------------------------------------------------------------------------------------


async def test_storm_takes_no_ticks_from_other_agents_and_memory_stays_bounded(path: Path) -> None:
    """A flooding agent, and a handler that answers each event with two: 95 % of the ticks of another one remain."""
    longest = 0

    async def flood(context: StateContext) -> None:
        for number in range(100):
            context.emit("flood", number)

    async def twice(event: Event, context: StateContext) -> None:
        context.emit("flood", event.data)
        context.emit("flood.more", event.data)

    controller = controller_on(
        path,
        agent("flooding", tick=flood, priority=1, trigger="every 100ms"),
        agent("doubling", event=twice, subscriptions=["flood*"]),
        agent("healthy", tick=lambda context: None),
        tick_rate=0.2,
        grace=0.1,
    )

    def watch(summary: Any) -> None:
        nonlocal longest
        longest = max(longest, summary.pending)

    controller.observe(watch)
    async with running(controller):
        await until(lambda: rows(path, "SELECT count(*) FROM v_events WHERE type GLOB 'flood*'")[0] > 1500)
        await iterations_of(controller, 10)

    clock, missed = rows(path, "SELECT max(clock), sum(missed) FROM iterations")[0]
    assert missed <= (clock + missed) * 0.05 + 1
    assert longest < 5000
    assert rows(path, "SELECT tick_count FROM v_agents WHERE name = 'healthy'")[0] >= clock * 0.95 - 1


async def test_stop_in_the_middle_of_a_storm_ends_within_grace_and_what_is_left_comes_later(path: Path) -> None:
    heard: list[int] = []

    async def slow(event: Event, context: StateContext) -> None:
        heard.append(event.data)
        await asyncio.sleep(pause_s)

    def build(**options: Any) -> AELController:
        hearer = agent("h", event=slow, subscriptions=["x"])
        return controller_on(path, hearer, tick_rate=3600, deliveries_per_iteration=100_000, **options)

    pause_s = 0.02
    controller = build(grace=0.2)
    for number in range(500):
        controller.event_bus.emit("x", "test", number)
    task = asyncio.create_task(controller.start())
    await until(lambda: len(heard) > 2)
    began = time.monotonic()
    await controller.stop()
    took_s = time.monotonic() - began
    await task
    done = len(heard)

    assert took_s < 5, "500 deliveries would take 10 s"
    assert 0 < done < 400
    left = rows(path, "SELECT json(v.data) FROM v_pending p JOIN v_events v ON v.id = p.event_id ORDER BY v.id")
    assert [int(number) for number in left] == list(range(done, 500))
    pause_s = 0.0
    await build().run(iterations=1)
    assert heard == list(range(500)), "in order, none twice and none left out"


async def test_clean_stop_delivers_what_is_pending(path: Path) -> None:
    heard: list[int] = []

    async def tick(context: StateContext) -> None:
        for number in range(300):
            context.emit("x", number)
        await controller.stop()

    async def event(event: Event, context: StateContext) -> None:
        heard.append(event.data)

    agents = [agent("e", tick=tick), agent("h", event=event, subscriptions=["x"])]
    controller = controller_on(path, *agents, deliveries_per_iteration=50, tick_rate=3600)
    await controller.start()

    assert heard == list(range(300))
    assert rows(path, "SELECT type FROM v_pending WHERE type = 'x'") == []


async def test_slow_deliveries_leave_the_clock_its_ticks(path: Path) -> None:
    """Two hundred deliveries of 10 ms are 2 s of work: they do not all come in one iteration."""
    heard: list[int] = []

    async def slow(event: Event, context: StateContext) -> None:
        heard.append(event.data)
        await asyncio.sleep(0.01)

    agents = [agent("h", event=slow, subscriptions=["x"]), agent("healthy", tick=lambda context: None)]
    controller = controller_on(path, *agents, tick_rate=0.2)
    for number in range(200):
        controller.event_bus.emit("x", "test", number)
    async with running(controller):
        await until(lambda: len(heard) == 200)

    assert heard == list(range(200))
    assert max(rows(path, "SELECT count(*) FROM v_ticks WHERE kind = 'event' GROUP BY iteration")) < 60
    assert rows(path, "SELECT sum(missed) FROM iterations")[0] <= 1

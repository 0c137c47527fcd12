"""Events are delivered in order, with exactly-once effect, to those who were there and those who were away."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from ael_store import AELController, StateContext
from ael_store.model.event import Event
from tests.loops import ShiftClock, agent, controller_on, iterations_of, rows, running, until


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ael.db"


class Ears:
    """Hears events, as a callback or as an `on_event`."""

    def __init__(self) -> None:
        self.heard: list[Any] = []

    async def __call__(self, event: Event, context: StateContext | None = None) -> None:
        self.heard.append(event.data)


async def emit_outside(controller: AELController, *data: Any) -> None:
    for item in data:
        controller.event_bus.emit("x", "test", item)
    await iterations_of(controller, 2)


# -- when --------------------------------------------------------------------------------------------


async def test_events_are_delivered_in_order_after_the_ticks_of_their_iteration(path: Path) -> None:
    calls: list[Any] = []

    def ticking(name: str) -> Any:
        async def tick(context: StateContext) -> None:
            calls.append(f"{name} ticks")
            context.emit("x", f"1 of {name}")
            context.emit("x", f"2 of {name}")

        return tick

    async def event(event: Event, context: StateContext) -> None:
        calls.append(event.data)
        assert event.iteration == context.iteration

    hearer = agent("hearer", event=event, subscriptions=["x"], priority=10)
    await controller_on(path, hearer, agent("a", tick=ticking("a")), agent("b", tick=ticking("b"))).run(iterations=1)

    assert calls == ["a ticks", "b ticks", "1 of a", "2 of a", "1 of b", "2 of b"]


async def test_events_of_handlers_come_in_the_next_iteration_which_follows_at_once(path: Path) -> None:
    async def first(context: StateContext) -> None:
        context.emit("hop", 1)

    async def event(event: Event, context: StateContext) -> None:
        hops.append((event.data, context.iteration))
        if event.data < 4:
            context.emit("hop", event.data + 1)

    hops: list[tuple[int, int]] = []
    ticker = agent("ticker", tick=first)
    controller = controller_on(path, ticker, agent("hopper", event=event, subscriptions=["hop"]), tick_rate=3600)
    async with running(controller):
        await until(lambda: len(hops) == 4)

    assert hops == [(1, 1), (2, 2), (3, 3), (4, 4)]
    assert ticker.tick_count == 1


async def test_events_of_on_start_come_in_the_first_iteration(path: Path) -> None:
    async def start(context: StateContext) -> None:
        context.emit("x", "from on_start")

    async def event(event: Event, context: StateContext) -> None:
        heard.append((event.data, context.iteration))

    heard: list[Any] = []
    starter, hearer = agent("starter", start=start, priority=1), agent("hearer", event=event, subscriptions=["x"])
    await controller_on(path, starter, hearer).run(iterations=1)

    assert heard == [("from on_start", 1)]


async def test_id_and_iteration_of_an_event_are_known_when_its_unit_has_succeeded(path: Path) -> None:
    async def tick(context: StateContext) -> None:
        emitted.append(context.emit("x"))
        emitted.append(controller.event_bus.emit("x", "a"))
        assert [(event.id, event.iteration) for event in emitted[-2:]] == [(None, None)] * 2
        if context.iteration == 2:
            raise ValueError("these never happened")

    emitted: list[Event] = []
    controller = controller_on(path, agent("a", tick=tick))
    await controller.run(iterations=2)

    known = rows(path, "SELECT id, iteration FROM v_events WHERE type = 'x'")
    assert [(event.id, event.iteration) for event in emitted] == [*known, (None, None), (None, None)]


# -- who ---------------------------------------------------------------------------------------------


async def test_subscriber_that_was_away_gets_what_it_missed_in_order(path: Path) -> None:
    here, back, callback = Ears(), Ears(), Ears()

    async def tick(context: StateContext) -> None:
        context.emit("x", context.iteration)

    first = controller_on(path, agent("e", tick=tick), agent("h", event=here, subscriptions=["x"]))
    first.event_bus.subscribe("x", "outsider", Ears())
    await first.run(iterations=2)
    await controller_on(path, agent("e", tick=tick)).run(iterations=3)
    third = controller_on(path, agent("h", event=back, subscriptions=["x"]))
    third.event_bus.subscribe("x", "outsider", callback)
    await third.run(iterations=2)

    assert here.heard == [1, 2]
    assert back.heard == callback.heard == [3, 4, 5]
    assert rows(path, "SELECT * FROM v_pending") == []


async def test_subscriber_seen_for_the_first_time_starts_from_now(path: Path) -> None:
    async def tick(context: StateContext) -> None:
        context.emit("x", context.iteration)

    late, later = Ears(), Ears()
    controller = controller_on(path, agent("e", tick=tick))
    await controller.run(iterations=3)
    controller.event_bus.subscribe("x", "outsider", late)
    controller.agent_manager.register(agent("h", event=later, subscriptions=["x"]))
    await controller.run(iterations=2)

    assert late.heard == later.heard == [4, 5]


async def test_subscribing_the_same_again_changes_nothing(path: Path) -> None:
    one, two = Ears(), Ears()
    controller = controller_on(path)
    controller.event_bus.subscribe("x", "outsider", one)
    async with running(controller):
        await emit_outside(controller, 1)
        controller.event_bus.emit("x", "test", 2)
        controller.event_bus.subscribe("x", "outsider", two)
        await emit_outside(controller, 3)

    assert one.heard + two.heard == [1, 2, 3]
    assert rows(path, "SELECT count(*) FROM subscriptions") == [1]


async def test_unsubscribe_ends_the_cursor(path: Path) -> None:
    ears = Ears()
    controller = controller_on(path)
    bus = controller.event_bus
    bus.subscribe("x", "outsider", ears)
    async with running(controller):
        await emit_outside(controller, 1)
        assert bus.unsubscribe("x", "outsider") is True
        assert bus.unsubscribe("x", "outsider") is False
        await emit_outside(controller, 2)
        bus.subscribe("x", "outsider", ears)
        bus.subscribe("y", "outsider", ears)
        await emit_outside(controller, 3)
        assert bus.unsubscribe_all("outsider") == 2
        await emit_outside(controller, 4)

    assert ears.heard == [1, 3]


async def test_unsubscribe_in_a_hook_holds_if_the_unit_succeeds(path: Path) -> None:
    async def event(event: Event) -> None:
        heard.append(event.data)
        controller.event_bus.unsubscribe("x", "outsider")
        if event.data == 1:
            raise ValueError("so it stays subscribed")

    heard: list[int] = []
    clock = ShiftClock()
    controller = controller_on(path, clock=clock)
    controller.event_bus.subscribe("x", "outsider", event)
    async with running(controller):
        await emit_outside(controller, 1, 2)
        assert heard == [1]
        heard.clear()
        controller.event_bus.subscribe("x", "outsider", Ears())
        ears = Ears()
        controller.event_bus.subscribe("x", "outsider", ears)
        clock.skip(2)
        await until(lambda: ears.heard == [1, 2])

    assert heard == []


async def test_patterns_of_an_agent_have_one_cursor_and_each_callback_its_own(path: Path) -> None:
    ears, one, two = Ears(), Ears(), Ears()
    controller = controller_on(path, agent("h", event=ears, subscriptions=["a.*", "*.z", "a.z"]))
    controller.event_bus.subscribe("a.*", "outsider", one)
    controller.event_bus.subscribe("*.z", "outsider", two)
    async with running(controller):
        for number, type in enumerate(["a.b", "a.z", "b.z", "ab", "A.b"]):
            controller.event_bus.emit(type, "test", number)
        await iterations_of(controller, 2)

    assert (ears.heard, one.heard, two.heard) == ([0, 1, 2], [0, 1], [1, 2])


@pytest.mark.parametrize(
    ("pattern", "type", "matches"),
    [
        ("*", "anything", True),
        ("a*c", "abbc", True),
        ("a*c", "abcd", False),
        ("a[b]", "a[b]", True),
        ("a[b]*", "ab", False),
        ("a?", "ab", False),
        ("a?*", "a?b", True),
        ("x.y", "xzy", False),
        ("č*", "čaj", True),
    ],
)
async def test_pattern_matches_the_same_in_memory_and_after_a_restart(
    path: Path, pattern: str, type: str, matches: bool
) -> None:
    now, later = Ears(), Ears()
    first = controller_on(path, agent("h", event=now, subscriptions=[pattern]))
    first.event_bus.emit(type, "test", "now")
    await first.run(iterations=1)
    second = controller_on(path)
    second.event_bus.emit(type, "test", "later")
    await second.run(iterations=1)
    pending = rows(path, "SELECT type FROM v_pending WHERE type = ?", type)
    await controller_on(path, agent("h", event=later, subscriptions=[pattern])).run(iterations=1)

    assert ("now" in now.heard, "later" in later.heard) == (matches, matches)
    assert pending == [type] * matches


async def test_disabled_agent_gets_its_events_when_it_is_enabled_again(path: Path) -> None:
    ears = Ears()
    hearer = agent("h", event=ears, subscriptions=["x"])
    controller = controller_on(path, hearer)
    async with running(controller):
        hearer.enabled = False
        await iterations_of(controller)
        await emit_outside(controller, 1, 2)
        assert ears.heard == []
        hearer.enabled = True
        await until(lambda: ears.heard == [1, 2])


async def test_changed_patterns_of_an_agent_go_on_from_where_it_was(path: Path) -> None:
    ears = Ears()
    first = controller_on(path, agent("h", event=ears, subscriptions=["x"]))
    await first.run(iterations=1)
    second = controller_on(path)
    second.event_bus.emit("x", "test", 1)
    second.event_bus.emit("y", "test", 2)
    await second.run(iterations=1)
    await controller_on(path, agent("h", event=ears, subscriptions=["y", "x"])).run(iterations=1)

    assert ears.heard == [1, 2]


# -- how often ---------------------------------------------------------------------------------------


async def test_effect_and_cursor_commit_together(path: Path) -> None:
    async def callback(event: Event) -> None:
        controller.state_context.set("seen", event.data)
        controller.event_bus.emit("answer", "outsider", event.data)

    controller = controller_on(path)
    controller.event_bus.subscribe("x", "outsider", callback)
    async with running(controller):
        await emit_outside(controller, 1, 2)

    assert rows(path, "SELECT new_value FROM v_state_history WHERE key = 'seen'") == ["1", "2"]
    answers = rows(path, "SELECT data, iteration FROM v_events WHERE type = 'answer'")
    ticks = rows(path, "SELECT iteration FROM v_ticks WHERE kind = 'event'")
    assert answers == [("1", ticks[0]), ("2", ticks[1])]
    assert rows(path, "SELECT * FROM v_pending") == []


async def test_failing_delivery_blocks_its_order_is_retried_and_leaves_nothing_of_failed_attempts(path: Path) -> None:
    async def event(event: Event, context: StateContext) -> None:
        attempts.append(event.data)
        context.set(f"attempt {len(attempts)}", event.data)
        if len(attempts) < 3:
            raise ValueError("not yet")

    attempts: list[str] = []
    other, clock = Ears(), ShiftClock()
    hearers = [agent("h", event=event, subscriptions=["x"]), agent("o", event=other, subscriptions=["x"])]
    controller = controller_on(path, *hearers, clock=clock)
    async with running(controller):
        await emit_outside(controller, "a", "b")
        assert attempts == ["a"]
        assert other.heard == ["a", "b"]
        assert rows(path, "SELECT subscriber, type, attempts FROM v_pending") == [("h", "x", 1), ("h", "x", 0)]
        clock.skip(1.1)
        await until(lambda: len(attempts) == 2)
        await iterations_of(controller, 2)
        assert len(attempts) == 2
        clock.skip(2.1)
        await until(lambda: len(attempts) == 4)

    assert attempts == ["a", "a", "a", "b"]
    assert rows(path, "SELECT key FROM v_state") == ["attempt 3", "attempt 4"]
    assert other.heard == ["a", "b"]


async def test_delivery_that_keeps_failing_becomes_a_dead_letter_and_the_next_one_comes(path: Path) -> None:
    async def event(event: Event, context: StateContext) -> None:
        attempts.append(event.data)
        if event.data == "bad":
            raise ValueError("never")

    attempts: list[str] = []
    clock = ShiftClock()
    controller = controller_on(path, agent("h", event=event, subscriptions=["x"]), clock=clock, backoff_after=100)
    async with running(controller):
        await emit_outside(controller, "bad", "good")
        for number in range(2, 6):
            clock.skip(9)
            await until(lambda number=number: len(attempts) >= number)
        await until(lambda: attempts[-1] == "good")

    assert attempts == ["bad"] * 5 + ["good"]
    dead = rows(path, "SELECT subscriber, type, attempts, error FROM v_dead_letters")
    assert dead == [("h", "x", 5, "ValueError: never")]
    assert rows(path, "SELECT * FROM v_pending") == []


@pytest.mark.parametrize("kind", ["agent", "callback"])
async def test_delivery_whose_handler_is_cancelled_is_counted_as_an_attempt(path: Path, kind: str) -> None:
    async def event(event: Event, context: StateContext | None = None) -> None:
        attempts.append(event.data)
        raise asyncio.CancelledError

    attempts: list[int] = []
    clock = ShiftClock()
    controller = controller_on(path, clock=clock, delivery_attempts=2)
    if kind == "agent":
        controller.agent_manager.register(agent("h", event=event, subscriptions=["x"]))
    else:
        controller.event_bus.subscribe("x", "h", event)
    async with running(controller):
        await emit_outside(controller, 1)
        await iterations_of(controller, 3)
        assert attempts == [1]
        clock.skip(2)
        await until(lambda: len(attempts) == 2)

    assert rows(path, "SELECT subscriber, attempts FROM v_dead_letters") == [("h", 2)]


async def test_attempts_of_a_delivery_go_on_after_a_restart(path: Path) -> None:
    async def fail(event: Event, context: StateContext) -> None:
        raise ValueError("never")

    for number in range(3):
        clock = ShiftClock()
        clock.ahead_s = 100.0 * number
        controller = controller_on(path, agent("h", event=fail, subscriptions=["x"]), clock=clock, delivery_attempts=3)
        if number == 0:
            controller.event_bus.emit("x", "test")
        await controller.run(iterations=1)

    assert rows(path, "SELECT attempts FROM v_dead_letters") == [3]


async def test_slow_callback_does_not_get_its_event_twice(path: Path) -> None:
    async def slow(event: Event) -> None:
        heard.append(event.data)
        await go.wait()

    heard: list[int] = []
    go = asyncio.Event()
    controller = controller_on(path, slow_after=0.01)
    controller.event_bus.subscribe("x", "outsider", slow)
    async with running(controller):
        await emit_outside(controller, 1)
        await iterations_of(controller, 5)
        await emit_outside(controller, 2, 3)
        assert heard == [1]
        go.set()
        await until(lambda: len(heard) == 3)

    assert heard == [1, 2, 3]
    assert len(rows(path, "SELECT id FROM v_ticks WHERE kind = 'event'")) == 3


async def test_burst_beyond_the_queues_is_delivered_whole_and_in_order(path: Path) -> None:
    async def tick(context: StateContext) -> None:
        for number in range(1300):
            context.emit("x", number)

    ears, callback = Ears(), Ears()
    burst = agent("burst", tick=tick)
    hearer = agent("h", event=ears, subscriptions=["x"])
    controller = controller_on(path, burst, hearer, tick_rate=3600, deliveries_per_iteration=700)
    controller.event_bus.subscribe("x*", "outsider", callback)
    async with running(controller):
        await until(lambda: len(ears.heard) == len(callback.heard) == 1300)

    assert ears.heard == callback.heard == list(range(1300))
    per_iteration = rows(path, "SELECT count(*) FROM v_ticks WHERE kind = 'event' GROUP BY iteration")
    assert max(per_iteration) <= 700


async def test_events_left_at_a_stop_by_a_failing_subscriber_are_delivered_after_it(path: Path) -> None:
    async def fail(event: Event, context: StateContext) -> None:
        raise ValueError("no")

    ears, clock = Ears(), ShiftClock()
    first = controller_on(path, agent("h", event=fail, subscriptions=["x"]))
    for number in range(3):
        first.event_bus.emit("x", "test", number)
    await first.run(iterations=1)
    clock.ahead_s = 60
    await controller_on(path, agent("h", event=ears, subscriptions=["x"]), clock=clock).run(iterations=1)

    assert ears.heard == [0, 1, 2]


async def test_delivery_that_a_stop_cuts_off_is_repeated_by_the_next_run_and_counts_as_no_attempt(path: Path) -> None:
    async def hang(event: Event, context: StateContext) -> None:
        context.set("half", True)
        await asyncio.Event().wait()

    first = controller_on(path, agent("h", event=hang, subscriptions=["x"]), slow_after=0.01, grace=0.03)
    first.event_bus.emit("x", "test", 1)
    await first.run(iterations=2)
    assert rows(path, "SELECT outcome FROM v_ticks WHERE kind = 'event'") == ["cancelled"]
    assert rows(path, "SELECT subscriber, attempts FROM v_pending") == [("h", 0)]
    assert not first.state_context.has("half")

    ears = Ears()
    await controller_on(path, agent("h", event=ears, subscriptions=["x"])).run(iterations=1)
    assert ears.heard == [1]


# -- later -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [3600, "1h", "30m 1800s", timedelta(hours=1), "a time"])
async def test_delayed_event_happens_at_its_time(path: Path, after: Any) -> None:
    async def start(context: StateContext) -> None:
        context.emit("x", "later", after=context.now + timedelta(hours=1) if after == "a time" else after)
        context.emit("x", "now", after=0)

    ears, clock = Ears(), ShiftClock()
    hearer = agent("h", start=start, event=ears, subscriptions=["x"])
    controller = controller_on(path, hearer, tick_rate=100_000, clock=clock)
    async with running(controller):
        await until(lambda: ears.heard == ["now"])
        clock.skip(3500)
        controller.event_bus.emit("x", "test", "between")
        await until(lambda: ears.heard == ["now", "between"])
        clock.skip(150)
        await until(lambda: ears.heard == ["now", "between", "later"])


async def test_delayed_event_happens_once_also_after_restarts(path: Path) -> None:
    async def start(context: StateContext) -> None:
        if not context.resumed:
            context.emit("x", "later", {"m": 1}, after="1h")

    ears = Ears()
    for ahead_s in (0, 1000, 4000, 8000):
        clock = ShiftClock()
        clock.ahead_s = ahead_s
        await controller_on(path, agent("h", start=start, event=ears, subscriptions=["x"]), clock=clock).run(
            iterations=1
        )
        assert ears.heard == ["later"] * (ahead_s >= 4000)

    assert rows(path, "SELECT source, metadata FROM v_events WHERE type = 'x'") == [("h", '{"m":1}')]


async def test_delayed_event_of_a_failed_unit_never_happens(path: Path) -> None:
    async def tick(context: StateContext) -> None:
        context.emit("x", after=0.01)
        raise ValueError("no")

    clock = ShiftClock()
    controller = controller_on(path, agent("a", tick=tick), clock=clock)
    async with running(controller):
        await iterations_of(controller)
        clock.skip(5)
        await iterations_of(controller)

    assert rows(path, "SELECT id FROM v_events WHERE type = 'x'") == []


@pytest.mark.parametrize("after", [-1, float("nan"), float("inf"), "soon", "1 parsec", True, [1], ""])
async def test_wrong_delay_is_refused(path: Path, after: Any) -> None:
    async def tick(context: StateContext) -> None:
        with pytest.raises((TypeError, ValueError), match=r"after=|no length of time"):
            context.emit("x", after=after)
        refused.append(True)

    refused: list[bool] = []
    await controller_on(path, agent("a", tick=tick)).run(iterations=1)

    assert refused == [True]


# -- the bus -----------------------------------------------------------------------------------------


async def test_publish_takes_events_and_mappings_and_keeps_their_time(path: Path) -> None:
    when = datetime(2026, 1, 31, 12, tzinfo=UTC)

    async def tick(context: StateContext) -> None:
        bus.publish(Event("x", "one", {"n": 1}, when, {"m": 1}))
        bus.publish({"type": "x", "source": "two", "data": {"n": 2}, "timestamp": "2026-01-31T13:00:00+01:00"})
        bus.publish({"type": "x"})

    controller = controller_on(path, agent("a", tick=tick))
    bus = controller.event_bus
    await controller.run(iterations=1)

    events = bus.get_event_history("x")
    assert [(event.source, event.data, event.timestamp == when) for event in events] == [
        ("one", {"n": 1}, True),
        ("two", {"n": 2}, True),
        ("outside", None, False),
    ]
    assert rows(path, "SELECT emitted_at FROM v_events WHERE source = 'two'") == ["2026-01-31T12:00:00.000000Z"]


@pytest.mark.parametrize(
    "wrong",
    [
        "x",
        {"source": "no type"},
        {"type": 5},
        {"type": ""},
        {"type": "a*"},
        {"type": "x", "source": None},
        {"type": "x", "data": {1}},
        {"type": "x", "metadata": {"k": object()}},
        {"type": "x", "timestamp": 5},
        {"type": "x", "timestamp": "yesterday"},
    ],
)
async def test_wrong_event_is_refused_where_it_is_published(path: Path, wrong: Any) -> None:
    async def tick(context: StateContext) -> None:
        with pytest.raises((TypeError, ValueError)):
            controller.event_bus.publish(wrong)
        refused.append(True)

    refused: list[bool] = []
    controller = controller_on(path, agent("a", tick=tick))
    with pytest.raises((TypeError, ValueError)):
        controller.event_bus.publish(wrong)
    await controller.run(iterations=1)

    assert refused == [True]
    assert rows(path, "SELECT id FROM v_events WHERE type NOT LIKE 'ael%'") == []


async def test_history_is_the_last_thousand_and_clearing_it_leaves_the_log(path: Path) -> None:
    async def tick(context: StateContext) -> None:
        for number in range(600):
            context.emit("x", number)

    controller = controller_on(path, agent("a", tick=tick))
    bus = controller.event_bus
    async with running(controller):
        await until(lambda: len(bus.get_event_history("x")) == 1000)
        assert [event.data for event in bus.get_event_history("x")] == [*range(200, 600), *range(600)]
        assert bus.get_event_history("x", source="nobody") == []
        controller.agent_manager.unregister("a")
        await iterations_of(controller, 2)
        bus.clear_history()
        assert bus.get_event_history() == []
        bus.emit("y", "test")
        await until(lambda: [event.type for event in bus.get_event_history()] == ["y"])

    assert rows(path, "SELECT count(*) FROM v_events WHERE type = 'x'")[0] >= 1200


async def test_unregistering_between_two_runs_ends_cursor_and_callbacks(path: Path) -> None:
    controller = controller_on(path, agent("a", subscriptions=("x",)))
    controller.event_bus.subscribe("x", "a", lambda event: None)
    await controller.run(1)
    controller.agent_manager.unregister("a")
    controller.event_bus.emit("x", "test")

    await controller.run(2)

    assert rows(path, "SELECT subscriber FROM v_pending") == []
    assert rows(path, "SELECT count(*) FROM subscriptions WHERE ended_us IS NULL") == [0]
    assert controller.event_bus.get_stats()["total_subscribers"] == 0

"""One hook by itself: what it did, how it ended, and that nothing else notices."""

from __future__ import annotations

import asyncio
import threading
import time
from datetime import UTC, datetime
from typing import Any

import pytest

from ael_store import AgentBase, Event, StateContext, UnitClosed, get_event_bus, get_state_context
from ael_store.errors import AelError, InvalidAgent, InvalidValue, InvalidValueType, NotAllowedHere, UsageError
from ael_store.testing import Harness, run_tick


class Thermometer(AgentBase):
    name = "thermometer"

    async def on_tick(self, context: StateContext) -> None:
        temperature = context.get("temperature", 20.0) + 1.0
        context.set("temperature", temperature)
        if temperature > 24.0:
            context.emit("too_hot", {"temperature": temperature})


class Meter(AgentBase):
    """Adds up what it is told."""

    name = "meter"

    async def on_event(self, event: Event, context: StateContext) -> None:
        if event.data == "bad":
            context.set("seen_bad", True)
            raise ValueError("a bad reading")
        context.increment("total", event.data)


def agent(**hooks: Any) -> AgentBase:
    """An agent with these functions (of `context`) as hooks; other keywords are attributes."""
    made = AgentBase("a", **{name: value for name, value in hooks.items() if not name.startswith("on_")})
    for name, function in hooks.items():
        if name.startswith("on_"):
            setattr(made, name, function)
    return made


def event(data: Any, type: str = "reading") -> Event:
    return Event(type, "sensor", data)


# -- a tick that succeeds ----------------------------------------------------------------------------


async def test_result_holds_writes_events_and_state_after() -> None:
    result = await run_tick(Thermometer(), state={"temperature": 24.0, "other": [1]})

    assert result.outcome == "success"
    assert result.writes == {"temperature": 25.0}
    assert result.deletes == set()
    assert [(event.type, event.source, event.data) for event in result.events] == [
        ("too_hot", "thermometer", {"temperature": 25.0})
    ]
    assert result.state == {"other": [1], "temperature": 25.0}
    assert result.tasks == []
    assert result.error is None and result.failure is None
    assert result.check() is result


async def test_removed_keys_are_in_deletes_and_equal_values_nowhere() -> None:
    async def on_tick(context: StateContext) -> None:
        context.delete("old")
        context.delete("never_there")
        context.set("same", {"b": 1, "a": 2})
        context.set("twice", 1)
        context.set("twice", 2)

    result = await run_tick(agent(on_tick=on_tick), state={"old": 1, "same": {"a": 2, "b": 1}})

    assert result.writes == {"twice": 2}
    assert result.deletes == {"old"}
    assert result.state == {"same": {"a": 2, "b": 1}, "twice": 2}


async def test_private_part_of_the_state_is_read_and_written_under_the_name_of_the_agent() -> None:
    async def on_tick(context: StateContext) -> None:
        context.own.increment("runs")

    result = await run_tick(agent(on_tick=on_tick), state={"agent/a/runs": 4})

    assert result.writes == {"agent/a/runs": 5}


async def test_time_and_randomness_are_what_was_asked_for() -> None:
    async def on_tick(context: StateContext) -> None:
        context.set("now", context.now.isoformat())
        context.set("random", context.random.random())

    when = datetime(2026, 3, 29, 1, 0, tzinfo=UTC)
    first = await run_tick(agent(on_tick=on_tick), now=when, seed=7)
    second = await run_tick(agent(on_tick=on_tick), now="2026-03-29T03:00:00+02:00", seed=7)
    other = await run_tick(agent(on_tick=on_tick), now="2026-03-29T01:00", seed=8)

    assert first.writes == second.writes
    assert first.writes["now"] == other.writes["now"] == "2026-03-29T01:00:00+00:00"
    assert first.writes["random"] != other.writes["random"]


async def test_without_a_time_it_is_always_the_same() -> None:
    async def on_tick(context: StateContext) -> None:
        context.set("now", context.now.isoformat())

    assert (await run_tick(agent(on_tick=on_tick))).writes == {"now": "2026-01-01T00:00:00+00:00"}


async def test_delayed_events_are_told_with_their_time() -> None:
    async def on_tick(context: StateContext) -> None:
        context.emit("now")
        context.emit("later", after="30m")

    result = await run_tick(agent(on_tick=on_tick), now="2026-01-01T12:00:00Z")

    assert [event.type for event in result.events] == ["now", "later"]
    assert result.delayed == [(result.events[1], datetime(2026, 1, 1, 12, 30, tzinfo=UTC))]


async def test_plain_hook_runs_in_a_thread() -> None:
    threads = []

    def on_tick(context: StateContext) -> None:
        threads.append(threading.get_ident())
        context.set("done", True)
        get_state_context().set("also", True)

    result = await run_tick(agent(on_tick=on_tick))

    assert result.writes == {"done": True, "also": True}
    assert threads != [threading.get_ident()]


async def test_background_agent_is_waited_for() -> None:
    async def on_tick(context: StateContext) -> None:
        await asyncio.sleep(0.01)
        context.set("done", True)

    assert (await run_tick(agent(on_tick=on_tick, background=True))).writes == {"done": True}


async def test_start_and_shutdown_run_when_they_are_named() -> None:
    async def on_start(context: StateContext) -> None:
        context.set("resumed", context.resumed)

    made = agent(on_start=on_start)

    assert (await run_tick(made, hook="on_start")).writes == {"resumed": False}
    assert (await run_tick(made, hook="on_start", resumed=True)).writes == {"resumed": True}
    assert (await run_tick(made, hook="on_shutdown")).writes == {}


async def test_on_error_runs_with_the_error_that_is_passed() -> None:
    async def on_error(error: Exception, context: StateContext) -> None:
        context.set("last_error", str(error))

    result = await run_tick(agent(on_error=on_error), error=ValueError("no"))

    assert result.writes == {"last_error": "no"}


# -- an inbox ----------------------------------------------------------------------------------------


async def test_each_event_sees_what_those_before_it_did_and_no_tick_runs() -> None:
    class Both(Meter):
        async def on_tick(self, context: StateContext) -> None:
            context.set("ticked", True)

    result = await run_tick(Both(), state={"total": 10}, inbox=[event(1), event(2)])

    assert result.writes == {"total": 13}


async def test_event_may_be_a_mapping() -> None:
    result = await run_tick(Meter(), inbox=[{"type": "reading", "data": 3}])

    assert result.writes == {"total": 3}


async def test_first_event_that_fails_is_the_last_and_earlier_ones_keep_their_effect() -> None:
    made = Meter()

    result = await run_tick(made, inbox=[event(1), event("bad"), event(2)])

    assert result.outcome == "error"
    assert result.writes == {"total": 1}
    assert isinstance(result.error, ValueError)
    assert made.error_count == 1


async def test_handler_gets_a_numbered_copy() -> None:
    sent = event({"list": []})

    async def on_event(event: Event, context: StateContext) -> None:
        event.data["list"].append(1)
        context.set("event", [event.id, event.iteration, event.source])

    result = await run_tick(agent(on_event=on_event), inbox=[sent])

    assert result.writes == {"event": [1, 1, "sensor"]}
    assert sent.data == {"list": []}


async def test_handler_looks_back_at_what_it_got() -> None:
    async def on_event(event: Event, context: StateContext) -> None:
        context.set("seen", [found.data for found in get_event_bus().get_event_history("reading")])
        context.set("changes", len(context.get_history("seen")))

    result = await run_tick(agent(on_event=on_event), inbox=[event(1), event(2)])

    assert result.writes == {"seen": [1, 2], "changes": 1}


# -- a hook that fails -------------------------------------------------------------------------------


async def test_hook_that_raises_leaves_nothing_and_its_error_is_in_the_result() -> None:
    async def on_tick(context: StateContext) -> None:
        context.set("half", True)
        context.emit("half")
        raise KeyError("missing")

    made = agent(on_tick=on_tick)
    result = await run_tick(made, state={"before": 1})

    assert result.outcome == "error"
    assert (result.writes, result.events, result.state) == ({}, [], {"before": 1})
    assert isinstance(result.error, KeyError)
    assert result.failure is not None and "on_tick" in result.failure.traceback
    assert (made.tick_count, made.error_count) == (0, 1)
    with pytest.raises(KeyError, match="missing"):
        result.check()


async def test_hook_that_takes_longer_than_its_limit_is_ended() -> None:
    async def on_tick(context: StateContext) -> None:
        context.set("half", True)
        await asyncio.sleep(60)

    result = await run_tick(agent(on_tick=on_tick, tick_timeout=0.02))

    assert (result.outcome, result.writes) == ("timeout", {})
    with pytest.raises(TimeoutError, match=r"longer than 0\.02 s"):
        result.check()


async def test_thread_that_takes_longer_than_its_limit_is_left_alone() -> None:
    refused = threading.Event()

    def on_tick(context: StateContext) -> None:
        time.sleep(0.15)
        try:
            context.set("late", True)
        except UnitClosed:
            refused.set()

    result = await run_tick(agent(on_tick=on_tick, tick_timeout=0.02))

    assert (result.outcome, result.writes) == ("timeout", {})
    assert await asyncio.to_thread(refused.wait, 10)


async def test_exit_is_a_failure_of_the_hook() -> None:
    async def on_tick(context: StateContext) -> None:
        raise SystemExit(3)

    result = await run_tick(agent(on_tick=on_tick))

    assert result.outcome == "error"
    with pytest.raises(AelError, match="SystemExit"):
        result.check()


async def test_value_that_can_not_be_stored_is_an_error_of_the_hook() -> None:
    async def on_tick(context: StateContext) -> None:
        context.set("when", datetime.now(UTC))

    result = await run_tick(agent(on_tick=on_tick))

    assert isinstance(result.error, InvalidValueType)
    assert "'when'" in str(result.error)


async def test_metadata_that_is_not_json_is_an_error_as_in_the_loop() -> None:
    made = agent()
    made.metadata["socket"] = object()

    result = await run_tick(made)

    assert result.outcome == "error"
    assert "metadata" in str(result.error)


async def test_cancelling_ends_the_hook() -> None:
    began, ended = asyncio.Event(), asyncio.Event()

    async def on_tick(context: StateContext) -> None:
        began.set()
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    task = asyncio.create_task(run_tick(agent(on_tick=on_tick)))
    await began.wait()
    task.cancel()

    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()


# -- the agent's counts ------------------------------------------------------------------------------


async def test_ticks_are_counted_once_and_the_count_includes_the_running_one() -> None:
    class Counting(AgentBase):
        name = "counting"

        async def on_tick(self, context: StateContext) -> None:
            await super().on_tick(context)
            context.set("count", self.tick_count)

    made = Counting()

    assert (await run_tick(made)).writes == {"count": 1}
    assert (await run_tick(made)).writes == {"count": 2}
    assert made.tick_count == 2


# -- the process's own context and bus ---------------------------------------------------------------


async def test_context_and_bus_of_the_process_belong_to_the_unit() -> None:
    bus, context = get_event_bus(), get_state_context()

    async def on_tick(_: StateContext) -> None:
        context.set("seen", context.get("before"))
        context.increment("count")
        bus.subscribe("x", "a", print)
        bus.emit("told", "a", 1)

    result = (await run_tick(agent(on_tick=on_tick), state={"before": 5})).check()

    assert result.writes == {"seen": 5, "count": 1}
    assert [(event.type, event.data) for event in result.events] == [("told", 1)]
    assert not context.has("seen")
    assert context._host is None and bus._host is None
    assert bus.get_stats()["total_subscribers"] == 0


async def test_ticks_at_the_same_time_do_not_see_each_other() -> None:
    async def on_tick(context: StateContext) -> None:
        await asyncio.sleep(0)
        get_state_context().increment("n")
        await asyncio.sleep(0)
        context.set("seen", get_state_context().get("n"))

    results = await asyncio.gather(*(run_tick(agent(on_tick=on_tick), state={"n": start}) for start in (0, 10, 20)))

    assert [result.writes["seen"] for result in results] == [1, 11, 21]
    assert get_state_context()._host is None


async def test_context_is_closed_when_the_tick_is_over() -> None:
    kept = []

    async def on_tick(context: StateContext) -> None:
        kept.append(context)

    await run_tick(agent(on_tick=on_tick))

    with pytest.raises(UnitClosed):
        kept[0].set("late", True)


async def test_code_outside_the_hook_finds_no_loop() -> None:
    refused = []

    def elsewhere() -> None:
        try:
            get_state_context().set("x", 1)
        except NotAllowedHere as error:
            refused.append(str(error))

    async def on_tick(context: StateContext) -> None:
        thread = threading.Thread(target=elsewhere)
        thread.start()
        await asyncio.to_thread(thread.join)

    await run_tick(agent(on_tick=on_tick))

    assert "outside the hook of 'a'" in refused[0]


# -- what is refused ---------------------------------------------------------------------------------


async def test_state_that_can_not_be_stored_is_refused_with_its_key() -> None:
    with pytest.raises(InvalidValueType, match=r"'when'.*datetime"):
        await run_tick(agent(), state={"when": datetime.now(UTC)})


async def test_event_that_can_not_be_stored_is_refused() -> None:
    with pytest.raises(InvalidValueType, match="reading"):
        await run_tick(agent(), inbox=[event({1, 2})])


@pytest.mark.parametrize("inbox", [Event("x", "y"), {"type": "x"}, "x"])
async def test_inbox_that_is_no_list_is_refused(inbox: Any) -> None:
    with pytest.raises(InvalidValueType, match="wanted is a list of events"):
        await run_tick(agent(), inbox=inbox)


@pytest.mark.parametrize("item", ["x", {"typ": "x"}, {"type": "x", "payload": 1}, None])
async def test_what_is_no_event_is_refused(item: Any) -> None:
    with pytest.raises(InvalidValueType, match="inbox holds"):
        await run_tick(agent(), inbox=[item])


async def test_hook_that_does_not_exist_is_refused_with_those_that_do() -> None:
    with pytest.raises(UsageError, match="on_start, on_tick, on_shutdown"):
        await run_tick(agent(), hook="on_tock")


async def test_two_ways_to_say_which_hook_are_refused() -> None:
    with pytest.raises(UsageError, match="pass one of them"):
        await run_tick(agent(), inbox=[event(1)], hook="on_start")


async def test_time_that_is_none_is_refused() -> None:
    with pytest.raises(InvalidValue, match="'tomorrow' is no time"):
        await run_tick(agent(), now="tomorrow")


async def test_agent_without_a_name_is_refused() -> None:
    with pytest.raises(InvalidAgent, match="has no name"):
        await run_tick(AgentBase())


async def test_agent_of_a_running_loop_is_refused() -> None:
    made = Thermometer()

    async with Harness([made]):
        with pytest.raises(UsageError, match="runs in a loop"):
            await run_tick(made)
    assert (await run_tick(made)).outcome == "success"

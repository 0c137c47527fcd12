"""The loop itself: iterations, stopping, the agents that come and go, and what it tells of itself."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from ael_store import AELController, AgentBase, AgentManager, StateContext
from ael_store.client import change
from ael_store.errors import InvalidKey, UsageError
from ael_store.model.event import Event
from tests.loops import ShiftClock, agent, controller_on, iterations_of, rows, running, until


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ael.db"


# -- stopping ----------------------------------------------------------------------------------------


async def test_stop_wakes_the_loop_and_returns_when_the_run_has_ended(path: Path) -> None:
    controller = controller_on(path, agent("a"), tick_rate=3600)
    async with running(controller):
        began = time.monotonic()
        await controller.stop()
        assert not controller.running
        assert rows(path, "SELECT status FROM v_runs") == ["stopped"]

    assert time.monotonic() - began < 5


async def test_stop_from_a_thread(path: Path) -> None:
    controller = controller_on(path, tick_rate=3600)
    async with running(controller):
        await asyncio.to_thread(lambda: asyncio.run(controller.stop()))
        assert not controller.running


@pytest.mark.parametrize("hook", ["start", "tick", "event", "shutdown"])
async def test_stop_inside_a_hook_returns_at_once(path: Path, hook: str) -> None:
    async def stop(*_: Any) -> None:
        await controller.stop()
        reached.append(hook)

    reached: list[str] = []
    controller = controller_on(path, agent("a", subscriptions=["*"], **{hook: stop}))
    if hook == "shutdown":
        await controller.run(iterations=1)
    else:
        await asyncio.wait_for(controller.start(), 20)

    assert reached[:1] == [hook]
    assert rows(path, "SELECT status FROM v_runs") == ["stopped"]


async def test_stop_inside_a_plain_hook_returns_at_once(path: Path) -> None:
    def tick(context: StateContext) -> None:
        asyncio.run(controller.stop())
        context.set("reached", True)

    controller = controller_on(path, agent("a", tick=tick), tick_rate=3600)
    await asyncio.wait_for(controller.start(), 20)

    assert controller.state_context.get("reached") is True


async def test_cancelling_start_is_a_graceful_stop(path: Path) -> None:
    async def shutdown(context: StateContext) -> None:
        context.set("ended", True)

    controller = controller_on(path, agent("a", shutdown=shutdown))
    task = asyncio.create_task(controller.start())
    await until(lambda: controller.get_stats()["iteration"] > 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert rows(path, "SELECT value FROM v_state") == ["true"]
    assert rows(path, "SELECT status FROM v_runs") == ["stopped"]
    await controller.run(iterations=1)


async def test_back_to_back_loop_can_be_stopped_and_leaves_room_for_others(path: Path) -> None:
    controller = controller_on(path, agent("a"), tick_rate=0)
    async with running(controller):
        await iterations_of(controller, 50)
        began = time.monotonic()

    assert time.monotonic() - began < 5


async def test_shutdown_delivers_what_is_pending_and_goes_from_low_to_high_priority(path: Path) -> None:
    calls: list[str] = []

    async def event(event: Event, context: StateContext) -> None:
        calls.append("event")

    def shutdown(name: str) -> Any:
        async def hook(context: StateContext) -> None:
            calls.append(name)
            context.set(name, context.get("ael_status"))

        return hook

    agents = [agent(f"p{number}", shutdown=shutdown(f"p{number}"), priority=number) for number in (10, 1, 5)]
    controller = controller_on(path, *agents, agent("h", event=event, subscriptions=["x"]), tick_rate=3600)
    async with running(controller):
        controller.event_bus.emit("x", "test")

    assert calls == ["event", "p1", "p5", "p10"]
    assert controller.state_context.get_all() == dict.fromkeys(["p1", "p10", "p5"], "stopping")


async def test_events_of_on_shutdown_are_delivered_by_the_next_run(path: Path) -> None:
    async def shutdown(context: StateContext) -> None:
        context.emit("x", "goodbye")

    async def event(event: Event, context: StateContext) -> None:
        heard.append((event.data, context.iteration))

    heard: list[Any] = []
    controller = controller_on(path, agent("a", shutdown=shutdown), agent("h", event=event, subscriptions=["x"]))
    await controller.run(iterations=1)
    assert heard == []
    await controller.run(iterations=1)

    assert heard == [("goodbye", 2)]


async def test_start_twice_is_refused(path: Path) -> None:
    controller = controller_on(path)
    async with running(controller):
        with pytest.raises(UsageError, match="running already"):
            await controller.start()
        with pytest.raises(UsageError, match="running already"):
            await controller.run(iterations=1)


@pytest.mark.parametrize("iterations", [1, 7])
async def test_run_goes_round_exactly_so_often(path: Path, iterations: int) -> None:
    async def event(event: Event, context: StateContext) -> None:
        pass

    one = agent("a", subscriptions=["ael_*"], event=event, tick=lambda context: None)
    controller = controller_on(path, one)
    for number in (1, 2, 3):
        await controller.run(iterations=iterations)
        assert one.tick_count == number * iterations
        assert controller.get_stats()["iteration"] == number * iterations


@pytest.mark.parametrize("wrong", [0, -1, 1.5, "3", True, None])
async def test_wrong_number_of_iterations_is_refused(path: Path, wrong: Any) -> None:
    with pytest.raises(ValueError, match="iterations"):
        await controller_on(path).run(iterations=wrong)

    assert not path.exists()


async def test_signal_handlers_are_put_back_and_others_are_left_alone(path: Path) -> None:
    controller = controller_on(path)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    async with running(controller):
        assert signal.getsignal(signal.SIGTERM) is not before[1]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before

    def mine(*_: Any) -> None:
        pass

    signal.signal(signal.SIGTERM, mine)
    try:
        async with running(controller):
            assert signal.getsignal(signal.SIGTERM) is mine
            assert signal.getsignal(signal.SIGINT) is before[0]
    finally:
        signal.signal(signal.SIGTERM, before[1])


async def test_hooks_that_hang_at_the_end_do_not_keep_the_others_from_it(path: Path) -> None:
    async def hang(context: StateContext) -> None:
        await asyncio.Event().wait()

    async def end(context: StateContext) -> None:
        context.set("ended", True)

    controller = controller_on(path, agent("a", shutdown=hang, priority=1), agent("b", shutdown=end), grace=0.05)
    began = time.monotonic()
    async with running(controller):
        pass

    assert time.monotonic() - began < 10
    assert controller.state_context.get("ended") is True
    assert rows(path, "SELECT outcome FROM v_ticks WHERE agent = 'a' AND kind = 'shutdown'") == ["timeout"]
    assert rows(path, "SELECT status FROM v_runs") == ["stopped"]


async def test_observer_that_fails_does_not_end_the_loop(path: Path) -> None:
    def fail(summary: object) -> None:
        seen.append(summary)
        raise BrokenPipeError("nobody reads")

    seen: list[object] = []
    controller = controller_on(path, agent("a"))
    controller.observe(fail)
    await controller.run(iterations=3)

    assert len(seen) == 1
    assert rows(path, "SELECT count(*) FROM v_iterations") == [3]


# -- the clock ---------------------------------------------------------------------------------------


async def test_slots_that_a_blocking_hook_cost_are_counted_and_made_one(path: Path) -> None:
    async def tick(context: StateContext) -> None:
        if context.iteration == 2:
            time.sleep(0.25)  # nobody can go on meanwhile
        context.set("n", context.iteration)

    controller = controller_on(path, agent("a", tick=tick), tick_rate=0.05)
    await controller.run(iterations=4)

    missed = rows(path, "SELECT missed FROM v_iterations ORDER BY iteration")
    assert missed[1] == 0
    assert missed[2] >= 4
    assert [event.data["missed"] for event in controller.event_bus.get_event_history("ael_recovered")] == []


async def test_clock_keeps_its_rate_when_iterations_come_in_between(path: Path) -> None:
    clock = ShiftClock()
    one = agent("a")
    controller = controller_on(path, one, tick_rate=100, clock=clock)
    async with running(controller):
        for _ in range(5):
            await controller.transact(lambda context: None)
        assert one.tick_count == 1
        clock.skip(101)
        await until(lambda: one.tick_count == 2)
        assert controller.get_stats()["iteration"] >= 6


async def test_suspended_machine_catches_up_with_one_iteration(path: Path) -> None:
    clock = ShiftClock()
    one = agent("a")
    controller = controller_on(path, one, tick_rate=100, clock=clock)
    async with running(controller):
        clock.skip(1050)
        await until(lambda: one.tick_count == 2)

    assert rows(path, "SELECT missed FROM v_iterations ORDER BY 1 DESC LIMIT 1") == [9]


async def test_paused_loop_ticks_nobody_takes_changes_and_loses_no_slots(path: Path) -> None:
    clock = ShiftClock()
    one = agent("a")
    controller = controller_on(path, one, tick_rate=100, clock=clock)

    async def command(name: str, **arguments: Any) -> Any:
        return await asyncio.to_thread(change, path, name, arguments)

    async with running(controller):
        await command("loop.pause")
        assert controller.state_context.get("ael_status") == "paused"
        clock.skip(1050)
        assert await controller.transact(lambda context: context.increment("n")) == 1
        assert one.tick_count == 1
        await command("loop.step", iterations=2)
        await until(lambda: one.tick_count == 3)
        await command("loop.resume")
        await until(lambda: one.tick_count == 4)

    assert rows(path, "SELECT sum(missed) FROM v_iterations") == [0]
    numbers = rows(path, "SELECT iteration FROM v_iterations WHERE ticks > 0")
    assert numbers == [1, 3, 4, 5], "the pause itself was a change in an iteration"


async def test_pause_survives_a_restart_and_run_waits_for_it(path: Path) -> None:
    await controller_on(path).run(iterations=1)
    await asyncio.to_thread(change, path, "loop.pause", {})
    one = agent("a")
    controller = controller_on(path, one)
    task = asyncio.create_task(controller.run(iterations=2))
    await until(lambda: controller.state_context.get("ael_status") == "paused")
    for _ in range(3):
        await controller.transact(lambda context: context.increment("n"))
    assert not task.done()
    await asyncio.to_thread(change, path, "loop.resume", {})
    await asyncio.wait_for(task, 20)

    assert one.tick_count == 2


@pytest.mark.parametrize("wrong", [-1, "1", True, float("nan"), float("inf")])
def test_wrong_tick_rate_is_refused(path: Path, wrong: Any) -> None:
    with pytest.raises(ValueError, match="tick_rate"):
        AELController(tick_rate=wrong, store=path)


# -- triggers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["priority", "round_robin", "load_aware"])
async def test_agent_with_a_trigger_runs_when_it_fires_under_any_strategy(path: Path, strategy: str) -> None:
    clock = ShiftClock()
    often, rarely = agent("often", trigger="every 10s", priority=0), agent("rarely", trigger="every 1h")
    controller = controller_on(path, often, rarely, tick_rate=100_000, clock=clock, strategy=strategy, max_agents=1)
    async with running(controller):
        assert (often.tick_count, rarely.tick_count) == (0, 0)
        for number in range(1, 4):
            clock.skip(10)
            await until(lambda number=number: often.tick_count == number)
        clock.skip(3600)
        await until(lambda: (often.tick_count, rarely.tick_count) == (4, 1))


async def test_cron_line_fires_in_its_zone(path: Path) -> None:
    async def tick(context: StateContext) -> None:
        fired.append((context.now.minute, context.now.second))

    fired: list[tuple[int, int]] = []
    clock = ShiftClock()
    controller = controller_on(path, agent("a", tick=tick, trigger="*/15 * * * *"), tick_rate=1e6, clock=clock)
    async with running(controller):
        for number in range(1, 4):
            clock.skip(15 * 60 - 1)
            await until(lambda number=number: len(fired) >= number - 1)
        clock.skip(15 * 60)
        await until(lambda: len(fired) >= 3)

    assert len(fired) <= 5


async def test_wrong_trigger_is_refused_at_registration_also_while_running(path: Path) -> None:
    manager = AgentManager()
    with pytest.raises(ValueError, match=r"'a'.*'every blue moon'"):
        manager.register(agent("a", trigger="every blue moon"))
    controller = controller_on(path)
    async with running(controller):
        with pytest.raises(ValueError, match=r"'a'.*'61 \* \* \* \*'"):
            controller.agent_manager.register(agent("a", trigger="61 * * * *"))
        await iterations_of(controller)

    assert rows(path, "SELECT * FROM v_agents") == []


# -- agents that come and go -------------------------------------------------------------------------


async def test_agents_join_and_leave_while_the_loop_runs(path: Path) -> None:
    calls: list[str] = []

    def note(name: str) -> Any:
        async def hook(context: StateContext) -> None:
            calls.append(name)

        return hook

    controller = controller_on(path)
    async with running(controller):
        late = agent("late", start=note("start"), tick=note("tick"), shutdown=note("shutdown"))
        await asyncio.to_thread(controller.agent_manager.register, late)
        await until(lambda: calls.count("tick") == 2)
        with pytest.raises(ValueError, match="already registered"):
            controller.agent_manager.register(agent("late"))
        assert await asyncio.to_thread(controller.agent_manager.unregister, "late") is True
        assert controller.agent_manager.unregister("late") is False
        await until(lambda: calls[-1] == "shutdown")
        await iterations_of(controller, 3)

    assert calls[0] == "start"
    assert calls.count("start") == calls.count("shutdown") == 1
    assert calls[-1] == "shutdown"
    assert rows(path, "SELECT status FROM v_agents") == ["absent"]


async def test_agent_is_replaced_by_another_of_its_name(path: Path) -> None:
    controller = controller_on(path, agent("a"))
    async with running(controller):
        controller.agent_manager.unregister("a")
        other = agent("a")
        controller.agent_manager.register(other)
        await until(lambda: other.tick_count > 2)

    assert rows(path, "SELECT name, status FROM v_agents") == [("a", "active")]


async def test_disabled_agent_is_not_ticked_until_it_is_enabled(path: Path) -> None:
    one = agent("a")
    controller = controller_on(path, one)
    async with running(controller):
        await until(lambda: one.tick_count)
        one.enabled = False
        await controller.transact(lambda context: None)
        ticks = one.tick_count
        await iterations_of(controller, 3)
        assert one.tick_count == ticks
        assert rows(path, "SELECT status FROM v_agents") == ["disabled"]
        one.enabled = True
        await until(lambda: one.tick_count > ticks)


async def test_agent_can_disable_itself_and_unregister_itself(path: Path) -> None:
    async def once(context: StateContext) -> None:
        context.increment("once")
        if one.enabled:
            one.enabled = False

    async def leave(context: StateContext) -> None:
        context.increment("leave")
        controller.agent_manager.unregister("two")

    one, two = agent("one", tick=once), agent("two", tick=leave)
    controller = controller_on(path, one, two)
    await controller.run(iterations=4)

    assert controller.state_context.get_all() == {"once": 1, "leave": 1}
    statuses = rows(path, "SELECT name, status FROM v_agents ORDER BY name")
    assert statuses == [("one", "disabled"), ("two", "absent")]


async def test_changed_priority_counts_from_the_next_iteration(path: Path) -> None:
    one = agent("a", priority=0)
    controller = controller_on(path, one, tick_rate=0)
    await controller.run(iterations=20)
    assert one.tick_count == 2
    one.priority = 10
    await controller.run(iterations=20)

    assert one.tick_count == 22
    assert rows(path, "SELECT priority FROM v_agents") == [10]


async def test_several_instances_of_a_class_are_agents_of_their_own(path: Path) -> None:
    class Sensor(AgentBase):
        priority = 10

        async def on_tick(self, context: StateContext) -> None:
            context.own.set("pin", self.config["pin"])

    sensors = [Sensor("kitchen", config={"pin": 4}), Sensor("cellar", config={"pin": 7}, priority=9)]
    controller = controller_on(path, *sensors)
    await controller.run(iterations=2)

    assert controller.state_context.get_all() == {"agent/cellar/pin": 7, "agent/kitchen/pin": 4}


async def test_hooks_of_start_run_higher_priority_first_and_a_failed_one_is_tried_again(path: Path) -> None:
    order: list[str] = []

    def note(name: str) -> Any:
        async def hook(context: StateContext) -> None:
            order.append(name)
            if order.count(name) == 1 and name == "flaky":
                raise ValueError("not yet")

        return hook

    flaky = agent("flaky", start=note("flaky"), priority=9)
    agents = [agent("low", start=note("low"), priority=1), flaky, agent("high", start=note("high"))]
    await controller_on(path, *agents).run(iterations=2)

    assert order == ["high", "flaky", "low", "flaky"]
    assert (flaky.tick_count, flaky.error_count) == (1, 1)


async def test_slow_on_start_holds_up_nobody_and_the_agent_is_ticked_after_it(path: Path) -> None:
    async def start(context: StateContext) -> None:
        await go.wait()
        context.set("started", True)

    go = asyncio.Event()
    slow, other = agent("slow", start=start), agent("other")
    controller = controller_on(path, slow, other, slow_after=0.01)
    async with running(controller):
        await until(lambda: other.tick_count >= 3)
        assert slow.tick_count == 0
        go.set()
        await until(lambda: slow.tick_count)

    assert controller.state_context.get("started") is True


@pytest.mark.parametrize("kind", ["async", "plain"])
def test_hook_with_a_yield_is_refused(kind: str) -> None:
    class Wrong(AgentBase):
        name = "wrong"

    async def async_tick(self: Any, context: StateContext) -> Any:
        yield

    def plain_tick(self: Any, context: StateContext) -> Any:
        yield

    Wrong.on_tick = async_tick if kind == "async" else plain_tick  # type: ignore[method-assign]

    with pytest.raises(ValueError, match=r"'wrong': on_tick has a `yield`"):
        AgentManager().register(Wrong())


# -- what the loop tells of itself -------------------------------------------------------------------


async def test_keys_of_the_loop_are_read_only_and_virtual(path: Path) -> None:
    async def tick(context: StateContext) -> None:
        seen.update({key: context.get(key) for key in KEYS})
        assert all(context.has(key) for key in KEYS if key != "ael_last_tick")
        assert context.get("ael_iteration") == context.iteration
        assert context.get_all() == {}
        for key in KEYS:
            for write in (
                lambda key=key: context.set(key, 1),
                lambda key=key: context.delete(key),
                lambda key=key: context.update({"a": 1, key: 1}),
                lambda key=key: context.setdefault(key, 1),
                lambda key=key: context.increment(key),
                lambda key=key: context.from_json(f'{{"{key}": 1}}'),
            ):
                with pytest.raises(InvalidKey, match=key):
                    write()

    KEYS = ("ael_status", "ael_start_time", "ael_iteration", "ael_last_tick")
    seen: dict[str, Any] = {}
    controller = controller_on(path, agent("a", tick=tick))
    await controller.run(iterations=2)

    assert (seen["ael_status"], seen["ael_iteration"]) == ("running", 2)
    assert seen["ael_start_time"] < seen["ael_last_tick"]
    assert rows(path, "SELECT * FROM v_state_history") == []
    assert controller.state_context.get("ael_status") == "stopped"
    assert controller.state_context.get("ael_iteration", "none") == "none"


async def test_events_of_the_loop_are_always_emitted(path: Path) -> None:
    controller = controller_on(path, agent("a"), tick_rate=0.01, strategy="round_robin")
    await controller.run(iterations=2)

    log = rows(path, "SELECT type, source, data FROM v_events ORDER BY id")
    assert [row[0] for row in log] == ["ael_started", "ael_shutdown"]
    started = '{"tick_rate":0.01,"strategy":"round_robin","agent_count":1,"max_agents":null}'
    assert log[0][1:] == ("ael_controller", started)
    assert '"total_iterations":2' in log[1][2]


@pytest.mark.parametrize(
    ("pattern", "emitted"),
    [("*", []), ("agent.*", ["started", "completed", "started", "failed"]), ("agent.failed", ["failed"])],
)
async def test_events_of_ticks_are_emitted_where_more_than_a_bare_star_matches(
    path: Path, pattern: str, emitted: list[str]
) -> None:
    async def tick(context: StateContext) -> None:
        if context.iteration == 2:
            raise ValueError("no")

    controller = controller_on(path, agent("a", tick=tick))
    controller.event_bus.subscribe(pattern, "graph", lambda event: None)
    await controller.run(iterations=2)

    log = rows(path, "SELECT type, json_extract(data, '$.agent') FROM v_events WHERE type LIKE 'agent.%' ORDER BY id")
    assert log == [(f"agent.{name}", "a") for name in emitted]


async def test_statistics_of_the_controller(path: Path) -> None:
    controller = controller_on(path, agent("a"), tick_rate=0.25)
    before = controller.get_stats()
    assert (before["running"], before["iteration"], before["uptime_seconds"]) == (False, 0, 0)
    async with running(controller):
        during = controller.get_stats()
        assert during["running"] is True
        assert during["iteration"] >= 1
        assert during["uptime_seconds"] > 0
    after = controller.get_stats()

    assert after["running"] is False
    assert after["iteration"] >= during["iteration"]
    wanted = {"running", "iteration", "uptime_seconds", "tick_rate", "strategy", "start_time"}
    for stats in (before, during, after):
        assert wanted | {"agent_manager", "event_bus", "scheduler", "state_context"} <= set(stats)
    assert after["tick_rate"] == 0.25
    assert after["agent_manager"]["agents"]["a"]["tick_count"] >= 1


async def test_ticks_that_did_nothing_have_no_row_unless_asked_for(tmp_path: Path) -> None:
    for tick_log, kinds in (("changed", []), ("all", ["tick"] * 3 + ["shutdown"])):
        path = tmp_path / f"{tick_log}.db"
        await controller_on(path, agent("a"), tick_log=tick_log).run(iterations=3)

        assert rows(path, "SELECT kind FROM v_ticks WHERE agent = 'a' ORDER BY id") == kinds
        assert rows(path, "SELECT tick_count FROM v_agents") == [3]


async def test_loop_in_a_thread_of_its_own(path: Path) -> None:
    one = agent("a", tick=lambda context: context.set("n", context.iteration))
    controller = controller_on(path, one)
    thread = threading.Thread(target=lambda: asyncio.run(controller.start()))
    thread.start()
    try:
        await until(lambda: controller.state_context.get("n"))
        assert await controller.transact(lambda context: context.increment("m")) == 1
        controller.state_context.set("k", 1)
        await until(lambda: controller.state_context.get("k"))
    finally:
        await controller.stop()
        thread.join(20)

    assert not thread.is_alive()
    assert rows(path, "SELECT status FROM v_runs") == ["stopped"]

"""The thirty faults that were measured in the ancestor, FAZA 28: each test says what holds now instead."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock
from typing import Any

import pytest

from ael_store import AgentBase, Scheduler, StateContext, compat, get_ael_controller
from ael_store.model.event import Event
from tests.loops import agent, controller_on, iterations_of, rows, running, until


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ael.db"


async def test_a01_on_event_is_called_for_each_matching_event(path: Path) -> None:
    seen: list[int] = []

    async def ping(context: StateContext) -> None:
        for number in range(3):
            context.emit("ping", number)

    async def hear(event: Event, context: StateContext) -> None:
        seen.append(event.data)

    await controller_on(path, agent("p", tick=ping), agent("h", event=hear, subscriptions=["ping"])).run(iterations=9)

    assert seen == [0, 1, 2] * 9


async def test_a02_coroutine_subscriber_is_awaited(path: Path) -> None:
    seen: list[str] = []

    async def callback(event: Event) -> None:
        await asyncio.sleep(0)
        seen.append(event.type)

    async def emit(context: StateContext) -> None:
        context.emit("ping")

    controller = controller_on(path, agent("p", tick=emit))
    controller.event_bus.subscribe("ping", "listener", callback)
    await controller.run(iterations=3)

    assert seen == ["ping"] * 3


async def test_a03_stop_runs_on_shutdown_and_emits_ael_shutdown(path: Path) -> None:
    ended: list[str] = []

    async def shutdown(context: StateContext) -> None:
        ended.append("shutdown")
        context.set("ended", True)

    controller = controller_on(path, agent("a", shutdown=shutdown))
    async with running(controller):
        await iterations_of(controller, 2)

    assert ended == ["shutdown"]
    assert rows(path, "SELECT value FROM v_state WHERE key = 'ended'") == ["true"]
    assert rows(path, "SELECT count(*) FROM v_events WHERE type = 'ael_shutdown'") == [1]
    assert controller.state_context.get("ael_status") == "stopped"
    assert rows(path, "SELECT status FROM v_runs") == ["stopped"]


async def test_a04_stopped_controller_starts_again_and_keeps_counting_iterations(path: Path) -> None:
    async def count(context: StateContext) -> None:
        context.increment("ticks")

    controller = controller_on(path, agent("a", tick=count))
    for _ in range(3):
        async with running(controller):
            await iterations_of(controller, 2)

    numbers = rows(path, "SELECT iteration FROM v_iterations ORDER BY iteration")
    assert numbers == list(range(1, len(numbers) + 1))
    assert rows(path, "SELECT sum(ticks) FROM v_iterations") == [controller.state_context.get("ticks")]
    assert rows(path, "SELECT status FROM v_runs") == ["stopped"] * 3


async def test_a05_strategy_decides_how_often_agents_run(tmp_path: Path) -> None:
    counts = {}
    for strategy in ("priority", "round_robin"):
        high, low = agent("high", priority=10), agent("low", priority=1)
        await controller_on(tmp_path / strategy, high, low, tick_rate=0, strategy=strategy).run(iterations=30)
        counts[strategy] = (high.tick_count, low.tick_count)

    assert counts == {"priority": (30, 3), "round_robin": (30, 30)}


async def test_a06_round_robin_with_max_agents_serves_each_agent_equally(path: Path) -> None:
    agents = [agent(f"a{number}", priority=1) for number in range(4)]

    await controller_on(path, *agents, tick_rate=0, strategy="round_robin", max_agents=1).run(iterations=40)

    assert [item.tick_count for item in agents] == [10] * 4


async def test_a07_load_aware_runs_expensive_agents_less_often(path: Path) -> None:
    async def work(context: StateContext) -> None:
        await asyncio.sleep(0.02)

    slow, fast = agent("slow", tick=work, priority=5), agent("fast", priority=5)
    scheduler = Scheduler("load_aware")

    await controller_on(path, slow, fast, tick_rate=0.01, scheduler=scheduler).run(iterations=40)

    assert 0 < slow.tick_count < fast.tick_count / 2
    assert scheduler.select_agents([slow, fast])[0] is fast


async def test_a08_frequency_of_each_priority_is_the_documented_one(path: Path) -> None:
    agents = [agent(f"p{priority}", priority=priority) for priority in range(11)]

    await controller_on(path, *agents, tick_rate=0).run(iterations=30)

    assert [item.tick_count for item in agents] == [3, 3, 3, 6, 6, 10, 10, 15, 15, 15, 30]


async def test_a09_agents_of_one_priority_do_not_all_run_in_the_same_iteration(path: Path) -> None:
    agents = [agent(f"agent {number}", priority=number % 10) for number in range(100)]

    await controller_on(path, *agents, tick_rate=0).run(iterations=30)

    ticks = rows(path, "SELECT ticks FROM v_iterations")
    assert max(ticks) < 60
    assert min(ticks) > 0


async def test_a10_error_in_on_error_does_not_keep_other_agents_from_running(path: Path) -> None:
    async def fail(*_: Any) -> None:
        raise RuntimeError("broken")

    bad, good = agent("bad", tick=fail, error=fail, priority=10), agent("good", priority=10)

    await controller_on(path, bad, good).run(iterations=3)

    assert good.tick_count == 3
    errors = rows(path, "SELECT json_extract(data, '$.hook') FROM v_events WHERE type = 'agent_error' ORDER BY id")
    assert errors == ["on_tick", "on_error"] * 3


async def test_a11_tick_that_raises_leaves_nothing_written_or_emitted(path: Path) -> None:
    async def half(context: StateContext) -> None:
        context.set("a", 17)
        context.emit("half")
        raise ValueError("no")

    controller = controller_on(path, agent("a", tick=half))
    await controller.run(iterations=2)

    assert rows(path, "SELECT * FROM v_state") == []
    assert rows(path, "SELECT * FROM v_state_history") == []
    assert rows(path, "SELECT id FROM v_events WHERE type = 'half'") == []
    assert not controller.state_context.has("a")


async def test_a12_failed_ticks_are_in_the_statistics_of_the_scheduler(path: Path) -> None:
    async def fail(context: StateContext) -> None:
        raise ValueError("no")

    controller = controller_on(path, agent("a", tick=fail))
    await controller.run(iterations=3)

    assert controller.scheduler.get_stats()["execution_counts"] == {"a": 3}


async def test_a13_hung_agent_neither_stops_the_others_nor_the_shutdown(path: Path) -> None:
    async def hang(context: StateContext) -> None:
        await asyncio.Event().wait()

    hung, good = agent("hung", tick=hang), agent("good")
    controller = controller_on(path, hung, good, slow_after=0.02, grace=0.05)
    async with running(controller):
        await until(lambda: good.tick_count >= 5)
        began = time.monotonic()

    assert time.monotonic() - began < 5
    assert rows(path, "SELECT outcome FROM v_ticks WHERE agent = 'hung' AND kind = 'tick'") == ["cancelled"]


async def test_a13_tick_that_hangs_ends_with_its_timeout(path: Path) -> None:
    async def hang(context: StateContext) -> None:
        await asyncio.Event().wait()

    hung = agent("hung", tick=hang, tick_timeout=0.02)
    await controller_on(path, hung).run(iterations=2)

    assert rows(path, "SELECT outcome FROM v_ticks WHERE agent = 'hung'") == ["timeout"] * 2
    assert hung.error_count == 2


async def test_a14_stop_does_not_wait_for_the_next_slot_of_the_clock(path: Path) -> None:
    controller = controller_on(path, tick_rate=3600)
    async with running(controller):
        began = time.monotonic()

    assert time.monotonic() - began < 5


async def test_a15_history_holds_what_agents_changed_and_nothing_of_the_loop(path: Path) -> None:
    first = True

    async def write(context: StateContext) -> None:
        nonlocal first
        if first:
            context.set("mine", 1)
        first = False

    controller = controller_on(path, agent("a", tick=write), tick_rate=0)
    await controller.run(iterations=300)

    assert [row["key"] for row in controller.state_context.get_history()] == ["mine"]


async def test_a16_what_get_returns_can_be_changed_without_changing_the_state(path: Path) -> None:
    async def alias(context: StateContext) -> None:
        given = [1]
        context.set("l", given)
        given.append(2)
        context.get("l").append(3)
        context.get_all()["l"].append(4)

    controller = controller_on(path, agent("a", tick=alias))
    await controller.run(iterations=1)

    controller.state_context.get("l").append(5)
    controller.state_context.get_history("l")[0]["new_value"].append(6)
    assert controller.state_context.get("l") == [1]
    assert [row["new_value"] for row in controller.state_context.get_history("l")] == [[1]]


@pytest.mark.parametrize("value", [datetime.now(UTC), {1, 2}, (1, 2), {1: "a"}, Lock(), b"x", float("nan")])
async def test_a17_what_is_not_json_is_refused_instead_of_altered(path: Path, value: Any) -> None:
    refused: list[str] = []

    async def write(context: StateContext) -> None:
        with pytest.raises((TypeError, ValueError)) as error:
            context.set("k", value)
        refused.append(str(error.value))

    await controller_on(path, agent("a", tick=write)).run(iterations=1)

    assert len(refused) == 1
    assert "'k'" in refused[0]


async def test_a17_import_of_an_export_is_exact_and_is_in_the_history(path: Path) -> None:
    exported = StateContext()
    exported.update({"i": 1, "f": 1.0, "n": None, "d": {"1": [True, "č"]}})

    async def load(context: StateContext) -> None:
        context.from_json(exported.to_json())

    controller = controller_on(path, agent("a", tick=load))
    await controller.run(iterations=1)

    assert controller.state_context.to_json() == StateContext.to_json(exported)
    assert type(controller.state_context.get("f")) is float
    assert {row["key"] for row in controller.state_context.get_history()} == {"i", "f", "n", "d"}


async def test_a18_increments_of_many_threads_are_all_counted(path: Path) -> None:
    controller = controller_on(path)
    loop = asyncio.get_running_loop()

    def work() -> None:
        for _ in range(25):
            asyncio.run_coroutine_threadsafe(controller.transact(lambda context: context.increment("n")), loop).result()

    async with running(controller):
        await asyncio.gather(*(asyncio.to_thread(work) for _ in range(4)))

    assert controller.state_context.get("n") == 100


async def test_a19_clear_records_one_deletion_per_key_with_the_old_value(path: Path) -> None:
    async def clear(context: StateContext) -> None:
        context.clear()

    controller = controller_on(path, agent("a", tick=clear))
    controller.state_context.update({"x": 1, "y": [2]})
    await controller.run(iterations=1)

    deleted = rows(path, "SELECT key, old_value FROM v_state_history WHERE operation = 'delete' ORDER BY key")
    assert deleted == [("x", "1"), ("y", "[2]")]


async def test_a20_agent_that_joins_while_running_is_started_before_its_first_tick(path: Path) -> None:
    calls: list[str] = []

    async def start(context: StateContext) -> None:
        calls.append("start")

    async def tick(context: StateContext) -> None:
        calls.append("tick")

    controller = controller_on(path)
    async with running(controller):
        controller.agent_manager.register(agent("late", start=start, tick=tick))
        sleeper = agent("sleeper", start=start, tick=tick, enabled=False)
        controller.agent_manager.register(sleeper)
        await until(lambda: calls.count("tick") >= 2)
        assert calls[:2] == ["start", "tick"]
        assert calls.count("start") == 1

        calls.clear()
        controller.agent_manager.unregister("late")
        await iterations_of(controller, 2)
        calls.clear()
        sleeper.enabled = True
        await until(lambda: calls.count("tick") >= 2)

    assert calls[:3] == ["start", "tick", "tick"]


async def test_a20_agent_whose_on_start_failed_is_not_ticked(path: Path) -> None:
    async def fail(context: StateContext) -> None:
        raise RuntimeError("no device")

    broken = agent("broken", start=fail)
    await controller_on(path, broken, agent("good")).run(iterations=3)

    assert broken.tick_count == 0
    assert broken.error_count > 0


async def test_a21_unregister_ends_subscriptions_and_runs_on_shutdown(path: Path) -> None:
    seen: list[Any] = []

    async def note(event: Event, context: StateContext | None = None) -> None:
        seen.append(event.data)

    async def shutdown(context: StateContext) -> None:
        seen.append("shutdown")

    controller = controller_on(path, agent("a", event=note, shutdown=shutdown, subscriptions=["x"]))
    controller.event_bus.subscribe("x", "a", note)
    async with running(controller):
        controller.event_bus.emit("x", "test", 1)
        await until(lambda: seen == [1, 1])
        controller.agent_manager.unregister("a")
        await until(lambda: seen[2:] == ["shutdown"])
        controller.event_bus.emit("x", "test", 2)
        await iterations_of(controller, 3)

    await controller.run(iterations=2)
    assert seen == [1, 1, "shutdown"]
    assert rows(path, "SELECT * FROM v_pending WHERE type = 'x'") == []
    assert controller.event_bus.get_stats()["total_subscribers"] == 0


async def test_a22_ticks_are_counted_once_with_and_without_super(path: Path) -> None:
    class With(AgentBase):
        name, priority = "with", 10

        async def on_tick(self, context: StateContext) -> None:
            await super().on_tick(context)

    class Without(AgentBase):
        name, priority = "without", 10

        async def on_tick(self, context: StateContext) -> None:
            pass

    one, two = With(), Without()
    await controller_on(path, one, two).run(iterations=3)

    assert (one.tick_count, two.tick_count) == (3, 3)
    assert rows(path, "SELECT tick_count FROM v_agents") == [3, 3]


async def test_a23_subscriber_that_emits_its_own_type_does_not_recurse(path: Path) -> None:
    async def echo(event: Event, context: StateContext) -> None:
        context.increment("heard")
        context.emit("ping")

    async def begin(context: StateContext) -> None:
        context.emit("ping")

    other = agent("other")
    echoing = agent("echo", start=begin, event=echo, subscriptions=["ping"])
    controller = controller_on(path, echoing, other, grace=0.1, hop_limit=0)
    async with running(controller):
        await until(lambda: other.tick_count >= 5)

    delivered = rows(path, "SELECT iteration, count(*) FROM v_ticks WHERE kind = 'event' GROUP BY iteration")
    assert {count for _, count in delivered} == {1}
    ahead = rows(path, "SELECT max(iteration) FROM v_iterations")[0] - controller.state_context.get("heard")
    assert ahead in (0, 1), "one in each iteration; the stop may cut the last one short"
    assert rows(path, "SELECT error_count FROM v_agents WHERE name = 'echo'") == [0]


async def test_a24_a_restart_goes_on_with_everything(path: Path) -> None:
    seen: list[Any] = []

    async def tick(context: StateContext) -> None:
        context.increment("n")
        one.metadata["last"] = context.iteration

    async def note(event: Event) -> None:
        seen.append(event.data)

    one = agent("one", tick=tick, priority=10)
    agents = [one, agent("two"), agent("three", enabled=False)]
    first = controller_on(path, *agents, strategy="round_robin", max_agents=1)
    first.event_bus.subscribe("x", "listener", note)
    await first.run(iterations=3)
    first.event_bus.emit("x", "test", "late")
    first.event_bus.unsubscribe("x", "listener")  # this one waits for a start that never comes

    again = [agent("one", tick=tick), agent("two"), agent("three", enabled=False)]
    one = again[0]
    second = controller_on(path, *again, strategy="round_robin", max_agents=1)
    second.event_bus.subscribe("x", "listener", note)
    assert (one.tick_count, one.metadata) == (0, {})
    await second.run(iterations=1)

    assert second.get_stats()["iteration"] == 4
    assert second.state_context.get("n") == 2
    assert [item.tick_count for item in again] == [2, 2, 0]
    assert one.metadata == {"last": 3}
    assert [row["iteration"] for row in second.state_context.get_history("n")] == [1, 3]
    assert seen == []
    assert len(second.event_bus.get_event_history("ael_started")) == 2


async def test_a25_all_times_are_aware_and_utc(path: Path) -> None:
    moments: list[datetime] = []

    async def note(context: StateContext) -> None:
        moments.extend([context.now, context.emit("x").timestamp])

    controller = controller_on(path, agent("a", tick=note))
    await controller.run(iterations=1)
    moments.append(controller.event_bus.get_event_history("x")[0].timestamp)

    assert all(moment.tzinfo is UTC for moment in moments)
    assert len(set(moments)) == 1
    written = moments[0].strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    assert rows(path, "SELECT emitted_at FROM v_events WHERE type = 'x'") == [written]
    assert rows(path, "SELECT last_tick_at FROM v_agents") == [written]


def test_a26_second_call_of_a_singleton_with_other_arguments_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_manager", "_bus", "_context", "_controller"):
        monkeypatch.setattr(compat, name, None)
    monkeypatch.setenv("AEL_DB", str(tmp_path / "ael.db"))
    first = get_ael_controller(tick_rate=0.5, strategy="round_robin")

    assert get_ael_controller() is get_ael_controller(0.5, "round_robin") is first
    for arguments in ({"tick_rate": 2.0}, {"strategy": "priority"}):
        with pytest.raises(ValueError, match="exists with") as error:
            get_ael_controller(**arguments)
        assert next(iter(arguments)) in str(error.value)


def test_a27_unknown_strategy_is_refused_at_once_with_those_that_exist(tmp_path: Path) -> None:
    for make in (lambda: Scheduler("fastest"), lambda: controller_on(tmp_path / "ael.db", strategy="fastest")):
        with pytest.raises(ValueError, match=r"'fastest'.*priority, round_robin, load_aware"):
            make()

    assert not (tmp_path / "ael.db").exists()


async def test_a28_max_agents_bounds_an_iteration_and_higher_priority_goes_first(path: Path) -> None:
    order: list[str] = []

    def note(name: str) -> Any:
        async def tick(context: StateContext) -> None:
            order.append(name)

        return tick

    agents = [agent(name, tick=note(name), priority=priority) for name, priority in (("b", 9), ("a", 10), ("c", 10))]
    controller = controller_on(path, *agents, max_agents=2, tick_rate=0)
    await controller.run(iterations=10)

    assert max(rows(path, "SELECT ticks FROM v_iterations")) == 2
    assert order[:2] == ["a", "c"]
    assert "b" in order
    assert [item.name for item in controller.agent_manager.get_agents_by_priority()] == ["a", "c", "b"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a29_a_signal_is_a_graceful_stop(path: Path, number: signal.Signals) -> None:
    program = """
import asyncio
from ael_store import AgentBase, get_agent_manager, run_ael_loop

class A(AgentBase):
    name = "a"
    async def on_start(self, context):
        print("up", flush=True)
    async def on_shutdown(self, context):
        context.set("down", True)

get_agent_manager().register(A())
asyncio.run(run_ael_loop(tick_rate=3600))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], env={**os.environ, "AEL_DB": str(path)}, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    process.send_signal(number)
    code = process.wait(20)
    process.stdout.close()

    assert code == 0
    assert rows(path, "SELECT value FROM v_state") == ["true"]
    assert rows(path, "SELECT status FROM v_runs") == ["stopped"]


async def test_a30_agent_error_tells_type_and_hook_and_the_traceback_is_kept(path: Path) -> None:
    async def fail(*_: Any) -> None:
        raise KeyError("lost")

    controller = controller_on(path, agent("a", tick=fail), agent("b", start=fail))
    await controller.run(iterations=1)

    errors = {event.data["agent"]: event.data for event in controller.event_bus.get_event_history("agent_error")}
    assert (errors["a"]["type"], errors["a"]["hook"], errors["a"]["error"]) == ("KeyError", "on_tick", "'lost'")
    assert errors["b"]["hook"] == "on_start"
    assert rows(path, "SELECT error FROM v_ticks WHERE agent = 'a'") == ["KeyError: 'lost'"]
    assert all("in fail" in text for text in rows(path, "SELECT traceback FROM tick_errors"))

"""A unit of work takes effect whole or not at all, whoever ends it, and sees what the units before it did."""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from ael_store import AELController, StateContext, UnitClosed, get_state_context
from ael_store.model.event import Event
from tests.loops import agent, controller_on, iterations_of, rows, running, until


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ael.db"


async def raise_error() -> None:
    raise ValueError("broken")


async def raise_exit() -> None:
    raise SystemExit(3)


async def raise_interrupt() -> None:
    raise KeyboardInterrupt


async def raise_cancelled() -> None:
    raise asyncio.CancelledError("by itself")


async def raise_group() -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(raise_error())


async def cancel_itself() -> None:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    await asyncio.sleep(0)


async def await_a_cancelled_task() -> None:
    task = asyncio.create_task(asyncio.sleep(60))
    task.cancel()
    await task


async def take_too_long() -> None:
    await asyncio.Event().wait()


async def swallow_the_timeout() -> None:
    with suppress(asyncio.CancelledError):
        await asyncio.Event().wait()


ENDINGS = [
    (raise_error, "error", "ValueError: broken"),
    (raise_exit, "error", "SystemExit: 3"),
    (raise_interrupt, "error", "KeyboardInterrupt: "),
    (raise_group, "error", "ExceptionGroup: "),
    (raise_cancelled, "cancelled", "CancelledError: by itself"),
    (cancel_itself, "cancelled", "CancelledError: "),
    (await_a_cancelled_task, "cancelled", "CancelledError: "),
    (take_too_long, "timeout", "Timeout: the hook ran longer than 0.03 s"),
    (swallow_the_timeout, "timeout", "Timeout: the hook ran longer than 0.03 s"),
]


@pytest.mark.parametrize(("ending", "outcome", "error"), ENDINGS, ids=[item[0].__name__ for item in ENDINGS])
async def test_unit_that_does_not_succeed_leaves_nothing_but_its_failure(
    path: Path, ending: Any, outcome: str, error: str
) -> None:
    told: list[str] = []

    async def tick(context: StateContext) -> None:
        context.set("a", 1)
        context.own.set("b", 2)
        context.emit("half")
        controller.event_bus.emit("half too", "bad")
        controller.event_bus.subscribe("half", "bad", print)
        await ending()

    async def on_error(found: Exception, context: StateContext) -> None:
        assert not context.has("a")
        context.set("handled", str(found))
        told.append(type(found).__name__)

    bad = agent("bad", tick=tick, error=on_error, tick_timeout=0.03)
    good = agent("good")
    controller = controller_on(path, bad, good)
    await controller.run(iterations=2)

    assert rows(path, "SELECT key FROM v_state") == ["handled"]
    assert rows(path, "SELECT id FROM v_events WHERE type LIKE 'half%'") == []
    assert controller.event_bus.get_stats()["total_subscribers"] == 0
    ticks = rows(path, "SELECT outcome, error FROM v_ticks WHERE agent = 'bad' AND kind = 'tick'")
    assert [row[0] for row in ticks] == [outcome] * 2
    assert error in ticks[0][1]
    assert (bad.tick_count, good.tick_count) == (0, 2)
    assert bad.error_count == (2 if outcome != "cancelled" else 0)
    assert len(told) == 2
    assert (
        rows(path, "SELECT json_extract(data, '$.outcome') FROM v_events WHERE type = 'agent_error'") == [outcome] * 2
    )


async def test_plain_hook_that_takes_too_long_leaves_nothing_and_its_thread_writes_no_more(path: Path) -> None:
    go, refused = threading.Event(), threading.Event()

    def tick(context: StateContext) -> None:
        context.set("a", 1)
        go.wait(20)
        try:
            context.set("late", 1)
        except UnitClosed:
            refused.set()

    stuck = agent("stuck", tick=tick, tick_timeout=0.3)  # enough for its thread to begin
    controller = controller_on(path, stuck)
    async with running(controller):
        await until(lambda: stuck.error_count)
        await iterations_of(controller, 5)
        assert stuck.error_count == 1, "its thread still runs, so it is not ticked again"
        go.set()
        await until(refused.is_set)
        await until(lambda: stuck.error_count + stuck.tick_count >= 2)

    assert rows(path, "SELECT outcome FROM v_ticks WHERE agent = 'stuck' ORDER BY id LIMIT 1") == ["timeout"]


async def test_units_see_the_writes_of_earlier_units_of_the_iteration_and_their_own(path: Path) -> None:
    seen: list[Any] = []

    def reader(name: str) -> Any:
        async def tick(context: StateContext) -> None:
            seen.append((name, context.get("trail", [])))
            context.set("trail", [*context.get("trail", []), name])
            assert context.get("trail")[-1] == name

        return tick

    agents = [agent(name, tick=reader(name), priority=priority) for name, priority in (("z", 10), ("b", 10), ("a", 10))]
    await controller_on(path, *agents).run(iterations=1)

    assert seen == [("z", []), ("b", ["z"]), ("a", ["z", "b"])]


async def test_several_writes_of_a_key_are_one_change_and_an_equal_one_is_none(path: Path) -> None:
    async def tick(context: StateContext) -> None:
        for number in range(3):
            context.set("counted", number)
        context.set("equal", {"a": 1, "b": 2})
        context.set("equal", {"b": 2, "a": 1})
        context.set("gone", 1)
        context.delete("gone")
        context.set("back", "other")
        context.set("back", "same")

    controller = controller_on(path, agent("a", tick=tick))
    controller.state_context.set("back", "same")
    await controller.run(iterations=3)

    history = rows(path, "SELECT key, operation, old_value, new_value FROM v_state_history WHERE agent = 'a'")
    assert history == [("counted", "set", None, "2"), ("equal", "set", None, '{"b":2,"a":1}')]
    assert rows(path, "SELECT key, version FROM v_state ORDER BY key") == [("back", 1), ("counted", 1), ("equal", 1)]
    assert rows(path, "SELECT count(*) FROM v_ticks WHERE agent = 'a'") == [1]
    assert rows(path, "SELECT tick_count FROM v_agents") == [3]


async def test_equal_means_of_the_same_type(path: Path) -> None:
    values: list[Any] = [1, 1.0, True, "1", [1], [1.0], [True], None, 0, -0.0, 0.0]

    async def tick(context: StateContext) -> None:
        context.set("k", values[context.iteration - 1])

    await controller_on(path, agent("a", tick=tick)).run(iterations=len(values))

    assert len(rows(path, "SELECT id FROM v_state_history")) == len(values)


async def test_clear_is_one_deletion_per_key_and_keeps_nothing(path: Path) -> None:
    async def tick(context: StateContext) -> None:
        context.set("mine", 1)
        context.clear()
        assert context.get_all() == {}
        context.set("after", 1)

    controller = controller_on(path, agent("a", tick=tick))
    controller.state_context.update({"x": 1, "y": None})
    await controller.run(iterations=1)

    history = rows(path, "SELECT key, operation, old_value FROM v_state_history WHERE iteration = 1 ORDER BY key")
    assert history == [("after", "set", None), ("x", "delete", "1"), ("y", "delete", "null")]


async def test_values_are_copied_on_the_way_in_and_on_the_way_out(path: Path) -> None:
    async def tick(context: StateContext) -> None:
        data, extra = {"list": [1]}, {"m": [1]}
        context.set("v", data)
        context.emit("e", data, extra)
        controller.event_bus.emit("e", "a", data, extra)
        data["list"].append(2)
        extra["m"].append(2)
        context.get("v")["list"].append(3)
        context.setdefault("v", None)["list"].append(4)

    seen: list[Any] = []

    async def change(event: Event, context: StateContext) -> None:
        seen.append((event.data, event.metadata))
        event.data["list"].append("changed")
        event.metadata["m"] = "changed"

    agents = [agent("a", tick=tick), *(agent(name, event=change, subscriptions=["e"]) for name in "bc")]
    controller = controller_on(path, *agents)
    await controller.run(iterations=1)

    assert rows(path, "SELECT value FROM v_state") == ['{"list":[1]}']
    assert rows(path, "SELECT data, metadata FROM v_events WHERE type = 'e'") == [('{"list":[1]}', '{"m":[1]}')] * 2
    assert len(seen) == 4
    assert [event.data for event in controller.event_bus.get_event_history("e")] == [{"list": [1]}] * 2


async def test_emit_from_outside_takes_the_data_of_the_moment_of_the_call(path: Path) -> None:
    controller = controller_on(path)
    data = [1]
    controller.state_context.emit("e", data)
    controller.event_bus.emit("e", "test", data)
    data.append(2)
    await controller.run(iterations=1)

    assert [event.data for event in controller.event_bus.get_event_history("e")] == [[1], [1]]


# -- the unit's context ------------------------------------------------------------------------------


async def test_context_singleton_and_bus_belong_to_the_unit_in_tasks_and_threads(path: Path) -> None:
    async def tick(context: StateContext) -> None:
        shared, bus = controller.state_context, controller.event_bus

        def in_thread() -> None:
            shared.set("thread", context.get("begin"))
            bus.emit("thread", "a")

        async def in_task() -> None:
            shared.set("task", context.get("begin"))
            bus.emit("task", "a")

        shared.set("begin", context.iteration)
        async with asyncio.TaskGroup() as group:
            group.create_task(in_task())
            group.create_task(asyncio.to_thread(in_thread))
        assert context.get_all() == {"begin": 1, "task": 1, "thread": 1}
        raise ValueError("and all of it goes")

    controller = controller_on(path, agent("a", tick=tick))
    await controller.run(iterations=1)

    assert rows(path, "SELECT key FROM v_state") == []
    assert rows(path, "SELECT id FROM v_events WHERE source = 'a'") == []


async def test_get_state_context_in_a_hook_is_the_context_of_the_unit(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ael_store import compat

    for name in ("_manager", "_bus", "_context", "_controller"):
        monkeypatch.setattr(compat, name, None)

    def tick(context: StateContext) -> None:
        context.set("n", 1)
        assert get_state_context().get("n") == 1
        get_state_context().set("m", 2)
        assert context.get("m") == 2
        raise ValueError("no")

    one = agent("a", tick=tick)
    controller = AELController(state_context=get_state_context(), tick_rate=0.005, store=path)
    controller.agent_manager.register(one)
    await controller.run(iterations=1)

    assert rows(path, "SELECT error FROM v_ticks WHERE agent = 'a'") == ["ValueError: no"]
    assert get_state_context().get_all() == {}


async def test_plain_hooks_run_in_threads_and_do_not_block_the_loop(path: Path) -> None:
    threads: dict[str, bool] = {}

    def note(name: str) -> Any:
        def hook(*arguments: Any) -> None:
            threads[name] = threading.current_thread() is threading.main_thread()
            arguments[-1].set(name, True)
            if name == "tick":
                raise ValueError("for on_error")

        return hook

    hooks = {name: note(name) for name in ("start", "tick", "event", "error", "shutdown")}
    controller = controller_on(path, agent("a", subscriptions=["e"], **hooks))
    async with running(controller):
        controller.event_bus.emit("e", "test")
        await until(lambda: "event" in threads and "error" in threads)

    assert threads == dict.fromkeys(hooks, False)
    assert set(rows(path, "SELECT key FROM v_state")) == set(hooks) - {"tick"}


async def test_context_is_closed_when_its_unit_has_ended(path: Path) -> None:
    kept: list[StateContext] = []
    refused: list[str] = []

    async def tick(context: StateContext) -> None:
        kept.append(context)
        leaked.append(asyncio.create_task(later(context)))

    async def later(context: StateContext) -> None:
        await ended.wait()
        for use in (
            lambda: context.set("k", 1),
            lambda: context.get("k"),
            lambda: context.own.set("k", 1),
            lambda: context.emit("e"),
            lambda: controller.state_context.set("k", 1),
            lambda: controller.event_bus.emit("e", "a"),
            lambda: controller.event_bus.subscribe("e", "a", print),
            lambda: context.iteration,
        ):
            with pytest.raises(UnitClosed) as error:
                use()
            refused.append(str(error.value))

    ended, leaked = asyncio.Event(), list[asyncio.Task[None]]()
    one = agent("a", tick=tick)
    controller = controller_on(path, one)
    async with running(controller):
        await until(lambda: one.tick_count >= 1)
        ended.set()
        await leaked[0]
        with pytest.raises(UnitClosed, match="transact"):
            kept[0].set("k", 1)
        for task in leaked:
            await task

    assert all("a: the tick unit of iteration" in text for text in refused)
    assert rows(path, "SELECT key FROM v_state") == []


async def test_now_and_random_are_fixed_for_a_unit_and_its_children(path: Path) -> None:
    async def tick(context: StateContext) -> None:
        assert context.now == context.now
        assert context.random is context.random
        assert context.resumed is False
        moments.append(context.now)
        numbers.append(context.random.random())
        await asyncio.sleep(0.002)
        assert context.now == moments[-1]

    moments: list[Any] = []
    numbers: list[float] = []
    await controller_on(path, agent("a", tick=tick)).run(iterations=3)

    assert moments == sorted(set(moments))
    assert len(set(numbers)) == 3


async def test_own_is_the_private_part_of_the_agent(path: Path) -> None:
    async def tick(context: StateContext) -> None:
        context.set("n", "shared")
        context.own.increment("n", 5)
        context.own.update({"x": 1, "y": 2})
        assert context.own.delete("y") is True
        assert context.own.get_all() == {"n": 5, "x": 1}
        assert context.own.has("n")
        assert not context.own.has("ael_status")
        with pytest.raises(ValueError):
            context.own.set("", 1)

    controller = controller_on(path, agent("a", tick=tick))
    await controller.run(iterations=1)

    expected = {"agent/a/n": 5, "agent/a/x": 1, "n": "shared"}
    assert controller.state_context.get_all() == expected


async def test_metadata_are_saved_with_each_successful_unit_only(path: Path) -> None:
    async def tick(context: StateContext) -> None:
        one.metadata["seen"] = context.iteration
        if context.iteration == 2:
            raise ValueError("not this one")

    one = agent("a", tick=tick)
    controller = controller_on(path, one)
    saved: list[str] = []
    controller.observe(lambda summary: saved.extend(rows(path, "SELECT metadata FROM v_agents")))
    await controller.run(iterations=3)

    assert saved == ['{"seen":1}', '{"seen":1}', '{"seen":3}']


@pytest.mark.parametrize("wrong", [{"t": (1, 2)}, None, ["a"]])
async def test_metadata_that_are_no_json_object_fail_the_unit(path: Path, wrong: Any) -> None:
    async def tick(context: StateContext) -> None:
        context.set("k", 1)
        one.metadata = wrong

    one = agent("a", tick=tick)
    await controller_on(path, one).run(iterations=1)

    assert rows(path, "SELECT key FROM v_state") == []
    (error, *_) = rows(path, "SELECT error FROM v_ticks WHERE agent = 'a'")
    assert "metadata" in error
    assert "'a'" in error


async def test_tick_count_includes_the_running_tick_and_failures_do_not_count(path: Path) -> None:
    inside: list[int] = []

    async def tick(context: StateContext) -> None:
        inside.append(one.tick_count)
        if context.iteration == 2:
            raise ValueError("no")

    one = agent("a", tick=tick)
    await controller_on(path, one).run(iterations=4)

    assert inside == [1, 2, 2, 3]
    assert (one.tick_count, one.error_count) == (3, 1)
    assert rows(path, "SELECT tick_count, error_count FROM v_agents") == [(3, 1)]


async def test_error_count_counts_units_of_any_kind(path: Path) -> None:
    async def fail(*_: Any) -> None:
        raise ValueError("no")

    one = agent("a", tick=fail, error=fail, shutdown=fail)
    await controller_on(path, one).run(iterations=1)

    kinds = rows(path, "SELECT kind FROM v_ticks WHERE agent = 'a' AND outcome = 'error' ORDER BY id")
    assert kinds == ["tick", "error", "shutdown", "error"]
    assert rows(path, "SELECT error_count FROM v_agents") == [4]


class Unreadable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no")


@pytest.mark.parametrize(
    ("error", "kept"),
    [
        (Unreadable(), "its message can't be read"),
        (ValueError("a\0b\ud800c"), "ValueError: a\\0b\\ud800c"),
        (ValueError("x" * 1_000_000), "xxx"),
        (ValueError(), "ValueError: "),
    ],
)
async def test_any_error_can_be_recorded(path: Path, error: Exception, kept: str) -> None:
    async def tick(context: StateContext) -> None:
        raise error

    controller = controller_on(path, agent("bad", tick=tick), good := agent("good"))
    await controller.run(iterations=1)

    assert good.tick_count == 1
    (found,) = rows(path, "SELECT error FROM v_ticks WHERE agent = 'bad'")
    assert kept in found
    assert len(found) < 10_000
    assert len(controller.event_bus.get_event_history("agent_error")) == 1


@pytest.mark.parametrize(("attribute", "value"), [("priority", 11), ("enabled", "no"), ("name", "other")])
async def test_agent_that_breaks_its_own_attributes_fails_alone(path: Path, attribute: str, value: Any) -> None:
    async def tick(context: StateContext) -> None:
        setattr(bad, attribute, value)

    bad, good = agent("bad", tick=tick), agent("good")
    await controller_on(path, bad, good).run(iterations=2)

    assert good.tick_count == 2
    assert bad.error_count == 2
    assert repr(value) in rows(path, "SELECT last_error FROM v_agents WHERE name = 'bad'")[0]

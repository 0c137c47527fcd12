"""Other code of the process changes the state of a running loop: in order, durably, and without racing it."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

from ael_store import StateContext
from ael_store.errors import LoopNotRunning, NotAllowedHere
from ael_store.model.event import Event
from tests.loops import agent, controller_on, iterations_of, rows, running, until


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ael.db"


# -- transact ----------------------------------------------------------------------------------------


async def test_transact_returns_its_result_once_it_is_committed(path: Path) -> None:
    def change(context: StateContext) -> tuple[int, object]:
        context.emit("changed")
        return context.increment("n", 5), self

    self = object()
    async with running(controller_on(path, tick_rate=3600)) as controller:
        result = await controller.transact(change)
        assert result == (5, self)
        assert rows(path, "SELECT key, value FROM v_state") == [("n", "5")]
        assert rows(path, "SELECT source FROM v_events WHERE type = 'changed'") == ["outside"]

    assert rows(path, "SELECT kind, outcome FROM v_ticks WHERE agent = '(outside)' AND kind = 'outside'") == [
        ("outside", "success")
    ]


async def test_transact_takes_async_functions_and_uses_the_singletons(path: Path) -> None:
    async def change(context: StateContext) -> Any:
        await asyncio.sleep(0)
        controller.state_context.set("a", 1)
        assert context.get("a") == 1
        with pytest.raises(NotAllowedHere):
            await controller.transact(lambda context: None)
        return controller.state_context.compare_and_set("a", 1, 2)

    async with running(controller_on(path)) as controller:
        assert await controller.transact(change) is True
        assert controller.state_context.get("a") == 2


async def test_transact_sees_what_was_queued_before_it(path: Path) -> None:
    async with running(controller_on(path, tick_rate=3600)) as controller:
        controller.state_context.set("n", 1)
        assert await controller.transact(lambda context: context.get("n")) == 1


@pytest.mark.parametrize("error", [ValueError("no"), StopIteration(), asyncio.CancelledError(), KeyError("k")])
async def test_transact_raises_what_its_function_raised_and_leaves_nothing(path: Path, error: BaseException) -> None:
    async def change(context: StateContext) -> None:
        context.set("a", 1)
        raise error

    async with running(controller_on(path)) as controller:
        wanted = RuntimeError if isinstance(error, asyncio.CancelledError | StopIteration) else type(error)
        with pytest.raises(wanted):
            await asyncio.wait_for(controller.transact(change), 10)
        await iterations_of(controller)

    assert rows(path, "SELECT key FROM v_state") == []
    assert len(rows(path, "SELECT id FROM v_ticks WHERE kind = 'outside' AND outcome != 'success'")) == 1


async def test_transact_that_takes_too_long_raises_a_timeout(path: Path) -> None:
    async def change(context: StateContext) -> None:
        context.set("a", 1)
        await asyncio.Event().wait()

    async with running(controller_on(path, tick_timeout=0.02)) as controller:
        with pytest.raises(TimeoutError, match=r"0\.02 s"):
            await controller.transact(change)

    assert not controller.state_context.has("a")


async def test_slow_transact_does_not_hold_up_the_loop(path: Path) -> None:
    async def change(context: StateContext) -> str:
        await go.wait()
        context.set("a", 1)
        return "done"

    go, other = asyncio.Event(), agent("other")
    async with running(controller_on(path, other, slow_after=0.01)) as controller:
        waiting = asyncio.create_task(controller.transact(change))
        ticks = other.tick_count
        await until(lambda: other.tick_count > ticks + 3)
        go.set()
        assert await waiting == "done"
        assert rows(path, "SELECT value FROM v_state") == ["1"]


async def test_transact_needs_a_running_loop(path: Path) -> None:
    controller = controller_on(path)
    for _ in range(2):
        with pytest.raises(LoopNotRunning):
            await controller.transact(lambda context: None)
        await controller.run(iterations=1)


async def test_transact_that_the_stop_overtakes_is_refused(path: Path) -> None:
    async def change(context: StateContext) -> None:
        context.set("a", 1)
        begun.set()
        await asyncio.Event().wait()

    begun = asyncio.Event()
    async with running(controller_on(path, slow_after=0.01, grace=0.03)) as controller:
        waiting = asyncio.create_task(controller.transact(change))
        await begun.wait()
        await controller.stop()
        with pytest.raises(LoopNotRunning):
            await asyncio.wait_for(waiting, 10)

    assert rows(path, "SELECT key FROM v_state") == []


async def test_transact_inside_a_hook_is_refused_and_names_the_context(path: Path) -> None:
    async def tick(context: StateContext) -> None:
        with pytest.raises(NotAllowedHere, match="context"):
            await controller.transact(lambda context: None)
        refused.append(True)

    refused: list[bool] = []
    controller = controller_on(path, agent("a", tick=tick))
    await controller.run(iterations=1)

    assert refused == [True]


async def test_transact_abandoned_by_its_caller_harms_nobody(path: Path) -> None:
    async def change(context: StateContext) -> None:
        await go.wait()
        context.set("a", 1)

    go = asyncio.Event()
    async with running(controller_on(path, slow_after=0.01)) as controller:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(controller.transact(change), 0.02)
        go.set()
        await until(lambda: controller.state_context.get("a"))
        await iterations_of(controller)


# -- single calls ------------------------------------------------------------------------------------


async def test_calls_from_tasks_and_threads_are_applied_each_in_its_order(path: Path) -> None:
    def write(name: str) -> None:
        for number in range(50):
            controller.state_context.set(name, number)
            controller.event_bus.emit("x", name, number)

    heard: dict[str, list[int]] = {}

    async def event(event: Event, context: StateContext) -> None:
        heard.setdefault(event.source, []).append(event.data)
        assert context.get(event.source, -1) >= event.data

    async with running(controller_on(path, agent("h", event=event, subscriptions=["x"]))) as controller:
        await asyncio.gather(*(asyncio.to_thread(write, f"thread {number}") for number in range(3)))
        write("task")
        await until(lambda: sum(map(len, heard.values())) == 200)

    assert heard == {name: list(range(50)) for name in heard}
    assert len(heard) == 4


async def test_each_call_wakes_the_loop_and_is_a_unit_of_its_own(path: Path) -> None:
    async with running(controller_on(path, tick_rate=3600)) as controller:
        context = controller.state_context
        context.set("a", 1)
        context.update({"b": 2, "c": 3})
        context.delete("nothing")
        context.delete("a")
        await until(lambda: context.get_all() == {"b": 2, "c": 3})

    written = rows(path, "SELECT key, operation FROM v_state_history ORDER BY id")
    assert written == [("a", "set"), ("b", "set"), ("c", "set"), ("a", "delete")]
    assert len(rows(path, "SELECT id FROM v_ticks WHERE kind = 'outside'")) == 3
    assert set(rows(path, "SELECT agent FROM v_state_history")) == {"(outside)"}


async def test_reads_from_outside_see_the_last_commit(path: Path) -> None:
    async def tick(context: StateContext) -> None:
        context.set("n", context.iteration)

    async def look(context: StateContext) -> None:
        # A thread of nobody's: it sees what a restart would.
        done = threading.Event()

        def peek() -> None:
            seen.append((controller.state_context.get("n"), controller.state_context.get_all().get("n")))
            done.set()

        threading.Thread(target=peek).start()
        assert done.wait(10)

    seen: list[Any] = []
    controller = controller_on(path, agent("writer", tick=tick), agent("looker", tick=look))
    await controller.run(iterations=3)

    assert seen == [(None, None), (1, 1), (2, 2)]


@pytest.mark.parametrize("call", ["increment", "compare_and_set"])
async def test_what_would_race_the_loop_is_refused_and_names_transact(path: Path, call: str) -> None:
    controller = controller_on(path)
    async with running(controller):
        with pytest.raises(NotAllowedHere, match="transact"):
            getattr(controller.state_context, call)("n", *([1, 2] if call == "compare_and_set" else []))


@pytest.mark.parametrize("attribute", ["own", "now", "random", "iteration", "resumed"])
async def test_what_belongs_to_a_unit_is_refused_outside(path: Path, attribute: str) -> None:
    controller = controller_on(path)
    async with running(controller):
        with pytest.raises(NotAllowedHere, match=attribute):
            getattr(controller.state_context, attribute)


async def test_writes_before_the_start_wait_and_are_applied_after_resuming(path: Path) -> None:
    first = controller_on(path)
    first.state_context.update({"kept": 1, "changed": 1})
    await first.run(iterations=1)

    second = controller_on(path)
    second.state_context.set("changed", 2)
    second.event_bus.emit("x", "test")
    assert second.state_context.get("changed") == 2
    assert not rows(path, "SELECT key FROM v_state WHERE value = '2'")
    await second.run(iterations=1)

    assert second.state_context.get_all() == {"kept": 1, "changed": 2}
    assert len(rows(path, "SELECT id FROM v_events WHERE type = 'x'")) == 1


async def test_state_set_on_a_lone_context_is_taken_into_the_loop(path: Path) -> None:
    context = StateContext()
    context.set("a", [1])
    controller = controller_on(path, state_context=context)
    await controller.run(iterations=1)

    assert rows(path, "SELECT key, value FROM v_state") == [("a", "[1]")]


async def test_writes_after_the_end_wait_for_the_next_start(path: Path) -> None:
    controller = controller_on(path)
    controller.state_context.set("a", 1)
    await controller.run(iterations=1)
    controller.state_context.set("b", 2)
    controller.state_context.delete("a")

    assert controller.state_context.get_all() == {"b": 2}
    assert rows(path, "SELECT key FROM v_state") == ["a"]
    await controller.run(iterations=1)
    assert rows(path, "SELECT key FROM v_state") == ["b"]


async def test_refused_value_from_outside_is_refused_at_the_call(path: Path) -> None:
    async with running(controller_on(path)) as controller:
        for wrong in ({"k": (1,)}, {"k": {"a": [float("inf")]}}):
            with pytest.raises((TypeError, ValueError), match="'k'"):
                controller.state_context.update({"good": 1, **wrong})
        with pytest.raises(TypeError, match="'x'"):
            controller.state_context.emit("x", {1})
        await iterations_of(controller)

    assert rows(path, "SELECT key FROM v_state") == []


async def test_two_controllers_do_not_share_parts_while_one_runs(path: Path, tmp_path: Path) -> None:
    async with running(controller_on(path)) as controller:
        with pytest.raises(ValueError, match="second loop"):
            controller_on(tmp_path / "other.db", event_bus=controller.event_bus)
        other = controller_on(tmp_path / "other.db")
        other.state_context.set("a", 1)
        await other.run(iterations=1)

    assert not controller.state_context.has("a")

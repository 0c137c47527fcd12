"""One slow or broken agent harms nobody else."""

from __future__ import annotations

import asyncio
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from ael_store import StateContext, UnitClosed
from ael_store.model.event import Event
from tests.loops import ShiftClock, agent, controller_on, iterations_of, rows, running, until


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ael.db"


class Gate:
    """A tick that writes, waits until it is let through, and writes again."""

    def __init__(self, work: Any = None) -> None:
        self.begun = 0
        self.go = asyncio.Event()
        self.work = work

    async def __call__(self, context: StateContext) -> None:
        self.begun += 1
        if self.begun > 1:
            return
        if self.work is not None:
            await self.work(context, self.go.wait)
        else:
            await self.go.wait()


# -- slow --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("background", [False, True])
async def test_iterations_go_on_without_a_slow_tick_which_takes_effect_when_it_ends(
    path: Path, background: bool
) -> None:
    async def work(context: StateContext, wait: Any) -> None:
        context.set("begun in", context.iteration)
        context.emit("done")
        await wait()
        context.set("sees", context.get("n", 0))

    async def count(context: StateContext) -> None:
        context.increment("n")
        assert not context.has("begun in") or gate.go.is_set()

    gate = Gate(work)
    slow, other = agent("slow", tick=gate, background=background), agent("other", tick=count)
    controller = controller_on(path, slow, other, slow_after=3600 if background else 0.01)
    async with running(controller):
        await until(lambda: other.tick_count >= 5)
        assert gate.begun == 1
        assert not controller.state_context.has("begun in")
        gate.go.set()
        await until(lambda: controller.state_context.has("begun in"))
        ended = controller.state_context.get("ael_iteration")

    assert controller.state_context.get("sees") == 0, "it reads the state as it was at its start"
    assert controller.state_context.get("begun in") == 1
    iteration = rows(path, "SELECT iteration FROM v_state WHERE key = 'begun in'")[0]
    assert 5 <= iteration <= ended
    assert rows(path, "SELECT iteration FROM v_events WHERE type = 'done'") == [iteration]
    assert rows(path, "SELECT iteration, outcome FROM v_ticks WHERE agent = 'slow' LIMIT 1") == [(iteration, "success")]


async def test_background_unit_that_wrote_what_another_changed_is_discarded_as_a_conflict(path: Path) -> None:
    async def work(context: StateContext, wait: Any) -> None:
        context.set("contested", "slow")
        context.set("alone", "slow")
        context.emit("done")
        await wait()

    async def event(event: Event, context: StateContext) -> None:
        context.set("contested", "quick")

    gate = Gate(work)
    slow = agent("slow", tick=gate, background=True)
    controller = controller_on(path, slow, agent("quick", event=event, subscriptions=["go"]))
    async with running(controller):
        await until(lambda: gate.begun)
        controller.event_bus.emit("go", "test")
        await until(lambda: controller.state_context.has("contested"))
        gate.go.set()
        await until(lambda: gate.begun >= 2)

    assert gate.begun >= 2, "it runs again when it is next due"
    assert slow.error_count == 0
    assert rows(path, "SELECT key, value FROM v_state") == [("contested", '"quick"')]
    assert rows(path, "SELECT id FROM v_events WHERE type = 'done'") == []
    ((outcome, error),) = rows(path, "SELECT outcome, error FROM v_ticks WHERE agent = 'slow'")
    assert outcome == "conflict"
    assert "'contested'" in error
    assert rows(path, "SELECT id FROM v_events WHERE type = 'agent_error'") == []


async def test_keys_only_read_or_set_to_their_value_by_another_are_no_conflict(path: Path) -> None:
    async def work(context: StateContext, wait: Any) -> None:
        context.set("written", 5)
        await wait()
        context.set("result", context.get("read"))

    async def quick(context: StateContext) -> None:
        if gate.begun == 1 and not gate.go.is_set():
            context.set("read", 2)
            context.set("written", 1)
            gate.go.set()

    gate = Gate(work)
    controller = controller_on(path, agent("slow", tick=gate, background=True), agent("quick", tick=quick))
    controller.state_context.update({"read": 1, "written": 1})
    async with running(controller):
        await until(lambda: controller.state_context.has("result"))

    assert controller.state_context.get_all() == {"read": 2, "written": 5, "result": 1}
    assert "conflict" not in rows(path, "SELECT outcome FROM v_ticks")


async def test_increments_of_units_at_the_same_time_are_merged(path: Path) -> None:
    async def work(context: StateContext, wait: Any) -> None:
        assert context.increment("n", 10) == 10
        await wait()
        assert context.increment("n", 10) == 20

    async def count(context: StateContext) -> None:
        context.increment("n")

    gate = Gate(work)
    slow, other = agent("slow", tick=gate, background=True), agent("other", tick=count)
    controller = controller_on(path, slow, other)
    async with running(controller):
        await until(lambda: other.tick_count >= 5)
        gate.go.set()
        await until(lambda: gate.begun >= 2)

    assert controller.state_context.get("n") == other.tick_count + 20
    changes = rows(path, "SELECT old_value, new_value FROM v_state_history WHERE key = 'n' ORDER BY id")
    assert all(before == after for (_, before), (after, _) in pairwise(changes))


@pytest.mark.parametrize(
    ("now", "outcome", "value"), [("text", "conflict", "text"), (None, "success", 5), (2.5, "success", 7.5)]
)
async def test_increment_of_what_became_something_else(path: Path, now: Any, outcome: str, value: Any) -> None:
    async def work(context: StateContext, wait: Any) -> None:
        context.increment("n", 5)
        await wait()

    gate = Gate(work)
    slow = agent("slow", tick=gate, background=True)
    controller = controller_on(path, slow)
    controller.state_context.set("n", 1)
    async with running(controller):
        await until(lambda: gate.begun)
        await controller.transact(lambda context: context.delete("n") if now is None else context.set("n", now))
        gate.go.set()
        await until(lambda: rows(path, "SELECT outcome FROM v_ticks WHERE agent = 'slow'"))

    assert rows(path, "SELECT outcome FROM v_ticks WHERE agent = 'slow' LIMIT 1") == [outcome]
    assert controller.state_context.get("n") == value


async def test_delivery_that_conflicts_is_repeated_at_once_and_no_attempt_is_counted(path: Path) -> None:
    async def event(event: Event, context: StateContext) -> None:
        began.append(context.get("k"))
        context.set("k", f"by event, after {context.get('k')}")
        if len(began) == 1:
            await go.wait()

    began: list[Any] = []
    go = asyncio.Event()
    controller = controller_on(path, agent("h", event=event, subscriptions=["x"]), slow_after=0.01)
    async with running(controller):
        controller.event_bus.emit("x", "test")
        await until(lambda: began)
        await iterations_of(controller, 2)
        await controller.transact(lambda context: context.set("k", "outside"))
        go.set()
        await until(lambda: controller.state_context.get("k") == "by event, after outside")

    assert began == [None, "outside"]
    outcomes = rows(path, "SELECT outcome FROM v_ticks WHERE kind = 'event' ORDER BY id")
    assert outcomes == ["conflict", "success"]
    assert rows(path, "SELECT * FROM v_pending") == []


async def test_slow_plain_hook_is_moved_to_the_background_too(path: Path) -> None:
    def tick(context: StateContext) -> None:
        context.set("k", 1)
        go.wait(20)

    go = threading.Event()
    slow, other = agent("slow", tick=tick), agent("other")
    controller = controller_on(path, slow, other, slow_after=0.01)
    async with running(controller):
        await until(lambda: other.tick_count >= 5)
        assert not controller.state_context.has("k")
        go.set()
        await until(lambda: controller.state_context.get("k") == 1)


async def test_events_of_an_agent_in_the_background_wait_for_it_in_order(path: Path) -> None:
    async def event(event: Event, context: StateContext) -> None:
        heard.append(event.data)

    gate, heard = Gate(), list[int]()
    controller = controller_on(path, agent("slow", tick=gate, event=event, subscriptions=["x"], background=True))
    async with running(controller):
        await until(lambda: gate.begun)
        for number in range(3):
            controller.event_bus.emit("x", "test", number)
        await iterations_of(controller, 3)
        assert heard == []
        gate.go.set()
        await until(lambda: len(heard) == 3)

    assert heard == [0, 1, 2]


async def test_timeout_ends_a_unit_in_the_background(path: Path) -> None:
    gate = Gate()
    slow, other = agent("slow", tick=gate, tick_timeout=0.1), agent("other")
    controller = controller_on(path, slow, other, slow_after=0.01)
    async with running(controller):
        await until(lambda: slow.error_count)

    assert other.tick_count > 1
    assert rows(path, "SELECT outcome FROM v_ticks WHERE agent = 'slow' LIMIT 1") == ["timeout"]


async def test_timeout_of_zero_is_no_limit(path: Path) -> None:
    async def tick(context: StateContext) -> None:
        await asyncio.sleep(0.08)

    patient = agent("patient", tick=tick, tick_timeout=0)
    await controller_on(path, patient, tick_timeout=0.02).run(iterations=1)

    assert patient.tick_count == 1


async def test_stop_lets_background_units_finish_within_the_grace_period(path: Path) -> None:
    async def work(context: StateContext, wait: Any) -> None:
        await wait()
        context.set("finished", True)

    gate = Gate(work)
    controller = controller_on(path, agent("slow", tick=gate, background=True))
    async with running(controller):
        await until(lambda: gate.begun)
        stopping = asyncio.create_task(controller.stop())
        await until(lambda: controller.state_context.get("ael_status") == "stopping")
        assert not stopping.done()
        gate.go.set()
        await stopping

    assert controller.state_context.get("finished") is True


async def test_stop_abandons_a_plain_hook_that_never_ends(path: Path) -> None:
    def tick(context: StateContext) -> None:
        context.set("k", 1)
        go.wait(30)

    go = threading.Event()
    stuck = agent("stuck", tick=tick)
    controller = controller_on(path, stuck, agent("other", shutdown=Gate()), slow_after=0.01, grace=0.05)
    began = time.monotonic()
    try:
        async with running(controller):
            await iterations_of(controller, 2)
    finally:
        go.set()

    assert time.monotonic() - began < 10
    assert rows(path, "SELECT outcome FROM v_ticks WHERE agent = 'stuck'") == ["cancelled"]
    assert rows(path, "SELECT status FROM v_runs") == ["stopped"]


async def test_agent_unregistered_while_its_hook_runs_is_shut_down_after_it(path: Path) -> None:
    async def shutdown(context: StateContext) -> None:
        ended.append(gate.go.is_set())

    gate, ended = Gate(), list[bool]()
    controller = controller_on(path, agent("slow", tick=gate, shutdown=shutdown, background=True))
    async with running(controller):
        await until(lambda: gate.begun)
        controller.agent_manager.unregister("slow")
        await iterations_of(controller, 2)
        assert ended == []
        gate.go.set()
        await until(lambda: ended)

    assert ended == [True]


# -- broken ------------------------------------------------------------------------------------------


async def fail(*_: Any) -> None:
    raise ValueError("broken")


async def test_agent_backs_off_after_five_errors_and_is_quarantined_after_twenty(path: Path) -> None:
    bad, good, clock = agent("bad", tick=fail), agent("good"), ShiftClock()
    controller = controller_on(path, bad, good, clock=clock)
    waits = [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300, 300, 300, 300, 300]
    async with running(controller):
        await until(lambda: bad.error_count == 5)
        for number, wait_s in enumerate(waits, 6):
            if wait_s > 4:  # a machine under load takes its time for two iterations
                clock.skip(wait_s - 4)
                await iterations_of(controller, 2)
                assert bad.error_count == number - 1, f"it waits {wait_s} s"
            clock.skip(min(wait_s, 4) + 0.1)
            await until(lambda number=number: bad.error_count == number)
        await until(lambda: rows(path, "SELECT status FROM v_agents WHERE name = 'bad'") == ["quarantined"])
        assert len(controller.event_bus.get_event_history("agent_quarantined")) == 1
        clock.skip(3500)
        await iterations_of(controller, 2)
        assert bad.error_count == 20
        clock.skip(200)
        await until(lambda: bad.error_count == 21)
        bad.on_tick = good.on_tick  # type: ignore[method-assign]
        clock.skip(3700)
        await until(lambda: bad.tick_count >= 2)

    assert rows(path, "SELECT status FROM v_agents WHERE name = 'bad'") == ["active"]
    assert [event.data["agent"] for event in controller.event_bus.get_event_history("agent_quarantined")] == ["bad"]
    assert rows(path, "SELECT kind, subject FROM v_problems WHERE subject = 'bad'") == []


async def test_back_off_survives_a_restart(path: Path) -> None:
    bad = agent("bad", tick=fail)
    await controller_on(path, bad).run(iterations=7)
    again, clock = agent("bad", tick=fail), ShiftClock()
    await controller_on(path, again, clock=clock).run(iterations=3)

    assert (bad.error_count, again.error_count) == (5, 5)


async def test_error_in_between_two_successes_is_no_back_off(path: Path) -> None:
    async def tick(context: StateContext) -> None:
        if context.iteration % 5:
            raise ValueError("four in a row")

    flaky = agent("flaky", tick=tick)
    await controller_on(path, flaky).run(iterations=15)

    assert (flaky.tick_count, flaky.error_count) == (3, 12)


@pytest.mark.parametrize(
    "options", [{"trigger": "every 5ms"}, {"start": fail}, {}], ids=["trigger", "on_start", "tick"]
)
async def test_loop_is_idle_while_an_agent_backs_off(path: Path, options: Any) -> None:
    clock = ShiftClock()
    bad = agent("bad", tick=fail, **options)
    controller = controller_on(path, bad, tick_rate=0.005 if not options else 3600, clock=clock, backoff_after=2)
    async with running(controller):
        await until(lambda: bad.error_count >= 2)
        before, waits = controller.get_stats()["iteration"], clock.waits
        began = time.monotonic()
        # Something else happens meanwhile: what the agent is due for does not make iterations of its own.
        for _ in range(3):
            await controller.transact(lambda context: None)
        elapsed_s = time.monotonic() - began
        allowed = 4 + (elapsed_s / 0.005 if not options else 0)
        assert controller.get_stats()["iteration"] - before <= allowed
        assert clock.waits - waits <= 3 * allowed


async def test_loop_sleeps_while_a_retry_waits_for_a_disabled_subscriber(path: Path) -> None:
    clock = ShiftClock()
    hearer = agent("h", event=fail, subscriptions=["x"])
    controller = controller_on(path, hearer, tick_rate=3600, clock=clock)
    async with running(controller):
        controller.event_bus.emit("x", "test")
        await until(lambda: hearer.error_count)
        hearer.enabled = False
        await controller.transact(lambda context: None)
        clock.skip(2)
        await asyncio.sleep(0)
        waits = clock.waits
        for _ in range(200):
            await asyncio.sleep(0)
        assert clock.waits - waits <= 5


async def test_failing_to_handle_an_event_of_the_loop_makes_no_more_of_them(path: Path) -> None:
    clock = ShiftClock()
    bad = agent("bad", tick=fail)
    handler = agent("handler", event=fail, subscriptions=["agent_error"])
    controller = controller_on(path, bad, handler, clock=clock, backoff_after=1, delivery_attempts=2)
    async with running(controller):
        await until(lambda: handler.error_count)
        clock.skip(1.2)
        await until(lambda: rows(path, "SELECT * FROM v_dead_letters"))
        await iterations_of(controller, 3)

    agents = rows(path, "SELECT json_extract(data, '$.agent') FROM v_events WHERE type = 'agent_error'")
    assert set(agents) == {"bad"}


# -- what agents may raise ---------------------------------------------------------------------------


class Unreadable(BaseException):
    def __str__(self) -> str:
        raise SystemExit("no text")

    __repr__ = __str__


def dig(*_: Any) -> None:
    dig()


def raising(error: BaseException) -> Any:
    def throw(*_: Any) -> None:
        raise error

    return throw


BREAKS = {
    "SystemExit": raising(SystemExit(3)),
    "KeyboardInterrupt": raising(KeyboardInterrupt()),
    "GeneratorExit": raising(GeneratorExit()),
    "RecursionError": dig,
    "MemoryError": raising(MemoryError()),
    "BaseException": raising(BaseException("bare")),
    "Unreadable": raising(Unreadable()),
    "StopIteration": raising(StopIteration(1)),
}


@pytest.mark.parametrize("threaded", [False, True], ids=["async", "plain"])
@pytest.mark.parametrize("name", BREAKS)
async def test_whatever_a_hook_raises_is_its_failure_and_nobody_elses(path: Path, name: str, threaded: bool) -> None:
    async def broken(*_: Any) -> None:
        BREAKS[name]()

    def told(error: Exception, context: StateContext) -> None:
        context.set("told", isinstance(error, Exception))

    bad = agent("bad", tick=BREAKS[name] if threaded else broken, error=told)
    good = agent("good")
    await controller_on(path, bad, good).run(iterations=3)

    assert good.tick_count == 3
    errors = rows(path, "SELECT error FROM v_ticks WHERE agent = 'bad' AND outcome = 'error' AND kind = 'tick'")
    assert len(errors) == 3
    assert all(name in error for error in errors)
    assert rows(path, "SELECT value FROM v_state WHERE key = 'told'") == ["true"]
    assert rows(path, "SELECT status FROM v_runs") == ["stopped"]


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit()], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("way", ["gather", "TaskGroup", "create_task"])
async def test_task_that_a_hook_makes_can_not_end_the_event_loop(path: Path, way: str, error: BaseException) -> None:
    async def child() -> None:
        raise error

    async def tick(context: StateContext) -> None:
        context.set("leak", 1)
        if way == "gather":
            await asyncio.gather(child())
        elif way == "TaskGroup":
            async with asyncio.TaskGroup() as group:
                group.create_task(child())
        else:
            await asyncio.create_task(child(), name="child")

    before = asyncio.get_running_loop().get_task_factory()
    bad, good = agent("bad", tick=tick), agent("good")
    await controller_on(path, bad, good).run(iterations=2)

    assert (good.tick_count, bad.error_count) == (2, 2)
    assert rows(path, "SELECT key FROM v_state") == []
    assert asyncio.get_running_loop().get_task_factory() is before


async def test_task_of_a_hook_is_cancelled_before_it_begins_like_any_other(path: Path) -> None:
    async def child() -> None:
        raise AssertionError("it never began")

    async def tick(context: StateContext) -> None:
        task = asyncio.create_task(child(), name="child")
        assert "child" in repr(task)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    one = agent("a", tick=tick)
    await controller_on(path, one).run(iterations=1)

    assert one.tick_count == 1


@pytest.mark.parametrize("hook", ["start", "tick", "event", "error", "shutdown"])
async def test_error_in_any_hook_is_recorded_and_the_loop_goes_on(path: Path, hook: str) -> None:
    hooks = {"tick": fail} if hook == "error" else {}
    bad = agent("bad", **{**hooks, hook: fail}, subscriptions=["go"])
    other = agent("other", tick=lambda context: context.emit("go"))
    clock = ShiftClock()
    controller = controller_on(path, bad, other, clock=clock)
    async with running(controller):
        await iterations_of(controller, 3)
        await until(lambda: other.tick_count >= 3)  # iterations that only deliver tick nobody

    found = rows(path, "SELECT outcome, error FROM v_ticks WHERE agent = 'bad' AND kind = ?", hook)
    assert found and set(found) == {("error", "ValueError: broken")}
    assert rows(path, "SELECT status FROM v_runs") == ["stopped"]


async def test_abandoned_thread_can_neither_read_nor_write_nor_emit(path: Path) -> None:
    go, refused = threading.Event(), list[str]()

    def tick(context: StateContext) -> None:
        if go.is_set():  # it is ticked again as soon as its thread has ended
            return
        go.wait(20)
        for name, use in {
            "get": lambda: context.get("k"),
            "has": lambda: context.has("k"),
            "get_all": context.get_all,
            "set": lambda: context.set("k", 1),
            "delete": lambda: context.delete("k"),
            "increment": lambda: context.increment("k"),
            "own": lambda: context.own.set("k", 1),
            "emit": lambda: context.emit("late"),
        }.items():
            try:
                use()
            except UnitClosed:
                refused.append(name)

    stuck = agent("stuck", tick=tick, tick_timeout=0.03)
    async with running(controller_on(path, stuck)):
        await until(lambda: stuck.error_count)
        go.set()
        await until(lambda: len(refused) >= 8)

    assert refused[:8] == ["get", "has", "get_all", "set", "delete", "increment", "own", "emit"]
    assert rows(path, "SELECT key FROM v_state") == []


async def test_failed_on_start_is_tried_again_with_back_off(path: Path) -> None:
    clock, ticked = ShiftClock(), list[int]()
    bad = agent("bad", start=fail, tick=lambda context: ticked.append(1))
    controller = controller_on(path, bad, agent("good"), clock=clock, backoff_after=2)
    async with running(controller):
        await until(lambda: bad.error_count == 2)
        await iterations_of(controller, 3)
        assert bad.error_count == 2, "it backs off"
        clock.skip(1.1)
        await until(lambda: bad.error_count == 3)
        bad.on_start = bad.on_tick  # type: ignore[method-assign]
        clock.skip(2.1)
        await until(lambda: ticked)

    assert rows(path, "SELECT kind FROM v_problems WHERE subject = 'bad'") == []


async def test_quarantine_probe_and_release_survive_restarts(path: Path) -> None:
    clock = ShiftClock()

    async def run_once(code: Any = fail) -> Any:
        """A run of its own, as after a restart, at the time of the clock."""
        one, other = agent("bad", tick=code), agent("good")
        controller = controller_on(path, one, other, clock=clock, backoff_after=2, quarantine_after=3)
        async with running(controller):
            await iterations_of(controller, 3)
        return one.error_count, rows(path, "SELECT status FROM v_agents WHERE name = 'bad'")[0]

    assert await run_once() == (2, "active")
    assert await run_once() == (2, "active"), "it still backs off"
    clock.skip(2)
    assert await run_once() == (3, "quarantined")
    assert await run_once() == (3, "quarantined")
    clock.skip(3700)
    assert await run_once() == (4, "quarantined"), "one probe, which failed"
    assert await run_once() == (4, "quarantined")
    clock.skip(3700)
    assert await run_once(agent("x").on_tick) == (4, "active"), "one probe, which went well"

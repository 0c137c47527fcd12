"""Durable tasks: they start after the commit, run at least once with one key, and their result has effect once."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import signal
import threading
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from ael_store import AgentBase, Event, Fatal, RetryAfter, Settings, StateContext, Task, connect, task
from ael_store.cli.main import main
from ael_store.errors import InvalidTask, InvalidValueType, UsageError
from ael_store.testing import Harness, run_tick, task_attempt
from tests.acceptance.processes import running_ael, wait_for
from tests.loops import EVERY, agent, controller_on, iterations_of, rows, running, until, worker

START = datetime(2026, 1, 1, tzinfo=UTC)
TASK = "SELECT status, attempts FROM v_tasks WHERE key = ?"
OUTCOMES = "SELECT outcome FROM task_attempts ORDER BY id"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ael.db"


async def double(self: Any, task: Any, number: int) -> int:
    return number * 2


def nobodys(task: Any, number: int) -> int:
    """A task of no agent."""
    return number + 1


def go(*args: Any, key: str = "k", **options: Any) -> dict[str, Any]:
    """The data of an event that has `work` submitted."""
    return {"args": list(args), "key": key, **options}


def loop_of(agents: list[AgentBase], **options: Any) -> Harness:
    """A loop on a virtual clock that ticks once an hour; what is due in between wakes it."""
    return Harness(agents, **{"tick_rate": 3600, **options})


def first_lines(failures: list[Any]) -> list[str]:
    return [str(failure).splitlines()[0] for failure in failures]


class Runs:
    """A function for `work` that notes its attempts, and does in each what it is told."""

    def __init__(self, *steps: Any) -> None:
        self.seen: list[tuple[str, int]] = []
        self.times: list[datetime] = []
        self.steps = list(steps)
        self.harness: Harness | None = None

    @property
    def work(self) -> Any:
        async def work(agent: Any, task: Any, *args: Any) -> Any:
            self.seen.append((task.key, task.attempt))
            if self.harness is not None:
                self.times.append(self.harness.now)
            step = self.steps.pop(0) if len(self.steps) > 1 else self.steps[0]
            if isinstance(step, BaseException):
                raise step
            return await step(task) if callable(step) else step

        return work


async def forever(task: Any) -> None:
    await asyncio.Event().wait()


# -- submitting --------------------------------------------------------------------------------------


async def test_every_hook_submits_and_each_result_comes_to_on_task() -> None:
    class Everywhere(AgentBase):
        name = "everywhere"
        priority = EVERY
        subscriptions = ("ping",)

        async def on_start(self, context: StateContext) -> None:
            context.submit(self.note, "start", key="start")

        async def on_tick(self, context: StateContext) -> None:
            if context.iteration == 1:
                context.submit(self.note, "tick", key="tick")
                raise ValueError("so this one is not submitted, but that of on_error is")
            context.submit(self.note, "later tick", key="later tick")

        async def on_event(self, event: Event, context: StateContext) -> None:
            context.submit(self.note, "event", key="event")

        async def on_error(self, error: Exception, context: StateContext) -> None:
            context.submit(self.note, "error", key="error")

        async def on_task(self, task: Task, context: StateContext) -> None:
            context.set("got", sorted([*context.get("got", []), task.result]))
            if task.key == "start":
                context.submit(self.note, "task", key="task")

        async def on_shutdown(self, context: StateContext) -> None:
            context.submit(self.note, "shutdown", key="shutdown")

        async def note(self, task: Any, where: str) -> str:
            return f"from {where}"

    async with loop_of([Everywhere()]) as h:
        h.emit("ping")
        await h.advance("1 hour")
        before = h.state["got"]
        await h.restart()
        await h.advance(1)

        expected = [f"from {where}" for where in ("error", "event", "later tick", "start", "task")]
        assert before == expected
        assert h.state["got"] == sorted([*expected, "from shutdown"])


async def test_task_starts_only_after_the_commit_of_its_unit(path: Path) -> None:
    """What the function sees in the database, by a connection of its own, includes what its unit wrote."""

    async def event(event: Event, context: StateContext) -> None:
        context.set("written", "with the submission")
        submitted.append(context.submit(one.work, key="k"))  # type: ignore[attr-defined]
        assert submitted[0].id is None

    async def work(self: Any, task: Any) -> Any:
        seen.append(rows(path, "SELECT value FROM v_state WHERE key = 'written'"))
        seen.append(rows(path, "SELECT status, attempts FROM v_tasks WHERE id = ?", task.id))

    submitted: list[Task] = []
    seen: list[Any] = []
    one = worker(work, hooks={"on_event": lambda self, *both: event(*both)})
    controller = controller_on(path, one)
    async with running(controller):
        controller.event_bus.emit("go", "test")
        await until(lambda: controller.state_context.get("applied k"))

    assert seen == [['"with the submission"'], [("running", 1)]]
    assert submitted[0].id == 1


async def test_unit_that_fails_submits_nothing() -> None:
    runs = Runs("never")

    async def event(self: Any, event: Event, context: StateContext) -> None:
        context.set("never", 1)
        tried.append(context.submit(self.work, key="k"))
        raise ValueError("not so")

    tried: list[Task] = []
    async with loop_of([worker(runs.work, hooks={"on_event": event})]) as h:
        h.emit("go")
        await h.advance("1 hour")

        assert len(tried) == 5
        assert {item.id for item in tried} == {None}
        assert runs.seen == []
        assert h.sql("SELECT * FROM tasks") == []


async def test_unit_that_is_discarded_for_a_conflict_submits_once_when_it_succeeds(path: Path) -> None:
    """Its first try never happened, so there is one task for two calls of the hook."""

    async def event(self: Any, event: Event, context: StateContext) -> None:
        calls.append(context.submit(self.work, len(calls)))
        before = context.get("n", 0)
        if len(calls) == 1:
            begun.set()
            await goes_on.wait()
        context.set("n", before + 1)

    calls: list[Task] = []
    begun, goes_on = asyncio.Event(), asyncio.Event()
    one = worker(double, hooks={"on_event": event}, attributes={"background": True})
    controller = controller_on(path, one)
    async with running(controller):
        controller.event_bus.emit("go", "test")
        await begun.wait()
        controller.state_context.set("n", 10)
        await iterations_of(controller, 2)
        goes_on.set()
        await until(lambda: rows(path, "SELECT status FROM v_tasks") == ["done"])

    assert [(item.id, item.args) for item in calls] == [(None, [0]), (1, [1])]
    assert rows(path, "SELECT outcome FROM v_ticks WHERE kind = 'event'") == ["conflict", "success"]


async def test_transact_submits(path: Path) -> None:
    async def submit(context: StateContext) -> Task:
        return context.submit(work, 21, key="k")

    async def fail(context: StateContext) -> None:
        context.submit(work, 1, key="other")
        raise ValueError("no")

    one = worker(double)
    work: Any = one.work  # type: ignore[attr-defined]
    controller = controller_on(path, one)
    async with running(controller):
        assert (await controller.transact(submit)).id == 1
        with pytest.raises(ValueError, match="no"):
            await controller.transact(fail)
        await until(lambda: controller.state_context.get("applied k"))

    assert rows(path, "SELECT key, result FROM v_tasks") == [("k", "42")]


async def test_client_submits_through_a_running_loop_and_by_itself(path: Path) -> None:
    one = worker(double)
    async with running(controller_on(path, one)) as controller:
        async with connect(path) as client:
            first = await client.submit("work", 1, agent="worker", key="live")
            assert await client.submit("work", 1, agent="worker", key="live") == first
            await until(lambda: controller.state_context.get("applied live"))
    with connect(path) as client:
        second = client.submit("work", 2, agent="worker", key="offline")
        third = client.submit(nobodys, 3, key="nobody's")
        assert client.submit("work", 9, agent="worker", key="live") == first
        assert client.submit("work", 9, agent="worker", key="offline") == second
    assert rows(path, TASK, "offline") == [("waiting", 0)]
    async with running(controller_on(path, worker(double))) as controller:
        await until(lambda: rows(path, "SELECT count(*) FROM v_tasks WHERE status = 'done'") == [3])
        await until(lambda: controller.state_context.get("applied offline"))

    assert [first, second, third] == [1, 2, 3]
    assert rows(path, "SELECT result FROM v_tasks ORDER BY id") == ["2", "4", "4"]
    assert rows(path, "SELECT value FROM v_state WHERE key LIKE 'applied%'") == ["1", "1"]


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (lambda one: (lambda task: 1,), InvalidTask, "lambda"),
        (lambda one: (functools.partial(one.work, 1),), InvalidTask, "partial"),
        (lambda one: (closure(),), InvalidTask, "inside"),
        (lambda one: (3,), (InvalidTask, TypeError), "no function"),
        (lambda one: (one.work, {1, 2}), InvalidValueType, "set"),
        (lambda one: (one.work, {"deep": [object()]}), InvalidValueType, "deep"),
    ],
    ids=["lambda", "partial", "closure", "number", "set as argument", "object inside an argument"],
)
async def test_what_a_restart_could_not_find_or_store_is_refused_with_the_reason(
    arguments: Any, error: Any, words: str
) -> None:
    def event(self: Any, event: Event, context: StateContext) -> None:
        context.submit(*arguments(self))

    result = await run_tick(worker(double, hooks={"on_event": event}), inbox=[Event("go", "test")])

    assert isinstance(result.error, error)
    assert words in str(result.error)
    assert result.tasks == []


def closure() -> Any:
    number = 1

    def inner(task: Any) -> int:
        return number

    return inner


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"priority": 11}, "priority"),
        ({"key": ""}, "key"),
        ({"after": "soon"}, "soon"),
        ({"after": float("nan")}, "nan"),
        ({"limit": 4}, "limit"),
    ],
)
async def test_impossible_option_is_refused_by_name(options: dict[str, Any], words: str) -> None:
    def event(self: Any, event: Event, context: StateContext) -> None:
        context.submit(self.work, 1, **options)

    result = await run_tick(worker(double, hooks={"on_event": event}), inbox=[Event("go", "test")])

    assert isinstance(result.error, (UsageError, ValueError, TypeError))
    assert words in str(result.error)


# -- the result --------------------------------------------------------------------------------------


async def test_result_comes_to_on_task_once_with_all_that_is_known(path: Path) -> None:
    async def work(self: Any, task: Any, a: Any, b: Any) -> Any:
        task.cost(0.1)
        task.cost("0.2")
        return {"sum": [a, b, None, "č"]}

    async def on_task(self: Any, task: Task, context: StateContext) -> None:
        assert (task.id, task.name, task.key, task.args) == (1, "work", "k", [1, {"x": 2}])
        assert (task.status, task.error, task.attempts, task.priority, task.limit) == ("done", None, 1, 7, None)
        assert float(task.cost_usd or 0) == 0.3
        assert task.created_at <= task.ended_at  # type: ignore[operator]
        assert not task.is_question
        context.increment("times")
        context.set("result", task.result)
        context.emit("taken_up")

    async with loop_of([worker(work, hooks={"on_task": on_task})], store=path) as h:
        h.emit("go", go(1, {"x": 2}, priority=7))
        await h.advance()
        await h.crash()
        await h.advance("2 days")
        await h.restart()
        await h.advance("2 days")
        h.check()

        assert h.state["times"] == 1
        assert h.state["result"] == {"sum": [1, {"x": 2}, None, "č"]}
        (unit,) = h.sql("SELECT agent, outcome, iteration FROM v_ticks WHERE kind = 'task'")
        assert (unit["agent"], unit["outcome"]) == ("worker", "success")
        assert h.events("taken_up")[0].iteration == unit["iteration"]
        (row,) = h.sql("SELECT * FROM v_tasks")
        assert (row["args"], row["result"]) == ('[1,{"x":2}]', '{"sum":[1,{"x":2},null,"č"]}')
        assert (row["cost_usd"], row["created_at"]) == (0.3, "2026-01-01T00:00:00.000000Z")


async def test_without_the_hook_the_result_is_an_event_once() -> None:
    async with loop_of([worker(double, hooks={"on_task": None})]) as h:
        h.emit("go", go(4))
        await h.advance()
        await h.restart()
        await h.advance("1 day")

        (event,) = h.events("task_finished")
        assert event.data["key"] == "k"
        assert event.data["status"] == "done"
        assert event.data["result"] == 8
        assert rows(h.path, "SELECT count(*) FROM tasks WHERE applied_us IS NULL") == [0]


async def test_on_task_that_raises_gets_the_stored_result_again_and_the_task_does_not_run_again() -> None:
    runs = Runs("paid for")
    got: list[Any] = []

    async def on_task(self: Any, task: Task, context: StateContext) -> None:
        got.append(task.result)
        context.increment("effect")
        if len(got) < 3:
            raise ValueError("not yet")

    one = worker(runs.work, hooks={"on_task": on_task})
    async with loop_of([one]) as h:
        h.emit("go", go())
        await h.advance()
        assert got == ["paid for"]
        assert "effect" not in h.state
        await h.crash()
        await h.advance("1 hour")

        assert got == ["paid for"] * 3
        assert runs.seen == [("k", 1)]
        assert h.state["effect"] == 1
        assert first_lines(h.failures) != []


async def test_result_that_on_task_never_takes_is_kept_for_a_person_and_can_be_handed_out_again(path: Path) -> None:
    runs = Runs("paid for")
    broken = True

    async def on_task(self: Any, task: Task, context: StateContext) -> None:
        if broken:
            raise ValueError("a bug")
        context.set("got", task.result)

    async with loop_of([worker(runs.work, hooks={"on_task": on_task})], store=path) as h:
        h.emit("go", go())
        await h.advance("1 day")
        problems = h.sql("SELECT kind, detail FROM v_problems WHERE kind = 'unapplied_result'")
        assert len(problems) == 1
        assert "a bug" in problems[0]["detail"]
        broken = False
        await h.stop()
        assert main(["tasks", "retry", "1", "--db", str(path)]) == 0
        await h.advance("2 hours")

        assert h.state["got"] == "paid for"
        assert runs.seen == [("k", 1)]
        assert h.sql("SELECT kind FROM v_problems WHERE kind = 'unapplied_result'") == []


async def test_conflict_in_on_task_never_runs_the_task_again(path: Path) -> None:
    runs = Runs(5)

    async def on_task(self: Any, task: Task, context: StateContext) -> None:
        got.append(task.result)
        before = context.get("sum", 0)
        if len(got) == 1:
            begun.set()
            await goes_on.wait()
        context.set("sum", before + task.result)

    got: list[Any] = []
    begun, goes_on = asyncio.Event(), asyncio.Event()
    controller = controller_on(path, worker(runs.work, hooks={"on_task": on_task}, attributes={"background": True}))
    async with running(controller):
        controller.event_bus.emit("go", "test", go())
        await begun.wait()
        controller.state_context.set("sum", 100)
        await iterations_of(controller, 2)
        goes_on.set()
        await until(lambda: controller.state_context.get("sum") == 105)

    assert got == [5, 5]
    assert runs.seen == [("k", 1)]
    assert rows(path, "SELECT outcome FROM v_ticks WHERE kind = 'task'") == ["conflict", "success"]


@pytest.mark.parametrize(
    "value", [{1, 2}, object(), float("nan"), {1: "x"}, (1, 2), b"x", 2**70], ids=lambda value: type(value).__name__
)
async def test_result_that_is_no_json_fails_the_task_and_says_where(value: Any) -> None:
    runs = Runs({"deep": value})
    async with loop_of([worker(runs.work)]) as h:
        h.emit("go", go())
        await h.advance("1 hour")

        end = h.state["end k"]
        assert (end["status"], end["result"], h.state["applied k"]) == ("failed", None, 1)
        assert "deep" in end["error"]
        assert runs.seen == [("k", 1)], "it would be no JSON the next time either, and is paid for each time"


async def test_progress_of_nonsense_and_cost_of_nonsense_are_refused() -> None:
    attempt = task_attempt("think", 1, key="k", attempt=2)

    for wrong in (-1, "a lot", float("nan")):
        with pytest.raises((ValueError, TypeError, UsageError)):
            attempt.cost(wrong)
    for fraction in (-0.1, 1.1, float("nan")):
        with pytest.raises((ValueError, UsageError)):
            attempt.progress(fraction)
    attempt.progress(None, "who knows")
    attempt.progress(1, "")
    attempt.cost(0.1)
    attempt.cost("0.2")

    assert (attempt.key, attempt.attempt, attempt.cancelled, attempt.args) == ("k", 2, False, [1])
    assert str(attempt.cost_usd) == "0.3"


# -- how it runs -------------------------------------------------------------------------------------


async def test_async_functions_run_beside_the_loop_and_plain_ones_in_threads_at_the_same_time(path: Path) -> None:
    """Both wait for each other, while the loop goes on."""
    arrived, may_go = threading.Event(), asyncio.Event()

    class Two(AgentBase):
        name = "two"
        priority = EVERY

        async def on_start(self, context: StateContext) -> None:
            context.submit(self.inside)
            context.submit(self.outside)

        async def on_tick(self, context: StateContext) -> None:
            context.increment("ticks")

        async def on_task(self, task: Task, context: StateContext) -> None:
            context.set(task.name, task.result)

        async def inside(self, task: Any) -> Any:
            await may_go.wait()
            return threading.current_thread() is main_thread

        def outside(self, task: Any) -> Any:
            arrived.set()
            loop.call_soon_threadsafe(may_go.set)
            return threading.current_thread() is main_thread

    main_thread, loop = threading.current_thread(), asyncio.get_running_loop()
    controller = controller_on(path, Two())
    async with running(controller):
        await until(lambda: controller.state_context.has("inside") and controller.state_context.has("outside"))
        state = controller.state_context.get_all()
        assert state["ticks"] > 0

    assert arrived.is_set()
    assert (state["inside"], state["outside"]) == (True, False)


JOBS = """
import os, signal
from ael_store import AgentBase, Fatal, task

@task(process=True, attempts=1)
def where(task, number):
    task.cost(0.5)
    return {"pid": os.getpid(), "twice": number * 2, "key": task.key}

@task(process=True, attempts=1)
def unlucky(task):
    raise ValueError("in a process")

@task(process=True, attempts=2, backoff=0.01)
def deadly(task):
    os.kill(os.getpid(), signal.SIGKILL)
"""


async def test_process_task_runs_in_a_process_of_its_own_and_its_death_is_a_failed_attempt(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "jobs_of_semantics.py").write_text(JOBS)
    monkeypatch.syspath_prepend(tmp_path)
    controller = controller_on(path)
    async with running(controller):
        with connect(path) as client:
            names = ("where", "unlucky", "deadly")
            await asyncio.to_thread(client.submit, "jobs_of_semantics:where", 21, key="where")
            for name in names[1:]:
                await asyncio.to_thread(client.submit, f"jobs_of_semantics:{name}", key=name)
        await until(lambda: len(rows(path, "SELECT id FROM v_events WHERE type = 'task_finished'")) == 3)

    found = {
        key: (status, result, error)
        for key, status, result, error in rows(path, "SELECT key, status, result, error FROM v_tasks")
    }
    result = json.loads(found["where"][1])
    assert (result["twice"], result["key"]) == (42, "where")
    assert result["pid"] != os.getpid()
    assert rows(path, "SELECT cost_usd FROM v_tasks WHERE key = 'where'") == [0.5]
    assert found["unlucky"][::2] == ("failed", "ValueError: in a process")
    assert found["deadly"][0] == "failed"
    assert rows(path, "SELECT attempts FROM v_tasks WHERE key = 'deadly'") == [2]


async def test_higher_priority_starts_first_and_equal_ones_in_order_of_submission() -> None:
    order: list[str] = []

    async def work(self: Any, task: Any) -> None:
        order.append(task.key)

    async with loop_of([worker(work)], settings=Settings(tasks_at_once=1)) as h:
        for key, priority in (("low", 1), ("five", 5), ("five too", 5), ("high", 9)):
            h.emit("go", go(key=key, priority=priority, after=10))
        await h.advance(20)

    assert order == ["high", "five", "five too", "low"]


async def test_after_is_seconds_text_or_a_time_and_holds_over_a_restart_and_a_crash() -> None:
    runs = Runs(None)

    class Late(AgentBase):
        name = "late"

        async def on_start(self, context: StateContext) -> None:
            context.submit(self.work, key="seconds", after=600)
            context.submit(self.work, key="text", after="30m")
            context.submit(self.work, key="delta", after=timedelta(hours=1))
            context.submit(self.work, key="time", after=START + timedelta(hours=2))
            context.submit(self.work, key="past", after=START - timedelta(hours=2))

        async def work(self, task: Any) -> None:
            runs.seen.append((task.key, int((h.now - START).total_seconds())))

    async with loop_of([Late()]) as h:
        await h.advance("20m")
        await h.restart()
        await h.advance("20m")
        await h.crash()
        await h.advance("3h")

    assert runs.seen == [("past", 0), ("seconds", 600), ("text", 1800), ("delta", 3600), ("time", 7200)]


# -- keys --------------------------------------------------------------------------------------------


async def test_same_key_is_the_same_task_while_it_runs_when_it_has_ended_and_after_a_restart() -> None:
    runs = Runs("first")
    async with loop_of([worker(runs.work)]) as h:
        h.emit("go", go(key="later", after=60))
        h.emit("go", go(key="later"))
        h.emit("go", go(1))
        h.emit("go", go(2))
        await h.advance("1 hour")
        h.emit("go", go(3))
        await h.advance("30 days")
        h.emit("go", go(4))
        await h.advance("1 hour")
        await h.restart()
        h.emit("go", go(5))
        await h.advance("1 hour")
        await h.crash()
        h.emit("go", go(6))
        await h.advance("1 hour")

        assert sorted(runs.seen) == [("k", 1), ("later", 1)]
        assert h.state["applied k"] == h.state["applied later"] == 1
        assert [row["args"] for row in h.sql("SELECT args FROM v_tasks WHERE key = 'k'")] == ["[1]"]


async def test_same_key_twice_in_one_unit_is_one_task_and_without_keys_there_are_two() -> None:
    async def event(self: Any, event: Event, context: StateContext) -> None:
        made.extend([context.submit(self.work, 1, key="k"), context.submit(self.work, 2, key="k")])
        made.extend([context.submit(self.work, 3), context.submit(self.work, 3)])

    made: list[Task] = []
    async with loop_of([worker(double, hooks={"on_event": event})]) as h:
        h.emit("go")
        await h.advance(1)

        assert [row["args"] for row in h.sql("SELECT args FROM v_tasks ORDER BY id")] == ["[1]", "[3]", "[3]"]
        assert h.state["applied k"] == 1
        assert len({item.key for item in made}) == 3
        assert made[0].id is not None


async def test_key_is_the_same_at_every_attempt_over_failures_crashes_and_stops(path: Path) -> None:
    runs = Runs(ValueError("no"), forever, forever, RetryAfter(5), "done")
    harness = loop_of([worker(runs.work, backoff=1)], store=path, patience=0.2, settings=Settings(grace=0.1))
    async with harness as h:
        h.emit("go", {"args": []})
        await h.advance(5)
        await h.crash()
        await h.advance(5)
        await h.stop()
        await h.advance(60)

        keys = {key for key, attempt in runs.seen}
        assert [attempt for key, attempt in runs.seen] == [1, 2, 3, 4, 5]
        assert len(keys) == 1
        assert h.state[f"end {keys.pop()}"]["result"] == "done"
        outcomes = [row["outcome"] for row in h.sql(OUTCOMES)]
        assert outcomes == ["failed", "interrupted", "interrupted", "postponed", "done"]


# -- failing -----------------------------------------------------------------------------------------


async def test_task_that_fails_is_tried_again_with_growing_pauses_and_then_on_task_gets_it_failed() -> None:
    runs = Runs(ConnectionError("refused"))
    async with loop_of([worker(runs.work, attempts=12, backoff=2)]) as h:
        runs.harness = h
        h.emit("go", go())
        await h.advance("3 hours")

        assert len(runs.seen) == 12
        assert h.state["end k"] == {"status": "failed", "result": None, "error": "ConnectionError: refused"}
        assert h.state["applied k"] == 1
        pauses = [(later - earlier).total_seconds() for earlier, later in pairwise(runs.times)]
        for number, pause in enumerate(pauses):
            full = min(2.0 * 2**number, 300.0)
            assert full / 2 <= pause <= min(full * 1.5, 300.0)
        assert len({round(pause / min(2.0 * 2**number, 300.0), 3) for number, pause in enumerate(pauses)}) > 3, "jitter"
        assert h.failures == []


async def test_number_of_attempts_is_the_setting_unless_the_task_says_its_own() -> None:
    one, other = Runs(ValueError("x")), Runs(ValueError("x"))
    agents = [worker(one.work, "one"), worker(other.work, "other", attempts=1)]
    async with loop_of(agents, settings=Settings(task_attempts=3)) as h:
        h.emit("go", {})
        await h.advance("1 hour")

        assert (len(one.seen), len(other.seen)) == (3, 1)


async def test_task_that_raises_fatal_is_not_tried_again() -> None:
    runs = Runs(Fatal("no such account"))
    async with loop_of([worker(runs.work, attempts=5)]) as h:
        h.emit("go", go())
        await h.advance("1 hour")

        assert runs.seen == [("k", 1)]
        assert h.state["end k"]["status"] == "failed"
        assert "no such account" in h.state["end k"]["error"]


async def test_retry_after_waits_as_long_as_it_says_and_uses_up_no_attempt() -> None:
    runs = Runs(RetryAfter(60), RetryAfter("5m"), RetryAfter(timedelta(hours=1).total_seconds(), "busy"), "at last")
    async with loop_of([worker(runs.work, attempts=1)]) as h:
        runs.harness = h
        h.emit("go", go())
        await h.advance("2 hours")

        pauses = [(later - earlier).total_seconds() for earlier, later in pairwise(runs.times)]
        assert pauses == [pytest.approx(expected, rel=0.1) for expected in (60, 300, 3600)]
        assert all(pause >= said for pause, said in zip(pauses, (60, 300, 3600), strict=True))
        assert h.state["end k"] == {"status": "done", "result": "at last", "error": None}


async def test_cost_of_failed_attempts_adds_up() -> None:
    async def work(self: Any, task: Any) -> str:
        task.cost("0.1")
        if task.attempt < 3:
            raise ValueError("paid for nothing")
        return str(task.cost_usd)

    async with loop_of([worker(work)]) as h:
        h.emit("go", go())
        await h.advance(60)

        assert h.state["end k"]["result"] == "0.3"
        assert h.sql("SELECT cost_usd FROM v_tasks") == [{"cost_usd": 0.3}]
        assert [row["cost_usd"] for row in h.sql("SELECT cost_usd FROM task_attempts")] == ["0.1"] * 3


@pytest.mark.parametrize("kind", ["async", "async that swallows its cancellation", "thread"])
async def test_attempt_that_takes_too_long_is_a_timeout_and_harms_nobody(path: Path, kind: str) -> None:
    released = threading.Event()
    aware: list[bool] = []

    async def asleep(self: Any, task: Any) -> None:
        if task.key == "slow":
            await asyncio.Event().wait()

    async def stubborn(self: Any, task: Any) -> None:
        while task.key == "slow" and not released.is_set():
            try:
                await asyncio.sleep(0.01)
            except asyncio.CancelledError:
                aware.append(task.cancelled)

    def hung(self: Any, task: Any) -> None:
        if task.key == "slow":
            released.wait(60)
            aware.append(task.cancelled)

    work = {"async": asleep, "async that swallows its cancellation": stubborn, "thread": hung}[kind]
    controller = controller_on(path, worker(work, timeout=0.05, attempts=1), grace=0.2)
    try:
        async with running(controller):
            controller.event_bus.emit("go", "test", go(key="slow"))
            await until(lambda: controller.state_context.get("end slow"), "the slow one has failed")
            controller.event_bus.emit("go", "test", go(key="quick"))
            await until(lambda: controller.state_context.get("end quick"), "the quick one is done")
            end = controller.state_context.get("end slow")
    finally:
        released.set()

    assert end["status"] == "failed"
    assert "0.05" in end["error"]
    assert rows(path, OUTCOMES) == ["timeout", "done"]
    if kind != "async":
        await until(lambda: aware)
        assert set(aware) == {True}
    assert rows(path, "SELECT status FROM v_runs") == ["stopped"]


async def test_late_result_of_an_attempt_that_timed_out_is_not_taken(path: Path) -> None:
    released, returned = threading.Event(), threading.Event()

    def work(self: Any, task: Any) -> str:
        if task.attempt == 1:
            released.wait(60)
            returned.set()
            return "too late"
        return "in time"

    controller = controller_on(path, worker(work, timeout=0.1, attempts=2, backoff=0.01))
    try:
        async with running(controller):
            controller.event_bus.emit("go", "test", go())
            await until(lambda: rows(path, OUTCOMES)[:1] == ["timeout"])
            released.set()
            await until(returned.is_set)
            await until(lambda: controller.state_context.get("end k"))
            await iterations_of(controller, 3)
            end = controller.state_context.get("end k")
    finally:
        released.set()

    assert (end["result"], rows(path, OUTCOMES)) == ("in time", ["timeout", "done"])
    assert rows(path, "SELECT value FROM v_state WHERE key = 'applied k'") == ["1"]


# -- cancelling --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["async", "thread"])
async def test_cancelled_task_is_told_so_and_comes_to_on_task_as_cancelled(path: Path, kind: str) -> None:
    begun, told = threading.Event(), threading.Event()

    async def beside(self: Any, task: Any) -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            told.set()

    def in_thread(self: Any, task: Any) -> str:
        begun.set()
        for _ in range(6000):
            if task.cancelled:
                told.set()
                return "half"
            told.wait(0.01)
        raise AssertionError("it was not told")

    controller = controller_on(path, worker(beside if kind == "async" else in_thread))
    async with running(controller):
        controller.event_bus.emit("go", "test", go())
        await until(begun.is_set)
        assert rows(path, TASK, "k") == [("running", 1)]
        assert await asyncio.to_thread(main, ["tasks", "cancel", "1", "--db", str(path)]) == 0
        await until(lambda: controller.state_context.get("end k"))
        end = controller.state_context.get("end k")

    await until(told.is_set, "it is told, also where that is a moment after its agent is")
    assert (end["status"], end["result"]) == ("cancelled", None)
    assert rows(path, TASK, "k") == [("cancelled", 1)]
    assert rows(path, "SELECT value FROM v_state WHERE key = 'applied k'") == ["1"]


# -- reconcile ---------------------------------------------------------------------------------------


async def test_reconcile_is_asked_before_every_attempt_but_the_first_and_its_answer_is_the_result() -> None:
    asked: list[Any] = []
    answers: list[Any] = [None, False, {"sent": "m-1"}]

    def has_happened(key: str) -> Any:
        asked.append((key, len(runs.seen)))
        return answers.pop(0)

    runs = Runs(ConnectionError("lost"))
    async with loop_of([worker(runs.work, reconcile=has_happened, attempts=9)]) as h:
        h.emit("go", go())
        await h.advance("1 hour")

        assert runs.seen == [("k", 1), ("k", 2), ("k", 3)]
        assert asked == [("k", 1), ("k", 2), ("k", 3)]
        assert h.state["end k"] == {"status": "done", "result": {"sent": "m-1"}, "error": None}


async def test_reconcile_is_asked_after_a_crash_so_what_happened_is_not_done_twice() -> None:
    sent: list[str] = []

    async def find(key: str) -> Any:
        return sent.count(key) or None

    async def send(self: Any, task: Any) -> int:
        sent.append(task.key)
        await h.crash()
        return 0

    async with loop_of([worker(send, reconcile=find)], patience=0.5) as h:
        h.emit("go", go())
        await h.advance()
        await h.advance(60)

        assert sent == ["k"]
        assert h.state["end k"]["result"] == 1


async def test_reconcile_that_fails_is_a_failed_attempt_and_the_task_does_not_run_unasked() -> None:
    def unreachable(key: str) -> Any:
        raise ConnectionError("who knows")

    runs = Runs(ConnectionError("lost"))
    async with loop_of([worker(runs.work, reconcile=unreachable, attempts=3)]) as h:
        h.emit("go", go())
        await h.advance("1 hour")

        assert runs.seen == [("k", 1)]
        assert h.state["end k"]["status"] == "failed"
        assert "who knows" in h.state["end k"]["error"]


# -- when it waits -----------------------------------------------------------------------------------


async def test_task_of_a_disabled_agent_waits_until_it_is_enabled(path: Path) -> None:
    runs = Runs("done")
    async with loop_of([worker(runs.work)], store=path) as h:
        await h.stop()
        with connect(path) as client:
            client.submit("work", agent="worker", key="k")
        main(["agents", "disable", "worker", "--db", str(path)])
        await h.advance("1 day")
        assert (runs.seen, h.sql("SELECT status FROM v_tasks")) == ([], [{"status": "waiting"}])
        await h.stop()
        main(["agents", "enable", "worker", "--db", str(path)])
        await h.advance(1)

        assert (runs.seen, h.state["end k"]["result"]) == ([("k", 1)], "done")


async def test_task_and_result_of_an_absent_agent_wait_until_it_is_back() -> None:
    runs = Runs("done")
    async with loop_of([worker(runs.work)]) as h:
        h.emit("go", go(after=60))
        await h.advance(1)
        await h.restart(agents=[agent("other")])
        await h.advance("1 day")
        assert (runs.seen, h.sql("SELECT status, attempts FROM v_tasks")) == (
            [],
            [{"status": "waiting", "attempts": 0}],
        )
        await h.restart(agents=[worker(runs.work)])
        await h.advance(1)

        assert (runs.seen, h.state["applied k"]) == ([("k", 1)], 1)


async def test_missing_function_holds_the_task_and_it_goes_on_when_the_code_is_back(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = Runs("done")
    async with loop_of([worker(runs.work)], store=path) as h:
        h.emit("go", go(after=60))
        await h.advance(1)
        await h.stop()
        with connect(path) as client:
            client.submit("jobs_that_come_later:add", 1, key="module")
        await h.restart(agents=[worker(None)])
        await h.advance("1 day")
        held = h.sql("SELECT key, status, attempts FROM v_tasks ORDER BY key")
        problems = h.sql("SELECT subject, detail FROM v_problems WHERE kind = 'held_tasks'")
        (tmp_path / "jobs_that_come_later.py").write_text("def add(task, number):\n    return number + 1\n")
        monkeypatch.syspath_prepend(tmp_path)
        await h.restart(agents=[worker(runs.work)])
        await h.advance("1 hour")

        assert held == [
            {"key": "k", "status": "held", "attempts": 0},
            {"key": "module", "status": "held", "attempts": 0},
        ]
        assert any("work" in problem["subject"] for problem in problems)
        assert any("jobs_that_come_later" in problem["subject"] for problem in problems)
        assert (runs.seen, h.state["applied k"]) == ([("k", 1)], 1)
        assert h.sql("SELECT result FROM v_tasks WHERE key = 'module'") == [{"result": "2"}]


async def test_agents_and_tasks_that_beget_each_other_end_at_the_hop_limit() -> None:
    runs = Runs(1)

    async def on_task(self: Any, task: Task, context: StateContext) -> None:
        context.increment("results")
        context.emit("go", {})

    async with loop_of([worker(runs.work, hooks={"on_task": on_task})], settings=Settings(hop_limit=6)) as h:
        h.emit("go", {})
        await h.advance("1 day")

        assert 2 <= len(runs.seen) <= 6
        assert h.state["results"] == len(runs.seen)


async def test_task_that_begets_a_task_directly_ends_at_the_hop_limit() -> None:
    runs = Runs(1)

    async def on_task(self: Any, task: Task, context: StateContext) -> None:
        context.submit(self.work)

    async with loop_of([worker(runs.work, hooks={"on_task": on_task})], settings=Settings(hop_limit=6)) as h:
        h.emit("go", {})
        await h.advance("1 day")

        assert 2 <= len(runs.seen) <= 7
        words = json.dumps(h.sql("SELECT status, error FROM v_tasks") + h.sql("SELECT detail, subject FROM v_problems"))
        assert "hop" in words, "a chain that was cut says so where a person looks"


async def test_paused_loop_starts_no_task_until_it_is_resumed(path: Path) -> None:
    runs = Runs("done")
    controller = controller_on(path, worker(runs.work))
    async with running(controller):
        assert await asyncio.to_thread(main, ["pause", "--db", str(path)]) == 0
        async with connect(path) as client:
            await client.submit("work", agent="worker", key="k")
            await client.set("after", 1)
        assert (runs.seen, rows(path, TASK, "k")) == ([], [("waiting", 0)])
        assert await asyncio.to_thread(main, ["resume", "--db", str(path)]) == 0
        await until(lambda: controller.state_context.get("applied k"))

    assert runs.seen == [("k", 1)]


# -- ends of the process -----------------------------------------------------------------------------


async def test_stop_cuts_off_what_runs_and_the_next_start_runs_it_again_with_the_same_key(path: Path) -> None:
    runs = Runs(forever, "done")
    controller = controller_on(path, worker(runs.work, attempts=1), grace=0.1)
    async with running(controller):
        controller.event_bus.emit("go", "test", go())
        await until(lambda: runs.seen)
    stopped = rows(path, TASK, "k"), rows(path, "SELECT status FROM v_runs"), rows(path, OUTCOMES)
    again = controller_on(path, worker(runs.work, attempts=1))
    async with running(again):
        await until(lambda: again.state_context.get("applied k"))

    assert stopped == ([("waiting", 1)], ["stopped"], ["interrupted"])
    assert runs.seen == [("k", 1), ("k", 2)]
    assert rows(path, "SELECT result FROM v_tasks") == ['"done"']


async def test_task_that_ends_within_the_grace_period_of_a_stop_is_done(path: Path) -> None:
    async def finish(task: Any) -> str:
        begun.set()
        await stopping.wait()
        return "just in time"

    begun, stopping = asyncio.Event(), asyncio.Event()
    runs = Runs(finish)
    controller = controller_on(
        path, worker(runs.work), agent("last", shutdown=lambda context: loop.call_soon_threadsafe(stopping.set))
    )
    loop = asyncio.get_running_loop()
    async with running(controller):
        controller.event_bus.emit("go", "test", go())
        await begun.wait()
        loop.call_later(0.05, stopping.set)
    async with running(controller_on(path, worker(runs.work))) as again:
        await until(lambda: again.state_context.get("applied k"))

    assert runs.seen == [("k", 1)]
    assert rows(path, OUTCOMES) == ["done"]


async def test_crash_runs_again_what_was_running_and_no_attempt_is_used_up() -> None:
    runs = Runs(forever, forever, forever, "done")
    async with loop_of([worker(runs.work, attempts=1)], patience=0.2) as h:
        h.emit("go", go())
        for _ in range(3):
            await h.advance()
            await h.crash(down="1h")
        await h.advance(60)

        assert runs.seen == [("k", 1), ("k", 2), ("k", 3), ("k", 4)]
        assert h.state["end k"]["result"] == "done"
        assert h.state["applied k"] == 1
        assert [row["outcome"] for row in h.sql(OUTCOMES)] == ["interrupted"] * 3 + ["done"]


async def test_task_in_which_the_process_always_dies_is_held_for_a_person_in_the_end(path: Path) -> None:
    runs = Runs(forever)
    async with loop_of([worker(runs.work)], store=path, patience=0.02) as h:
        h.emit("go", go())
        for _ in range(25):
            await h.advance("10m")
            await h.crash(down="1h")
        await h.advance("1 day")

        assert len(runs.seen) == 20
        assert h.sql("SELECT status FROM v_tasks") == [{"status": "held"}]
        assert [row["kind"] for row in h.sql("SELECT kind FROM v_problems WHERE kind = 'held_tasks'")] == ["held_tasks"]
        runs.steps = ["done"]
        await h.stop()
        assert main(["tasks", "release", "1", "--db", str(path)]) == 0
        await h.advance(60)
        assert h.state["end k"]["result"] == "done"


KILLED = """
import os, pathlib, signal
from ael_store import AgentBase, task

class Payer(AgentBase):
    name = "payer"
    priority = 10

    async def on_start(self, context):
        context.submit(self.pay, key="payment")

    async def on_task(self, task, context):
        context.increment("paid")
        context.set("result", task.result)

    def pay(self, task):
        with open("server", "a") as server:
            server.write(f"{task.key} {task.attempt}\\n")
            server.flush()
            os.fsync(server.fileno())
        if os.environ.get("DEATH"):
            os.kill(os.getpid(), signal.SIGKILL)
        return task.attempt
"""


def test_killed_process_has_its_task_run_again_with_the_same_key(tmp_path: Path, path: Path) -> None:
    (tmp_path / "agents.py").write_text(KILLED)
    for _ in range(2):
        with running_ael(tmp_path, "run", "agents.py", "--tick-rate", "0.01", DEATH="1") as process:
            assert process.wait(60) == -signal.SIGKILL
    with running_ael(tmp_path, "run", "agents.py", "--tick-rate", "0.01") as process:
        wait_for(lambda: rows(path, "SELECT value FROM v_state WHERE key = 'paid'"), process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0

    assert (tmp_path / "server").read_text().splitlines() == ["payment 1", "payment 2", "payment 3"]
    assert rows(path, "SELECT key, value FROM v_state ORDER BY key") == [("paid", "1"), ("result", "3")]
    assert rows(path, OUTCOMES) == ["interrupted", "interrupted", "done"]
    assert main(["db", "verify", "--db", str(path)]) == 0


# -- retention ---------------------------------------------------------------------------------------


async def test_task_goes_with_its_attempts_after_its_days_and_its_key_is_free_again(path: Path) -> None:
    runs = Runs("done")
    waiting = [worker(runs.work)]
    async with loop_of(waiting, store=path, settings=Settings(task_days=2)) as h:
        h.emit("go", go())
        h.emit("go", go(key="far", after="400 days"))
        await h.advance("1 day")
        h.emit("go", go())
        await h.advance("9 days")
        assert main(["db", "verify", "--db", str(path)]) == 0
        left = h.sql("SELECT key FROM v_tasks")
        h.emit("go", go())
        await h.advance("1 hour")

        assert left == [{"key": "far"}]
        assert runs.seen == [("k", 1), ("k", 1)]
        assert len(h.sql("SELECT id FROM task_attempts")) == 1


async def test_clock_set_years_ahead_frees_no_key(path: Path) -> None:
    runs = Runs("done")
    async with loop_of([worker(runs.work)], store=path, settings=Settings(task_days=7)) as h:
        h.emit("go", go())
        await h.advance("1h")
        h.clock._start_us += 20_000 * 86_400_000_000
        await h.advance("15h")
        h.emit("go", go())
        await h.advance("1h")

        assert runs.seen == [("k", 1)]


async def test_numbers_of_tasks_that_are_gone_are_not_given_out_again(path: Path) -> None:
    runs = Runs("done")
    numbers: list[int] = []
    attempts: list[int] = []
    for _ in range(3):
        async with loop_of([worker(runs.work)], store=path, settings=Settings(task_days=1)) as h:
            h.emit("go", go(key=f"one {len(numbers)}"))
            h.emit("go", go(key=f"two {len(numbers)}"))
            await h.advance("1 minute")
            numbers += [row["id"] for row in h.sql("SELECT id FROM v_tasks ORDER BY id")]
            attempts += [row["id"] for row in h.sql("SELECT id FROM task_attempts ORDER BY id")]
            await h.advance("9 days")
            assert h.sql("SELECT id FROM v_tasks") == []

    assert numbers == attempts == [1, 2, 3, 4, 5, 6]
    assert main(["db", "verify", "--db", str(path)]) == 0


# -- testing tools -----------------------------------------------------------------------------------


async def test_run_tick_shows_what_was_submitted_and_hands_results_in() -> None:
    one = worker(double)
    submitted = await run_tick(one, inbox=[Event("go", "test", go(4, priority=8))])
    (made,) = submitted.check().tasks
    taken = await run_tick(one, task={"name": "work", "key": "k", "result": 8})

    assert (made.name, made.key, made.args, made.priority, made.status) == ("work", "k", [4], 8, "waiting")
    assert taken.check().writes == {"applied k": 1, "end k": {"status": "done", "result": 8, "error": None}}


async def test_harness_answers_tasks_in_place_of_their_functions() -> None:
    async def fake(task: Any, number: int) -> Any:
        if task.attempt == 1:
            raise RetryAfter(30)
        return ["fake", number]

    async def unwanted(self: Any, task: Any, number: int) -> None:
        raise AssertionError("this would cost money")

    async with loop_of([worker(unwanted)], tasks={"work": fake}) as h:
        h.emit("go", go(3))
        await h.advance(29)
        assert "end k" not in h.state
        await h.advance(6)
        assert h.state["end k"]["result"] == ["fake", 3]
    async with loop_of([worker(unwanted)], tasks={"work": "just this"}) as h:
        h.emit("go", go(3))
        await h.advance()
        assert h.state["end k"]["result"] == "just this"


async def test_decorated_method_stays_an_ordinary_function() -> None:
    class Thinker(AgentBase):
        name = "thinker"

        @task(attempts=2)
        async def think(self, task: Any, data: int) -> int:
            task.cost(1)
            return data + 1

    attempt = task_attempt()

    assert await Thinker().think(attempt, 1) == 2
    assert attempt.cost_usd == 1

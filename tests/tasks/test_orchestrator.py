"""The face of FAZA 25 over durable tasks; the seed's `TaskAgent` works with one import."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ael_store import AgentBase, Fatal, StateContext, Task, get_agent_manager, get_state_context
from ael_store.contrib.orchestrator import OrchestratorManager, get_orchestrator
from ael_store.errors import InvalidTask
from ael_store.testing import Harness
from tests.loops import controller_on, rows, running, until

calls: list[Any] = []


@pytest.fixture(autouse=True)
def no_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    calls.clear()
    monkeypatch.setattr("ael_store.contrib.orchestrator._manager", None)
    yield


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ael.db"


async def executor(job: Any) -> Any:
    """An executor as FAZA 25's were."""
    calls.append((job.id, job.name, job.priority, job.task_type, job.context))
    return {"got": job.context}


def plain(job: Any) -> str:
    calls.append(job.name)
    return str(job.name)


async def fatal(job: Any) -> None:
    raise Fatal("no")


class TaskAgent(AgentBase):
    """The seed's, but for its import."""

    name = "task_agent"
    priority = 10

    async def on_tick(self, context: StateContext) -> None:
        if context.get("submitted"):
            return
        orchestrator = get_orchestrator()
        task_id = await orchestrator.submit_task(
            name="mail", executor=self.send, priority=7, task_type="mail", context={"to": "a@example.org"}
        )
        context.set("submitted", str(task_id))
        if context.get("fail"):
            raise ValueError("so nothing is submitted")

    async def send(self, job: Any) -> Any:
        return await executor(job)

    async def on_task(self, task: Task, context: StateContext) -> None:
        context.increment("taken up")
        context.set("result", task.result)


async def test_task_agent_of_the_seed_submits_in_its_unit_and_gets_the_result_once() -> None:
    async with Harness([TaskAgent()], tick_rate=3600) as h:
        await h.advance("3h")
        await h.crash()
        await h.advance("3h")

        assert [call[1:] for call in calls] == [("mail", 7, "mail", {"to": "a@example.org"})]
        assert calls[0][0] == h.state["submitted"]
        assert (h.state["taken up"], h.state["result"]) == (1, {"got": {"to": "a@example.org"}})
        assert h.sql("SELECT agent, status, priority FROM v_tasks") == [
            {"agent": "task_agent", "status": "done", "priority": 7}
        ]


async def test_unit_that_fails_submits_nothing() -> None:
    h = Harness([TaskAgent()], tick_rate=3600)
    h.set("fail", True)
    async with h:
        await h.advance("3h")

        assert calls == []
        assert h.sql("SELECT id FROM v_tasks") == []


async def test_ids_are_texts_that_may_be_awaited_and_name_their_task_afterwards(path: Path) -> None:
    controller = controller_on(path)
    orchestrator = OrchestratorManager(context=controller.state_context)
    await orchestrator.start()
    async with running(controller):
        first = orchestrator.submit_task("one", executor, 3, "sum", {"a": 1})
        second = await orchestrator.submit_task("two", plain)
        assert isinstance(first, str)
        assert isinstance(second, str)
        assert first != second
        await until(lambda: (orchestrator.get_task_status(first) or {}).get("status") == "done")
        await until(lambda: (orchestrator.get_task_status(second) or {}).get("status") == "done")
        status = orchestrator.get_task_status(first)
        listed = orchestrator.list_tasks()
        await orchestrator.stop()

    assert status is not None
    assert (status["id"], status["name"], status["priority"], status["task_type"]) == (first, "one", 3, "sum")
    assert [item["id"] for item in listed] == [first, second]
    assert orchestrator.get_task_status("no such task") is None
    assert first in [call[0] for call in calls if isinstance(call, tuple)]
    assert rows(path, "SELECT count(*) FROM v_events WHERE type = 'task_finished'") == [2]


async def test_lists_and_counts_by_the_words_of_the_ancestor(path: Path) -> None:
    controller = controller_on(path)
    orchestrator = OrchestratorManager(context=controller.state_context)
    async with running(controller):
        done = orchestrator.submit_task("good", plain, task_type="a")
        failed = orchestrator.submit_task("bad", fatal, task_type="b")
        await until(lambda: (orchestrator.get_task_status(failed) or {}).get("status") == "error")
        await until(lambda: (orchestrator.get_task_status(done) or {}).get("status") == "done")
        completed = orchestrator.list_tasks(status_filter="done")
        failures = orchestrator.list_tasks(status_filter="failed")
        by_type = orchestrator.list_tasks(task_type_filter="b")
        queue, workers, system = (
            orchestrator.get_queue_status(),
            orchestrator.get_worker_status(),
            orchestrator.get_system_status(),
        )
        kept = orchestrator.clear_completed_tasks(keep_recent=0)

    assert [item["id"] for item in completed] == [done]
    assert [item["id"] for item in by_type] == [item["id"] for item in failures] == [failed]
    assert (queue["queue_size"], workers["active_workers"], system["running"]) == (0, 0, True)
    assert kept == 0
    assert rows(path, "SELECT count(*) FROM v_tasks") == [2]


async def blocker(job: Any) -> None:
    while "go" not in calls:
        await asyncio.sleep(0.001)


async def test_cancel_ends_what_waits_and_says_false_for_what_does_not(path: Path) -> None:
    controller = controller_on(path, tasks_at_once=1)
    orchestrator = OrchestratorManager(context=controller.state_context)

    def status(task_id: str) -> Any:
        return (orchestrator.get_task_status(task_id) or {}).get("status")

    async with running(controller):
        first = orchestrator.submit_task("blocker", blocker)
        await until(lambda: status(first) == "running")
        second = orchestrator.submit_task("good", plain)
        await until(lambda: status(second) == "queued")
        assert orchestrator.get_queue_status()["queue_size"] == 1
        assert orchestrator.get_worker_status()["active_workers"] == 1
        assert await asyncio.to_thread(orchestrator.cancel_task, first) is False
        assert await asyncio.to_thread(orchestrator.cancel_task, "nothing") is False
        assert await asyncio.to_thread(orchestrator.cancel_task, second) is True
        await until(lambda: status(second) == "cancelled")
        calls.append("go")
        await until(lambda: status(first) == "done")
        assert orchestrator.cancel_task(first) is False

    assert calls == ["go"]


async def test_executor_that_a_restart_could_not_find_is_refused(path: Path) -> None:
    controller = controller_on(path)
    orchestrator = OrchestratorManager(context=controller.state_context)
    async with running(controller):
        with pytest.raises(InvalidTask, match="lambda"):
            orchestrator.submit_task("x", lambda job: None)
        with pytest.raises((TypeError, ValueError)):
            orchestrator.submit_task("x", plain, context={"a": object()})
        await controller.transact(lambda context: context.set("after", 1))

    assert rows(path, "SELECT id FROM v_tasks") == []


async def test_mapping_alone_submits_too(path: Path) -> None:
    """The seed says `submit_task(task)`."""
    controller = controller_on(path)
    orchestrator = OrchestratorManager(context=controller.state_context)
    async with running(controller):
        await orchestrator.submit_task({"name": "m", "executor": executor, "priority": 9, "context": {"x": 1}})
        await until(lambda: calls)

    assert calls[0][1:3] == ("m", 9)
    assert calls[0][4] == {"x": 1}


def test_get_orchestrator_is_one_per_process_over_the_singleton_loop() -> None:
    assert get_orchestrator() is get_orchestrator(num_workers=5)
    assert get_agent_manager() is not None
    assert get_state_context() is not None

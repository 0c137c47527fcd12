"""The face of FAZA 25, the ancestor's task orchestrator, over durable tasks.

    from ael_store.contrib.orchestrator import get_orchestrator

    task_id = await get_orchestrator().submit_task("mail", send_mail, context={"to": "a@example.org"})

An executor gets one argument, with `id`, `name`, `priority`, `task_type` and `context`, and what it returns is the
result. It must be something that a restart finds again: a method of an agent, or a function at the top of a module.
In a hook the task belongs to the hook's unit of work; outside hooks it is submitted with the next iteration.
"""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable, Generator, Mapping
from inspect import isawaitable
from typing import Any

import orjson

from ael_store.compat import get_state_context
from ael_store.errors import InvalidTask, LoopNotRunning
from ael_store.runtime.attempt import Attempt
from ael_store.runtime.context import StateContext
from ael_store.runtime.host import Host
from ael_store.runtime.task_function import reference_of, task
from ael_store.store.reader import Reader

__all__ = ["OrchestratedTask", "OrchestratorManager", "TaskId", "get_orchestrator"]

NAME = f"{__name__}:run_executor"
"""The name of its tasks in `v_tasks`."""

STATUSES = {"waiting": "queued", "held": "queued", "running": "running", "done": "done", "failed": "error"}
"""What FAZA 25 calls our statuses; the others are the same."""


class TaskId(str):
    """The id of a task, a text; `await` gives the same, for code that awaited `submit_task`."""

    def __await__(self) -> Generator[Any, None, TaskId]:
        yield from ()
        return self


class OrchestratedTask:
    """What an executor gets."""

    def __init__(self, attempt: Attempt, about: Mapping[str, Any]) -> None:
        self.id: str = attempt.key
        self.name: str = about["name"]
        self.priority: int = attempt.priority
        self.task_type: str = about["task_type"]
        self.context: dict[str, Any] = about["context"]
        self.attempt = attempt
        """The attempt: `progress()`, `cost()`, `cancelled`."""


@task
async def run_executor(attempt: Attempt, executor: str, about: dict[str, Any]) -> Any:
    """Run the executor of a task that was submitted here."""
    assert attempt.resolve is not None
    result = attempt.resolve(executor).call(OrchestratedTask(attempt, about))
    return await result if isawaitable(result) else result


class OrchestratorManager:
    """FAZA 25's orchestrator: its methods, over the tasks of the loop to which `context` belongs.

    `num_workers` is accepted and has no meaning: limits and the setting `tasks_at_once` say how many run.
    """

    def __init__(self, num_workers: int = 3, *, context: StateContext | None = None) -> None:
        self.num_workers = num_workers
        self._context = context

    @property
    def _state(self) -> StateContext:
        return get_state_context() if self._context is None else self._context

    async def start(self) -> None:
        """Do nothing: the loop runs tasks as long as it runs."""

    async def stop(self) -> None:
        """Do nothing: what was submitted stays, and runs when a loop does."""

    # -- submitting --

    def submit_task(
        self,
        name: Any,
        executor: Callable[[OrchestratedTask], Awaitable[Any] | Any] | None = None,
        priority: int = 5,
        task_type: str = "generic",
        context: Mapping[str, Any] | None = None,
    ) -> TaskId:
        """Submit a task and return its id, which may be awaited.

        `name` alone may be a mapping with these fields, or the executor. Raises InvalidTask for an executor that a
        restart could not find again.
        """
        if isinstance(name, Mapping):
            fields = {"priority": priority, "task_type": task_type, "context": context, **name}
            unknown = set(fields) - {"name", "executor", "priority", "task_type", "context"}
            if unknown or "executor" not in fields:
                raise InvalidTask(
                    f"submit_task got a mapping with {sorted(map(str, name))}, wanted are 'name' and 'executor', and "
                    "optionally 'priority', 'task_type', 'context'"
                )
            return self.submit_task(fields.pop("name", "task"), **fields)
        if executor is None and callable(name):
            name, executor = getattr(name, "__name__", "task"), name
        if executor is None:
            raise InvalidTask(f"submit_task got no executor for {name!r}: pass a function of the task")
        reference, agent = reference_of(executor)
        about = {"name": str(name), "task_type": task_type, "context": dict(context or {})}
        submitted = self._state._submit_for(agent, run_executor, reference, about, priority=priority)
        return TaskId(submitted.key)

    def cancel_task(self, task_id: str) -> bool:
        """Cancel a task that has not begun; True if it was there and waited."""
        row = self._row(task_id)
        if row is None or row["status"] not in ("waiting", "held"):
            return False
        host = self._host()
        if host.run is None:
            raise LoopNotRunning("no loop runs here: `ael tasks cancel` cancels tasks of a database without one")
        host.request("tasks.cancel", {"id": row["id"]})
        return True

    # -- looking --

    def get_task_status(self, task_id: str) -> dict[str, Any] | None:
        """Return what is known of a task as of the last commit; None where it is not known."""
        row = self._row(task_id)
        return None if row is None else _shown(row)

    def list_tasks(
        self, status_filter: str | None = None, task_type_filter: str | None = None, limit: int = 1000
    ) -> list[dict[str, Any]]:
        """Return the newest tasks, oldest first; the filters are FAZA 25's words or those of `v_tasks`."""
        found = [_shown(row) for row in self._rows("WHERE name = :name ORDER BY id DESC LIMIT :limit", limit=limit)]
        return [
            shown
            for shown in reversed(found)
            if status_filter in (None, shown["status"], shown["state"])
            and task_type_filter in (None, shown["task_type"])
        ]

    def get_queue_status(self) -> dict[str, Any]:
        """Return how many tasks wait."""
        counts = self._counts()
        return {"queue_size": counts.get("waiting", 0) + counts.get("held", 0), "held": counts.get("held", 0)}

    def get_worker_status(self) -> dict[str, Any]:
        """Return how many tasks run now."""
        return {"total_workers": self.num_workers, "active_workers": self._counts().get("running", 0)}

    def get_system_status(self) -> dict[str, Any]:
        """Return queue, workers, and how many tasks there are of each status."""
        return {
            "running": self._host().run is not None,
            "queue": self.get_queue_status(),
            "workers": self.get_worker_status(),
            "tasks": self._counts(),
        }

    def clear_completed_tasks(self, keep_recent: int = 100) -> int:
        """Return 0: what has ended is history, and `task_days` says how long it is kept."""
        return 0

    # -- the database --

    def _host(self) -> Host:
        host = self._state._host
        if not isinstance(host, Host):
            raise LoopNotRunning("the orchestrator has no loop yet: make a controller with the same state context")
        return host

    def _row(self, task_id: str) -> dict[str, Any] | None:
        rows = self._rows("WHERE key = :key AND name = :name", key=str(task_id))
        return rows[0] if rows else None

    def _counts(self) -> dict[str, int]:
        rows = self._rows("WHERE name = :name GROUP BY status", columns="status, count(*) AS number")
        return {row["status"]: row["number"] for row in rows}

    def _rows(self, where: str, columns: str = "*", **parameters: Any) -> list[dict[str, Any]]:
        path = self._host().store.path
        if not path.exists():
            return []
        reader = Reader(path)
        try:
            return reader.rows(f"SELECT {columns} FROM v_tasks {where}", name=NAME, **parameters)
        finally:
            reader.close()


def _shown(row: Mapping[str, Any]) -> dict[str, Any]:
    _, about = orjson.loads(row["args"])
    return {
        "id": row["key"],
        "name": about["name"],
        "task_type": about["task_type"],
        "context": about["context"],
        "priority": row["priority"],
        "status": STATUSES.get(row["status"], row["status"]),
        "state": row["status"],
        "attempts": row["attempts"],
        "has_result": row["result"] is not None,
        "result": None if row["result"] is None else orjson.loads(row["result"]),
        "error": row["error"],
        "created_at": row["created_at"],
        "started_at": row["started_at"],
        "completed_at": row["ended_at"],
    }


_lock = threading.Lock()
_manager: OrchestratorManager | None = None


def get_orchestrator(num_workers: int = 3) -> OrchestratorManager:
    """Return the process's orchestrator, over the loop of `get_state_context()`."""
    global _manager
    with _lock:
        if _manager is None:
            _manager = OrchestratorManager(num_workers)
        return _manager

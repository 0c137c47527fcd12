"""Short-lived loops for tests: real files and real controllers, waiting for states and never for times."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import fields
from functools import wraps
from inspect import iscoroutinefunction
from pathlib import Path
from typing import Any

import pytest

from ael_store import AELController, AgentBase, AgentManager, Event, Settings, StateContext, Task
from ael_store import task as as_task
from ael_store.clock import Bell, SystemClock

__all__ = [
    "EVERY",
    "Plain",
    "ShiftClock",
    "agent",
    "controller_on",
    "fail_with_hooks",
    "iterations_of",
    "note_result",
    "rows",
    "running",
    "until",
    "worker",
]

PATIENCE_S = 20.0
EVERY = 10
"""The priority of an agent that is due in every iteration of the clock."""

_failed: list[BaseException] = []
_SETTINGS = {item.name for item in fields(Settings)} - {"tick_rate", "strategy", "max_agents", "durability", "db"}


class Plain(AgentBase):
    """An agent of every iteration; its hooks are given to each instance."""

    priority = EVERY


def agent(
    name: str,
    *,
    tick: Callable[..., Any] | None = None,
    event: Callable[..., Any] | None = None,
    start: Callable[..., Any] | None = None,
    error: Callable[..., Any] | None = None,
    shutdown: Callable[..., Any] | None = None,
    task: Callable[..., Any] | None = None,
    **attributes: Any,
) -> AgentBase:
    """Return an agent with these functions as hooks (without `self`)."""
    made = Plain(name, **attributes)
    for hook, function in (
        ("on_tick", tick),
        ("on_event", event),
        ("on_start", start),
        ("on_error", error),
        ("on_shutdown", shutdown),
        ("on_task", task),
    ):
        if function is not None:
            setattr(made, hook, _noted(function))
    return made


class Worker(AgentBase):
    """Submits its method `work` for each event `go`, as the data of that say."""

    priority = EVERY
    subscriptions = ("go",)
    work: Any

    async def on_event(self, event: Event, context: StateContext) -> None:
        options = dict(event.data or {})
        context.submit(self.work, *options.pop("args", []), **options)


async def note_result(self: AgentBase, task: Task, context: StateContext) -> None:
    """An `on_task` that counts how often it gets a task, and keeps what came of it."""
    context.increment(f"applied {task.key}")
    context.set(f"end {task.key}", {"status": task.status, "result": task.result, "error": task.error})


def worker(
    work: Callable[..., Any] | None,
    name: str = "worker",
    *,
    hooks: dict[str, Any] | None = None,
    attributes: dict[str, Any] | None = None,
    **policy: Any,
) -> AgentBase:
    """Return an agent of a class of its own, with a function (`self, task, *args`) as its method `work`.

    It submits that for events `go`, and notes the results. `hooks` are other hooks, or None for none; `policy` are
    the arguments of `@task`.
    """
    members = {"on_task": note_result, **(hooks or {})}
    if work is not None:
        work.__name__ = "work"
        members["work"] = as_task(**policy)(work)
    made: AgentBase = type("Made", (Worker,), {key: value for key, value in members.items() if value is not None})(
        name, **(attributes or {})
    )
    return made


@pytest.fixture(autouse=True)
def fail_with_hooks() -> Iterator[None]:
    """Fail the test where an assertion failed in a hook of `agent`, which for the loop is just an error."""
    _failed.clear()
    yield
    if _failed:
        raise _failed[0]


def _noted(function: Callable[..., Any]) -> Callable[..., Any]:
    """The hook, its failed assertions kept for `fail_with_hooks`."""
    if iscoroutinefunction(function) or iscoroutinefunction(getattr(function, "__call__", None)):  # noqa: B004

        async def in_the_loop(*arguments: Any) -> Any:
            with _noting():
                return await function(*arguments)

        return in_the_loop

    @wraps(function)
    def in_a_thread(*arguments: Any) -> Any:
        with _noting():
            return function(*arguments)

    return in_a_thread


@contextmanager
def _noting() -> Iterator[None]:
    try:
        yield
    except (AssertionError, pytest.fail.Exception) as error:
        _failed.append(error)
        raise


def controller_on(path: Path | str, *agents: AgentBase, tick_rate: float = 0.005, **options: Any) -> AELController:
    """Return a controller over the agents; `options` are its arguments or settings."""
    manager = AgentManager()
    for item in agents:
        manager.register(item)
    settings = {name: options.pop(name) for name in list(options) if name in _SETTINGS}
    options.setdefault("durability", "normal")
    return AELController(manager, tick_rate=tick_rate, store=path, settings=Settings(**settings), **options)


async def until(condition: Callable[..., Any], what: str = "") -> Any:
    """Return the first true result of a condition that another task or thread brings about."""
    deadline = asyncio.get_running_loop().time() + PATIENCE_S
    while not (found := condition()):
        assert asyncio.get_running_loop().time() < deadline, f"this did not come true: {what or condition}"
        await asyncio.sleep(0.001)
    return found


@asynccontextmanager
async def running(controller: AELController) -> AsyncIterator[AELController]:
    """Run a controller in a task for the length of a block; what ended it early is raised at the end."""
    begun = asyncio.Event()
    controller.observe(lambda summary: begun.set())
    task = asyncio.create_task(controller.start())
    try:
        await until(lambda: task.done() or begun.is_set() or _is_paused(controller), "it runs")
        yield controller
    finally:
        await controller.stop()
        await asyncio.wait_for(task, PATIENCE_S)


def _is_paused(controller: AELController) -> bool:
    return bool(controller.state_context.get("ael_status") == "paused")


async def iterations_of(controller: AELController, more: int = 1) -> None:
    """Wait until so many more iterations are over."""
    target = controller.get_stats()["iteration"] + more + 1
    await until(lambda: controller.get_stats()["iteration"] >= target, f"iteration {target}")


def rows(path: Path | str, sql: str, *parameters: Any) -> list[Any]:
    """Return the rows of a query; a single column comes without its tuple."""
    connection = sqlite3.connect(path)
    try:
        found = connection.execute(sql, parameters).fetchall()
    finally:
        connection.close()
    return [row[0] for row in found] if found and len(found[0]) == 1 else found


class ShiftClock(SystemClock):
    """The machine's clocks, and the possibility to let time pass at once."""

    def __init__(self) -> None:
        super().__init__()
        self.ahead_s = 0.0
        self.waits = 0
        self._bells: list[Bell] = []

    def now_us(self) -> int:
        return super().now_us() + int(self.ahead_s * 1e6)

    def monotonic(self) -> float:
        return super().monotonic() + self.ahead_s

    async def wait(self, bell: Bell, until: float | None) -> None:
        self.waits += 1
        self._bells = [bell]
        await super().wait(bell, until)

    def skip(self, seconds: float) -> None:
        """Let time pass, and wake who waits."""
        self.ahead_s += seconds
        for bell in self._bells:
            bell.ring()

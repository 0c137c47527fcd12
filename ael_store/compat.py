"""The ancestor's singletons and factories, with its names and signatures.

`get_*()` return one object per process; a second call with other arguments is refused instead of ignored.
`create_*()` return a new one.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from typing import Any

from ael_store.errors import NotAllowedHere, UsageError
from ael_store.model.metric import numbers_of
from ael_store.runtime.bus import EventBus
from ael_store.runtime.context import StateContext
from ael_store.runtime.controller import AELController
from ael_store.runtime.current import current_unit
from ael_store.runtime.manager import AgentManager
from ael_store.runtime.scheduler import Scheduler
from ael_store.store.store import Store

__all__ = [
    "create_ael_controller",
    "create_agent_manager",
    "create_event_bus",
    "create_scheduler",
    "create_state_context",
    "get_ael_controller",
    "get_agent_manager",
    "get_event_bus",
    "get_state_context",
    "push_metrics",
    "run_ael_loop",
]

_lock = threading.RLock()
_manager: AgentManager | None = None
_bus: EventBus | None = None
_context: StateContext | None = None
_controller: tuple[AELController, dict[str, Any]] | None = None


def get_agent_manager() -> AgentManager:
    """Return the process's agent manager."""
    global _manager
    with _lock:
        if _manager is None:
            _manager = AgentManager()
        return _manager


def get_event_bus() -> EventBus:
    """Return the process's event bus; inside a hook it belongs to the running unit."""
    global _bus
    with _lock:
        if _bus is None:
            _bus = EventBus()
        return _bus


def get_state_context() -> StateContext:
    """Return the process's state context; inside a hook it belongs to the running unit."""
    global _context
    with _lock:
        if _context is None:
            _context = StateContext()
        return _context


def get_ael_controller(
    tick_rate: float | None = None,
    strategy: str | None = None,
    *,
    store: str | os.PathLike[str] | Store | None = None,
) -> AELController:
    """Return the process's controller, over the process's manager, bus and context.

    Where it does not exist yet, `tick_rate` is 1.0 and `strategy` is "priority" unless they are given. Raises
    UsageError (a ValueError) where it exists with other arguments than those given.
    """
    global _controller
    wanted = {"tick_rate": tick_rate, "strategy": strategy, "store": store}
    with _lock:
        if _controller is None:
            controller = AELController(
                get_agent_manager(),
                get_event_bus(),
                state_context=get_state_context(),
                tick_rate=1.0 if tick_rate is None else tick_rate,
                strategy=strategy or "priority",
                store=store,
            )
            given = {"tick_rate": controller.settings.tick_rate, "strategy": controller.scheduler.strategy}
            _controller = (controller, {**given, "store": store})
            return controller
        controller, given = _controller
        for name, value in wanted.items():
            if value is not None and value != given[name]:
                raise UsageError(
                    f"get_ael_controller({name}={value!r}): the process's controller exists with "
                    f"{name}={given[name]!r}; make another one with create_ael_controller"
                )
        return controller


def create_agent_manager() -> AgentManager:
    """Return a new agent manager."""
    return AgentManager()


def create_event_bus() -> EventBus:
    """Return a new event bus."""
    return EventBus()


def create_scheduler(strategy: str = "priority") -> Scheduler:
    """Return a new scheduler."""
    return Scheduler(strategy)


def create_state_context(name: str = "global") -> StateContext:
    """Return a new state context."""
    return StateContext(name)


def create_ael_controller(
    agent_manager: AgentManager | None = None,
    event_bus: EventBus | None = None,
    scheduler: Scheduler | None = None,
    state_context: StateContext | None = None,
    tick_rate: float = 1.0,
    strategy: str = "priority",
    **options: Any,
) -> AELController:
    """Return a new controller; `options` are its keyword arguments."""
    return AELController(agent_manager, event_bus, scheduler, state_context, tick_rate, strategy, **options)


async def run_ael_loop(tick_rate: float = 1.0, strategy: str = "priority") -> None:
    """Run the process's controller until SIGINT, SIGTERM or `stop()`."""
    await get_ael_controller(tick_rate, strategy).start()


def push_metrics(channel: str, data: Mapping[str, float]) -> None:
    """Record numbers as gauges of a channel, all of them or none: `push_metrics("room", {"temperature": 21.5})`.

    In a hook they are part of its unit; elsewhere they are a unit of their own, applied by the loop of this process,
    before it starts too. From another process use `connect(…).push_metrics(…)`.

    Raises InvalidValueType or InvalidValue, naming the metric, for anything but an int or a finite float, and
    NotAllowedHere where no loop was made in this process.
    """
    numbers = numbers_of(channel, data)
    unit = current_unit.get()
    if unit is None or unit.closed:
        context = get_state_context()
        if context._host is None:
            raise NotAllowedHere(
                "push_metrics: there is no loop in this process; make a controller first, or record from outside with "
                "`connect(path).push_metrics(…)`"
            )
        context._do("metrics.record", lambda unit: unit.measure_all(channel, numbers))
    else:
        unit.measure_all(channel, numbers)

"""ael_store: a durable agent loop on SQLite.

    from ael_store import AgentBase, get_agent_manager, run_ael_loop

Layout: `model` (values and contracts) ← `schema` (tables) ← `store` (the only SQL) ← `runtime` (the loop) ← `cli`,
`testing`, `compat`, `client` (ways in and out). Public are the names here, `ael_store.errors`, `ael_store.testing`
and `ael_store.contrib`; everything is imported when it is first used, so that the command line starts fast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ael_store._version import __version__

if TYPE_CHECKING:
    from ael_store.client import connect as connect
    from ael_store.compat import create_ael_controller as create_ael_controller
    from ael_store.compat import create_agent_manager as create_agent_manager
    from ael_store.compat import create_event_bus as create_event_bus
    from ael_store.compat import create_scheduler as create_scheduler
    from ael_store.compat import create_state_context as create_state_context
    from ael_store.compat import get_ael_controller as get_ael_controller
    from ael_store.compat import get_agent_manager as get_agent_manager
    from ael_store.compat import get_event_bus as get_event_bus
    from ael_store.compat import get_state_context as get_state_context
    from ael_store.compat import push_metrics as push_metrics
    from ael_store.compat import run_ael_loop as run_ael_loop
    from ael_store.errors import AelError as AelError
    from ael_store.errors import Fatal as Fatal
    from ael_store.errors import RetryAfter as RetryAfter
    from ael_store.errors import UnitClosed as UnitClosed
    from ael_store.model.event import Event as Event
    from ael_store.model.secret import Secret as Secret
    from ael_store.model.task import Task as Task
    from ael_store.runtime.agent import AgentBase as AgentBase
    from ael_store.runtime.bus import EventBus as EventBus
    from ael_store.runtime.context import StateContext as StateContext
    from ael_store.runtime.controller import AELController as AELController
    from ael_store.runtime.manager import AgentManager as AgentManager
    from ael_store.runtime.scheduler import Scheduler as Scheduler
    from ael_store.runtime.task_function import task as task
    from ael_store.settings import Settings as Settings
    from ael_store.settings import TaskLimit as TaskLimit
    from ael_store.store.store import Store as Store

_HOMES = {
    "AELController": "ael_store.runtime.controller",
    "AelError": "ael_store.errors",
    "AgentBase": "ael_store.runtime.agent",
    "AgentManager": "ael_store.runtime.manager",
    "Event": "ael_store.model.event",
    "EventBus": "ael_store.runtime.bus",
    "Fatal": "ael_store.errors",
    "RetryAfter": "ael_store.errors",
    "Scheduler": "ael_store.runtime.scheduler",
    "Secret": "ael_store.model.secret",
    "Settings": "ael_store.settings",
    "StateContext": "ael_store.runtime.context",
    "Store": "ael_store.store.store",
    "Task": "ael_store.model.task",
    "TaskLimit": "ael_store.settings",
    "UnitClosed": "ael_store.errors",
    "connect": "ael_store.client",
    "create_ael_controller": "ael_store.compat",
    "create_agent_manager": "ael_store.compat",
    "create_event_bus": "ael_store.compat",
    "create_scheduler": "ael_store.compat",
    "create_state_context": "ael_store.compat",
    "get_ael_controller": "ael_store.compat",
    "get_agent_manager": "ael_store.compat",
    "get_event_bus": "ael_store.compat",
    "get_state_context": "ael_store.compat",
    "push_metrics": "ael_store.compat",
    "run_ael_loop": "ael_store.compat",
    "task": "ael_store.runtime.task_function",
}

__all__ = [
    "AELController",
    "AelError",
    "AgentBase",
    "AgentManager",
    "Event",
    "EventBus",
    "Fatal",
    "RetryAfter",
    "Scheduler",
    "Secret",
    "Settings",
    "StateContext",
    "Store",
    "Task",
    "TaskLimit",
    "UnitClosed",
    "__version__",
    "connect",
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
    "task",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'ael_store' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})

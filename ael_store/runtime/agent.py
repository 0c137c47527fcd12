"""Agents: what users subclass.

An agent is a Python object with a name and up to six hooks. The loop calls the hooks, each in a unit of work, and
counts; the object holds no state that must survive, except `metadata`, which is saved with each successful unit.
"""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol
from weakref import WeakKeyDictionary

from ael_store.errors import InvalidAgent
from ael_store.model.event import Event, check_name
from ael_store.model.values import INT_MAX
from ael_store.runtime.agent_config import build_config

if TYPE_CHECKING:
    from ael_store.runtime.context import StateContext

__all__ = ["HOOKS", "AgentBase", "check_agent", "fingerprint", "overrides"]

_UNSET: Any = object()
_FINGERPRINTS: WeakKeyDictionary[type, str] = WeakKeyDictionary()
_WATCHED = frozenset(("enabled", "priority"))
_GUARDED = _WATCHED | {"name"}
HOOKS = ("on_upgrade", "on_start", "on_tick", "on_event", "on_task", "on_error", "on_shutdown")


class AgentHost(Protocol):
    """Who wants to know that an agent's flags have changed."""

    def agent_changed(self, agent: AgentBase) -> None: ...


class AgentBase:
    """Base of all agents. Set the class attributes, override the hooks that you need.

    Hooks may be `async def` or plain `def` (run in a thread of the loop's own). In a hook, `context` reads and
    writes the shared state and emits events; everything that it did takes effect together when it returns, and
    nothing of it when it raises. `super().on_…()` may be called and need not be: the loop counts.

    An instance may override the class: `Sensor("kitchen", config={"pin": 4}, priority=8, trigger="every 1s")`.
    """

    name: str = ""
    """Unique among the agents of a database; state, statistics and cursors belong to it."""
    priority: int = 5
    """0 to 10, higher is more often and earlier."""
    enabled: bool = True
    """Whether it is run; an operator's word (`ael agents disable`) wins over this."""
    subscriptions: Sequence[str] = ()
    """Event types for `on_event`; `*` stands for any text."""
    trigger: str | None = None
    """When to tick instead of with the clock: `every 30s`, or a cron line with an optional IANA zone."""
    tick_timeout: float | None = None
    """Seconds after which a hook is ended; None takes the setting, 0 is no limit."""
    background: bool = False
    """True: the loop never waits for its ticks and events."""
    aliases: Sequence[str] = ()
    """Earlier names: state, statistics and cursors of the first that is known are taken over."""
    version: int = 0
    """Of the data that this code keeps in state and `metadata`; where it grows, `on_upgrade` brings them up to date."""
    Config: ClassVar[type | None] = None
    """A dataclass that types `config`, where the class declares one."""

    tick_count: int = 0
    """Successful ticks over the life of the database; inside a tick this one is included."""
    error_count: int = 0
    """Units of any kind that ended in error or timeout, over the life of the database."""
    metadata: dict[str, Any]
    """JSON values that are saved with each successful unit and restored at start."""
    config: Any
    """What the agent was configured with: an instance of `Config`, else a dictionary."""

    _host: AgentHost | None = None

    def __new__(cls, *args: Any, **kwargs: Any) -> AgentBase:
        agent = super().__new__(cls)
        agent.metadata = {}
        agent.config = None if cls.Config is not None else {}
        return agent

    def __init__(
        self,
        name: str | None = None,
        *,
        config: Any = None,
        priority: int | None = None,
        enabled: bool | None = None,
        subscriptions: Sequence[str] | None = None,
        trigger: str | None = None,
        tick_timeout: float | None = _UNSET,
        background: bool | None = None,
        aliases: Sequence[str] | None = None,
    ) -> None:
        for attribute, value in (
            ("name", name),
            ("priority", priority),
            ("enabled", enabled),
            ("subscriptions", subscriptions),
            ("trigger", trigger),
            ("background", background),
            ("aliases", aliases),
        ):
            if value is not None:
                setattr(self, attribute, value)
        if tick_timeout is not _UNSET:
            self.tick_timeout = tick_timeout
        self.config = build_config(type(self), config, self.name or type(self).__name__)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _GUARDED and self._host is not None:
            _check_change(self, name, value)
        object.__setattr__(self, name, value)
        if name in _WATCHED and self._host is not None:
            self._host.agent_changed(self)

    # -- hooks --

    async def on_upgrade(self, from_version: int, context: StateContext) -> None:
        """Called once, before everything else, where `version` is newer than that of the data.

        `from_version` is the version that the data have, 0 where none was ever given. What it does is committed
        together with the new version; where it fails, nothing of it remains, and it is tried again.
        """

    async def on_start(self, context: StateContext) -> None:
        """Called once a run before anything else of this agent."""

    async def on_tick(self, context: StateContext) -> None:
        """Called when the agent is due."""
        if self._host is None:
            self.tick_count += 1

    async def on_event(self, event: Event, context: StateContext) -> None:
        """Called for each event that `subscriptions` match, in order; the cursor moves with what it did."""

    async def on_task(self, task: Any, context: StateContext) -> None:
        """Called with the result of a task."""

    async def on_error(self, error: Exception, context: StateContext) -> None:
        """Called after another hook of this agent failed, in a unit of its own."""
        if self._host is None:
            self.error_count += 1

    async def on_shutdown(self, context: StateContext) -> None:
        """Called once when the run ends, whatever the reason."""

    def get_stats(self) -> dict[str, Any]:
        """Return name, priority, flags and counts as a dictionary."""
        return {
            "name": self.name,
            "priority": self.priority,
            "enabled": self.enabled,
            "tick_count": self.tick_count,
            "error_count": self.error_count,
            "metadata": dict(self.metadata),
        }

    def __repr__(self) -> str:
        return f"<{type(self).__qualname__} {self.name!r} priority={self.priority}>"


def check_agent(agent: Any) -> AgentBase:
    """Return the agent if it can be registered; raises InvalidAgent with what is wrong and what is wanted."""
    if not isinstance(agent, AgentBase):
        hint = f"; register an instance: {agent.__name__}()" if inspect.isclass(agent) else ""
        raise InvalidAgent(f"{agent!r} is not an agent (an instance of a subclass of AgentBase){hint}")
    where = f"{type(agent).__module__}.{type(agent).__qualname__}"
    if not agent.name:
        raise InvalidAgent(
            f"{where} has no name: set the class attribute `name` or pass one: {type(agent).__name__}('…')"
        )
    try:
        check_name(agent.name, f"the name of {where}", wildcards=False)
    except (TypeError, ValueError) as error:
        raise InvalidAgent(str(error)) from None
    if "/" in agent.name or agent.name.startswith("("):
        raise InvalidAgent(f"the name of {where} is {agent.name!r}: '/' and a leading '(' are reserved")
    _check_flag(agent.name, "priority", agent.priority)
    _check_flag(agent.name, "enabled", agent.enabled)
    timeout = agent.tick_timeout
    if timeout is not None and (type(timeout) not in (int, float) or not math.isfinite(timeout) or timeout < 0):
        raise InvalidAgent(
            f"agent {agent.name!r}: tick_timeout is {timeout!r}, wanted are seconds from 0 (no limit), or None"
        )
    if type(agent.version) is not int or not 0 <= agent.version <= INT_MAX:
        raise InvalidAgent(
            f"agent {agent.name!r}: version is {agent.version!r}, wanted is an integer from 0, one more each time "
            "the form of its data changes"
        )
    for attribute in ("subscriptions", "aliases"):
        values = getattr(agent, attribute)
        if isinstance(values, str) or not isinstance(values, Sequence):
            raise InvalidAgent(
                f"agent {agent.name!r}: {attribute} is {values!r}, wanted is a list or tuple of strings: ({values!r},)"
            )
        for value in values:
            try:
                check_name(value, f"agent {agent.name!r}: an entry of {attribute}")
            except (TypeError, ValueError) as error:
                raise InvalidAgent(str(error)) from None
    for hook in HOOKS:
        function = getattr(agent, hook)
        if inspect.isasyncgenfunction(function) or inspect.isgeneratorfunction(function):
            raise InvalidAgent(f"agent {agent.name!r}: {hook} has a `yield`, so nothing of it would run; remove it")
    if agent.trigger is not None:
        from ael_store.runtime.trigger import parse_trigger  # brings APScheduler with it

        parse_trigger(agent.trigger, subject=f"agent {agent.name!r}")
    return agent


def _check_flag(agent: str, name: str, value: Any) -> None:
    if name == "priority" and (type(value) is not int or not 0 <= value <= 10):
        raise InvalidAgent(f"agent {agent!r}: priority is {value!r}, wanted is an integer from 0 to 10")
    if name == "enabled" and not isinstance(value, bool):
        raise InvalidAgent(f"agent {agent!r}: enabled is {value!r}, wanted is True or False")


def _check_change(agent: AgentBase, name: str, value: Any) -> None:
    """Refuse what would stop a running loop."""
    if name == "name" and value != agent.name:
        raise InvalidAgent(
            f"agent {agent.name!r} runs in a loop, so its name can't become {value!r}; unregister it first, "
            "or rename it in the code with the old name in `aliases`"
        )
    _check_flag(agent.name, name, value)


def overrides(agent: AgentBase, hook: str) -> bool:
    """True where the agent's class (or the instance) has a hook of its own."""
    return hook in vars(agent) or getattr(type(agent), hook) is not getattr(AgentBase, hook)


def fingerprint(agent: AgentBase) -> str:
    """Return a digest of the code of the agent's class, so that changed code is noticed at the next start."""
    known = _FINGERPRINTS.get(type(agent))
    if known is not None:
        return known
    parts: list[bytes] = []
    for cls in type(agent).__mro__:
        if cls in (AgentBase, object):
            continue
        parts.append(cls.__qualname__.encode())
        for name, value in sorted(vars(cls).items()):
            code = getattr(value, "__code__", None)
            if code is not None:
                parts += [name.encode(), code.co_code, repr(_constants(code)).encode()]
    digest = _FINGERPRINTS[type(agent)] = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    return digest


def _constants(code: Any) -> list[Any]:
    """Constants and names of a code object, nested functions by their own constants, not by their address."""
    return [*code.co_names, *(_constants(c) if inspect.iscode(c) else repr(c) for c in code.co_consts)]

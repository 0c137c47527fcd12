"""The registry of agents: registered before or while the loop runs."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Protocol

from ael_store.errors import InvalidAgent
from ael_store.runtime.agent import AgentBase, check_agent

if TYPE_CHECKING:
    from ael_store.runtime.context import StateContext

__all__ = ["AgentManager"]


class ManagerHost(Protocol):
    """The loop that runs the agents of a manager."""

    def agents_changed(self) -> None: ...

    def agent_changed(self, agent: AgentBase) -> None: ...


class AgentManager:
    """The agents of a loop, by name, in order of registration. May be used from any thread."""

    def __init__(self) -> None:
        self._agents: dict[str, AgentBase] = {}
        self._lock = threading.Lock()
        self._host: ManagerHost | None = None
        self._unregistered: set[str] = set()

    @property
    def agents(self) -> dict[str, AgentBase]:
        """The registered agents by name, a copy."""
        return dict(self._agents)

    def register(self, agent: AgentBase) -> None:
        """Register an agent. While the loop runs it joins at the next iteration, `on_start` first.

        Raises InvalidAgent (a ValueError): no name, a name that is already registered, a wrong attribute.
        """
        check_agent(agent)
        with self._lock:
            if agent.name in self._agents:
                raise InvalidAgent(
                    f"agent {agent.name!r} is already registered ({type(self._agents[agent.name]).__qualname__}); "
                    "names are unique, pass another one"
                )
            self._agents[agent.name] = agent
            self._unregistered.discard(agent.name)
        if self._host is not None:
            self._host.agents_changed()

    def unregister(self, name: str) -> bool:
        """Remove an agent; True if it was there. Its `on_shutdown` runs, its subscriptions end, its history stays."""
        with self._lock:
            agent = self._agents.pop(name, None)
            if agent is not None:
                self._unregistered.add(name)
        if agent is not None and self._host is not None:
            self._host.agents_changed()
        return agent is not None

    def take_unregistered(self) -> set[str]:
        """Return the names that were unregistered since the last call: a run that begins ends their subscriptions."""
        with self._lock:
            names, self._unregistered = self._unregistered, set()
        return names

    def get_agent(self, name: str) -> AgentBase | None:
        """Return the agent of that name, None where there is none."""
        return self._agents.get(name)

    def list_agents(self, enabled_only: bool = False) -> list[AgentBase]:
        """Return the agents in order of registration."""
        return [agent for agent in self._agents.values() if agent.enabled or not enabled_only]

    def get_agents_by_priority(self, enabled_only: bool = True) -> list[AgentBase]:
        """Return the agents, higher priority first, equal ones in order of registration."""
        return sorted(self.list_agents(enabled_only), key=lambda agent: -agent.priority)

    async def start_all(self, context: StateContext) -> None:
        """Call `on_start` of every enabled agent, higher priority first; for use without a loop.

        A failure goes to the agent's `on_error` and does not keep the others from starting.
        """
        for agent in self.get_agents_by_priority():
            await _call(agent, "on_start", context)

    async def shutdown_all(self, context: StateContext) -> None:
        """Call `on_shutdown` of every agent, lower priority first; for use without a loop."""
        for agent in reversed(self.get_agents_by_priority(enabled_only=False)):
            await _call(agent, "on_shutdown", context)

    def get_stats(self) -> dict[str, Any]:
        """Return how many agents there are, and the statistics of each."""
        agents = list(self._agents.values())
        return {
            "total_agents": len(agents),
            "enabled_agents": sum(agent.enabled for agent in agents),
            "disabled_agents": sum(not agent.enabled for agent in agents),
            "total_ticks": sum(agent.tick_count for agent in agents),
            "total_errors": sum(agent.error_count for agent in agents),
            "agents": {agent.name: agent.get_stats() for agent in agents},
        }


async def _call(agent: AgentBase, hook: str, context: StateContext) -> None:
    try:
        result = getattr(agent, hook)(context)
        if result is not None:
            await result
    except Exception as error:
        try:
            result = agent.on_error(error, context)
            if result is not None:
                await result
        except Exception:
            agent.error_count += 1

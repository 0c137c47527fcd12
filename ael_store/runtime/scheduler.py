"""Which agents run in an iteration of the clock, and in what order.

- `priority`: an agent is due every 1st, 2nd, 3rd, 5th or 10th iteration of the clock by its priority, with a phase
  from a stable hash of its name so that not all come at once. Higher first; one that was cut by `max_agents` stays
  due and gains a step of priority with each iteration that it waits.
- `round_robin`: each in turn. The position is the *name* last served (with a few before it, in case it goes), so
  that it survives restarts and changes of the set.
- `load_aware`: weighted fair queueing (Demers, Keshav, Shenker 1989) over measured durations: an agent's virtual
  time grows by duration / (priority + 1) when it runs, those with the least run first, as many as fit in the
  iteration's budget by their moving averages. While all fit, all run and nobody is charged.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from operator import attrgetter
from typing import Any, Literal, get_args

import orjson

from ael_store.errors import InvalidSetting
from ael_store.runtime.agent import AgentBase

__all__ = ["PERIODS", "STRATEGIES", "Scheduler", "Strategy", "check_strategy", "is_turn"]

Strategy = Literal["priority", "round_robin", "load_aware"]
STRATEGIES: tuple[str, ...] = get_args(Strategy)

PERIODS = (10, 10, 10, 5, 5, 3, 3, 2, 2, 2, 1)
"""Iterations of the clock between two ticks, by priority 0 to 10."""

BACK_TO_BACK_BUDGET_S = 0.05
REMEMBERED = 8


def check_strategy(strategy: Any) -> Strategy:
    """Return the strategy if there is one of that name; raises InvalidSetting with the names that exist."""
    if strategy not in STRATEGIES:
        raise InvalidSetting(f"strategy {strategy!r} does not exist; choose one of: {', '.join(STRATEGIES)}")
    return strategy  # type: ignore[no-any-return]


class Scheduler:
    """Chooses agents: `Scheduler("priority").select_agents(agents, max_agents=10, iteration=7)`."""

    def __init__(self, strategy: str = "priority") -> None:
        self.strategy: Strategy = check_strategy(strategy)
        self.budget_s = 1.0
        self._durations: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self.reset()

    def reset(self) -> None:
        """Forget durations, counts and position."""
        self._durations.clear()
        self._counts.clear()
        self._waiting: dict[str, int] = {}
        self._served: list[str] = []
        self._virtual: dict[str, float] = {}
        self._moved = False

    # -- choosing --

    def should_run_agent(self, agent: AgentBase, iteration: int) -> bool:
        """True where the agent's turn comes in this iteration of the clock (always, but for `priority`)."""
        if not agent.enabled:
            return False
        if self.strategy != "priority":
            return True
        return is_turn(agent.name, agent.priority, iteration)

    def select_agents(
        self, agents: Sequence[AgentBase], max_agents: int | None = None, *, iteration: int | None = None
    ) -> list[AgentBase]:
        """Return the agents to run, in order, at most `max_agents`.

        With `iteration` (of the clock) only those whose turn it is; without it `priority` takes all enabled ones,
        as the ancestor's did.
        """
        enabled = [agent for agent in agents if agent.enabled]
        if self.strategy == "priority":
            return self._by_priority(enabled, max_agents, iteration)
        if self.strategy == "round_robin":
            return self._in_turn(enabled, max_agents)
        return self._by_load(enabled, max_agents)

    def _by_priority(self, agents: list[AgentBase], max_agents: int | None, iteration: int | None) -> list[AgentBase]:
        waiting = self._waiting
        if iteration is None:
            return sorted(agents, key=_by_rank, reverse=True)[:max_agents]
        due = [agent for agent in agents if is_turn(agent.name, agent.priority, iteration) or agent.name in waiting]
        if waiting:
            due.sort(key=lambda agent: waiting.get(agent.name, iteration) - iteration - agent.priority)
        else:
            due.sort(key=_by_rank, reverse=True)
        chosen = due if max_agents is None else due[:max_agents]
        if waiting or len(chosen) < len(due):
            self._waiting = {agent.name: waiting.get(agent.name, iteration) for agent in due[len(chosen) :]}
            self._moved = True
        return chosen

    def _in_turn(self, agents: list[AgentBase], max_agents: int | None) -> list[AgentBase]:
        number = len(agents) if max_agents is None else min(max_agents, len(agents))
        start = 0
        places = {agent.name: place for place, agent in enumerate(agents)}
        for name in self._served:
            if name in places:
                start = places[name] + 1
                break
        chosen = [agents[(start + step) % len(agents)] for step in range(number)]
        if 0 < number < len(agents):
            self._served = ([agent.name for agent in reversed(chosen)] + self._served)[:REMEMBERED]
            self._moved = True
        return chosen

    def _by_load(self, agents: list[AgentBase], max_agents: int | None) -> list[AgentBase]:
        virtual, durations = self._virtual, self._durations
        names = [agent.name for agent in agents]
        costs = [durations.get(name, 0.0) for name in names]
        ranks = [-agent.priority for agent in agents]
        number = len(agents) if max_agents is None else max_agents
        if sum(costs) <= self.budget_s and len(agents) <= number:
            if virtual:
                virtual.clear()
                self._moved = True
            return [agents[place] for place in _order(ranks, costs)]
        least = min((virtual[name] for name in names if name in virtual), default=0.0)
        ahead = {name: virtual.get(name, least) for name in names}
        chosen: list[AgentBase] = []
        left = self.budget_s
        for place in _order([ahead[name] for name in names], ranks, costs):
            agent, cost = agents[place], costs[place]
            if len(chosen) >= number or (chosen and cost > left):
                break
            chosen.append(agent)
            left -= cost
            ahead[agent.name] += max(cost, 1e-6) / (agent.priority + 1)
        self._virtual = ahead
        self._moved = True
        return chosen

    # -- measuring --

    def record_execution(self, agent_name: str, seconds: float) -> None:
        """Note how long an agent ran; `load_aware` decides by the moving average."""
        if not math.isfinite(seconds) or seconds < 0:
            return
        before = self._durations.get(agent_name)
        self._durations[agent_name] = seconds if before is None else before + (seconds - before) / 8
        self._counts[agent_name] = self._counts.get(agent_name, 0) + 1

    def forget(self, agent_name: str) -> None:
        """Drop what is known of an agent; its place in the turn stays until it is passed."""
        self._durations.pop(agent_name, None)
        self._counts.pop(agent_name, None)
        self._waiting.pop(agent_name, None)
        self._virtual.pop(agent_name, None)

    def get_stats(self) -> dict[str, Any]:
        """Return strategy, counts and average durations in seconds by agent."""
        return {
            "strategy": self.strategy,
            "total_executions": sum(self._counts.values()),
            "execution_counts": dict(self._counts),
            "average_durations": dict(self._durations),
            "waiting": sorted(self._waiting),
        }

    # -- position, for restarts --

    def take_position(self) -> str | None:
        """Return the position as JSON text if it has moved since the last call, else None."""
        if not self._moved:
            return None
        self._moved = False
        if self.strategy == "priority":
            value: Any = {"waiting": self._waiting}
        elif self.strategy == "round_robin":
            value = {"served": self._served}
        else:
            least = min(self._virtual.values(), default=0.0)
            value = {"virtual": {name: round(time - least, 6) for name, time in self._virtual.items()}}
        return orjson.dumps(value).decode()

    def restore(self, position: str | None, durations: dict[str, float]) -> None:
        """Go on from a stored position and stored averages; what does not fit this strategy is ignored."""
        for name, seconds in durations.items():
            self._durations.setdefault(name, seconds)
        value = orjson.loads(position) if position else {}
        self._waiting = {str(name): int(since) for name, since in value.get("waiting", {}).items()}
        self._served = [str(name) for name in value.get("served", [])]
        self._virtual = {str(name): float(time) for name, time in value.get("virtual", {}).items()}


def is_turn(name: str, priority: int, clock: int) -> bool:
    """True where `priority` has an agent due in this iteration of the clock."""
    period = PERIODS[priority]
    return period == 1 or (clock + _phase(name)) % period == 0


_by_rank = attrgetter("priority")


def _order(*keys: Sequence[float]) -> list[int]:
    """Return the places in order of the first list of keys, equal ones in that of the next, and so on."""
    places = list(range(len(keys[0])))
    for key in reversed(keys):
        places.sort(key=key.__getitem__)  # much quicker than once by tuples
    return places


_PHASES: dict[str, int] = {}


def _phase(name: str) -> int:
    phase = _PHASES.get(name)
    if phase is None:
        phase = _PHASES[name] = zlib.crc32(name.encode())
    return phase

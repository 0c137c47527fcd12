"""The ancestor's design, written anew: everything in memory, nothing survives the process.

What its loop did in an iteration is here (its own keys of the state, sorting and selecting, a history of changes
and of events, locks, subscriptions, measured durations), so that durability can be weighed against having none. What it
did only for people to read, its log, is left out.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from benchmarks.workload import event_data, event_type, key, value

__all__ = ["AncestorLoop", "AncestorSensor"]

CHANGES_KEPT, EVENTS_KEPT = 100, 1000
PERIODS = {10: 1, 9: 2, 8: 2, 7: 2, 6: 3, 5: 3, 4: 5, 3: 5}


@dataclass
class AncestorEvent:
    """An event of the bus."""

    type: str
    source: str
    data: Any = None
    timestamp: datetime = field(default_factory=datetime.now)
    metadata: dict[str, Any] = field(default_factory=dict)


class AncestorBus:
    """Calls who is subscribed at once, and keeps the last events."""

    def __init__(self) -> None:
        self.subscriptions: dict[str, list[tuple[str, Callable[[AncestorEvent], Any]]]] = {}
        self.history: list[AncestorEvent] = []
        self.emitted = 0

    def emit(self, type: str, source: str, data: Any = None) -> None:
        event = AncestorEvent(type, source, data)
        self.emitted += 1
        self.history.append(event)
        if len(self.history) > EVENTS_KEPT:
            self.history.pop(0)
        for _name, callback in self.subscriptions.get(type, []):
            callback(event)


class AncestorState:
    """A dictionary behind a lock, with the last changes."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.history: list[dict[str, Any]] = []
        self.changes = 0
        self.lock = threading.RLock()

    def set(self, key: str, value: Any) -> None:
        with self.lock:
            old = self.values.get(key)
            self.values[key] = value
            self.changes += 1
            self.history.append(
                {"timestamp": datetime.now(), "operation": "set", "key": key, "old_value": old, "new_value": value}
            )
            if len(self.history) > CHANGES_KEPT:
                self.history.pop(0)


class AncestorSensor:
    """Sets one key and emits one event, as the sensor of the product's benchmark does."""

    priority = 10
    enabled = True

    def __init__(self, number: int, bus: AncestorBus) -> None:
        self.name = f"sensor_{number}"
        self.number = number
        self.bus = bus
        self.key = key(number)
        self.type = event_type(number)
        self.tick_count = 0

    async def on_tick(self, context: AncestorState) -> None:
        self.tick_count += 1
        context.set(self.key, value(self.number, self.tick_count))
        self.bus.emit(self.type, self.name, event_data(self.number, self.tick_count))


class AncestorLoop:
    """Goes round back to back."""

    def __init__(self, agents: int) -> None:
        self.bus = AncestorBus()
        self.state = AncestorState()
        self.agents = {agent.name: agent for agent in (AncestorSensor(n, self.bus) for n in range(agents))}
        self.iteration = 0
        self.durations: dict[str, list[float]] = {}
        self.last_runs: dict[str, datetime] = {}
        self.counts: dict[str, int] = {}

    async def run(self, iterations: int) -> float:
        """Go round so many times, and return the seconds."""
        began = time.perf_counter()
        for _ in range(iterations):
            await self._iterate()
            await asyncio.sleep(0)  # else nothing could stop it
        return time.perf_counter() - began

    async def _iterate(self) -> None:
        began = datetime.now()
        self.iteration += 1
        self.state.set("ael_iteration", self.iteration)
        self.state.set("ael_last_tick", began.isoformat())
        by_priority = sorted(
            (agent for agent in self.agents.values() if agent.enabled), key=lambda agent: agent.priority, reverse=True
        )
        selected = sorted(
            (agent for agent in by_priority if agent.enabled), key=lambda agent: agent.priority, reverse=True
        )
        for agent in selected:
            if self.iteration % PERIODS.get(agent.priority, 10) == 0:
                await self._tick(agent)

    async def _tick(self, agent: AncestorSensor) -> None:
        began = datetime.now()
        try:
            await agent.on_tick(self.state)
        except Exception as error:
            self.bus.emit("agent_error", "ael", {"agent": agent.name, "error": str(error)})
            return
        took = (datetime.now() - began).total_seconds()
        self.last_runs[agent.name] = datetime.now()
        self.counts[agent.name] = self.counts.get(agent.name, 0) + 1
        durations = self.durations.setdefault(agent.name, [])
        durations.append(took)
        if len(durations) > CHANGES_KEPT:
            durations.pop(0)

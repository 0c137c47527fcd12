"""Agents that tell how time passes for them, beside the crash agents: the load of `clocks.py`."""

from __future__ import annotations

import os
import time

from ael_store import AgentBase, Event, StateContext
from tests.faults.agents import crash_agents

__all__ = ["DELAY_S", "FIRES_AT_H", "agents"]

DELAY_S = 0.3
FIRES_AT_H = 7
"""Hour of the daily schedule, in UTC."""


class Beat(AgentBase):
    """Counts real time."""

    name = "beat"
    trigger = "every 200ms"

    async def on_tick(self, context: StateContext) -> None:
        context.increment("beat/ticks")


class Ring(AgentBase):
    """Sets itself a timer, again and again, and notes how late it was by a clock that nobody sets."""

    name = "ring"
    subscriptions = ("ring",)

    def _wind(self, context: StateContext) -> None:
        context.emit("ring", {"pid": os.getpid(), "due": time.monotonic() + DELAY_S}, after=DELAY_S)

    async def on_start(self, context: StateContext) -> None:
        self._wind(context)

    async def on_event(self, event: Event, context: StateContext) -> None:
        if event.data["pid"] == os.getpid():
            late_s = time.monotonic() - event.data["due"]
            context.set("ring/latest", max(late_s, context.get("ring/latest", 0.0)))
            context.increment("ring/rung")
            self._wind(context)


class Daily(AgentBase):
    """Notes when it fires."""

    name = "daily"
    trigger = f"0 {FIRES_AT_H} * * *"

    async def on_tick(self, context: StateContext) -> None:
        context.set("daily/fires", [*context.get("daily/fires", []), context.now.timestamp()])


agents = [*crash_agents(), Beat(), Ring(), Daily()]

"""The agents that `tests/migrations/fill.py` has filled a database for, as a newer program has them.

What they do adds to what they did: `upgrade.py` counts it.
"""

from __future__ import annotations

from ael_store import AgentBase, Event, StateContext

__all__ = ["agents"]


class Reader(AgentBase):
    """Counts its ticks, and enters each event: the history of `handled/NAME` is the list of those it handled."""

    priority = 10
    subscriptions = ("*.read",)
    version = 3

    async def on_upgrade(self, from_version: int, context: StateContext) -> None:
        context.set(f"upgraded/{self.name}", from_version)

    async def on_tick(self, context: StateContext) -> None:
        context.increment(f"ticks/{self.name}")
        context.set(f"place/{self.name}", self.metadata["place"])

    async def on_event(self, event: Event, context: StateContext) -> None:
        if event.metadata.get("redelivered"):
            context.increment(f"again/{self.name}")
        else:
            context.set(f"handled/{self.name}", event.id)


agents = [Reader("collector"), Reader("kitchen"), Reader("wächter")]

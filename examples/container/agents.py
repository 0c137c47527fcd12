"""What runs in the container; put your own agents here."""

from __future__ import annotations

from ael_store import AgentBase, StateContext


class Heartbeat(AgentBase):
    """Counts how often it was there, over all restarts of the container."""

    name = "heartbeat"
    priority = 10

    async def on_tick(self, context: StateContext) -> None:
        context.increment("beats")

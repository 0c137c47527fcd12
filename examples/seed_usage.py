"""The usage example of FAZA 28, the project's ancestor, as it was: only the package has another name.

    python examples/seed_usage.py

It is durable now: what it stores is in `ael.db` in the working directory, and the next start goes on from there.
"""

import asyncio
import logging

import psutil

from ael_store import (
    AgentBase,
    StateContext,
    get_ael_controller,
    get_agent_manager,
    get_event_bus,
)


def get_cpu_usage() -> float:
    """Return how busy the CPUs were since the last call, in percent."""
    return psutil.cpu_percent()


# Define custom agent
class MonitoringAgent(AgentBase):
    name = "monitoring_agent"
    priority = 8

    async def on_start(self, context: StateContext) -> None:
        await super().on_start(context)
        print(f"{self.name} started")

    async def on_tick(self, context: StateContext) -> None:
        await super().on_tick(context)

        # Monitor system
        cpu_usage = get_cpu_usage()
        context.set("cpu_usage", cpu_usage)
        print(f"tick {self.tick_count}: CPU {cpu_usage} %")

        # Emit alert if high
        if cpu_usage > 80:
            event_bus = get_event_bus()
            event_bus.emit("high_cpu_alert", self.name, data={"cpu": cpu_usage})


async def main() -> None:
    # Register agent
    manager = get_agent_manager()
    manager.register(MonitoringAgent())

    # Start AEL
    controller = get_ael_controller(tick_rate=1.0, strategy="priority")
    await controller.start()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")  # where the database is, and what was resumed
    asyncio.run(main())

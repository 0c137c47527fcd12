"""The examples of the ancestor's document run unchanged, but for their import, and are durable over processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

from tests.loops import rows

USAGE = """
# Define custom agent
class MonitoringAgent(AgentBase):
    name = "monitoring_agent"
    priority = 8

    async def on_start(self, context):
        await super().on_start(context)
        print(f"{self.name} started")

    async def on_tick(self, context):
        await super().on_tick(context)

        # Monitor system
        cpu_usage = get_cpu_usage()
        context.set("cpu_usage", cpu_usage)

        # Emit alert if high
        if cpu_usage > 80:
            event_bus = get_event_bus()
            event_bus.emit("high_cpu_alert", self.name, data={"cpu": cpu_usage})

# Register agent
manager = get_agent_manager()
manager.register(MonitoringAgent())

# Start AEL
controller = get_ael_controller(tick_rate=1.0, strategy="priority")
await controller.start()
"""

AGENTS = """
class MonitoringAgent(AgentBase):
    name = "system_monitor"
    priority = 8

    async def on_tick(self, context):
        await super().on_tick(context)

        # Collect metrics
        metrics = {
            "cpu": get_cpu_usage(),
            "memory": get_memory_usage(),
            "disk": get_disk_usage()
        }

        # Store in state
        context.update({f"metrics_{k}": v for k, v in metrics.items()})

        # Emit event if threshold exceeded
        if metrics["cpu"] > 80:
            get_event_bus().emit("high_cpu", self.name, data=metrics)

class SchedulerAgent(AgentBase):
    name = "task_scheduler"
    priority = 7

    async def on_tick(self, context):
        await super().on_tick(context)

        # Check for scheduled tasks
        scheduled_tasks = context.get("scheduled_tasks", [])

        for task in scheduled_tasks:
            if task["time"] <= current_time():
                # Submit to FAZA 25 (TODO)
                context.set("pending_task", task)
                scheduled_tasks.remove(task)

        context.set("scheduled_tasks", scheduled_tasks)

class AlertAgent(AgentBase):
    name = "alert_handler"
    priority = 9

    async def on_start(self, context):
        await super().on_start(context)

        # Subscribe to alert events
        bus = get_event_bus()
        bus.subscribe("high_cpu", self.name, self.handle_high_cpu)
        bus.subscribe("low_memory", self.name, self.handle_low_memory)

    def handle_high_cpu(self, event):
        print(f"High CPU alert from {event.source}: {event.data}")
        # Take action...

    def handle_low_memory(self, event):
        print(f"Low memory alert from {event.source}: {event.data}")
        # Take action...
"""

RUN = """
manager = get_agent_manager()
for agent in (MonitoringAgent(), SchedulerAgent(), AlertAgent()):
    manager.register(agent)
context = get_state_context()
if FIRST:
    context.set("scheduled_tasks", [{"time": 5, "what": "early"}, {"time": 50, "what": "late"}])
controller = get_ael_controller(tick_rate=1.0, strategy="priority")
await controller.start()
"""

PROGRAM = """
import asyncio, os
from ael_store import AgentBase, get_agent_manager, get_ael_controller, get_event_bus, get_state_context

FIRST = bool(int(os.environ["FIRST"]))

def get_cpu_usage():
    return 91.5

def get_memory_usage():
    return 40.0

def get_disk_usage():
    return 70

def current_time():
    return 10

async def stop_after(iterations):
    controller, done = get_ael_controller(), asyncio.Event()
    controller.observe(lambda summary: done.set() if summary.ticks and summary.iteration >= iterations else None)
    await done.wait()
    await controller.stop()

async def example():
{body}

async def main():
    stopper = asyncio.create_task(stop_after({iterations}))
    await example()
    await stopper

asyncio.run(main())
"""


def run(folder: Path, body: str, *, first: bool, iterations: int) -> str:
    program = PROGRAM.format(body=textwrap.indent(body, "    "), iterations=iterations)
    environ = {**os.environ, "AEL_DB": str(folder / "ael.db"), "FIRST": str(int(first))}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environ, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_usage_example_runs_unchanged_and_is_durable(tmp_path: Path) -> None:
    outputs = [run(tmp_path, USAGE, first=first, iterations=1 if first else 3) for first in (True, False)]

    path = tmp_path / "ael.db"
    assert outputs == ["monitoring_agent started\n"] * 2
    assert rows(path, "SELECT key, value FROM v_state") == [("cpu_usage", "91.5")]
    (ticks,) = rows(path, "SELECT tick_count FROM v_agents")
    assert ticks >= 1
    alerts = rows(path, "SELECT source, data FROM v_events WHERE type = 'high_cpu_alert'")
    assert alerts == [("monitoring_agent", '{"cpu":91.5}')] * ticks
    numbers = rows(path, "SELECT iteration FROM v_iterations ORDER BY iteration")
    assert numbers == list(range(1, len(numbers) + 1))
    assert rows(path, "SELECT status FROM v_runs") == ["stopped"] * 2
    assert len(rows(path, "SELECT id FROM v_state_history")) == 1


def test_three_agents_run_unchanged_and_go_on_in_the_next_process(tmp_path: Path) -> None:
    path = tmp_path / "ael.db"

    printed = run(tmp_path, AGENTS + RUN, first=True, iterations=3).splitlines()

    alerts = rows(path, "SELECT count(*) FROM v_events WHERE type = 'high_cpu'")[0]
    assert alerts >= 1
    expected = "High CPU alert from system_monitor: {'cpu': 91.5, 'memory': 40.0, 'disk': 70}"
    assert printed == [expected] * alerts
    state = {key: json.loads(value) for key, value in rows(path, "SELECT key, value FROM v_state")}
    assert state == {
        "metrics_cpu": 91.5,
        "metrics_memory": 40.0,
        "metrics_disk": 70,
        "pending_task": {"time": 5, "what": "early"},
        "scheduled_tasks": [{"time": 50, "what": "late"}],
    }

    printed = run(tmp_path, AGENTS + RUN, first=False, iterations=5).splitlines()

    more = rows(path, "SELECT count(*) FROM v_events WHERE type = 'high_cpu'")[0] - alerts
    assert printed == [expected] * more
    assert {key: json.loads(value) for key, value in rows(path, "SELECT key, value FROM v_state")} == state
    assert rows(path, "SELECT * FROM v_pending") == []
    assert rows(path, "SELECT status FROM v_runs") == ["stopped"] * 2

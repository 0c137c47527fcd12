"""Three agents that watch this machine, on real figures (it needs psutil).

    ael run examples/system_monitor.py

Kill it however you like and start it again: it goes on where it was, with all that the agents have stored and
every alert that nobody has handled yet. While it runs, ask it something:

    ael state list
    ael events tail
    sqlite3 ael.db "SELECT name, tick_count, event_count FROM v_agents"
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import psutil

from ael_store import AgentBase, Event, StateContext


class SystemMonitor(AgentBase):
    """Stores how busy CPU, memory and disk are, and tells when one of them crosses its limit."""

    name = "system_monitor"
    priority = 8  # 0 to 10: from every tenth iteration to every one; 7 to 9 is every second

    @dataclass
    class Config:
        """Limits in percent; another instance, or a table `[agents.system_monitor]` in ael.toml, can have others."""

        cpu: float = 80.0
        memory: float = 90.0
        disk: float = 90.0
        path: str = "/"

    config: Config

    async def on_start(self, context: StateContext) -> None:
        psutil.cpu_percent()  # each call measures since the one before, so the first needs a moment behind it
        await asyncio.sleep(0.1)

    async def on_tick(self, context: StateContext) -> None:
        metrics = {
            "cpu": psutil.cpu_percent(),
            "memory": psutil.virtual_memory().percent,
            "disk": psutil.disk_usage(self.config.path).percent,
        }
        # What a hook does takes effect together when it returns, and not at all if it raises.
        context.update({f"metrics_{name}": percent for name, percent in metrics.items()})
        self.warn(context, "high_cpu", metrics["cpu"], self.config.cpu)
        self.warn(context, "low_memory", metrics["memory"], self.config.memory)
        self.warn(context, "low_disk", metrics["disk"], self.config.disk)

    def warn(self, context: StateContext, event: str, percent: float, limit: float) -> None:
        """Emit an event when a limit is crossed, not as long as it stays so."""
        is_over = percent >= limit
        if is_over and not context.own.get(event, False):
            context.emit(event, {"percent": percent, "limit": limit})
        context.own.set(event, is_over)  # the agent's own part of the state: agent/system_monitor/high_cpu


class AlertHandler(AgentBase):
    """Reacts to the monitor's events: counts them and keeps the last ten."""

    name = "alert_handler"
    priority = 9
    subscriptions = ("high_cpu", "low_*")

    async def on_event(self, event: Event, context: StateContext) -> None:
        # Counted exactly once, also when the process is killed on the way. The line that it prints is outside the
        # database, so after a kill it can come twice.
        number = context.increment("alerts")
        alert = {"type": event.type, "at": event.timestamp.isoformat(timespec="seconds"), **event.data}
        context.set("last_alerts", [*context.get("last_alerts", []), alert][-10:])
        print(f"alert {number}: {event.type} from {event.source}: {event.data['percent']} %")


class TaskScheduler(AgentBase):
    """Keeps a list of timed tasks in the state, and takes each up when its time has come.

    Anybody may add to `scheduled_tasks`. Where there is nothing in it, it plans its own next report.
    """

    name = "task_scheduler"
    priority = 7

    @dataclass
    class Config:
        """How long until the next report, in seconds."""

        report_every: float = 10.0

    config: Config

    async def on_tick(self, context: StateContext) -> None:
        pending = context.get("pending_task")
        if pending is not None:
            self.work_on(pending, context)

        # Times are ISO texts of one form, so their order is that of time. `context.now` is the same all through a tick.
        now = context.now
        tasks: list[Any] = context.get("scheduled_tasks", [])  # a copy: changing it changes nothing before `set`
        due = next((task for task in tasks if task["time"] <= now.isoformat(timespec="seconds")), None)
        if due is not None:
            tasks.remove(due)
            context.set("pending_task", due)
        if not tasks:
            time = now + timedelta(seconds=self.config.report_every)
            number = context.own.increment("reports")
            tasks.append({"name": f"report {number}", "time": time.isoformat(timespec="seconds")})
        context.set("scheduled_tasks", tasks)

    def work_on(self, task: dict[str, Any], context: StateContext) -> None:
        """Do a task, and move it to those that are done."""
        result = {name: context.get(f"metrics_{name}") for name in ("cpu", "memory", "disk")}
        done = {**task, "result": result, "done": context.now.isoformat(timespec="seconds")}
        context.set("done_tasks", [*context.get("done_tasks", []), done][-10:])
        context.delete("pending_task")

"""The agents as they were known at a past moment, in the shape of `v_agents`.

What they were is told as a fork tells it (`past_agents.py`), so that `ael agents list --at 412` says of a database
what `ael agents list` says of its fork at that iteration.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, text

from ael_store.clock import iso
from ael_store.model.records import AgentRecord, AgentStats, Commit
from ael_store.settings import Settings
from ael_store.store.moment import Moment
from ael_store.store.past import Past, Rewind, records_of
from ael_store.store.past_agents import rewind_agents

__all__ = ["agents_at"]


def agents_at(connection: Connection, moment: Moment) -> list[dict[str, Any]]:
    """Return the agents that were known then, in order of their names of then."""
    past = Past(connection, moment)
    if past.is_present:
        return [dict(row) for row in connection.execute(text("SELECT * FROM v_agents ORDER BY name")).mappings()]
    rewind = Rewind(Commit("iteration", moment.commit_id, 0, moment.iteration, None, 0))
    rewind_agents(past, rewind, Settings())
    counted = {stats.agent_id: stats for stats in records_of(past, "agent_stats", AgentStats)} | rewind.commit.stats
    unknown = rewind.removed.get("agents", set()) | rewind.removed.get("agent_stats", set())
    found = []
    for now in records_of(past, "agents", AgentRecord, "id > 0"):
        agent = rewind.commit.agents.get(now.id, now)
        if agent.id in counted and agent.id not in unknown:
            found.append(_row(agent, counted[agent.id]))
    return sorted(found, key=lambda row: str(row["name"]))


def _row(agent: AgentRecord, stats: AgentStats) -> dict[str, Any]:
    if not agent.registered:
        status = "absent"
    elif not agent.enabled:
        status = "disabled"
    else:
        status = "active" if agent.quarantined_us is None else "quarantined"
    return {
        "name": agent.name,
        "priority": agent.priority,
        "enabled": agent.enabled,
        "status": status,
        "tick_count": stats.ticks,
        "error_count": stats.errors,
        "event_count": stats.events,
        "mean_duration_ms": stats.total_us / 1000 / stats.measured if stats.measured else None,
        "max_duration_ms": stats.max_us / 1000 if stats.measured else None,
        "last_tick_at": None if stats.last_tick_us is None else iso(stats.last_tick_us),
        "last_error": agent.last_error,
        "metadata": agent.metadata,
    }

"""Cutting a copy of a database back to a past moment: what came later goes, the rest is as it was.

Rows of the history go by their numbers. The state is told from the changes that stay; everything else that is updated
in place is told by `past_agents.py`, `past_deliveries.py` and `past_tasks.py`, and written by the writer of commits,
so that digests are right. Works on a file that nobody else has: what fails half-way is thrown away.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

from sqlalchemy import Connection, text

from ael_store.clock import SystemClock
from ael_store.model.records import Commit, RunRecord
from ael_store.schema.recent import CHANGES
from ael_store.settings import Settings
from ael_store.store.moment import HORIZON, Horizon, Moment
from ael_store.store.past import Past, Rewind, records_of
from ael_store.store.past_agents import rewind_agents, rewind_positions, rewind_schedules
from ael_store.store.past_deliveries import rewind_delayed, rewind_deliveries
from ael_store.store.past_metrics import rewind_metrics
from ael_store.store.past_tasks import rewind_limits, rewind_tasks
from ael_store.store.prune import PRUNING
from ael_store.store.writer import Writer

__all__ = ["HOLDER", "Cut"]

HOLDER = "ael fork"

LATER: dict[str, str] = {
    "tick_errors": "tick_id > :tick_id",
    "ticks": "id > :tick_id",
    "state_changes": "id > :change_id",
    "events": "id > :event_id",
    "iterations": "id > :iteration",
    "commits": "id > :commit_id",
    "moves": "id > :move_id",
    "commands": "commit_id > :commit_id",
    "runs": "id > :run_id",
    "agent_marks": "iteration > :iteration",
    "metric_samples": "iteration > :iteration",
    "row_digests": "row_id > CASE kind WHEN 'ticks' THEN :tick_id WHEN 'state_changes' THEN :change_id "
    "WHEN 'events' THEN :event_id WHEN 'moves' THEN :move_id "
    "ELSE (SELECT coalesce(max(id), 0) FROM commands WHERE commit_id <= :commit_id) END",
}
"""Which rows of the history lie after a moment."""

KEYS = {
    "agents": "id",
    "agent_stats": "agent_id",
    "agent_totals": "agent_id",
    "schedules": "agent_id",
    "positions": "name",
    "subscriptions": "id",
    "subscription_patterns": "subscription_id",
    "dead_letters": "id",
    "delayed_events": "id",
    "tasks": "id",
    "task_attempts": "id",
    "metric_hours": "rowid",
    "metrics": "id",
}
"""Tables whose rows are looked at one by one, and how they are named in a `Rewind`."""


class Cut:
    """What it takes to bring a database back to a moment, found out in one transaction that only reads."""

    def __init__(self, connection: Connection, moment: Moment, settings: Settings) -> None:
        self.past = past = Past(connection, moment)
        self.token = (
            past.number("SELECT max(token) FROM (SELECT token FROM lease UNION ALL SELECT token FROM runs)") + 1
        )
        self.rewind = rewind = Rewind(
            Commit("iteration", 0, self.token, moment.iteration, None, SystemClock().now_us())
        )
        rewind_agents(past, rewind, settings)
        rewind_schedules(past, rewind)
        rewind_positions(past, rewind)
        rewind_deliveries(past, rewind)
        rewind_delayed(past, rewind)
        self.tasks_left = rewind_tasks(past, rewind)
        """Tasks that were not over."""
        rewind_limits(past, rewind)
        rewind_metrics(past, rewind)
        self._end_run()
        self._bound_horizon()
        self._where = {**asdict(moment), "move_id": past.move_id, "run_id": past.run_id}
        del self._where["started_us"]

    def _end_run(self) -> None:
        """The run of that moment ends with it. A fork is no crash, so nobody is blamed for it."""
        past = self.past
        for run in records_of(past, "runs", RunRecord, "id = :r", r=past.run_id):
            if run.status == "running" or not past.is_present:
                last = max(past.moment.iteration, run.first_iteration - 1)
                self.rewind.commit.runs.append(
                    replace(run, status="stopped", ended_us=past.ended_us, last_iteration=last)
                )

    def _bound_horizon(self) -> None:
        """Events may have been removed beyond the moment; its numbers are given out again."""
        bound, positions = self.past.moment.event_id, self.rewind.commit.positions

        def bounded(horizon: dict[str, Any]) -> dict[str, Any]:
            return {**horizon, "forgotten_event_id": min(horizon["forgotten_event_id"], bound)}

        if self.past.horizon.forgotten_event_id > bound:
            positions[HORIZON] = Horizon(**bounded(asdict(self.past.horizon))).to_json()
        for (value,) in self.past.rows("SELECT value FROM positions WHERE name = :name", name=PRUNING):
            if (pruning := json.loads(value)) is not None:
                then = {**pruning, "before": bounded(pruning["before"]), "to": bounded(pruning["to"])}
                if then != pruning:
                    positions[PRUNING] = json.dumps(then, separators=(",", ":"))

    # -- what goes --

    def count(self) -> dict[str, int]:
        """Return how many rows of each table go."""
        past = self.past
        found = {
            table: past.number(f"SELECT count(*) FROM {table} WHERE {where}", **self._of(where))
            for table, where in LATER.items()
        }
        for table, keys in self.rewind.removed.items():
            there = f"SELECT count(*) FROM {table} WHERE {KEYS[table]} = :key"
            found[table] = sum(past.number(there, key=key) for key in keys)
        return {table: number for table, number in sorted(found.items()) if number}

    def _of(self, where: str) -> dict[str, Any]:
        return {name: value for name, value in self._where.items() if f":{name}" in where}

    def carry_out(self, connection: Connection) -> dict[str, int]:
        """Remove what came later and tell the state anew; returns how many rows of each table went."""
        self._tell_state(connection)
        found: dict[str, int] = {}
        for table, where in reversed(LATER.items()):
            found[table] = connection.execute(text(f"DELETE FROM {table} WHERE {where}"), self._of(where)).rowcount
        for table, keys in self.rewind.removed.items():
            gone = text(f"DELETE FROM {table} WHERE {KEYS[table]} = :key")
            found[table] = sum(connection.execute(gone, {"key": key}).rowcount for key in keys)
        for agent in self.rewind.commit.agents.values():  # names are unique, and may go from one to another
            aside = text("UPDATE agents SET name = '(' || id || ')' WHERE id = :id AND name <> :name")
            connection.execute(aside, {"id": agent.id, "name": agent.name})
        return {table: number for table, number in sorted(found.items()) if number}

    def write_back(self, connection: Any, lease_token: int) -> None:
        """Write the rows that were different, and take the lease, on a connection of the driver."""
        Writer().write(connection, self.rewind.commit, take_from=lease_token, holder=HOLDER)

    # -- the state --

    def _tell_state(self, connection: Connection) -> None:
        """Give each key that was changed later the value of its newest change up to the moment."""
        change = self.past.moment.change_id
        changed = connection.execute(
            text("SELECT key_id, count(*), sum(value IS NULL) FROM state_changes WHERE id > :c GROUP BY key_id"),
            {"c": change},
        ).all()
        newest = text(
            f"SELECT c.id, c.value, coalesce(t.agent_id, 0) FROM {CHANGES} c LEFT JOIN ticks t ON t.id = c.tick_id "
            "WHERE c.key_id = :k AND c.id <= :c ORDER BY c.id DESC LIMIT 1"
        )
        counted = text(
            f"SELECT count(*) FROM {CHANGES} "
            "WHERE key_id = :k AND id <= :c AND id > (SELECT coalesce(max(id), 0) "
            f"FROM {CHANGES} WHERE key_id = :k AND id <= :c AND value IS NULL)"
        )
        for key, later, deletions in changed:
            where = {"k": key, "c": change}
            found = connection.execute(newest, where).first()
            version = connection.execute(text("SELECT version FROM state WHERE key_id = :k"), {"k": key}).scalar()
            connection.execute(text("DELETE FROM state WHERE key_id = :k"), {"k": key})
            if found is None or found[1] is None:
                continue
            # What lies before the horizon is not there to be counted, but in the version that the key has now.
            was = version - later if version is not None and not deletions else None
            connection.execute(
                text(
                    "INSERT INTO state (key_id, value, version, change_id, agent_id) VALUES (:k, :value, :v, :id, :a)"
                ),
                {
                    "k": key,
                    "id": found[0],
                    "value": found[1],
                    "a": found[2],
                    "v": was if was is not None else connection.execute(counted, where).scalar(),
                },
            )

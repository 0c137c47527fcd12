"""Answers to users' questions about the present, through the public views.

What they need is a way to ask: `Reader` has it on SQLAlchemy, `PlainReader` on the driver alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from ael_store.clock import iso
from ael_store.errors import AgentNotFound
from ael_store.model.event import glob_of

__all__ = ["Answers", "Ask", "Row", "literal"]

Row = dict[str, Any]
Ask = Callable[..., list[Row]]
"""`ask(sql, **parameters)` returns the rows of a query as dictionaries."""


class Answers:
    """Questions to one database; what is asked within one of them is of one moment."""

    path: Path

    def asking(self) -> AbstractContextManager[Ask]:
        """A way to ask a few questions that see the same moment."""
        raise NotImplementedError

    def rows(self, sql: str, **parameters: Any) -> list[Row]:
        """Return the rows of a query as dictionaries."""
        with self.asking() as ask:
            return ask(sql, **parameters)

    def value(self, key: str) -> str | None:
        """Return the JSON text of a key, None where there is none."""
        found = self.rows("SELECT value FROM v_state WHERE key = :key", key=key)
        return found[0]["value"] if found else None

    def state(self, prefix: str = "") -> list[Row]:
        """Return the current state in order of the keys."""
        return self.rows(
            "SELECT key, value, version, agent, iteration, updated_at FROM v_state WHERE key GLOB :glob ORDER BY key",
            glob=literal(prefix) + "*",
        )

    def events(
        self,
        *,
        type: str | None = None,
        source: str | None = None,
        after: int | None = None,
        limit: int = 100,
    ) -> list[Row]:
        """Return events in order: the newest `limit`, or with `after` the first `limit` that follow it."""
        where, parameters = [], {"limit": limit}
        if type is not None:
            where.append("type GLOB :type" if "*" in type else "type = :type")
            parameters["type"] = glob_of(type) if "*" in type else type  # type: ignore[assignment]
        if source is not None:
            where.append("source = :source")
            parameters["source"] = source  # type: ignore[assignment]
        if after is not None:
            where.append("id > :after")
            parameters["after"] = after
        order = "DESC" if after is None else "ASC"
        rows = self.rows(
            "SELECT id, type, source, data, metadata, iteration, emitted_at FROM v_events "
            + (f"WHERE {' AND '.join(where)} " if where else "")
            + f"ORDER BY id {order} LIMIT :limit",
            **parameters,
        )
        return rows if after is not None else rows[::-1]

    def dead_letters(
        self, *, subscriber: str | None = None, type: str | None = None, event_id: int | None = None, limit: int = 100
    ) -> list[Row]:
        """Return the newest deliveries that were given up, oldest first, each with what `redeliver` would deliver.

        `requested_at` says when that was asked for; None where it was not.
        """
        where, parameters = [], {"limit": limit}
        for column, wanted in (("v.subscriber", subscriber), ("v.event_id", event_id), ("v.type", type)):
            if wanted is not None:
                name = column[2:]
                pattern = column == "v.type" and "*" in str(wanted)
                where.append(f"{column} GLOB :{name}" if pattern else f"{column} = :{name}")
                parameters[name] = glob_of(str(wanted)) if pattern else wanted  # type: ignore[assignment]
        rows = self.rows(
            "SELECT v.subscriber, v.event_id, v.type, v.attempts, v.error, v.failed_at, e.source, e.data, e.metadata, "
            "(SELECT strftime('%Y-%m-%dT%H:%M:%SZ', max(d.requested_us) / 1000000, 'unixepoch') FROM dead_letters d "
            "JOIN subscriptions s ON s.id = d.subscription_id WHERE d.event_id = v.event_id "
            "AND s.subscriber = v.subscriber AND d.redelivered_us IS NULL) AS requested_at "
            "FROM v_dead_letters v JOIN v_events e ON e.id = v.event_id "
            + (f"WHERE {' AND '.join(where)} " if where else "")
            + "ORDER BY v.event_id DESC, v.subscriber LIMIT :limit",
            **parameters,
        )
        return rows[::-1]

    def agents(self) -> list[Row]:
        """Return every known agent in order of the names."""
        return self.rows("SELECT * FROM v_agents ORDER BY name")

    def agent(self, name: str) -> Row:
        """Return what is known of one agent: statistics, flags, schedule, subscriptions, last ticks.

        Raises AgentNotFound, naming the agents that exist.
        """
        found = self.rows("SELECT * FROM v_agents WHERE name = :name", name=name)
        if not found:
            known = ", ".join(row["name"] for row in self.agents()) or "none"
            raise AgentNotFound(f"no agent {name!r} is known to {self.path}; known are: {known}")
        row = found[0]
        row["class"] = self.rows("SELECT class_path FROM agents WHERE name = :name", name=name)[0]["class_path"]
        row["subscriptions"] = self.rows(
            "SELECT p.pattern AS pattern, s.cursor AS cursor FROM subscriptions s "
            "JOIN subscription_patterns p ON p.subscription_id = s.id "
            "WHERE s.subscriber = :name AND s.ended_us IS NULL ORDER BY p.pattern",
            name=name,
        )
        row["schedule"] = next(
            iter(
                self.rows(
                    'SELECT s."trigger" AS "trigger", '
                    "strftime('%Y-%m-%dT%H:%M:%SZ', s.next_us / 1000000, 'unixepoch') AS next_at, "
                    "strftime('%Y-%m-%dT%H:%M:%SZ', s.last_us / 1000000, 'unixepoch') AS last_at "
                    "FROM schedules s JOIN agents a ON a.id = s.agent_id WHERE a.name = :name",
                    name=name,
                )
            ),
            None,
        )
        row["last_ticks"] = self.rows(
            "SELECT iteration, kind, outcome, started_at, duration_ms, error FROM v_ticks "
            "WHERE agent = :name ORDER BY id DESC LIMIT 10",
            name=name,
        )
        return row

    def tasks(
        self, *, status: str | None = None, agent: str | None = None, name: str | None = None, limit: int = 100
    ) -> list[Row]:
        """Return the newest tasks, oldest first, each with why it is held and, of a question, its text."""
        wanted = {"status": status, "agent": agent, "name": name}
        parameters = {column: value for column, value in wanted.items() if value is not None}
        where = " AND ".join(f"v.{column} = :{column}" for column in parameters)
        if status is not None and status not in ("done", "failed", "cancelled"):
            where += " AND q.applied_us IS NULL"  # those are few, and their index is small
        rows = self.rows(
            "SELECT v.*, q.held AS held, q.question AS question FROM tasks q JOIN v_tasks v ON v.id = q.id "
            + (f"WHERE {where} " if where else "")
            + "ORDER BY q.id DESC LIMIT :most",
            **parameters,
            most=limit,
        )
        return rows[::-1]

    def task(self, task_id: int) -> Row | None:
        """Return all about one task, its attempts as `attempts_made`; None where there is none."""
        instant = "strftime('%Y-%m-%dT%H:%M:%S', {0} / 1000000, 'unixepoch') || printf('.%06dZ', {0} % 1000000)"
        found = self.rows(
            "SELECT v.*, q.held AS held, q.question AS question, q.answered_by AS answered_by, "
            f"{instant.format('q.applied_us')} AS applied_at, q.apply_error AS apply_error "
            "FROM v_tasks v JOIN tasks q ON q.id = v.id WHERE v.id = :id",
            id=task_id,
        )
        if not found:
            return None
        attempts = self.rows(
            f"SELECT number, outcome, {instant.format('started_us')} AS started_at, "
            f"{instant.format('ended_us')} AS ended_at, cost_usd, reserved_usd, error, traceback "
            "FROM task_attempts WHERE task_id = :id ORDER BY number",
            id=task_id,
        )
        return {**found[0], "attempts_made": attempts}

    def metrics(self, channel: str | None = None) -> list[Row]:
        """Return every metric, or those of a channel, and what it stands at, in order of channel and name."""
        where = "" if channel is None else "WHERE channel = :channel "
        known = {} if channel is None else {"channel": channel}
        return self.rows(f"SELECT * FROM v_metric_series {where}ORDER BY channel, name", **known)

    def samples(self, channel: str, name: str, limit: int = 100) -> list[Row]:
        """Return the newest samples of a metric, oldest first."""
        rows = self.rows(
            "SELECT id, value, agent, iteration, recorded_at FROM v_metrics "
            "WHERE channel = :channel AND name = :name ORDER BY id DESC LIMIT :most",
            channel=channel,
            name=name,
            most=limit,
        )
        return rows[::-1]

    def metric_hours(self, channel: str, name: str, limit: int = 48) -> list[Row]:
        """Return the newest hours of a metric, oldest first; the last one may not be over."""
        rows = self.rows(
            'SELECT hour, samples, total, mean, "min", "max", "last" FROM v_metric_hours '
            "WHERE channel = :channel AND name = :name ORDER BY hour DESC LIMIT :most",
            channel=channel,
            name=name,
            most=limit,
        )
        return rows[::-1]

    def limits(self) -> list[Row]:
        """Return every limit with what is used of it."""
        return self.rows("SELECT * FROM v_limits ORDER BY name")

    def status(self) -> Row:
        """Return the whole in a few figures: last run, iteration, counts, problems."""
        with self.asking() as ask:

            def one(sql: str) -> Any:
                return next((next(iter(row.values())) for row in ask(sql)), None)

            run = next(iter(ask("SELECT * FROM v_runs ORDER BY run_id DESC LIMIT 1")), None)
            last = next(iter(ask("SELECT * FROM v_iterations ORDER BY iteration DESC LIMIT 1")), None)
            counts = "SELECT status, count(*) AS n FROM {} GROUP BY status"
            return {
                "database": str(self.path),
                "revision": one("SELECT version_num FROM alembic_version"),
                "iteration": 0 if last is None else last["iteration"],
                "paused": one("SELECT value FROM positions WHERE name = 'paused'") == "true",
                "last_iteration": last,
                "run": run,
                "agents": {row["status"]: row["n"] for row in ask(counts.format("v_agents"))},
                "keys": one("SELECT count(*) FROM state"),
                "pending": one("SELECT count(*) FROM v_pending"),
                "dead_letters": one("SELECT count(*) FROM v_dead_letters"),
                "tasks": {row["status"]: row["n"] for row in ask(counts.format("tasks WHERE applied_us IS NULL"))},
                "problems": ask("SELECT * FROM v_problems"),
                "forked": _parent(one("SELECT value FROM meta WHERE name = 'forked'")),
            }


def _parent(fact: str | None) -> Row | None:
    """Return what a fork notes of its parent; None where this is no fork."""
    if fact is None:
        return None
    noted = json.loads(fact)
    return {name: noted[name] for name in ("from", "instance", "iteration", "moment")} | {"at": iso(noted["at_us"])}


def literal(prefix: str) -> str:
    """Return a prefix as a pattern of GLOB that stands for itself."""
    return re.sub(r"[\[?*]", lambda found: f"[{found[0]}]", prefix)

"""A small life of a database at each revision, written by plain SQL, and digests to compare it by.

What is written is consistent: ids follow each other, cursors point into the event log, the state is what its
changes add up to. So every view of every revision has rows to show.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ael_store.model.event import REDACTED

Layout = Mapping[str, Sequence[str]]
"""The columns of each table."""

BEGAN_US = 1_760_000_000_000_000
SECOND_US = 1_000_000
AGENTS = ("collector", "kitchen", "wächter")


def connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA foreign_keys = ON")
    return connection


def ask(path: Path, query: str, *parameters: object) -> list[Any]:
    """Return the rows that a query gives, or make a change, on a connection of its own."""
    connection = connect(path)
    try:
        return connection.execute(query, parameters).fetchall()
    finally:
        connection.close()


def execute(path: Path, script: str) -> None:
    """Run statements on a connection of its own; foreign keys are not enforced."""
    connection = sqlite3.connect(path)
    try:
        connection.executescript(script)
    finally:
        connection.close()


def fill(path: Path, revision: str, *, iterations: int = 40) -> None:
    """Write a run that crashed and one that goes on into a database that is at `revision`."""
    connection = connect(path)
    try:
        connection.execute("BEGIN IMMEDIATE")
        _core(connection, iterations)
        if revision >= "0002":
            _delivery_and_schedules(connection)
        if revision >= "0003":
            _commands_and_tasks(connection)
        if revision >= "0004":
            _digests_and_redelivery(connection)
        if revision >= "0005":
            _attempts_limits_and_replies(connection)
        if revision >= "0006":
            _hours(connection)
        if revision >= "0007":
            _metrics(connection)
        if revision >= "0008":
            _recent(connection)
        connection.execute("COMMIT")
    finally:
        connection.close()


def _insert(connection: sqlite3.Connection, table: str, **values: object) -> None:
    marks = ", ".join("?" * len(values))
    connection.execute(f"INSERT INTO {table} ({', '.join(values)}) VALUES ({marks})", tuple(values.values()))


def _recent(connection: sqlite3.Connection) -> None:
    """The last units are in no index yet."""
    (first,) = connection.execute("SELECT max(id) - 10 FROM ticks").fetchone()
    for table, column in (("ticks", "id"), ("state_changes", "tick_id"), ("events", "tick_id")):
        connection.execute(f"UPDATE {table} SET recent = 1 WHERE {column} >= ?", (first,))


def _core(connection: sqlite3.Connection, iterations: int) -> None:
    middle = iterations // 2
    for run, first, last in ((1, 1, middle), (2, middle + 1, None)):
        began = BEGAN_US + (first - 1) * SECOND_US
        ended = None if last is None else BEGAN_US + last * SECOND_US
        _insert(
            connection,
            "runs",
            id=run,
            status="running" if last is None else "crashed",
            started_us=began,
            ended_us=ended,
            first_iteration=first,
            last_iteration=last,
            pid=4711 + run,
            host="edge",
            version="0.1.0",
            token=run,
            tick_rate="1.0",
        )
        commit = first + run - 1
        _insert(connection, "commits", id=commit, kind="start", iteration=first - 1, run_id=run, at_us=began)
    connection.execute("UPDATE lease SET token = 2, holder = 'pid 4713 on edge (loop)', taken_us = ?", (began,))

    for number, name in enumerate(AGENTS, 1):
        is_quarantined = number == len(AGENTS)
        errors = iterations // 7 if is_quarantined else 0
        _insert(
            connection,
            "agents",
            id=number,
            name=name,
            class_path=f"agents:{name.title()}",
            fingerprint=hashlib.sha256(name.encode()).hexdigest(),
            priority=number * 3,
            enabled=1,
            operator_enabled=None if number == 1 else 1,
            registered=1,
            failures=20 if is_quarantined else 0,
            quarantined_us=BEGAN_US if is_quarantined else None,
            metadata=json.dumps({"unit": "°C", "place": number}, ensure_ascii=False),
            last_error="ValueError: no reading" if is_quarantined else None,
            last_error_us=BEGAN_US if is_quarantined else None,
            created_us=BEGAN_US,
        )
        _insert(
            connection,
            "agent_stats",
            agent_id=number,
            ticks=iterations - errors,
            errors=errors,
            events=0,
            measured=iterations,
            total_us=iterations * 1500,
            max_us=9000,
            ewma_us=1500,
            last_tick_us=BEGAN_US + iterations * SECOND_US,
        )
        _insert(connection, "keys", id=number, name=f"agent/{name}/reading")
        _insert(connection, "event_types", id=number, name=f"{name}.read")
        _insert(connection, "event_sources", id=number, name=name)
        _insert(
            connection,
            "subscriptions",
            id=number,
            subscriber=name,
            agent_id=number,
            cursor=iterations,
            attempts=0,
            created_us=BEGAN_US,
            seen_us=BEGAN_US + iterations * SECOND_US,
        )
        _insert(connection, "subscription_patterns", subscription_id=number, pattern="*.read", glob="*.read")
    _insert(connection, "keys", id=len(AGENTS) + 1, name="note [1]?")

    tick = change = 0
    last_change: dict[int, int] = {}
    value = "null"
    for iteration in range(1, iterations + 1):
        started = BEGAN_US + iteration * SECOND_US
        run = 1 if iteration <= middle else 2
        _insert(
            connection,
            "iterations",
            id=iteration,
            run_id=run,
            commit_id=iteration + run,
            clock=iteration,
            started_us=started,
            duration_us=2500,
            ticks=len(AGENTS),
            errors=1 if iteration % 7 == 0 else 0,
            events=len(AGENTS),
            missed=iteration % 3,
            tick_id=tick,
        )
        for place, agent in enumerate(range(1, len(AGENTS) + 1)):
            failed = iteration % 7 == 0 and agent == len(AGENTS)
            tick += 1
            _insert(
                connection,
                "ticks",
                id=tick,
                iteration=iteration,
                place=place,
                agent_id=agent,
                kind=0,
                outcome=1 if failed else 0,
                started_us=started,
                duration_us=1500,
                seed=tick * 17,
                change_id=change,
                event_id=change,
                changes=0 if failed else 1,
                events=0 if failed else 1,
                seen_change_id=change - 1 if failed else None,
            )
            if failed:
                _insert(
                    connection,
                    "tick_errors",
                    tick_id=tick,
                    type="ValueError",
                    message="no reading",
                    traceback="Traceback …\nValueError: no reading\n",
                )
                continue
            change += 1
            value = json.dumps({"n": iteration, "text": "naïve ✓ " * 5}, ensure_ascii=False)
            _insert(
                connection,
                "state_changes",
                id=change,
                key_id=agent,
                value=value,
                previous_id=last_change.get(agent),
                tick_id=tick,
            )
            last_change[agent] = change
            _insert(
                connection,
                "events",
                id=change,
                type_id=agent,
                source_id=agent,
                data=value,
                metadata=None if iteration % 2 else '{"trace": "a1"}',
                timestamp_us=None if iteration % 2 else started + 1,
                tick_id=tick,
            )
            _insert_state(connection, agent, value, change)


def _insert_state(connection: sqlite3.Connection, agent: int, value: str, change: int) -> None:
    connection.execute(
        "INSERT INTO state (key_id, value, version, change_id, agent_id) VALUES (?, ?, 1, ?, ?) "
        "ON CONFLICT (key_id) DO UPDATE SET value = excluded.value, version = version + 1, "
        "change_id = excluded.change_id",
        (agent, value, change, agent),
    )


def _delivery_and_schedules(connection: sqlite3.Connection) -> None:
    connection.execute("UPDATE subscriptions SET skipped = 5 WHERE id = 2")
    for number in (1, 2):
        _insert(
            connection,
            "dead_letters",
            id=number,
            subscription_id=number,
            event_id=number,
            attempts=5,
            error="TimeoutError: 60 s",
            tick_id=number,
            failed_us=BEGAN_US + number,
            redelivered_us=None if number == 1 else BEGAN_US + 9 * SECOND_US,
        )
        _insert(
            connection,
            "delayed_events",
            id=number,
            due_us=BEGAN_US + 86_400 * SECOND_US,
            type="report.due",
            source=AGENTS[0],
            data='{"day": 3}',
            metadata=None,
            tick_id=number,
            event_id=None,
        )
        _insert(
            connection,
            "schedules",
            agent_id=number,
            trigger="every 30s",
            next_us=BEGAN_US + 30 * SECOND_US,
            last_us=BEGAN_US,
        )
        _insert(
            connection,
            "moves",
            id=number,
            commit_id=number,
            kind="flag",
            subject=AGENTS[0],
            value='"disabled"',
        )
    _insert(connection, "positions", name="round_robin", value='{"next": "kitchen"}')


def _commands_and_tasks(connection: sqlite3.Connection) -> None:
    for number, status in enumerate(("waiting", "held", "running", "done", "failed", "cancelled"), 1):
        is_over = status in ("done", "failed", "cancelled")
        _insert(
            connection,
            "tasks",
            id=number,
            agent_id=1,
            name="send_mail",
            key=f"mail/{number}",
            status=status,
            attempts=number,
            priority=5,
            limit_name="smtp",
            args='["a@example.org"]',
            result='{"sent": true}' if status == "done" else None,
            error="OSError: refused" if status == "failed" else None,
            cost_usd="0.0125",
            created_us=BEGAN_US,
            next_us=None if is_over else BEGAN_US + SECOND_US,
            started_us=BEGAN_US + SECOND_US,
            ended_us=BEGAN_US + 2 * SECOND_US if is_over else None,
            tick_id=number,
        )
    _insert(
        connection,
        "commands",
        id=1,
        commit_id=1,
        at_us=BEGAN_US,
        actor="root (0), pid 99",
        name="agents.disable",
        arguments='{"name": "kitchen"}',
        error=None,
    )


def _digests_and_redelivery(connection: sqlite3.Connection) -> None:
    connection.execute("UPDATE dead_letters SET requested_us = ? WHERE id = 1", (BEGAN_US + SECOND_US,))
    connection.execute("UPDATE events SET hops = 2 WHERE id = 3")
    connection.execute("UPDATE agents SET deaths = 1 WHERE id = 2")
    connection.execute("UPDATE events SET data = ?, metadata = NULL WHERE id = 1", (REDACTED,))
    _insert(connection, "row_digests", kind="events", row_id=1, digest=4_000_000_000, why="redacted")
    _insert(connection, "agent_totals", agent_id=1, tick_id=3, ticks=0, errors=0, events=0)
    _insert(connection, "positions", name="paused_because", value="null")


def _attempts_limits_and_replies(connection: sqlite3.Connection) -> None:
    connection.execute("UPDATE events SET target_id = 1 WHERE id = 2")
    connection.execute("UPDATE ticks SET cause_task_id = 4 WHERE id = 5")
    connection.execute(
        "UPDATE tasks SET applied_us = ?, applied_tick_id = 5 WHERE ended_us IS NOT NULL", (BEGAN_US + 3 * SECOND_US,)
    )
    connection.execute("UPDATE tasks SET held = 'this database is a copy' WHERE status = 'held'")
    made = 0
    for task, status in connection.execute("SELECT id, status FROM tasks ORDER BY id").fetchall():
        for number in range(1, task + 1):
            made += 1
            is_last = number == task
            is_open = is_last and status == "running"
            outcome = status if is_last and status in ("running", "done", "failed", "cancelled") else "interrupted"
            _insert(
                connection,
                "task_attempts",
                id=made,
                task_id=task,
                number=number,
                run_id=1,
                limit_name="smtp",
                outcome=outcome,
                started_us=BEGAN_US + SECOND_US,
                ended_us=None if is_open else BEGAN_US + 2 * SECOND_US,
                reserved_usd="0.02",
                cost_usd="0.0125" if number == 1 else None,
                error=None,
                traceback=None,
            )
    _insert(
        connection,
        "limits",
        name="smtp",
        per_minute=60,
        usd_per_day="5",
        configured='{"per_minute":60,"usd_per_day":"5"}',
        raised="{}",
        opened=0,
        blocked_us=BEGAN_US,
        blocked_because="60 a minute",
        blocked_until_us=BEGAN_US + 60 * SECOND_US,
    )


def _hours(connection: sqlite3.Connection) -> None:
    for hour in range(3):
        _insert(
            connection,
            "agent_marks",
            agent_id=1,
            hour_us=BEGAN_US + hour * 3600 * SECOND_US,
            iteration=10 * hour,
            ticks=10 * hour,
            errors=hour,
            events=2 * hour,
            measured=11 * hour,
            total_us=5000 * hour,
        )


def _metrics(connection: sqlite3.Connection) -> None:
    connection.execute("UPDATE agents SET data_version = 3 WHERE id = 1")
    hour = 3600 * SECOND_US
    began = BEGAN_US // hour * hour
    for metric, (channel, name, kind) in enumerate(
        (("kitchen", "temperature", "gauge"), ("kitchen", "reads", "counter"), ("collector", "fetch", "timing")), 1
    ):
        for place in range(4):
            _insert(
                connection,
                "metric_samples",
                id=4 * (metric - 1) + place + 1,
                metric_id=metric,
                agent_id=1,
                iteration=10 * place,
                at_us=began + place * hour // 2,
                value=place + 0.5,
            )
        _insert(
            connection,
            "metrics",
            id=metric,
            channel=channel,
            name=name,
            kind=kind,
            samples=4,
            total=8.0,
            value=3.5,
            updated_us=began + 3 * hour // 2,
            hour_us=began + hour,
            hour_samples=2,
            hour_total=6.0,
            hour_least=2.5,
            hour_most=3.5,
        )
        _insert(
            connection,
            "metric_hours",
            metric_id=metric,
            hour_us=began,
            samples=2,
            total=2.0,
            least=0.5,
            most=1.5,
            last=1.5,
        )


def layout(path: Path) -> dict[str, list[str]]:
    """Return the tables of a database, Alembic's own left out, with their columns."""
    tables = [
        name
        for (name,) in ask(path, "SELECT name FROM sqlite_schema WHERE type = 'table' ORDER BY 1")
        if name != "alembic_version" and not name.startswith("sqlite_")
    ]
    return {table: [column for _, column, *_ in ask(path, f"PRAGMA table_info({table})")] for table in tables}


def common(one: Layout, other: Layout) -> dict[str, list[str]]:
    """Return what two layouts share."""
    return {table: [column for column in one[table] if column in other[table]] for table in one if table in other}


def digests(path: Path, of: Layout) -> dict[str, tuple[int, str]]:
    """Return the number of rows and a digest of all rows of each table, the columns of `of` only."""
    result: dict[str, tuple[int, str]] = {}
    for table, columns in of.items():
        names = ", ".join(f'"{column}"' for column in columns)
        rows = ask(path, f"SELECT {names} FROM {table} ORDER BY {names}")
        result[table] = (len(rows), hashlib.sha256(repr(rows).encode()).hexdigest())
    return result


def view_rows(path: Path) -> dict[str, int]:
    """Ask each view for all its rows, and return how many there were."""
    views = [name for (name,) in ask(path, "SELECT name FROM sqlite_schema WHERE type = 'view'")]
    return {view: len(ask(path, f"SELECT * FROM {view}")) for view in views}

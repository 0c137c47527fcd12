"""Making what was saved of a damaged database consistent again: everything here works on the new file.

What was lost leaves references behind. A name that is gone becomes `(lost 17)`, a run that is gone is told from its
iterations, a value of the state is told from the newest change of its key. Rows that make no sense without another
one are dropped. And the numbers that were given out stay given out: where the newest rows are gone, the highest
number that others mention is noted, and the next run goes on after it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

__all__ = [
    "Columns",
    "StateReport",
    "close_history",
    "drop_orphans",
    "last_numbers",
    "missing",
    "missing_commits",
    "name_lost",
    "rebuild",
    "restart_counts",
    "runs_told",
]

Columns = Mapping[str, Collection[str]]
"""The columns of each table."""
Range = tuple[int, int]

NAMED = {
    "key_id": "keys",
    "type_id": "event_types",
    "source_id": "event_sources",
    "target_id": "event_sources",
    "agent_id": "agents",
}
"""Columns that refer to a table of names."""

MENTIONED: dict[str, tuple[tuple[str, str], ...]] = {
    "iterations": (("ticks", "iteration"), ("commits", "iteration"), ("runs", "last_iteration")),
    "ticks": (
        ("iterations", "tick_id"),
        ("state_changes", "tick_id"),
        ("events", "tick_id"),
        ("tick_errors", "tick_id"),
        ("dead_letters", "tick_id"),
        ("delayed_events", "tick_id"),
        ("tasks", "tick_id"),
        ("tasks", "applied_tick_id"),
    ),
    "tasks": (("ticks", "cause_task_id"), ("task_attempts", "task_id")),
    "state_changes": (
        ("state", "change_id"),
        ("state_changes", "previous_id"),
        ("ticks", "change_id + changes"),
        ("ticks", "seen_change_id"),
    ),
    "events": (
        ("ticks", "event_id + events"),
        ("ticks", "cause_event_id"),
        ("subscriptions", "cursor"),
        ("subscriptions", "attempt_event_id"),
        ("dead_letters", "event_id"),
        ("delayed_events", "event_id"),
    ),
    "commits": (("iterations", "commit_id"), ("moves", "commit_id"), ("commands", "commit_id")),
    "subscriptions": (
        ("ticks", "subscription_id"),
        ("dead_letters", "subscription_id"),
        ("subscription_patterns", "subscription_id"),
    ),
}
"""Where numbers of a table stand in others."""

WITHOUT_GAPS = ("iterations", "ticks", "state_changes", "events", "metric_samples")
"""Tables whose numbers have no gaps, so that what is missing can be told exactly."""


@dataclass
class StateReport:
    """What became of keys whose row in `state` is gone."""

    rebuilt: list[str] = field(default_factory=list)
    """Keys that have the value of their newest change again."""
    uncertain: list[str] = field(default_factory=list)
    """Those among them, and deleted ones, of which a newer change may be among the missing ones."""
    lost: list[str] = field(default_factory=list)
    """Keys of which no change was saved either."""


def name_lost(connection: sqlite3.Connection, columns: Columns) -> dict[str, list[int]]:
    """Give a name to what is referred to and has none any more; returns which numbers these are."""
    lost: dict[str, list[int]] = {}
    connection.execute(
        "INSERT OR IGNORE INTO agents (id, name, priority, enabled, registered, failures, metadata, created_us) "
        "VALUES (0, '(outside)', 0, 0, 0, 0, '{}', 0)"
    )
    for column, parent in NAMED.items():
        numbers: set[int] = set()
        for table, known in columns.items():
            if column in known:
                found = connection.execute(
                    f'SELECT DISTINCT "{column}" FROM "{table}" WHERE "{column}" NOT IN (SELECT id FROM "{parent}")'
                )
                numbers.update(number for (number,) in found)
        for number in sorted(numbers):
            if parent == "agents":
                connection.execute(
                    "INSERT INTO agents (id, name, priority, enabled, registered, failures, metadata, created_us) "
                    "VALUES (?, ?, 5, 0, 0, 0, '{}', 0)",
                    (number, f"(lost {number})"),
                )
            else:
                connection.execute(f'INSERT INTO "{parent}" (id, name) VALUES (?, ?)', (number, f"(lost {number})"))
        if numbers:
            lost[parent] = sorted(numbers)
    return lost


def runs_told(connection: sqlite3.Connection) -> int:
    """Write the runs that are gone as far as their iterations tell of them; returns how many."""
    return connection.execute(
        "INSERT INTO runs (id, status, started_us, ended_us, first_iteration, last_iteration, pid, host, version, "
        "token, tick_rate) SELECT run_id, 'crashed', min(started_us), max(started_us), min(id), max(id), 0, "
        "'(lost)', '(lost)', 0, '1.0' FROM iterations WHERE run_id NOT IN (SELECT id FROM runs) GROUP BY run_id"
    ).rowcount


def rebuild(connection: sqlite3.Connection, changes_missing: list[Range]) -> StateReport:
    """Bring `state` to the newest change of each key, where it lost rows; says what can't be told."""
    report = StateReport()
    indexed = _indexed(connection)
    newest_missing = max((end for _begin, end in changes_missing), default=0)
    found = connection.execute(
        "SELECT k.name, k.id, n.change_id, c.value, coalesce(t.agent_id, 0), s.change_id FROM keys AS k "
        "LEFT JOIN (SELECT key_id, max(id) AS change_id FROM state_changes GROUP BY key_id) AS n ON n.key_id = k.id "
        "LEFT JOIN state_changes AS c ON c.id = n.change_id "
        "LEFT JOIN ticks AS t ON t.id = c.tick_id "
        "LEFT JOIN state AS s ON s.key_id = k.id "
        "WHERE s.key_id IS NULL OR s.change_id < n.change_id ORDER BY k.id"
    ).fetchall()
    for name, key, change, value, agent, stale in found:
        if change is None:
            report.lost.append(name)
            continue
        if stale is not None:
            connection.execute("DELETE FROM state WHERE key_id = ?", (key,))
        if value is not None:
            connection.execute(
                "INSERT INTO state (key_id, value, version, change_id, agent_id) SELECT ?, ?, count(*), ?, ? "
                f"FROM state_changes c WHERE key_id = ?{indexed} AND id > (SELECT coalesce(max(id), 0) "
                f"FROM state_changes c WHERE key_id = ?{indexed} AND value IS NULL)",
                (key, value, change, agent, key, key),
            )
            report.rebuilt.append(name)
        if newest_missing > change:
            report.uncertain.append(name)
    return report


def last_numbers(connection: sqlite3.Connection, columns: Columns) -> dict[str, int]:
    """Return the highest number of each table that another one mentions, where its own rows end before that."""
    last: dict[str, int] = {}
    for table, mentions in MENTIONED.items():
        if table not in columns:
            continue
        there = connection.execute(f'SELECT coalesce(max(id), 0) FROM "{table}"').fetchone()[0]
        mentioned = [
            connection.execute(f'SELECT max({expression}) FROM "{where}"').fetchone()[0]
            for where, expression in mentions
            if where in columns and expression.split()[0] in columns[where]
        ]
        highest = max((number for number in mentioned if number is not None), default=0)
        if table == "commits":  # iterations take numbers of commits too
            there = max(there, connection.execute("SELECT coalesce(max(commit_id), 0) FROM iterations").fetchone()[0])
        if highest > there:
            last[table] = highest
    return last


def missing(connection: sqlite3.Connection, table: str, last: int, *, damaged: bool) -> list[Range]:
    """Return the ranges of numbers that a table without gaps should have and has not.

    In a table that was read whole only the end can be missing: older rows may have been pruned.
    """
    lowest, highest = connection.execute(f'SELECT min(id), max(id) FROM "{table}"').fetchone()
    if highest is None:
        return [(1, last)] if last else []
    ranges: list[Range] = []
    if damaged:
        if lowest > 1:
            ranges.append((1, lowest - 1))
        ranges += connection.execute(
            "SELECT id + 1, following - 1 FROM "
            f'(SELECT id, lead(id) OVER (ORDER BY id) AS following FROM "{table}") WHERE following > id + 1'
        ).fetchall()
    if last > highest:
        ranges.append((highest + 1, last))
    return ranges


def drop_orphans(connection: sqlite3.Connection) -> dict[str, int]:
    """Remove rows that refer to rows that are gone; returns how many of each table."""
    dropped: dict[str, int] = {}
    while broken := {(row[0], row[1]) for row in connection.execute("PRAGMA foreign_key_check")}:
        for table, rowid in broken:
            connection.execute(f'DELETE FROM "{table}" WHERE rowid = ?', (rowid,))
            dropped[table] = dropped.get(table, 0) + 1
    if connection.execute("SELECT 1 FROM sqlite_schema WHERE name = 'task_attempts'").fetchone():
        cursor = connection.execute("DELETE FROM task_attempts WHERE task_id NOT IN (SELECT id FROM tasks)")
        if cursor.rowcount:
            dropped["task_attempts"] = cursor.rowcount
    if connection.execute("SELECT 1 FROM sqlite_schema WHERE name = 'metric_samples'").fetchone():
        cursor = connection.execute("DELETE FROM metric_samples WHERE metric_id NOT IN (SELECT id FROM metrics)")
        if cursor.rowcount:
            dropped["metric_samples"] = cursor.rowcount
    return dropped


# -- making the proof begin anew --------------------------------------------------------------------


def close_history(
    connection: sqlite3.Connection, columns: Columns, changes_missing: list[Range]
) -> tuple[list[int], list[int]]:
    """Make history and state agree again where some of either is lost, so that `ael db verify` finds no more.

    Returns the numbers of changes that the state told, and of deletions that were placed.

    What the state says of a lost change is its number, key and value: that change is written again. A key that the
    state does not have, though its last change set it, was deleted by one of the lost changes; it takes one of their
    numbers. Digests are of what was committed and not of this, so they are removed.
    """
    told = [
        number
        for (number,) in connection.execute(
            "INSERT INTO state_changes (id, key_id, value, tick_id) "
            "SELECT s.change_id, s.key_id, s.value, coalesce((SELECT t.id FROM ticks t WHERE t.change_id < s.change_id "
            "AND s.change_id <= t.change_id + t.changes ORDER BY t.id DESC LIMIT 1), 0) "
            "FROM state s WHERE s.change_id NOT IN (SELECT id FROM state_changes) RETURNING id"
        )
    ]
    placed: list[int] = []
    free = [number for begin, end in changes_missing for number in range(begin, min(end, begin + MOST_STAND_INS) + 1)]
    there = {number for (number,) in connection.execute("SELECT change_id FROM state")}
    for key, newest in connection.execute(
        "SELECT c.key_id, c.id FROM state_changes c JOIN "
        "(SELECT max(id) AS id FROM state_changes GROUP BY key_id) n ON n.id = c.id "
        "WHERE c.value IS NOT NULL AND c.key_id NOT IN (SELECT key_id FROM state) ORDER BY c.id"
    ).fetchall():
        place = next((at for at, number in enumerate(free) if number > newest and number not in there), None)
        if place is not None:
            placed.append(free.pop(place))
            connection.execute(
                "INSERT INTO state_changes (id, key_id, value, tick_id) VALUES (?, ?, NULL, 0)", (placed[-1], key)
            )
    connection.execute(
        "UPDATE state_changes SET previous_id = e.expected FROM (SELECT id, CASE WHEN lag(value) OVER of_key "
        "IS NOT NULL THEN lag(id) OVER of_key END AS expected FROM state_changes "
        "WINDOW of_key AS (PARTITION BY key_id ORDER BY id)) AS e "
        "WHERE e.id = state_changes.id AND state_changes.previous_id IS NOT e.expected"
    )
    _let_state_follow(connection)
    for table, known in columns.items():
        if "seal" in known:
            connection.execute(f'UPDATE "{table}" SET seal = NULL WHERE seal IS NOT NULL')
        if "digest" in known and table != "row_digests":
            connection.execute(f'UPDATE "{table}" SET digest = NULL WHERE digest IS NOT NULL')
    return sorted(told), sorted(placed)


MOST_STAND_INS = 10_000
"""Numbers of one range of lost changes that lost deletions can take."""


def _indexed(connection: sqlite3.Connection) -> str:
    """Return the condition with which a revision's index of changes by key answers: here it has all rows."""
    names = [row[1] for row in connection.execute("PRAGMA table_info(state_changes)")]
    return " AND c.recent IS NULL" if "recent" in names else ""


def _let_state_follow(connection: sqlite3.Connection) -> None:
    """Bring values, versions and owners in the state to what the history says."""
    indexed = _indexed(connection)
    newest = f"(SELECT max(id) FROM state_changes c WHERE c.key_id = state.key_id{indexed})"
    connection.execute(
        "UPDATE state_changes SET value = s.value FROM state s WHERE s.change_id = state_changes.id "
        "AND s.value <> state_changes.value AND NOT json_valid(state_changes.value) AND json_valid(s.value)"
    )
    connection.execute(f"DELETE FROM state WHERE (SELECT value FROM state_changes WHERE id = {newest}) IS NULL")
    connection.execute(
        f"UPDATE state SET change_id = {newest}, value = (SELECT value FROM state_changes WHERE id = {newest}), "
        f"version = (SELECT count(*) FROM state_changes c WHERE c.key_id = state.key_id{indexed} AND c.id > (SELECT "
        f"coalesce(max(c.id), 0) FROM state_changes c WHERE c.key_id = state.key_id{indexed} AND c.value IS NULL))"
    )
    connection.execute(
        "UPDATE state SET agent_id = t.agent_id FROM state_changes c JOIN ticks t ON t.id = c.tick_id "
        "WHERE c.id = state.change_id AND state.agent_id <> t.agent_id"
    )


def restart_counts(connection: sqlite3.Connection, columns: Columns) -> None:
    """Take the statistics as they are for the totals up to now; those that are gone are counted from the units."""
    connection.execute(
        "INSERT INTO agent_stats (agent_id, ticks, errors, events, measured, total_us, max_us, ewma_us) "
        "SELECT agent_id, sum(outcome = 0 AND kind = 0), sum(outcome IN (1, 2)), sum(outcome = 0 AND kind = 1), "
        "sum(kind = 0), sum((kind = 0) * duration_us), max((kind = 0) * duration_us), 0 FROM ticks "
        "WHERE agent_id > 0 AND agent_id NOT IN (SELECT agent_id FROM agent_stats) GROUP BY agent_id"
    )
    if "metrics" in columns:
        connection.execute(
            "UPDATE metrics SET samples = hour_samples + coalesce((SELECT sum(h.samples) FROM metric_hours h "
            "WHERE h.metric_id = metrics.id), 0)"
        )
    if "agent_totals" in columns:
        connection.execute("DELETE FROM agent_totals")
        connection.execute(
            "INSERT INTO agent_totals (agent_id, tick_id, ticks, errors, events) "
            "SELECT agent_id, (SELECT coalesce(max(id), 0) FROM ticks), ticks, errors, events FROM agent_stats "
            "WHERE agent_id > 0"
        )


def missing_commits(connection: sqlite3.Connection) -> list[Range]:
    """Return the ranges of numbers of commits that neither a commit nor an iteration has."""
    found: list[Range] = connection.execute(
        "SELECT id + 1, following - 1 FROM (SELECT id, lead(id) OVER (ORDER BY id) AS following FROM "
        "(SELECT id FROM commits UNION SELECT commit_id FROM iterations)) WHERE following > id + 1"
    ).fetchall()
    return found

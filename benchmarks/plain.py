"""The baseline: the same rows, written by plain `sqlite3` as a good program without a framework would.

One connection, held; one `BEGIN IMMEDIATE` … `COMMIT` for each iteration; a prepared `executemany` for each table;
integer keys, integer times, names interned; indexes on the key of a change, and on type and source of an event.
Its rows are made before the clock starts, so nothing but SQLite is measured.
"""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path
from typing import Any

import orjson

from benchmarks.workload import TYPES, event_data, event_type, key, value

__all__ = ["go_on_plainly", "write_plainly"]

SCHEMA = """
CREATE TABLE key (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE);
CREATE TABLE type (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE);
CREATE TABLE agent (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE);
CREATE TABLE state (key_id INTEGER PRIMARY KEY, value TEXT NOT NULL, version INTEGER NOT NULL,
                    change_id INTEGER NOT NULL, agent_id INTEGER NOT NULL);
CREATE TABLE change (id INTEGER PRIMARY KEY, key_id INTEGER NOT NULL, value TEXT, previous_id INTEGER,
                     tick_id INTEGER NOT NULL);
CREATE TABLE event (id INTEGER PRIMARY KEY, type_id INTEGER NOT NULL, source_id INTEGER NOT NULL, data TEXT,
                    at_us INTEGER NOT NULL, tick_id INTEGER NOT NULL);
CREATE TABLE tick (id INTEGER PRIMARY KEY, iteration INTEGER NOT NULL, agent_id INTEGER NOT NULL,
                   kind INTEGER NOT NULL, outcome INTEGER NOT NULL, started_us INTEGER NOT NULL,
                   duration_us INTEGER NOT NULL);
CREATE TABLE stats (agent_id INTEGER PRIMARY KEY, ticks INTEGER NOT NULL, total_us INTEGER NOT NULL,
                    max_us INTEGER NOT NULL, last_us INTEGER);
CREATE TABLE iteration (id INTEGER PRIMARY KEY, started_us INTEGER NOT NULL, duration_us INTEGER NOT NULL,
                        ticks INTEGER NOT NULL);
CREATE INDEX change_key ON change (key_id);
CREATE INDEX event_type ON event (type_id);
CREATE INDEX event_source ON event (source_id);
"""
UPSERT = (
    "INSERT INTO state VALUES (?, ?, ?, ?, ?) ON CONFLICT (key_id) DO UPDATE SET value = excluded.value, "
    "version = excluded.version, change_id = excluded.change_id, agent_id = excluded.agent_id"
)

Rows = list[tuple[Any, ...]]


def write_plainly(path: Path, agents: int, warm_up: int, iterations: int, synchronous: str) -> list[float]:
    """Write so many iterations after some to warm up, and return the seconds that each took."""
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute(f"PRAGMA synchronous = {synchronous}")
        connection.executescript(SCHEMA)
        connection.executemany("INSERT INTO key VALUES (?, ?)", [(a, key(a)) for a in range(agents)])
        connection.executemany("INSERT INTO type VALUES (?, ?)", [(t, event_type(t)) for t in range(TYPES)])
        connection.executemany("INSERT INTO agent VALUES (?, ?)", [(a, f"sensor_{a}") for a in range(agents)])
        connection.executemany("INSERT INTO stats VALUES (?, 0, 0, 0, NULL)", [(a,) for a in range(agents)])
        times = _write(connection, agents, warm_up, iterations)
        _verify(connection, agents, warm_up + iterations)
    finally:
        connection.close()
    return times


def go_on_plainly(path: Path, iterations: int, synchronous: str) -> list[float]:
    """Write so many iterations more to a database of one agent, new or not, and return the seconds of each."""
    if not path.exists():
        return write_plainly(path, 1, 0, iterations, synchronous)
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        connection.execute(f"PRAGMA synchronous = {synchronous}")
        done = connection.execute("SELECT max(id) FROM iteration").fetchone()[0]
        times = _write(connection, 1, 0, iterations, done)
        _verify(connection, 1, done + iterations)
    finally:
        connection.close()
    return times


def _write(connection: sqlite3.Connection, agents: int, warm_up: int, iterations: int, after: int = 0) -> list[float]:
    times = []
    execute, many = connection.execute, connection.executemany
    for iteration in range(after + 1, after + warm_up + iterations + 1):
        states, changes, events, ticks, stats = _rows(agents, iteration)
        began = time.perf_counter()
        execute("BEGIN IMMEDIATE")
        many(UPSERT, states)
        many("INSERT INTO change VALUES (?, ?, ?, ?, ?)", changes)
        many("INSERT INTO event VALUES (?, ?, ?, ?, ?, ?)", events)
        many("INSERT INTO tick VALUES (?, ?, ?, ?, ?, ?, ?)", ticks)
        many("UPDATE stats SET ticks = ?, total_us = ?, max_us = ?, last_us = ? WHERE agent_id = ?", stats)
        execute("INSERT INTO iteration VALUES (?, ?, ?, ?)", (iteration, 1_700_000_000_000_000, 100, agents))
        execute("COMMIT")
        times.append(time.perf_counter() - began)
    return times[warm_up:]


def _rows(agents: int, iteration: int) -> tuple[Rows, Rows, Rows, Rows, Rows]:
    """Return the rows of an iteration, table by table."""
    now_us = time.time_ns() // 1000
    states: Rows = []
    changes: Rows = []
    events: Rows = []
    ticks: Rows = []
    stats: Rows = []
    for agent in range(agents):
        number = (iteration - 1) * agents + agent + 1
        text = orjson.dumps(value(agent, iteration)).decode()
        data = orjson.dumps(event_data(agent, iteration)).decode()
        states.append((agent, text, iteration, number, agent))
        changes.append((number, agent, text, number - agents if iteration > 1 else None, number))
        events.append((number, agent % TYPES, agent, data, now_us, number))
        ticks.append((number, iteration, agent, 0, 0, now_us, 10))
        stats.append((iteration, 10 * iteration, 10, now_us, agent))
    return states, changes, events, ticks, stats


def _verify(connection: sqlite3.Connection, agents: int, iterations: int) -> None:
    wanted = {
        "state": agents,
        "change": agents * iterations,
        "event": agents * iterations,
        "tick": agents * iterations,
        "iteration": iterations,
    }
    found = {table: connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in wanted}
    ticks = connection.execute("SELECT sum(ticks) FROM stats").fetchone()[0]
    if found != wanted or ticks != agents * iterations:
        raise AssertionError(f"plain sqlite3 wrote {found} and counts {ticks} ticks, wanted are {wanted}")

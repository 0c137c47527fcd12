"""What looking back costs in a long history: the last changes of a key, the last events of a type, a past value.

A history is made by plain `sqlite3`, with the rows that a loop would have left, 100 agents at one iteration a second;
everything is then asked through the public views and the same functions that the commands use.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ael_store.store.create import create_database
from ael_store.store.reader import Reader
from ael_store.store.store import Store
from benchmarks.spread import Spread

__all__ = ["History", "make_history", "measure_history", "report_history"]

KEYS, TYPES, AGENTS = 10_000, 50, 100
BEGAN_US = 1_760_000_000_000_000
SECOND_US = 1_000_000
SHORT = 1_000


@dataclass(frozen=True)
class History:
    """What was measured, in milliseconds."""

    rows: int
    """Changes, and as many events and units."""
    changes_of_key: Spread
    changes_of_hot_key: Spread
    events_of_type: Spread
    value_at: Spread
    state_at: Spread
    """All keys."""
    open_ratio: Spread
    """Opening the store beside one with a short history and the same keys."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def make_history(path: Path, rows: int) -> None:
    """Fill a new database with so many changes, events and units; a tenth of the changes are of one key."""
    create_database(path)
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute("BEGIN")
        connection.executemany("INSERT INTO keys VALUES (?, ?)", ((n, f"key/{n}") for n in range(1, KEYS + 1)))
        connection.executemany("INSERT INTO event_types VALUES (?, ?)", ((n, f"type {n}") for n in range(1, TYPES + 1)))
        connection.executemany(
            "INSERT INTO event_sources VALUES (?, ?)", ((n, f"agent{n}") for n in range(1, AGENTS + 1))
        )
        for number in range(1, AGENTS + 1):
            connection.execute(
                "INSERT INTO agents (id, name, priority, enabled, registered, failures, metadata, created_us) "
                "VALUES (?, ?, 5, 1, 0, 0, '{}', ?)",
                (number, f"agent{number}", BEGAN_US),
            )
            connection.execute(
                "INSERT INTO agent_stats (agent_id, ticks, errors, events, measured, total_us, max_us, ewma_us) "
                "VALUES (?, 0, 0, 0, 0, 0, 0, 0)",
                (number,),
            )
        connection.execute(
            "INSERT INTO runs (id, status, started_us, ended_us, first_iteration, last_iteration, pid, host, version, "
            "token, tick_rate) VALUES (1, 'stopped', ?, ?, 1, ?, 1, 'here', '0', 0, '1')",
            (BEGAN_US, BEGAN_US + rows // AGENTS * SECOND_US, rows // AGENTS),
        )
        _fill(connection, rows)
        connection.execute("COMMIT")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()


def _fill(connection: sqlite3.Connection, rows: int) -> None:
    newest: dict[int, tuple[int, int]] = {}
    for start in range(1, rows + 1, 50_000):
        numbers = range(start, min(rows, start + 49_999) + 1)
        changes, events, ticks = [], [], []
        for n in numbers:
            iteration, place = (n - 1) // AGENTS + 1, (n - 1) % AGENTS
            key = 1 if n % 10 == 0 else n * 7919 % KEYS + 1
            before = newest.get(key, (None, 0))
            newest[key] = (n, before[1] + 1)
            changes.append((n, key, f'{{"reading":{n},"unit":"degrees","place":"room {key}","ok":true}}', before[0], n))
            events.append((n, n * 31 % TYPES + 1, place + 1, f'{{"reading":{n},"of":"room {key}"}}', n))
            at_us = BEGAN_US + iteration * SECOND_US
            ticks.append((n, iteration, place, place + 1, 0, 0, at_us, 120, 7, n - 1, n - 1, 1, 1))
        connection.executemany(
            "INSERT INTO state_changes (id, key_id, value, previous_id, tick_id) VALUES (?, ?, ?, ?, ?)", changes
        )
        connection.executemany(
            "INSERT INTO events (id, type_id, source_id, data, tick_id) VALUES (?, ?, ?, ?, ?)", events
        )
        connection.executemany(
            "INSERT INTO ticks (id, iteration, place, agent_id, kind, outcome, started_us, duration_us, seed, "
            "change_id, event_id, changes, events) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            ticks,
        )
    connection.executemany(
        "INSERT INTO iterations (id, run_id, commit_id, clock, started_us, duration_us, ticks, errors, events, missed, "
        "tick_id) VALUES (?, 1, ?, ?, ?, 4000, 100, 0, 100, 0, ?)",
        ((i, i, i, BEGAN_US + i * SECOND_US, (i - 1) * AGENTS) for i in range(1, rows // AGENTS + 1)),
    )
    connection.executemany(
        "INSERT INTO state SELECT key_id, value, ?, id, (id - 1) % 100 + 1 FROM state_changes WHERE id = ?",
        ((version, number) for number, version in newest.values()),
    )


def measure_history(folder: Path, rounds: int, rows: int, progress: Callable[[str], None]) -> History:
    """Measure everything; `progress` is told what comes next."""
    progress(f"making a history of {rows:,} changes, events and units")
    long, short = folder / "long.db", folder / "short.db"
    make_history(long, rows)
    make_history(short, max(SHORT, KEYS))  # so that both hold the same number of keys
    middle = rows // AGENTS // 2
    progress("looking back")

    def timed(ask: Callable[[Reader, int], object]) -> Spread:
        times = []
        for number in range(rounds):
            reader = Reader(long)  # a connection of its own, as a command has it
            reader.horizon()
            began = time.perf_counter()
            assert ask(reader, number)
            times.append(1000 * (time.perf_counter() - began))
            reader.close()
        return Spread.of(times)

    async def opened(path: Path) -> float:
        store = Store(path, durability="normal")
        began = time.perf_counter()
        await store.open("benchmark")
        took = time.perf_counter() - began
        await store.close()
        return took

    return History(
        rows,
        timed(lambda reader, n: reader.history(f"key/{n * 10 + 3}", 100)),
        timed(lambda reader, n: reader.history("key/1", 100)),
        timed(lambda reader, n: reader.events(type=f"type {n % TYPES + 1}", limit=100)),
        timed(lambda reader, n: reader.value_at(reader.moment(middle + n), f"key/{n * 10 + 3}")),
        timed(lambda reader, n: reader.state_at(reader.moment(middle + n))),
        Spread.of([asyncio.run(opened(long)) / asyncio.run(opened(short)) for _ in range(rounds)]),
    )


def report_history(found: History) -> str:
    """Return the figures as text."""
    return "\n".join(
        (
            f"History of {found.rows:,} changes, {found.rows:,} events, {found.rows:,} units, {KEYS:,} keys",
            f"  last 100 changes of a key          {found.changes_of_key:.2f} ms",
            f"  … of a key with a tenth of them    {found.changes_of_hot_key:.2f} ms",
            f"  last 100 events of a type          {found.events_of_type:.2f} ms",
            f"  value of a key at a past moment    {found.value_at:.2f} ms",
            f"  whole state at a past moment       {found.state_at:.0f} ms",
            f"  opening, beside a short history    {found.open_ratio:.2f} times",
        )
    )

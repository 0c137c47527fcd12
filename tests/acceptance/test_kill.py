"""SIGKILL at random moments, again and again: what was committed stays, and nothing is there by halves.

AEL_TEST_KILLS sets how often (20), AEL_TEST_SEED which moments (random, printed).
"""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.crash_agents import ACCOUNTS, MONEY
from tests.acceptance.database import Row, ask, read, reading

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
AEL = Path(sys.executable).with_name("ael")
KILLS = int(os.environ.get("AEL_TEST_KILLS", "20"))
START_S = 60.0
"""How long a process may take to its first iteration before the test gives up."""

NUMBERED = {"v_iterations": "iteration", "v_state_history": "id", "v_events": "id", "v_ticks": "id"}
"""The views that only grow, and what numbers their rows."""

pytestmark = pytest.mark.timeout(60 + 15 * KILLS)


@pytest.fixture
def moments() -> random.Random:
    """Where the moments to kill come from."""
    seed = int(os.environ.get("AEL_TEST_SEED") or random.randrange(1_000_000))
    print(f"AEL_TEST_SEED={seed}")
    return random.Random(seed)


@contextmanager
def process(command: list[str], log: Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process of its own, with no settings but these; it does not outlive the block."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("AEL_")}
    with log.open("ab") as output:
        running = subprocess.Popen(command, cwd=log.parent, env={**clean, **environment}, stdout=output, stderr=output)
    try:
        yield running
    finally:
        running.kill()
        running.wait()


def kill_at_random(
    running: subprocess.Popen[bytes], path: Path, log: Path, moments: random.Random, seen: list[Row]
) -> None:
    """SIGKILL a process while it starts, or while it goes round; `seen` gets what an observer saw of it before."""
    if moments.random() < 0.25:
        time.sleep(moments.uniform(0.05, 0.8))
        running.send_signal(signal.SIGKILL)
        running.wait()
        return
    before = newest_iteration(path)
    give_up = time.monotonic() + START_S
    while newest_iteration(path) == before:
        assert running.poll() is None, log.read_text()
        assert time.monotonic() < give_up, log.read_text()
        time.sleep(0.005)
    end = time.monotonic() + moments.uniform(0, 0.7)
    while time.monotonic() < end:
        seen.append(newest_iteration(path))
        check_moment(path)
        time.sleep(0.002)
    running.send_signal(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL, log.read_text()


def newest_iteration(path: Path) -> Row:
    """Return the last iteration that is committed, as a row of v_iterations; an empty one where there is none."""
    if not path.exists():
        return ()
    try:
        rows = ask(path, "SELECT * FROM v_iterations ORDER BY iteration DESC LIMIT 1")
    except sqlite3.OperationalError:  # just being created: neither log nor tables are there yet
        return ()
    return rows[0] if rows else ()


def check_moment(path: Path) -> None:
    """Whoever looks at a running loop sees whole units only."""
    with reading(path) as connection:
        state = dict(connection.execute("SELECT key, json(value) FROM v_state WHERE agent IN ('bank', 'twins')"))
        counts = dict(connection.execute("SELECT name, tick_count FROM v_agents"))
    check_state({key: int(value) for key, value in state.items()}, counts)


def check_state(state: dict[str, int], counts: dict[str, int]) -> None:
    if "account/0" in state:
        assert sum(state[f"account/{number}"] for number in range(ACCOUNTS)) == ACCOUNTS * MONEY
    assert state.get("twin/left") == state.get("twin/right") == state.get("twin/ticks")
    assert state.get("twin/ticks", 0) == counts.get("twins", 0)


@dataclass
class Ledger:
    """Everything that was ever seen committed; it may grow, and never change."""

    path: Path
    rows: dict[str, list[Row]] = field(default_factory=lambda: {view: [] for view in NUMBERED})

    def extend(self) -> None:
        """Take up what is new since the last time."""
        with reading(self.path) as connection:
            for view, key in NUMBERED.items():
                known = self.rows[view]
                last = known[-1][0] if known else 0
                if known:
                    assert connection.execute(f"SELECT * FROM {view} WHERE {key} = ?", (last,)).fetchall() == known[-1:]
                known += connection.execute(f"SELECT * FROM {view} WHERE {key} > ? ORDER BY {key}", (last,))

    def check_complete(self) -> None:
        """Compare all of it with what the database says now."""
        with reading(self.path) as connection:
            for view, key in NUMBERED.items():
                assert connection.execute(f"SELECT * FROM {view} ORDER BY {key}").fetchall() == self.rows[view], view


def table(path: Path, query: str) -> list[dict[str, Any]]:
    connection = read(path)
    connection.row_factory = sqlite3.Row
    try:
        return [dict(row) for row in connection.execute(query)]
    finally:
        connection.close()


def check_iterations(path: Path, seen: list[Row]) -> None:
    iterations = table(path, "SELECT * FROM v_iterations ORDER BY iteration")
    assert [row["iteration"] for row in iterations] == list(range(1, len(iterations) + 1)), "a gap"

    committed = {tuple(row.values()) for row in iterations}
    lost = [row for row in seen if row not in committed]
    assert not lost, "an observer saw iterations that are gone"

    emitted = Counter(row[0] for row in ask(path, "SELECT iteration FROM v_events"))
    last = {row[0] for row in ask(path, "SELECT last_iteration FROM v_runs")}  # start and shutdown count with these
    for row in iterations:
        number, found = row["events"], emitted[row["iteration"]]
        assert number == found or (number < found and row["iteration"] in last), row


def check_runs(path: Path, status_of_last: str) -> None:
    runs = table(path, "SELECT * FROM v_runs ORDER BY run_id")
    assert [row["run_id"] for row in runs] == list(range(1, len(runs) + 1))
    assert [row["status"] for row in runs] == ["crashed"] * (len(runs) - 1) + [status_of_last]
    firsts_and_lasts = [
        number for row in runs if row["first_iteration"] for number in (row["first_iteration"], row["last_iteration"])
    ]
    if firsts_and_lasts:
        assert firsts_and_lasts[0] == 1
        assert all(
            last + 1 == first for last, first in zip(firsts_and_lasts[1:-1:2], firsts_and_lasts[2::2], strict=True)
        )
    # each iteration belongs to the run that gave it
    for run_id, first, last in ask(path, "SELECT run_id, min(iteration), max(iteration) FROM v_iterations GROUP BY 1"):
        assert (runs[run_id - 1]["first_iteration"], runs[run_id - 1]["last_iteration"]) == (first, last)


def check_counts(path: Path) -> None:
    """The statistics say what the log of ticks says."""
    units: dict[str, Counter[tuple[str, str]]] = {}
    for agent, kind, outcome, number in ask(
        path, "SELECT agent, kind, outcome, count(*) FROM v_ticks GROUP BY 1, 2, 3"
    ):
        units.setdefault(agent, Counter())[kind, outcome] = number
    for row in table(path, "SELECT * FROM v_agents"):
        ticks = units.get(row["name"], Counter())
        failed = sum(number for (_, outcome), number in ticks.items() if outcome in ("error", "timeout"))
        found = (row["tick_count"], row["error_count"], row["event_count"])
        assert found == (ticks["tick", "success"], failed, ticks["event", "success"]), row["name"]


def check_history(path: Path) -> None:
    """Playing all changes gives the state."""
    state: dict[str, str] = {}
    versions: Counter[str] = Counter()
    for row in table(path, "SELECT * FROM v_state_history ORDER BY id"):
        key = row["key"]
        assert row["old_value"] == state.get(key), row
        if row["operation"] == "delete":
            del state[key]
        else:
            state[key] = row["new_value"]
        versions[key] += 1
    assert state == dict(ask(path, "SELECT key, value FROM v_state"))
    assert {key: versions[key] for key in state} == dict(ask(path, "SELECT key, version FROM v_state"))


def check_sound(path: Path) -> None:
    assert ask(path, "PRAGMA integrity_check") == [("ok",)]
    assert ask(path, "PRAGMA foreign_key_check") == []


def check_deliveries(path: Path, subscriber: str, key: str, types: tuple[str, ...]) -> None:
    """Every event had its effect once and in order, or still waits for it."""
    wanted = [number for number, type in ask(path, "SELECT id, type FROM v_events ORDER BY id") if type in types]
    handled = [
        int(value) for (value,) in ask(path, "SELECT new_value FROM v_state_history WHERE key = ? ORDER BY id", key)
    ]
    waiting = [
        number for (number,) in ask(path, "SELECT event_id FROM v_pending WHERE subscriber = ? ORDER BY 1", subscriber)
    ]
    assert handled + waiting == wanted


def check_books(path: Path) -> None:
    """What the agents of crash_agents.py have done adds up."""
    state = {key: int(value) for key, value in ask(path, "SELECT key, value FROM v_state")}
    agents = {row["name"]: row for row in table(path, "SELECT * FROM v_agents")}
    check_state(state, {name: row["tick_count"] for name, row in agents.items()})
    assert state.get("slow/ticks", 0) == agents["slow"]["tick_count"]
    assert state.get("clumsy/errors", 0) == agents["clumsy"]["error_count"]
    if agents["twins"]["tick_count"]:
        assert agents["twins"]["metadata"] == f'{{"ticks":{state["twin/ticks"]}}}'

    for type in ("paid", "due"):
        numbers = [
            row[0]
            for row in ask(path, "SELECT json_extract(data, '$.number') FROM v_events WHERE type = ? ORDER BY id", type)
        ]
        assert numbers == list(range(1, len(numbers) + 1))
        assert len(numbers) <= state.get(f"agent/payer/{type}", 0)
    assert state.get("agent/payer/paid", 0) == len(ask(path, "SELECT id FROM v_events WHERE type = 'paid'"))

    assert ask(path, "SELECT * FROM v_events WHERE type = 'leak'") == []
    assert ask(path, "SELECT * FROM v_state_history WHERE key = 'clumsy/leak'") == []
    check_deliveries(path, "book", "book/event", ("paid", "due"))
    check_deliveries(path, "auditor", "audit/event", ("paid",))


def test_killed_again_and_again_the_loop_loses_nothing_and_does_nothing_twice(
    tmp_path: Path, moments: random.Random
) -> None:
    path, log = tmp_path / "ael.db", tmp_path / "log"
    command = [sys.executable, str(HERE / "crash_agents.py"), str(path)]
    ledger, seen = Ledger(path), []  # type: Ledger, list[Row]

    for _ in range(KILLS):
        with process(command, log) as running:
            kill_at_random(running, path, log, moments, seen)
        if newest_iteration(path):
            ledger.extend()
            check_books(path)
    with process([*command, "20"], log) as running:
        assert running.wait(timeout=START_S) == 0, log.read_text()

    ledger.extend()
    ledger.check_complete()
    check_iterations(path, seen)
    check_runs(path, "stopped")
    check_counts(path)
    check_history(path)
    check_books(path)
    check_sound(path)


def test_killed_again_and_again_the_example_goes_on(tmp_path: Path, moments: random.Random) -> None:
    path, log = tmp_path / "ael.db", tmp_path / "log"
    command = [str(AEL), "run", str(ROOT / "examples" / "system_monitor.py"), "--tick-rate", "0.02"]
    settings = {"AEL_DB": str(path), "AEL_TICK_LOG": "all", "AEL_IDLE_COMMIT": "0.05"}
    ledger, seen = Ledger(path), []  # type: Ledger, list[Row]

    for _ in range(max(1, KILLS // 4)):
        with process(command, log, **settings) as running:
            kill_at_random(running, path, log, moments, seen)
        if newest_iteration(path):
            ledger.extend()
    with process([*command, "--iterations", "20"], log, **settings) as running:
        assert running.wait(timeout=START_S) == 0, log.read_text()

    ledger.extend()
    ledger.check_complete()
    check_iterations(path, seen)
    check_runs(path, "stopped")
    check_counts(path)
    check_history(path)
    check_sound(path)
    assert {"metrics_cpu", "metrics_memory", "metrics_disk"} <= {key for (key,) in ask(path, "SELECT key FROM v_state")}

"""The examples run as a user runs them, in a folder of their own, and leave what they promise."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.database import ask

EXAMPLES = Path(__file__).parents[2] / "examples"
AEL = str(Path(sys.executable).with_name("ael"))

TABLES = """
[agents.system_monitor]
class = "SystemMonitor"
config = { cpu = 0.0, memory = 0.0, disk = 0.0 }

[agents.alert_handler]
class = "AlertHandler"

[agents.task_scheduler]
class = "TaskScheduler"
config = { report_every = 0.0 }
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in which no variable says where the database is."""
    for name in os.environ:
        if name.startswith("AEL_") and not name.startswith("AEL_TEST_"):
            monkeypatch.delenv(name)
    return tmp_path


def run_example(folder: Path, iterations: int) -> subprocess.CompletedProcess[str]:
    """`ael run` the system monitor for so many iterations."""
    example = str(EXAMPLES / "system_monitor.py")
    done = subprocess.run(
        [AEL, "run", example, "--tick-rate", "0.02", "--iterations", str(iterations)],
        check=False,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done


def state_of(folder: Path) -> dict[str, Any]:
    return {key: json.loads(value) for key, value in ask(folder / "ael.db", "SELECT key, value FROM v_state")}


def test_system_monitor_stores_figures_of_this_machine(folder: Path) -> None:
    run_example(folder, 12)

    state = state_of(folder)
    assert all(0.0 <= state[f"metrics_{name}"] <= 100.0 for name in ("cpu", "memory", "disk"))
    assert [task["name"] for task in state["scheduled_tasks"]] == ["report 1"]
    agents = {
        name: (ticks, errors)
        for name, ticks, errors in ask(folder / "ael.db", "SELECT name, tick_count, error_count FROM v_agents")
    }
    assert agents == {"system_monitor": (6, 0), "alert_handler": (0, 0), "task_scheduler": (6, 0)}


def test_system_monitor_alerts_when_a_limit_is_crossed_and_not_again_after_a_restart(folder: Path) -> None:
    (folder / "ael.toml").write_text(TABLES)

    first = run_example(folder, 12)
    second = run_example(folder, 12)

    state = state_of(folder)
    assert state["alerts"] == 3
    assert [alert["type"] for alert in state["last_alerts"]] == ["high_cpu", "low_memory", "low_disk"]
    assert ask(folder / "ael.db", "SELECT event_count FROM v_agents WHERE name = 'alert_handler'") == [(3,)]
    assert first.stdout.count("alert ") == 3
    assert second.stdout.count("alert ") == 0


def test_task_scheduler_takes_up_what_is_due_and_plans_its_next_report(folder: Path) -> None:
    (folder / "ael.toml").write_text(TABLES)

    run_example(folder, 12)

    state = state_of(folder)
    names = [task["name"] for task in state["done_tasks"]]
    assert names == [f"report {number}" for number in range(1, len(names) + 1)]
    assert len(names) >= 2
    assert all(set(task["result"]) == {"cpu", "memory", "disk"} for task in state["done_tasks"])
    assert len(state["scheduled_tasks"]) == 1


def test_usage_example_of_the_ancestor_runs_and_goes_on_after_a_restart(folder: Path) -> None:
    for ticks in (1, 2):
        with subprocess.Popen(
            [sys.executable, str(EXAMPLES / "seed_usage.py")], cwd=folder, stdout=subprocess.PIPE, text=True
        ) as running:
            try:
                wait_for_ticks(folder / "ael.db", ticks)
                running.send_signal(signal.SIGINT)
                output, _ = running.communicate(timeout=30)
            finally:
                running.kill()

        assert running.returncode == 0
        assert output.startswith(f"monitoring_agent started\ntick {ticks}: CPU ")

    assert 0.0 <= state_of(folder)["cpu_usage"] <= 100.0
    assert [row[0] for row in ask(folder / "ael.db", "SELECT status FROM v_runs")] == ["stopped", "stopped"]


def wait_for_ticks(path: Path, ticks: int) -> None:
    """Wait until an agent has ticked so often, as the database says."""
    give_up = time.monotonic() + 60
    while time.monotonic() < give_up:
        try:
            if path.exists() and ask(path, "SELECT 1 FROM v_agents WHERE tick_count >= ?", ticks):
                return
        except sqlite3.OperationalError:  # just being created
            pass
        time.sleep(0.02)
    raise AssertionError(f"no {ticks} ticks within a minute")

"""Commands against a loop that runs: through it, committed when answered, also while it is paused."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import COUNTER, Ael, Process, Start, until
from tests.loops import rows


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    folder = tmp_path_factory.mktemp("loop")
    (folder / "agents.py").write_text(COUNTER)
    process = Process("run", "agents.py", "--tick-rate", "0.02", cwd=folder)
    process.wait_for("iteration 1 ")
    yield process
    process.stop(signal.SIGKILL)


@pytest.fixture
def loop(shared: Process, monkeypatch: pytest.MonkeyPatch) -> Process:
    """A loop whose clock ticks every 20 ms; the database of all commands."""
    monkeypatch.setenv("AEL_DB", str(shared.folder / "ael.db"))
    return shared


def iteration(ael: Ael) -> int:
    return int(ael("status", "--json").json["iteration"])


def test_change_is_committed_when_it_is_answered(ael: Ael, loop: Process) -> None:
    for number in range(5):
        assert ael("state", "set", "n", str(number)).out == f"set n = {number} (committed)\n"
        assert rows(loop.folder / "ael.db", "SELECT value FROM v_state WHERE key = 'n'") == [str(number)]

    assert ael("state", "delete", "n").out == "deleted n (committed)\n"
    assert rows(loop.folder / "ael.db", "SELECT value FROM v_state WHERE key = 'n'") == []
    [actor] = set(rows(loop.folder / "ael.db", "SELECT actor FROM commands WHERE name = 'state.delete'"))
    assert f"pid {os.getpid()})" in actor


def test_event_reaches_its_agent(ael: Ael, loop: Process) -> None:
    number = ael("events", "emit", "ring", "--json").json["id"]

    assert rows(loop.folder / "ael.db", "SELECT type FROM v_events WHERE id = ?", number) == ["ring"]
    until(lambda: ael("state", "get", "rung").out == "1\n")


def test_refusal_of_the_loop_is_that_of_the_command(ael: Ael, loop: Process) -> None:
    assert ael("agents", "disable", "conter").err == "ael: there is no agent 'conter'; did you mean counter?\n"
    renamed = ael("agents", "rename", "counter", "other")
    assert renamed.code == 2
    assert "is registered in the running loop" in renamed.err
    assert ael("step").code == 2
    assert "`ael pause` first" in ael("step").err


def test_agent_is_switched_off_and_on(ael: Ael, loop: Process) -> None:
    assert ael("agents", "disable", "counter").code == 0
    count = ael("state", "get", "count").out
    before = iteration(ael)
    until(lambda: iteration(ael) > before + 3 or _commit_idle(ael))
    assert ael("state", "get", "count").out == count

    assert ael("agents", "enable", "counter").code == 0
    until(lambda: ael("state", "get", "count").out != count)


def _commit_idle(ael: Ael) -> bool:
    """Idle iterations wait for a commit: give them one."""
    ael("events", "emit", "nothing")
    return False


def test_pause_step_and_resume(ael: Ael, loop: Process) -> None:
    assert ael("pause").out == "paused the loop (committed)\n"
    assert ael("pause", "--json").json == {"paused": True, "changed": False}
    status = ael("status", "--json").json
    assert (status["status"], status["paused"], status["running"]) == ("paused", True, True)
    paused_at = status["iteration"]

    assert ael("state", "set", "mode", "1").out == "set mode = 1 (committed)\n"
    assert iteration(ael) == paused_at

    assert ael("step", "3", "--json").json == {"iterations": 3, "until_iteration": paused_at + 3}
    until(lambda: iteration(ael) == paused_at + 3)
    assert ael("step").out == f"stepping 1 iteration, up to iteration {paused_at + 4}\n"
    until(lambda: iteration(ael) == paused_at + 4)
    assert ael("status", "--json").json["paused"] is True

    assert ael("resume").out == "resumed the loop (committed)\n"
    until(lambda: iteration(ael) > paused_at + 10)
    assert ael("resume").out == "the loop is not paused\n"


def test_status_of_a_running_loop(ael: Ael, loop: Process) -> None:
    status = ael("status", "--json").json

    assert (status["running"], status["pid"], status["status"]) == (True, loop.process.pid, "running")
    assert status["takes_commands"] is True
    assert status["revision"] == "0008"
    assert status["agents"] == {"active": 2}
    assert f"loop       running, pid {loop.process.pid} since " in ael("status").out


def test_schema_of_a_running_loop_stays(ael: Ael, loop: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ael_store.cli.db.LOCK_WAIT_S", 0.0)

    assert ael("db", "downgrade", "0001").code == 75
    assert ael("db", "check").code == 0
    assert loop.process.poll() is None


def test_what_was_paused_starts_paused(ael: Ael, start: Start, counter: str, database: Path) -> None:
    assert ael("pause").out == "paused the loop (committed)\n"
    assert "it will start paused" in ael("status").out
    assert ael("step").code == 1

    run = start("run", counter)
    run.wait_for("the loop is paused by an operator; `ael resume` lets it go on")
    until(lambda: ael("status", "--json").json["takes_commands"])
    assert ael("status", "--json").json["iteration"] == 3
    assert ael("resume").code == 0
    until(lambda: iteration(ael) > 3)
    assert run.stop() == 0

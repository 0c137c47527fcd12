"""Settings and code that change under a running loop."""

from __future__ import annotations

import os
import pty
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ael_store.runtime.live_settings import compare, describe
from ael_store.settings import Settings
from tests.cli.conftest import PATIENCE_S, ROOT, Ael, Process, Start, until
from tests.loops import rows


def hang_up(run: Process) -> None:
    """What `kill -HUP` and `systemctl reload` send."""
    run.process.send_signal(signal.SIGHUP)


def test_settings_are_read_again_at_sighup(ael: Ael, counter: str, start: Start, tmp_path: Path) -> None:
    settings = tmp_path / "ael.toml"
    settings.write_text("tick_rate = 3600\n")
    run = start("run", counter)
    run.wait_for("iteration 1 ")

    settings.write_text("tick_rate = 0.02\ntick_log = 'all'\n")
    hang_up(run)
    run.wait_for("settings were read again: tick_rate is 0.02 (was 3600.0); tick_log is 'all' (was 'changed')")
    until(lambda: int(ael("state", "get", "count").out) > 3)
    assert rows("ael.db", "SELECT coalesce(sum(missed), 0) FROM v_iterations WHERE iteration < 4") == [0]

    settings.write_text("tick_rate = 0.02\ntick_log = 'some'\n")
    hang_up(run)
    run.wait_for("setting tick_log is 'some' (")
    assert "the loop goes on with the settings that it has" in run.wait_for("SIGHUP: ")

    settings.write_text("tick_rate = 0.02\ntick_log = 'all'\nstrategy = 'round_robin'\n[agents.c]\nclass = 'Counter'\n")
    hang_up(run)
    run.wait_for("strategy, agents: changed too, and taken up by the next start")
    assert run.stop() == 0

    [first, refused] = rows("ael.db", "SELECT actor || arguments || coalesce(error, '') FROM commands ORDER BY id")
    assert first == f'SIGHUP to pid {run.process.pid}{{"changes":{{"tick_rate":0.02,"tick_log":"all"}}}}'
    assert "InvalidSetting: setting tick_log is 'some'" in refused


def test_settings_are_read_again_while_paused(ael: Ael, counter: str, start: Start, tmp_path: Path) -> None:
    run = start("run", counter, "--tick-rate", "0.02")
    run.wait_for("iteration 1 ")
    assert ael("pause").code == 0

    (tmp_path / "ael.toml").write_text("tick_rate = 5\ngrace = 1\n")
    hang_up(run)

    assert "tick_rate" not in run.wait_for("grace is 1.0 (was 10.0)")  # the flag wins
    assert run.stop() == 0


def test_code_that_changed_is_taken_up_once_it_can_be_imported(ael: Ael, start: Start, tmp_path: Path) -> None:
    (tmp_path / "agents.py").write_text(
        "from ael_store import AgentBase\nimport step\n"
        "class Counter(AgentBase):\n"
        "    name = 'counter'\n"
        "    priority = 10\n"
        "    def on_tick(self, context):\n"
        "        context.set('step', step.BY)\n"
        "        context.increment('count')\n"
    )
    (tmp_path / "step.py").write_text("BY = 1\n")
    run = start("run", "agents.py", "--tick-rate", "0.02", "--reload")
    until(lambda: ael("state", "get", "step").out == "1\n", run)

    (tmp_path / "step.py").write_text("BY = = 2\n")
    run.wait_for("step.py changed, and the loop goes on with the old code: agents.py can't be imported: SyntaxError")
    (tmp_path / "step.py").write_text("from more import BY\n")
    run.wait_for("No module named 'more'")
    before = int(ael("state", "get", "count").out)
    until(lambda: int(ael("state", "get", "count").out) > before)

    (tmp_path / "more.py").write_text("BY = 3\n")
    run.wait_for("more.py changed: the loop stops and begins anew")
    until(lambda: ael("state", "get", "step").out == "3\n", run)
    assert int(ael("state", "get", "count").out) > before
    assert run.stop() == 0

    assert rows("ael.db", "SELECT status || ' ' || pid FROM v_runs") == [f"stopped {run.process.pid}"] * 2
    assert not list(tmp_path.glob("__pycache__"))


def test_reload_and_iterations_do_not_go_together(ael: Ael, counter: str) -> None:
    done = ael("run", counter, "--reload", "--iterations", "3")

    assert (done.code, "don't go together" in done.err) == (2, True)


@pytest.mark.skipif(shutil.which("setsid") is None, reason="no setsid here, which gives a process a terminal")
def test_terminal_that_hangs_up_stops_the_loop(counter: str) -> None:
    ours, theirs = pty.openpty()

    with subprocess.Popen(
        ["setsid", "--ctty", sys.executable, "-m", "ael_store", "run", counter, "--tick-rate", "0.02"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as run:
        os.close(theirs)
        written = b""
        while b"iteration 3 " not in written:
            written += os.read(ours, 65536)

        os.close(ours)

        assert run.wait(PATIENCE_S) == 0
    assert rows("ael.db", "SELECT status FROM v_runs") == ["stopped"]


def test_what_has_to_wait_is_told_from_what_has_not() -> None:
    old, new = Settings(), Settings(grace=1.0, durability="normal", limits={"llm": {"per_minute": 3}})  # type: ignore[dict-item]

    live, waiting = compare(old, new)

    assert (live, waiting) == ({"grace": 1.0}, ["durability", "limits"])
    assert describe(old, live, waiting) == (
        "settings were read again: grace is 1.0 (was 10.0); "
        "durability, limits: changed too, and taken up by the next start"
    )
    assert describe(old, {}, []) == "settings were read again: nothing has changed"

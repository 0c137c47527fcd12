"""A loop that removes history all the time is killed again and again: what is left is always sound."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from ael_store.store.reader import Reader
from ael_store.store.verify import verify

KILLS = int(os.environ.get("AEL_TEST_PRUNE_KILLS", "5"))

AGENTS = """
from ael_store import AgentBase


class Busy(AgentBase):
    priority = 10

    async def on_tick(self, context):
        context.set(f"{self.name}/{context.iteration % 7}", context.iteration)
        context.increment(f"{self.name}/count")
        if context.iteration % 3 == 0:
            context.delete(f"{self.name}/{context.iteration % 5}")
        context.emit("done", {"by": self.name})


class Listener(AgentBase):
    name = "listener"
    subscriptions = ("done",)

    async def on_event(self, event, context):
        context.increment("heard")


agents = [Busy("one"), Busy("two"), Listener()]
"""


def test_killed_while_history_is_removed_it_stays_sound_and_goes_on(tmp_path: Path) -> None:
    (tmp_path / "busy.py").write_text(AGENTS)
    path = tmp_path / "ael.db"
    ael = Path(sys.executable).with_name("ael")
    options = ["--tick-rate", "0", "--history-rows", "400", "--durability", "normal", "--quiet"]
    command = [str(ael), "run", "busy.py", *options]
    random.seed(7)
    horizon = 0

    for kill in range(KILLS):
        began = _iteration(path)
        process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + 60
            while _iteration(path) < began + 400:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.02)
            time.sleep(random.uniform(0, 0.2))
            if kill % 2 == 0:
                _stop_while_removing(process, path)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()

        assert verify(path).problems == []
        reader = Reader(path)
        moved = reader.horizon().iteration
        assert kill % 2 or _removes(reader)
        [counts] = reader.rows(
            "SELECT (SELECT value FROM v_state WHERE key = 'one/count') AS state, max(iteration) AS iteration "
            "FROM v_iterations"
        )
        reader.close()
        assert int(counts["state"]) == counts["iteration"]
        assert moved > horizon
        horizon = moved


def _stop_while_removing(process: subprocess.Popen[bytes], path: Path) -> None:
    """Hold the process in the middle of a removal, which takes more commits than one."""
    reader = Reader(path)
    deadline = time.monotonic() + 60
    while True:
        assert process.poll() is None and time.monotonic() < deadline
        if _removes(reader):
            process.send_signal(signal.SIGSTOP)
            os.waitpid(process.pid, os.WUNTRACED)
            if _removes(reader):
                break
            process.send_signal(signal.SIGCONT)
    reader.close()


def _removes(reader: Reader) -> bool:
    return bool(reader.rows("SELECT value FROM positions WHERE name = 'pruning'")[0]["value"] != "null")


def _iteration(path: Path) -> int:
    if not path.exists():
        return 0
    reader = Reader(path)
    try:
        return int(reader.rows("SELECT coalesce(max(iteration), 0) AS n FROM v_iterations")[0]["n"])
    except Exception:
        return 0
    finally:
        reader.close()

"""One owner: who is refused, who may take over, and what an owner that was overtaken still does (nothing)."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ael_store.store.lock import current_holder
from tests.acceptance.database import ask

ROOT = Path(__file__).parents[2]
PATIENCE_S = 60.0

COUNTER = """
from ael_store import AgentBase

class Counter(AgentBase):
    name = "counter"
    priority = 10

    def on_tick(self, context):
        context.increment("n")

    def on_shutdown(self, context):
        print("shut down", flush=True)
"""

INSIDE_A_TRANSACTION = """
import asyncio, signal, os
from ael_store.store.store import Store

async def main():
    store = Store("ael.db")
    await store.open("loop")
    await store._driver.run(lambda connection: connection.execute("BEGIN IMMEDIATE"))
    print("inside", flush=True)
    os.kill(os.getpid(), signal.SIGSTOP)

asyncio.run(main())
"""


class Folder:
    """A folder with an agent, and the processes that were started in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.database = path / "ael.db"
        self.started: list[subprocess.Popen[str]] = []
        (path / "counter.py").write_text(COUNTER)

    def python(self, *arguments: str) -> subprocess.Popen[str]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("AEL_")}
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=self.path,
            env={**clean, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.started.append(process)
        return process

    def run(self, *more: str) -> subprocess.Popen[str]:
        return self.python("-m", "ael_store", "run", "counter.py", "--tick-rate", "0.02", "--quiet", *more)

    def ael(self, *arguments: str) -> tuple[int, str, str]:
        process = self.python("-m", "ael_store", *arguments)
        out, err = process.communicate(timeout=PATIENCE_S)
        return process.returncode, out, err

    def owner(self, *more: str) -> subprocess.Popen[str]:
        """Start a loop, and wait until it has committed something and takes commands."""
        process = self.run(*more)

        def goes() -> bool:
            assert process.poll() is None, process.communicate()
            holder = current_holder(self.database)
            return (
                holder is not None
                and (holder.pid, holder.socket is not None) == (process.pid, True)
                and self.iterations_of(process) > 0
            )

        until(goes)
        return process

    def iterations_of(self, process: subprocess.Popen[str]) -> int:
        query = "SELECT count(*) FROM v_iterations JOIN v_runs USING (run_id) WHERE pid = ?"
        return int(ask(self.database, query, process.pid)[0][0])


def until(condition: Callable[[], Any]) -> None:
    give_up = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < give_up, "this did not come true"
        time.sleep(0.01)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Folder]:
    folder = Folder(tmp_path)
    yield folder
    for process in folder.started:
        process.kill()
        process.communicate()


def test_second_loop_is_refused_under_each_name_of_the_database(folder: Folder) -> None:
    owner = folder.owner()
    (folder.path / "link.db").symlink_to("ael.db")

    for name in ("ael.db", "link.db"):
        code, _, err = folder.ael("run", "counter.py", "--db", name, "--iterations", "1")
        assert (code, f"is owned by pid {owner.pid} on " in err, "--take-over" in err) == (75, True, True), err

    assert not (folder.path / "link.db.lock").exists()


def test_loop_has_one_descriptor_that_can_write_its_database(folder: Folder) -> None:
    if not Path("/proc/self/fdinfo").is_dir():
        pytest.skip("NOT TESTED: the descriptors of a process (there is no /proc)")
    owner = folder.owner()
    assert folder.ael("state", "list")[0] == 0
    assert folder.ael("state", "set", "a", "1")[0] == 0

    modes = descriptors(owner.pid, folder.database)

    assert modes.count("rw") == 1, modes
    assert set(modes) <= {"rw", "ro"}


def descriptors(pid: int, path: Path) -> list[str]:
    """Return how a process has opened a file: `ro` or `rw` for each descriptor."""
    modes = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        if os.readlink(link) == str(path):
            lines = Path(f"/proc/{pid}/fdinfo/{link.name}").read_text().splitlines()
            flags = int(next(line.split()[1] for line in lines if line.startswith("flags:")), 8)
            modes.append("ro" if flags & os.O_ACCMODE == os.O_RDONLY else "rw")
    return modes


def test_owner_that_answers_is_not_overtaken(folder: Folder) -> None:
    owner = folder.owner()

    code, _, err = folder.ael("run", "counter.py", "--take-over", "--iterations", "1")

    assert code == 75 and f"pid {owner.pid} answers; stop it instead" in err, err
    before = folder.iterations_of(owner)
    until(lambda: folder.iterations_of(owner) > before)


def test_owner_that_was_stopped_and_overtaken_ends_and_leaves_the_new_one_alone(folder: Folder) -> None:
    old = folder.owner()
    stop_between_transactions(folder, old)
    new = folder.owner("--take-over")
    written = folder.iterations_of(old)

    old.send_signal(signal.SIGCONT)
    out, err = old.communicate(timeout=PATIENCE_S)

    assert old.returncode == 75, err
    assert "take" in err and "over" in err and "Traceback" not in err
    assert out == "", "a hook ran after the database was lost"
    assert folder.iterations_of(old) == written
    assert ask(folder.database, "SELECT status FROM v_runs ORDER BY run_id") == [("crashed",), ("running",)]
    code, _, err = folder.ael("state", "set", "a", "1")  # through the socket of the new owner
    assert code == 0, err
    assert folder.ael("run", "counter.py", "--iterations", "1")[0] == 75
    new.send_signal(signal.SIGTERM)
    out, err = new.communicate(timeout=PATIENCE_S)
    assert (new.returncode, out) == (0, "shut down\n"), err
    assert f"taken over from pid {old.pid}" in err


def stop_between_transactions(folder: Folder, process: subprocess.Popen[str]) -> None:
    """SIGSTOP a loop where it holds no lock of SQLite; one inside a transaction gets some time to leave it."""
    while True:
        process.send_signal(signal.SIGSTOP)
        connection = sqlite3.connect(folder.database, timeout=0, isolation_level=None)
        try:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("ROLLBACK")
            return
        except sqlite3.OperationalError:
            process.send_signal(signal.SIGCONT)
            time.sleep(0.01)
        finally:
            connection.close()


def test_owner_that_was_stopped_inside_a_transaction_is_named_to_be_killed(folder: Folder) -> None:
    assert folder.ael("run", "counter.py", "--iterations", "2")[0] == 0
    old = folder.python("-c", INSIDE_A_TRANSACTION)
    assert old.stdout is not None and old.stdout.readline() == "inside\n"

    code, _, err = folder.ael("run", "counter.py", "--take-over", "--iterations", "2")

    assert code == 75 and f"pid {old.pid} is inside a transaction" in err and f"`kill -9 {old.pid}`" in err, err
    holder = current_holder(folder.database)
    assert holder is not None and holder.pid == old.pid, "the lock has changed hands"
    old.kill()
    old.wait()
    assert folder.ael("run", "counter.py", "--iterations", "2")[0] == 0
    assert ask(folder.database, "SELECT count(*), max(iteration) FROM v_iterations") == [(4, 4)]


def test_owner_that_hangs_is_seen_by_status_and_overtaken(folder: Folder) -> None:
    folder.path.joinpath("hanging.py").write_text(
        "import time\nfrom ael_store import AgentBase\n\nclass Hanging(AgentBase):\n    name = 'hanging'\n"
        "    priority = 10\n\n    async def on_tick(self, context):\n        print('hangs', flush=True)\n"
        "        time.sleep(1000)\n"
    )
    old = folder.python("-m", "ael_store", "run", "hanging.py", "--quiet")
    assert old.stdout is not None and old.stdout.readline() == "hangs\n"

    assert "does not answer" in folder.ael("status")[1]
    code, _, err = folder.ael("run", "counter.py", "--take-over", "--iterations", "2", "--quiet")

    assert code == 0 and f"taken over from pid {old.pid}" in err, err

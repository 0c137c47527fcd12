"""A disk without room: the loop waits with the same commit, runs nobody twice, and goes on when there is room.

A disk that fails: the loop ends at once, and nothing is tried again.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ael_store import AELController, AgentBase, AgentManager, Settings, StateContext
from ael_store.errors import DiskFull, StorageFailed
from ael_store.store.place import lack_of_room
from ael_store.store.sqlite import translate
from ael_store.store.store import Store
from tests.acceptance.database import ask

ROOT = Path(__file__).parents[2]
PATIENCE_S = 60.0

GROWING = """
from ael_store import AgentBase

class Growing(AgentBase):
    name = "growing"
    priority = 10

    def on_tick(self, context):
        n = context.increment("n")
        context.set(f"blob/{n}", "x" * 10_000)
"""


class Counter(AgentBase):
    name = "counter"
    priority = 10
    calls = 0

    async def on_tick(self, context: StateContext) -> None:
        Counter.calls += 1
        context.increment("n")
        context.set("blob", "x" * 20_000 + str(context.get("n")))


async def limit_pages(store: Store, pages: int) -> None:
    """SQLite's own limit answers like a full disk does."""

    def pragma(connection: Any) -> None:
        connection.cursor().execute(f"PRAGMA max_page_count = {pages}").fetchall()

    assert store._driver is not None
    await store._driver.run(pragma)


def fill_after_third_iteration(controller: AELController) -> asyncio.Event:
    """Take the room away once three iterations are committed; the event says when."""
    full = asyncio.Event()

    def observe(summary: Any) -> None:
        if summary.iteration == 3:
            task = asyncio.get_running_loop().create_task(limit_pages(controller.store, 1))
            task.add_done_callback(lambda _: full.set())

    controller.observe(observe)
    return full


async def test_commit_on_a_full_disk_is_tried_again_and_no_agent_runs_twice(tmp_path: Path) -> None:
    Counter.calls = 0
    manager = AgentManager()
    manager.register(Counter())
    controller = AELController(manager, tick_rate=0, store=tmp_path / "ael.db")
    full = fill_after_third_iteration(controller)
    running = asyncio.create_task(controller.run(iterations=40))
    await full.wait()
    await asyncio.sleep(0.2)
    calls = Counter.calls
    await asyncio.sleep(0.2)
    assert Counter.calls == calls < 40, "no unit may run while a commit waits for room"
    await limit_pages(controller.store, 1_000_000)
    await running

    with sqlite3.connect(tmp_path / "ael.db") as connection:
        assert connection.execute("SELECT value FROM v_state WHERE key = 'n'").fetchall() == [("40",)]
        assert connection.execute("SELECT count(*), max(iteration) FROM v_iterations").fetchall() == [(40, 40)]
    assert Counter.calls == 40


async def test_stop_on_a_full_disk_ends_with_the_error_and_loses_no_commit(tmp_path: Path) -> None:
    manager = AgentManager()
    manager.register(Counter())
    controller = AELController(manager, tick_rate=0, store=tmp_path / "ael.db")
    full = fill_after_third_iteration(controller)
    running = asyncio.create_task(controller.start())
    await full.wait()
    await asyncio.sleep(0.1)
    await controller.stop()

    with pytest.raises(DiskFull, match="disk is full"):
        await running
    with sqlite3.connect(tmp_path / "ael.db") as connection:
        found = connection.execute("SELECT count(*), max(iteration) FROM v_iterations").fetchone()
        value = connection.execute("SELECT value FROM v_state WHERE key = 'n'").fetchone()[0]
    assert found[0] == found[1] == int(value) >= 3


async def test_without_patience_a_full_disk_ends_the_loop_at_once(tmp_path: Path) -> None:
    manager = AgentManager()
    manager.register(Counter())
    controller = AELController(manager, tick_rate=0, store=tmp_path / "ael.db", settings=Settings(full_limit=0))
    fill_after_third_iteration(controller)

    with pytest.raises(DiskFull, match="disk is full"):
        await controller.start()


# -- what a failed write means ----------------------------------------------------------------------


def failed(code: int) -> sqlite3.OperationalError:
    error = sqlite3.OperationalError("disk I/O error")
    error.sqlite_errorcode = code
    error.sqlite_errorname = "SQLITE_IOERR"
    return error


@pytest.mark.parametrize(
    ("code", "full"),
    [
        (sqlite3.SQLITE_IOERR_WRITE, True),
        (sqlite3.SQLITE_IOERR_FSYNC, False),
        (sqlite3.SQLITE_IOERR_TRUNCATE, False),
        (sqlite3.SQLITE_IOERR_SHMSIZE, False),
        (sqlite3.SQLITE_IOERR, False),
    ],
)
def test_only_a_write_that_found_no_room_may_be_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, full: bool
) -> None:
    def no_room(_descriptor: int, _data: bytes) -> int:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", no_room)
        error = translate(failed(code), tmp_path / "ael.db")

    assert isinstance(error, DiskFull) is full
    assert ("quota" in str(error)) is full
    assert list(tmp_path.iterdir()) == []


def test_write_that_failed_on_a_disk_with_room_is_a_failing_disk(tmp_path: Path) -> None:
    assert lack_of_room(tmp_path / "ael.db") is None

    error = translate(failed(sqlite3.SQLITE_IOERR_WRITE), tmp_path / "ael.db")

    assert type(error) is StorageFailed
    assert "check the disk" in str(error)


# -- real processes ---------------------------------------------------------------------------------


class Ael:
    """`ael` in a folder, on its own; what is started is killed in the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "ael.db"
        self.log = folder / "log"
        self.running: list[subprocess.Popen[bytes]] = []
        (folder / "growing.py").write_text(GROWING)

    def start(self, *more: str, before: tuple[str, ...] = (), **options: Any) -> subprocess.Popen[bytes]:
        command = [*before, sys.executable, "-m", "ael_store", "run", "growing.py", "--tick-rate", "0.01", *more]
        with self.log.open("wb") as log:
            process = subprocess.Popen(command, cwd=self.folder, env=self.environ(), stdout=log, stderr=log, **options)
        self.running.append(process)
        return process

    def call(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "ael_store", *arguments]
        return subprocess.run(
            command,
            check=False,
            cwd=self.folder,
            env=self.environ(),
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )

    def status(self) -> dict[str, Any]:
        done = self.call("status", "--json")
        assert done.returncode == 0, done.stderr
        facts: dict[str, Any] = json.loads(done.stdout)
        return facts

    def environ(self) -> dict[str, str]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("AEL_")}
        return {**clean, "PYTHONPATH": str(ROOT)}

    def iterations(self) -> int:
        try:
            return int(ask(self.path, "SELECT coalesce(max(iteration), 0) FROM v_iterations")[0][0])
        except sqlite3.OperationalError:
            return 0

    def until(self, condition: Callable[[], Any]) -> None:
        give_up = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < give_up, self.log.read_text()
            time.sleep(0.02)

    def check(self) -> None:
        """No iteration is missing or there twice, and each has had its effect once."""
        [(count, newest)] = ask(self.path, "SELECT count(*), max(iteration) FROM v_iterations")
        [(value,)] = ask(self.path, "SELECT value FROM v_state WHERE key = 'n'")
        assert count == newest == int(value)
        assert ask(self.path, "PRAGMA integrity_check") == [("ok",)]


@pytest.fixture
def ael(tmp_path: Path) -> Iterator[Ael]:
    ael = Ael(tmp_path)
    yield ael
    for process in ael.running:
        process.kill()
        process.wait()


def test_loop_at_the_limit_of_its_file_size_waits_says_so_and_goes_on_by_itself(ael: Ael) -> None:
    if not hasattr(resource, "prlimit"):
        pytest.skip("NOT TESTED: a limit that is raised while the process runs (Linux only)")
    limit = 600_000
    process = ael.start(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY)))
    ael.until(lambda: b"ulimit -f" in ael.log.read_bytes() or process.poll() is not None)
    assert process.poll() is None, ael.log.read_text()

    facts = ael.status()
    text = ael.call("status").stdout
    stands = ael.iterations()
    read = ael.call("state", "get", "n")

    assert facts["status"] == "waiting" and facts["waiting_for_room_since"].startswith("20")
    assert "waiting for room since" in text
    assert read.returncode == 0 and int(read.stdout) == stands == ael.iterations()
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    ael.until(lambda: ael.iterations() > stands + 3)
    assert ael.status()["waiting_for_room_since"] is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE_S) == 0, ael.log.read_text()
    assert "there is room again" in ael.log.read_text()
    ael.check()


def test_loop_that_waits_for_room_is_stopped_by_sigterm_with_74(ael: Ael) -> None:
    process = ael.start(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, 600_000)))
    ael.until(lambda: b"ulimit -f" in ael.log.read_bytes())

    process.send_signal(signal.SIGTERM)

    assert process.wait(PATIENCE_S) == 74, ael.log.read_text()
    assert "Traceback" not in ael.log.read_text()
    ael.check()


def test_no_room_for_a_new_database_ends_the_start_and_leaves_none(ael: Ael) -> None:
    process = ael.start(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000)))

    assert process.wait(PATIENCE_S) == 74, ael.log.read_text()
    assert "Traceback" not in ael.log.read_text()
    assert not ael.path.exists()
    assert [file.name for file in ael.folder.iterdir() if file.name.startswith(".")] == []


def test_no_room_for_the_first_commit_ends_the_start(ael: Ael) -> None:
    assert ael.start("--iterations", "3").wait(PATIENCE_S) == 0
    before = ask(ael.path, "SELECT * FROM v_runs")

    process = ael.start(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)))

    assert process.wait(PATIENCE_S) == 74, ael.log.read_text()
    assert ask(ael.path, "SELECT * FROM v_runs") == before
    ael.check()


IN_A_SMALL_FILE_SYSTEM = """
mount -t tmpfs -o size=32m small "$1" && cp growing.py "$1" && cd "$1" || exit 99
$AEL run growing.py --tick-rate 0.01 --iterations 3 --quiet || exit 98
head -c 100M /dev/zero > filler 2>/dev/null
$AEL run growing.py --iterations 1 --quiet; echo "full at the start: $?"
rm filler
$AEL run growing.py --tick-rate 0.1 --quiet & pid=$!
until $AEL status --json | grep -q '"status": *"running"'; do kill -0 $pid || exit 97; done
head -c 100M /dev/zero > filler 2>/dev/null
until $AEL status --json | grep -q '"status": *"waiting"'; do kill -0 $pid || exit 96; done
before=$($AEL state get n)
rm filler
until [ "$($AEL state get n)" -gt "$before" ]; do kill -0 $pid || exit 95; done
kill -TERM $pid; wait $pid; echo "ended: $?"
$AEL sql --json "SELECT count(*) AS count, max(iteration) AS newest FROM v_iterations"; $AEL state get n
"""


@pytest.mark.timeout(240)
def test_loop_on_a_file_system_that_is_really_full_waits_and_goes_on(ael: Ael) -> None:
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-Urm", "true"], check=False).returncode:
        pytest.skip("NOT TESTED: a full file system (this machine allows no user namespaces)")
    (ael.folder / "small").mkdir()

    done = subprocess.run(
        ["unshare", "-Urm", "sh", "-c", IN_A_SMALL_FILE_SYSTEM, "sh", ael.folder / "small"],
        cwd=ael.folder,
        env={**ael.environ(), "AEL": f"{sys.executable} -m ael_store"},
        check=False,
        capture_output=True,
        text=True,
        timeout=3 * PATIENCE_S,
    )

    assert done.returncode == 0, (done.stdout, done.stderr)
    lines = done.stdout.splitlines()
    assert lines[0] == "full at the start: 74", done.stderr
    assert lines[1] == "ended: 0", done.stderr
    [row] = json.loads("".join(lines[2:-1]))
    assert row["count"] == row["newest"] == int(lines[-1])
    assert "the disk is full" in done.stderr and "there is room again" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("call", ["fdatasync", "pwrite64"])
def test_disk_that_fails_in_a_commit_ends_the_loop_with_74_and_nothing_is_tried_again(ael: Ael, call: str) -> None:
    if shutil.which("strace") is None:
        pytest.skip("NOT TESTED: a failing disk (there is no strace)")
    assert ael.start("--iterations", "3").wait(PATIENCE_S) == 0
    trace = ael.folder / "trace"
    before = ("strace", "-f", "-o", str(trace), "-e", f"trace=fsync,fdatasync,pwrite64,{call}")
    process = ael.start(before=(*before, "-e", f"inject={call}:error=EIO:when=6+"))

    code = process.wait(PATIENCE_S)

    text, calls = ael.log.read_text(), trace.read_text().splitlines()
    if "ptrace" in text:
        pytest.skip("NOT TESTED: a failing disk (this machine does not let strace trace)")
    assert code == 74, text
    assert "check the disk" in text and "start again" in text and "Traceback" not in text
    assert "trying again" not in text
    assert sum("INJECTED" in line for line in calls) == 1, "something was tried again, or tidied up, after the failure"
    stands = ael.iterations()
    assert ael.start("--iterations", "3").wait(PATIENCE_S) == 0, ael.log.read_text()
    assert ael.iterations() >= stands + 3
    ael.check()

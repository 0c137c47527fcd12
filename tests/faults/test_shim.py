"""The shim does what it says: else no trial that uses it proves anything."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.shim import Mode, Op, Shim, read_log, require

WRITE_TWICE = """
import os, sys
descriptor = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT, 0o600)
for number in range(2):
    try:
        os.pwrite(descriptor, b"abcdefgh", 8 * number)
        os.fsync(descriptor)
    except OSError as error:
        print(error.errno)
"""


@pytest.fixture
def shim(tmp_path: Path) -> Shim:
    require()
    return Shim(tmp_path / "control")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "watched"
    place.mkdir()
    return place


def run(shim: Shim, folder: Path, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a Python program under the shim, with the orders as they are."""
    environment = shim.environment()
    return subprocess.run(
        [sys.executable, "-S", "-c", program, *arguments],
        cwd=folder,
        env={**os.environ, **environment},
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_calls_below_the_folder_are_counted_and_others_are_not(shim: Shim, folder: Path) -> None:
    shim.watch(folder)

    assert run(shim, folder, WRITE_TWICE, "file").returncode == 0
    assert run(shim, folder, WRITE_TWICE, str(folder.parent / "elsewhere")).returncode == 0

    assert [(call.op, call.name, call.offset, call.length) for call in shim.calls()] == [
        (Op.CREATE, "file", 0, 0),
        (Op.WRITE, "file", 0, 8),
        (Op.FSYNC, "file", 0, 0),
        (Op.WRITE, "file", 8, 8),
        (Op.FSYNC, "file", 0, 0),
    ]


@pytest.mark.parametrize(
    ("at", "mode", "status", "content", "errors"),
    [
        (2, Mode.ERROR_ONCE, 0, b"\0" * 8 + b"abcdefgh", 1),
        (2, Mode.ERROR_FOR_EVER, 0, b"", 2),
        (3, Mode.ERROR_ONCE, 0, b"abcdefgh" * 2, 1),
        (2, Mode.TORN_ERROR, 0, b"abcd\0\0\0\0abcdefgh", 1),
        (2, Mode.TORN_KILL, -signal.SIGKILL, b"abcd", 0),
        (4, Mode.KILL_BEFORE, -signal.SIGKILL, b"abcdefgh", 0),
        (4, Mode.KILL_AFTER, -signal.SIGKILL, b"abcdefgh" * 2, 0),
        (9, Mode.KILL_BEFORE, 0, b"abcdefgh" * 2, 0),
    ],
)
def test_chosen_call_ends_as_ordered(
    shim: Shim, folder: Path, at: int, mode: Mode, status: int, content: bytes, errors: int
) -> None:
    shim.watch(folder)
    shim.fail(at, mode, errno.ENOSPC)

    done = run(shim, folder, WRITE_TWICE, "file")

    assert done.returncode == status
    assert (folder / "file").read_bytes() == content
    assert done.stdout.split() == [str(errno.ENOSPC)] * errors
    assert (shim.struck > 0) == (at < 9)


def test_sqlite_is_under_the_shim(shim: Shim, folder: Path) -> None:
    program = """
import sqlite3
connection = sqlite3.connect("some.db")
connection.execute("PRAGMA journal_mode = WAL")
try:
    connection.execute("CREATE TABLE one (id INTEGER)")
except sqlite3.Error as error:
    print(error.sqlite_errorname)
"""
    shim.watch(folder)
    assert run(shim, folder, program).stdout == ""
    first = next(n for n, call in enumerate(shim.calls(), 1) if call.name == "some.db-wal" and call.op == Op.WRITE)
    for file in folder.iterdir():
        file.unlink()

    shim.watch(folder)
    shim.fail(first, Mode.ERROR_ONCE, errno.ENOSPC)

    assert run(shim, folder, program).stdout == "SQLITE_FULL\n"


def test_log_holds_what_took_effect_in_order(shim: Shim, folder: Path, tmp_path: Path) -> None:
    program = """
import os
with open("one", "wb", buffering=0) as file:
    file.write(b"first")
    file.write(b"second")
    file.truncate(3)
os.link("one", "two")
os.rename("two", "three")
os.unlink("one")
try:
    os.unlink("one")
except FileNotFoundError:
    pass
folder = os.open(".", os.O_RDONLY)
os.fsync(folder)
"""
    shim.watch(folder)
    shim.record(tmp_path / "log")

    done = run(shim, folder, program)

    assert done.returncode == 0, done.stderr
    records = list(read_log(tmp_path / "log"))
    assert [(record.op, record.path, record.second, record.offset, record.data) for record in records] == [
        (Op.CREATE, str(folder / "one"), "", 0, b""),
        (Op.WRITE, str(folder / "one"), "", 0, b"first"),
        (Op.WRITE, str(folder / "one"), "", 5, b"second"),
        (Op.TRUNCATE, str(folder / "one"), "", 3, b""),
        (Op.LINK, str(folder / "one"), str(folder / "two"), 0, b""),
        (Op.RENAME, str(folder / "two"), str(folder / "three"), 0, b""),
        (Op.UNLINK, str(folder / "one"), "", 0, b""),
        (Op.FSYNC, str(folder), "", 0, b""),
    ]
    assert len({record.file for record in records[:-1]}) == 1


def test_clocks_are_shifted_in_a_process_that_runs(shim: Shim) -> None:
    program = """
import sys, time
for line in sys.stdin:
    print(time.time(), time.clock_gettime(time.CLOCK_BOOTTIME), time.monotonic(), flush=True)
"""
    environment = {**os.environ, **shim.environment()}
    with subprocess.Popen(
        [sys.executable, "-S", "-c", program], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None

        def clocks() -> tuple[float, ...]:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write("\n")
            process.stdin.flush()
            return tuple(map(float, process.stdout.readline().split()))

        before = clocks()
        shim.set_clock(-7200.25)
        shim.set_boottime(86_400)
        after = clocks()
        process.stdin.close()

    passed = after[2] - before[2]
    assert after[0] - before[0] == pytest.approx(passed - 7200.25, abs=0.1)
    assert after[1] - before[1] == pytest.approx(passed + 86_400, abs=0.1)
    assert 0 <= passed < 60

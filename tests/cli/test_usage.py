"""What `ael` does with a command line before anything else, and what its exit codes mean."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from shutil import copy

import pytest

from ael_store import __version__
from ael_store.cli import failure
from ael_store.cli.main import main
from ael_store.store.upgrade import downgrade
from tests.cli.conftest import ROOT, Ael


def python(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(  # type: ignore[call-overload,no-any-return]
        [sys.executable, *arguments], env=environ, capture_output=True, text=True, check=False, **options
    )


def test_version_is_printed(ael: Ael) -> None:
    assert ael("--version").out == f"ael {__version__}\n"
    assert ael("--json", "--version").out == f"ael {__version__}\n"


def test_version_comes_before_anything_is_imported() -> None:
    done = python("-X", "importtime", "-m", "ael_store", "--version")

    assert done.stdout == f"ael {__version__}\n"
    assert not [name for name in ("typer", "rich", "sqlalchemy", "asyncio") if f" {name}\n" in done.stderr]


def test_version_takes_less_than_300_ms() -> None:
    def once() -> float:
        began = time.perf_counter()
        python("-m", "ael_store", "--version")
        return time.perf_counter() - began

    assert min(once() for _ in range(3)) < 0.3


def test_help_needs_neither_database_code_nor_rich() -> None:
    done = python("-X", "importtime", "-m", "ael_store", "--help")

    assert "agents" in done.stdout
    assert not [name for name in ("rich", "sqlalchemy", "pydantic") if f" {name}\n" in done.stderr]


@pytest.mark.parametrize("arguments", [(), ("agents",), ("db",)])
def test_without_a_verb_help_is_shown_as_wrong_usage(ael: Ael, arguments: tuple[str, ...]) -> None:
    done = ael(*arguments)

    assert done.code == 2
    assert done.out == ""
    assert "Commands:" in done.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["statsu"], "no such command 'statsu'"),
        (["agents", "lst"], "no such command 'lst'"),
        (["status", "--foo"], "no such option: --foo; `ael status --help` says what there is"),
        (["state", "get"], "missing argument 'KEY'"),
        (["state", "get", "a", "b"], "unexpected extra argument"),
        (["run"], "missing argument 'TARGET'"),
        (["run", "a.py", "--tickrate", "1"], "no such option: --tickrate"),
        (["state", "history", "a", "--limit", "none"], "--limit"),
        (["step", "many"], "N"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(ael: Ael, arguments: list[str], message: str) -> None:
    done = ael(*arguments)

    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("ael: ")
    assert message in done.err
    assert done.err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["--json", "--db", "ael.db", "state", "get", "temperature"],
        ["state", "--json", "--db", "ael.db", "get", "temperature"],
        ["state", "get", "--json", "--db", "ael.db", "temperature"],
        ["state", "get", "temperature", "--json", "--db", "ael.db"],
    ],
)
def test_global_options_stand_anywhere(ael: Ael, database: Path, arguments: list[str]) -> None:
    assert ael(*arguments).out == "23\n"


def test_option_after_the_verb_wins(ael: Ael, database: Path) -> None:
    assert ael("--db", "none.db", "state", "--db", "ael.db", "get", "temperature").code == 0


def test_database_comes_from_variable_and_settings_file(
    ael: Ael, database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database.rename(tmp_path / "house.db")
    (tmp_path / "ael.toml").write_text('db = "house.db"')
    assert ael("state", "get", "temperature").out == "23\n"

    monkeypatch.setenv("AEL_DB", str(tmp_path / "other.db"))
    assert ael("state", "get", "temperature").code == 74
    assert ael("state", "get", "temperature", "--db", "sqlite:///house.db").out == "23\n"


def test_odd_settings_are_told_of_and_wrong_ones_refused(
    ael: Ael, database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AEL_TICKRATE", "1")
    done = ael("state", "get", "temperature")
    assert done.code == 0
    assert "warning: environment variable AEL_TICKRATE is no setting" in done.err

    (tmp_path / "ael.toml").write_text("tick_rat = 1")
    done = ael("state", "get", "temperature")
    assert done.code == 2
    assert "did you mean 'tick_rate'?" in done.err


# -- databases that can't be read -------------------------------------------------------------------

READING = [
    ["status"],
    ["agents", "list"],
    ["agents", "show", "counter"],
    ["state", "list"],
    ["state", "get", "count"],
    ["state", "history", "count"],
    ["events", "list"],
    ["events", "tail"],
    ["sql", "SELECT 1"],
    ["db", "current"],
    ["db", "check"],
]
CHANGING = [
    ["state", "set", "a", "1"],
    ["state", "delete", "a"],
    ["events", "emit", "ring"],
    ["agents", "disable", "counter"],
    ["agents", "enable", "counter"],
    ["agents", "release", "counter"],
    ["agents", "rename", "counter", "other"],
    ["agents", "forget", "counter"],
    ["pause"],
    ["resume"],
    ["step"],
    ["db", "upgrade"],
    ["db", "downgrade", "0001"],
]


@pytest.mark.parametrize("arguments", READING + CHANGING, ids=" ".join)
def test_missing_database_is_said_and_not_created(ael: Ael, tmp_path: Path, arguments: list[str]) -> None:
    done = ael(*arguments)

    assert (done.code, done.out) == (74, "")
    assert "ael.db does not exist; `ael run` creates it, --db or AEL_DB names another" in done.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", READING + CHANGING, ids=" ".join)
def test_file_that_is_no_database_is_left_alone(ael: Ael, tmp_path: Path, arguments: list[str]) -> None:
    (tmp_path / "ael.db").write_text("dear diary\n" * 100)

    done = ael(*arguments)

    assert (done.code, done.out) == (65, "")
    assert "is not a SQLite database" in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["ael.db"]


@pytest.mark.parametrize("arguments", READING[:-2] + CHANGING[:-2], ids=" ".join)
def test_old_schema_names_both_revisions_and_the_way_out(ael: Ael, old: Path, arguments: list[str]) -> None:
    done = ael(*arguments)

    assert (done.code, done.out) == (78, "")
    assert "is at revision 0001, this program needs 0008: run `ael db upgrade`" in done.err


@pytest.fixture(scope="session")
def downgraded(filled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("old") / "ael.db"
    copy(filled, path)
    downgrade(path, "0001", backup=False)
    return path


@pytest.fixture
def old(downgraded: Path, tmp_path: Path) -> Path:
    return Path(copy(downgraded, tmp_path / "ael.db"))


@pytest.mark.parametrize("arguments", [["status"], ["pause"], ["db", "upgrade"], ["db", "check"]], ids=" ".join)
def test_newer_schema_is_refused(ael: Ael, database: Path, arguments: list[str]) -> None:
    with sqlite3.connect(database) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.close()

    done = ael(*arguments)

    assert done.code == 78
    assert "was written by a newer ael_store" in done.err + done.out


def test_empty_file_folder_and_foreign_database_are_told_apart(ael: Ael, tmp_path: Path) -> None:
    (tmp_path / "empty.db").touch()
    sqlite3.connect(tmp_path / "foreign.db").execute("CREATE TABLE mine (x)")

    assert "is empty" in (empty := ael("status", "--db", "empty.db")).err
    assert "did not make" in (foreign := ael("status", "--db", "foreign.db")).err
    assert "is a folder" in (folder := ael("status", "--db", ".")).err
    assert "private database of one loop" in (memory := ael("status", "--db", ":memory:")).err
    assert (empty.code, foreign.code, folder.code, memory.code) == (65, 65, 74, 2)


def test_database_in_a_folder_below_is_suggested(ael: Ael, database: Path, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    database.rename(tmp_path / "home/ael.db")

    assert "did you mean --db home/ael.db?" in ael("status").err


# -- failures ---------------------------------------------------------------------------------------


def test_unexpected_failure_is_one_line_unless_debug(ael: Ael, database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_arguments: object) -> None:
        raise RuntimeError("two\nlines \x1b[31m")

    monkeypatch.setattr("ael_store.store.reader.Reader.state", fail)

    done = ael("state", "list")
    assert done.code == 1
    assert done.err == (
        "ael: internal error: RuntimeError: two\n     lines \\x1b[31m; run again with --debug to see where\n"
    )

    done = ael("state", "list", "--debug")
    assert done.code == 1
    assert "Traceback (most recent call last)" in done.err


def test_interrupt_ends_without_a_traceback(ael: Ael, database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ael_store.store.reader.Reader.state", interrupt)

    done = ael("state", "list")

    assert done.code == failure.INTERRUPTED
    assert "Traceback" not in done.err


def test_closed_pipe_is_no_failure(database: Path) -> None:
    numbers = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c WHERE x < 100000) SELECT x FROM c"
    command = f"set -o pipefail; {sys.executable} -m ael_store sql '{numbers}' | head -1"

    done = subprocess.run(
        ["bash", "-c", command],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )

    assert (done.returncode, done.stdout, done.stderr) == (0, "x\n", "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_full_disk_at_stdout_is_told(database: Path) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "ael_store", "state", "list"],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )

    assert done.returncode == 74
    assert done.stderr == "ael: standard output can't be written: No space left on device\n"


def test_stdout_that_is_not_utf_8_gets_escapes(database: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ael_store", "sql", "SELECT 'größer 😀' AS a", "--json"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=False,
    )

    assert json.loads(done.stdout.decode("ascii")) == [{"a": "größer 😀"}]


def test_unsupported_platform_is_told_at_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "win32")

    assert main(["status"]) == 1
    assert capsys.readouterr().err == "ael: win32 is not supported: ael runs on Linux and macOS\n"

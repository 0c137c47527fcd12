"""`ael doctor`: whatever state a database is in, it says what to do, and changes nothing."""

from __future__ import annotations

import os
import re
import signal
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from ael_store.cli import doctor_machine
from ael_store.cli.doctor_database import ADVICE
from ael_store.schema.sqlite_views import VIEWS
from ael_store.store.sqlite_build import sqlite_build
from ael_store.store.upgrade import downgrade
from tests.cli.conftest import Ael, Done, Start, until


def found(done: Done, check: str) -> list[dict[str, Any]]:
    assert not done.err, done.err
    return [one for one in done.json["checks"] if one["check"] == check]


def one(done: Done, check: str) -> tuple[str, str]:
    [finding] = found(done, check)
    return finding["status"], f"{finding['found']} → {finding['fix']}"


def files(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir() if path.is_file()}


def test_good_database_is_well_and_nothing_changes(ael: Ael, database: Path, tmp_path: Path) -> None:
    os.chmod(database, 0o600)
    before = files(tmp_path)

    done = ael("doctor", "--json")

    assert (done.code, done.json["fail"]) == (0, 0)
    assert one(done, "schema")[0] == one(done, "database")[0] == one(done, "files")[0] == "ok"
    assert one(done, "lock") == ("ok", "nobody holds the database → None")
    assert found(done, "libraries")[0]["found"].count(" ") > 8
    assert "run 1 stopped at" in one(done, "last run")[1]
    assert files(tmp_path) == before


def test_what_fails_comes_first_for_people(ael: Ael, database: Path) -> None:
    database.write_bytes(os.urandom(10_000))

    done = ael("doctor")

    lines = done.out.splitlines()
    assert done.code == 1
    assert lines[0].startswith("fail  database: ")
    assert lines[0].endswith("ael.db is not a SQLite database; name another file with --db or AEL_DB")
    words = [line.split()[0] for line in lines[:-1] if not line.startswith(" ")]
    assert words == sorted(words, key=["fail", "warn", "ok"].index)
    assert re.fullmatch(r"1 fail, \d+ warn, \d+ ok", lines[-1])


def test_without_a_database_it_names_one_nearby(ael: Ael, database: Path, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    database.rename(tmp_path / "home" / "ael.db")

    done = ael("doctor", "--json")

    assert done.code == 0
    assert one(done, "database")[0] == "warn"
    assert "did you mean --db home/ael.db?" in one(done, "database")[1]
    assert not list(tmp_path.glob("ael.db*"))


def test_damage_is_named_with_the_command_that_saves_what_can_be_read(ael: Ael, database: Path) -> None:
    raw = bytearray(database.read_bytes())
    raw[2048 * 5 : 2048 * 5 + 1500] = bytes(1500)
    database.write_bytes(raw)

    done = ael("doctor", "--json")

    assert done.code == 1
    status, text = one(done, "database")
    assert status == "fail"
    assert "is damaged" in text
    assert "ael db recover" in text


def test_value_changed_behind_the_loop_is_noticed(ael: Ael, database: Path) -> None:
    with sqlite3.connect(database) as connection:
        connection.execute("UPDATE state SET value = '99' WHERE value = '23'")
    connection.close()

    done = ael("doctor", "--json")

    assert (done.code, one(done, "database")[0]) == (1, "fail")


@pytest.mark.parametrize(
    ("revision", "setting", "status", "text"),
    [
        ("0004", "auto", "warn", "revision 0004; this program needs"),
        ("0004", "never", "fail", "`ael db upgrade`"),
    ],
)
def test_older_schema(
    ael: Ael, database: Path, monkeypatch: pytest.MonkeyPatch, revision: str, setting: str, status: str, text: str
) -> None:
    downgrade(database, revision, backup=False)
    monkeypatch.setenv("AEL_UPGRADE", setting)

    done = ael("doctor", "--json")

    assert one(done, "schema")[0] == status
    assert text in one(done, "schema")[1]


def test_newer_schema(ael: Ael, database: Path) -> None:
    with sqlite3.connect(database) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.close()

    done = ael("doctor", "--json")

    assert done.code == 1
    assert "was written by a newer ael_store" in one(done, "database")[1]


def test_wrong_settings_and_unknown_variables_are_findings(
    ael: Ael, database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AEL_TICKRATE", "2")
    done = ael("doctor", "--json")
    assert (
        "AEL_TICKRATE is no setting and has no effect; did you mean 'AEL_TICK_RATE'?"
        in (found(done, "settings")[0]["found"])
    )

    (tmp_path / "ael.toml").write_text("tickrate = 2\n")
    done = ael("doctor", "--json", "--db", "ael.db")
    assert done.code == 1
    assert "did you mean 'tick_rate'?" in one(done, "settings")[1]
    assert one(done, "schema")[0] == "ok"


def test_missing_secret_is_named(ael: Ael, database: Path, tmp_path: Path) -> None:
    (tmp_path / "ael.toml").write_text('[agents.a]\nclass = "A"\nconfig = { token = { secret = "DOOR_TOKEN" } }\n')

    status, text = one(ael("doctor", "--json"), "secrets")

    assert status == "warn"
    assert "DOOR_TOKEN_FILE" in text


def test_files_that_others_may_read(ael: Ael, database: Path) -> None:
    os.chmod(database, 0o644)

    [finding] = [one for one in found(ael("doctor", "--json"), "files") if one["status"] == "warn"]

    assert finding["fix"] == f"`chmod o= {database}`"


def test_running_loop_and_what_it_leaves_when_it_is_killed(
    ael: Ael, counter: str, start: Start, tmp_path: Path
) -> None:
    run = start("run", counter, "--tick-rate", "0.01")
    run.wait_for("iteration 1 ")
    until(lambda: ael("state", "get", "count").code == 0)

    done = ael("doctor", "--json")
    assert done.json["fail"] == 0
    assert f"held by pid {run.process.pid}" in one(done, "lock")[1]
    assert "which answers: running" in one(done, "lock")[1]

    run.process.send_signal(signal.SIGSTOP)
    done = ael("doctor", "--json")
    assert (done.code, one(done, "lock")[0]) == (1, "fail")
    assert f"`kill {run.process.pid}`" in one(done, "lock")[1]

    run.stop(signal.SIGKILL)
    before = files(tmp_path)
    done = ael("doctor", "--json")
    assert done.code == 0
    assert one(done, "lock")[1].startswith("nobody")
    assert "left behind by a loop that was killed" in one(done, "socket")[1]
    assert "ended without a clean stop" in one(done, "last run")[1]
    del before["ael.db-shm"]  # readers of a log note there how far they are
    assert {**files(tmp_path), **before} == files(tmp_path)


def test_each_kind_of_problem_has_advice() -> None:
    kinds = set(re.findall(r"(?:^|UNION ALL\s+)\s*SELECT '(\w+)'", VIEWS["v_problems"]))

    assert len(kinds) > 10
    assert kinds == set(ADVICE)


@pytest.mark.parametrize(
    ("version", "wanted", "fits"),
    [("2.1.9", ">=2.1,<2.2", True), ("2.2.0b1", ">=2.1,<2.2", False), ("15", ">=14", True), ("0.21", ">=0.22", False)],
)
def test_versions_are_compared_by_their_numbers(version: str, wanted: str, fits: bool) -> None:
    assert doctor_machine._fits(version, wanted) is fits


def test_check_that_goes_wrong_keeps_no_other_from_its_turn(
    ael: Ael, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ael_store.cli.doctor_database.readable_by_others", lambda path: 1 / 0)

    done = ael("doctor", "--json")

    assert one(done, "files") == ("fail", "could not be looked at: ZeroDivisionError: division by zero → None")
    assert one(done, "schema")[0] == "ok"


@pytest.mark.parametrize(
    ("version", "may_damage"),
    [
        ((3, 40, 1), True),
        ((3, 50, 6), True),
        ((3, 50, 7), False),
        ((3, 51, 2), True),
        ((3, 51, 3), False),
        ((3, 53, 0), False),
    ],
)
def test_versions_of_sqlite_that_may_damage_a_file(version: tuple[int, ...], may_damage: bool) -> None:
    assert sqlite_build(version).may_damage is may_damage

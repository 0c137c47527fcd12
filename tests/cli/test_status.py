"""`ael status` with no loop running."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from ael_store.store.lock import DatabaseLock
from tests.cli.conftest import Ael


def test_status_with_json_has_everything(ael: Ael, database: Path) -> None:
    status = ael("status", "--json").json

    assert (status["status"], status["running"], status["pid"]) == ("stopped", False, None)
    assert (status["iteration"], status["keys"], status["revision"]) == (3, 2, "0008")
    assert status["agents"] == {"active": 3}
    assert status["last_iteration"]["iteration"] == 3
    assert status["run"]["status"] == "stopped"
    assert (status["pending"], status["dead_letters"], status["problems"]) == (0, 0, [])
    assert status["database"] == str(database)
    assert status["size_bytes"] == database.stat().st_size


def test_status_for_people_fits_on_a_screen(ael: Ael, database: Path) -> None:
    lines = ael("status").out.splitlines()

    assert [line.split()[0] for line in lines] == ["loop", "iteration", "agents", "state", "events", "database"]
    assert lines[0].startswith("loop       not running; the last run stopped at ")
    assert lines[3] == "state      2 keys"


def test_problems_come_first(ael: Ael, database: Path) -> None:
    with sqlite3.connect(database) as connection:
        connection.execute("UPDATE agents SET quarantined_us = 1, failures = 20 WHERE name = 'broken'")
    connection.close()

    lines = ael("status").out.splitlines()

    assert lines[0].startswith("quarantined agent  broken: 20 errors in a row; last: ValueError: no sensor")
    assert lines[1] == ""
    assert "2 active, 1 quarantined" in ael("status").out


def test_run_that_nobody_holds_any_more_has_crashed(ael: Ael, database: Path) -> None:
    with sqlite3.connect(database) as connection:
        connection.execute("UPDATE runs SET status = 'running', ended_us = NULL")
    connection.close()

    assert ael("status", "--json").json["status"] == "crashed"
    assert "not running; the last run crashed at about " in ael("status").out


def test_loop_that_begins_is_starting_and_a_command_is_no_loop(ael: Ael, database: Path) -> None:
    with DatabaseLock(database).held("loop"):
        assert ael("status", "--json").json["status"] == "starting"
    with DatabaseLock(database).held("ael state.set"):
        status = ael("status", "--json").json
        assert (status["status"], status["running"]) == ("stopped", False)


def test_database_without_a_run_is_new(ael: Ael, tmp_path: Path) -> None:
    from ael_store.store.create import create_database

    create_database(tmp_path / "ael.db")

    status = ael("status", "--json").json
    assert (status["status"], status["iteration"], status["last_iteration"], status["agents"]) == ("new", 0, None, {})
    assert "there was no run yet" in ael("status").out
    assert "agents     none yet" in ael("status").out

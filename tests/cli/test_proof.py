"""`ael db verify`, and what stays provable when a value is redacted."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from tests.cli.conftest import Ael
from tests.loops import rows

SECRET = "4711-0815-secret"


def change(path: Path, statement: str) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute(statement)


def test_untouched_database_is_what_was_committed(ael: Ael, database: Path) -> None:
    done = ael("db", "verify")

    assert (done.code, done.err) == (0, "")
    assert "5 commits" in done.out
    assert ael("db", "verify", "--json").json["problems"] == []


def test_changed_value_is_found_with_its_place_and_the_code_of_damage(ael: Ael, database: Path) -> None:
    change(database, "UPDATE state_changes SET value = '99' WHERE id = 2")

    done = ael("db", "verify")

    assert done.code == 65
    assert "(iteration 1): its rows in state_changes (1 to 2) are not what was committed" in done.out
    assert ael("db", "verify", "--json").json["problems"] == done.out.splitlines()


def test_value_changed_before_an_unclean_start_stops_that_start(ael: Ael, database: Path, run_here: Ael) -> None:
    change(database, "UPDATE runs SET status = 'running', digest = NULL")
    change(database, "UPDATE state SET value = '99' WHERE key_id = 1")
    Path("agents.py").write_text("from ael_store import AgentBase\nclass A(AgentBase):\n    name = 'a'\n")
    before = database.read_bytes()

    done = run_here("agents.py", "--iterations", "1")

    assert done.code == 65
    assert "is not what was committed: state key 'temperature'" in done.err
    assert f"ael db recover {database}" in done.err
    assert database.read_bytes() == before


def test_redacted_key_is_gone_from_the_file_and_the_proof_holds(ael: Ael, database: Path) -> None:
    ael("state", "set", "token", f'"{SECRET}"')
    ael("state", "set", "token", f'{{"old": "{SECRET}"}}')
    assert SECRET.encode() in database.read_bytes()

    assert ael("state", "redact", "token", "--dry-run", "--json").json == {
        "key": "token",
        "values": 2,
        "changed": False,
    }
    done = ael("state", "redact", "token", "--yes")

    assert done.out == "blanked 2 values of token (committed); backups made before still have them\n"
    assert SECRET.encode() not in database.read_bytes()
    assert not Path(f"{database}-wal").exists() or SECRET.encode() not in Path(f"{database}-wal").read_bytes()
    assert ael("state", "get", "token").code == 1
    history = ael("state", "history", "token", "--json").json
    assert [(row["operation"], row["old_value"], row["new_value"]) for row in history] == [
        ("delete", "(redacted)", None),
        ("set", "(redacted)", "(redacted)"),
        ("set", None, "(redacted)"),
    ]
    assert ael("db", "verify").code == 0
    assert ael("state", "redact", "token", "--json", "--yes").json["values"] == 0


def test_redacted_event_keeps_its_place_and_nothing_of_its_data(ael: Ael, database: Path) -> None:
    number = ael(
        "events", "emit", "login", f'{{"password": "{SECRET}"}}', "--metadata", f'{{"x": "{SECRET}"}}', "--json"
    ).json["id"]

    done = ael("events", "redact", str(number), "--yes")

    assert done.out == f"blanked event {number} (login from outside) (committed); backups made before still have it\n"
    assert SECRET.encode() not in database.read_bytes()
    assert rows(database, f"SELECT type, data, metadata FROM v_events WHERE id = {number}") == [
        ("login", '"(redacted)"', "{}")
    ]
    assert ael("db", "verify").code == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("state", "redact", "nothing", "--yes"), "there is no key 'nothing'"),
        (("events", "redact", "999", "--yes"), "there is no event 999"),
    ],
)
def test_what_does_not_exist_is_not_redacted(ael: Ael, database: Path, arguments: tuple[str, ...], said: str) -> None:
    done = ael(*arguments)

    assert done.code == 1
    assert said in done.err


def test_redacted_value_that_shows_again_is_a_problem(ael: Ael, database: Path) -> None:
    ael("state", "set", "token", f'"{SECRET}"')
    ael("state", "redact", "token", "--yes")
    change(database, f"UPDATE state_changes SET value = '\"{SECRET}\"' WHERE value = '\"(redacted)\"'")

    done = ael("db", "verify")

    assert done.code == 65
    assert "redacted, but it shows a value" in done.out

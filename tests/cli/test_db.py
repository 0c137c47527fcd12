"""`ael db`: moving the schema and looking at it."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from ael_store.store.lock import DatabaseLock
from tests.cli.conftest import Ael
from tests.loops import rows


def revision(path: Path) -> str:
    [found] = rows(path, "SELECT version_num FROM alembic_version")
    return str(found)


def test_current_prints_the_revision(ael: Ael, database: Path) -> None:
    assert (ael("db", "current").out, ael("db", "current").err) == ("0008\n", "")
    assert ael("db", "current", "--json").json == {"revision": "0008", "head": "0008", "up_to_date": True}


def test_down_and_up_again_with_backups(ael: Ael, database: Path) -> None:
    down = ael("db", "downgrade", "-1")
    assert down.code == 0
    assert revision(database) == "0007"
    [backup] = [line.removeprefix("backup: ") for line in down.out.splitlines() if line.startswith("backup")]
    assert revision(Path(backup)) == "0008"
    assert "schema 0008 -> 0007" in down.err
    assert ael("db", "current").err == "this program needs 0008: run `ael db upgrade`\n"

    up = ael("db", "upgrade", "--json")
    assert {**up.json, "backup": None} == {"from": "0007", "to": "0008", "backup": None, "changed": True}
    assert revision(Path(up.json["backup"])) == "0007"
    assert ael("db", "check").code == 0
    assert ael("db", "upgrade").out == f"{database} is at revision 0008 already\n"


def test_no_backup_makes_none(ael: Ael, database: Path, tmp_path: Path) -> None:
    assert ael("db", "downgrade", "0001", "--no-backup").code == 0
    assert ael("db", "upgrade", "0005", "--no-backup", "--json").json["backup"] is None

    assert not list(tmp_path.glob("*.bak-*"))
    assert revision(database) == "0005"


def test_dry_run_changes_nothing(ael: Ael, database: Path, tmp_path: Path) -> None:
    done = ael("db", "downgrade", "0001", "--dry-run", "--json")

    assert done.json == {"from": "0008", "to": "0001", "backup": None, "changed": False}
    assert revision(database) == "0008"
    assert not list(tmp_path.glob("*.bak-*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["upgrade", "8"],
            "there is no revision '8' to go to; the revisions are 0001, 0002, 0003, ",
        ),
        (["upgrade", "0001"], "use `ael db downgrade 0001`"),
        (["downgrade", "-9"], "there is no revision '-9'"),
        (["downgrade"], "missing argument 'REV'"),
    ],
)
def test_impossible_revision_is_refused(ael: Ael, database: Path, arguments: list[str], message: str) -> None:
    done = ael("db", *arguments)

    assert done.code == 2
    assert message in done.err
    assert revision(database) == "0008"


def test_downgrade_asks_on_a_terminal(ael: Ael, database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import typer

    def say_no(question: str, **_options: object) -> None:
        raise typer.Abort

    monkeypatch.setattr("typer.confirm", say_no)
    monkeypatch.setattr("ael_store.cli.agents.is_interactive", lambda: True)

    assert ael("db", "downgrade", "0001").code == 1
    assert revision(database) == "0008"
    assert ael("db", "downgrade", "0001", "--yes", "--no-backup").code == 0


def test_owner_keeps_the_schema_where_it_is(ael: Ael, database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ael_store.cli.db.LOCK_WAIT_S", 0.0)

    with DatabaseLock(database).held("loop"):
        done = ael("db", "downgrade", "0001")

    assert done.code == 75
    assert "is owned by pid" in done.err
    assert revision(database) == "0008"


def test_check_tells_what_is_wrong(ael: Ael, database: Path) -> None:
    assert ael("db", "check").out == f"{database}: revision 0008, no problems\n"

    with sqlite3.connect(database) as connection:
        connection.execute("CREATE TABLE mine (x)")
    connection.close()

    done = ael("db", "check", "--json")
    assert done.code == 1
    assert done.json == {
        "revision": "0008",
        "head": "0008",
        "up_to_date": True,
        "damaged": False,
        "problems": ["table mine is not ours"],
    }
    assert ael("db", "check").out == "table mine is not ours\n"


def test_check_of_an_old_schema_ends_with_78(ael: Ael, database: Path) -> None:
    ael("db", "downgrade", "0007", "--no-backup")

    done = ael("db", "check")

    assert (done.code, done.out) == (78, "revision 0007, this program needs 0008\n")


def test_check_of_a_damaged_file_ends_with_65(ael: Ael, database: Path) -> None:
    raw = bytearray(database.read_bytes())
    for page in range(4, len(raw) // 4096):
        raw[page * 4096 : page * 4096 + 100] = b"\xff" * 100
    database.write_bytes(raw)

    done = ael("db", "check")

    assert done.code == 65

"""Upgrading and downgrading: reports, backups, refusals, and what stays when something fails."""

from __future__ import annotations

import re
import shutil
import sqlite3
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ael_store.errors import AelError, DatabaseDamaged, SchemaTooNew, StorageFailed, UsageError
from ael_store.store import progress
from ael_store.store.upgrade import (
    HEAD,
    UpgradeReport,
    check,
    create_database,
    current_revision,
    downgrade,
    upgrade,
)
from tests.migrations.fill import ask, connect, digests, execute, layout

BACKUP = re.compile(r"ael\.db\.bak-0001-\d{8}T\d{6}Z")


def everything(path: Path) -> dict[str, tuple[int, str]]:
    return digests(path, layout(path))


def names(path: Path) -> set[str]:
    """What lies beside the database, SQLite's own files left out."""
    return {file.name for file in path.parent.iterdir()} - {"ael.db", "ael.db-wal", "ael.db-shm"}


def set_revision(path: Path, revision: str) -> None:
    ask(path, "UPDATE alembic_version SET version_num = ?", revision)


def test_upgrade_reports_what_it_did_and_tells_each_step(filled: Callable[[str], Path]) -> None:
    path = filled("0001")
    lines: list[str] = []

    report = upgrade(path, progress=lines.append)

    assert report.from_revision == "0001"
    assert report.to_revision == HEAD
    assert current_revision(path) == HEAD
    assert lines[0] == f"upgrading {path} from revision 0001 to {HEAD}"
    assert lines[1].startswith(f"backing up {path} (")
    assert lines[2:] == [
        f"backup {report.backup} is made and verified",
        "schema 0001 -> 0002",
        "schema 0002 -> 0003",
        "schema 0003 -> 0004",
        "schema 0004 -> 0005",
        "schema 0005 -> 0006",
        "schema 0006 -> 0007",
        "schema 0007 -> 0008",
        "schema is at revision 0008",
    ]


def test_upgrade_that_takes_long_gives_signs_of_life(
    filled: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = filled("0001")
    monkeypatch.setattr(progress, "SILENCE_S", 0.001)
    lines: list[str] = []

    upgrade(path, progress=lines.append)

    assert f"moving from revision 0001 to {HEAD}, 0 s so far" in lines


def test_upgrade_of_an_up_to_date_database_does_nothing(path: Path) -> None:
    create_database(path)

    assert upgrade(path) == UpgradeReport(HEAD, HEAD, None)
    assert downgrade(path, HEAD) == UpgradeReport(HEAD, HEAD, None)
    assert names(path) == set()


def test_upgrade_of_an_empty_file_makes_a_database(path: Path) -> None:
    path.touch()

    assert upgrade(path) == UpgradeReport(None, HEAD, None)
    assert check(path).problems == []


def test_backup_is_the_database_as_it_was_and_private(filled: Callable[[str], Path]) -> None:
    path = filled("0001")
    before = everything(path)

    backup = upgrade(path).backup

    assert backup is not None
    assert BACKUP.fullmatch(backup.name)
    assert backup.parent == path.parent
    assert stat.S_IMODE(backup.stat().st_mode) == 0o600
    assert current_revision(backup) == "0001"
    assert everything(backup) == before
    assert check(backup).problems == []
    assert ask(backup, "PRAGMA auto_vacuum") == [(2,)]


def test_backup_contains_what_is_still_in_the_write_ahead_log(filled: Callable[[str], Path]) -> None:
    path = filled("0001")
    writer = connect(path)
    writer.execute("UPDATE keys SET name = 'renamed' WHERE id = 1")

    backup = upgrade(path).backup

    assert backup is not None
    assert ask(backup, "SELECT name FROM keys WHERE id = 1") == [("renamed",)]
    writer.close()


def test_backups_never_replace_one_another(filled: Callable[[str], Path]) -> None:
    path = filled("0001")
    first = upgrade(path).backup
    assert first is not None
    for second in range(60):  # the names that the next one might want
        first.with_name(f"ael.db.bak-0007-20260101T0000{second:02}Z").touch()

    others = [downgrade(path, "0001").backup, upgrade(path).backup, downgrade(path, "0001").backup]

    assert len({first, *others}) == 4
    assert all(backup is not None and backup.stat().st_size > 0 for backup in others)


def test_upgrade_without_backup_makes_none(filled: Callable[[str], Path]) -> None:
    path = filled("0002")

    report = upgrade(path, backup=False)

    assert report.backup is None
    assert names(path) == set()


@pytest.mark.parametrize("move", [upgrade, lambda path: downgrade(path, "0001")])
def test_newer_schema_is_refused_and_the_backups_are_named(path: Path, move: Callable[[Path], object]) -> None:
    create_database(path)
    set_revision(path, "9999")
    backup = path.with_name("ael.db.bak-0007-20260101T000000Z")
    shutil.copyfile(path, backup)

    with pytest.raises(SchemaTooNew, match="database schema 9999 was written by a newer ael_store") as caught:
        move(path)

    assert str(backup) in str(caught.value)
    assert caught.value.exit_code == 78
    assert current_revision(path) == "9999"


@pytest.mark.parametrize("revision", ["0099", "-1", "+9", "base", "head~1", "", "-"])
def test_unknown_target_is_refused_with_the_revisions_that_exist(path: Path, revision: str) -> None:
    path.touch()
    upgrade(path, revision="0001")

    with pytest.raises(UsageError, match="the revisions are 0001, 0002, 0003, 0004, 0005, 0006, 0007"):
        downgrade(path, revision)


def test_wrong_direction_is_refused_with_the_right_command(filled: Callable[[str], Path]) -> None:
    path = filled("0002")

    with pytest.raises(UsageError, match="use `ael db downgrade 0001`"):
        upgrade(path, revision="0001")
    with pytest.raises(UsageError, match="use `ael db upgrade`"):
        downgrade(path, "0008")


def test_short_of_space_nothing_is_begun(filled: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = filled("0001")
    usage = type(shutil.disk_usage("/"))(10**9, 10**9 - 1000, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)

    with pytest.raises(StorageFailed, match=r"has 0\.0 MB free, the upgrade .* needs 0\.[1-9]") as caught:
        upgrade(path)

    assert caught.value.exit_code == 74
    assert current_revision(path) == "0001"
    assert names(path) == set()
    with pytest.raises(StorageFailed, match="as much as the database"):
        upgrade(path, backup=False)


def test_disk_that_fills_up_midway_leaves_the_database_as_it_was(
    filled: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = filled("0001")
    before = everything(path)
    real = sqlite3.connect

    def small(*args: Any, **options: Any) -> sqlite3.Connection:
        connection: sqlite3.Connection = real(*args, **options)
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count = {pages + 3}")
        return connection

    monkeypatch.setattr(sqlite3, "connect", small)
    with pytest.raises(StorageFailed, match="the disk is full") as caught:
        upgrade(path)
    monkeypatch.undo()

    (backup,) = names(path)
    assert backup in str(caught.value)
    assert current_revision(path) == "0001"
    assert everything(path) == before
    assert check(path).problems == []


def test_rows_that_lost_their_parent_stop_the_upgrade(filled: Callable[[str], Path]) -> None:
    path = filled("0001")
    execute(path, "DELETE FROM agents WHERE id = 1")

    with pytest.raises(DatabaseDamaged, match="rows refer to rows that do not exist, in agent_stats") as caught:
        upgrade(path)

    assert "The database is as it was; its backup is" in str(caught.value)
    assert current_revision(path) == "0001"


def test_failing_revision_leaves_everything_as_it_was(filled: Callable[[str], Path]) -> None:
    """A table that is in the way of the last of two revisions undoes the first one too."""
    path = filled("0001")
    execute(path, "CREATE TABLE tasks (what TEXT)")
    before = everything(path)

    with pytest.raises(AelError, match=r"table tasks already exists.*The database is as it was"):
        upgrade(path)

    assert current_revision(path) == "0001"
    assert everything(path) == before


def test_symbolic_link_is_followed_and_the_backup_lies_beside_the_file(
    filled: Callable[[str], Path], tmp_path: Path
) -> None:
    path = filled("0001")
    link = tmp_path / "elsewhere" / "link.db"
    link.parent.mkdir()
    link.symlink_to(path)

    backup = upgrade(link).backup

    assert backup is not None
    assert backup.parent == path.parent
    assert link.is_symlink()
    assert current_revision(path) == HEAD


def test_name_with_signs_of_addresses_and_patterns_works(tmp_path: Path) -> None:
    path = tmp_path / "50% [a]#b?c ü.db"
    path.touch()
    upgrade(path, revision="0001")

    backup = upgrade(path).backup

    assert backup is not None
    assert check(path).problems == []
    assert {file.name for file in tmp_path.iterdir()} >= {path.name, backup.name}

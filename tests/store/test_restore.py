"""Restoring: the backup takes the name, the old file is kept with everything that belongs to it."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from ael_store.errors import DatabaseDamaged, DatabaseNotUsable, NotADatabase, OwnedElsewhere, SchemaTooNew, UsageError
from ael_store.store.backup import make_backup
from ael_store.store.create import create_database
from ael_store.store.restore import restore
from ael_store.store.revision import current_revision, restore_marker
from ael_store.store.upgrade import downgrade
from ael_store.store.verify import verify
from tests.loops import rows
from tests.store.files import checksums, fill, public, quiet


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return fill(tmp_path / "ael.db", 10)


@pytest.fixture
def backup(path: Path) -> Path:
    """A backup of its tenth iteration; the database goes on."""
    made = make_backup(path, path.with_name("backup.db"), quiet).path
    fill(path, 5)
    return made


@contextmanager
def with_log(path: Path) -> Iterator[None]:
    """Leave a log beside a database, as a killed process does."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("UPDATE iterations SET missed = 7 WHERE id = 1")
    copies = {end: path.with_name(f"{path.name}{end}").read_bytes() for end in ("", "-wal")}
    connection.close()
    for end, content in copies.items():
        path.with_name(f"{path.name}{end}").write_bytes(content)
    yield


def test_database_is_what_the_backup_was_and_the_old_one_is_kept(path: Path, backup: Path) -> None:
    old, wanted = public(path), public(backup)

    report = restore(path, backup, quiet)

    assert public(path) == wanted
    assert verify(path).problems == []
    assert report.kept is not None
    assert public(report.kept) == old
    assert (report.now.iteration, report.before and report.before.iteration) == (10, 15)
    fill(path, 3)
    assert rows(path, "SELECT max(id) FROM iterations") == [13]


def test_log_of_the_old_database_goes_with_it(path: Path, backup: Path) -> None:
    with with_log(path):
        kept = restore(path, backup, quiet).kept

    assert not path.with_name("ael.db-wal").exists()
    assert kept is not None
    assert rows(kept, "SELECT missed FROM iterations WHERE id = 1") == [7]


def test_token_is_higher_than_any_owner_had(path: Path, backup: Path) -> None:
    [before] = rows(path, "SELECT token FROM lease")

    restore(path, backup, quiet)

    assert rows(path, "SELECT token FROM lease")[0] > before
    assert rows(path, "SELECT json(value) FROM meta WHERE name = 'restored_from'") == [json.dumps(str(backup))]


def test_dry_run_touches_nothing(path: Path, backup: Path) -> None:
    before = checksums(path.parent)

    report = restore(path, backup, quiet, dry_run=True)

    assert report.kept is not None
    assert not report.kept.exists()
    assert {name: digest for name, digest in checksums(path.parent).items() if not name.endswith(("-shm", "-wal"))} == {
        name: digest for name, digest in before.items() if not name.endswith(("-shm", "-wal"))
    }


def test_missing_database_is_made(path: Path, backup: Path) -> None:
    path.unlink()

    report = restore(path, backup, quiet)

    assert (report.before, report.kept) == (None, None)
    assert public(path) == public(backup)


def test_log_without_its_database_is_not_read_with_the_new_one(path: Path, backup: Path) -> None:
    with with_log(path):
        path.unlink()
        log = path.with_name("ael.db-wal").read_bytes()

        report = restore(path, backup, quiet)

    assert public(path) == public(backup)
    assert report.kept is not None
    assert report.kept.with_name(f"{report.kept.name}-wal").read_bytes() == log


def test_damaged_database_is_kept_with_its_log(path: Path, backup: Path) -> None:
    with with_log(path):
        raw = bytearray(path.read_bytes())
        raw[:100] = bytes(100)
        path.write_bytes(raw)
        log = path.with_name("ael.db-wal").read_bytes()

        kept = restore(path, backup, quiet).kept

    assert public(path) == public(backup)
    assert kept is not None
    assert kept.read_bytes() == bytes(raw)
    assert kept.with_name(f"{kept.name}-wal").read_bytes() == log
    assert not restore_marker(path).exists()


def test_program_that_reads_the_old_file_stops_the_restore(
    path: Path, backup: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would read the log of the new file together with the old one."""
    monkeypatch.setattr("ael_store.store.restore.EXCLUSIVE_WAIT_MS", 10)
    old = public(path)

    with closing(sqlite3.connect(path)) as reader:
        reader.execute("SELECT count(*) FROM v_state").fetchall()
        with pytest.raises(OwnedElsewhere, match="is open in another program") as caught:
            restore(path, backup, quiet)

    assert caught.value.exit_code == 75
    assert public(path) == old
    assert not list(path.parent.glob("*.before-restore-*"))


@pytest.mark.parametrize(
    ("spoil", "error", "code"),
    [
        (lambda file: file.write_bytes(b"no database at all" * 200), NotADatabase, 65),
        (lambda file: file.write_bytes(b""), NotADatabase, 65),
        (lambda file: file.write_bytes(file.read_bytes()[:20_000]), DatabaseDamaged, 65),
        (lambda file: rows(file, "UPDATE alembic_version SET version_num = '9999'"), None, 78),
        (lambda file: file.unlink(), DatabaseNotUsable, 74),
    ],
)
def test_backup_that_is_none_is_refused(
    path: Path, backup: Path, spoil: object, error: type[Exception] | None, code: int
) -> None:
    if code == 78:
        with closing(sqlite3.connect(backup, isolation_level=None)) as connection:
            connection.execute("UPDATE alembic_version SET version_num = '9999'")
    else:
        spoil(backup)  # type: ignore[operator]
    old = public(path)

    with pytest.raises(error or SchemaTooNew) as caught:
        restore(path, backup, quiet)

    assert caught.value.exit_code == code  # type: ignore[attr-defined]
    assert public(path) == old
    assert not list(path.parent.glob("*.before-restore-*"))


def test_database_itself_is_no_backup(path: Path) -> None:
    with pytest.raises(UsageError, match="is the database itself"):
        restore(path, path, quiet)


def test_older_backup_is_restored_and_its_revision_is_said(path: Path, backup: Path) -> None:
    downgrade(backup, "0003", backup=False)
    told: list[str] = []

    restore(path, backup, told.append)

    assert current_revision(path) == "0003"
    assert any("is at revision 0003; the next start or `ael db upgrade` brings it to" in line for line in told)


def test_half_restored_database_is_refused_by_everything_until_it_is_repeated(path: Path, backup: Path) -> None:
    kept = path.with_name("ael.db.before-restore-20260131T120000Z")
    path.rename(kept)
    restore_marker(path).write_text(json.dumps({"backup": str(backup), "kept": str(kept)}))

    for start in (current_revision, create_database, fill):
        with pytest.raises(DatabaseDamaged, match="a restore was interrupted") as caught:
            start(path)
        assert f"`ael db restore {backup} --db {path}`" in str(caught.value)
        assert str(kept) in str(caught.value)
    assert not path.exists()

    assert restore(path, backup, quiet).kept == kept
    assert public(path) == public(backup)
    assert not restore_marker(path).exists()


def test_interrupted_after_the_log_was_renamed_the_file_follows_it(path: Path, backup: Path) -> None:
    kept = path.with_name("ael.db.before-restore-20260131T120000Z")
    with with_log(path):
        shutil.move(path.with_name("ael.db-wal"), kept.with_name(f"{kept.name}-wal"))
        restore_marker(path).write_text(json.dumps({"backup": str(backup), "kept": str(kept)}))

        restore(path, backup, quiet)

    assert public(path) == public(backup)
    assert rows(kept, "SELECT missed FROM iterations WHERE id = 1") == [7]

"""Backups: verified, private, whole or not there, and never in the place of something else."""

from __future__ import annotations

import shutil
import stat
from pathlib import Path

import pytest

from ael_store.errors import DatabaseDamaged, NotADatabase, OwnedElsewhere, StorageFailed, UsageError
from ael_store.store.advice import newest_backup
from ael_store.store.backup import make_backup
from ael_store.store.lock import DatabaseLock
from ael_store.store.revision import HEAD
from ael_store.store.verify import verify
from tests.loops import rows
from tests.store.files import fill, public, quiet


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return fill(tmp_path / "ael.db", 10)


def test_backup_holds_all_of_it_and_is_private(path: Path) -> None:
    out = path.with_name("copy.db")

    report = make_backup(path, out, quiet)

    assert public(out) == public(path)
    assert verify(out).problems == []
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    assert (report.path, report.revision, report.iteration) == (out, HEAD, 10)
    assert report.bytes == out.stat().st_size


def test_backup_into_a_folder_gets_a_dated_name_each_time(path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "backups"
    folder.mkdir()

    first, second = make_backup(path, folder, quiet).path, make_backup(path, folder, quiet).path

    assert {first, second} == set(folder.iterdir())
    assert first.name.startswith(f"ael.db.bak-{HEAD}-2")
    assert newest_backup(folder / "ael.db") == second


def test_file_that_exists_is_replaced_with_force_only(path: Path) -> None:
    out = path.with_name("copy.db")
    out.write_text("mine")

    with pytest.raises(UsageError, match="exists; name another file or a folder, or replace it with --force"):
        make_backup(path, out, quiet)
    assert out.read_text() == "mine"

    make_backup(path, out, quiet, force=True)
    assert public(out) == public(path)


@pytest.mark.parametrize("name", ["ael.db", "ael.db-wal", "ael.db.lock"])
def test_files_of_the_database_itself_are_never_replaced(path: Path, name: str) -> None:
    before = public(path)

    with pytest.raises(UsageError, match="belongs to the database itself"):
        make_backup(path, path.with_name(name), quiet, force=True)

    assert public(path) == before


def test_database_in_use_is_never_replaced(path: Path, tmp_path: Path) -> None:
    other = Path(shutil.copy(path, tmp_path / "other.db"))

    with DatabaseLock(other).held("loop"), pytest.raises(OwnedElsewhere, match="is owned by pid"):
        make_backup(path, other, quiet, force=True)
    other.with_name("other.db-wal").touch()
    with pytest.raises(OwnedElsewhere, match=r"other\.db-wal lies in"):
        make_backup(path, other, quiet, force=True)


def test_database_whose_values_have_changed_silently_gives_no_backup(path: Path) -> None:
    """SQLite finds nothing wrong with it; a copy would pass for a good one."""
    raw = path.read_bytes()
    at = raw.index(b"xxxxxxxxxx")
    path.write_bytes(raw[:at] + b"z" + raw[at + 1 :])

    with pytest.raises(DatabaseDamaged, match=r"does not pass the check .* was not kept; `ael db recover") as caught:
        make_backup(path, path.with_name("copy.db"), quiet)

    assert caught.value.exit_code == 65
    assert not path.with_name("copy.db").exists()
    assert not [file for file in path.parent.iterdir() if file.name.startswith(".")]


def test_table_of_a_user_is_copied_and_mentioned(path: Path) -> None:
    rows(path, "CREATE TABLE mine (x)")
    told: list[str] = []

    make_backup(path, path.with_name("copy.db"), told.append)

    assert rows(path.with_name("copy.db"), "SELECT count(*) FROM mine") == [0]
    assert f"{path}: table mine is not ours" in told


def test_short_of_space_nothing_is_begun(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type(shutil.disk_usage("/"))(10**9, 10**9 - 1000, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)

    with pytest.raises(StorageFailed, match=r"has 0\.0 MB free, the backup of .* needs"):
        make_backup(path, path.with_name("copy.db"), quiet)

    assert not path.with_name("copy.db").exists()


def test_empty_file_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "ael.db").touch()

    with pytest.raises(NotADatabase, match="is empty"):
        make_backup(tmp_path / "ael.db", tmp_path / "copy.db", quiet)

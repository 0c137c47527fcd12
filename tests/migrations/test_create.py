"""A new database appears whole, private and at the newest schema, or not at all."""

from __future__ import annotations

import errno
import json
import os
import stat
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from ael_store import _version
from ael_store.errors import DatabaseNotUsable
from ael_store.store.upgrade import HEAD, check, create_database, current_revision
from tests.migrations.children import killed_at, run_in_child, run_together
from tests.migrations.fill import ask


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user can reach, other than pytest's."""
    with tempfile.TemporaryDirectory(prefix="ael-test-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder


def test_new_database_is_private_current_and_alone_in_its_folder(path: Path) -> None:
    create_database(path)

    assert os.listdir(path.parent) == [path.name]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.stat().st_nlink == 1
    assert current_revision(path) == HEAD
    assert check(path).problems == []


def test_new_database_knows_itself(path: Path) -> None:
    create_database(path)

    facts = {name: json.loads(value) for name, value in ask(path, "SELECT name, value FROM meta")}

    assert uuid.UUID(facts["instance"]).version == 4
    assert facts["created_us"] > 1_700_000_000_000_000
    assert facts["created_by"] == _version.__version__


def test_existing_file_is_left_alone(path: Path) -> None:
    path.write_bytes(b"somebody else's")

    create_database(path)

    assert path.read_bytes() == b"somebody else's"


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DatabaseNotUsable, match=f"there is no folder {tmp_path}/missing") as caught:
        create_database(tmp_path / "missing" / "ael.db")

    assert caught.value.exit_code == 74


def test_folder_in_the_place_of_the_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatabaseNotUsable, match="is a folder"):
        create_database(tmp_path)


def test_link_that_leads_nowhere_is_refused(path: Path) -> None:
    path.symlink_to("nowhere.db")

    with pytest.raises(DatabaseNotUsable, match=r"is a link to nowhere\.db, which does not exist"):
        create_database(path)

    assert os.listdir(path.parent) == [path.name]


def test_folder_that_cannot_be_written_is_named_and_left_empty(open_folder: Path) -> None:
    open_folder.chmod(0o555)

    error = run_in_child(lambda: create_database(open_folder / "ael.db"), unprivileged=True)

    assert isinstance(error, DatabaseNotUsable)
    assert f"check the permissions of the folder {open_folder}" in str(error)
    assert error.exit_code == 74
    assert os.listdir(open_folder) == []


def test_several_processes_at_once_make_one_database(path: Path) -> None:
    assert run_together(lambda: create_database(path), 4) == [0, 0, 0, 0]

    assert os.listdir(path.parent) == [path.name]
    assert check(path).problems == []
    assert ask(path, "SELECT count(*) FROM meta") == [(3,)]


@pytest.mark.parametrize("statement", ["PRAGMA journal_mode", "CREATE TABLE runs", "COMMIT"])
def test_killed_creation_leaves_no_database_and_the_next_one_cleans_up(path: Path, statement: str) -> None:
    killed_at(statement, lambda: create_database(path))
    assert not path.exists()
    assert os.listdir(path.parent) != []

    create_database(path)

    assert os.listdir(path.parent) == [path.name]
    assert check(path).problems == []


def test_file_system_without_hard_links_will_do(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)

    create_database(path)

    assert os.listdir(path.parent) == [path.name]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert check(path).problems == []

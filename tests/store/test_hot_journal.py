"""Somebody killed outside WAL mode leaves a rollback journal: it is played back, by whoever comes first."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from ael_store.store.revision import HEAD, current_revision
from ael_store.store.store import Store
from ael_store.store.upgrade import create_database
from tests.migrations.fill import ask


@pytest.fixture
def torn(tmp_path: Path) -> Path:
    """A database whose pages are half overwritten by a process that is gone."""
    path = tmp_path / "ael.db"
    create_database(path)
    pid = os.fork()
    if pid == 0:
        try:
            connection = sqlite3.connect(path, isolation_level=None)
            connection.execute("PRAGMA journal_mode = DELETE")
            connection.execute("PRAGMA cache_size = 1")
            connection.execute("BEGIN")
            connection.execute("UPDATE agents SET name = 'gone'")
            connection.executemany("INSERT INTO meta VALUES (?, ?)", [(f"key {n}", "x" * 4000) for n in range(200)])
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as connection:
        with pytest.raises(sqlite3.OperationalError) as refused:
            connection.execute("SELECT name FROM agents")
    assert refused.value.sqlite_errorcode == sqlite3.SQLITE_READONLY_ROLLBACK
    return path


def test_revision_is_told_and_nothing_of_the_half_change_is_left(torn: Path) -> None:
    assert current_revision(torn) == HEAD

    assert not torn.with_name("ael.db-journal").exists()
    assert ask(torn, "SELECT name FROM agents") == [("(outside)",)]


async def test_loop_opens_it(torn: Path) -> None:
    store = Store(torn)

    await store.open("test")
    await store.close()

    assert ask(torn, "SELECT name FROM agents") == [("(outside)",)]

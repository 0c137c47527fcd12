"""Killed at any point, or started several times at once: an upgrade happens once and whole."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from ael_store.store.upgrade import HEAD, check, current_revision, downgrade, upgrade
from tests.migrations.children import killed_at, run_together
from tests.migrations.fill import ask, digests, layout

POINTS = [
    "VACUUM INTO",
    "BEGIN IMMEDIATE",
    "DROP VIEW",
    "ALTER TABLE subscriptions",
    "CREATE TABLE moves",
    "UPDATE alembic_version",
    "CREATE VIEW v_problems",
    "PRAGMA quick_check",
    "COMMIT",
]


def names(path: Path) -> list[str]:
    return [name for name in os.listdir(path.parent) if name not in ("ael.db", "ael.db-wal", "ael.db-shm")]


@pytest.mark.parametrize("statement", POINTS)
def test_killed_upgrade_leaves_the_old_database_and_the_next_one_finishes(
    filled: Callable[[str], Path], statement: str
) -> None:
    path = filled("0001")
    columns = layout(path)
    rows = digests(path, columns)

    killed_at(statement, lambda: upgrade(path))

    assert current_revision(path) == "0001"
    assert layout(path) == columns
    assert digests(path, columns) == rows
    upgrade(path)
    assert check(path).problems == []
    assert digests(path, columns) == rows
    assert not [name for name in names(path) if not name.startswith("ael.db.bak-0001-")]


@pytest.mark.parametrize("statement", ["ALTER TABLE subscriptions", "DROP TABLE dead_letters", "COMMIT"])
def test_killed_downgrade_leaves_the_new_database(filled: Callable[[str], Path], statement: str) -> None:
    path = filled(HEAD)
    columns = layout(path)
    rows = digests(path, columns)

    killed_at(statement, lambda: downgrade(path, "0001"))

    assert check(path).problems == []
    assert digests(path, columns) == rows
    downgrade(path, "0001")
    assert check(path).problems == []


@pytest.mark.parametrize("revision", ["0001", None])
def test_three_upgrades_at_once_do_the_work_once(
    filled: Callable[[str], Path], path: Path, revision: str | None
) -> None:
    if revision is None:
        path.touch()
    else:
        filled(revision)
    columns = layout(path)
    rows = digests(path, columns)

    assert run_together(lambda: upgrade(path), 3) == [0, 0, 0]

    assert ask(path, "SELECT version_num FROM alembic_version") == [(HEAD,)]
    assert check(path).problems == []
    assert digests(path, columns) == rows

"""Databases at any revision, empty or filled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ael_store.store.upgrade import upgrade
from tests.migrations.fill import fill

REVISIONS = ("0001", "0002", "0003", "0004", "0005", "0006", "0007", "0008")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a database may be made."""
    return tmp_path / "ael.db"


@pytest.fixture
def filled(path: Path) -> Callable[[str], Path]:
    """Make a database at a revision by its migrations and fill it."""

    def make(revision: str) -> Path:
        path.touch(0o600)
        upgrade(path, revision=revision, backup=False)
        fill(path, revision)
        return path

    return make

"""The short form of `./dev torture flips`, and what verify says of chosen changes."""

from __future__ import annotations

import random
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from ael_store.store.verify import verify
from tests.faults import flips


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return flips.database(tmp_path_factory.mktemp("original"))


@pytest.mark.timeout(300)
def test_flipped_bits_that_anybody_can_see_are_reported(tmp_path: Path) -> None:
    seed = random.randrange(1_000_000)

    report = flips.run(count=50, seed=seed, workers=1, tell=print, folder=tmp_path)

    assert report.failures == ()
    assert report.trials == 50
    assert not report.note.startswith("0 visible")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("UPDATE state SET value = '7' WHERE key_id = 1", "not what its history says"),
        ("UPDATE state_changes SET value = '7' WHERE id = 3", "its rows in state_changes"),
        ("UPDATE events SET data = '{}' WHERE id = 4", "its rows in events"),
        ("UPDATE ticks SET duration_us = duration_us + 1 WHERE id = 5", "its units"),
        ("UPDATE iterations SET missed = 1 WHERE id = 6", "its iterations, commands or moves"),
        ("UPDATE agent_stats SET total_us = 0 WHERE agent_id = 2", "table agent_stats, row 2"),
        ("UPDATE keys SET name = 'other' WHERE id = 1", "its rows in state_changes"),
        ("DELETE FROM events WHERE id = 9", "1 rows between 1 and"),
        ("DELETE FROM tick_errors WHERE tick_id = (SELECT min(tick_id) FROM tick_errors)", "its units"),
        (
            "UPDATE subscription_patterns SET pattern = pattern || 'x' WHERE subscription_id = 2",
            "table subscriptions, row 2",
        ),
        ("UPDATE iterations SET seal = x'00' WHERE id = 6", "its seal is damaged"),
    ],
)
def test_changed_row_is_found_and_located(original: Path, tmp_path: Path, change: str, problem: str) -> None:
    path = tmp_path / "ael.db"
    path.write_bytes(original.read_bytes())
    assert verify(path).problems == []
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        assert connection.execute(change).rowcount == 1

    found = verify(path).problems

    assert any(problem in line for line in found), found

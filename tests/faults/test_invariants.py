"""The invariants see it when a database is not what the agents have written."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from tests.faults.invariants import Ledger, tally, violations

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database of the crash agents, stopped cleanly."""
    path = tmp_path_factory.mktemp("written") / "ael.db"
    command = [sys.executable, "-m", "tests.faults.agents", str(path), "25"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=60)
    return path


@pytest.fixture
def path(written: Path, tmp_path: Path) -> Path:
    """A copy of it, to be broken."""
    return Path(shutil.copy(written, tmp_path / "ael.db"))


def change(path: Path, *statements: str) -> None:
    with closing(sqlite3.connect(path)) as connection:
        for statement in statements:
            assert connection.execute(statement).rowcount > 0, statement
        connection.commit()


def test_sound_database_has_no_violations(path: Path) -> None:
    assert violations(path) == []


@pytest.mark.parametrize(
    ("statement", "kind", "words"),
    [
        ("DELETE FROM iterations WHERE id = 9", "lost", "v_iterations: iteration 9 is missing"),
        ("DELETE FROM ticks WHERE id = 30", "lost", "v_ticks: id 30 is missing"),
        ("DELETE FROM commits WHERE id = 2", "wrong", "commit 2 is there 0 times"),
        ("UPDATE state SET value = '7' WHERE key_id = (SELECT id FROM keys WHERE name = 'account/3')", "wrong", "'acc"),
        ("UPDATE agent_stats SET ticks = ticks + 1 WHERE ticks > 0", "wrong", "(ticks, errors, events) of"),
        ("UPDATE subscriptions SET cursor = cursor - 1", "twice", "handled event"),
        ("UPDATE ticks SET outcome = 1 WHERE changes > 1", "wrong", "failed and changed"),
        ("UPDATE events SET data = '{\"number\":1}' WHERE data = '{\"number\":2}'", "twice", "comes after"),
        ("UPDATE runs SET token = 99", "wrong", "the token of the lease"),
        ("DELETE FROM delayed_events WHERE id = 1", "wrong", "delayed events"),
    ],
)
def test_change_behind_the_back_of_the_loop_is_noticed(path: Path, statement: str, kind: str, words: str) -> None:
    change(path, statement)

    found = violations(path)

    assert [text for text in found if text.startswith(kind) and words in text]


def test_event_that_neither_had_its_effect_nor_waits_is_lost(path: Path) -> None:
    change(
        path,
        """INSERT INTO events (id, type_id, source_id, data, metadata, timestamp_us, tick_id)
           SELECT (SELECT max(id) FROM events) + 1, type_id, source_id, data, metadata, timestamp_us, tick_id
           FROM events WHERE type_id = (SELECT id FROM event_types WHERE name = 'paid') LIMIT 1""",
        "UPDATE subscriptions SET cursor = cursor + 1000",
    )

    assert [text for text in violations(path) if text.startswith("lost: auditor never handled event")]


def test_what_was_seen_once_may_not_go_or_change(path: Path) -> None:
    ledger = Ledger(path)
    assert ledger.look() == []

    change(path, "DELETE FROM iterations WHERE id = (SELECT max(id) FROM iterations)")
    change(path, "UPDATE events SET data = '\"forged\"' WHERE id = 3")

    assert [text for text in ledger.look() if text.startswith("lost: v_iterations")]
    assert [text for text in ledger.check() if text.startswith("wrong: v_events: what was (3,")]


def test_database_that_was_seen_may_not_be_gone(path: Path) -> None:
    ledger = Ledger(path)
    ledger.look()

    path.unlink()

    assert ledger.look() == ["lost: the database is gone"]


def test_violations_are_counted_by_their_kind() -> None:
    found = ["lost: one", "twice: two", "wrong: three", "wrong: four"]

    assert tally(found) == {"lost": 1, "duplicated": 1, "silent": 2}

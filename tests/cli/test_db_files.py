"""`ael db backup`, `restore` and `recover`: what they print and end with, and real loops beside them."""

from __future__ import annotations

import hashlib
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from ael_store.store.verify import verify
from tests.cli.conftest import Ael, Process, Start, until
from tests.loops import rows


def iterations(path: Path) -> int:
    return int(rows(path, "SELECT coalesce(max(id), 0) FROM iterations")[0])


def loop(start: Start, counter: str) -> Process:
    """A real loop on `ael.db` that has begun to count."""
    process = start("run", counter, "--tick-rate", "0.002", "--db", "ael.db")
    path = process.folder / "ael.db"

    def counts() -> bool:
        try:
            return bool(rows(path, "SELECT 1 FROM v_iterations WHERE iteration >= 20"))
        except sqlite3.OperationalError:  # not created yet
            return False

    until(lambda: path.exists() and counts(), process)
    return process


def test_backup_of_a_running_loop_is_restored_and_verified(
    ael: Ael, start: Start, counter: str, tmp_path: Path
) -> None:
    process = loop(start, counter)
    path, out = tmp_path / "ael.db", tmp_path / "copy.db"

    done = ael("db", "backup", "copy.db", "--json")
    made = done.json["iteration"]
    until(lambda: iterations(path) > made + 10, process)
    refused = ael("db", "restore", "copy.db")
    assert process.stop() == 0
    last = iterations(path)
    restored = ael("db", "restore", "copy.db", "--json")

    assert done.code == 0
    assert done.json == {
        "path": str(out),
        "bytes": out.stat().st_size,
        "revision": done.json["revision"],
        "iteration": made,
        "verified": True,
    }
    assert refused.code == 75
    assert f"is owned by pid {process.process.pid}" in refused.err
    assert restored.code == 0
    assert (restored.json["iteration"], restored.json["iteration_before"]) == (made, last)
    assert iterations(path) == made
    assert verify(path).problems == []
    assert iterations(Path(restored.json["kept"])) == last
    assert rows(path, "SELECT json(value) FROM v_state WHERE key = 'count'") == [str(made)]


def test_backup_into_a_folder_prints_the_name(ael: Ael, database: Path, tmp_path: Path) -> None:
    (tmp_path / "backups").mkdir()

    done = ael("db", "backup", "backups")

    [made] = (tmp_path / "backups").iterdir()
    assert done.out.startswith(f"{made}: ")
    assert done.out.endswith("iteration 3, verified\n")


def test_backup_over_a_file_is_wrong_usage(ael: Ael, database: Path, tmp_path: Path) -> None:
    (tmp_path / "copy.db").touch()

    assert ael("db", "backup", "copy.db").code == 2
    assert ael("db", "backup", "copy.db", "--force").code == 0


def test_dry_run_of_a_restore_names_both_moments(ael: Ael, database: Path) -> None:
    ael("db", "backup", "copy.db")
    ael("state", "set", "temperature", "1")
    before = hashlib.sha256(database.read_bytes()).hexdigest()

    done = ael("db", "restore", "copy.db", "--dry-run")

    assert done.code == 0
    assert done.out.startswith(f"would restore {database} to iteration 3 (")
    assert "it was at 3 (" in done.out
    assert "would keep the old file as" in done.out
    assert hashlib.sha256(database.read_bytes()).hexdigest() == before


def test_recover_of_a_sound_database_loses_nothing(ael: Ael, database: Path) -> None:
    done = ael("db", "recover", "ael.db", "--to", "out.db")

    assert done.code == 0
    assert done.out.endswith("rows saved, nothing is lost\n")
    assert ael("db", "verify", "--db", "out.db").code == 0


def test_recover_tells_what_is_lost_and_ends_with_1(ael: Ael, database: Path) -> None:
    [root] = rows(database, "SELECT rootpage FROM sqlite_schema WHERE type = 'table' AND name = 'event_types'")
    with database.open("r+b") as file:
        file.seek((root - 1) * 2048)
        file.write(bytes(2048))

    done = ael("db", "recover", "ael.db", "--to", "out.db", "--json")

    assert done.code == 1
    assert done.json["complete"] is False
    assert list(done.json["names_lost"]) == ["event_types"]
    assert done.json["tables"]["events"]["missing"] == []
    assert "event_types: the names of 1" in ael("db", "recover", "ael.db", "--to", "again.db").out


def test_recover_of_nothing_ends_with_65(ael: Ael, tmp_path: Path) -> None:
    (tmp_path / "bad.db").write_bytes(bytes(50_000))

    assert ael("db", "recover", "bad.db", "--to", "out.db").code == 65
    assert ael("db", "recover", "missing.db", "--to", "out.db").code == 74
    assert not (tmp_path / "out.db").exists()


@pytest.mark.parametrize("damage", ["header", "schema", "interior", "truncated"])
def test_start_on_a_damaged_file_is_refused_names_the_way_out_and_touches_nothing(
    ael: Ael, run_here: Ael, counter: str, database: Path, damage: str
) -> None:
    assert ael("db", "backup", ".").code == 0
    database.with_name("ael.db.lock").touch()  # as any loop leaves it
    raw = bytearray(database.read_bytes())
    if damage == "header":
        raw[:100] = bytes(100)
    elif damage == "schema":
        raw[100:2048] = bytes(1948)
    elif damage == "interior":
        with closing(sqlite3.connect(database)) as connection:
            [(root,)] = connection.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'state' AND type = 'table'")
        raw[(root - 1) * 2048 : root * 2048] = b"\xff" * 2048
    else:
        del raw[len(raw) // 3 :]
    database.write_bytes(raw)
    for log in ("ael.db-wal", "ael.db-shm"):
        database.with_name(log).unlink(missing_ok=True)

    done = run_here(counter, "--iterations", "1")

    assert done.code == 65
    assert f"`ael db recover {database} --to {database}.recovered`" in done.err
    [backup] = database.parent.glob("ael.db.bak-*")
    assert f"`ael db restore {backup} --db {database}`" in done.err
    assert database.read_bytes() == bytes(raw)
    saved = ael("db", "recover", str(database), "--to", "out.db")
    assert saved.code in (0, 1)
    shutil.copy(backup, database.with_name("again.db"))
    assert ael("db", "restore", backup.name).code == 0
    assert ael("db", "verify").code == 0

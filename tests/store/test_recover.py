"""Recovery: everything that is left of a damaged file is saved, and the report says exactly what is not."""

from __future__ import annotations

import random
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from ael_store.errors import DatabaseDamaged, NotADatabase, OwnedElsewhere, SchemaTooNew, UsageError
from ael_store.store.advice import advice
from ael_store.store.backup import make_backup
from ael_store.store.leaf_pages import INTERIOR, LeafPages
from ael_store.store.lock import DatabaseLock
from ael_store.store.recover import RecoverReport, recover
from ael_store.store.upgrade import check, downgrade
from ael_store.store.verify import verify
from tests.loops import rows
from tests.store.files import PAGE, checksums, fill, public, quiet, set_page

NUMBERED = ("iterations", "ticks", "state_changes", "events")


@pytest.fixture(scope="session")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill(tmp_path_factory.mktemp("sample") / "ael.db", 120)


@pytest.fixture
def path(sample: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(sample, tmp_path / "ael.db"))


def recovered(path: Path) -> tuple[RecoverReport, Path]:
    """Recover a database; it is only read, and what comes out is a database that a loop can go on with."""
    before = checksums(path.parent)
    out = path.with_name("out.db")

    report = recover(path, out, quiet)

    after = checksums(path.parent)
    del after["out.db"]
    assert {name: digest for name, digest in after.items() if not name.startswith("out.db-")} == before
    assert check(out).problems == []
    return report, out


def numbers(path: Path, table: str) -> set[int]:
    return set(rows(path, f"SELECT id FROM {table}"))


def check_exact(report: RecoverReport, out: Path, sample: Path) -> None:
    """What is missing is what the report says, and no row that is there says something else than before."""
    written = {"state_changes": {*report.told, *report.placed}}
    for table in report.tables:
        if table.name not in NUMBERED:
            continue
        lost = numbers(sample, table.name) - numbers(out, table.name)
        told = {number for begin, end in table.missing for number in range(begin, end + 1)}
        assert told <= lost
        assert told == lost or (table.open_ended and min(lost - told) > max(numbers(out, table.name), default=0))
        columns = ", ".join(
            name
            for name in rows(sample, "SELECT name FROM pragma_table_info(?)", table.name)
            if name not in ("seal", "previous_id", "recent")
        )
        query = f"SELECT {columns} FROM {table.name}"
        new = set(rows(out, query)) - set(rows(sample, query))
        assert {row[0] for row in new} <= written.get(table.name, set())


def go_on(out: Path, sample: Path) -> None:
    """A loop goes on after the last number that was ever given, and everything can be verified again."""
    fill(out, 2)
    assert verify(out).problems == []
    assert len(public(out)["v_iterations"]) >= 2


def root_of(path: Path, table: str) -> int:
    return int(rows(path, "SELECT rootpage FROM sqlite_schema WHERE type = 'table' AND name = ?", table)[0])


def leaves_of(path: Path, table: str) -> list[int]:
    [tree, *_] = LeafPages(path.read_bytes()).trees([root_of(path, table)])
    return tree.leaves


# -- nothing is lost ----------------------------------------------------------------------------------


def zero_header(path: Path) -> None:
    set_page(path, 1, bytes(100) + path.read_bytes()[100:PAGE])


def zero_first_page(path: Path) -> None:
    set_page(path, 1, b"")


def zero_interior_pages(path: Path) -> None:
    for table in NUMBERED:
        root = root_of(path, table)
        if path.read_bytes()[(root - 1) * PAGE] == INTERIOR:
            set_page(path, root, random.Random(1).randbytes(PAGE))


def zero_index(path: Path) -> None:
    [root] = rows(path, "SELECT rootpage FROM sqlite_schema WHERE name = 'ix_events_type_id'")
    set_page(path, root, b"")


def zero_pointer_map(path: Path) -> None:
    set_page(path, 2, b"")


def zero_state(path: Path) -> None:
    for number in leaves_of(path, "state"):
        set_page(path, number, b"")


@pytest.mark.parametrize(
    "damage", [zero_header, zero_first_page, zero_interior_pages, zero_index, zero_pointer_map, zero_state]
)
def test_damage_outside_of_the_history_loses_nothing(path: Path, sample: Path, damage: Callable[[Path], None]) -> None:
    damage(path)

    report, out = recovered(path)

    assert report.complete, list(report.lines())
    assert public(out) == public(sample)
    go_on(out, sample)


def test_rows_of_the_state_come_back_from_the_history(path: Path) -> None:
    zero_state(path)

    report, _ = recovered(path)

    assert {"read", "agent/writer/last"} <= set(report.state.rebuilt)
    assert report.state.uncertain == report.state.lost == []


def test_log_beside_the_damaged_file_is_read_with_it(path: Path) -> None:
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("UPDATE iterations SET missed = 7 WHERE id = 1")
    whole, log = path.read_bytes(), path.with_name("ael.db-wal").read_bytes()
    connection.close()
    path.write_bytes(whole)
    path.with_name("ael.db-wal").write_bytes(log)
    zero_header(path)

    report, out = recovered(path)

    assert rows(out, "SELECT missed FROM iterations WHERE id = 1") == [7]
    assert not report.log_is_broken
    path.with_name("ael.db-wal").write_bytes(log[:-1] + bytes([log[-1] ^ 1]))
    out.unlink()
    assert recovered(path)[0].log_is_broken


# -- something is lost --------------------------------------------------------------------------------


@pytest.mark.parametrize("table", NUMBERED)
def test_missing_numbers_are_told_exactly(path: Path, sample: Path, table: str) -> None:
    leaves = leaves_of(path, table)
    for number in {leaves[0], leaves[len(leaves) // 2]}:
        set_page(path, number, random.Random(2).randbytes(PAGE))

    report, out = recovered(path)

    [found] = [one for one in report.tables if one.name == table]
    assert not report.complete
    assert found.missing or table == "state_changes"
    check_exact(report, out, sample)
    go_on(out, sample)


def test_numbers_of_lost_newest_rows_are_not_given_again(path: Path, sample: Path) -> None:
    """A cursor that is further than the newest event would skip new ones of the same numbers."""
    set_page(path, leaves_of(path, "events")[-1], b"")

    report, out = recovered(path)
    check_exact(report, out, sample)
    fill(out, 1)

    [newest] = rows(sample, "SELECT max(id) FROM events")
    assert numbers(out, "events") - numbers(sample, "events")
    assert min(numbers(out, "events") - numbers(sample, "events")) > newest


def test_lost_names_are_called_lost(path: Path) -> None:
    [number] = leaves_of(path, "event_types")
    set_page(path, number, b"")

    report, out = recovered(path)

    assert set(report.names) == {"event_types"}
    assert not report.complete
    assert set(rows(out, "SELECT type FROM v_events")) == {f"(lost {one})" for one in report.names["event_types"]}


def test_value_that_changed_silently_is_copied_and_named(path: Path) -> None:
    raw = path.read_bytes()
    at = raw.index(b"yyyyyyyyyyyy", raw.index(b'"text":"yyy'))
    path.write_bytes(raw[:at] + b"z" + raw[at + 1 :])

    report, out = recovered(path)

    assert [problem for problem in report.unproven if "events" in problem]
    assert not report.complete
    go_on(out, path)


@pytest.mark.parametrize("seed", range(6))
def test_damage_at_random_leaves_a_database_and_an_exact_report(path: Path, sample: Path, seed: int) -> None:
    chance = random.Random(seed)
    raw = bytearray(path.read_bytes())
    if seed % 3 == 0:
        del raw[chance.randrange(len(raw) // 2, len(raw)) :]
    elif seed % 3 == 1:
        for _ in range(4):
            at = chance.randrange(1, len(raw) // PAGE) * PAGE
            raw[at : at + PAGE] = chance.randbytes(PAGE)
    else:
        for _ in range(4):
            at = chance.randrange(1, len(raw) // PAGE) * PAGE
            raw[at : at + PAGE] = bytes(PAGE)
    path.write_bytes(raw)

    report, out = recovered(path)

    check_exact(report, out, sample)
    go_on(out, sample)


# -- older schemas, and what is refused ---------------------------------------------------------------


def test_older_schema_stays_that_schema(path: Path) -> None:
    downgrade(path, "0002", backup=False)
    zero_first_page(path)

    report, out = recovered(path)

    assert report.revision == "0002"
    fill(out, 1)
    assert verify(out).problems == []


def test_newer_schema_is_refused(path: Path) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")

    with pytest.raises(SchemaTooNew):
        recover(path, path.with_name("out.db"), quiet)


@pytest.mark.parametrize("content", [b"", b"\0" * 100_000, b"hello " * 5000])
def test_file_with_nothing_of_ours_gives_nothing(path: Path, content: bytes) -> None:
    path.write_bytes(content)

    with pytest.raises((NotADatabase, DatabaseDamaged)) as caught:
        recover(path, path.with_name("out.db"), quiet)

    assert caught.value.exit_code == 65
    assert not path.with_name("out.db").exists()
    assert not [file for file in path.parent.iterdir() if file.name.startswith(".")]


def test_database_of_another_program_is_refused(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "other.db")) as connection:
        connection.execute("CREATE TABLE mine (x)")

    with pytest.raises(NotADatabase, match="that ael_store did not make"):
        recover(tmp_path / "other.db", tmp_path / "out.db", quiet)


def test_file_that_exists_is_never_written(path: Path) -> None:
    out = path.with_name("out.db")
    out.write_text("mine")

    with pytest.raises(UsageError, match="recover only writes a new file"):
        recover(path, out, quiet)

    assert out.read_text() == "mine"


def test_owned_database_is_not_recovered(path: Path) -> None:
    with DatabaseLock(path).held("loop"), pytest.raises(OwnedElsewhere, match="is owned by pid"):
        recover(path, path.with_name("out.db"), quiet)


def test_advice_names_the_command_and_the_newest_backup(path: Path) -> None:
    assert advice(path) == (
        f"`ael db recover {path} --to {path}.recovered` saves what can be read into a new file; "
        "there is no backup beside it"
    )

    make_backup(path, path.parent, quiet)
    newest = make_backup(path, path.parent, quiet).path

    assert advice(path).endswith(f"the newest backup beside it is {newest}: `ael db restore {newest} --db {path}`")

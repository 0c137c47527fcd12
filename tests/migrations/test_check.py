"""What a file is said to be, and what `check` finds in it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from ael_store.errors import AelError, DatabaseDamaged, DatabaseNotUsable, NotADatabase
from ael_store.store.upgrade import HEAD, check, create_database, current_revision, upgrade
from tests.migrations.children import run_in_child
from tests.migrations.fill import ask, execute, fill


def test_empty_file_has_no_revision(path: Path) -> None:
    path.touch()

    assert current_revision(path) is None
    report = check(path)
    assert (report.revision, report.up_to_date, len(report.problems)) == (None, False, 1)
    assert path.stat().st_size == 0


@pytest.mark.parametrize("content", [b"hello", b"name,value\n" * 1000, b"SQLite format 2\0" + b"\0" * 2000])
def test_file_that_is_no_database_is_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)

    for function in (current_revision, check, upgrade):
        with pytest.raises(NotADatabase, match="is not a SQLite database") as caught:
            function(path)
        assert caught.value.exit_code == 65
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("script", "found"),
    [
        (
            "CREATE TABLE customers (id INTEGER); CREATE TABLE orders (id INTEGER)",
            "it holds customers, orders",
        ),
        (
            "CREATE TABLE alembic_version (version_num TEXT); INSERT INTO alembic_version VALUES ('0001');"
            "CREATE TABLE posts (id INTEGER)",
            "it holds posts",
        ),
        (
            ";".join(f"CREATE TABLE {name} (x)" for name in "abcdefg"),
            "it holds a, b, c, d, e and 2 more tables",
        ),
    ],
)
def test_database_of_another_program_is_refused_with_what_it_holds(path: Path, script: str, found: str) -> None:
    execute(path, script)

    for function in (current_revision, check, upgrade):
        with pytest.raises(NotADatabase, match="that ael_store did not make") as caught:
            function(path)
        assert found in str(caught.value)
        assert caught.value.exit_code == 65


@pytest.mark.parametrize(
    "script",
    [
        "DELETE FROM alembic_version",
        "INSERT INTO alembic_version VALUES ('0002')",
        "DROP TABLE alembic_version",
    ],
)
def test_database_without_a_clear_revision_is_refused(path: Path, script: str) -> None:
    create_database(path)
    execute(path, script)

    with pytest.raises(NotADatabase, match="revisions in alembic_version, where exactly one should be"):
        current_revision(path)


def test_missing_file_and_folder_are_refused_and_nothing_is_made(tmp_path: Path) -> None:
    with pytest.raises(DatabaseNotUsable, match="does not exist") as caught:
        current_revision(tmp_path / "missing.db")
    assert caught.value.exit_code == 74
    with pytest.raises(DatabaseNotUsable, match="is a folder"):
        current_revision(tmp_path)
    for function in (check, upgrade):
        with pytest.raises(DatabaseNotUsable):
            function(tmp_path / "missing.db")
    assert os.listdir(tmp_path) == []


def test_file_that_may_not_be_read_is_refused() -> None:
    with tempfile.TemporaryDirectory(prefix="ael-test-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        path = folder / "ael.db"
        create_database(path)
        path.chmod(0o000)

        error = run_in_child(lambda: current_revision(path), unprivileged=True)

    assert isinstance(error, DatabaseNotUsable)
    assert "check its permissions and its folder's" in str(error)


def test_database_in_a_folder_that_may_not_be_written_is_read_or_refused_clearly() -> None:
    """SQLite reads a database in WAL mode only where it can make its index file."""
    with tempfile.TemporaryDirectory(prefix="ael-test-") as name:
        folder = Path(name)
        path = folder / "ael.db"
        create_database(path)
        path.chmod(0o644)
        folder.chmod(0o555)

        result = run_in_child(lambda: current_revision(path), unprivileged=True)

    assert result == HEAD or (isinstance(result, AelError) and isinstance(result, DatabaseNotUsable)), result


def test_overwritten_schema_page_is_reported_as_damage(path: Path) -> None:
    create_database(path)
    fill(path, HEAD)
    content = bytearray(path.read_bytes())
    content[100:108] = b"\xff" * 8
    path.write_bytes(content)

    for function in (current_revision, check, upgrade):
        with pytest.raises(DatabaseDamaged, match="is damaged") as caught:
            function(path)
        assert caught.value.exit_code == 65
    assert path.read_bytes() == bytes(content)


def test_overwritten_data_pages_are_found_and_stop_an_upgrade(filled: Callable[[str], Path]) -> None:
    path = filled("0001")
    content = bytearray(path.read_bytes())
    ((first,),) = ask(path, "SELECT rootpage FROM sqlite_schema WHERE name = 'events'")
    content[(first - 1) * 4096 : first * 4096] = b"\xa5" * 4096
    path.write_bytes(content)

    report = check(path)
    assert report.damaged
    assert report.problems[0].startswith("damage: ")
    with pytest.raises(DatabaseDamaged):
        upgrade(path)
    assert path.read_bytes() == bytes(content)
    assert current_revision(path) == "0001"


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        ("CREATE TABLE notes (text TEXT)", "table notes is not ours"),
        ("CREATE INDEX mine ON ticks (outcome)", "index mine is not ours"),
        ("CREATE VIEW mine AS SELECT 1", "view mine is not ours"),
        ("CREATE TRIGGER mine AFTER INSERT ON ticks BEGIN SELECT 1; END", "trigger mine is not ours"),
        ("DROP TABLE commands", "table commands is missing"),
        ("DROP INDEX ix_events_type_id", "index ix_events_type_id is missing"),
        ("DROP VIEW v_state", "view v_state is missing"),
        ("DROP VIEW v_state; CREATE VIEW v_state AS SELECT 1", "view v_state differs: it lacks «CREATE VIEW"),
        (
            "ALTER TABLE moves ADD COLUMN extra TEXT",
            "table moves differs: it lacks «columns in the order id,",
        ),
        (
            "ALTER TABLE moves DROP COLUMN subject",
            "table moves differs: it lacks «subject TEXT NOT NULL», «columns in",
        ),
        ("DELETE FROM lease", "table lease has lost its row: no loop can own the database"),
        ("DELETE FROM agents", "table agents has lost row 0, which stands for changes from outside"),
        (
            "INSERT INTO agent_stats VALUES (7, 0, 0, 0, 0, 0, 0, 0, NULL, NULL)",
            "table agent_stats, row 7: refers to a row of agents that does not exist",
        ),
    ],
)
def test_check_names_each_difference(path: Path, script: str, problem: str) -> None:
    create_database(path)
    execute(path, script)

    report = check(path)

    assert len(report.problems) == 1
    assert report.problems[0].startswith(problem)
    assert report.up_to_date
    assert not report.damaged


@pytest.mark.parametrize(
    ("old", "new", "lacks"),
    [
        ("attempts INTEGER NOT NULL", "attempts INTEGER", "attempts INTEGER NOT NULL"),
        ("error TEXT NOT NULL", "error INTEGER NOT NULL", "error TEXT NOT NULL"),
        (") STRICT", ")", "STRICT"),
    ],
)
def test_check_compares_types_nullability_and_options(path: Path, old: str, new: str, lacks: str) -> None:
    create_database(path)
    ((text,),) = ask(path, "SELECT sql FROM sqlite_schema WHERE name = 'dead_letters'")
    changed = " ".join(text.split()).replace(old, new)
    assert changed != text
    execute(path, f"DROP TABLE dead_letters; {changed}")

    (problem,) = check(path).problems

    assert problem.startswith("table dead_letters differs: it lacks «")
    assert f"«{lacks}»" in problem


def test_check_of_an_older_database_compares_with_its_own_revision(filled: Callable[[str], Path]) -> None:
    path = filled("0001")
    report = check(path)
    assert (report.revision, report.up_to_date, report.problems) == ("0001", False, [])

    execute(path, "DROP VIEW v_state")

    assert check(path).problems == ["view v_state is missing"]


def test_check_of_a_newer_database_says_so(path: Path) -> None:
    create_database(path)
    execute(path, "UPDATE alembic_version SET version_num = '9999'")

    report = check(path)

    assert report.revision == "9999"
    assert not report.up_to_date
    assert report.problems == ["revision 9999 was written by a newer ael_store; this one knows up to 0008"]


def test_check_does_not_change_the_file(filled: Callable[[str], Path]) -> None:
    path = filled(HEAD)
    before = path.read_bytes()

    assert check(path).problems == []

    assert path.read_bytes() == before

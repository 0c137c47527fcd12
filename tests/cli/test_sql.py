"""`ael sql` answers one statement that reads, and nothing else."""

from __future__ import annotations

import csv
import io
import re
import sys
from pathlib import Path

import pytest

from ael_store.cli import output, sql
from tests.cli.conftest import Ael
from tests.loops import rows

ENDLESS = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT count(*) FROM c"


def test_rows_are_tab_separated_with_a_header(ael: Ael, database: Path) -> None:
    done = ael("sql", "SELECT name, priority, tick_count FROM v_agents ORDER BY tick_count DESC LIMIT 1")

    assert done.out == "name\tpriority\ttick_count\ncounter\t10\t3\n"


def test_json_is_an_array_of_objects(ael: Ael, database: Path) -> None:
    assert ael("sql", "SELECT key, value FROM v_state WHERE key = 'temperature'", "--json").json == [
        {"key": "temperature", "value": "23"}
    ]
    assert ael("sql", "SELECT 1 WHERE 0", "--json").out == "[]\n"


def test_columns_of_one_name_are_all_kept(ael: Ael, database: Path) -> None:
    assert ael("sql", "SELECT 1 AS a, 2 AS a, 3 AS a", "--json").json == [{"a": 1, "a_2": 2, "a_3": 3}]


def test_csv_is_exact(ael: Ael, database: Path) -> None:
    done = ael("sql", """SELECT 'a,"b"' || char(10) || 'c' AS x, NULL AS y, 'd' || char(13) || 'e' AS z""", "--csv")

    assert list(csv.reader(io.StringIO(done.out, newline=""))) == [["x", "y", "z"], ['a,"b"\nc', "", "d\re"]]


def test_values_without_a_json_form_become_text(ael: Ael, database: Path) -> None:
    done = ael("sql", "SELECT x'00ff' AS a, 9e999 AS b, NULL AS c, 1.5 AS d, CAST(x'ff' AS TEXT) AS e", "--json")

    assert done.json == [{"a": "x'00ff'", "b": "inf", "c": None, "d": 1.5, "e": "\ufffd"}]


def test_without_a_statement_it_says_what_there_is(ael: Ael, database: Path) -> None:
    done = ael("sql")

    assert (done.code, done.out) == (2, "")
    listed = re.findall(r"^  (v_\w+) +\S.*\.$", done.err, re.MULTILINE)
    assert sorted(listed) == sorted(rows(database, "SELECT name FROM sqlite_schema WHERE type = 'view'"))
    for statement in re.findall(r'^  ael sql "(.*?)"', done.err, re.MULTILINE):
        assert ael("sql", statement).code == 0


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make stdout a terminal of 100 columns without colours."""
    for module in (output, sql):
        monkeypatch.setattr(module, "on_terminal", lambda: True)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")


def test_terminal_gets_numbers_to_the_right_and_long_texts_cut(ael: Ael, database: Path, terminal: None) -> None:
    long = "x" * 200

    lines = ael(
        "sql", f"SELECT 7 AS number, 'a' AS text, '{long}' AS long, strftime('%Y-%m-%dT') || '12:00:00.000000Z'"
    ).out

    header, row = (line.rstrip() for line in lines.splitlines())
    assert row.startswith("     7  a     xxx")
    assert "x…  2" in row
    assert row.endswith("T12:00:00.000000Z")
    assert len(row) <= 100 and header.startswith("number  text  long")
    assert long in ael("sql", f"SELECT '{long}' AS long").out.replace("\n", "")


def test_rows_too_wide_for_a_terminal_are_shown_line_by_line(ael: Ael, database: Path, terminal: None) -> None:
    lines = ael("sql", "SELECT * FROM v_agents ORDER BY name").out.splitlines()

    assert lines[0].split() == ["name", "broken"]
    assert "last_error        ValueError: no sensor" in lines
    assert lines[12] == ""
    assert lines[13].split() == ["name", "counter"]


def test_statement_is_read_from_stdin(ael: Ael, database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("-- a question\nSELECT 42 AS answer;\n"))

    assert ael("sql", "-", "--json").json == [{"answer": 42}]


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT name FROM pragma_table_info('state')",
        "SELECT value FROM json_each('[1, 2]')",
        "PRAGMA table_info(state)",
        "PRAGMA user_version",
        "EXPLAIN QUERY PLAN SELECT * FROM v_state WHERE key = 'a'",
        "VALUES (1)",
        "SELECT json_extract(data, '$.celsius') FROM v_events",
        "SELECT count(*) OVER () FROM v_ticks",
        "-- comment\nSELECT 1",
        "SELECT 1;",
    ],
)
def test_what_reads_is_allowed(ael: Ael, database: Path, statement: str) -> None:
    assert ael("sql", statement).code == 0


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM state",
        "UPDATE state SET value = 1",
        "INSERT INTO state SELECT * FROM state",
        "REPLACE INTO meta VALUES ('a', '1')",
        "WITH a AS (SELECT 1) DELETE FROM state",
        "DROP VIEW v_state",
        "CREATE TABLE mine (x)",
        "CREATE TEMP TABLE mine (x)",
        "CREATE TEMP VIEW mine AS SELECT 1",
        "CREATE VIRTUAL TABLE mine USING fts5(x)",
        "ALTER TABLE state ADD COLUMN x",
        "ATTACH 'other.db' AS other",
        "DETACH main",
        "VACUUM",
        "VACUUM INTO 'other.db'",
        "PRAGMA journal_mode = DELETE",
        "PRAGMA query_only = OFF",
        "PRAGMA writable_schema = ON",
        "PRAGMA user_version = 5",
        "PRAGMA wal_checkpoint",
        "PRAGMA main.locking_mode = EXCLUSIVE",
        "BEGIN IMMEDIATE",
        "SAVEPOINT a",
        "REINDEX",
        "ANALYZE",
        "SELECT load_extension('evil')",
        "SELECT writefile('other.db', 'x')",
        "EXPLAIN DELETE FROM state",
    ],
)
def test_nothing_else_is(ael: Ael, database: Path, tmp_path: Path, statement: str) -> None:
    before = database.read_bytes()

    done = ael("sql", statement)

    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("ael: ")
    assert database.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} <= {"ael.db", "ael.db-wal", "ael.db-shm"}


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("SELECT * FROM v_agent", "SQL: no such table: v_agent (at character 15); did you mean v_agents?"),
        (
            "SELECT * FROM xyz",
            "no such table: xyz (at character 15); the views are v_agent_hours, v_agents, v_causes, v_dea",
        ),
        ("SELECT\n  nam FROM v_agents", "SQL: no such column: nam (line 2, column 3)"),
        ("SELEC 1", 'SQL: near "SELEC": syntax error (at character 1)'),
        ("SELECT (1", "SQL: incomplete input"),
        ("SELECT ?", "SQL: Incorrect number of bindings supplied"),
    ],
)
def test_mistake_in_sql_is_sqlites_message_with_its_place(
    ael: Ael, database: Path, statement: str, message: str
) -> None:
    done = ael("sql", statement)

    assert done.code == 1
    assert message in done.err


@pytest.mark.parametrize(
    "statement", ["", " ; ", "-- nothing", "/* nothing", "SELECT 1; SELECT 2", "SELECT 1; DELETE FROM state"]
)
def test_exactly_one_statement_is_wanted(ael: Ael, database: Path, statement: str) -> None:
    done = ael("sql", statement)

    assert (done.code, done.out) == (2, "")


def test_statement_that_takes_too_long_is_ended(ael: Ael, database: Path) -> None:
    done = ael("sql", ENDLESS, "--timeout", "0.05")

    assert done.code == 1
    assert "took longer than 0.05 s and was ended; --timeout allows more" in done.err


@pytest.mark.parametrize("arguments", [["--timeout", "0"], ["--timeout", "nan"], ["--csv", "--json"]])
def test_impossible_options_are_refused(ael: Ael, database: Path, arguments: list[str]) -> None:
    assert ael("sql", "SELECT 1", *arguments).code == 2

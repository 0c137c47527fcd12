"""The page of the views says what the database holds: views, columns, and the types of real rows."""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ael_store.schema.sqlite_views import ABOUT
from ael_store.store.upgrade import HEAD, create_database
from tests.docs.markdown import ROOT, blocks
from tests.migrations.fill import fill

PAGE = (ROOT / "docs/reference/views.md").read_text("utf-8")
QUERIES = ROOT / "docs/how-to/inspect-with-sql.md"
SECTIONS = dict(re.findall(r"^## (v_\w+)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))


def documented(view: str) -> dict[str, tuple[str, str]]:
    """Return type and meaning of each column of a view, in order."""
    table = SECTIONS[view].split("| Column | Type | Meaning |")[1].split("\n\n")[0]
    rows = re.findall(r"^\| `(\w+)` \| ([\w ]+) \| (.+) \|$", table, re.MULTILINE)
    return {name: (kind, meaning) for name, kind, meaning in rows}


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[sqlite3.Connection]:
    path = tmp_path_factory.mktemp("views") / "ael.db"
    create_database(path)
    fill(path, HEAD)
    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    connection.row_factory = sqlite3.Row
    yield connection
    connection.close()


def is_time(value: Any) -> bool:
    return bool(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", value))


def is_json(value: Any) -> bool:
    json.loads(value)
    return True


TYPES: dict[str, Callable[[Any], bool]] = {
    "text": lambda value: isinstance(value, str),
    "integer": lambda value: isinstance(value, int),
    "JSON": lambda value: isinstance(value, str) and is_json(value),
    "time": lambda value: isinstance(value, str) and is_time(value),
    "ms": lambda value: isinstance(value, float),
    "number": lambda value: isinstance(value, float),
    "USD": lambda value: isinstance(value, float),
}


def test_each_view_has_a_section(database: sqlite3.Connection) -> None:
    views = {row[0] for row in database.execute("SELECT name FROM sqlite_schema WHERE type = 'view'")}

    assert set(SECTIONS) == views


@pytest.mark.parametrize("view", SECTIONS)
def test_columns_are_documented_in_order(view: str, database: sqlite3.Connection) -> None:
    columns = [row["name"] for row in database.execute(f"PRAGMA table_info({view})")]

    assert list(documented(view)) == columns


@pytest.mark.parametrize("view", SECTIONS)
def test_values_have_the_documented_type_and_null_is_announced(view: str, database: sqlite3.Connection) -> None:
    for row in database.execute(f"SELECT * FROM {view}"):
        for name, (kind, meaning) in documented(view).items():
            if row[name] is None:
                assert "NULL" in meaning, f"{view}.{name} is NULL"
            else:
                assert TYPES[kind](row[name]), f"{view}.{name} is {row[name]!r}, not {kind}"


def test_every_kind_of_problem_is_documented(database: sqlite3.Connection) -> None:
    text = database.execute("SELECT sql FROM sqlite_schema WHERE name = 'v_problems'").fetchone()[0]
    kinds = set(re.findall(r"SELECT '(\w+)'", text))

    found = re.findall(r"^\| `(\w+)` \|", SECTIONS["v_problems"].split("| `kind` | When |")[1], re.MULTILINE)

    assert set(found) == kinds


@pytest.mark.parametrize("view", SECTIONS)
def test_each_view_has_an_example_query(view: str) -> None:
    examples = [block.text for block in blocks(QUERIES) if block.language in ("sql", "console")]

    assert any(re.search(rf"\b{view}\b", text) for text in examples)


@pytest.mark.parametrize("view", SECTIONS)
def test_each_view_has_three_queries_that_run(view: str, database: sqlite3.Connection) -> None:
    found = re.search(r"^```sql\n(.*?)^```$", SECTIONS[view], re.MULTILINE | re.DOTALL)
    assert found is not None
    queries = re.findall(r"^-- ([^\n]+)\n(.*?;)\n(?=-- |\Z)", found[1], re.MULTILINE | re.DOTALL)

    assert len(queries) >= 3
    for meaning, query in queries:
        assert meaning.endswith(".")
        assert re.search(rf"\b{view}\b", query)
        database.execute(query).fetchall()


@pytest.mark.parametrize("view", SECTIONS)
def test_page_says_of_each_view_what_ael_sql_says(view: str) -> None:
    assert SECTIONS[view].lstrip("\n").startswith(ABOUT[view] + "\n")


def test_names_of_columns_in_the_page_exist(database: sqlite3.Connection) -> None:
    """`v_agents.status` and the like, anywhere in the documentation."""
    wrong = []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for view, column in re.findall(r"(?<!/)\b(v_\w+)\.(\w+)", Path(page).read_text("utf-8")):
            if view not in SECTIONS or column not in documented(view):
                wrong.append(f"{page.name}: {view}.{column}")

    assert not wrong

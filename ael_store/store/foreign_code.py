"""Refuses a database whose schema would have SQLite do more than this program says.

Who can write the file can leave statements in it that run with ours: a trigger on a table of ours changes the state
behind the loop's back, a view of ours that says something else lies to everybody who asks it or never ends. SQLite
runs no function of such a schema that could reach outside the file (`trusted_schema = OFF`); this look, a fraction
of a millisecond, is for the rest. Tables, views and triggers of the user's own are none of our business.
"""

from __future__ import annotations

import shlex
import sqlite3
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from ael_store.errors import DatabaseDamaged
from ael_store.schema.sqlite_views import VIEWS
from ael_store.store.advice import advice
from ael_store.store.revision import HEAD, reading

__all__ = ["refuse_foreign_code", "refuse_foreign_views"]


def refuse_foreign_code(path: Path, revision: str | None) -> None:
    """Raise DatabaseDamaged where a schema holds statements that would run with those of the loop. Only reads."""
    with reading(path) as connection:
        for name, table in _triggers(connection):
            raise DatabaseDamaged(
                f"{path}: trigger {name} runs with every change of table {table}, and ael_store made no triggers; "
                "nothing was changed. If it is yours and harmless, remove it: "
                + _command(path, f"DROP TRIGGER {_quoted(name)}")
            )
        for name, what in _imitations(connection):
            raise DatabaseDamaged(
                f"{path}: {name} is {what}, not the table that ael_store made; nothing was changed. {advice(path)}"
            )
        if revision == HEAD:
            refuse_foreign_views(connection, path)


def refuse_foreign_views(connection: sqlite3.Connection, path: Path) -> None:
    """Raise DatabaseDamaged where a view of ours is missing, or says something else at the newest revision."""
    found = connection.execute("SELECT name, type, sql FROM sqlite_schema WHERE substr(name, 1, 2) = 'v_'")
    texts = {name: " ".join(str(text).split()) for name, kind, text in found if kind == "view"}
    for name, wanted in _views().items():
        if texts.get(name) != wanted:
            how = "is missing" if name not in texts else "is not the one that ael_store made"
            raise DatabaseDamaged(f"{path}: view {name} {how}; nothing was changed. {advice(path)}")


@cache
def _views() -> dict[str, str]:
    return {name: " ".join(f"CREATE VIEW {name} AS {text}".split()) for name, text in VIEWS.items()}


@cache
def _tables() -> frozenset[str]:
    from ael_store.schema.tables import metadata  # brings SQLAlchemy, which the dashboard does without

    return frozenset(metadata.tables)


def _ours(name: str) -> bool:
    return name.lower() in _tables() or name.lower() in VIEWS or name.lower() == "alembic_version"


def _triggers(connection: sqlite3.Connection) -> Iterator[tuple[str, str]]:
    """Yield triggers that our changes set off, with their table: one of ours, or one whose rows follow ours."""
    for name, table in connection.execute("SELECT name, tbl_name FROM sqlite_schema WHERE type = 'trigger'").fetchall():
        parents = connection.execute('SELECT "table" FROM pragma_foreign_key_list(?)', (table,)).fetchall()
        if _ours(table) or any(_ours(parent) for (parent,) in parents):
            yield name, table


def _imitations(connection: sqlite3.Connection) -> Iterator[tuple[str, str]]:
    """Yield what has the name of a table of ours and is none."""
    for name, kind, text in connection.execute("SELECT name, type, sql FROM sqlite_schema WHERE type <> 'trigger'"):
        if name.lower() not in _tables():
            continue
        words = str(text).split(None, 2)[:2]
        if kind != "table" or [word.upper() for word in words] != ["CREATE", "TABLE"]:
            yield name, "a virtual table" if kind == "table" else f"{'an' if kind == 'index' else 'a'} {kind}"


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _command(path: Path, statement: str) -> str:
    return f"`sqlite3 {shlex.quote(str(path))} {shlex.quote(statement)}`"

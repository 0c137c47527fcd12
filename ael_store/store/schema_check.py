"""Comparing a database with what its revision should be, and looking for damage."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from sqlalchemy import create_engine
from sqlalchemy.pool import StaticPool

from ael_store.store.create import create_schema
from ael_store.store.revision import (
    HEAD,
    alembic_config,
    current_revision,
    known_revisions,
    reading,
    take_over_transactions,
)

__all__ = ["CheckReport", "check"]

Schema = dict[tuple[str, str], tuple[str, ...]]
"""The definitions that each (kind, name) consists of."""


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What `check` found."""

    revision: str | None
    head: str
    up_to_date: bool
    problems: list[str]
    """One sentence for each difference from what this program expects; empty where all is well."""
    damaged: bool
    """True where SQLite itself finds the file damaged."""


def check(path: Path, *, thorough: bool = False) -> CheckReport:
    """Compare a database with what its revision should be, and look for damage. Only reads.

    Tables, indexes, views and triggers that are not ours are problems too: an upgrade knows nothing of them.
    With `thorough` the indexes are compared with their tables, which takes longer.
    Raises what `current_revision` raises.
    """
    revision = current_revision(path)
    problems: list[str] = []
    expected = _expected_schema(revision)
    with reading(path) as connection:
        damage = _damage(connection, "integrity_check" if thorough else "quick_check")
        if revision is None:
            problems.append("the file is empty: `ael run` or `ael db upgrade` makes it a database")
        elif expected is None:
            problems.append(f"revision {revision} was written by a newer ael_store; this one knows up to {HEAD}")
        else:
            problems += _differences(expected, _schema(connection))
            if not problems and not damage:
                problems += _missing_rows(connection)
        if not damage:
            broken = connection.execute("PRAGMA foreign_key_check").fetchall()
            problems += [
                f"table {table}, row {row}: refers to a row of {parent} that does not exist"
                for table, row, parent, _ in broken[:20]
            ]
            if len(broken) > 20:
                problems.append(f"{len(broken) - 20} more rows refer to rows that do not exist")
    return CheckReport(revision, HEAD, revision == HEAD, damage + problems, bool(damage))


def _damage(connection: sqlite3.Connection, pragma: str) -> list[str]:
    try:
        found = [str(row[0]) for row in connection.execute(f"PRAGMA {pragma}(20)")]
    except sqlite3.DatabaseError as error:
        if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_CORRUPT:
            raise
        found = [str(error)]
    return [f"damage: {line}" for line in found if line != "ok"]


def _missing_rows(connection: sqlite3.Connection) -> list[str]:
    """Say which of the rows that a database has from its first moment are gone."""
    return [
        message
        for query, message in (
            (
                "SELECT 1 FROM lease WHERE id = 1",
                "table lease has lost its row: no loop can own the database",
            ),
            (
                "SELECT 1 FROM agents WHERE id = 0",
                "table agents has lost row 0, which stands for changes from outside",
            ),
        )
        if connection.execute(query).fetchone() is None
    ]


@cache
def _expected_schema(revision: str | None) -> Schema | None:
    """Return what a revision should look like; None for an empty file and for an unknown revision."""
    if revision is None:
        return None
    engine = create_engine("sqlite+pysqlite://", creator=lambda: sqlite3.connect(":memory:"), poolclass=StaticPool)
    take_over_transactions(engine, "BEGIN IMMEDIATE")
    try:
        with engine.connect() as connection:
            if revision == HEAD:
                with connection.begin():
                    create_schema(connection)
            else:
                config = alembic_config()
                if revision not in known_revisions(config):
                    return None
                from alembic import command

                config.attributes["connection"] = connection
                command.upgrade(config, revision)
            raw: Any = connection.connection.driver_connection
            return _schema(raw)
    finally:
        engine.dispose()


def _schema(connection: sqlite3.Connection) -> Schema:
    """Read a schema so that two of them can be compared, however their tables came to be."""
    schema: Schema = {}
    for kind, name, text in connection.execute(
        "SELECT type, name, sql FROM sqlite_schema WHERE substr(name, 1, 7) <> 'sqlite_' ORDER BY type, name"
    ):
        if kind == "table" and text.upper().startswith("CREATE TABLE"):
            columns = connection.execute("SELECT name FROM pragma_table_xinfo(?) ORDER BY cid", (name,))
            order = "columns in the order " + ", ".join(column for (column,) in columns)
            schema[kind, name] = (*sorted(_definitions(text)), order)
        else:
            schema[kind, name] = (" ".join(text.split()),)
    return schema


def _definitions(text: str) -> list[str]:
    """Split a CREATE TABLE into its columns, constraints and options, spaces evened out."""
    begin, end = text.index("("), text.rindex(")")
    parts = [""]
    depth, quote = 0, ""
    for character in text[begin + 1 : end]:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"`":
            quote = character
        elif character in "()":
            depth += 1 if character == "(" else -1
        if character == "," and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += character
    parts.append(text[end + 1 :])
    return [" ".join(part.split()) for part in parts if part.strip()]


def _differences(expected: Schema, found: Schema) -> list[str]:
    problems = [f"{kind} {name} is missing" for kind, name in expected if (kind, name) not in found]
    problems += [f"{kind} {name} is not ours" for kind, name in found if (kind, name) not in expected]
    for (kind, name), wanted in expected.items():
        actual = found.get((kind, name), wanted)
        if actual != wanted:
            lacks = [part for part in wanted if part not in actual]
            more = [part for part in actual if part not in wanted]
            said = [f"lacks «{'», «'.join(lacks)}»"] if lacks else []
            said += [f"has «{'», «'.join(more)}»"] if more else []
            problems.append(f"{kind} {name} differs: it {' and '.join(said) or 'says a part twice'}")
    return problems

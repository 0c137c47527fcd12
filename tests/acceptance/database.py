"""What a test sees of a database from outside: read-only, by plain sqlite3, as a user's SQL tool would."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

__all__ = ["ask", "read", "reading"]

Row = tuple[Any, ...]


def read(path: Path) -> sqlite3.Connection:
    """Return a connection that can't write, and so can't repair or tidy up anything either."""
    return sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=10, isolation_level=None)


@contextmanager
def reading(path: Path) -> Iterator[sqlite3.Connection]:
    """One moment of a database: everything read in the block belongs to the same commit."""
    with closing(read(path)) as connection:
        connection.execute("BEGIN")
        yield connection


def ask(path: Path, query: str, *arguments: Any) -> list[Row]:
    """Return the rows of a query."""
    with closing(read(path)) as connection:
        return connection.execute(query, arguments).fetchall()

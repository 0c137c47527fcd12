"""What takes the room in a database: each table with its indexes."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from pathlib import Path

from ael_store.schema.tables import metadata
from ael_store.store.revision import reading

__all__ = ["SizeReport", "TableSize", "measure"]


@dataclass(frozen=True, slots=True)
class TableSize:
    """One table."""

    name: str
    rows: int
    bytes: int | None
    """Pages of the table, in bytes; None where this SQLite can't tell."""
    index_bytes: int | None
    """Pages of its indexes."""


@dataclass(frozen=True, slots=True)
class SizeReport:
    """Where the bytes of a file are."""

    file_bytes: int
    used_bytes: int
    free_bytes: int
    """Free pages: new rows take them before the file grows."""
    tables: list[TableSize]
    """The largest first."""


def measure(path: Path) -> SizeReport:
    """Return what takes the room; only reads, and may run beside a loop. Takes a second for each GB or so."""
    with reading(path) as connection:
        connection.execute("BEGIN")
        pages, free, size = (
            int(connection.execute(f"PRAGMA {name}").fetchone()[0])
            for name in ("page_count", "freelist_count", "page_size")
        )
        found = _pages(connection)
        owners = dict(
            connection.execute("SELECT name, tbl_name FROM sqlite_schema WHERE type = 'index' AND name IS NOT NULL")
        )
        tables = []
        for name in metadata.tables:
            if connection.execute("SELECT 1 FROM sqlite_schema WHERE type = 'table' AND name = ?", (name,)).fetchone():
                rows = int(connection.execute(f'SELECT count(*) FROM "{name}"').fetchone()[0])
                indexes = [index for index, owner in owners.items() if owner == name]
                tables.append(
                    TableSize(
                        name,
                        rows,
                        None if found is None else found.get(name, 0),
                        None if found is None else sum(found.get(index, 0) for index in indexes),
                    )
                )
    tables.sort(key=lambda table: (-(table.bytes or 0) - (table.index_bytes or 0), -table.rows))
    return SizeReport(pages * size, (pages - free) * size, free * size, tables)


def _pages(connection: sqlite3.Connection) -> dict[str, int] | None:
    """Return the bytes of each table and index; None where SQLite was built without the table that tells."""
    try:
        rows = connection.execute(
            "SELECT name, sum(pgsize) FROM dbstat WHERE aggregate = TRUE GROUP BY name"
        ).fetchall()
    except sqlite3.OperationalError:
        return None
    return {str(name): int(size) for name, size in rows}

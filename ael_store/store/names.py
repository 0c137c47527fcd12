"""The names in a database that begin in some way, for a shell that completes them: quick, and without SQLAlchemy."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path
from typing import Literal

from ael_store.store.sqlite import connect_to_read

__all__ = ["Noun", "names"]

Noun = Literal["agent", "key", "event type", "limit", "subscriber", "task"]

MOST = 200
PATIENCE_MS = 200

QUERIES: dict[Noun, str] = {
    "agent": "SELECT name FROM v_agents WHERE name GLOB :glob ORDER BY name LIMIT :most",
    "key": "SELECT key FROM v_state WHERE key GLOB :glob ORDER BY key LIMIT :most",
    "event type": "SELECT name FROM event_types WHERE name GLOB :glob ORDER BY name LIMIT :most",
    "limit": "SELECT name FROM limits WHERE name GLOB :glob ORDER BY name LIMIT :most",
    "subscriber": "SELECT DISTINCT subscriber FROM v_dead_letters WHERE subscriber GLOB :glob ORDER BY 1 LIMIT :most",
    "task": (
        "SELECT CAST(id AS TEXT) FROM tasks WHERE applied_us IS NULL AND CAST(id AS TEXT) GLOB :glob "
        "ORDER BY id DESC LIMIT :most"
    ),
}
"""Of tasks those that are not over, or whose result nobody has taken up."""


def names(path: Path, noun: Noun, prefix: str) -> list[str]:
    """Return the names that begin with `prefix`, at most 200; none where the database can't tell."""
    glob = "".join(f"[{character}]" if character in "*?[" else character for character in prefix) + "*"
    if not path.is_file() or path.with_name(f"{path.name}-journal").exists():
        return []
    try:
        with contextlib.closing(connect_to_read(path, timeout=PATIENCE_MS / 1000)) as connection:
            connection.execute("PRAGMA trusted_schema = OFF")
            return [str(row[0]) for row in connection.execute(QUERIES[noun], {"glob": glob, "most": MOST})]
    except (sqlite3.Error, UnicodeDecodeError):
        return []

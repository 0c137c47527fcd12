"""The SQLite that this Python was built with, and what is known to be wrong with some of them."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass

__all__ = ["OLDEST_SQLITE", "SqliteBuild", "sqlite_build"]

OLDEST_SQLITE = (3, 37)
"""STRICT tables are in SQLite since this version."""

MENDED = ((3, 50, 7), (3, 51, 3))
"""The oldest versions in which a reset of the log can't damage the file: of one line, and of all after it."""


@dataclass(frozen=True, slots=True)
class SqliteBuild:
    """What counts here."""

    version: str
    is_too_old: bool
    has_threads: bool
    may_damage: bool
    """True where two connections that write and checkpoint at the same moment may damage a file."""


def sqlite_build(version: tuple[int, ...] = sqlite3.sqlite_version_info) -> SqliteBuild:
    """Return what is known of a version of SQLite, that of this Python unless another one is asked for."""
    mended_line, mended = MENDED
    return SqliteBuild(
        ".".join(map(str, version)),
        version < OLDEST_SQLITE,
        sqlite3.threadsafety > 0,
        version < mended and not (version[:2] == mended_line[:2] and version >= mended_line),
    )

"""A look into a database for `ael doctor`: how it is, without anything being made, moved or rolled back.

Other readers leave the empty log and the shared memory that SQLite makes for them. A database at rest is read here
as a file that nobody changes, which needs neither; where a loop begins meanwhile, what was seen then counts for
nothing and the look is repeated beside it.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ael_store.errors import AelError
from ael_store.store.foreign_code import refuse_foreign_views
from ael_store.store.lock import current_holder
from ael_store.store.revision import HEAD, explain, refuse_half_restored, revision_of
from ael_store.store.sqlite import connect_to_read
from ael_store.store.verify import look_at_newest

__all__ = ["Examination", "examine"]

PATIENCE_S = 3.0
"""How long the pages of a file are looked at; `ael db verify` takes the time that it needs."""
OPCODES = 20_000
"""How many steps of SQLite's machine pass from one look at the clock to the next."""


@dataclass(slots=True)
class Examination:
    """What was found."""

    revision: str | None
    """None where the file holds nothing yet."""
    damage: list[str] = field(default_factory=list)
    complete: bool = True
    """False where looking at all pages would have taken too long."""
    lease: dict[str, Any] | None = None
    last_run: dict[str, Any] | None = None
    newest_at: str | None = None
    """When the newest iteration began."""
    problems: list[dict[str, Any]] = field(default_factory=list)


def examine(path: Path) -> Examination:
    """Return how a database is. Of an older or newer schema only the revision, and whether its pages are sound.

    Raises NotADatabase, DatabaseDamaged or DatabaseNotUsable, as `current_revision` does.
    """
    at_rest = current_holder(path) is None and not _has_log(path)
    try:
        found = _examine(path, at_rest)
    except AelError:
        if not (at_rest and (current_holder(path) is not None or _has_log(path))):
            raise
        return _examine(path, at_rest=False)
    if found.damage and at_rest and current_holder(path) is not None:
        return _examine(path, at_rest=False)
    return found


def _has_log(path: Path) -> bool:
    try:
        return path.with_name(f"{path.name}-wal").stat().st_size > 0
    except FileNotFoundError:
        return False


def _examine(path: Path, at_rest: bool) -> Examination:
    with _undisturbed(path, at_rest) as connection:
        found = Examination(revision_of(connection, path))
        found.damage, found.complete = _damage(connection)
        if found.revision != HEAD or found.damage:
            return found
        refuse_foreign_views(connection, path)
        connection.row_factory = sqlite3.Row
        lease = connection.execute("SELECT token, holder FROM lease").fetchone()
        run = connection.execute("SELECT * FROM v_runs ORDER BY run_id DESC LIMIT 1").fetchone()
        newest = connection.execute("SELECT started_at FROM v_iterations ORDER BY iteration DESC LIMIT 1").fetchone()
        found.lease = None if lease is None else dict(lease)
        found.last_run = None if run is None else dict(run)
        found.newest_at = None if newest is None else newest["started_at"]
        found.problems = [dict(row) for row in connection.execute("SELECT * FROM v_problems")]
        connection.row_factory = None
        found.damage = look_at_newest(connection).problems
    return found


@contextmanager
def _undisturbed(path: Path, at_rest: bool) -> Iterator[sqlite3.Connection]:
    refuse_half_restored(path)
    try:
        if at_rest:
            connection = sqlite3.connect(f"{path.as_uri()}?mode=ro&immutable=1", uri=True, isolation_level=None)
        else:
            connection = connect_to_read(path)
        try:
            connection.execute("PRAGMA trusted_schema = OFF")
            connection.execute("PRAGMA cell_size_check = ON")
            connection.execute("BEGIN")
            yield connection
        finally:
            connection.close()
    except (sqlite3.Error, UnicodeDecodeError) as error:
        raise explain(error, path) from error


def _damage(connection: sqlite3.Connection) -> tuple[list[str], bool]:
    """Return what SQLite complains about, and whether there was time to look at every page."""
    give_up = time.monotonic() + PATIENCE_S
    connection.set_progress_handler(lambda: time.monotonic() > give_up, OPCODES)
    try:
        found = [str(row[0]) for row in connection.execute("PRAGMA quick_check(5)").fetchall()]
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode != sqlite3.SQLITE_INTERRUPT:
            raise
        return [], False
    finally:
        connection.set_progress_handler(None, 0)
    return [] if found == ["ok"] else found, True

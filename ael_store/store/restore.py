"""Putting a backup in the place of a database, so that a kill at any moment leaves the one or the other, whole.

What has to be kept apart is the log: `ael.db-wal` belongs to the file that it was written for, and a new file
beside an old log is a damaged database. Two ways:

- Where SQLite can open the old file, it moves the log into it and leaves WAL mode, which needs the file for itself
  alone and so finds out who else has it open. Under that lock the old file gets a second name and the new one
  takes its name in one step; at no moment is there a log.
- Where it can't (the old file is too damaged, or missing with its log left behind), the names have to change one
  after another. A marker (`ael.db.restoring`) is beside them meanwhile, and with it everything of ours refuses the
  database and says how to finish.

The new file is a copy made by SQLite under a name of its own. Its fencing token is higher than any that an owner of
the old file or of the backup had, so that one of them that wakes up can't commit.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import delete, insert, update
from sqlalchemy.exc import DBAPIError

from ael_store.clock import SystemClock, from_us, iso
from ael_store.errors import AelError, DatabaseNotUsable, NotADatabase, OwnedElsewhere, UsageError
from ael_store.schema.tables import metadata
from ael_store.store.backup import BESIDE, copy_database, need_space, size_of, verified_copy
from ael_store.store.revision import (
    alembic_config,
    current_revision,
    explain,
    known_revisions,
    migration_engine,
    reading,
    refuse_newer,
    restore_marker,
)
from ael_store.store.whole_file import discard, keep, publish, remove, replace, reserve, sync, sync_folder

__all__ = ["Moment", "RestoreReport", "moment_of", "restore"]

Tell = Callable[[str], None]

AHEAD = 1_000_000
"""How far the token jumps where the old file can't say its own: more starts than one database ever sees."""

EXCLUSIVE_WAIT_MS = 5_000
"""How long to wait for readers of the old file to go."""


@dataclass(frozen=True, slots=True)
class Moment:
    """What a database holds."""

    revision: str
    iteration: int
    """The last iteration, 0 where there is none."""
    at: str | None
    """When that began; None where there is none."""
    token: int


@dataclass(frozen=True, slots=True)
class RestoreReport:
    """What `restore` did, or with `dry_run` would do."""

    path: Path
    backup: Path
    now: Moment
    before: Moment | None
    """What was there; None where there was nothing, or nothing that could be read."""
    kept: Path | None
    """The old file under its new name; None where there was none."""


def restore(path: Path, backup: Path, tell: Tell, *, dry_run: bool = False) -> RestoreReport:
    """Put a verified copy of `backup` in the place of a database, and keep the old file beside it.

    The caller holds the lock of the database. Raises NotADatabase, DatabaseDamaged or SchemaTooNew for a backup that
    is not usable, OwnedElsewhere where another program has the old file open, StorageFailed where space is short.
    A kill leaves the old database, the new one, or files that everything refuses until the restore is repeated.
    """
    path, backup = path.resolve(), backup.resolve()
    now, before = _compare(path, backup, tell)
    kept = _kept_name(path) if os.path.lexists(path) else None
    if dry_run:
        return RestoreReport(path, backup, now, before, kept)

    need_space(path.parent, size_of(backup), f"the restore of {path}", "the backup")
    tell(f"restoring {path} from {backup}")
    temporary = reserve(path, "restore")
    try:
        copy_database(backup, temporary, tell)
        known = [now.token] if before is None else [now.token, before.token]
        _mark(temporary, backup, max(known) + (AHEAD if before is None else 1))
        sync(temporary)
        verified_copy(temporary, backup, tell)
        kept = _swap(path, temporary, backup, kept)
    except (DBAPIError, sqlite3.Error) as error:
        raise explain(error, path) from error
    finally:
        discard(temporary)
    tell(f"{path} is restored" + (f"; the database as it was is {kept}" if kept is not None else ""))
    return RestoreReport(path, backup, now, before, kept)


# -- what is there ----------------------------------------------------------------------------------


def _compare(path: Path, backup: Path, tell: Tell) -> tuple[Moment, Moment | None]:
    """Return what the backup and the database hold; refuses a backup that can't be restored."""
    if not backup.is_file():
        raise DatabaseNotUsable(
            f"the backup {backup} does not exist" if not backup.exists() else f"{backup} is no file"
        )
    if path.exists() and path.samefile(backup):
        raise UsageError(f"{backup} is the database itself: name a backup of it")
    if path.is_dir():
        raise DatabaseNotUsable(f"{path} is a folder; name a file with --db or AEL_DB")
    if not path.parent.is_dir():
        raise DatabaseNotUsable(f"{path.parent} is no folder; create it, or name another file with --db or AEL_DB")
    revision = current_revision(backup)
    if revision is None:
        raise NotADatabase(f"the backup {backup} is empty")
    known = known_revisions(alembic_config())
    refuse_newer(backup, revision, known)
    now = moment_of(backup)
    if revision != known[-1]:
        tell(f"{backup} is at revision {revision}; the next start or `ael db upgrade` brings it to {known[-1]}")
    try:
        return now, moment_of(path)
    except AelError as error:
        if path.exists():
            tell(f"the database as it is can't be read ({error})")
        return now, None


def moment_of(path: Path) -> Moment:
    """Return what a database holds; raises what opening it raises, NotADatabase where it is empty."""
    revision = current_revision(path)
    if revision is None:
        raise NotADatabase(f"{path} is empty")
    with reading(path) as connection:
        token = connection.execute(
            "SELECT max(token) FROM (SELECT token FROM lease UNION ALL SELECT max(token) FROM runs)"
        ).fetchone()[0]
        last = connection.execute("SELECT id, started_us FROM iterations ORDER BY id DESC LIMIT 1").fetchone()
    return Moment(revision, last[0] if last else 0, iso(last[1]) if last else None, token or 0)


def _kept_name(path: Path) -> Path:
    made = from_us(SystemClock().now_us()).strftime("%Y%m%dT%H%M%SZ")
    name = kept = path.with_name(f"{path.name}.before-restore-{made}")
    more = 1
    while any(os.path.lexists(kept.with_name(kept.name + end)) for end in ("", *BESIDE)):
        more += 1
        kept = name.with_name(f"{name.name}-{more}")
    return kept


def _mark(temporary: Path, backup: Path, token: int) -> None:
    """Write into the copy where it comes from, and the token that the next owner begins with."""
    at_us = SystemClock().now_us()
    lease, meta = metadata.tables["lease"], metadata.tables["meta"]
    facts = {"restored_from": str(backup), "restored_us": at_us}
    engine = migration_engine(temporary)
    try:
        with engine.begin() as connection:
            connection.execute(update(lease).values(token=token, holder="ael db restore", taken_us=at_us))
            connection.execute(delete(meta).where(meta.c.name.in_(list(facts))))
            connection.execute(
                insert(meta), [{"name": name, "value": json.dumps(fact)} for name, fact in facts.items()]
            )
    finally:
        engine.dispose()


# -- changing places --------------------------------------------------------------------------------


def _swap(path: Path, temporary: Path, backup: Path, kept: Path | None) -> Path | None:
    """Let the new file take the name; returns under which name the old one is now."""
    if restore_marker(path).exists() or (kept is None and any(_beside(path))):
        return _swap_in_steps(path, temporary, backup, kept)
    if kept is None:
        if not publish(temporary, path):
            raise OwnedElsewhere(f"{path} has appeared meanwhile: look who made it, then restore again")
        return None
    with _alone(path) as log_is_empty:
        if not (log_is_empty and keep(path, kept)):
            return _swap_in_steps(path, temporary, backup, kept)
        replace(temporary, path)
    return kept


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[bool]:
    """Hold the old file for ourselves, its log moved into it; gives False where SQLite can't open it.

    Raises OwnedElsewhere where another program has it open.
    """
    if not path.exists() or path.stat().st_size == 0:
        yield False
        return
    connection = sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True, isolation_level=None)
    try:
        alone = _take(connection, path)
        yield alone
    finally:
        connection.close()


def _take(connection: sqlite3.Connection, path: Path) -> bool:
    try:
        connection.execute(f"PRAGMA busy_timeout = {EXCLUSIVE_WAIT_MS}")
        connection.execute("PRAGMA trusted_schema = OFF")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        connection.execute("PRAGMA journal_mode = DELETE").fetchall()
        connection.execute("BEGIN EXCLUSIVE")
        mode = connection.execute("PRAGMA journal_mode").fetchone()[0]
    except sqlite3.Error as error:
        code = error.sqlite_errorcode & 0xFF
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            return False
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise _in_use(path) from error
        raise explain(error, path) from error
    if mode != "delete":
        raise _in_use(path)
    return not any(_beside(path))


def _in_use(path: Path) -> OwnedElsewhere:
    return OwnedElsewhere(
        f"{path} is open in another program (a dashboard, a SQL tool, a stopped loop), which would go on with the old "
        "file: end it, then restore again; nothing was changed"
    )


def _beside(path: Path) -> Iterator[Path]:
    """Yield the files of SQLite that are beside a database now."""
    for end in BESIDE:
        if os.path.lexists(file := path.with_name(path.name + end)):
            yield file


def _swap_in_steps(path: Path, temporary: Path, backup: Path, kept: Path | None) -> Path | None:
    """Change places where the old file and its log can't become one; the marker is there for all of it."""
    marker = restore_marker(path)
    noted = _noted(marker)
    kept = noted or kept or _kept_name(path)
    if noted is None:
        unfinished = reserve(path, "marker")
        try:
            unfinished.write_text(json.dumps({"backup": str(backup), "kept": str(kept)}), "utf-8")
            sync(unfinished)
            replace(unfinished, marker)
        finally:
            discard(unfinished)
    # Killed and repeated: the log goes first, so where the file is gone everything of the old one is.
    if path.exists():
        mine = kept if not kept.exists() else _kept_name(path)
        for end in ("-wal", "-journal", ""):
            if (file := path.with_name(path.name + end)).exists():
                os.rename(file, mine.with_name(mine.name + end))
                sync_folder(path.parent)
    elif not kept.exists():
        for file in _beside(path):  # logs without a file
            os.rename(file, kept.with_name(kept.name + file.name.removeprefix(path.name)))
    remove(*(path.with_name(path.name + end) for end in BESIDE))
    replace(temporary, path)
    remove(marker)
    return kept


def _noted(marker: Path) -> Path | None:
    """Return the name for the old file that an interrupted restore has begun with."""
    try:
        return Path(json.loads(marker.read_bytes())["kept"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        return _kept_name(marker.with_name(marker.name.removesuffix(".restoring")))

"""The schema's life: creating a database, telling its revision, moving it to another one, checking it.

Everything here is synchronous and called by an owner: whoever creates, upgrades or downgrades holds the
database's lock and has no other connection to it. `current_revision` and `check` only read and need no lock.

An old database is moved by the revisions in `migrations/`, after a verified backup, in one transaction (see
`migrations/env.py`). A new one is made from `schema/`, without them; tests compare the two ways.
"""

from __future__ import annotations

import contextlib
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from ael_store.errors import AelError, DatabaseDamaged, StorageFailed, UsageError
from ael_store.store.create import create_database, exists
from ael_store.store.progress import Tell, telling
from ael_store.store.revision import (
    HEAD,
    alembic_config,
    current_revision,
    explain,
    known_revisions,
    migration_engine,
    refuse_newer,
)
from ael_store.store.schema_check import CheckReport, check
from ael_store.store.whole_file import create_file

if TYPE_CHECKING:
    from alembic.config import Config

__all__ = [
    "HEAD",
    "CheckReport",
    "UpgradeReport",
    "check",
    "create_database",
    "current_revision",
    "downgrade",
    "place_of",
    "upgrade",
]


@dataclass(frozen=True, slots=True)
class UpgradeReport:
    """What `upgrade` or `downgrade` did; nothing where both revisions are equal."""

    from_revision: str | None
    """None where the file was empty."""
    to_revision: str
    backup: Path | None
    """The database as it was before; None where none was made."""


def upgrade(path: Path, *, backup: bool = True, revision: str = "head", progress: Tell | None = None) -> UpgradeReport:
    """Bring the schema up to `revision`, whole or not at all; does nothing where it is there already.

    First makes a verified backup beside the file (`ael.db.bak-0001-20260131T120000Z`). `progress` gets a line
    for each step. Raises SchemaTooNew for a database of a newer program, StorageFailed where space is short,
    and what `current_revision` raises; the database is as it was then, and the message names the backup.
    """
    before = current_revision(path)
    if before == HEAD and revision in ("head", HEAD):
        return UpgradeReport(before, HEAD, None)
    config = alembic_config()
    known = known_revisions(config)
    refuse_newer(path, before, known)
    here = known.index(before) if before is not None else -1
    there = place_of(known, here, revision)
    if there < here:
        raise UsageError(f"{path} is at revision {before}, later than {revision}: use `ael db downgrade {revision}`")
    return _move(path, config, before, known[there], backup=backup, progress=progress, down=False)


def downgrade(path: Path, revision: str, *, backup: bool = True, progress: Tell | None = None) -> UpgradeReport:
    """Bring the schema back to `revision` (`0002`, or `-1` for the one before), for an older ael_store.

    Loses what the older schema can't hold; the backup has it. Otherwise like `upgrade`.
    """
    before = current_revision(path)
    config = alembic_config()
    known = known_revisions(config)
    refuse_newer(path, before, known)
    if before is None:
        raise UsageError(f"{path} is empty: there is nothing to downgrade")
    here = known.index(before)
    there = place_of(known, here, revision)
    if there > here:
        raise UsageError(f"{path} is at revision {before}, earlier than {revision}: use `ael db upgrade`")
    return _move(path, config, before, known[there], backup=backup, progress=progress, down=True)


def place_of(known: list[str], here: int, revision: str) -> int:
    """Return the place of a revision given by its id, as `head`, or by a distance (`-1`, `+1`)."""
    if revision == "head":
        return len(known) - 1
    if revision in known:
        return known.index(revision)
    if revision[:1] in ("+", "-") and revision[1:].isascii() and revision[1:].isdigit():
        place = here + int(revision)
        if 0 <= place < len(known):
            return place
    raise UsageError(f"there is no revision {revision!r} to go to; the revisions are {', '.join(known)}")


def _move(
    path: Path,
    config: Config,
    before: str | None,
    target: str,
    *,
    backup: bool,
    progress: Tell | None,
    down: bool,
) -> UpgradeReport:
    """Back up, then let Alembic run in one transaction."""
    if before == target:
        return UpgradeReport(before, target, None)
    tell = progress if progress is not None else _tell_nobody
    path = path.resolve()
    from ael_store.store.backup import back_up, require_space  # with `verify` they are large, and seldom needed

    backup = backup and before is not None
    if before is not None:
        tell(f"{'downgrading' if down else 'upgrading'} {path} from revision {before} to {target}")
    require_space(path, backup=backup)
    saved = back_up(path, tell) if backup else None
    try:
        with telling(tell, lambda seconds: f"moving from revision {before} to {target}, {seconds} s so far"):
            _run_alembic(path, config, target, tell, down=down)
    except (DBAPIError, sqlite3.Error) as error:
        raise _with_backup(explain(error, path), saved) from error
    except AelError as error:
        raise _with_backup(error, saved) from error
    except Exception as error:
        raise _with_backup(AelError(f"{path}: moving from revision {before} to {target}: {error}"), saved) from error
    tell(f"schema is at revision {target}")
    return UpgradeReport(before, target, saved)


def _tell_nobody(_line: str) -> None:
    pass


def _with_backup(error: AelError, saved: Path | None) -> AelError:
    """Add to an error where the database stands now, and where the backup is."""
    where = f"; its backup is {saved}" if saved is not None else ""
    if isinstance(error, StorageFailed):  # an error at COMMIT: only reading the file again tells
        return StorageFailed(f"{error}. Nothing is half done{where}")
    return type(error)(f"{error}. The database is as it was{where}")


def _run_alembic(path: Path, config: Config, target: str, tell: Tell, *, down: bool) -> None:
    from alembic import command

    engine = migration_engine(path)
    try:
        with engine.connect() as connection:
            config.attributes["connection"] = connection
            config.attributes["progress"] = tell
            (command.downgrade if down else command.upgrade)(config, target)
    finally:
        engine.dispose()


# -- for migrations/env.py --------------------------------------------------------------------------


def prepare_file(path: Path, *, create: bool) -> None:
    """Let the `alembic` command change only what is ours: an existing database, or with `create` a new file.

    Must be called before this process has a connection to the file.
    """
    if create and not exists(path):
        with contextlib.suppress(FileExistsError):
            create_file(path, path)
    revision = current_revision(path)
    refuse_newer(path, revision, known_revisions(alembic_config()))


def confirm(connection: Connection) -> None:
    """Check, before the commit of a move, that the rows refer to each other and the file is sound."""
    broken = connection.exec_driver_sql("PRAGMA foreign_key_check").fetchall()
    if broken:
        tables = ", ".join(sorted({str(row[0]) for row in broken}))
        raise DatabaseDamaged(f"{len(broken)} rows refer to rows that do not exist, in {tables}")
    found = [str(row[0]) for row in connection.exec_driver_sql("PRAGMA quick_check(5)").fetchall()]
    if found != ["ok"]:
        raise DatabaseDamaged(f"quick_check finds: {'; '.join(found)}")

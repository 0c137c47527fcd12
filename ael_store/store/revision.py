"""Which revision of the schema a database has, and the connections for finding out and for changing it.

No function of the modules that create, move and check a schema opens the file of a database except through
SQLite: closing a plain descriptor would drop the locks of this process's SQLite connections to that file.
Alembic is imported only where a database has to move, because that takes longer than the rest of a start; SQLAlchemy
only where an engine is made, because the dashboard does without it.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ael_store._version import __version__
from ael_store.errors import AelError, DatabaseDamaged, DatabaseNotUsable, NotADatabase, SchemaTooNew, SchemaTooOld
from ael_store.store.sqlite import BUSY_TIMEOUT_MS, connect_to_read, translate

if TYPE_CHECKING:
    from alembic.config import Config
    from sqlalchemy import Connection, Engine

__all__ = [
    "HEAD",
    "alembic_config",
    "current_revision",
    "explain",
    "known_revisions",
    "migration_engine",
    "reading",
    "refuse_half_restored",
    "refuse_newer",
    "refuse_other",
    "restore_marker",
    "revision_of",
    "take_over_transactions",
]

HEAD = "0008"
"""The newest revision: what a new database has and what this version of the program reads and writes."""

CORE = frozenset({"meta", "lease", "runs", "iterations", "ticks", "agents", "state", "events"})
"""Tables that every revision has: a database without them is not ours."""


def current_revision(path: Path) -> str | None:
    """Return the revision of a database's schema; None where the file holds nothing yet. Only reads.

    Raises NotADatabase, also for a SQLite database that ael_store did not make; DatabaseDamaged;
    DatabaseNotUsable where the file is missing, a folder or can't be read.
    """
    with reading(path) as connection:
        return revision_of(connection, path)


def revision_of(connection: sqlite3.Connection, path: Path) -> str | None:
    """Return the same of a database that is open already."""
    tables = {
        name
        for (name,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")
        if not name.startswith("sqlite_")
    }
    revisions: list[str] = []
    if "alembic_version" in tables:
        revisions = [revision for (revision,) in connection.execute("SELECT version_num FROM alembic_version")]
    tables.discard("alembic_version")
    if not tables and not revisions:
        return None
    if not tables >= CORE:
        raise NotADatabase(
            f"{path} is a SQLite database that ael_store did not make ({_some(tables)}); "
            "name another file with --db or AEL_DB"
        )
    if len(revisions) != 1:
        raise NotADatabase(
            f"{path} has the tables of ael_store but {len(revisions) or 'no'} revisions in alembic_version, "
            "where exactly one should be: restore a backup"
        )
    return revisions[0]


def _some(tables: set[str]) -> str:
    """Name what was found, shortly."""
    if not tables:
        return "it holds no tables of ours"
    names = sorted(tables)
    return "it holds " + ", ".join(names[:5]) + (f" and {len(names) - 5} more tables" if len(names) > 5 else "")


def refuse_newer(path: Path, revision: str | None, known: list[str]) -> None:
    """Raise SchemaTooNew, naming the backups beside the database, where its revision is unknown."""
    if revision is not None and revision not in known:
        backups = sorted(path.parent.glob(f"{_literal(path.name)}.bak-*"))
        raise SchemaTooNew(
            f"{path}: database schema {revision} was written by a newer ael_store "
            f"(this one, {__version__}, knows revisions up to {HEAD}); install it, or restore a backup: "
            + (", ".join(str(backup) for backup in backups) or "there is none beside the file")
        )


def refuse_other(path: Path) -> None:
    """Raise SchemaTooOld, SchemaTooNew or NotADatabase unless a database has the schema that this program reads."""
    revision = current_revision(path)
    if revision == HEAD:
        return
    if revision is None:
        raise NotADatabase(f"{path} is empty: `ael run` or `ael db upgrade` makes it a database")
    refuse_newer(path, revision, known_revisions(alembic_config()))
    raise SchemaTooOld(f"{path} is at revision {revision}, this program needs {HEAD}: run `ael db upgrade`")


def _literal(name: str) -> str:
    """Escape a name for `glob`."""
    return "".join(f"[{character}]" if character in "*?[" else character for character in name)


# -- the revisions that this program knows ----------------------------------------------------------


def alembic_config() -> Config:
    """Return Alembic's settings, made in code: they fit a checkout and an installed wheel."""
    from alembic.config import Config

    config = Config(stdout=sys.stdout)  # its default is what stdout was when Alembic was imported
    config.set_main_option("script_location", str(_migrations()).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config


def _migrations() -> Path:
    """Return the folder of the revisions: inside the installed package, else beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "_migrations"
    return installed if installed.is_dir() else package.parent / "migrations"


def known_revisions(config: Config) -> list[str]:
    """Return the ids of all revisions, oldest first."""
    from alembic.script import ScriptDirectory

    return [script.revision for script in ScriptDirectory.from_config(config).walk_revisions()][::-1]


# -- connections ------------------------------------------------------------------------------------


def migration_engine(path: Path, *, read_only: bool = False) -> Engine:
    """Return an engine for changes of the schema: a transaction takes the write lock at once, and holds DDL.

    Foreign keys are off, which SQLite accepts only before a transaction: rebuilding a table would delete the
    rows that refer to it. Renames leave references alone, so that a rebuilt table takes its old place.
    """
    from sqlalchemy import create_engine
    from sqlalchemy.pool import NullPool

    def connect() -> sqlite3.Connection:
        connection = _connect(path, "ro" if read_only else "rw")
        if not read_only:
            try:
                _set_up_file(connection)
            except BaseException:
                connection.close()
                raise
        return connection

    engine = create_engine("sqlite+pysqlite://", creator=connect, poolclass=NullPool)
    take_over_transactions(engine, "BEGIN" if read_only else "BEGIN IMMEDIATE")
    return engine


def take_over_transactions(engine: Engine, statement: str) -> None:
    """Begin transactions with `statement`; the driver, which would commit before DDL, begins none itself."""
    from sqlalchemy import event

    @event.listens_for(engine, "connect")
    def connect(connection: sqlite3.Connection, _record: object) -> None:
        connection.isolation_level = None
        connection.execute("PRAGMA foreign_keys = OFF")
        connection.execute("PRAGMA legacy_alter_table = ON")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql(statement)


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    """Open an existing file; never creates one."""
    if mode == "ro":
        return connect_to_read(path)
    return sqlite3.connect(
        f"{path.absolute().as_uri()}?mode={mode}",
        uri=True,
        isolation_level=None,
        timeout=BUSY_TIMEOUT_MS / 1000,
    )


def _set_up_file(connection: sqlite3.Connection) -> None:
    """Set what a file keeps. Page size and auto-vacuum count only before its first table."""
    if connection.execute("PRAGMA page_count").fetchone()[0] == 0:
        connection.execute("PRAGMA page_size = 2048")
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
    if connection.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
        try:
            connection.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            # Somebody else is connected just now; the mode matters to the loop, which sets it again.
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY:
                raise


@contextlib.contextmanager
def reading(path: Path) -> Iterator[sqlite3.Connection]:
    """Give a read-only connection; failures of SQLite become errors of ours."""
    refuse_half_restored(path)
    try:
        connection = _connect(path, "ro")
        try:
            connection.execute("PRAGMA trusted_schema = OFF")
            connection.execute("PRAGMA cell_size_check = ON")
            yield connection
        finally:
            connection.close()
    except (sqlite3.Error, UnicodeDecodeError) as error:
        raise explain(error, path) from error


def restore_marker(path: Path) -> Path:
    """Return the file that is beside a database while a restore is between the old one and the new one."""
    return path.with_name(f"{path.name}.restoring")


def refuse_half_restored(path: Path) -> None:
    """Raise DatabaseDamaged where a restore was killed while the database and its log did not fit together."""
    path = path.resolve()
    try:
        noted = json.loads(restore_marker(path).read_bytes())
        backup, kept = str(noted["backup"]), str(noted["kept"])
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError):
        backup, kept = "BACKUP", f"{path}.before-restore-…"
    raise DatabaseDamaged(
        f"{path}: a restore was interrupted, and the files do not fit together; nothing was changed. Repeat it: "
        f"`ael db restore {shlex.quote(backup)} --db {shlex.quote(str(path))}` (the old database is kept as {kept})"
    )


def explain(error: BaseException, path: Path) -> AelError:
    """Like `translate`; and where SQLite can't say what is wrong with the file, look at it from outside."""
    if path.is_dir():
        return DatabaseNotUsable(f"{path} is a folder; name a file with --db or AEL_DB")
    original: Any = getattr(error, "orig", None) or error
    code = getattr(original, "sqlite_errorcode", 0)
    if code & 0xFF in (sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CONSTRAINT, sqlite3.SQLITE_MISMATCH):
        return AelError(f"{path}: a statement failed ({original})")
    return translate(error, path)

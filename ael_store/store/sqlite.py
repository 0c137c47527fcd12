"""What is SQLite's own: addresses, connections and their pragmas, errors, the one hop into the driver's thread.

Two kinds of connection, never mixed: one read-write connection per database, owned by the loop's task, and
read-only ones for everybody else. Nothing in this process opens the file in another way, because closing any
descriptor of it would drop SQLite's locks.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Engine, create_engine, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool, QueuePool

from ael_store.errors import (
    AelError,
    DatabaseDamaged,
    DatabaseNotUsable,
    DiskFull,
    NotADatabase,
    OwnedElsewhere,
    StorageFailed,
    UsageError,
)

__all__ = ["DURABILITY", "Driver", "database_path", "read_engine", "translate", "write_engine"]

T = TypeVar("T")

DURABILITY = {"full": "FULL", "normal": "NORMAL"}
"""How `durability` is spelt as `PRAGMA synchronous`."""

BUSY_TIMEOUT_MS = 10_000
CACHE_KIB = 16_384
WAL_LIMIT_BYTES = 67_108_864
CHECKPOINT_PAGES = 2000
"""How long the log grows before it is moved into the database: 4 MB, as SQLite has it by default."""


def database_path(address: str | os.PathLike[str]) -> Path:
    """Return the absolute path of a database given as a path or as a URL (`sqlite:///ael.db`)."""
    text = os.fspath(address)
    if "://" in text:
        try:
            url = make_url(text)
        except ArgumentError as error:
            raise UsageError(f"database URL {text!r} can't be read: {error}") from None
        if url.get_backend_name() != "sqlite":
            raise UsageError(
                f"database URL {text!r} names {url.get_backend_name()}; this version stores in SQLite: "
                "use a path or sqlite:///PATH"
            )
        if not url.database:
            raise UsageError(f"database URL {text!r} names no file: write sqlite:///ael.db or sqlite:////srv/ael.db")
        text = url.database
    if not text or "\0" in text:
        raise UsageError(f"{text!r} is no path of a database")
    return Path(text).expanduser().absolute()


def write_engine(path: Path, durability: str) -> AsyncEngine:
    """Return the engine whose single connection writes."""
    engine = create_async_engine(
        URL.create("sqlite+aiosqlite", database=str(path)),
        poolclass=NullPool,
        connect_args={"isolation_level": None, "timeout": BUSY_TIMEOUT_MS / 1000},
    )

    @event.listens_for(engine.sync_engine, "connect")
    def connect(connection: Any, _record: object) -> None:
        cursor = connection.cursor()
        for pragma in (
            f"busy_timeout = {BUSY_TIMEOUT_MS}",
            "journal_mode = WAL",
            f"synchronous = {DURABILITY[durability]}",
            f"fullfsync = {'ON' if durability == 'full' else 'OFF'}",  # macOS: fsync stops at the drive's cache
            "foreign_keys = ON",
            "trusted_schema = OFF",
            "cell_size_check = ON",
            f"cache_size = -{CACHE_KIB}",
            f"journal_size_limit = {WAL_LIMIT_BYTES}",
            f"wal_autocheckpoint = {CHECKPOINT_PAGES}",
        ):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @event.listens_for(engine.sync_engine, "begin")
    def begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine


def read_engine(path: Path) -> Engine:
    """Return an engine that can't write; it works beside a running loop and in a folder that can't be written."""
    query = {"mode": "ro", "uri": "true"}
    if not os.access(path.parent, os.W_OK) and not path.with_name(path.name + "-wal").exists():
        query["immutable"] = "1"  # SQLite could not make the shared memory of a log, and there is no log to read
    engine = create_engine(
        URL.create("sqlite+pysqlite", database=f"file:{_quote(path)}", query=query),
        poolclass=QueuePool,
        pool_size=2,
        max_overflow=8,
        connect_args={"check_same_thread": False, "timeout": BUSY_TIMEOUT_MS / 1000},
    )

    @event.listens_for(engine, "connect")
    def connect(connection: Any, _record: object) -> None:
        cursor = connection.cursor()
        cursor.execute("PRAGMA query_only = ON")
        cursor.execute("PRAGMA trusted_schema = OFF")
        cursor.execute("PRAGMA cell_size_check = ON")
        cursor.close()

    return engine


def _quote(path: Path) -> str:
    """Escape what a SQLite URI would read as its own."""
    return str(path).replace("%", "%25").replace("?", "%3f").replace("#", "%23")


class Driver:
    """One connection, and the way to run a whole transaction on it in one hop to the driver's thread."""

    def __init__(self, connection: AsyncConnection, raw: Any) -> None:
        self.connection = connection
        self._execute = getattr(raw, "_execute", None)
        inner = getattr(raw, "_conn", None)
        self._inner = inner if isinstance(inner, sqlite3.Connection) else None

    @classmethod
    async def of(cls, connection: AsyncConnection) -> Driver:
        return cls(connection, (await connection.get_raw_connection()).driver_connection)

    async def run(self, function: Callable[..., T], *args: Any) -> T:
        """Run `function(dbapi_connection, *args)` in the driver's thread, however many statements it makes.

        aiosqlite has this only as a private entry (`Connection._execute`, 0.22). Where that is gone, the
        function runs on SQLAlchemy's synchronous face of the same connection: public, and a hop per statement.
        """
        if self._execute is None or self._inner is None:
            return await self.run_by_statement(function, *args)
        result: T = await self._execute(function, self._inner, *args)
        return result

    async def run_by_statement(self, function: Callable[..., T], *args: Any) -> T:
        """The public way for `run`."""
        return await self.connection.run_sync(lambda sync: function(sync.connection.dbapi_connection, *args))


def translate(error: BaseException, path: Path) -> AelError:
    """Return the error that a failure of SQLite means, with what to do next."""
    original: Any = getattr(error, "orig", None) or error
    code = getattr(original, "sqlite_errorcode", None)
    primary = None if code is None else code & 0xFF
    name = getattr(original, "sqlite_errorname", type(original).__name__)
    text = str(original)
    if primary == sqlite3.SQLITE_FULL or "disk is full" in text:
        return DiskFull(f"{path}: the disk is full ({name}): free some space; nothing is lost")
    if primary == sqlite3.SQLITE_IOERR:
        return StorageFailed(f"{path}: the disk reports an error ({name}): check it, then start again to re-read")
    if primary == sqlite3.SQLITE_NOTADB:
        return NotADatabase(f"{path} is not a SQLite database; name another file with --db or AEL_DB")
    if primary == sqlite3.SQLITE_CORRUPT:
        return DatabaseDamaged(
            f"{path} is damaged ({text}); nothing was changed. Copy the file, then restore a backup of it"
        )
    if primary in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return OwnedElsewhere(
            f"{path} is locked by another program for more than {BUSY_TIMEOUT_MS // 1000} s; "
            "end that program's transaction"
        )
    if primary in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM):
        if path.is_dir():
            return DatabaseNotUsable(f"{path} is a folder; name a file with --db or AEL_DB")
        if not path.exists():
            return DatabaseNotUsable(f"{path} does not exist; `ael run` creates it, --db or AEL_DB names another")
        return DatabaseNotUsable(f"{path} can't be opened for this ({text}): check its permissions and its folder's")
    return StorageFailed(f"{path}: {name}: {text}")

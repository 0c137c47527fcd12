"""What is SQLite's own: addresses, connections and their pragmas, errors, the one hop into the driver's thread.

Two kinds of connection, never mixed: one read-write connection per database, owned by the loop's task, and
read-only ones for everybody else. Nothing in this process opens the file in another way, because closing any
descriptor of it would drop SQLite's locks.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

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
from ael_store.store.advice import advice, was_ours
from ael_store.store.place import lack_of_room, real_path

if TYPE_CHECKING:  # the dashboard reads without SQLAlchemy, which would double its memory
    from sqlalchemy import Engine
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

__all__ = ["DURABILITY", "Driver", "connect_to_read", "database_path", "read_engine", "translate", "write_engine"]

T = TypeVar("T")

DURABILITY = {"full": "FULL", "normal": "NORMAL"}
"""How `durability` is spelt as `PRAGMA synchronous`."""

BUSY_TIMEOUT_MS = 10_000
CACHE_KIB = 16_384
WAL_LIMIT_BYTES = 67_108_864
CHECKPOINT_PAGES = 2000
"""How long the log grows before the store moves it into the database: 4 MB, as SQLite has it by default."""


def database_path(address: str | os.PathLike[str]) -> Path:
    """Return the path of the file that is meant by a path or a URL (`sqlite:///ael.db`), links followed.

    Raises UsageError for what names no file, DatabaseNotUsable for a link that belongs to somebody else.
    """
    text = os.fspath(address)
    if "://" in text:
        from sqlalchemy.engine import make_url
        from sqlalchemy.exc import ArgumentError

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
    return real_path(Path(text).expanduser().absolute())


def write_engine(path: Path, durability: str) -> AsyncEngine:
    """Return the engine whose single connection writes."""
    from sqlalchemy import event
    from sqlalchemy.engine import URL
    from sqlalchemy.ext.asyncio import create_async_engine
    from sqlalchemy.pool import NullPool

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
            f"wal_autocheckpoint = {4 * CHECKPOINT_PAGES}",  # should the store's own come too late
        ):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @event.listens_for(engine.sync_engine, "begin")
    def begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine


def read_engine(path: Path) -> Engine:
    """Return an engine that can't write; it works beside a running loop and in a folder that can't be written."""
    from sqlalchemy import create_engine, event
    from sqlalchemy.pool import QueuePool

    engine = create_engine(
        "sqlite+pysqlite://",
        creator=lambda: connect_to_read(path, check_same_thread=False, isolation_level=""),
        poolclass=QueuePool,
        pool_size=2,
        max_overflow=8,
    )
    _readers.add(engine)

    @event.listens_for(engine, "connect")
    def connect(connection: Any, _record: object) -> None:
        cursor = connection.cursor()
        cursor.execute("PRAGMA query_only = ON")
        cursor.execute("PRAGMA trusted_schema = OFF")
        cursor.execute("PRAGMA cell_size_check = ON")
        cursor.close()

    return engine


def connect_to_read(path: Path, **options: Any) -> sqlite3.Connection:
    """Return a connection that can't write, also where the folder can't be written.

    Where somebody was killed outside WAL mode, in the middle of a change of the file (a restore, the first start
    with a copy), what he had written is rolled back first, which a connection that only reads may not do.
    """
    uri = path.absolute().as_uri()
    options = {"uri": True, "isolation_level": None, "timeout": BUSY_TIMEOUT_MS / 1000, **options}
    journal = path.with_name(path.name + "-journal")
    if os.access(path.parent, os.W_OK):
        connection: sqlite3.Connection = sqlite3.connect(f"{uri}?mode=ro", **options)
        if not (journal.exists() and _waits_for_rollback(connection)):
            return connection
        connection.close()
        with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(f"{uri}?mode=rw", **options)) as it:
            it.execute("SELECT 1 FROM sqlite_schema LIMIT 1")
        connection = sqlite3.connect(f"{uri}?mode=ro", **options)
        return connection
    # SQLite could not make the shared memory of a log; where there is no log to read, it needs none
    has_log = journal.exists() or path.with_name(path.name + "-wal").exists()
    connection = sqlite3.connect(f"{uri}?mode=ro" + ("" if has_log else "&immutable=1"), **options)
    return connection


def _waits_for_rollback(connection: sqlite3.Connection) -> bool:
    try:
        connection.execute("SELECT 1 FROM sqlite_schema LIMIT 1")
    except sqlite3.Error as error:
        return error.sqlite_errorcode == sqlite3.SQLITE_READONLY_ROLLBACK
    return False


_readers: weakref.WeakSet[Engine] = weakref.WeakSet()


def _leave_readers_to_parent() -> None:
    """In a child made by `fork`: forget inherited connections, which only the parent may use."""
    for engine in list(_readers):
        engine.dispose(close=False)


os.register_at_fork(after_in_child=_leave_readers_to_parent)


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
    """Return the error that a failure of SQLite means, with what to do next.

    DiskFull says that the same commit may be tried again, anything else that happened to the disk says that it
    must not. What makes the difference is where the commit failed:

    - A *write* that failed leaves a transaction without a whole commit record: that is the last thing written,
      and its checksum covers all before it. SQLite has rolled back, and no reader and no later start can ever see
      any of it. So the transaction is known not to have happened; only the reason has to go away. A full disk,
      a quota and a limit of the process go away, so these are told apart from a disk that fails.
    - After a failed *fsync*, and after any failure of COMMIT at an unknown place, every frame may be in the file,
      commit record and all: this process sees the transaction rolled back, and after a crash the next one sees it
      committed. The system may also have dropped the pages that it could not write and say that all is well when
      asked again. Neither repeating the commit nor going on from memory is right then; only reading the file
      again, in a new process, tells.
    """
    original: Any = getattr(error, "orig", None) or error
    if isinstance(original, UnicodeDecodeError):  # a name in the schema, which Python meets in SQLite's message
        return DatabaseDamaged(f"{path} is damaged (a text in it is no UTF-8); nothing was changed. {advice(path)}")
    code = getattr(original, "sqlite_errorcode", None)
    primary = None if code is None else code & 0xFF
    name = getattr(original, "sqlite_errorname", type(original).__name__)
    text = str(original)
    if primary == sqlite3.SQLITE_FULL or "disk is full" in text:
        return DiskFull(f"{path}: the disk is full ({name}): free some space; nothing is lost")
    if code == sqlite3.SQLITE_IOERR_WRITE and (reason := lack_of_room(path)) is not None:
        return DiskFull(f"{path}: {reason} ({name}): make room; nothing is lost")
    if primary == sqlite3.SQLITE_IOERR:
        return StorageFailed(
            f"{path}: the disk reports an error ({name}): check the disk (`dmesg`, its SMART values), then start "
            "again, which goes on from what is really there"
        )
    if primary == sqlite3.SQLITE_NOTADB:
        return NotADatabase(
            f"{path} is not a SQLite database; name another file with --db or AEL_DB"
            + (f". If it was one: {advice(path)}" if was_ours(path) else "")
        )
    if primary == sqlite3.SQLITE_CORRUPT:
        return DatabaseDamaged(f"{path} is damaged ({text}); nothing was changed. {advice(path)}")
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
        if path.with_name(path.name + "-wal").exists() and not os.access(path.parent, os.W_OK):
            return DatabaseNotUsable(
                f"{path} has a log ({path.name}-wal), which can't be read in a folder that can't be written: copy both "
                "into another folder and read them there"
            )
        return DatabaseNotUsable(f"{path} can't be opened for this ({text}): check its permissions and its folder's")
    return StorageFailed(f"{path}: {name}: {text}")

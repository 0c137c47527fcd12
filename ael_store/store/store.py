"""The store: one database, opened for writing by its owner.

store = Store("ael.db")
resumed = await store.open("ael run")      # lock, create or upgrade, load
await store.commit(commit)                 # one value, one transaction; durable when it returns
await store.close()                        # checkpoint, release
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from ael_store.errors import DatabaseNotUsable, SchemaTooOld, UsageError
from ael_store.model.records import Commit, Resumed
from ael_store.store.lock import DatabaseLock
from ael_store.store.reader import Reader
from ael_store.store.revision import alembic_config, known_revisions, refuse_newer
from ael_store.store.sqlite import Driver, database_path, translate, write_engine
from ael_store.store.upgrade import HEAD, UpgradeReport, create_database, current_revision, upgrade
from ael_store.store.writer import Writer

__all__ = ["Store"]

OLDEST_SQLITE = (3, 37)
"""STRICT tables are in SQLite since this version."""

LOCK_WAIT_S = 5.0
"""How long an owner waits for a command that holds the lock for a moment."""


class Store:
    """One database: its lock, its single writing connection, and a reader.

    `address` is a path, a URL (`sqlite:///ael.db`), or `:memory:` for a private temporary file that goes
    with this object. Nothing is opened or created before `open`.
    """

    def __init__(self, address: str | os.PathLike[str] = "ael.db", *, durability: str = "full") -> None:
        self.durability = durability
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        if os.fspath(address) == ":memory:":
            self._folder = tempfile.TemporaryDirectory(prefix="ael-")
            self.path = Path(self._folder.name) / "ael.db"
        else:
            self.path = database_path(address)
        self.lock = DatabaseLock(self.path)
        self.is_new = False
        self.upgraded: UpgradeReport | None = None
        self._writer = Writer()
        self._engine: AsyncEngine | None = None
        self._connection: AsyncConnection | None = None
        self._driver: Driver | None = None
        self._reader: Reader | None = None

    @property
    def is_open(self) -> bool:
        """True from `open` to `close`."""
        return self._driver is not None

    @property
    def is_temporary(self) -> bool:
        """True where the database is a private file that goes with this object."""
        return self._folder is not None

    @property
    def reader(self) -> Reader:
        """Read-only questions; usable while the store is open."""
        if self._reader is None:
            self._reader = Reader(self.path)
        return self._reader

    async def open(
        self,
        what: str,
        *,
        upgrade_schema: bool = True,
        backup: bool = True,
        create: bool = True,
        keys: Iterable[str] | None = None,
        progress: Callable[[str], None] | None = None,
    ) -> Resumed:
        """Take the lock, create the database or bring its schema up to date, and return what it holds.

        `what` tells others who holds the lock. Raises OwnedElsewhere, NotADatabase, DatabaseDamaged,
        DatabaseNotUsable, SchemaTooNew or SchemaTooOld; the database is as it was then, and nothing is held.
        """
        await asyncio.to_thread(self._prepare, what, upgrade_schema, backup, create, progress)
        try:
            self._engine = write_engine(self.path, self.durability)
            self._connection = await self._engine.connect()
            self._driver = await Driver.of(self._connection)
            resumed = await asyncio.to_thread(self.reader.resume, keys)
            self._writer.last_ids = await asyncio.to_thread(self.reader.last_ids, list(self._writer.last_ids))
        except (DBAPIError, sqlite3.Error) as error:
            await self.close()
            raise translate(error, self.path) from error
        except BaseException:
            await self.close()
            raise
        return resumed

    def _prepare(
        self,
        what: str,
        upgrade_schema: bool,
        backup: bool,
        create: bool,
        progress: Callable[[str], None] | None,
    ) -> None:
        if sqlite3.sqlite_version_info < OLDEST_SQLITE:
            raise UsageError(
                f"this Python has SQLite {sqlite3.sqlite_version}, ael_store needs 3.37: use a newer Python build"
            )
        if not create and not self.path.exists():
            raise DatabaseNotUsable(f"{self.path} does not exist; `ael run` creates it, --db or AEL_DB names another")
        if not self.path.parent.is_dir():
            raise DatabaseNotUsable(
                f"{self.path.parent} is no folder; create it, or name another file with --db or AEL_DB"
            )
        if self.path.is_dir():
            raise DatabaseNotUsable(f"{self.path} is a folder; name a file with --db or AEL_DB")
        self.lock.acquire(what, LOCK_WAIT_S)
        try:
            self.is_new = not self.path.exists()
            if self.is_new:
                create_database(self.path)
            revision = current_revision(self.path)
            if revision != HEAD:
                if not upgrade_schema and revision is not None:
                    refuse_newer(self.path, revision, known_revisions(alembic_config()))
                    raise SchemaTooOld(
                        f"{self.path} is at schema revision {revision}, this version needs {HEAD}: run `ael db upgrade`"
                    )
                self.upgraded = upgrade(self.path, backup=backup, progress=progress)
        except BaseException:
            self.lock.release()
            raise

    async def commit(self, commit: Commit, *, take_from: int | None = None, holder: str = "") -> None:
        """Write everything of a commit in one transaction; it is durable when this returns.

        With `take_from` the fencing token moves from that value to the commit's. Raises OwnershipLost where
        another owner took over, StorageFailed where the disk is full or fails: nothing was written then, except
        that after a failed COMMIT only a restart can tell. Called by the owner's one task; never cancelled.
        """
        assert self._driver is not None, "the store is not open"
        try:
            await self._driver.run(self._writer.write, commit, take_from, holder)
        except (DBAPIError, sqlite3.Error) as error:
            raise translate(error, self.path) from error

    async def checkpoint(self) -> None:
        """Move the write-ahead log into the database and truncate it, as far as readers allow."""
        assert self._driver is not None
        await self._driver.run(_checkpoint)

    async def close(self) -> None:
        """Checkpoint, close every connection and release the lock. May be called twice."""
        driver, self._driver = self._driver, None
        if driver is not None:
            with contextlib.suppress(DBAPIError, sqlite3.Error):  # else the next owner's first checkpoint does it
                await driver.run(_checkpoint)
        if self._reader is not None:
            self._reader.close()
            self._reader = None
        if self._connection is not None:
            await self._connection.close()
            self._connection = None
        if self._engine is not None:
            await self._engine.dispose()
            self._engine = None
        self.lock.release()


def _checkpoint(connection: Any) -> None:
    cursor = connection.cursor()
    try:
        cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        cursor.fetchall()
    finally:
        cursor.close()

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
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from ael_store.errors import AelError, DatabaseNotUsable, DiskFull, NotAllowedHere, SchemaTooOld, UsageError
from ael_store.model.records import Commit, Resumed
from ael_store.store.catch_up import count_recent
from ael_store.store.checkpoint import Checkpointer, empty_log
from ael_store.store.foreign_code import refuse_foreign_code
from ael_store.store.lock import DatabaseLock, Holder
from ael_store.store.place import check_place, readable_by_others, refuse_hard_links
from ael_store.store.reader import Reader
from ael_store.store.revision import alembic_config, known_revisions, refuse_newer
from ael_store.store.sqlite import Driver, database_path, translate, write_engine
from ael_store.store.sqlite_build import OLDEST_SQLITE
from ael_store.store.takeover import fence
from ael_store.store.upgrade import HEAD, UpgradeReport, create_database, current_revision, upgrade
from ael_store.store.whole_file import sweep
from ael_store.store.writer import Writer

if TYPE_CHECKING:
    from ael_store.store.past_state import PastState

__all__ = ["Store"]

LOCK_WAIT_S = 5.0
"""How long an owner waits for a command that holds the lock for a moment."""


class Store:
    """One database: its lock, its single writing connection, and a reader.

    `address` is a path, a URL (`sqlite:///ael.db`), or `:memory:` for a private temporary file that goes
    with this object. Nothing is opened or created before `open`. `allow_shared_folder` accepts a folder that
    everybody may write.

    A child made by `fork` can't use it: it makes a store of its own.
    """

    def __init__(
        self,
        address: str | os.PathLike[str] = "ael.db",
        *,
        durability: str = "full",
        allow_shared_folder: bool = False,
    ) -> None:
        self.durability = durability
        self.allow_shared_folder = allow_shared_folder
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        if os.fspath(address) == ":memory:":
            self._folder = tempfile.TemporaryDirectory(prefix="ael-")
            self.path = Path(self._folder.name) / "ael.db"
        else:
            self.path = database_path(address)
        self.lock = DatabaseLock(self.path)
        self.is_new = False
        self.is_taken_over = False
        """True where the lock was taken from an owner that did not answer."""
        self.upgraded: UpgradeReport | None = None
        self.warnings: list[str] = []
        """What `open` found odd about the place of the database, as sentences for the log."""
        self._failed = False
        self._inherited = False
        self._writer = Writer()
        self._engine: AsyncEngine | None = None
        self._connection: AsyncConnection | None = None
        self._driver: Driver | None = None
        self._checkpointer: Checkpointer | None = None
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

    def at(self, moment: int | str | datetime) -> PastState:
        """Return the state after an iteration, or as it was at a time (aware, or ISO text); close it when done.

        Works whether or not the store is open. Raises HistoryGone where retention has removed that moment, UsageError
        where it has not been yet, DatabaseNotUsable where there is no database.
        """
        if not self.path.exists():
            raise DatabaseNotUsable(f"{self.path} does not exist; `ael run` creates it")
        from ael_store.store.past_state import PastState

        return PastState(self.path, moment)

    async def open(
        self,
        what: str,
        *,
        upgrade_schema: bool = True,
        backup: bool = True,
        create: bool = True,
        keys: Iterable[str] | None = None,
        tasks: bool = True,
        metrics: bool = True,
        progress: Callable[[str], None] | None = None,
        take_over: Callable[[Holder], None] | None = None,
    ) -> Resumed:
        """Take the lock, create the database or bring its schema up to date, and return what it holds.

        `what` tells others who holds the lock. Raises OwnedElsewhere, NotADatabase, DatabaseDamaged,
        DatabaseNotUsable, SchemaTooNew or SchemaTooOld; the database is as it was then, and nothing is held. The
        same goes for a cancellation, which waits for an upgrade that has begun.

        With `take_over` an owner that hangs is no hindrance: it is asked what speaks against it (`take_over(holder)`
        raises that), and then can't commit any more.
        """
        given_up = threading.Event()
        preparing = asyncio.ensure_future(
            asyncio.to_thread(self._prepare, what, upgrade_schema, backup, create, progress, take_over, given_up)
        )
        try:
            await asyncio.shield(preparing)
        except asyncio.CancelledError:
            given_up.set()
            await _until_done(preparing)
            if not preparing.cancelled() and preparing.exception() is None:
                self.lock.release()
            raise
        self._failed = self._inherited = False
        _open.add(self)
        try:
            self._engine = write_engine(self.path, self.durability)
            self._connection = await self._engine.connect()
            self._driver = await Driver.of(self._connection)
            self._checkpointer = Checkpointer(self.path, self._driver, self.lock.is_ours, self._writer.catch_up)
            self._checkpointer.recent_rows = await self._driver.run(count_recent)
            resumed = await asyncio.to_thread(lambda: self.reader.resume(keys, tasks=tasks, metrics=metrics))
            if resumed.last_run is not None and resumed.last_run.status == "running":  # it did not end cleanly
                from ael_store.store.verify import verify_newest  # large, and seldom needed

                await asyncio.to_thread(verify_newest, self.path)
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
        take_over: Callable[[Holder], None] | None,
        given_up: threading.Event,
    ) -> None:
        if sqlite3.sqlite_version_info < OLDEST_SQLITE:
            raise UsageError(
                f"this Python has SQLite {sqlite3.sqlite_version}, ael_store needs 3.37: use a newer Python build"
            )
        if not create and not self.path.exists():
            raise DatabaseNotUsable(f"{self.path} does not exist; `ael run` creates it, --db or AEL_DB names another")
        if not self.is_temporary:
            check_place(self.path, allow_shared_folder=self.allow_shared_folder)
        if self.path.exists():
            current_revision(self.path)  # before a lock file is made beside something else
        self.warnings = []
        self._lock(what, take_over, given_up)
        try:
            self.is_new = not self.path.exists()
            if self.is_new:
                create_database(self.path)
            else:
                if self.path.stat().st_nlink > 1:
                    sweep(self.path, "new")  # who was killed while creating it has left a second name
                refuse_hard_links(self.path)
            self._warn_of_readers()
            revision = current_revision(self.path)
            if not self.is_new:
                refuse_foreign_code(self.path, revision)
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

    def _lock(self, what: str, take_over: Callable[[Holder], None] | None, given_up: threading.Event) -> None:
        if take_over is None:
            self.lock.acquire(what, LOCK_WAIT_S, given_up=given_up)
            return

        def fence_off(holder: Holder) -> None:
            take_over(holder)
            fence(self.path, holder)

        before = self.lock.take_over(what, LOCK_WAIT_S, fence_off, given_up=given_up)
        if before is not None:
            self.is_taken_over = True
            unknown = "" if before.is_here else "; whether it still runs can't be told from this host"
            self.warnings.append(f"taken over from {before}, which can commit nothing more{unknown}")

    def _warn_of_readers(self) -> None:
        if files := readable_by_others(self.path):
            names = " ".join(str(file) for file in files)
            self.warnings.append(f"everybody on this machine may read {names}: `chmod o= {names}` keeps it private")

    async def commit(self, commit: Commit, *, take_from: int | None = None, holder: str = "") -> None:
        """Write everything of a commit in one transaction; it is durable when this returns.

        With `take_from` the fencing token moves from that value to the commit's. Raises OwnershipLost where
        another owner took over, StorageFailed where the disk is full or fails: nothing was written then, except
        that after a failed COMMIT only a restart can tell. Called by the owner's one task; never cancelled.
        """
        if self._inherited:
            raise NotAllowedHere(
                f"{self.path} was opened by the parent of this process, which alone may write it: a child made by "
                "fork opens a store of its own (or uses `connect`)"
            )
        assert self._driver is not None and self._checkpointer is not None, "the store is not open"
        if self._checkpointer.failure is not None:
            self._failed = True
            raise self._checkpointer.failure
        try:
            await self._driver.run(self._writer.write, commit, take_from, holder)
        except (DBAPIError, sqlite3.Error) as error:
            failure = translate(error, self.path)
            self._failed = not isinstance(failure, DiskFull)
            raise failure from error
        except AelError:
            self._failed = True
            raise
        if commit.redactions:  # what was blanked leaves the log too; where that fails, with the next checkpoint
            with contextlib.suppress(DBAPIError, sqlite3.Error):
                await self._driver.run(empty_log)
        self._checkpointer.committed(commit.rows, commit.recent_rows)

    async def close(self) -> None:
        """Checkpoint, close every connection and release the lock. May be called twice.

        After a commit that failed for another reason than lack of room the file is left as it is: what a failing
        disk holds is for the next start to read, and a database that was taken over is not ours to tidy up.
        """
        driver, self._driver = self._driver, None
        checkpointer, self._checkpointer = self._checkpointer, None
        _open.discard(self)
        try:
            if checkpointer is not None:
                await checkpointer.stop()
                self._failed = self._failed or checkpointer.failure is not None
            if driver is not None and not self._failed:
                with contextlib.suppress(DBAPIError, sqlite3.Error):  # else the next owner's first checkpoint does it
                    await driver.run(empty_log)
            if not self._failed:
                self._close_reader()  # first, so that the writer is the last one, which removes the log
                await self._close_writer()
            else:
                with contextlib.suppress(DBAPIError, sqlite3.Error), self._attached():
                    await self._close_writer()
        finally:
            self._close_reader()
            self.lock.release()

    def _close_reader(self) -> None:
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.close()

    async def _close_writer(self) -> None:
        connection, self._connection = self._connection, None
        engine, self._engine = self._engine, None
        try:
            if connection is not None:
                await connection.close()
        finally:
            if engine is not None:
                await engine.dispose()

    @contextlib.contextmanager
    def _attached(self) -> Iterator[None]:
        """After a failure, keep a reader on the file: SQLite checkpoints when the last connection closes."""
        with contextlib.ExitStack() as stack:
            if self._failed and self._connection is not None:
                with contextlib.suppress(AelError, DBAPIError, sqlite3.Error):
                    stack.enter_context(self.reader.connect()).exec_driver_sql("SELECT 1 FROM sqlite_schema LIMIT 1")
            yield

    def _leave_to_parent(self) -> None:
        """In a child made by `fork`: forget the connection without closing it, which would act on the file."""
        _parents.append((self._driver, self._connection, self._engine, self._reader))
        self._driver = self._connection = self._engine = self._reader = self._checkpointer = None
        self._inherited = True


_open: weakref.WeakSet[Store] = weakref.WeakSet()
_parents: list[object] = []
"""What children inherited: kept, because it would close itself when nobody refers to it any more."""


def _leave_to_parent() -> None:
    for store in list(_open):
        store._leave_to_parent()
    _open.clear()


os.register_at_fork(after_in_child=_leave_to_parent)


async def _until_done(task: asyncio.Future[Any]) -> None:
    """Wait for a thread that can't be interrupted, however often this task is cancelled meanwhile."""
    while not task.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait({task})

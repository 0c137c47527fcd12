"""What is put off until a commit has been answered: moving the write-ahead log, and catching up with indexes.

SQLite would move the log into the database at the end of the COMMIT that fills it, so that every so often an
iteration waited for two more syncs. Here it is a job of its own in the driver's thread, between commits, beside the
agents' next hooks; so is putting recent history into its indexes (`catch_up.py`).

A reader that keeps a transaction open keeps the log from being used again, so it grows. The loop says so, tries
again until the reader is gone, and then gives the disk space back.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sqlalchemy.exc import DBAPIError

from ael_store.errors import AelError, DiskFull
from ael_store.store.catch_up import RECENT_ROWS
from ael_store.store.sqlite import CHECKPOINT_PAGES, Driver, translate

__all__ = ["Checkpointer", "empty_log"]

SHRINK_BYTES = 33_554_432
"""A log that has grown beyond this is cut back to nothing."""
WARN_BYTES = 16_777_216
"""From this size on, a reader that holds the log is named as the reason."""
RETRY_S = 5.0
"""How soon a log that a reader holds is tried again."""
WARN_AGAIN_S = 300.0

log = logging.getLogger("ael_store.store")


def empty_log(connection: Any) -> None:
    """Move all of the log into the database and cut it to nothing, as far as readers allow."""
    _checkpoint(connection, "TRUNCATE")


def _checkpoint(connection: Any, mode: str) -> tuple[int, int]:
    """Return how many pages the log has, and how many of them are in the database."""
    cursor = connection.cursor()
    try:
        cursor.execute(f"PRAGMA wal_checkpoint({mode})")
        _busy, pages, moved = cursor.fetchone()
        return pages, moved
    finally:
        cursor.close()


def _move(connection: Any) -> tuple[int, int, int]:
    """Move what no reader needs, without waiting for one; return pages, moved pages, and bytes of a page."""
    pages, moved = _checkpoint(connection, "PASSIVE")
    cursor = connection.cursor()
    try:
        size = cursor.execute("PRAGMA page_size").fetchone()[0]
        if moved == pages and pages * size > SHRINK_BYTES:
            (patience,) = cursor.execute("PRAGMA busy_timeout").fetchone()
            cursor.execute("PRAGMA busy_timeout = 0")
            try:
                _checkpoint(connection, "TRUNCATE")
            finally:
                cursor.execute(f"PRAGMA busy_timeout = {patience}")
    finally:
        cursor.close()
    return pages, moved, size


class Checkpointer:
    """Decides when the log is moved and when indexes catch up, and does it.

    Belongs to the store's event loop; `stop` it in the end.
    """

    def __init__(
        self, path: Path, driver: Driver, is_owner: Callable[[], bool], catch_up: Callable[[Any], None]
    ) -> None:
        self.path = path
        self.recent_rows = 0
        """Rows of history that no index has yet."""
        self.failure: AelError | None = None
        """Why the last attempt failed, where that is no lack of room: the disk is not to be trusted."""
        self._driver = driver
        self._is_owner = is_owner
        self._catch_up = catch_up
        self._rows = 0
        self._pages_per_row = 1.0
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._held_since: float | None = None
        self._warn_at = 0.0

    def committed(self, rows: int, recent_rows: int = 0) -> None:
        """So many rows were written, and so many of them are in no index; begins what is due."""
        self._rows += rows
        self.recent_rows += recent_rows
        if self.recent_rows >= RECENT_ROWS or self._is_long:
            self._begin()

    @property
    def _is_long(self) -> bool:
        """True where the log has grown enough to be moved."""
        return self._rows * self._pages_per_row >= CHECKPOINT_PAGES

    def _begin(self, *, retry: bool = False) -> None:
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run(retry=retry), name="ael-checkpoint")

    async def _run(self, *, retry: bool = False) -> None:
        try:
            if not self._is_owner():
                return
            if self.recent_rows >= RECENT_ROWS:
                rows, self.recent_rows = self.recent_rows, 0
                await self._driver.run(self._catch_up)
                self._rows += rows
            if not (retry or self._is_long):
                return
            rows, self._rows = self._rows, 0
            pages, moved, size = await self._driver.run(_move)
        except (DBAPIError, sqlite3.Error) as error:
            failure = translate(error, self.path)
            if isinstance(failure, DiskFull):
                self._again()
            else:
                self.failure = failure
        else:
            if moved == pages:
                if rows:
                    self._pages_per_row = max(0.05, min(50.0, pages / rows))
                self._free(pages * size)
            else:
                self._hold(pages * size)
        finally:
            self._task = None

    def _free(self, size: int) -> None:
        if self._held_since is not None and self._warn_at:
            log.info("%s: the log is free again and was emptied (%.0f MB)", self.path, size / 1e6)
        self._held_since, self._warn_at = None, 0.0

    def _hold(self, size: int) -> None:
        """A reader needs a part of the log: say so once it is large, and try again soon."""
        now = time.monotonic()
        if self._held_since is None:
            self._held_since = now
        if size > WARN_BYTES and now >= self._warn_at:
            self._warn_at = now + WARN_AGAIN_S
            log.warning(
                "%s: a reader has kept its transaction open for %.0f s or more, so the log has grown to %.0f MB; "
                "`fuser %s` names the processes, end the one that reads",
                self.path,
                now - self._held_since,
                size / 1e6,
                self.path,
            )
        self._again()

    def _again(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(RETRY_S, self._retry)

    def _retry(self) -> None:
        self._timer = None
        self._begin(retry=True)

    async def stop(self) -> None:
        """End; what has begun is waited for."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._task is not None:
            await asyncio.wait({self._task})

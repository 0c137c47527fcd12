"""The tail: one look at the database for everybody who follows it, and none while nobody does.

`PRAGMA data_version` changes with every commit of the loop and costs microseconds. When it has changed, the newest
numbers are read once, and everybody who waits is woken; what each then sends is a matter of his own cursor. So
nothing is queued for anybody, and a slow client is waited for by its own stream alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterator

from ael_store.errors import AelError
from ael_store.store.plain_reader import PlainReader, Position
from ael_store.web.database import Database

__all__ = ["Tail"]

POLL_S = 0.25

log = logging.getLogger("ael_store.web")


class Tail:
    """Follows the commits of a database for the streams of one server."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.position: Position | None = None
        self.is_stopping = False
        self._version: tuple[int, int, int] | None = None
        self._listeners = 0
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def following(self) -> Iterator[None]:
        """Follow the database for the length of a `with` block."""
        self._listeners += 1
        if self._task is None or self._task.done():
            self.position = self._version = None  # what it knew may be old
            self._task = asyncio.create_task(self._follow())
        try:
            yield
        finally:
            self._listeners -= 1

    async def newest(self) -> Position:
        """Return the newest numbers, read now."""
        return await self.database.read(PlainReader.position)

    async def after(self, position: Position | None) -> Position | None:
        """Wait until the numbers are others than these, and return them; None where the server stops."""
        while not self.is_stopping:
            if self.position is not None and self.position != position:
                return self.position
            await self._changed.wait()
        return None

    def stop(self) -> None:
        """End every stream."""
        self.is_stopping = True
        self._wake()

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def _follow(self) -> None:
        version: tuple[int, int, int] | None
        position: Position | None
        failed = ""
        while self._listeners and not self.is_stopping:
            try:
                version, position = await self.database.watch(self._look)
                failed = ""
            except AelError as error:
                if str(error) != failed:  # the file may be on its way back: a restore, an upgrade
                    failed = str(error)
                    log.warning("the database can't be followed: %s", error)
                version, position = None, self.position
            self._version = version
            if position != self.position:
                self.position = position
                self._wake()
            await asyncio.sleep(POLL_S)

    def _look(self, reader: PlainReader) -> tuple[tuple[int, int, int], Position]:
        version = reader.data_version()
        if version == self._version and self.position is not None:
            return version, self.position
        return version, reader.position()

"""The database as the server asks it: in a few threads, so that nothing waits for a question.

What needs the whole store (past moments, and changes where no loop runs) goes to a second process, `aside.py`.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from ael_store.errors import AelError, LoopNotRunning
from ael_store.model.values import Limits
from ael_store.runtime.control import PROGRESS, ask, longest_line
from ael_store.runtime.vitals import vitals
from ael_store.store.lock import LOOP, current_holder
from ael_store.store.plain_reader import PlainReader
from ael_store.web.aside import Aside

__all__ = ["Database"]

T = TypeVar("T")

THREADS = 2
PATIENCE_S = 2.0


class Database:
    """One database; its methods are for the server's event loop."""

    def __init__(self, path: Path, limits: Limits, *, allow_shared_folder: bool = False) -> None:
        self.path = path
        self.limits = limits
        self._threads = ThreadPoolExecutor(THREADS, "ael-web")
        self._changing = ThreadPoolExecutor(THREADS, "ael-web-change")
        self._local = threading.local()
        self._watching = PlainReader(path)
        self._readers = [self._watching]
        self._aside = Aside(path, limits, allow_shared_folder=allow_shared_folder)

    async def read(self, question: Callable[[PlainReader], T]) -> T:
        """Answer a question about the present."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, lambda: question(self._reader()))

    async def watch(self, question: Callable[[PlainReader], T]) -> T:
        """Answer a question of the tail, on its own connection: `data_version` means something only on the same one."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, question, self._watching)

    async def vitals(self) -> dict[str, Any]:
        """Return how the process of the loop is."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, vitals, self.path)

    async def past(self, question: str, **arguments: Any) -> Any:
        """Answer a question about a past moment; `aside.QUESTIONS` says which there are."""
        return await self._aside.ask(question, arguments)

    async def progress(self) -> dict[str, Any]:
        """Return how far running tasks are; nothing where no loop says so."""
        holder = current_holder(self.path)
        if holder is None or holder.what != LOOP or holder.socket is None:
            return {}
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._progress, holder.socket)

    async def change(self, command: str, arguments: dict[str, Any]) -> Any:
        """Carry out a command, through the running loop or under the lock; durable on return."""
        holder = current_holder(self.path)
        if holder is not None and holder.socket is not None:
            try:
                return await asyncio.get_running_loop().run_in_executor(
                    self._changing,
                    lambda: ask(str(holder.socket), command, arguments, longest=longest_line(self.limits)),
                )
            except LoopNotRunning:
                if current_holder(self.path) == holder:
                    raise
        return await self._aside.ask("change", {"command": command, "arguments": arguments})

    async def close(self) -> None:
        """Close every connection and end the process aside."""
        await self._aside.close()
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._changing.shutdown(wait=False, cancel_futures=True)
        for reader in self._readers:
            reader.close()

    def _reader(self) -> PlainReader:
        found: PlainReader | None = getattr(self._local, "reader", None)
        if found is None:
            found = self._local.reader = PlainReader(self.path)
            self._readers.append(found)
        return found

    def _progress(self, socket: str) -> dict[str, Any]:
        try:
            found: dict[str, Any] = ask(socket, PROGRESS, {}, PATIENCE_S)
        except AelError:
            return {}
        return found

"""Databases of real loops for the tests of backup, restore and recovery."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path
from typing import Any

from tests.loops import agent, controller_on, rows

__all__ = ["PAGE", "checksums", "fill", "public", "quiet", "set_page"]

PAGE = 2048


def quiet(_line: str) -> None:
    pass


def fill(path: Path, iterations: int = 40) -> Path:
    """Let a loop work on a database: keys of two agents, long events, a subscriber."""

    def write(context: Any) -> None:
        for number in range(3):
            context.set(f"key/{context.iteration % 20}/{number}", "x" * (10 * context.iteration))
        context.own.set("last", context.iteration)
        context.emit("wrote", {"iteration": context.iteration, "text": "y" * (context.iteration % 3 * 2000)})

    def read(event: Any, context: Any) -> None:
        context.set("read", event.data["iteration"])

    writer = agent("writer", tick=write)
    reader = agent("reader", event=read, subscriptions=["wrote"])
    asyncio.run(controller_on(path, writer, reader, tick_rate=0).run(iterations))
    return path


def public(path: Path) -> dict[str, list[Any]]:
    """Return what the views say of a database, without what a recovery has to write anew."""
    return {
        view: rows(path, f"SELECT * FROM {view} ORDER BY 1")
        for view in ("v_state", "v_state_history", "v_events", "v_ticks", "v_iterations", "v_runs")
    }


def checksums(folder: Path) -> dict[str, str]:
    """Return a digest of each file of a folder."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir() if file.is_file()}


def set_page(path: Path, number: int, content: bytes) -> None:
    """Overwrite a page, the first of which has number 1."""
    with path.open("r+b") as file:
        file.seek((number - 1) * PAGE)
        file.write(content.ljust(PAGE, b"\0")[:PAGE])

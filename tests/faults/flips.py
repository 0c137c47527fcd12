"""Single bits flipped in a database: `ael db verify` reports every flip that changes what somebody can read.

A flip is *visible* where a view gives other rows, by a scan or by a look-up through an index, or can't be read any
more. Flips in free space change nothing and may go unnoticed.
"""

from __future__ import annotations

import asyncio
import random
import sqlite3
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from ael_store.errors import AelError
from ael_store.store.verify import verify
from tests.faults.agents import controller_on
from tests.faults.trial import Report, Tell

__all__ = ["Flip", "database", "flip", "run", "shown"]

ITERATIONS = 60
BATCH = 25
CLOCK_VIEWS = ("v_problems",)
"""What they show depends on the time of day; what they are made of is in the other views."""
LOOKUPS = {
    "v_state": ("key",),
    "v_state_history": ("key", "agent"),
    "v_events": ("type", "source"),
    "v_ticks": ("agent", "iteration"),
    "v_agents": ("name",),
}
"""Which columns are also looked up, so that a flip in an index shows."""

Shown = dict[str, list[tuple[Any, ...]]]


@dataclass(frozen=True)
class Flip:
    """What one flipped bit did."""

    bit: int
    visible: bool
    reported: bool
    error: str = ""
    """What went wrong in `verify` itself."""


def database(folder: Path) -> Path:
    """Make a database with a bit of everything, and return it; nothing is left in its log."""
    path = folder / "flips.db"
    asyncio.run(controller_on(path, tick_log="changed").run(ITERATIONS))
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = DELETE")  # one file, whole
    return path


def shown(path: Path) -> Shown:
    """Return everything that the views show; raises sqlite3.Error where they can't be read."""
    found: Shown = {}
    with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro&immutable=1", uri=True)) as connection:
        connection.text_factory = bytes
        views = [name.decode() for (name,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'view'")]
        for view in sorted(set(views) - set(CLOCK_VIEWS)):
            found[view] = sorted(connection.execute(f"SELECT * FROM {view}"), key=repr)
        for view, columns in LOOKUPS.items():
            for column in columns:
                for (value,) in connection.execute(f"SELECT DISTINCT {column} FROM {view} ORDER BY 1").fetchall():
                    text = value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value
                    rows = connection.execute(f"SELECT count(*), max(rowid) FROM {view} WHERE {column} = ?", (text,))
                    found[f"{view} {column}={text!r}"] = rows.fetchall()
    return found


def flip(path: Path, bit: int, before: Shown) -> Flip:
    """Flip a bit, look, and flip it back. The file must not be open by SQLite."""
    _flip(path, bit)
    try:
        try:
            visible = shown(path) != before
        except (sqlite3.Error, UnicodeError):
            visible = True
        try:
            reported = bool(verify(path).problems)
        except AelError:
            reported = True
        except Exception as error:
            return Flip(bit, visible, False, f"{type(error).__name__}: {error}")
        return Flip(bit, visible, reported)
    finally:
        _flip(path, bit)


def _flip(path: Path, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ (1 << bit % 8)]))


def _flip_batch(path: Path, bits: list[int], number: int) -> list[Flip]:
    """Work on a copy of one's own."""
    copy = path.with_name(f"copy-{number}.db")
    copy.write_bytes(path.read_bytes())
    before = shown(copy)
    flips = [flip(copy, bit, before) for bit in bits]
    copy.unlink()
    return flips


def _in_batches(bits: list[int]) -> Iterator[list[int]]:
    for start in range(0, len(bits), BATCH):
        yield bits[start : start + BATCH]


def run(*, count: int, seed: int, workers: int, tell: Tell, folder: Path) -> Report:
    """Flip `count` random bits, one at a time."""
    path = database(folder)
    assert verify(path).problems == []
    source = random.Random(seed)
    bits = [source.randrange(8 * path.stat().st_size) for _ in range(count)]
    flips: list[Flip] = []
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        waiting = [pool.submit(_flip_batch, path, batch, number) for number, batch in enumerate(_in_batches(bits))]
        for batch in waiting:
            flips += batch.result()
            tell(f"{len(flips)} of {count} bits")
    visible = [flip for flip in flips if flip.visible]
    missed = [flip for flip in visible if not flip.reported]
    failures = [f"bit {flip.bit} of {path}: visible, not reported" for flip in missed if not flip.error]
    failures += [f"bit {flip.bit} of {path}: verify failed: {flip.error}" for flip in flips if flip.error]
    quiet = sum(flip.reported for flip in flips if not flip.visible)
    return Report(
        "single bits flipped",
        len(flips),
        silent=len(missed),
        note=f"{len(visible)} visible, {len(visible) - len(missed)} of them reported, {quiet} others reported too; "
        f"{path.stat().st_size} bytes; seed {seed}",
        failures=tuple(failures),
    )

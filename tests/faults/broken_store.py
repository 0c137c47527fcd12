"""The proof that the proof works: a store that is broken on purpose must be caught.

The breakages are made in the process under test, never in the product; `points.py` kills it at the statements of a
commit and after it, and the invariants must say that something is wrong. The sound store passes the same series.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ael_store.model.records import Commit
from ael_store.store.store import Store
from ael_store.store.writer import Writer
from tests.faults.points import Case, Verdict, run_cases
from tests.faults.trial import Report, Tell

__all__ = ["BREAKAGES", "CASES", "Series", "break_store", "kill_until_caught", "run"]


def break_store(name: str) -> None:
    """Break the store of this process, before its loop is made."""
    BREAKAGES[name]()


class _Connection:
    """A connection whose cursors are something else."""

    def __init__(self, connection: Any, cursor: Callable[[Any], Any]) -> None:
        self._connection = connection
        self._of = cursor

    def cursor(self) -> Any:
        return self._of(self._connection.cursor())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)


class _Cursor:
    """A cursor that passes everything on."""

    def __init__(self, cursor: Any) -> None:
        self._cursor = cursor

    def execute(self, sql: str, *more: Any) -> Any:
        return self._cursor.execute(sql, *more)

    def executemany(self, sql: str, *more: Any) -> Any:
        return self._cursor.executemany(sql, *more)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cursor, name)


class _NoTransaction(_Cursor):
    def execute(self, sql: str, *more: Any) -> Any:
        return None if sql in ("BEGIN IMMEDIATE", "COMMIT", "ROLLBACK") else super().execute(sql, *more)


class _CommitPerStatement(_Cursor):
    def executemany(self, sql: str, *more: Any) -> Any:
        super().executemany(sql, *more)
        self.execute("COMMIT")
        return self.execute("BEGIN IMMEDIATE")


class _Forgetful(_Cursor):
    """Leaves out every fourth change of the state."""

    left_out = 0

    def executemany(self, sql: str, *more: Any) -> Any:
        if sql.startswith("UPDATE state"):
            _Forgetful.left_out += 1
            if _Forgetful.left_out % 4 == 0:
                return None
        return super().executemany(sql, *more)


def _through(cursor: Callable[[Any], Any]) -> Callable[[], None]:
    """Return what has commits written through such a cursor."""

    def patch() -> None:
        write = Writer.write

        def broken(self: Writer, connection: Any, *more: Any) -> None:
            write(self, _Connection(connection, cursor), *more)

        Writer.write = broken  # type: ignore[assignment]

    return patch


def _cursors_outside() -> None:
    """Write the cursors of subscribers in a transaction of their own, after the one with the effects."""
    write = Writer.write

    def broken(self: Writer, connection: Any, commit: Commit, *more: Any) -> None:
        first = copy(commit)
        moved = {number: record for number, record in commit.subscriptions.items() if record not in commit.patterns}
        first.subscriptions = {n: record for n, record in commit.subscriptions.items() if n not in moved}
        write(self, connection, first, *more)
        if moved:
            cursor = connection.cursor()
            cursor.execute("BEGIN IMMEDIATE")
            for number, record in moved.items():
                cursor.execute("UPDATE subscriptions SET cursor = ? WHERE id = ?", (record.cursor, number))
            cursor.execute("COMMIT")

    Writer.write = broken  # type: ignore[assignment]


def _lazily() -> None:
    """Call a commit durable at once, and write it when the next one comes."""
    commit = Store.commit
    waiting: list[tuple[Commit, dict[str, Any]]] = []

    async def broken(self: Store, value: Commit, **options: Any) -> None:
        waiting.append((value, options))
        while len(waiting) > 1 or waiting[0][0].kind != "iteration":
            first, more = waiting.pop(0)
            await commit(self, first, **more)
            if not waiting:
                break

    Store.commit = broken  # type: ignore[assignment]


BREAKAGES: dict[str, Callable[[], None]] = {
    "no transaction": _through(_NoTransaction),
    "a commit after each statement": _through(_CommitPerStatement),
    "cursors outside the transaction": _cursors_outside,
    "commits written after they were reported": _lazily,
    "writes left out now and then": _through(_Forgetful),
}


CASES = (
    ("Run.commit after", 6),
    ("INSERT iterations after", 4),
    ("UPDATE subscriptions before", 2),
    ("INSERT ticks after", 6),
    ("COMMIT before", 5),
    ("COMMIT after", 5),
    ("INSERT state_changes after", 6),
    ("Lifecycle._drain before", 1),
)
"""The points at which a broken store is killed, and at which crossing."""


@dataclass(frozen=True)
class Series:
    """Kills of a store until one was noticed."""

    breakage: str | None
    kills: int
    caught: Verdict | None
    """The first case with violations; None where there was none."""


def kill_until_caught(breakage: str | None, folder: Path, *, seed: int) -> Series:
    """Kill a store broken like this (None is the sound one) at each of CASES, until something is wrong."""
    cases = [Case("left", point, crossing, breakage) for point, crossing in CASES]
    verdicts = run_cases(cases, folder, seed=seed, workers=1, tell=lambda line: None, until_caught=True)
    caught = next((verdict for verdict in verdicts if verdict.found), None)
    return Series(breakage, sum(verdict.reached for verdict in verdicts), caught)


def run(*, count: int, seed: int, workers: int, tell: Tell, folder: Path) -> Report:
    """Break the store in each way and kill it until that is noticed; the sound one passes all."""
    failures: list[str] = []
    kills = 0

    def one(breakage: str | None) -> None:
        nonlocal kills
        place = folder / (breakage or "sound").replace(" ", "-")
        place.mkdir()
        series = kill_until_caught(breakage, place, seed=seed)
        kills += series.kills
        if series.caught is not None and breakage is None:
            failures.extend(series.caught.found)
        elif series.caught is not None:
            tell(f"{breakage}: noticed after {series.kills} kills: {series.caught.found[0]}")
        elif breakage is None:
            tell(f"the sound store passes {series.kills} kills")
        else:
            failures.append(f"wrong: {breakage} was not noticed by kills at {CASES}")

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(one, (None, *BREAKAGES)))
    return Report(
        "stores broken on purpose",
        len(BREAKAGES),
        silent=len(failures),
        note=f"{len(BREAKAGES) - len(failures)} of {len(BREAKAGES)} noticed, {kills} kills; seed {seed}",
        failures=tuple(failures),
    )

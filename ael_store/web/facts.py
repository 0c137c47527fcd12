"""The whole in a few figures: what the overview shows and `/api/v1/status` answers."""

from __future__ import annotations

import asyncio
import time
from dataclasses import asdict
from datetime import datetime
from typing import Any

from ael_store.runtime.vitals import status_word
from ael_store.store.plain_reader import PlainReader
from ael_store.web.database import Database

__all__ = ["MILD", "Facts", "Verdict", "verdict"]

FRESH_S = 0.5
"""How long the same figures are given to everybody who asks."""

PLOTTED = 120
"""Iterations that the sparklines show."""


class Facts:
    """Asks for the figures once for everybody who wants them at the same time."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self._lock = asyncio.Lock()
        self._found: dict[str, Any] = {}
        self._until = 0.0

    async def now(self) -> dict[str, Any]:
        """Return the figures, half a second old at most."""
        async with self._lock:
            if time.monotonic() >= self._until:
                self._found = await self._ask()
                self._until = time.monotonic() + FRESH_S
            return self._found

    def forget(self) -> None:
        """Something was changed: who asks next wants to see it."""
        self._until = 0.0

    async def then(self, at: str) -> dict[str, Any]:
        """Return the figures as of a past moment; what only the present knows is None."""
        past: dict[str, Any] = await self.database.past("moment", at=at)
        iteration = past["iteration"]
        recent, rate, first = await self.database.read(
            lambda reader: (
                reader.iteration_page(before=iteration + 1, limit=PLOTTED)[::-1],
                reader.tick_rate(),
                reader.first_iteration(),
            )
        )
        return {"status": "past", **past, "tick_rate": rate, "first_iteration": first, **_of_iterations(recent, None)}

    async def _ask(self) -> dict[str, Any]:
        facts: dict[str, Any]
        facts, recent, tick_rate, first, position = await self.database.read(_read)
        facts |= await self.database.vitals()
        facts["status"] = status_word(facts)
        facts |= {"tick_rate": tick_rate, "first_iteration": first, "position": asdict(position)}
        return facts | _of_iterations(recent, facts["run"])


def _read(reader: PlainReader) -> tuple[Any, ...]:
    return (
        reader.status(),
        reader.recent_iterations(PLOTTED),
        reader.tick_rate(),
        reader.first_iteration(),
        reader.position(),
    )


def _of_iterations(recent: list[dict[str, Any]], run: dict[str, Any] | None) -> dict[str, Any]:
    """Return what the last iterations say: how many a second, how long they take, what went wrong in them."""
    of_run = [row for row in recent if run is None or row["run_id"] == run["run_id"]]
    rate = None
    if len(of_run) > 1:
        first, last = (datetime.fromisoformat(row["started_at"]) for row in (of_run[0], of_run[-1]))
        seconds = (last - first).total_seconds()
        rate = (of_run[-1]["iteration"] - of_run[0]["iteration"]) / seconds if seconds > 0 else None
    return {
        "rate": rate,
        "mean_duration_ms": sum(row["duration_ms"] for row in recent) / len(recent) if recent else None,
        "recent": {
            "iterations": len(recent),
            "errors": sum(row["errors"] for row in recent),
            "events": sum(row["events"] for row in recent),
            "missed": sum(row["missed"] for row in recent),
        },
        "recent_iterations": recent,
    }


class Verdict:
    """Whether all is well, as a person wants to read it."""

    def __init__(self, level: str, word: str, detail: str) -> None:
        self.level = level
        """`good`, `warn`, `bad` or `idle`."""
        self.word = word
        self.detail = detail


MILD = frozenset(("failing_agent", "lagging_subscriber", "overrun", "question", "limit_reached", "unknown_limit"))
"""Problems that a person should look at, but that are no failure yet."""


def verdict(facts: dict[str, Any]) -> Verdict:
    """Say it in one line, from the worst down."""
    status, problems = facts["status"], facts["problems"]
    if facts["answers"] is False:
        return Verdict(
            "bad", "The loop does not answer", "the process is there, and says nothing: ael doctor tells more"
        )
    if status == "crashed":
        return Verdict("bad", "The loop has crashed", "nothing runs; the last run ended without a clean stop")
    if status == "waiting":
        return Verdict("bad", "The disk is full", "the loop waits with its last commit until there is room")
    count = len(problems)
    what = "one thing needs a look" if count == 1 else f"{count} things need a look"
    if status in ("stopped", "new"):
        past = "it was stopped in order" if status == "stopped" else "it has never run on this database"
        return Verdict("idle", "The loop is not running", what if count else past)
    if any(problem["kind"] not in MILD for problem in problems):
        return Verdict("bad", "Something is wrong", what)
    if status == "paused":
        return Verdict("warn", "The loop is paused", what if count else "agents wait until it goes on")
    if count:
        return Verdict("warn", "Running, but look here", what)
    if status == "starting":
        return Verdict("idle", "The loop is starting", "its first iteration has not been committed yet")
    return Verdict("good", "All is well", "the loop is running")

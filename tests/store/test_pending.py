"""What waits for a subscriber is read from the log in order, a handful at a time, however long the log is."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from ael_store import StateContext
from ael_store.store.reader import Reader
from tests.loops import agent, controller_on

EVENTS = 6000


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A database with many events; the types of all, in order."""
    path = tmp_path_factory.mktemp("log") / "ael.db"
    chance = random.Random(7)
    kinds = [f"t{number}" for number in range(700)]
    types = [
        "rare" if place in (10, 4000, 5999) else "often" if chance.random() < 0.5 else chance.choice(kinds)
        for place in range(EVENTS)
    ]

    async def tick(context: StateContext) -> None:
        for type in types:
            context.emit(type)

    asyncio.run(controller_on(path, agent("a", tick=tick)).run(iterations=1))
    return path, types


@pytest.mark.parametrize("wanted", [["rare"], ["often"], ["rare", "t1"], ["often", "rare", "t2"], "all", ["none"], []])
@pytest.mark.parametrize("after", [0, 17, 4100, EVENTS + 100])
@pytest.mark.parametrize("limit", [1, 256, EVENTS])
def test_pending_is_what_follows_in_order(
    log: tuple[Path, list[str]], wanted: list[str] | str, after: int, limit: int
) -> None:
    path, types = log
    reader = Reader(path)
    first = reader.events(type=types[0], after=0, limit=1)[0]["id"]
    chosen = sorted(set(types)) if wanted == "all" else list(wanted)
    until = first + EVENTS - 2

    found = reader.pending(chosen, after, until, limit)
    reader.close()

    expected = [
        (number, type) for number, type in enumerate(types, first) if type in set(chosen) and after < number <= until
    ]
    assert [(record.id, record.type) for record in found] == expected[:limit]

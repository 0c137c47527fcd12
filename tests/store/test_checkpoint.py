"""The write-ahead log: emptied between commits, kept by a reader, given back when the reader has gone."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from ael_store import StateContext
from ael_store.store import checkpoint
from tests.loops import agent, controller_on

LIMIT_BYTES = 64_000_000


def log_bytes(path: Path) -> int:
    log = path.with_name(path.name + "-wal")
    return log.stat().st_size if log.exists() else 0


def write_much(context: StateContext) -> None:
    for number in range(40):
        context.set(f"blob/{number}", f"{context.iteration} " + "x" * 8000)


async def test_log_of_a_busy_loop_stays_small(tmp_path: Path) -> None:
    sizes: list[int] = []
    controller = controller_on(tmp_path / "ael.db", agent("writer", tick=write_much), tick_rate=0)
    controller.observe(lambda summary: sizes.append(log_bytes(tmp_path / "ael.db")))

    await controller.run(100)

    assert sum(sizes) > 0
    assert max(sizes) < 16_000_000, "it wrote 32 MB of values"


async def test_log_held_by_a_reader_is_warned_of_and_shrinks_when_it_has_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(checkpoint, "RETRY_S", 0.05)
    path = tmp_path / "ael.db"
    controller = controller_on(path, agent("writer", tick=write_much), tick_rate=0)
    await controller.run(1)
    grown = asyncio.Event()
    controller.observe(lambda summary: grown.set() if log_bytes(path) > LIMIT_BYTES else None)
    with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as reader:
        reader.execute("BEGIN")
        before = reader.execute("SELECT count(*) FROM v_state_history").fetchone()
        running = asyncio.create_task(controller.start())
        await asyncio.wait_for(grown.wait(), 60)

        assert reader.execute("SELECT count(*) FROM v_state_history").fetchone() == before
    async with asyncio.timeout(60):
        while log_bytes(path) > LIMIT_BYTES:
            await asyncio.sleep(0.05)
    await controller.stop()
    await running

    assert "a reader has kept its transaction open" in caplog.text

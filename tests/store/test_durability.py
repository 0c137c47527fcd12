"""What `durability` asks of SQLite."""

from __future__ import annotations

from pathlib import Path

import pytest

from ael_store.store.sqlite import write_engine

FULL, NORMAL = 2, 1


@pytest.mark.parametrize(("durability", "synchronous", "fullfsync"), [("full", FULL, 1), ("normal", NORMAL, 0)])
async def test_connection_syncs_as_durability_says(
    durability: str, synchronous: int, fullfsync: int, tmp_path: Path
) -> None:
    """`fullfsync` matters on macOS only, where a plain fsync leaves the data in the cache of the drive."""
    engine = write_engine(tmp_path / "ael.db", durability)
    try:
        async with engine.connect() as connection:

            async def pragma(name: str) -> int:
                return int((await connection.exec_driver_sql(f"PRAGMA {name}")).scalar_one())

            assert await pragma("synchronous") == synchronous
            assert await pragma("fullfsync") == fullfsync
            assert await pragma("foreign_keys") == 1
    finally:
        await engine.dispose()

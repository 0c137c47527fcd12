"""The model of a disk after a power cut: what was synced stays, what was not may be there or not."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.faults.disk import SECTOR, Disk
from tests.faults.shim import Op, Record


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    (tmp_path / "old").write_bytes(b"o" * 4 * SECTOR)
    return Disk(tmp_path)


def do(disk: Disk, op: Op, name: str, *, file: int = 1, second: str = "", offset: int = 0, data: bytes = b"") -> None:
    path = str(disk.folder / name) if name else str(disk.folder)
    disk.apply(Record(op, file, path, str(disk.folder / second) if second else "", offset, data))


def cuts(disk: Disk) -> list[dict[str, bytearray]]:
    """What a thousand power cuts leave."""
    source = random.Random(1)
    return [disk.cut(source) for _ in range(1000)]


def test_what_was_synced_is_always_there(disk: Disk) -> None:
    do(disk, Op.CREATE, "new")
    do(disk, Op.WRITE, "new", data=b"n" * 700)
    do(disk, Op.FSYNC, "new")
    do(disk, Op.FSYNC, "")

    assert all(files == {"old": b"o" * 4 * SECTOR, "new": b"n" * 700} for files in cuts(disk))


def test_what_was_not_synced_is_dropped_reordered_and_torn(disk: Disk) -> None:
    do(disk, Op.CREATE, "new")
    do(disk, Op.FSYNC, "")
    do(disk, Op.WRITE, "new", data=b"a" * 2 * SECTOR)
    do(disk, Op.WRITE, "new", data=b"b" * 2 * SECTOR)

    left = {bytes(files["new"]) for files in cuts(disk)}

    assert {b"", b"a" * 2 * SECTOR, b"b" * 2 * SECTOR} <= left
    assert b"b" * SECTOR + b"a" * SECTOR in left, "torn, and the older write came last"
    assert b"b" * SECTOR in left
    assert b"\0" * SECTOR + b"b" * SECTOR in left
    assert left <= {one * SECTOR + two * SECTOR for one in (b"a", b"b", b"\0", b"") for two in (b"a", b"b", b"")}


def test_names_may_be_missing_until_the_folder_is_synced(disk: Disk) -> None:
    do(disk, Op.CREATE, "new")
    do(disk, Op.WRITE, "new", data=b"n")
    do(disk, Op.FSYNC, "new")
    do(disk, Op.RENAME, "new", second="newer")
    do(disk, Op.LINK, "newer", second="twin")

    found = {frozenset(files) for files in cuts(disk)}
    do(disk, Op.FSYNC, "")

    assert {frozenset({"old"}), frozenset({"old", "new"}), frozenset({"old", "newer", "twin"})} <= found
    assert {frozenset(files) for files in cuts(disk)} == {frozenset({"old", "newer", "twin"})}


def test_removed_name_may_be_back_with_what_was_synced(disk: Disk) -> None:
    do(disk, Op.CREATE, "log")
    do(disk, Op.WRITE, "log", data=b"l")
    do(disk, Op.FSYNC, "log")
    do(disk, Op.FSYNC, "")
    do(disk, Op.UNLINK, "log")
    do(disk, Op.CREATE, "log", file=2)

    assert {bytes(files["log"]) if "log" in files else None for files in cuts(disk)} == {None, b"l", b""}

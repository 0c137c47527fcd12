"""A private copy of a damaged database, complete with what its log holds, to be read in any way there is.

The original is only ever read, and by plain reads: that is allowed here alone, because a recovery runs while no
loop owns the file, and in a process that has not opened it by SQLite, so there are no locks that closing it would
drop. The log is applied to the copy here and not by SQLite, which must understand the first page before it does.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ael_store.errors import StorageFailed
from ael_store.store.leaf_pages import HEADER_BYTES, MAGIC, guessed_page_size, page_size_of

__all__ = ["DamagedCopy", "copy_damaged"]

BLOCK = 1 << 20
SECTOR = 512
LOG_HEADER = struct.Struct(">IIIIIIII")
FRAME_HEADER = struct.Struct(">IIIIII")
LOG_MAGIC = 0x377F0682
"""With the lowest bit set the checksums are over big-endian words."""


@dataclass(frozen=True, slots=True)
class DamagedCopy:
    """What was found out while copying."""

    unreadable_bytes: int
    """Bytes that the disk did not give; zeros stand for them."""
    log_is_broken: bool
    """True where the log holds commits that can't be read any more."""
    header_was_broken: bool


def copy_damaged(path: Path, copy: Path, tell: Callable[[str], None]) -> DamagedCopy:
    """Write the content of a database and its log into the empty file `copy`."""
    unreadable = _copy(path, copy)
    if unreadable:
        tell(f"{unreadable} bytes of {path} can't be read from the disk")
    log = path.with_name(path.name + "-wal")
    broken = _apply_log(copy, log.read_bytes()) if log.exists() and log.stat().st_size else False
    if broken:
        tell(f"{log} holds commits that can't be read")
    journal = path.with_name(path.name + "-journal")
    if journal.exists():
        _copy(journal, copy.with_name(copy.name + "-journal"))
    return DamagedCopy(unreadable, broken, _mend_header(copy))


def _sectors(descriptor: int, at: int, length: int) -> tuple[bytes, int]:
    """Read a part of a file sector by sector; return it, and how many bytes of it are zeros instead."""
    found, missing = bytearray(), 0
    for sector in range(at, at + length, SECTOR):
        wanted = min(SECTOR, at + length - sector)
        try:
            found += os.pread(descriptor, wanted, sector)
        except OSError:
            found += bytes(wanted)
            missing += SECTOR
    return bytes(found), missing


def _copy(path: Path, copy: Path) -> int:
    """Copy a file, zeros in the place of sectors that the disk can't read; returns how many bytes these are."""
    unreadable = 0
    try:
        with path.open("rb", buffering=0) as source, copy.open("wb") as target:
            size = os.fstat(source.fileno()).st_size
            for at in range(0, size, BLOCK):
                length = min(BLOCK, size - at)
                try:
                    block = os.pread(source.fileno(), length, at)
                except OSError as error:
                    if error.errno != errno.EIO:
                        raise
                    block, missing = _sectors(source.fileno(), at, length)
                    unreadable += missing
                target.write(block)
    except OSError as error:
        raise StorageFailed(
            f"{path} can't be copied to {copy.parent} ({error.strerror}): nothing was changed"
        ) from error
    return unreadable


def _apply_log(copy: Path, log: bytes) -> bool:
    """Write the pages of all whole commits in a log into the copy; True where more of them were in it."""
    if len(log) < LOG_HEADER.size:
        return False
    magic, _version, size, _number, salt1, salt2, sum1, sum2 = LOG_HEADER.unpack_from(log)
    order = ">" if magic & 1 else "<"
    sums = _checksum(log[:24], (0, 0), order)
    if magic & ~1 != LOG_MAGIC or sums != (sum1, sum2) or not 512 <= size <= 65536:
        return True
    pages: dict[int, int] = {}
    committed: dict[int, int] = {}
    count = 0
    step = FRAME_HEADER.size + size
    broken = False
    for at in range(LOG_HEADER.size, len(log) - step + 1, step):
        number, commit, *salts, sum1, sum2 = FRAME_HEADER.unpack_from(log, at)
        if salts != [salt1, salt2]:
            break  # of an earlier time: the log is written from its begin again and again
        sums = _checksum(log[at + FRAME_HEADER.size : at + step], _checksum(log[at : at + 8], sums, order), order)
        if sums != (sum1, sum2):
            broken = _commit_follows(log, at, step, (salt1, salt2))
            break
        pages[number] = at + FRAME_HEADER.size
        if commit:
            committed.update(pages)
            pages.clear()
            count = commit
    if count:
        with copy.open("r+b") as target:
            for number, at in committed.items():
                target.seek((number - 1) * size)
                target.write(log[at : at + size])
            target.truncate(count * size)
    return broken


def _commit_follows(log: bytes, begin: int, step: int, salts: tuple[int, int]) -> bool:
    """Say whether the end of a commit stands in this frame or in one after it."""
    for at in range(begin, len(log) - step + 1, step):
        _number, commit, salt1, salt2, _sum1, _sum2 = FRAME_HEADER.unpack_from(log, at)
        if (salt1, salt2) == salts and commit:
            return True
    return False


def _checksum(data: bytes, sums: tuple[int, int], order: str) -> tuple[int, int]:
    first, second = sums
    words = struct.unpack(f"{order}{len(data) // 4}I", data)
    for place in range(0, len(words), 2):
        first = (first + words[place] + second) & 0xFFFFFFFF
        second = (second + words[place + 1] + first) & 0xFFFFFFFF
    return first, second


def _mend_header(copy: Path) -> bool:
    """Write a header where the file has none, so that SQLite can open the copy; True where that was so."""
    with copy.open("rb") as source:
        data = source.read(HEADER_BYTES)
    if len(data) < HEADER_BYTES or page_size_of(data[:HEADER_BYTES]) is not None:
        return False
    data = copy.read_bytes()
    size = guessed_page_size(data)
    has_map = data[size : size + 5] == b"\x01\0\0\0\0"
    header = struct.pack(
        ">16sHBBBBBBIIIIIIIIIIII20xII",
        MAGIC,
        size if size < 65536 else 1,
        *(1, 1, 0, 64, 32, 32),
        *(1, len(data) // size, 0, 0, 1, 4, 0, 4 if has_map else 0, 1, 0, int(has_map), 0),
        *(1, 3037000),
    )
    with copy.open("r+b") as target:
        target.write(header)
    return True

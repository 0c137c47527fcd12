"""What a disk may hold after a power cut: a model of files and names, fed with the log of the shim.

What was written to a file before its last fsync is there. Of what was written since, any sector may be there or
not, whatever came later: dropped, reordered, torn. Names are as at the last fsync of the folder; of what was created,
linked, renamed and removed since, the first few changes of each name may be there.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.shim import Op, Record

__all__ = ["Disk"]

SECTOR = 512


@dataclass
class _File:
    synced: bytearray = field(default_factory=bytearray)
    since: list[tuple[int, bytes | None]] = field(default_factory=list)
    """What came after its last fsync: writes with their place; a new size, with None."""

    def write(self, content: bytearray, change: tuple[int, bytes | None]) -> None:
        place, data = change
        if data is None:
            del content[place:]
            content.extend(bytes(place - len(content)))
        else:
            content.extend(bytes(max(0, place - len(content))))
            content[place : place + len(data)] = data

    def sync(self) -> None:
        for change in self.since:
            self.write(self.synced, change)
        self.since.clear()

    def after_cut(self, random: random.Random, kept: float) -> bytearray:
        """Return what it may hold; `kept` is the chance of each sector that was not synced."""
        content = bytearray(self.synced)
        for place, data in self.since:
            if data is None:
                if random.random() < kept:
                    self.write(content, (place, None))
                continue
            at = place
            while at < place + len(data):
                end = min(place + len(data), (at // SECTOR + 1) * SECTOR)
                if random.random() < kept:
                    self.write(content, (at, data[at - place : end - place]))
                at = end
        return content


@dataclass(frozen=True)
class _Change:
    """A change of names: `gone` does not exist any more, `new` is this file."""

    gone: str | None
    new: str | None
    file: _File

    @property
    def names(self) -> set[str]:
        return {name for name in (self.gone, self.new) if name is not None}

    def apply(self, names: dict[str, _File]) -> None:
        if self.gone is not None:
            names.pop(self.gone, None)
        if self.new is not None:
            names[self.new] = self.file


class Disk:
    """The files of one folder."""

    def __init__(self, folder: Path) -> None:
        """Begin with what the folder holds now, all of it synced."""
        self.folder = folder
        self._names: dict[str, _File] = {}
        self._since: list[_Change] = []
        self._files: dict[int, _File] = {}
        for item in folder.iterdir():
            self._names[str(item)] = self._files[item.stat().st_ino] = _File(bytearray(item.read_bytes()))

    def apply(self, record: Record) -> None:
        """Do what a process has done."""
        if record.path == str(self.folder):
            if record.op == Op.FSYNC:
                for change in self._since:
                    change.apply(self._names)
                self._since.clear()
            return
        if record.op == Op.CREATE:
            self._files[record.file] = _File()
        elif record.op == Op.UNLINK and record.file not in self._files:
            return  # a socket
        file = self._files[record.file]
        match record.op:
            case Op.CREATE:
                self._since.append(_Change(None, record.path, file))
            case Op.LINK:
                self._since.append(_Change(None, record.second, file))
            case Op.RENAME:
                self._since.append(_Change(record.path, record.second, file))
            case Op.UNLINK:
                self._since.append(_Change(record.path, None, file))
            case Op.WRITE:
                file.since.append((record.offset, record.data))
            case Op.TRUNCATE | Op.ALLOCATE:
                file.since.append((record.offset, None))
            case Op.FSYNC:
                file.sync()

    def cut(self, random: random.Random) -> dict[str, bytearray]:
        """Return the files, by name, that are there after a power cut now."""
        names, broken = dict(self._names), set[str]()
        kept_names = random.choice((0.0, 1.0, random.random()))
        for change in self._since:
            if change.names & broken or random.random() >= kept_names:
                broken |= change.names
            else:
                change.apply(names)
        kept = random.choice((0.0, 1.0, random.random(), 1 - random.random() ** 3))
        return {Path(name).name: file.after_cut(random, kept) for name, file in names.items()}

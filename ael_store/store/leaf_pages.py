"""The rows of a damaged SQLite file, read from its pages without SQLite.

A table is a tree of pages: interior pages lead to leaf pages, and only these hold rows. Where an interior page or
the schema is broken, SQLite can't reach the leaves below it, though each is complete in itself. This module reads
each leaf for itself, and finds out in two ways to which tree it belongs: down from the root, as SQLite does, and up
through the pointer map, which files of ael_store have (they are made with `auto_vacuum`): there each page names its
parent. Both can be damaged; what belongs to no tree that is known is given as a tree of its own.

The format is that of https://www.sqlite.org/fileformat2.html; the names of the constants are those used there.
The bytes are those of a copy that nobody has open, with its log applied: see `damaged_copy.py`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from mmap import mmap

__all__ = ["LeafPages", "Row", "Tree", "Unreadable", "guessed_page_size", "page_size_of"]

MAGIC = b"SQLite format 3\0"
HEADER_BYTES = 100
INTERIOR, LEAF = 0x05, 0x0D
BTREE_PAGES = (0x02, INTERIOR, 0x0A, LEAF)
ROOT_PAGE, FREE_PAGE, TREE_PAGE = 1, 2, 5
"""Kinds of the pointer map; 3 and 4 are pages of overflow."""
LOCK_BYTE = 0x40000000
SIZES = (2048, 4096, 1024, 8192, 16384, 32768, 65536, 512)
DEEPEST = 20
LOWEST, HIGHEST = -(2**63), 2**63 - 1
FIXED_BYTES = (0, 1, 2, 3, 4, 6, 8, 8, 0, 0)
"""Lengths of the serial types 0 to 9."""

Value = int | float | str | bytes | None
Row = tuple[int, tuple[Value, ...]]
"""A rowid and the columns; what is the rowid itself is None among them."""


class Unreadable(Exception):
    """These bytes are not what they should be."""


@dataclass
class Tree:
    """The leaves of one table."""

    root: int
    leaves: list[int] = field(default_factory=list)
    bounds: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Between which rowids a leaf's rows lie, as far as its parents say."""
    lost: set[int] = field(default_factory=set)
    """Pages that belong to it and can't be read."""
    highest: int = 0
    """The highest rowid that an interior page names: there was a row of that number."""
    open_ended: bool = False
    """True where its last leaf is lost, so that rows after the highest number that is known may be gone too."""


def page_size_of(header: bytes) -> int | None:
    """Return what the header of a file says its page size is; None where that is no header."""
    if len(header) < HEADER_BYTES or not header.startswith(MAGIC):
        return None
    size = int.from_bytes(header[16:18], "big")
    size = 65536 if size == 1 else size
    return size if size in SIZES else None


def guessed_page_size(data: bytes | mmap) -> int:
    """Return the page size with which most pages begin as pages of a tree do, in a file without its header.

    Content lies at the end of a page: with too large a size it would never be in the second half.
    """

    def plausible(size: int) -> float:
        begins = range(size, len(data) - size + 1, size)
        found = [at for at in begins if _is_tree_page(data[at : at + size])]
        fills = any(int.from_bytes(data[at + 5 : at + 7], "big") > size // 2 for at in found)
        return len(found) / len(begins) if fills else 0.0

    return max(SIZES, key=plausible)


def _is_tree_page(page: bytes, at: int = 0) -> bool:
    kind, _free, cells, content, fragments = struct.unpack_from(">BHHHB", page, at)
    first = at + (8 if kind in (0x0A, LEAF) else 12) + 2 * cells
    return kind in BTREE_PAGES and first <= (content or 65536) <= len(page) and fragments <= 60


class LeafPages:
    """The pages of one file."""

    def __init__(self, data: bytes | mmap) -> None:
        self.data = data
        self.size = page_size_of(data[:HEADER_BYTES]) or guessed_page_size(data)
        self._has_header = data[: len(MAGIC)] == MAGIC
        self.usable = self.size - (data[20] if self._has_header else 0)
        self.count = len(data) // self.size

    # -- pages ------------------------------------------------------------------------------------

    def page(self, number: int) -> bytes:
        if not 1 <= number <= self.count:
            raise Unreadable(f"page {number} is outside of the file")
        return self.data[(number - 1) * self.size : number * self.size]

    def kind(self, number: int) -> int | None:
        """Return the kind of a page of a tree, None of any other page."""
        try:
            page = self.page(number)
        except Unreadable:
            return None
        at = _header_at(number)
        return page[at] if _is_tree_page(page, at) else None

    def rows(self, number: int) -> Iterator[Row | None]:
        """Yield the rows of a leaf, None for each that can't be read."""
        page = self.page(number)
        for at in self._cells(page, _header_at(number), 8):
            try:
                yield self._row(page, at)
            except (Unreadable, IndexError, struct.error, UnicodeDecodeError):
                yield None

    def children(self, number: int) -> Iterator[tuple[int, int | None]]:
        """Yield the pages below an interior page, each with its highest rowid; the last one has none."""
        page, at = self.page(number), _header_at(number)
        for cell in self._cells(page, at, 12):
            if cell + 5 <= self.usable:
                yield int.from_bytes(page[cell : cell + 4], "big"), _signed(_varint(page, cell + 4)[0])
        yield int.from_bytes(page[at + 8 : at + 12], "big"), None

    def _cells(self, page: bytes, at: int, header: int) -> list[int]:
        count = int.from_bytes(page[at + 3 : at + 5], "big")
        return list(struct.unpack_from(f">{count}H", page, at + header))

    # -- rows -------------------------------------------------------------------------------------

    def _row(self, page: bytes, at: int) -> Row:
        if at < 8:
            raise Unreadable("a cell inside the header")
        length, at = _varint(page, at)
        rowid, at = _varint(page, at)
        return _signed(rowid), tuple(_record(self._payload(page, at, length)))

    def _payload(self, page: bytes, at: int, length: int) -> bytes:
        """Return the content of a cell, collected from its overflow pages."""
        if length > len(self.data):
            raise Unreadable("longer than the file")
        local = length
        if length > self.usable - 35:
            least = (self.usable - 12) * 32 // 255 - 23
            local = least + (length - least) % (self.usable - 4)
            local = local if local <= self.usable - 35 else least
        if at + local + 4 * (local < length) > self.usable:
            raise Unreadable("a cell beyond its page")
        content = bytearray(page[at : at + local])
        following = int.from_bytes(page[at + local : at + local + 4], "big") if local < length else 0
        while len(content) < length:
            part = self.page(following)
            content += part[4 : min(self.usable, 4 + length - len(content))]
            following = int.from_bytes(part[:4], "big")
        return bytes(content)

    # -- trees ------------------------------------------------------------------------------------

    def trees(self, roots: list[int]) -> list[Tree]:
        """Return the trees with these roots, then one for each other group of leaves that belong together."""
        trees = {root: Tree(root) for root in roots}
        taken: set[int] = set()
        for tree in trees.values():
            self._descend(tree, tree.root, LOWEST, HIGHEST, taken, 0)
        for number in range(2 if self.kind(1) is None else 1, self.count + 1):
            if number in taken or number in self._free or self._is_map(number):
                continue
            kind = self.kind(number)
            if kind == LEAF:
                root = self._root_above(number) or number
                trees.setdefault(root, Tree(root)).leaves.append(number)
            elif kind is None and number not in self._parents:
                above = self._root_above(number)
                if above in trees:
                    trees[above].lost.add(number)
        for tree in trees.values():
            broken = tree.lost & self._parents
            tree.lost -= broken  # an interior page is no loss where the pages below it were found
            tree.open_ended = bool(tree.lost) and (tree.open_ended or bool(broken))
        return list(trees.values())

    def _descend(self, tree: Tree, number: int, low: int, high: int, taken: set[int], depth: int) -> None:
        kind = self.kind(number)
        if kind not in (INTERIOR, LEAF) or depth > DEEPEST:
            tree.lost.add(number)
            tree.open_ended |= high == HIGHEST
            return
        if number in taken or (self._root_above(number) or tree.root) != tree.root:
            return  # another tree's
        taken.add(number)
        if kind == LEAF:
            tree.leaves.append(number)
            tree.bounds[number] = (low, high)
            return
        try:
            for child, highest in self.children(number):
                upper = high if highest is None else min(high, highest)
                tree.highest = max(tree.highest, highest or 0)
                self._descend(tree, child, low, upper, taken, depth + 1)
                low = max(low, upper)
        except (Unreadable, IndexError, struct.error):
            tree.lost.add(number)

    # -- the pointer map and the free pages -------------------------------------------------------

    @cached_property
    def _map(self) -> dict[int, tuple[int, int]]:
        """Kind and parent of each page, as far as the pointer map says; empty in a file without one."""
        if self._has_header:
            if self.data[52:56] == bytes(4):
                return {}
        elif self.data[self.size : self.size + 5] != bytes((ROOT_PAGE, 0, 0, 0, 0)):
            return {}
        found: dict[int, tuple[int, int]] = {}
        for number in range(3, self.count + 1):
            page = self._map_page(number)
            if page == number:
                continue
            at = (page - 1) * self.size + 5 * (number - page - 1)
            kind, parent = struct.unpack_from(">BI", self.data, at)
            if 1 <= kind <= TREE_PAGE and parent <= self.count:
                found[number] = (kind, parent)
        return found

    def _map_page(self, number: int) -> int:
        step = self.usable // 5 + 1
        page = (number - 2) // step * step + 2
        return page + (page == LOCK_BYTE // self.size + 1)

    def _is_map(self, number: int) -> bool:
        return bool(self._map) and number >= 2 and self._map_page(number) == number

    @cached_property
    def _parents(self) -> set[int]:
        """Pages that others name as theirs: interior pages."""
        return {parent for kind, parent in self._map.values() if kind == TREE_PAGE}

    @cached_property
    def _free(self) -> set[int]:
        free = {number for number, (kind, _) in self._map.items() if kind == FREE_PAGE}
        trunk = int.from_bytes(self.data[32:36], "big") if self._has_header else 0
        while 1 < trunk <= self.count and trunk not in free - set(self._map):
            free.add(trunk)
            page = self.page(trunk)
            leaves = min(int.from_bytes(page[4:8], "big"), self.usable // 4 - 2)
            free.update(struct.unpack_from(f">{leaves}I", page, 8))
            trunk = int.from_bytes(page[:4], "big")
            if trunk in free:
                break
        return free

    def _root_above(self, number: int) -> int | None:
        """Return the root of the tree that a page belongs to by the pointer map; None where that does not tell."""
        for _ in range(DEEPEST):
            if number == 1:
                return 1
            kind, parent = self._map.get(number, (0, 0))
            if kind == ROOT_PAGE:
                return number
            if kind != TREE_PAGE or parent == 0:
                return None
            number = parent
        return None


def _header_at(number: int) -> int:
    return HEADER_BYTES if number == 1 else 0


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Return a number of one to nine bytes, and where the next one begins."""
    value = 0
    for place in range(8):
        byte = data[at + place]
        value = value << 7 | byte & 0x7F
        if byte < 0x80:
            return value, at + place + 1
    return value << 8 | data[at + 8], at + 9


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _record(payload: bytes) -> Iterator[Value]:
    """Yield the columns of a record."""
    end, at = _varint(payload, 0)
    body = end
    while at < end:
        serial, at = _varint(payload, at)
        if serial in (10, 11):
            raise Unreadable("a reserved serial type")
        length = FIXED_BYTES[serial] if serial < 10 else (serial - 12) // 2
        content = payload[body : body + length]
        if len(content) != length:
            raise Unreadable("a column beyond its record")
        body += length
        if serial == 0:
            yield None
        elif serial == 7:
            yield struct.unpack(">d", content)[0]
        elif serial < 10:
            yield serial - 8 if serial >= 8 else int.from_bytes(content, "big", signed=True)
        else:
            if serial % 2 == 0:
                yield content
                continue
            if b"\0" in content:  # no text of ours has one, but a lost page of a long text is zeros
                raise Unreadable("a text with a NUL")
            yield content.decode("utf-8")
    if at != end or body != len(payload):
        raise Unreadable("a record of another length than it says")

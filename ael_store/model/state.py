"""The shared state in memory: one cell per key, and views of other moments at no cost.

A cell is never changed, only replaced. Whoever must keep reading an earlier moment (a unit in the background, a
reader outside hooks, who sees the last commit) holds a *shadow*: before a cell is replaced, the old one is left
in every shadow that does not have one yet. Reading is then: shadow first, else the cells. No copy, no version
chain, and nothing to pay while nobody looks back.

Readers in threads need no lock: a shadow is filled before the cell is replaced, and readers look at the cell
first and at the shadow after it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ael_store.model.values import same

__all__ = ["Cell", "Change", "Shadow", "State"]


class Cell:
    """The value of a key: JSON text, version, and where it came from. Never changed once it is made."""

    __slots__ = ("agent_id", "change_id", "key_id", "text", "version")

    def __init__(self, key_id: int | None, text: str, version: int, change_id: int, agent_id: int) -> None:
        self.key_id = key_id
        self.text = text
        self.version = version
        self.change_id = change_id
        self.agent_id = agent_id


Shadow = dict[str, "Cell | None"]
"""Old cells of the keys that were changed since a moment; None where there was none."""


@dataclass(slots=True)
class Change:
    """One change of one key: `new` is None where it was deleted."""

    id: int
    key: str
    old: Cell | None
    new: Cell | None
    tick_id: int


class State:
    """The values that the units of work have made so far, committed or about to be."""

    __slots__ = ("cells", "change_id", "shadows", "uncommitted")

    def __init__(self, cells: dict[str, Cell] | None = None, change_id: int = 0) -> None:
        self.cells: dict[str, Cell] = {} if cells is None else cells
        self.change_id = change_id
        self.shadows: list[Shadow] = []
        self.uncommitted: Shadow = {}

    def apply(self, writes: Mapping[str, str | None], tick_id: int, agent_id: int) -> list[Change]:
        """Put the writes of a unit in place and return the changes that they are.

        A write of an equal value is no change, and neither is the deletion of a key that is not there.
        """
        changes: list[Change] = []
        cells, uncommitted, shadows = self.cells, self.uncommitted, self.shadows
        number = self.change_id
        for key, text in writes.items():
            old = cells.get(key)
            if text is None:
                if old is None:
                    continue
                new = None
                number += 1
            else:
                if old is not None and (old.text == text or same(old.text, text)):
                    continue
                number += 1
                new = Cell(
                    None if old is None else old.key_id,
                    text,
                    1 if old is None else old.version + 1,
                    number,
                    agent_id,
                )
            if key not in uncommitted:
                uncommitted[key] = old
            for shadow in shadows:
                if key not in shadow:
                    shadow[key] = old
            if new is None:
                del cells[key]
            else:
                cells[key] = new
            changes.append(Change(number, key, old, new, tick_id))
        self.change_id = number
        return changes

    def committed(self) -> None:
        """Take everything applied so far as committed: readers outside hooks see it from now on."""
        self.uncommitted = {}

    def committed_cells(self) -> dict[str, Cell]:
        """Return the cells as of the last commit, a copy."""
        cells = dict(self.cells)
        for key, old in self.uncommitted.items():
            if old is None:
                cells.pop(key, None)
            else:
                cells[key] = old
        return cells

    def open_shadow(self) -> Shadow:
        """Return a shadow that keeps this moment; close it when nobody reads it any more."""
        shadow: Shadow = {}
        self.shadows.append(shadow)
        return shadow

    def close_shadow(self, shadow: Shadow) -> None:
        self.shadows = [other for other in self.shadows if other is not shadow]

    def read(self, key: str, shadow: Shadow | None = None) -> str | None:
        """Return the JSON text of a key, at the moment of the shadow where one is given."""
        cell = self.cells.get(key)
        if shadow is not None and key in shadow:
            cell = shadow[key]
        return None if cell is None else cell.text

    def items(self, shadow: Shadow | None = None, prefix: str = "") -> Iterator[tuple[str, str]]:
        """Return keys and JSON texts in order of the keys, at the moment of the shadow where one is given."""
        cells: dict[str, Cell | None] = dict(self.cells)
        if shadow is not None:
            cells.update(dict(shadow))
        for key in sorted(cells):
            cell = cells[key]
            if cell is not None and key.startswith(prefix):
                yield key, cell.text

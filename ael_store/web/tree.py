"""Keys as a tree: `house/kitchen/light` is `light` in `kitchen` in `house`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Branch", "tree_of"]

DEEPEST = 8
"""Levels of branches; a key with more slashes keeps them in its name."""


@dataclass(slots=True)
class Branch:
    """A part of a key before a slash, with what is below it."""

    name: str
    prefix: str
    branches: dict[str, Branch] = field(default_factory=dict)
    leaves: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    """The rest of the key, and its row."""
    count: int = 0
    """Keys below it, at any depth."""


def tree_of(rows: Iterable[dict[str, Any]]) -> Branch:
    """Return the tree of keys, which come in their order."""
    root = Branch("", "")
    for row in rows:
        *parts, last = row["key"].split("/", DEEPEST)
        branch = root
        branch.count += 1
        for part in parts:
            following = branch.branches.get(part)
            if following is None:
                following = branch.branches[part] = Branch(part, f"{branch.prefix}{part}/")
            branch = following
            branch.count += 1
        branch.leaves.append((last, row))
    return root

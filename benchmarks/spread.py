"""Median, smallest and largest: a figure is shown with what it moved by."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Spread"]


@dataclass(frozen=True)
class Spread:
    """Median, smallest and largest of some figures."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, figures: Sequence[float]) -> Spread:
        return cls(statistics.median(figures), min(figures), max(figures))

    def __format__(self, spec: str) -> str:
        return f"{self.median:{spec}} [{self.min:{spec}}..{self.max:{spec}}]"

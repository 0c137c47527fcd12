"""What every trial of `./dev torture` returns, and how it is called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

__all__ = ["Report", "Tell", "Trial"]

Tell = Callable[[str], None]
"""Takes a line of progress."""


@dataclass(frozen=True)
class Report:
    """What a trial did to the product, and what the product did wrong."""

    name: str
    """In words: `SIGKILL at random moments`."""
    trials: int
    """Faults injected."""
    lost: int = 0
    """Something that was shown as committed is gone."""
    duplicated: int = 0
    """Something took effect twice."""
    silent: int = 0
    """A wrong database, a hang, a raw traceback or a silent exit that nothing reported."""
    note: str = ""
    """Figures worth publishing, and the seed."""
    failures: tuple[str, ...] = ()
    """Each violation, with how to reproduce it."""

    @property
    def good(self) -> bool:
        """True where faults were injected and nothing was violated."""
        return self.trials > 0 and not (self.lost or self.duplicated or self.silent or self.failures)


class Trial(Protocol):
    """A module of `tests/faults`. Where a trial is a sweep, `count=0` means all of it."""

    def run(self, *, count: int, seed: int, workers: int, tell: Tell, folder: Path) -> Report: ...

"""What a check of `ael doctor` found: how it is, and what to do about it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

__all__ = ["Finding", "all_of", "fail", "ok", "warn"]

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. `warn` can wait, `fail` keeps the loop from running or puts data at risk."""

    check: str
    status: Status
    found: str
    fix: str | None = None
    """What to do; None where nothing is to be done."""


def ok(check: str, found: str) -> Finding:
    return Finding(check, "ok", found)


def warn(check: str, found: str, fix: str) -> Finding:
    return Finding(check, "warn", found, fix)


def fail(check: str, found: str, fix: str | None = None) -> Finding:
    return Finding(check, "fail", found, fix)


def all_of(checks: Iterable[tuple[str, Callable[[], Iterable[Finding]]]]) -> Iterator[Finding]:
    """Yield what the checks find; one that goes wrong itself says so and keeps no other from its turn."""
    for name, look in checks:
        try:
            yield from look()
        except Exception as error:
            yield fail(name, f"could not be looked at: {type(error).__name__}: {error}")

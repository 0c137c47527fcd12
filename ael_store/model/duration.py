"""Lengths of time as users write them: seconds, `"30m"`, or a moment."""

from __future__ import annotations

import math
import re
from datetime import datetime, timedelta

from ael_store.clock import to_us
from ael_store.errors import InvalidValue, InvalidValueType
from ael_store.model.values import shown

__all__ = ["due_us", "parse_duration"]

UNITS = {
    "ms": 0.001,
    "s": 1.0,
    "sec": 1.0,
    "second": 1.0,
    "seconds": 1.0,
    "m": 60.0,
    "min": 60.0,
    "minute": 60.0,
    "minutes": 60.0,
    "h": 3600.0,
    "hour": 3600.0,
    "hours": 3600.0,
    "d": 86400.0,
    "day": 86400.0,
    "days": 86400.0,
    "w": 604800.0,
    "week": 604800.0,
    "weeks": 604800.0,
}
_PART = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)")


def parse_duration(text: str) -> float:
    """Return seconds for `30s`, `1.5h`, `1h 30m`, `3 days`; raises InvalidValue."""
    total, position = 0.0, 0
    for found in _PART.finditer(text.lower()):
        if found.start() != position or found[2] not in UNITS:
            break
        total += float(found[1]) * UNITS[found[2]]
        position = found.end()
    if position == 0 or text[position:].strip():
        raise InvalidValue(f"{shown(text)} is no length of time; write 30s, 5m, 1h 30m, 2 days")
    return total


def due_us(after: float | int | str | timedelta | datetime, now_us: int) -> int:
    """Return the instant that `after` names, seen from `now_us`: seconds, `"30m"`, a timedelta or a time."""
    if isinstance(after, bool):
        raise InvalidValueType(f"after={after!r} is no length of time; pass seconds, '30m' or a time")
    if isinstance(after, datetime):
        return to_us(after)
    if isinstance(after, timedelta):
        seconds = after.total_seconds()
    elif isinstance(after, str):
        seconds = parse_duration(after)
    elif isinstance(after, int | float):
        seconds = float(after) if abs(after) < 1e300 else math.inf
    else:
        raise InvalidValueType(f"after={shown(after)} is no length of time; pass seconds, '30m' or a time")
    if not 0 <= seconds < 1e10:
        raise InvalidValue(f"after={shown(after)} lies in the past, or further away than 300 years")
    return now_us + round(seconds * 1_000_000)

"""How values, times and numbers look on a page. Everything here returns text; the templates escape it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import orjson

from ael_store.telemetry import printable, printable_json

__all__ = ["FILTERS", "ago", "ms", "number", "points", "pretty", "preview", "since", "size", "visible", "when"]

PREVIEW = 120
LONGEST_SHOWN = 100_000
"""Characters of a value that a page shows; the rest is at its address in the JSON interface."""


def visible(text: Any, longest: int = 2000) -> str:
    """Return a text of anybody's with control characters and marks of direction made visible, cut where it is long."""
    shown = printable(str(text)[: longest + 1], keep="\n\t")
    return shown if len(shown) <= longest else f"{shown[:longest]}…"


def preview(text: str | None, longest: int = PREVIEW) -> str:
    """Return JSON text in one short line."""
    if text is None:
        return ""
    shown = printable_json(text[: longest + 1])
    return shown if len(shown) <= longest else f"{shown[:longest]}…"


def pretty(text: str | None) -> str:
    """Return JSON text in lines, cut where it is long."""
    if text is None:
        return ""
    if len(text) <= LONGEST_SHOWN:
        with contextlib.suppress(ValueError, TypeError):  # nested too deep, or too large a number: as it is stored
            text = orjson.dumps(orjson.loads(text), option=orjson.OPT_INDENT_2).decode()
    shown = printable_json(text[: LONGEST_SHOWN + 1], keep="\n")
    return shown if len(shown) <= LONGEST_SHOWN else f"{shown[:LONGEST_SHOWN]}…"


def when(moment: str | None) -> str:
    """Return a time of the views, to the second."""
    return "" if moment is None else moment[:19].replace("T", " ")


def seconds_since(moment: str) -> float:
    return max(0.0, (datetime.now(UTC) - datetime.fromisoformat(moment)).total_seconds())


def length(seconds: float) -> str:
    """Return a length of time in the unit that fits."""
    for limit, unit_s, unit in ((1, 0.001, "ms"), (120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit_s:.0f} {unit}"
    return f"{seconds / 86_400:.0f} days"


def ago(moment: str | None) -> str:
    """Return how long ago a time of the views was."""
    if moment is None:
        return "never"
    seconds = seconds_since(moment)
    return "just now" if seconds < 1 else f"{length(seconds)} ago"


def since(moment: str | None) -> str:
    """Return for how long something has been so."""
    return "" if moment is None else length(max(1.0, seconds_since(moment)))


def ms(duration: float | None) -> str:
    """Return milliseconds with as many digits as mean anything."""
    if duration is None:
        return "–"
    if duration >= 10_000:
        return f"{duration / 1000:,.1f} s"
    return f"{duration:,.0f} ms" if duration >= 100 else f"{duration:.1f} ms" if duration >= 1 else f"{duration:.2f} ms"


def number(value: float | None) -> str:
    """Return a number with its thousands apart."""
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def size(count: int) -> str:
    """Return a number of bytes."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            return f"{value:.0f} {unit}" if unit in ("B", "kB") else f"{value:.1f} {unit}"
        value /= 1000
    raise AssertionError("unreachable")


def points(values: Sequence[float], width: int = 120, height: int = 28) -> str:
    """Return the points of a sparkline: the values over their full width, the largest at the top."""
    if not values:
        return ""
    top = max(values) or 1.0
    step = width / max(1, len(values) - 1)
    return " ".join(f"{i * step:.1f},{height - 1 - (height - 2) * value / top:.1f}" for i, value in enumerate(values))


def numeric(text: str | None) -> float | None:
    """Return the number that JSON text is; None for anything else."""
    if text is None or len(text) > 40 or text in ("true", "false", "null"):
        return None
    try:
        found = float(text)
    except ValueError:
        return None
    return found if math.isfinite(found) else None


FILTERS = {
    "visible": visible,
    "preview": preview,
    "pretty": pretty,
    "when": when,
    "ago": ago,
    "since": since,
    "ms": ms,
    "number": number,
    "size": size,
    "points": points,
}

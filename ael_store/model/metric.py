"""Metrics: numbers that agents measure, each known by its channel and its name.

A *gauge* is a level (`temperature`), a *counter* only grows (`reads`), a *timing* is how long something took, in
seconds. What a unit has measured takes effect with it, or not at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from ael_store.errors import InvalidKey, InvalidValue, InvalidValueType
from ael_store.model.values import INT_MAX, INT_MIN, shown, type_name

__all__ = ["MOST_IN_A_UNIT", "Measurements", "MetricKind", "check_metric_name", "metric_value", "numbers_of"]

MetricKind = Literal["gauge", "counter", "timing"]

NAME_BYTES = 200
MOST_IN_A_UNIT = 1000
"""How many values one unit may record: what is measured more often is counted, or summed up by its agent."""

VERBS = {"gauge": "set as a gauge", "counter": "counted", "timing": "timed"}


class Measurements:
    """What one unit has measured: of a gauge its last value, of a counter the sum, of a timing each value."""

    __slots__ = ("count", "found")

    def __init__(self) -> None:
        self.found: dict[tuple[str, str], tuple[MetricKind, list[float]]] = {}
        self.count = 0

    def add(self, kind: MetricKind, channel: str, name: str, value: float) -> None:
        known = self.found.get((channel, name))
        if known is not None and known[0] != kind:
            raise InvalidValue(f"{_what(channel, name)} was {VERBS[known[0]]} in this unit and can't be {VERBS[kind]}")
        if known is not None and kind != "timing":
            known[1][0] = value if kind == "gauge" else known[1][0] + value
            return
        if self.count >= MOST_IN_A_UNIT:
            raise InvalidValue(
                f"{_what(channel, name)}: this unit has recorded {self.count} values, and that is the most; "
                "sum up what happens more often, and keep what tells things apart out of the names"
            )
        self.count += 1
        if known is None:
            self.found[channel, name] = (kind, [value])
        else:
            known[1].append(value)


def check_metric_name(name: Any, what: str = "the name of a metric") -> str:
    """Return a name that a metric, or a channel, can have; raises InvalidKey or InvalidValueType."""
    if type(name) is not str:
        raise InvalidValueType(f"{what} is {shown(name)} ({type_name(name)}), wanted is a text")
    if not name or not name.isprintable():
        raise InvalidKey(f"{what} is {shown(name)}, wanted is a text of characters that can be printed")
    size = len(name) if name.isascii() else len(name.encode())
    if size > NAME_BYTES:
        raise InvalidKey(f"{what} is {name[:40]!r}…: {size} bytes, the limit is {NAME_BYTES}")
    return name


def metric_value(value: Any, channel: str, name: str, *, least: float | None = None) -> float:
    """Return a number as it is stored; raises InvalidValueType or InvalidValue, which name the metric."""
    kind = type(value)
    if kind is not float and kind is not int:
        raise InvalidValueType(
            f"{_what(channel, name)}: the value is {shown(value)} ({type_name(value)}); accepted are int and float"
        )
    if kind is int and not INT_MIN <= value <= INT_MAX:
        raise InvalidValue(f"{_what(channel, name)}: the integer does not fit in 64 bits")
    number = float(value)
    if number - number != 0.0:
        raise InvalidValue(f"{_what(channel, name)}: {number} is not a finite number")
    if least is not None and number < least:
        raise InvalidValue(f"{_what(channel, name)}: {number:g} is less than {least:g}; what can fall is a gauge")
    return number + 0.0  # SQLite keeps no negative zero


def numbers_of(channel: str, data: Mapping[str, Any]) -> dict[str, float]:
    """Return what `push_metrics` records; raises InvalidKey, InvalidValue or InvalidValueType."""
    check_metric_name(channel, "the channel")
    if not isinstance(data, Mapping):
        raise InvalidValueType(f"data is {shown(data)} ({type_name(data)}), wanted is a mapping of names to numbers")
    return {check_metric_name(name): metric_value(value, channel, name) for name, value in data.items()}


def _what(channel: str, name: str) -> str:
    return f"metric {name!r} of channel {channel!r}"

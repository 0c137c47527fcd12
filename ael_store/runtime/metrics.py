"""`context.metrics`: how agents record metrics.

    context.metrics.gauge("temperature", 21.5)
    context.metrics.count("reads")
    with context.metrics.timer("fetch"):
        ...

What is recorded is part of the unit: it is committed with it, and nothing of a unit that fails is.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ael_store.model.metric import MetricKind, check_metric_name, metric_value

if TYPE_CHECKING:
    from ael_store.runtime.context import StateContext

__all__ = ["Metrics"]


class Metrics:
    """Records metrics in a channel, which in a hook is the name of its agent. May be used from any thread.

    Outside hooks each call is a unit of its own, like a change of the state. On a lone `StateContext` the numbers are
    checked and forgotten.
    """

    __slots__ = ("_channel", "_context")

    def __init__(self, context: StateContext, channel: str) -> None:
        self._context = context
        self._channel = channel

    def gauge(self, name: str, value: float) -> None:
        """Record a level, like a temperature or the length of a queue; of several in one unit the last one counts.

        Raises InvalidValueType or InvalidValue, naming the metric, for anything but an int or a finite float.
        """
        self._record("gauge", name, value)

    def count(self, name: str, by: float = 1) -> None:
        """Add to a counter, which never falls and goes on counting after a restart.

        Raises InvalidValueType or InvalidValue for anything but a number from 0 on.
        """
        self._record("counter", name, by, least=0.0)

    def timing(self, name: str, seconds: float) -> None:
        """Record how long something took.

        Raises InvalidValueType or InvalidValue for anything but seconds from 0 on.
        """
        self._record("timing", name, seconds, least=0.0)

    @contextmanager
    def timer(self, name: str) -> Iterator[None]:
        """Record how long the `with` block takes, also where it raises."""
        check_metric_name(name)
        began = time.perf_counter()
        try:
            yield
        finally:
            self.timing(name, time.perf_counter() - began)

    def _record(self, kind: MetricKind, name: str, value: float, *, least: float | None = None) -> None:
        channel = self._channel
        check_metric_name(name)
        number = metric_value(value, channel, name, least=least)
        self._context._do("metrics.record", lambda unit: unit.measure(kind, channel, name, number))

    def __repr__(self) -> str:
        return f"<Metrics of channel {self._channel!r}>"

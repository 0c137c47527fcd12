"""A unit of work: what one hook read, wrote and emitted, and how it ended.

It takes a view (the state as it stands, or the moment of a shadow) and an inbox (at most one event), and holds
what the hook did as private values. Nothing outside sees any of it before the loop applies the unit, and a unit
that fails is dropped whole. It knows neither the store nor the loop, so it could run in another process.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ael_store.errors import UnitClosed
from ael_store.model.event import Emission, Event
from ael_store.model.metric import Measurements, MetricKind
from ael_store.model.state import Shadow, State
from ael_store.model.task import Submission
from ael_store.model.values import DEFAULT_LIMITS, INT_MAX, Limits, decode

__all__ = ["Failure", "Kind", "Outcome", "SubscriptionRequest", "Unit"]

Kind = Literal["tick", "event", "start", "error", "shutdown", "task", "outside"]
Outcome = Literal["success", "error", "timeout", "conflict", "cancelled"]


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a unit failed: the class of the exception, its message, and the traceback as text."""

    type: str
    message: str
    traceback: str = ""

    def __str__(self) -> str:
        return f"{self.type}: {self.message}" if self.message else self.type


@dataclass(frozen=True, slots=True)
class SubscriptionRequest:
    """A callback that a unit subscribed (or, with `callback` None, unsubscribed)."""

    subscriber: str
    pattern: str | None
    callback: Callable[[Event], Any] | None


_ABSENT: Any = object()


class Unit:
    """The private workspace of one hook."""

    __slots__ = (
        "_random",
        "cause",
        "closed",
        "duration_us",
        "emissions",
        "failure",
        "hops",
        "increments",
        "iteration",
        "kind",
        "limits",
        "measurements",
        "now_us",
        "outcome",
        "resumed",
        "seed",
        "seen_change_id",
        "shadow",
        "state",
        "subject",
        "submissions",
        "subscriptions",
        "task_id",
        "writes",
    )

    def __init__(
        self,
        kind: Kind,
        subject: str,
        state: State,
        *,
        iteration: int,
        now_us: int,
        seed: int,
        cause: Event | None = None,
        limits: Limits = DEFAULT_LIMITS,
        resumed: bool = False,
        hops: int | None = None,
    ) -> None:
        self.kind: Kind = kind
        self.subject = subject
        self.state = state
        self.iteration = iteration
        self.now_us = now_us
        self.seed = seed
        self.cause = cause
        self.limits = limits
        self.resumed = resumed
        self.hops = hops
        """How many handlers of events led to what it emits, this one included; None for none."""
        self.shadow: Shadow | None = None
        self.seen_change_id = state.change_id
        self.writes: dict[str, str | None] = {}
        self.increments: dict[str, int | float] = {}
        self.emissions: list[Emission] = []
        self.subscriptions: list[SubscriptionRequest] = []
        self.submissions: list[Submission] = []
        self.measurements: Measurements | None = None
        self.task_id: int | None = None
        """The task whose result it takes up."""
        self.closed = False
        self.outcome: Outcome = "success"
        self.failure: Failure | None = None
        self.duration_us = 0
        self._random: random.Random | None = None

    # -- what the hook reads --

    def read(self, key: str) -> str | None:
        """Return the JSON text of a key as this unit sees it, None where there is none."""
        text: str | None = self.writes.get(key, _ABSENT)
        if text is not _ABSENT:
            return text
        cell = self.state.cells.get(key)
        shadow = self.shadow
        if shadow is not None and key in shadow:
            cell = shadow[key]
        return None if cell is None else cell.text

    def items(self, prefix: str = "") -> Iterator[tuple[str, str]]:
        """Return keys and JSON texts as this unit sees them, in order of the keys."""
        seen: dict[str, str | None] = dict(self.state.items(self.shadow, prefix))
        seen.update((key, text) for key, text in self.writes.items() if key.startswith(prefix))
        for key in sorted(seen):
            text = seen[key]
            if text is not None:
                yield key, text

    @property
    def random(self) -> random.Random:
        """The unit's own source of randomness, the same again for the same seed."""
        if self._random is None:
            self._random = random.Random(self.seed)
        return self._random

    # -- what the hook does --

    def write(self, key: str, text: str | None) -> None:
        """Note a write; None deletes."""
        self.check_open(key)
        if self.increments:
            self.increments.pop(key, None)
        self.writes[key] = text

    def add(self, key: str, by: int | float, text: str) -> None:
        """Note an increment: `text` is what this unit sees, `by` is what is merged if another unit was faster."""
        self.check_open(key)
        if key in self.increments:
            self.increments[key] += by
        elif key not in self.writes:
            self.increments[key] = by
        self.writes[key] = text

    def emit(self, emission: Emission) -> None:
        self.check_open(f"event {emission.type}")
        self.emissions.append(emission)

    def submit(self, submission: Submission) -> None:
        self.check_open(f"task {submission.record.name}")
        self.submissions.append(submission)

    def measure(self, kind: MetricKind, channel: str, name: str, value: float) -> None:
        """Note what a metric was measured as."""
        self.check_open(f"metric {name}")
        if self.measurements is None:
            self.measurements = Measurements()
        self.measurements.add(kind, channel, name, value)

    def measure_all(self, channel: str, values: Mapping[str, float]) -> None:
        """Note several gauges of a channel."""
        for name, value in values.items():
            self.measure("gauge", channel, name, value)

    def check_open(self, what: str) -> None:
        if self.closed:
            raise UnitClosed(
                f"{self.subject}: the {self.kind} unit of iteration {self.iteration} has ended, so {what!r} can't be "
                "changed through its context any more; await what you start in a hook, or use "
                "`await controller.transact(fn)` from outside"
            )

    # -- how it ended --

    def fail(self, outcome: Outcome, failure: Failure | None) -> None:
        """Drop everything that the hook did and note how it ended."""
        self.closed = True
        self.outcome = outcome
        self.failure = failure
        self.writes = {}
        self.increments = {}
        self.emissions = []
        self.submissions = []
        self.measurements = None
        self.subscriptions = []

    def conflict(self) -> str | None:
        """Return a key that this unit wrote and another unit has changed since it began, None where there is none.

        Keys that were only read do not count; keys that were only incremented are merged.
        """
        if self.shadow is None:
            return None
        for key in self.writes:
            if key in self.shadow and (key not in self.increments or not self._can_merge(key)):
                return key
        return None

    def _can_merge(self, key: str) -> bool:
        """True where the value of now is a number that the increment still fits."""
        cell = self.state.cells.get(key)
        value = 0 if cell is None else decode(cell.text)
        return type(value) in (int, float) and abs(value + self.increments[key]) <= INT_MAX

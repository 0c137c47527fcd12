"""A clock that stands still until a test lets time pass.

Time passes only while a loop waits: `wait` moves the clock to the moment that the loop waits for, if a test has
allowed time to come that far, and else leaves the loop waiting. So a loop goes from due time to due time, as fast
as the machine allows, and what a hook does takes no time at all.
"""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta

from ael_store.clock import Bell, from_us, to_us
from ael_store.errors import InvalidValue, InvalidValueType
from ael_store.model.duration import due_us

__all__ = ["START", "Length", "VirtualClock", "as_instant"]

START = datetime(2026, 1, 1, tzinfo=UTC)
"""When virtual time begins, unless told otherwise."""

Length = float | str | timedelta | datetime
"""Seconds, `"3 days"`, a timedelta, or the time at which it ends."""


class VirtualClock:
    """Time, ids and randomness of a simulated loop: `AELController(…, clock=VirtualClock())`.

    `start` is an aware time (a naive one is UTC) or ISO text; the same `seed` gives the same randomness. A
    `Harness` has one of these already.
    """

    real = False

    def __init__(self, start: datetime | str = START, seed: int = 0) -> None:
        self._start_us = to_us(as_instant(start))
        self._passed_us = 0
        self._allowed_us = 0
        """How far time may go; `_passed_us` is how far it has come."""
        self._random = random.Random(seed)
        self._bell: Bell | None = None
        """Of the loop that waits now."""

    @property
    def now(self) -> datetime:
        """The time, in UTC."""
        return from_us(self.now_us())

    def now_us(self) -> int:
        """Return the time in microseconds since 1970 UTC."""
        return self._start_us + self._passed_us

    def monotonic(self) -> float:
        """Return the seconds that have passed since the start."""
        return self._passed_us / 1e6

    def seed(self) -> int:
        """Return the next seed of the series."""
        return self._random.getrandbits(31)

    # -- moving --

    def advance(self, duration: Length) -> None:
        """Let this much time pass, from due time to due time, while a loop waits. Returns at once."""
        self._allow(self._target_us(duration))

    def jump(self, duration: Length) -> None:
        """Be this much later at once, as after the machine was suspended: what was due meanwhile is late."""
        target_us = self._target_us(duration)
        self._passed_us = max(self._passed_us, target_us)
        self._allow(target_us)

    def _target_us(self, duration: Length) -> int:
        """Return where a length of time from now ends, in microseconds since the start."""
        try:
            target_us = due_us(duration, self.now_us()) - self._start_us
        except InvalidValueType:
            raise InvalidValueType(
                f"{duration!r} ({type(duration).__name__}) is no length of time: "
                "pass seconds, '3 days', a timedelta or the time at which it ends"
            ) from None
        if target_us < self._passed_us:
            raise InvalidValue(f"{duration} is over: it is {self.now.isoformat()} already")
        return target_us

    def _allow(self, target_us: int) -> None:
        self._allowed_us = max(self._allowed_us, target_us)
        if self._bell is not None:
            self._bell.ring()  # the loop finds nothing due, and waits again: this time for as long as is allowed

    def _halt(self) -> None:
        """Let no more time pass than has."""
        self._allowed_us = self._passed_us

    # -- waiting --

    async def wait(self, bell: Bell, until: float | None) -> None:
        """Return when the bell has rung, or at the monotonic time `until`, once time may come that far."""
        if not bell.rung:
            if until is not None and self._reaches(until):
                self._move(until)
                return
            self._passed_us = max(self._passed_us, self._allowed_us)
        self._bell = bell
        try:
            await bell.wait()
        finally:
            self._bell = None

    def _reaches(self, until: float) -> bool:
        return round(until * 1e6) <= self._allowed_us

    def _move(self, until: float) -> None:
        target_us = round(until * 1e6)
        if target_us <= self._passed_us and until > self.monotonic():
            target_us = self._passed_us + 1  # less than a microsecond: time must not stand still
        self._passed_us = max(self._passed_us, target_us)


def as_instant(when: datetime | str) -> datetime:
    """Return a time given as such or as ISO text; a naive one is UTC."""
    if isinstance(when, str):
        try:
            when = datetime.fromisoformat(when)
        except ValueError:
            raise InvalidValue(f"{when!r} is no time: write one like '2026-01-31T12:00:00+00:00'") from None
    if not isinstance(when, datetime):
        raise InvalidValueType(f"{when!r} is {type(when).__name__}, wanted is a datetime or ISO text")
    return when if when.tzinfo is not None else when.replace(tzinfo=UTC)

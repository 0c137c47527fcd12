"""Time, ids and randomness: one injectable source, so that a whole system can be simulated from a seed.

`SystemClock` is the real one. `ael_store.testing.VirtualClock` moves only when a test says so.
Wall time is for people and schedules; order goes by number and durations by the monotonic clock. A run looks at the
wall once a round (`HeldClock`), so that a clock that is set never does so in the middle of something.
"""

from __future__ import annotations

import asyncio
import random
import secrets
import sys
import time
from datetime import UTC, datetime
from functools import lru_cache
from typing import Protocol

__all__ = ["Bell", "Clock", "HeldClock", "SystemClock", "from_us", "iso", "to_us"]

SLACK_US = 10_000
"""By so much a run lets the wall clock be off before it follows."""


class Bell:
    """Wakes one waiting task; rung before it waits, it does not wait at all. Belongs to one event loop."""

    def __init__(self) -> None:
        self.rung = False
        self._waiter: asyncio.Future[None] | None = None

    def ring(self) -> None:
        """Wake the waiter now, or keep the next one from waiting. On the event loop's thread only."""
        self.rung = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def wait(self, timeout_s: float | None = None) -> None:
        """Wait until the bell rings or the time is over."""
        if not self.rung:
            loop = asyncio.get_running_loop()
            self._waiter = waiter = loop.create_future()
            timer = None
            if timeout_s is not None:
                timer = loop.call_later(max(0.0, timeout_s), self._time_is_over, waiter)
            try:
                await waiter
            finally:
                self._waiter = None
                if timer is not None:
                    timer.cancel()
        self.rung = False

    @staticmethod
    def _time_is_over(waiter: asyncio.Future[None]) -> None:
        if not waiter.done():
            waiter.set_result(None)


class Clock(Protocol):
    """What the loop asks instead of the `time` and `random` modules."""

    real: bool
    """False where time is virtual, so that nothing may wake by the machine's clocks."""

    def now_us(self) -> int:
        """Microseconds since 1970 UTC by the wall clock, which may jump."""
        ...

    def monotonic(self) -> float:
        """Seconds since some start, never going back; they pass while the machine is suspended too."""
        ...

    def seed(self) -> int:
        """A fresh non-negative 31-bit seed for the random source of a unit."""
        ...

    async def wait(self, bell: Bell, until: float | None) -> None:
        """Wait until the bell rings, or the monotonic clock has reached `until`."""
        ...


class SystemClock:
    """The machine's clocks and its source of randomness."""

    real = True

    def __init__(self) -> None:
        self._random = random.Random(secrets.randbits(128))

    def now_us(self) -> int:
        return time.time_ns() // 1000

    if hasattr(time, "CLOCK_BOOTTIME"):

        def monotonic(self) -> float:
            return time.clock_gettime(time.CLOCK_BOOTTIME)

    elif sys.platform == "darwin":

        def monotonic(self) -> float:
            return time.clock_gettime(time.CLOCK_MONOTONIC)  # `time.monotonic` stands still while a Mac sleeps

    else:

        def monotonic(self) -> float:
            return time.monotonic()

    def seed(self) -> int:
        return self._random.getrandbits(31)

    async def wait(self, bell: Bell, until: float | None) -> None:
        await bell.wait(None if until is None else until - self.monotonic())


class HeldClock:
    """A clock whose wall time runs with the monotonic one, and is compared with the wall only by `look`.

    Instants that a run computes between two looks fit together, so a jump can be added to all of them. If each
    question went to the wall, a delay computed just after it was set would be moved by the jump once more.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._ahead_us = clock.now_us() - round(clock.monotonic() * 1e6)
        self.real = clock.real
        self.monotonic = clock.monotonic
        self.seed = clock.seed
        self.wait = clock.wait

    def now_us(self) -> int:
        """Microseconds since 1970 UTC by the wall clock as it was at the last look, and what has passed since."""
        return round(self.monotonic() * 1e6) + self._ahead_us

    def look(self) -> int:
        """Take over the wall clock; returns by how many microseconds it was moved, 0 where that is hardly anything.

        What is hardly anything is not taken over before it adds up: whoever adds the jump to every instant that
        counts keeps their order exactly.
        """
        ahead_us = self._clock.now_us() - round(self.monotonic() * 1e6)
        jump_us = ahead_us - self._ahead_us
        if abs(jump_us) < SLACK_US:
            return 0
        self._ahead_us = ahead_us
        return jump_us


@lru_cache(maxsize=16)  # a unit asks for its own moment again and again
def from_us(us: int) -> datetime:
    """Return microseconds since 1970 as an aware UTC time."""
    seconds, rest = divmod(us, 1_000_000)
    return datetime.fromtimestamp(seconds, UTC).replace(microsecond=rest)


def to_us(when: datetime) -> int:
    """Return a time as microseconds since 1970 UTC; a naive time is taken as UTC."""
    if when.tzinfo is None:
        when = when.replace(tzinfo=UTC)
    delta = when - datetime(1970, 1, 1, tzinfo=UTC)
    return (delta.days * 86_400 + delta.seconds) * 1_000_000 + delta.microseconds


def iso(us: int) -> str:
    """Return microseconds since 1970 as `2026-01-31T12:00:00.000000Z`, as the views print it."""
    return from_us(us).replace(tzinfo=None).isoformat(timespec="microseconds") + "Z"

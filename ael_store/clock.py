"""Time, ids and randomness: one injectable source, so that a whole system can be simulated from a seed.

`SystemClock` is the real one. `ael_store.testing.VirtualClock` moves only when a test says so.
Wall time is for people and schedules; order goes by number and durations by the monotonic clock.
"""

from __future__ import annotations

import asyncio
import random
import secrets
import time
from datetime import UTC, datetime
from typing import Protocol

__all__ = ["Bell", "Clock", "SystemClock", "from_us", "iso", "to_us"]


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

    else:

        def monotonic(self) -> float:
            return time.monotonic()

    def seed(self) -> int:
        return self._random.getrandbits(31)

    async def wait(self, bell: Bell, until: float | None) -> None:
        await bell.wait(None if until is None else until - self.monotonic())


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
    return from_us(us).strftime("%Y-%m-%dT%H:%M:%S.%fZ")

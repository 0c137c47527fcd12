"""Limits: what tasks may use of something, reserved before each attempt, durable over restarts.

- `concurrency`: attempts that run at once; one that was given up and still runs counts.
- `per_minute`: attempts begun within the 60 s before, at any moment (a sliding window, not minutes of the clock).
- `per_day`, `usd_per_day`: attempts begun, and money, since 00:00 UTC.

Money can't be known before: an attempt reserves `@task(max_usd=…)`, else the largest cost that the limit has seen
this day, and while none is known attempts run one at a time. What it cost then takes the place of what was reserved;
of an attempt whose end nobody knows, what was reserved stays spent.

Errors of a provider hold a limit (a circuit breaker): after `breaker` different tasks in a row have failed, no
attempt is made for 30 s, then one, which says whether it is back; the pause doubles up to 10 minutes. `RetryAfter`
holds it for as long as it says. Attempts that fail while it is held count for nothing.
"""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass
from decimal import Decimal

import orjson

from ael_store.clock import iso
from ael_store.model.records import LimitRecord, LimitUse
from ael_store.settings import TaskLimit

__all__ = ["Block", "Limit"]

MINUTE_US = 60_000_000
DAY_US = 86_400_000_000
FIRST_HOLD_S = 30
LONGEST_HOLD_S = 600
BOUNDS = ("concurrency", "per_minute", "per_day", "usd_per_day")

log = logging.getLogger("ael_store.tasks")


@dataclass(frozen=True, slots=True)
class Block:
    """Why no attempt may begin now."""

    reason: str
    until_us: int | None
    """When that may be over by itself; None where it takes an attempt that ends, or an operator."""

    def moved(self, by_us: int) -> Block:
        """Return the same after the wall clock was set."""
        return Block(self.reason, None if self.until_us is None else self.until_us + by_us)


class Limit:
    """One limit in a run: its bounds, what is used of them, and whether its tasks fail."""

    def __init__(self, record: LimitRecord, breaker: int, use: LimitUse) -> None:
        self.record = record
        self.breaker = breaker
        self.running = 0
        """Attempts that run, or were given up and still do."""
        self.reserved = Decimal(0)
        """Money reserved by attempts that run."""
        self._starts = deque(use.starts_us)
        self._day = 0
        self._starts_today = use.starts_today
        self._spent = Decimal(use.usd_today)
        self._largest = Decimal(use.largest_usd)
        self._failing: set[int] = set()
        self._probing = False
        self._open = 0
        """Attempts whose end was not taken up; those that were given up are not among them."""

    @property
    def name(self) -> str:
        return self.record.name

    @classmethod
    def of(
        cls, name: str, known: LimitRecord | None, wanted: TaskLimit | None, use: LimitUse, now_us: int
    ) -> tuple[Limit, bool]:
        """Return the limit of a name, and whether its row has changed: by other settings than last time.

        What an operator has raised holds until the settings themselves say something else.
        """
        configured = "null" if wanted is None else orjson.dumps(wanted.bounds()).decode()
        record = known or LimitRecord(name, None, None, None, None, "", "{}", 0, None, None, None, None, None)
        changed = record.configured != configured
        if changed:
            if record.raised != "{}":
                log.warning("limit %s: its settings have changed, so what an operator had raised ends", name)
            record.configured, record.raised = configured, "{}"
        limit = cls(record, 3 if wanted is None else wanted.breaker, use)
        limit._day = now_us // DAY_US
        if changed:
            limit.take_bounds()
        if wanted is None and changed:
            log.warning(
                "limit %r is in no settings, so it bounds nothing: add a table [limits.%s], or set it with "
                "`ael limits raise %s`",
                *(name, name, name),
            )
        return limit, changed

    def take_bounds(self) -> None:
        """Bring the bounds to what the settings and an operator say."""
        bounds = {**(orjson.loads(self.record.configured) or {}), **orjson.loads(self.record.raised)}
        for bound in BOUNDS:
            value = bounds.get(bound)
            setattr(self.record, bound, str(value) if bound == "usd_per_day" and value is not None else value)

    # -- before an attempt --

    def is_probing(self, now_us: int) -> bool:
        """True where its tasks have failed, its pause is over, and one attempt may say whether it is back."""
        held_us = self.record.held_until_us
        return self.record.opened > 0 and held_us is not None and held_us <= now_us and not self._open

    def estimate(self, max_usd: Decimal | None) -> Decimal:
        """Return what an attempt is expected to cost at most."""
        return self._largest if max_usd is None else max_usd

    def block(self, estimate: Decimal, now_us: int) -> Block | None:
        """Return why no attempt may begin now; None where one may."""
        record = self.record
        self._turn_day(now_us)
        if record.held_until_us is not None:
            if now_us < record.held_until_us:
                return Block(record.held_because or "held", record.held_until_us)
            if record.opened and (self._probing or self._open):
                return Block(f"one attempt at a time, to see whether it is back: {record.held_because}", None)
        if record.concurrency is not None and self.running >= record.concurrency:
            return Block(f"{record.concurrency} at once", None)
        self._forget_starts(now_us)
        if record.per_minute is not None and len(self._starts) >= record.per_minute:
            until_us = self._starts[-record.per_minute] + MINUTE_US if record.per_minute else None
            return Block(f"{record.per_minute} a minute", until_us)
        tomorrow_us = (now_us // DAY_US + 1) * DAY_US
        if record.per_day is not None and self._starts_today >= record.per_day:
            return Block(f"{record.per_day} a day", tomorrow_us)
        if record.usd_per_day is not None:
            if estimate > Decimal(record.usd_per_day):
                return Block(f"${record.usd_per_day} a day, and an attempt may cost ${estimate}", None)
            left = Decimal(record.usd_per_day) - self._spent - self.reserved
            if left <= 0 or estimate > left:
                return Block(f"${record.usd_per_day} a day", None if self.running else tomorrow_us)
            if estimate == 0 and self.running:
                return Block("one attempt at a time, until one has said what it costs", None)
        return None

    def begin(self, estimate: Decimal, now_us: int) -> None:
        """An attempt begins: it is counted from now on."""
        self._turn_day(now_us)
        self.running += 1
        self._open += 1
        self._forget_starts(now_us)
        self._starts.append(now_us)
        self._starts_today += 1
        self.reserved += estimate
        self._probing = self.record.opened > 0

    def withdraw(self, estimate: Decimal) -> None:
        """The attempt that began last does not take place: its task was there already."""
        self.running -= 1
        self._open -= 1
        self.reserved -= estimate
        self._starts_today -= 1
        self._probing = False
        if self._starts:
            self._starts.pop()

    # -- after it --

    def end(self, estimate: Decimal, cost: Decimal | None) -> None:
        """An attempt has ended; None for a cost that nobody will know."""
        self._open -= 1
        self.reserved -= estimate
        self._spent += estimate if cost is None else cost
        self._largest = max(self._largest, cost or Decimal(0))

    def free(self) -> None:
        """The code of an attempt does not run any more."""
        self.running -= 1

    def judge(self, task_id: int, good: bool | None, why: str, now_us: int) -> bool:
        """Count a success (True) or an error (False) of an attempt; True where the limit is held because of errors.

        None says nothing about the provider.
        """
        record, was_probing = self.record, self._probing
        self._probing = False
        if good:
            self._failing.clear()
            if record.held_until_us is not None and record.held_until_us <= now_us:
                self.release()
                log.info("limit %s: it is back, its tasks go on", self.name)
            return False
        if good is None:
            return False
        if record.held_until_us is not None and (was_probing or now_us < record.held_until_us):
            if was_probing:
                self._hold_after_errors(why, now_us)
            return True
        self._failing.add(task_id)
        if not self.breaker or len(self._failing) < self.breaker:
            return False
        self._hold_after_errors(why, now_us)
        return False  # those that led to it have failed

    def _hold_after_errors(self, why: str, now_us: int) -> None:
        record = self.record
        record.opened += 1
        seconds = min(LONGEST_HOLD_S, FIRST_HOLD_S * 2 ** min(10, record.opened - 1))
        self._failing.clear()
        self.hold(now_us + seconds * 1_000_000, f"its tasks fail: {why}")
        log.error("limit %s: its tasks fail, so none is started for %d s: %s", self.name, seconds, why)

    def hold(self, until_us: int, why: str) -> None:
        """Begin no attempt before an instant."""
        record = self.record
        if record.held_until_us is None or until_us > record.held_until_us:
            record.held_until_us, record.held_because = until_us, why[:500]

    def release(self) -> bool:
        """End a hold; True where there was one."""
        record = self.record
        was_held = record.held_until_us is not None
        record.opened, record.held_until_us, record.held_because = 0, None, None
        self._failing.clear()
        return was_held

    # -- what is said about it --

    def show(self, block: Block | None, now_us: int) -> bool:
        """Say in its row whether tasks wait because of it; True where that has changed."""
        record = self.record
        if block is None:
            if record.blocked_us is None:
                return False
            record.blocked_us = record.blocked_because = record.blocked_until_us = None
            return True
        if record.blocked_us is None:
            record.blocked_us = now_us
            until = f", until {iso(block.until_us)}" if block.until_us else ""
            log.info("limit %s is reached (%s)%s", self.name, block.reason, until)
        elif (record.blocked_because, record.blocked_until_us) == (block.reason, block.until_us):
            return False
        record.blocked_because, record.blocked_until_us = block.reason, block.until_us
        return True

    def jumped(self, by_us: int) -> None:
        """The wall clock was set: pauses and the last minute take as long as they would have."""
        self._starts = deque(start_us + by_us for start_us in self._starts)
        record = self.record
        if record.held_until_us is not None:
            record.held_until_us += by_us
        if record.blocked_until_us is not None:
            record.blocked_until_us += by_us

    def _forget_starts(self, now_us: int) -> None:
        while self._starts and self._starts[0] <= now_us - MINUTE_US:
            self._starts.popleft()

    def _turn_day(self, now_us: int) -> None:
        day = now_us // DAY_US
        if day > self._day:  # a clock that is set back does not give a day twice
            self._day, self._starts_today = day, 0
            self._spent = self._largest = Decimal(0)

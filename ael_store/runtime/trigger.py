"""APScheduler, and nothing else in this package imports it.

Two services: *when* an agent's trigger fires (`FireTimes`, pure arithmetic on UTC), and *waking* the loop at a
moment (`Alarm`). The alarm only wakes: what is due is decided by the loop, by the monotonic clock and our own
tables, so that a scheduler that stops (a clock set back, a lost wake-up) costs a moment and not the loop.

Cron lines mean what cron means: 0 and 7 are Sunday (APScheduler counts from Monday), and where a line names both a
day of the month and a weekday, one of them is enough (APScheduler wants both). A local time that a change of clocks
repeats fires once, the first time; one that it skips fires as long after the gap began (02:30 at 03:30). Where the
hour is `*`, the line fires at every real time that fits. APScheduler only finds the next local time on a clock that
never changes: its own arithmetic leaves out the day after such a change (`0 0 * * *` in most of Europe).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

from apscheduler.schedulers.asyncio import AsyncIOScheduler
from apscheduler.triggers.base import BaseTrigger
from apscheduler.triggers.cron import CronTrigger

from ael_store.clock import Clock, from_us, to_us
from ael_store.errors import InvalidTrigger
from ael_store.model.duration import parse_duration

__all__ = ["Alarm", "FireTimes", "parse_trigger"]

EARLIEST_US = 1_704_067_200_000_000
"""The first of January 2024: a cron line that does not fire after it never will."""
WEEKDAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat", "sun")
MACROS = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
}

logging.getLogger("apscheduler").setLevel(logging.WARNING)


class FireTimes:
    """When a trigger fires."""

    def __init__(self, text: str, period_us: int | None, crons: tuple[_Cron, ...] = ()) -> None:
        self.text = text
        self.period_us = period_us
        self._crons = crons

    @property
    def each_hour(self) -> bool:
        """True for a cron line whose hour is `*`."""
        return any(cron.each_hour for cron in self._crons)

    def after(self, last_us: int) -> int | None:
        """Return the first fire time after an instant (for `every`, counted from it); None where there is none."""
        if self.period_us is not None:
            return last_us + self.period_us
        found = [at for cron in self._crons if (at := cron.after(from_us(last_us))) is not None]
        return to_us(min(found)) if found else None


class _Cron:
    """A cron line of one kind of day: local times, and what they are in the zone."""

    def __init__(self, zone: ZoneInfo, minute: str, hour: str, day: str, month: str, weekday: str) -> None:
        self._zone = zone
        self.each_hour = hour.startswith("*")
        self._local = CronTrigger(
            minute=minute, hour=hour, day=day, month=month, day_of_week=_weekdays(weekday), timezone=UTC
        )

    def after(self, last: datetime) -> datetime | None:
        """Return the first fire time after an instant, in UTC."""
        slack = self._changes_near(last)
        local = last.astimezone(self._zone).replace(tzinfo=None) - slack
        best: datetime | None = None
        while (found := self._next_local(local)) is not None:
            local = found
            best = min((at for at in self._instants(local) if at > last and (best is None or at < best)), default=best)
            # Near a change, a later local time may come earlier.
            if best is not None and local - best.astimezone(self._zone).replace(tzinfo=None) >= self._changes_near(
                best
            ):
                break
        return best

    def _next_local(self, local: datetime) -> datetime | None:
        after = local.replace(tzinfo=UTC) + timedelta(microseconds=1)
        found = self._local.get_next_fire_time(None, after)
        return None if found is None else found.replace(tzinfo=None)

    def _instants(self, local: datetime) -> tuple[datetime, ...]:
        """Return when it is this local time: once, twice, or (where it is skipped) as long after the gap began."""
        one, two = (local.replace(tzinfo=self._zone, fold=fold).astimezone(UTC) for fold in (0, 1))
        if not self.each_hour or one == two:
            return (one,)
        return (one, two) if one < two else ()

    def _changes_near(self, moment: datetime) -> timedelta:
        """Return by how much the clock of the zone is changed about a day before or after an instant."""
        day = timedelta(hours=26)
        offsets = [at.astimezone(self._zone).utcoffset() or timedelta() for at in (moment - day, moment, moment + day)]
        return max(offsets) - min(offsets)


def parse_trigger(text: str, default_zone: str = "UTC", subject: str = "trigger") -> FireTimes:
    """Return the fire times of `every 30s`, or of a cron line of five fields with an optional IANA zone.

    Raises InvalidTrigger with what was found and what is wanted.
    """
    if type(text) is not str or not text.strip():
        raise InvalidTrigger(f"{subject}: {text!r} is no trigger; write 'every 30s' or a cron line like '0 7 * * 1-5'")
    words = text.split()
    if words[0].lower() == "every":
        try:
            seconds = parse_duration(" ".join(words[1:]))
        except ValueError as error:
            raise InvalidTrigger(f"{subject}: {text!r}: {error}") from None
        if not 0.001 <= seconds < 1e9:
            raise InvalidTrigger(f"{subject}: {text!r}: the period must be at least 1 ms and finite")
        return FireTimes(text, round(seconds * 1_000_000))
    if words[0] in MACROS:
        words = MACROS[words[0]].split() + words[1:]
    if len(words) not in (5, 6):
        raise InvalidTrigger(
            f"{subject}: {text!r} has {len(words)} words; write 'every 30s', or five cron fields "
            "(minute hour day month weekday) and optionally a zone: '30 2 * * 0 Europe/Ljubljana'"
        )
    zone_name = words[5] if len(words) == 6 else default_zone
    try:
        zone = ZoneInfo(zone_name)
    except Exception:
        raise InvalidTrigger(
            f"{subject}: {zone_name!r} is no IANA time zone known to this machine; "
            "write one like 'Europe/Ljubljana' or 'UTC'"
        ) from None
    minute, hour, day, month, weekday = (word.replace("?", "*") for word in words[:5])
    either = [(day, weekday)]
    if not day.startswith("*") and not weekday.startswith("*"):
        either = [(day, "*"), ("*", weekday)]  # as cron has it: one of them is enough
    try:
        crons = tuple(_Cron(zone, minute, hour, day, month, weekday) for day, weekday in either)
    except (ValueError, TypeError) as error:
        raise InvalidTrigger(f"{subject}: {text!r} is no cron line: {error}") from None
    times = FireTimes(text, None, crons)
    if times.after(EARLIEST_US) is None:
        raise InvalidTrigger(f"{subject}: {text!r} never fires: there is no such day")
    return times


def _weekdays(field: str) -> str:
    """Translate the weekday field of cron (0 and 7 are Sunday) into APScheduler's names."""
    parts: list[str] = []
    for part in field.lower().split(","):
        body, _, step = part.partition("/")
        if body == "*":
            if step:
                parts += [WEEKDAYS[day] for day in range(0, 7, _step(step))]
            else:
                parts.append("*")
            continue
        first, dash, last = body.partition("-")
        start = _weekday(first)
        if not dash:
            end = 6 if step else start
        else:
            end = _weekday(last)
            if end == 0 and start > 0:
                end = 7
        if end < start:
            end += 7
        parts += [WEEKDAYS[day % 7] for day in range(start, end + 1, _step(step) if step else 1)]
    return ",".join(dict.fromkeys(parts))


def _weekday(word: str) -> int:
    if re.fullmatch(r"0?[0-7]", word):
        return int(word)
    if word in WEEKDAYS:
        return WEEKDAYS.index(word)
    raise ValueError(f"{word!r} is no weekday; write 0 to 7 (0 and 7 are Sunday) or sun to sat")


def _step(word: str) -> int:
    if not word.isdigit() or int(word) < 1:
        raise ValueError(f"{word!r} is no step")
    return int(word)


class _At(BaseTrigger):  # type: ignore[misc]
    """Fires when the alarm says so."""

    def __init__(self, alarm: Alarm) -> None:
        self.alarm = alarm

    def get_next_fire_time(self, previous_fire_time: datetime | None, now: datetime) -> datetime | None:
        due = self.alarm.due
        if due is None or previous_fire_time is not None:  # once for each time it is armed
            return now + timedelta(days=1)
        return now + timedelta(seconds=max(0.0, due - self.alarm.clock.monotonic()))


class Alarm:
    """Wakes the loop at an instant of the monotonic clock, by a job of APScheduler in memory.

    The job is armed anew from the monotonic clock each time, so a jump of the wall clock moves it by nothing.
    """

    def __init__(self, clock: Clock, wake: Callable[[], None]) -> None:
        self.clock = clock
        self.due: float | None = None
        self._wake = wake
        self._scheduler = AsyncIOScheduler(timezone=UTC)
        self._job: object | None = None

    def start(self) -> None:
        """Start APScheduler on the running event loop."""
        self._scheduler.start()
        self._job = self._scheduler.add_job(
            self._fire, _At(self), id="ael", max_instances=100, coalesce=True, misfire_grace_time=None
        )

    def arm(self, due: float | None) -> None:
        """Wake the loop at `due` (monotonic seconds), or not at all for None."""
        if due == self.due:
            return
        self.due = due
        self.rearm()

    def rearm(self) -> None:
        """Compute the job's wall time again: after a jump of the wall clock, or when it came too late."""
        if self._job is not None:
            self._scheduler.reschedule_job("ael", trigger=_At(self))

    async def _fire(self) -> None:
        self._wake()

    def stop(self) -> None:
        """Stop APScheduler; nothing wakes the loop after this."""
        if self._job is not None:
            self._job = None
            self._scheduler.shutdown(wait=False)

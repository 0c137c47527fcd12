"""Clocks that are set, machines that sleep, days with 23 and 25 hours; and the short form of `./dev torture clocks`."""

from __future__ import annotations

import asyncio
import random
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ael_store import Event
from ael_store.clock import HeldClock, SystemClock, from_us, iso, to_us
from ael_store.model.records import ScheduleRecord
from ael_store.runtime.schedules import Schedules
from ael_store.runtime.trigger import parse_trigger
from tests.faults.clocks import BASE, FAR, HOUR, Clocked
from tests.faults.shim import require
from tests.loops import agent, controller_on, iterations_of, rows, running, until

DAY_US = 86_400_000_000


class SetClock(SystemClock):
    """The machine's clock, whose wall time can be set."""

    def __init__(self) -> None:
        super().__init__()
        self.ahead_us = 0

    def now_us(self) -> int:
        return super().now_us() + self.ahead_us

    def set_by(self, length: timedelta) -> None:
        self.ahead_us += length // timedelta(microseconds=1)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ael.db"


BACK, FORTH = timedelta(hours=-2), timedelta(hours=2)


# -- a real process ----------------------------------------------------------------------------------


@pytest.mark.timeout(300)
def test_process_goes_on_whatever_its_clocks_say(tmp_path: Path) -> None:
    require()
    clocked = Clocked(tmp_path)
    try:
        clocked.start()
        clocked.set_by(2 * HOUR)
        clocked.set_by(-2 * HOUR)
        clocked.suspend(HOUR)
        clocked.set_to(FAR[0])
        clocked.set_to(FAR[2])
        clocked.set_to(BASE)
        clocked.stop()
    finally:
        clocked.kill()

    report = clocked.report("")
    assert report.failures == ()
    assert report.trials == 6


# -- pauses and delays count real time ---------------------------------------------------------------


@pytest.mark.parametrize("length", [BACK, FORTH], ids=["back", "forth"])
def test_timer_takes_as_long_as_it_was_set_for(path: Path, length: timedelta) -> None:
    clock = SetClock()
    rung: list[str] = []

    def start(context: Any) -> None:
        context.emit("soon", after=0.2)
        context.emit("later", after="1h")

    async def scene() -> None:
        bell = agent(
            "bell", start=start, event=lambda event, context: rung.append(event.type), subscriptions=("*r", "soon")
        )
        controller = controller_on(path, bell, clock=clock)
        async with running(controller):
            clock.set_by(length)
            await until(lambda: rung, "the timer rings")
            await iterations_of(controller, 3)

    asyncio.run(scene())

    assert rung == ["soon"]


def test_event_for_a_time_of_the_wall_comes_when_the_wall_says_so(path: Path) -> None:
    clock = SetClock()
    rung: list[str] = []

    async def scene() -> None:
        bell = agent(
            "bell",
            start=lambda context: context.emit("alarm", after=context.now + timedelta(hours=1)),
            event=lambda event, context: rung.append(event.type),
            subscriptions=("alarm",),
        )
        async with running(controller_on(path, bell, clock=clock)):
            clock.set_by(FORTH)
            await until(lambda: rung, "the alarm rings")

    asyncio.run(scene())

    assert rung == ["alarm"]


def test_timers_set_in_the_middle_of_a_jump_keep_their_order_and_their_length(path: Path) -> None:
    """What is computed after the clock was set and before the loop has seen it is not moved once more."""
    clock = SetClock()
    rung: list[int] = []

    def tick(context: Any) -> None:
        if context.iteration == 3:
            context.emit("ring", 1, after=0.1)
            clock.set_by(BACK)
            context.emit("ring", 2, after=0.1)
        elif context.iteration == 4:
            context.emit("ring", 3, after=0.1)

    async def scene() -> None:
        setter = agent("setter", tick=tick)
        bell = agent("bell", event=lambda event, context: rung.append(event.data), subscriptions=("ring",))
        async with running(controller_on(path, setter, bell, clock=clock)):
            await until(lambda: len(rung) == 3, "all ring")

    asyncio.run(scene())

    assert rung == [1, 2, 3]


@pytest.mark.parametrize("kind", ["tick", "delivery"])
def test_pause_after_errors_is_not_longer_because_the_clock_was_set_back(path: Path, kind: str) -> None:
    clock = SetClock()
    tries: list[int] = []

    def fail(*_arguments: Any) -> None:
        tries.append(1)
        raise RuntimeError

    async def scene() -> None:
        if kind == "tick":
            broken = agent("broken", tick=fail)
        else:
            broken = agent("broken", event=fail, start=lambda context: context.emit("work"), subscriptions=("work",))
        async with running(controller_on(path, broken, clock=clock, backoff_after=2)):
            first = 2 if kind == "tick" else 1
            await until(lambda: len(tries) == first, "it pauses")
            await asyncio.sleep(0)
            clock.set_by(BACK)
            await until(lambda: len(tries) > first, "it tries again")

    asyncio.run(scene())


@pytest.mark.parametrize("trigger", ["every 1h", "0 7 * * *", "* * * * *"])
def test_start_after_the_clock_was_wrong_does_not_wait_for_the_wrong_time(path: Path, trigger: str) -> None:
    clock = SetClock()

    async def scene() -> None:
        clock.set_by(timedelta(days=12 * 365))
        await controller_on(path, agent("late", trigger=trigger), clock=clock).run(2)
        clock.set_by(timedelta(days=-12 * 365))
        await controller_on(path, agent("late", trigger=trigger), clock=clock).run(2)

    asyncio.run(scene())

    [next_us] = rows(path, "SELECT next_us FROM schedules")
    assert 0 < next_us - SystemClock().now_us() <= DAY_US


def test_pause_of_an_earlier_run_is_no_longer_than_a_pause_can_be(path: Path) -> None:
    clock = SetClock()
    tries: list[int] = []

    def fail(context: Any) -> None:
        tries.append(1)
        raise RuntimeError

    async def scene() -> None:
        clock.set_by(timedelta(days=365))
        broken = agent("broken", tick=fail)
        async with running(controller_on(path, broken, clock=clock, backoff_after=1)):
            await until(lambda: tries)
        clock.set_by(timedelta(days=-365))
        await controller_on(path, agent("broken", tick=fail), clock=clock, backoff_after=1).run(2)

    asyncio.run(scene())

    [retry_us] = rows(path, "SELECT retry_us FROM agents WHERE name = 'broken'")
    assert retry_us - SystemClock().now_us() <= 300_000_000


def test_held_clock_follows_the_wall_only_when_it_looks() -> None:
    clock = SetClock()
    held = HeldClock(clock)
    before_us = held.now_us()

    clock.set_by(BACK)

    assert 0 <= held.now_us() - before_us < HOUR * 1_000_000
    assert abs(held.look() + 2 * HOUR * 1_000_000) < 1_000_000
    assert held.now_us() < before_us
    assert held.look() == 0


# -- schedules ---------------------------------------------------------------------------------------


class Wall:
    """A daily schedule on a clock that is set."""

    def __init__(self, line: str, now_us: int) -> None:
        journal: Any = SimpleNamespace(commit=SimpleNamespace(schedules={}))
        self.slot: Any = SimpleNamespace(
            name="daily",
            agent=SimpleNamespace(trigger=line),
            record=SimpleNamespace(id=1, priority=5),
            order=0,
            started=True,
            ready=lambda now_us: True,
        )
        self.records: dict[int, ScheduleRecord] = {}
        self.schedules = Schedules(journal, self.records, "UTC")
        self.now_us = now_us
        self.fires: list[datetime] = []
        slot: Any = self.slot
        self.schedules.add(slot, now_us)

    def pass_time(self, length: timedelta) -> None:
        """Let time pass, looking as often as the loop does."""
        end_us = self.now_us + length // timedelta(microseconds=1)
        while self.now_us < end_us:
            next_us = self.records[1].next_us
            assert next_us is not None
            self.now_us = min(end_us, max(next_us, self.now_us + 1))
            self._fire()

    def set_by(self, length: timedelta) -> None:
        by_us = length // timedelta(microseconds=1)
        self.now_us += by_us
        self.schedules.jumped(by_us, self.now_us)
        self._fire()

    def _fire(self) -> None:
        if self.schedules.due(self.now_us):
            self.fires.append(from_us(self.now_us))
            self.schedules.fired(self.slot, self.now_us)


@pytest.mark.parametrize("seed", range(20))
def test_daily_schedule_fires_once_a_day_whatever_the_clock_does(seed: int) -> None:
    source = random.Random(seed)
    wall = Wall("0 7 * * *", to_us(datetime(2026, 3, 1, 6, tzinfo=UTC)))

    for _ in range(200):
        wall.pass_time(timedelta(seconds=source.uniform(0, 5 * HOUR)))
        wall.set_by(timedelta(seconds=source.uniform(-2 * HOUR, 2 * HOUR)))
    wall.pass_time(timedelta(hours=3))

    days = [moment.date() for moment in wall.fires]
    first, last = days[0], days[-1]
    assert days == [first + timedelta(days=number) for number in range((last - first).days + 1)]
    assert len(days) > 10


def test_schedule_of_each_minute_is_not_silent_while_the_clock_repeats_hours() -> None:
    wall = Wall("* * * * *", to_us(datetime(2026, 3, 1, 6, tzinfo=UTC)))
    wall.pass_time(timedelta(minutes=10))

    wall.set_by(BACK)
    wall.pass_time(timedelta(minutes=10))

    assert len(wall.fires) == 20


def test_clock_that_is_put_right_by_years_leaves_no_schedule_behind() -> None:
    wall = Wall("0 7 * * *", to_us(datetime(2026, 3, 1, 8, tzinfo=UTC)))

    wall.set_by(timedelta(days=12 * 365))
    wall.set_by(timedelta(days=-12 * 365))
    wall.pass_time(timedelta(days=2))

    assert [moment.strftime("%Y-%m-%d %H:%M") for moment in wall.fires[1:]] == ["2026-03-02 07:00", "2026-03-03 07:00"]


@pytest.mark.parametrize(
    ("line", "start", "wanted"),
    [
        # the gap: as long after it began; the overlap: the first time
        ("30 2 * * * Europe/Berlin", "2026-03-28T12:00", ["03-29T01:30", "03-30T00:30"]),
        ("30 2 * * * Europe/Berlin", "2026-10-24T12:00", ["10-25T00:30", "10-26T01:30"]),
        ("30 2 * * * America/New_York", "2026-03-07T12:00", ["03-08T07:30", "03-09T06:30"]),
        ("30 1 * * * America/New_York", "2026-10-31T12:00", ["11-01T05:30", "11-02T06:30"]),
        # half an hour: 02:00 becomes 02:30 in October, 02:00 becomes 01:30 in April
        ("15 2 * * * Australia/Lord_Howe", "2026-10-03T06:00", ["10-03T15:45", "10-04T15:15"]),
        ("45 1 * * * Australia/Lord_Howe", "2026-04-04T06:00", ["04-04T14:45", "04-05T15:15"]),
    ],
)
def test_hour_that_is_skipped_or_repeated_fires_once(line: str, start: str, wanted: list[str]) -> None:
    times, moment_us = parse_trigger(line), to_us(datetime.fromisoformat(start))

    found = []
    for _ in wanted:
        next_us = times.after(moment_us)
        assert next_us is not None
        moment_us = next_us
        found.append(from_us(next_us).strftime("%m-%dT%H:%M"))

    assert found == wanted


@pytest.mark.parametrize("year", [1969, 2038, 2106])
def test_cron_line_has_a_next_time_in_any_year(year: int) -> None:
    next_us = parse_trigger("0 7 * * * Europe/Berlin").after(to_us(datetime(year, 2, 1, tzinfo=UTC)))

    assert next_us is not None
    assert from_us(next_us).hour == 6


# -- times that are printed ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "moment",
    [
        "0001-01-01T00:00:00.000000Z",
        "1969-12-31T23:59:59.999999Z",
        "2038-01-19T03:14:08.000001Z",
        "9999-12-31T23:59:59.999999Z",
    ],
)
def test_views_print_any_time_as_the_program_does(path: Path, moment: str) -> None:
    when = datetime.fromisoformat(moment)

    async def scene() -> None:
        controller = controller_on(path)
        controller.event_bus.publish(Event("old", "test", timestamp=when))
        await controller.run(2)

    asyncio.run(scene())

    assert rows(path, "SELECT emitted_at FROM v_events WHERE type = 'old'") == [moment]
    assert iso(to_us(when)) == moment

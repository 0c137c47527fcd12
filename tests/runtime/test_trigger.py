"""When a trigger fires: `every`, cron lines as cron means them, and days on which clocks change."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from itertools import islice, pairwise
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ael_store.clock import from_us, to_us
from ael_store.errors import InvalidTrigger
from ael_store.runtime.trigger import parse_trigger

LJUBLJANA = ZoneInfo("Europe/Ljubljana")


def fire_times(line: str, start: datetime) -> Iterator[datetime]:
    """Yield the fire times after a moment, in its zone."""
    times, last_us = parse_trigger(line), to_us(start)
    while (next_us := times.after(last_us)) is not None:
        assert next_us > last_us
        last_us = next_us
        yield from_us(next_us).astimezone(start.tzinfo)


def days(line: str, number: int, start: datetime | None = None) -> list[str]:
    """Return month and day of the first fire times, from 2026-01-01 (a Thursday)."""
    moments = fire_times(line, start or datetime(2025, 12, 31, 23, 59, 59, tzinfo=UTC))
    return [moment.strftime("%m-%d") for moment in islice(moments, number)]


# -- every -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("every 30s", 30),
        ("every 500ms", 0.5),
        ("every 1.5h", 5400),
        ("every 1h 30m", 5400),
        ("EVERY 2 Days", 172_800),
        ("  every   1 week ", 604_800),
        ("every 1ms", 0.001),
    ],
)
def test_every_fires_at_a_constant_distance(text: str, seconds: float) -> None:
    times = parse_trigger(text)

    assert times.period_us == seconds * 1e6
    assert times.after(1_000_000) == 1_000_000 + times.period_us


# -- cron --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weekday", "expected"),
    [
        ("0", ["01-04", "01-11"]),
        ("7", ["01-04", "01-11"]),
        ("sun", ["01-04", "01-11"]),
        ("1", ["01-05", "01-12"]),
        ("Mon", ["01-05", "01-12"]),
        ("01", ["01-05", "01-12"]),
        ("6", ["01-03", "01-10"]),
        ("1-5", ["01-01", "01-02", "01-05"]),
        ("5-7", ["01-02", "01-03", "01-04", "01-09"]),
        ("0-2", ["01-04", "01-05", "01-06", "01-11"]),
        ("sat-mon", ["01-03", "01-04", "01-05", "01-10"]),
        ("fri-sun", ["01-02", "01-03", "01-04", "01-09"]),
        ("1,3", ["01-05", "01-07", "01-12"]),
        ("0,7", ["01-04", "01-11"]),
        ("1-5/2", ["01-02", "01-05", "01-07", "01-09"]),
        ("*/2", ["01-01", "01-03", "01-04", "01-06"]),
        ("*", ["01-01", "01-02"]),
        ("?", ["01-01", "01-02"]),
    ],
)
def test_weekday_means_what_cron_means(weekday: str, expected: list[str]) -> None:
    assert days(f"0 12 * * {weekday}", len(expected)) == expected


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("0 0 13 * 5", ["01-02", "01-09", "01-13", "01-16"]),
        ("0 0 1,15 * mon", ["01-01", "01-05", "01-12", "01-15", "01-19"]),
        ("0 0 13 * *", ["01-13", "02-13"]),
        ("0 0 * * 5", ["01-02", "01-09"]),
        ("0 0 1 * ?", ["01-01", "02-01"]),
        ("0 0 ? * 1", ["01-05", "01-12"]),
        ("0 0 */10 * *", ["01-01", "01-11", "01-21", "01-31", "02-01"]),
        ("0 0 10-12 feb,APR *", ["02-10", "02-11", "02-12", "04-10"]),
        ("0 0 31 * *", ["01-31", "03-31", "05-31", "07-31"]),
        ("0 0 29 2 *", ["02-29"]),
        ("0 0 1 */5 *", ["01-01", "06-01", "11-01", "01-01"]),
    ],
)
def test_day_and_month_fields(line: str, expected: list[str]) -> None:
    assert days(line, len(expected)) == expected


@pytest.mark.parametrize(
    ("macro", "line"),
    [
        ("@hourly", "0 * * * *"),
        ("@daily", "0 0 * * *"),
        ("@midnight", "0 0 * * *"),
        ("@weekly", "0 0 * * 0"),
        ("@monthly", "0 0 1 * *"),
        ("@yearly", "0 0 1 1 *"),
        ("@annually", "0 0 1 1 *"),
    ],
)
@pytest.mark.parametrize("zone", ["", " Europe/Ljubljana"])
def test_macro_is_its_line(macro: str, line: str, zone: str) -> None:
    start = datetime(2026, 3, 28, 12, tzinfo=UTC)

    assert list(islice(fire_times(macro + zone, start), 30)) == list(islice(fire_times(line + zone, start), 30))


def test_zone_is_that_of_the_line_else_the_default() -> None:
    start_us = to_us(datetime(2026, 7, 1, tzinfo=UTC))

    hours = [
        from_us(parse_trigger(line, default).after(start_us) or 0).hour
        for line, default in (
            ("0 12 * * *", "UTC"),
            ("0 12 * * *", "Asia/Tokyo"),
            ("0 12 * * * Europe/Ljubljana", "Asia/Tokyo"),
        )
    ]

    assert hours == [12, 3, 10]


def field(low: int, high: int) -> st.SearchStrategy[str]:
    number = st.integers(low, high)
    step = st.integers(1, 5)
    span = st.tuples(number, number).map(sorted)
    part = st.one_of(
        number.map(str),
        span.map(lambda ends: f"{ends[0]}-{ends[1]}"),
        st.tuples(st.integers(low, high - 10 if high > 20 else low), step).map(
            lambda found: f"{found[0]}-{high}/{found[1]}"
        ),
    )
    return st.one_of(
        st.just("*"), step.map(lambda every: f"*/{every}"), st.lists(part, min_size=1, max_size=3).map(",".join)
    )


def members(text: str, low: int, high: int) -> set[int]:
    """The values that a field of cron names."""
    found: set[int] = set()
    for part in text.split(","):
        span, _, step = part.partition("/")
        first, _, last = (f"{low}-{high}" if span == "*" else span).partition("-")
        found |= set(range(int(first), int(last or first) + 1, int(step or 1)))
    return found


@given(minute=field(0, 59), hour=field(0, 23), day=field(1, 31), month=field(1, 12), weekday=field(0, 6))
@settings(max_examples=120, deadline=None)
def test_line_fires_when_a_plain_reading_of_its_fields_says_so(
    minute: str, hour: str, day: str, month: str, weekday: str
) -> None:
    start = datetime(2026, 1, 30, 13, 37, 11, tzinfo=UTC)
    minutes, hours = sorted(members(minute, 0, 59)), sorted(members(hour, 0, 23))
    both = not day.startswith("*") and not weekday.startswith("*")

    def wanted(moment: date) -> bool:
        on_day = moment.day in members(day, 1, 31)
        on_weekday = moment.isoweekday() % 7 in members(weekday, 0, 6)
        return moment.month in members(month, 1, 12) and (on_day or on_weekday if both else on_day and on_weekday)

    def expected() -> Iterator[datetime]:
        for number in range(800):
            moment = start + timedelta(days=number)
            if wanted(moment):
                for at_hour in hours:
                    for at_minute in minutes:
                        found = moment.replace(hour=at_hour, minute=at_minute, second=0)
                        if found > start:
                            yield found

    wanted_times = list(islice(expected(), 20))
    found = fire_times(f"{minute} {hour} {day} {month} {weekday}", start)

    assert list(islice(found, len(wanted_times))) == wanted_times


# -- clocks that change ------------------------------------------------------------------------------

SPRING = datetime(2026, 3, 28, 12, tzinfo=LJUBLJANA)  # 02:00 becomes 03:00 the night after
AUTUMN = datetime(2026, 10, 24, 12, tzinfo=LJUBLJANA)  # 03:00 becomes 02:00 the night after


@pytest.mark.parametrize(
    ("line", "start", "expected"),
    [
        ("30 2 * * *", SPRING, ["29 03:30 +02", "30 02:30 +02", "31 02:30 +02"]),
        ("30 2 * * *", AUTUMN, ["25 02:30 +02", "26 02:30 +01", "27 02:30 +01"]),
        ("0 0 * * *", SPRING, ["29 00:00 +01", "30 00:00 +02", "31 00:00 +02"]),
        ("0 0 * * *", AUTUMN, ["25 00:00 +02", "26 00:00 +01", "27 00:00 +01"]),
        ("0 3 * * *", SPRING, ["29 03:00 +02", "30 03:00 +02"]),
        ("0 3 * * *", AUTUMN, ["25 03:00 +01", "26 03:00 +01"]),
        ("*/20 2 * * *", SPRING, ["29 03:00 +02", "29 03:20 +02", "29 03:40 +02", "30 02:00 +02"]),
        ("*/30 2 * * *", AUTUMN, ["25 02:00 +02", "25 02:30 +02", "26 02:00 +01"]),
        ("30 2,3 * * *", SPRING, ["29 03:30 +02", "30 02:30 +02"]),
        ("0 * * * *", SPRING.replace(day=29, hour=0), ["29 01:00 +01", "29 03:00 +02", "29 04:00 +02"]),
        ("0 * * * *", AUTUMN.replace(day=25, hour=1), ["25 02:00 +02", "25 02:00 +01", "25 03:00 +01"]),
        ("*/30 * * * *", AUTUMN.replace(day=25, hour=2), ["25 02:30 +02", "25 02:00 +01", "25 02:30 +01"]),
        ("30 2 29 3 *", SPRING, ["29 03:30 +02"]),
        ("30 2 29 * 0", SPRING, ["29 03:30 +02", "05 02:30 +02"]),
    ],
)
def test_on_the_days_when_clocks_change(line: str, start: datetime, expected: list[str]) -> None:
    moments = islice(fire_times(f"{line} Europe/Ljubljana", start), len(expected))

    assert [moment.strftime("%d %H:%M %z")[:-2] for moment in moments] == expected


@pytest.mark.parametrize(
    ("zone", "starts"),
    [
        ("Europe/Ljubljana", [(2026, 3, 26), (2026, 10, 22)]),
        ("America/New_York", [(2026, 3, 5), (2026, 10, 29)]),
        ("America/Santiago", [(2026, 4, 2), (2026, 9, 3)]),  # changes at midnight
        ("Australia/Lord_Howe", [(2026, 4, 2), (2026, 10, 1)]),  # changes by half an hour
    ],
)
def test_daily_line_fires_once_on_every_day_whatever_its_time(zone: str, starts: list[tuple[int, int, int]]) -> None:
    for year, month, day in starts:
        start = datetime(year, month, day, tzinfo=ZoneInfo(zone))
        wanted = [(start + timedelta(days=number)).date() for number in range(6)]
        for hour in range(24):
            for minute in (0, 20, 59):
                moments = fire_times(f"{minute} {hour} * * * {zone}", start - timedelta(seconds=1))
                assert [moment.date() for moment in islice(moments, 6)] == wanted, (hour, minute)


@pytest.mark.parametrize("start", [SPRING, AUTUMN])
def test_hourly_line_fires_every_real_hour(start: datetime) -> None:
    moments = [moment.astimezone(UTC) for moment in islice(fire_times("15 * * * * Europe/Ljubljana", start), 30)]

    assert {later - earlier for earlier, later in pairwise(moments)} == {timedelta(hours=1)}


def test_every_does_not_notice_that_clocks_change() -> None:
    moments = [moment.astimezone(UTC) for moment in islice(fire_times("every 1h", SPRING), 30)]

    assert moments == [SPRING.astimezone(UTC) + timedelta(hours=number) for number in range(1, 31)]


# -- refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("", "no trigger"),
        ("  ", "no trigger"),
        (None, "no trigger"),
        (30, "no trigger"),
        ("30s", "1 words"),
        ("hourly", "1 words"),
        ("@reboot", "1 words"),
        ("* * * *", "4 words"),
        ("* * * * * UTC x", "7 words"),
        ("every", "no length of time"),
        ("every 5", "no length of time"),
        ("every -1s", "no length of time"),
        ("every 5 parsecs", "no length of time"),
        ("every 1s 2", "no length of time"),
        ("every 0s", "at least 1 ms"),
        ("every 0.1ms", "at least 1 ms"),
        ("60 * * * *", "60"),
        ("* 24 * * *", "24"),
        ("* * 0 * *", "0"),
        ("* * 32 * *", "32"),
        ("* * * 13 *", "13"),
        ("* * * * 8", "'8' is no weekday"),
        ("* * * * mun", "'mun' is no weekday"),
        ("* * * * 1-", "'' is no weekday"),
        ("* * * * -1", "'' is no weekday"),
        ("* * * * 1/0", "'0' is no step"),
        ("* * * * */x", "'x' is no step"),
        ("a * * * *", "a"),
        ("1.5 * * * *", "1.5"),
        ("*/0 * * * *", "0"),
        ("5-1 * * * *", "range"),
        ("* * * * * Mars/Phobos", "'Mars/Phobos' is no IANA time zone"),
        ("* * * * * ../../etc/passwd", "no IANA time zone"),
        ("@daily Nowhere", "'Nowhere' is no IANA time zone"),
    ],
)
def test_wrong_trigger_is_refused_with_what_was_found(wrong: str, told: str) -> None:
    with pytest.raises(InvalidTrigger, match=re.escape(told)) as error:
        parse_trigger(wrong, subject="agent 'a'")

    assert isinstance(error.value, ValueError)
    assert str(error.value).startswith("agent 'a': ")
    assert repr(wrong) in str(error.value) or "IANA" in told


def test_cron_line_that_never_fires_is_refused() -> None:
    with pytest.raises(InvalidTrigger, match="never fires"):
        parse_trigger("0 0 31 2 *")

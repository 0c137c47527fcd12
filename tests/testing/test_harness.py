"""A loop on a virtual clock: days pass in a moment, everything due happens, and always in the same way."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from ael_store import (
    AELController,
    AgentBase,
    AgentManager,
    Event,
    Settings,
    StateContext,
    connect,
    get_event_bus,
    get_state_context,
)
from ael_store.errors import (
    AelError,
    DiskFull,
    InvalidSetting,
    InvalidValue,
    InvalidValueType,
    LoopNotRunning,
    NotAllowedHere,
    UsageError,
)
from ael_store.store.lock import current_holder
from ael_store.testing import Harness, VirtualClock
from tests.loops import until

START = datetime(2026, 1, 1, tzinfo=UTC)
MINUTE, HOUR, DAY = 60.0, 3600.0, 86_400.0


class Counter(AgentBase):
    """Counts its ticks in the state."""

    name = "counter"
    priority = 10

    async def on_tick(self, context: StateContext) -> None:
        context.increment("ticks")


class Idle(AgentBase):
    """Ticks and changes nothing."""

    name = "idle"
    priority = 10

    async def on_tick(self, context: StateContext) -> None:
        pass


class Listener(AgentBase):
    """Notes the data of each event it gets, and when."""

    name = "listener"
    subscriptions = ("ping",)

    async def on_event(self, event: Event, context: StateContext) -> None:
        context.set("got", [*context.get("got", []), event.data])
        context.set("at", context.now.isoformat())


class Broken(AgentBase):
    """Fails at each tick, until it is told not to."""

    name = "broken"
    priority = 10

    async def on_tick(self, context: StateContext) -> None:
        if not context.get("repaired"):
            raise ValueError("broken")


def agent(name: str, **hooks: Any) -> AgentBase:
    """An agent of every iteration with these functions as hooks; other keywords are attributes."""
    attributes = {key: value for key, value in hooks.items() if not key.startswith("on_")}
    made = AgentBase(name, **{"priority": 10, **attributes})
    for key, function in hooks.items():
        if key.startswith("on_"):
            setattr(made, key, function)
    return made


# -- time passes -------------------------------------------------------------------------------------


async def test_every_slot_of_the_clock_is_an_iteration() -> None:
    async with Harness([Counter()]) as h:
        assert (h.iteration, h.now) == (1, START)

        await h.advance("1 minute")

        assert (h.iteration, h.now) == (61, START + timedelta(minutes=1))
        assert h.state == {"ticks": 61}


@pytest.mark.parametrize("duration", [90, 90.0, "1m 30s", timedelta(seconds=90), START + timedelta(seconds=90)])
async def test_duration_is_seconds_text_a_timedelta_or_a_time(duration: Any) -> None:
    async with Harness([], tick_rate=30) as h:
        await h.advance(duration)

        assert (h.iteration, h.now) == (4, START + timedelta(seconds=90))


async def test_time_goes_on_in_steps_as_in_one() -> None:
    async with Harness([Counter()], tick_rate=0.3) as one, Harness([Counter()], tick_rate=0.3) as other:
        await one.advance(60)
        for _ in range(600):
            await other.advance(0.1)

        assert one.iteration == other.iteration == 201
        assert one.state == other.state


async def test_advance_by_nothing_does_what_is_due_now() -> None:
    h = Harness([Counter(), Listener()])
    h.emit("ping", 1)

    await h.advance()

    assert h.state["got"] == [1]
    assert h.now == START
    await h.stop()


async def test_loop_starts_at_the_first_advance() -> None:
    h = Harness([Counter()])
    assert (h.running, h.state, h.events(), h.iteration, h.failures) == (False, {}, [], 0, [])

    await h.advance(1)

    assert h.running
    assert h.state == {"ticks": 2}
    await h.stop()
    assert not h.running
    assert h.state == {"ticks": 2}


async def test_values_set_before_the_start_are_there_in_on_start() -> None:
    async def on_start(context: StateContext) -> None:
        context.set("seen", context.get("mode"))

    h = Harness([agent("a", on_start=on_start)])
    h.set("mode", "night")

    async with h:
        assert h.state == {"mode": "night", "seen": "night"}


async def test_own_start_is_what_hooks_see() -> None:
    async def on_tick(context: StateContext) -> None:
        context.set("now", context.now.isoformat())

    async with Harness([agent("a", on_tick=on_tick)], start="2030-05-06T07:08:09+02:00") as h:
        assert h.state == {"now": "2030-05-06T05:08:09+00:00"}
        assert h.sql("SELECT started_at FROM v_runs") == [{"started_at": "2030-05-06T05:08:09.000000Z"}]


async def test_hooks_take_no_virtual_time() -> None:
    async def on_tick(context: StateContext) -> None:
        await asyncio.sleep(0.005)

    async with Harness([agent("a", on_tick=on_tick)], settings=Settings(tick_log="all")) as h:
        await h.advance(5)

        assert h.sql("SELECT DISTINCT duration_ms FROM v_ticks") == [{"duration_ms": 0.0}]
        assert h.sql("SELECT max(duration_ms) AS longest FROM v_iterations") == [{"longest": 0.0}]
        assert h.sql("SELECT sum(missed) AS missed FROM v_iterations") == [{"missed": 0}]


async def test_days_of_an_idle_loop_pass_quickly() -> None:
    """A bound that only a loop that waits for something real would miss."""
    began = time.monotonic()

    async with Harness([Listener()]) as h:
        await h.advance("3 hours")

        assert h.iteration == 10_801
    assert time.monotonic() - began < 30


async def test_idle_iterations_are_committed_every_ten_seconds() -> None:
    async with Harness([Idle()]) as h:
        await h.advance("1 hour")

        commits = h.sql("SELECT count(DISTINCT commit_id) AS n FROM iterations")[0]["n"]
        assert 320 <= commits <= 365  # the first of a batch waits for 10 s, so there are eleven in it
        assert h.iteration == 3601


async def test_suspended_machine_loses_slots_and_makes_up_for_them_with_one() -> None:
    async with Harness([Counter()]) as h:
        h.clock.jump("1 hour")
        await h.advance(0)

        assert h.now == START + timedelta(hours=1)
        assert h.state == {"ticks": 2}
        assert h.sql("SELECT missed FROM v_iterations ORDER BY iteration") == [{"missed": 0}, {"missed": 3599}]


# -- schedules ---------------------------------------------------------------------------------------


async def test_every_hour_for_three_days_is_72_times() -> None:
    class Hourly(Counter):
        trigger = "every 1h"

    async with Harness([Hourly()], tick_rate=600) as h:
        await h.advance("3 days")

        assert h.state == {"ticks": 72}


async def test_daily_cron_line_fires_once_a_day_through_both_changes_of_clocks() -> None:
    """02:30 does not exist on the last Sunday of March and exists twice on that of October."""
    zone = ZoneInfo("Europe/Ljubljana")
    fired: list[datetime] = []

    async def on_tick(context: StateContext) -> None:
        fired.append(context.now.astimezone(zone))

    nightly = agent("nightly", on_tick=on_tick, trigger="30 2 * * * Europe/Ljubljana")

    async with Harness([nightly], tick_rate=1000 * DAY, start="2026-03-01") as h:
        await h.advance("245 days")  # to the first of November

    assert len(fired) == 245
    assert len({at.date() for at in fired}) == 245
    assert {f"{at:%F %H:%M}" for at in fired if f"{at:%H:%M}" != "02:30"} == {"2026-03-29 03:30"}
    assert [at.fold for at in fired if at.date().isoformat() == "2026-10-25"] == [0]


async def test_trigger_whose_time_passed_while_the_loop_was_down_fires_once_late() -> None:
    class Hourly(Counter):
        trigger = "every 1h"

    async with Harness([Hourly()], tick_rate=MINUTE) as h:
        await h.advance("90 min")
        await h.restart(down="5 hours")
        assert h.state == {"ticks": 2}

        await h.advance("1 hour")

        assert h.state == {"ticks": 3}


# -- events ------------------------------------------------------------------------------------------


async def test_events_from_outside_are_handled_at_the_next_advance() -> None:
    async with Harness([Listener()]) as h:
        await h.advance(10)
        h.emit("ping", {"n": 1}, {"trace": "x"}, source="test")
        await h.advance(0)

        (event,) = h.events("ping")
        assert (event.source, event.data, event.metadata) == ("test", {"n": 1}, {"trace": "x"})
        assert event.timestamp == h.now == START + timedelta(seconds=10)
        assert h.state["got"] == [{"n": 1}]


async def test_events_that_the_controller_s_parts_emit_outside_hooks_go_by_virtual_time() -> None:
    async with Harness([Listener()], tick_rate=MINUTE) as h:
        await h.advance("1 hour")
        h.controller.event_bus.emit("ping", "test", 1)
        h.controller.event_bus.publish({"type": "ping", "data": 2})
        h.controller.state_context.emit("ping", 3, after="30 min")
        await h.advance("1 hour")

        assert [event.timestamp - START for event in h.events("ping")] == [
            timedelta(hours=1),
            timedelta(hours=1),
            timedelta(hours=1, minutes=30),
        ]


async def test_agents_that_join_together_start_by_priority() -> None:
    started: list[str] = []

    def joining(name: str, priority: int) -> AgentBase:
        async def on_start(context: StateContext) -> None:
            started.append(name)

        return agent(name, on_start=on_start, priority=priority)

    async with Harness([]) as h:
        for name, priority in (("a", 1), ("b", 9), ("c", 5), ("d", 9)):
            h.controller.agent_manager.register(joining(name, priority))
        await h.advance(0)

    assert started == ["b", "d", "c", "a"]


async def test_events_are_found_by_type_and_wildcard() -> None:
    async with Harness([]) as h:
        for type in ("door.open", "door.shut", "bell"):
            h.emit(type)
        await h.advance(0)

        assert [event.type for event in h.events("door.*")] == ["door.open", "door.shut"]
        assert [event.type for event in h.events("bell")] == ["bell"]
        assert [event.type for event in h.events()] == ["ael_started", "door.open", "door.shut", "bell"]


@pytest.mark.parametrize("end", ["restart", "crash"])
async def test_delayed_event_comes_in_time_across_the_end_of_a_run(end: str) -> None:
    async def on_start(context: StateContext) -> None:
        if not context.resumed:
            context.emit("ping", "late", after="2h")

    async with Harness([Listener(), agent("sender", on_start=on_start)], tick_rate=MINUTE) as h:
        await h.advance("1h")
        await getattr(h, end)()
        await h.advance("59 min")
        assert "got" not in h.state

        await h.advance("1 min")

        assert h.state == {"got": ["late"], "at": "2026-01-01T02:00:00+00:00"}


async def test_delayed_event_of_the_time_of_absence_comes_late_and_once() -> None:
    async def on_start(context: StateContext) -> None:
        if not context.resumed:
            context.emit("ping", "late", after="2h")

    async with Harness([Listener(), agent("sender", on_start=on_start)], tick_rate=MINUTE) as h:
        await h.crash(down="1 day")
        await h.advance("1 day")

        assert h.state == {"got": ["late"], "at": "2026-01-02T00:00:00+00:00"}


async def test_delivery_is_tried_again_with_pauses_and_then_given_up() -> None:
    tries: list[datetime] = []

    async def on_event(event: Event, context: StateContext) -> None:
        tries.append(context.now)
        raise ValueError("not now")

    async with Harness([agent("a", on_event=on_event, subscriptions=("ping",))], tick_rate=HOUR) as h:
        h.emit("ping")
        await h.advance("1 min")

        assert [(at - START).total_seconds() for at in tries] == [0, 1, 3, 7, 15]
        assert h.sql("SELECT subscriber, attempts FROM v_dead_letters") == [{"subscriber": "a", "attempts": 5}]


# -- failures ----------------------------------------------------------------------------------------


async def test_failures_tell_which_hook_failed_when_and_why() -> None:
    async with Harness([Broken()]) as h:
        await h.advance(1)

        assert len(h.failures) == 2
        failed = h.failures[-1]
        assert (failed.agent, failed.hook, failed.outcome, failed.iteration) == ("broken", "on_tick", "error", 2)
        assert (failed.type, failed.message) == ("ValueError", "broken")
        assert failed.at == START + timedelta(seconds=1)
        assert str(failed) == "broken.on_tick in iteration 2 at 2026-01-01 00:00:01: ValueError: broken"
        with pytest.raises(AssertionError, match=r"2 hooks failed[\s\S]*Traceback"):
            h.check()


async def test_check_says_nothing_where_nothing_failed() -> None:
    async with Harness([Counter()]) as h:
        await h.advance(3)

        h.check()
        assert h.failures == []


async def test_broken_agent_backs_off_and_is_quarantined_over_hours() -> None:
    """Five errors at once, fifteen with pauses of 1, 2, 4 … 300 s, then one probe an hour."""
    async with Harness([Broken(), Idle()]) as h:
        await h.advance("1 hour")
        by_then = [int((failed.at - START).total_seconds()) for failed in h.failures]
        assert by_then[:11] == [0, 1, 2, 3, 4, 5, 7, 11, 19, 35, 67]
        assert len(by_then) == 20
        assert [event.data["agent"] for event in h.events("agent_quarantined")] == ["broken"]

        await h.advance("6 hours")

        probes = [int((failed.at - START).total_seconds()) for failed in h.failures[20:]]
        assert [later - earlier for earlier, later in pairwise(probes)] == [3600] * (len(probes) - 1)
        assert len(probes) == 6


async def test_quarantined_agent_is_released_by_the_probe_that_succeeds() -> None:
    async with Harness([Broken()]) as h:
        await h.advance("1 hour")
        h.set("repaired", True)
        await h.advance("1 hour")

        assert h.sql("SELECT status FROM v_agents WHERE name = 'broken'") == [{"status": "active"}]
        assert len(h.failures) == 20


async def test_hook_that_hangs_ends_at_its_limit_of_real_time() -> None:
    async def on_tick(context: StateContext) -> None:
        context.set("half", True)
        await asyncio.sleep(1000)

    async with Harness([agent("a", on_tick=on_tick, tick_timeout=0.02), Counter()], tick_rate=HOUR) as h:
        await h.advance("1 hour")

        assert [failed.outcome for failed in h.failures] == ["timeout", "timeout"]
        assert h.state == {"ticks": 2}


async def test_agents_that_keep_each_other_busy_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ael_store.testing.harness.LONGEST_INSTANT", 100)
    monkeypatch.setattr("ael_store.testing.harness.GLANCE_S", 0.05)

    async def answer(event: Event, context: StateContext) -> None:
        context.emit("pong" if event.type == "ping" else "ping")

    h = Harness([agent("a", on_event=answer, subscriptions=("p*ng",))], settings=Settings(hop_limit=0))
    h.emit("ping")

    with pytest.raises(AelError, match="answer each other's events without end"):
        await h.advance(1)
    assert not h.running


# -- in the background -------------------------------------------------------------------------------


def slow_tick(seconds: float) -> Callable[[StateContext], Awaitable[None]]:
    async def on_tick(context: StateContext) -> None:
        await asyncio.sleep(seconds)
        context.increment("ticks")
        context.set("at", context.now.isoformat())

    return on_tick


async def test_time_waits_for_what_runs_in_the_background() -> None:
    async with Harness([agent("a", on_tick=slow_tick(0.005), background=True)], tick_rate=MINUTE) as h:
        await h.advance("10 min")

        assert h.state == {"ticks": 11, "at": "2026-01-01T00:10:00+00:00"}


async def test_what_ends_in_the_background_takes_effect_in_the_order_in_which_it_began() -> None:
    def on_tick(name: str, seconds: float) -> Callable[[StateContext], None]:
        def tick(context: StateContext) -> None:
            time.sleep(seconds)
            context.emit("done", name)

        return tick

    names = ("slow", "middle", "quick")
    agents = [
        agent(name, on_tick=on_tick(name, seconds), background=True)
        for name, seconds in zip(names, (0.03, 0.015, 0.0), strict=True)
    ]

    async with Harness(agents, tick_rate=MINUTE) as h:
        await h.advance("2 min")

        assert [event.data for event in h.events("done")] == [*names] * 3


async def test_time_goes_on_without_what_takes_too_long(caplog: pytest.LogCaptureFixture) -> None:
    go_on = threading.Event()

    def on_tick(context: StateContext) -> None:
        go_on.wait(20)
        context.increment("slow")

    slow = agent("slow", on_tick=on_tick, background=True)

    async with Harness([slow, Counter()], tick_rate=MINUTE, patience=0.02) as h:
        await h.advance("10 min")
        assert h.state == {"ticks": 11}
        assert "agent slow: on_tick still runs after 0.02 s" in caplog.text

        go_on.set()
        await asyncio.sleep(0.05)
        await h.advance(0)

        assert h.state == {"ticks": 11, "slow": 1}


async def test_stop_waits_for_the_background_and_then_for_the_grace_period_of_virtual_time() -> None:
    hanging = agent("hanging", on_tick=slow_tick(1000), background=True)
    slow = agent("slow", on_tick=slow_tick(0.02), background=True)
    began = time.monotonic()

    h = Harness([hanging, slow], tick_rate=HOUR, patience=0.05)
    await h.start()
    await h.stop()

    assert h.state["ticks"] == 1
    assert h.sql("SELECT status FROM v_runs") == [{"status": "stopped"}]
    assert time.monotonic() - began < 5


# -- ends and starts ---------------------------------------------------------------------------------


async def test_crash_leaves_the_run_marked_running_and_the_next_advance_resumes() -> None:
    h = Harness([Counter()])
    await h.advance(10)
    run = h.controller

    await h.crash()

    assert h.sql("SELECT status, last_iteration FROM v_runs") == [{"status": "running", "last_iteration": 11}]
    assert current_holder(h.path) is None
    assert (h.running, h.state) == (False, {"ticks": 11})

    await h.advance(10)

    assert h.controller is not run
    assert h.sql("SELECT status FROM v_runs ORDER BY run_id") == [{"status": "crashed"}, {"status": "running"}]
    assert h.state == {"ticks": 22}
    assert h.iteration == 22
    assert [event.type for event in h.events("ael_recovered")] == ["ael_recovered"]
    await h.stop()


async def test_crashes_lose_no_count_and_double_none() -> None:
    class Teller(AgentBase):
        """Tells each tick, and handles what it told."""

        name = "teller"
        priority = 10
        subscriptions = ("told",)

        async def on_tick(self, context: StateContext) -> None:
            context.emit("told", context.increment("told"))
            self.metadata["told"] = context.get("told")

        async def on_event(self, event: Event, context: StateContext) -> None:
            context.set("heard", [*context.get("heard", []), event.data])

    async with Harness([Teller()]) as h:
        for _ in range(20):
            await h.advance(3)
            await h.crash(down=5, agents=[Teller()])
        await h.advance(3)

        assert h.state["told"] == h.iteration == 21 * 4
        assert h.state["heard"] == list(range(1, 21 * 4 + 1))
        (row,) = h.sql("SELECT tick_count, event_count, metadata FROM v_agents")
        assert row == {"tick_count": 84, "event_count": 84, "metadata": '{"told":84}'}
        assert h.sql("SELECT count(*) AS n FROM v_iterations") == [{"n": 84}]


async def test_hook_may_crash_the_loop_on_the_spot() -> None:
    crashes: list[int] = []

    class Fragile(Counter):
        async def on_tick(self, context: StateContext) -> None:
            await super().on_tick(context)
            if context.get("ticks") == 5 and not crashes:
                crashes.append(context.iteration)
                await h.crash(down="1 min")

    h = Harness([Fragile()])
    await h.advance(10)

    assert crashes == [5]
    assert (h.running, h.state) == (False, {"ticks": 4})
    assert h.now == START + timedelta(seconds=64)

    await h.advance(0)

    assert h.state == {"ticks": 5}
    assert h.iteration == 5
    await h.stop()


async def test_crash_gives_idle_iterations_that_were_not_committed_again() -> None:
    numbers: list[int] = []

    async def on_tick(context: StateContext) -> None:
        numbers.append(context.iteration)
        if len(numbers) == 6:
            await h.crash()

    h = Harness([agent("a", on_tick=on_tick)])
    await h.advance(10)
    await h.advance(1)

    assert numbers == [1, 2, 3, 4, 5, 6, 2, 3]
    assert h.sql("SELECT count(*) AS n, max(iteration) AS last FROM v_iterations") == [{"n": 3, "last": 3}]
    await h.stop()


async def test_crash_ends_what_runs_in_the_background() -> None:
    ended = []

    async def on_tick(context: StateContext) -> None:
        try:
            await asyncio.sleep(1000)
        finally:
            ended.append(True)

    h = Harness([agent("a", on_tick=on_tick, background=True)], patience=0.01)
    await h.start()
    await h.crash()

    assert ended == [True]


async def test_restart_is_a_clean_stop_and_a_start() -> None:
    hooks: list[str] = []

    def note(name: str) -> Callable[[StateContext], Awaitable[None]]:
        async def hook(context: StateContext) -> None:
            hooks.append(name)

        return hook

    async with Harness([agent("a", on_start=note("start"), on_shutdown=note("shutdown")), Counter()]) as h:
        await h.advance(1)
        await h.restart(down="1 hour")

        assert h.running
        assert hooks == ["start", "shutdown", "start"]
        assert h.now == START + timedelta(seconds=3601)
        assert h.sql("SELECT status FROM v_runs ORDER BY run_id") == [{"status": "stopped"}, {"status": "running"}]
        assert h.state == {"ticks": 3}


async def test_restart_with_other_agents_leaves_the_backlog_to_those_that_come_back() -> None:
    async with Harness([Listener(), Counter()]) as h:
        await h.advance(1)
        await h.restart(agents=[Counter()])
        h.emit("ping", "while away")
        await h.advance(1)
        assert h.sql("SELECT name, status FROM v_agents WHERE name = 'listener'") == [
            {"name": "listener", "status": "absent"}
        ]

        await h.restart(agents=[Counter(), Listener()])

        assert h.state["got"] == ["while away"]


async def test_same_agents_begin_a_new_run_with_what_the_database_has_of_them() -> None:
    class Forgetful(AgentBase):
        name = "forgetful"
        priority = 10

        async def on_tick(self, context: StateContext) -> None:
            self.metadata["ticks"] += 1
            if self.metadata["ticks"] == 3 and context.now < START + timedelta(seconds=5):
                await h.crash()

    made = Forgetful()
    made.metadata["ticks"] = 0
    h = Harness([made])
    await h.advance(10)
    assert made.metadata == {"ticks": 3}

    await h.start()

    assert made.metadata == {"ticks": 3}
    assert made.tick_count == 3
    assert h.sql("SELECT tick_count, metadata FROM v_agents") == [{"tick_count": 3, "metadata": '{"ticks":3}'}]
    await h.stop()


async def test_file_that_is_given_is_used_and_stays(tmp_path: Path) -> None:
    async with Harness([Counter()], store=tmp_path / "ael.db") as h:
        await h.advance(4)
    async with Harness([Counter()], store=f"sqlite:///{tmp_path}/ael.db", start=h.now) as h:
        await h.advance(4)

        assert h.state == {"ticks": 10}
    assert (tmp_path / "ael.db").exists()


async def test_temporary_file_goes_with_the_harness() -> None:
    h = Harness([Counter()])
    await h.advance(1)
    await h.stop()
    folder = h.path.parent
    assert h.state == {"ticks": 2}

    del h
    gc.collect()

    assert not folder.exists()


def test_harness_without_a_stop_ends_with_its_event_loop() -> None:
    h = Harness([Counter()])
    threads = threading.active_count()

    asyncio.run(h.advance(3))

    assert not h.running
    assert current_holder(h.path) is None
    asyncio.run(h.advance(3))
    assert h.state == {"ticks": 8}
    assert threading.active_count() == threads


async def test_loop_that_a_hook_stops_does_not_start_by_itself() -> None:
    async def on_tick(context: StateContext) -> None:
        if context.increment("ticks") == 3:
            await h.controller.stop()

    h = Harness([agent("a", on_tick=on_tick)])
    await h.advance("1 min")
    assert (h.running, h.state) == (False, {"ticks": 3})
    assert h.now == START + timedelta(minutes=1)

    with pytest.raises(LoopNotRunning, match="restart"):
        await h.advance(1)

    await h.restart()
    assert h.state == {"ticks": 4}
    await h.stop()


async def test_what_ends_the_loop_is_raised_by_advance(monkeypatch: pytest.MonkeyPatch) -> None:
    h = Harness([Counter()])
    await h.advance(1)

    async def fail(*_: Any, **__: Any) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr(h.controller.store, "commit", fail)

    with pytest.raises(OSError, match="the disk is gone"):
        await h.advance(1)
    assert h.state == {"ticks": 2}
    await h.advance(1)
    assert h.state == {"ticks": 4}
    await h.stop()


async def test_full_disk_is_waited_for_in_virtual_time(monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[float] = []
    h = Harness([Counter()])
    await h.start()
    commit = h.controller.store.commit

    async def full(*arguments: Any, **options: Any) -> None:
        tries.append(h.clock.monotonic())
        if len(tries) < 4:
            raise DiskFull("the disk is full")
        await commit(*arguments, **options)

    monkeypatch.setattr(h.controller.store, "commit", full)
    h.set("mode", "night")
    await h.advance(0)
    assert "mode" not in h.state

    await h.advance("1 min")

    assert tries[:4] == [0, 1, 3, 7]
    assert h.state["mode"] == "night"
    assert h.sql("SELECT sum(missed) AS n FROM v_iterations") == [{"n": 6}]
    await h.stop()


async def test_stop_in_another_task_ends_an_advance() -> None:
    h = Harness([Idle()])
    advancing = asyncio.create_task(h.advance("10 days"))
    await until(lambda: h.now > START)

    await h.stop()
    await advancing

    assert not h.running
    assert h.sql("SELECT status FROM v_runs") == [{"status": "stopped"}]
    await h.advance(1)
    await h.stop()


async def test_crash_in_another_task_ends_an_advance() -> None:
    h = Harness([Idle()])
    advancing = asyncio.create_task(h.advance("10 days"))
    await until(lambda: h.now > START)

    await h.crash()
    await advancing

    assert h.sql("SELECT status FROM v_runs") == [{"status": "running"}]


@pytest.mark.parametrize("turns", [0, 1, 2, 5, 20])
async def test_crash_of_a_loop_that_is_starting_gives_the_lock_back(turns: int) -> None:
    h = Harness([Counter()])
    starting = asyncio.create_task(h.start())
    for _ in range(turns):
        await asyncio.sleep(0)

    await h.crash()
    await starting
    await h.advance(1)

    assert h.state["ticks"] == h.iteration
    await h.stop()


async def test_advance_that_is_cancelled_lets_no_more_time_pass() -> None:
    async def on_tick(context: StateContext) -> None:
        await asyncio.sleep(0.001)

    async with Harness([agent("a", on_tick=on_tick)]) as h:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(h.advance("10 days"), 0.05)
        await h.advance(0)
        stopped_at = h.now

        await asyncio.sleep(0.02)

        assert h.now == stopped_at < START + timedelta(days=1)


# -- determinism -------------------------------------------------------------------------------------


class Walker(AgentBase):
    """Wanders by chance, tells now and then, fails now and then, and reacts to what others tell."""

    subscriptions = ("step.*",)

    async def on_tick(self, context: StateContext) -> None:
        place = context.own.get("place", 0) + context.random.randint(-3, 3)
        context.own.set("place", place)
        if place % 3 == 0:
            context.emit(f"step.{self.name}", place, after=context.random.choice([None, 2.5, "1 min"]))
        if context.random.random() < 0.05:
            raise RuntimeError("stumbled")

    async def on_event(self, event: Event, context: StateContext) -> None:
        await asyncio.sleep(0)
        context.set("last", [self.name, event.source, event.data])
        if context.random.random() < 0.1:
            raise RuntimeError("deaf")


class Threaded(Walker):
    def on_tick(self, context: StateContext) -> None:  # type: ignore[override]
        time.sleep(context.random.random() / 1000)
        context.increment("threaded")


async def everything(seed: int) -> dict[str, Any]:
    """Two runs, one of them crashed, and all that the database holds of them, durations included."""
    agents = [
        Walker("a"),
        Walker("b", priority=10, background=True),
        Walker("c", trigger="every 7s"),
        Threaded("d", priority=9, background=True),
        Threaded("e"),
    ]
    async with Harness(agents, seed=seed, strategy="load_aware", max_agents=2) as h:
        await h.advance("5 min")
        h.emit("step.test", 1)
        await h.crash(down=30)
        await h.advance("5 min")
        tables = [row["name"] for row in h.sql("SELECT name FROM sqlite_master WHERE type = 'table'")]
        rows = {name: h.sql(f"SELECT * FROM {name}") for name in tables if name not in ("meta", "sqlite_stat1")}
    for error in rows["tick_errors"]:
        del error["traceback"]  # may name threads
    return rows


async def test_same_seed_gives_the_same_rows_in_every_table_and_another_one_others() -> None:
    one, same, other = await asyncio.gather(everything(1), everything(1), everything(2))

    assert len(one["ticks"]) > 500 and one["tick_errors"] and one["delayed_events"]
    for table in one:
        assert one[table] == same[table], table
    assert one["state_changes"] != other["state_changes"]


# -- the process's own context and bus, and other ways in --------------------------------------------


async def test_context_and_bus_of_the_process_belong_to_the_loop_of_the_harness() -> None:
    bus, context = get_event_bus(), get_state_context()

    class Ancestor(AgentBase):
        name = "ancestor"
        priority = 10

        async def on_start(self, _: StateContext) -> None:
            bus.subscribe("told", self.name, self.heard)

        async def on_tick(self, _: StateContext) -> None:
            context.increment("ticks")
            bus.emit("told", self.name, context.get("ticks"))

        async def heard(self, event: Event) -> None:
            context.set("heard", event.data)

    async with Harness([Ancestor()]) as h:
        await h.advance(2)
        context.set("outside", True)
        await h.advance(0)

        assert h.state == {"ticks": 3, "heard": 3, "outside": True}
    assert context._host is None and bus._host is None
    assert not context.has("ticks")


async def test_two_harnesses_do_not_see_each_other() -> None:
    class Ancestor(AgentBase):
        name = "ancestor"
        priority = 10

        async def on_tick(self, context: StateContext) -> None:
            get_state_context().increment("ticks")

    async with Harness([Ancestor()]) as one, Harness([Ancestor()]) as other:
        await asyncio.gather(one.advance(5), other.advance(10))

        assert (one.state, other.state) == ({"ticks": 6}, {"ticks": 11})
        with pytest.raises(NotAllowedHere, match="2 loops run here"):
            get_state_context().set("x", 1)


async def test_controller_takes_transactions_while_time_stands_still() -> None:
    async with Harness([Counter()]) as h:
        assert await h.controller.transact(lambda context: context.increment("ticks", 10)) == 11

        assert h.state == {"ticks": 11}
        assert h.now == START


async def test_client_of_another_process_reaches_the_loop() -> None:
    async with Harness([Listener()]) as h:
        client = connect(h.path)
        await asyncio.to_thread(client.emit, "ping", "from afar")
        await h.advance(0)

        assert h.state["got"] == ["from afar"]
        client.close()


async def test_signals_are_left_to_the_test_runner() -> None:
    import signal

    before = signal.getsignal(signal.SIGINT)
    async with Harness([Counter()]):
        assert signal.getsignal(signal.SIGINT) is before


async def test_sql_takes_parameters() -> None:
    async with Harness([Counter()]) as h:
        assert h.sql("SELECT value FROM v_state WHERE key = :key", key="ticks") == [{"value": "1"}]


# -- what is refused ---------------------------------------------------------------------------------


async def test_back_to_back_is_refused_because_no_time_would_pass() -> None:
    with pytest.raises(InvalidSetting, match="no virtual time would ever pass"):
        Harness([], tick_rate=0)


@pytest.mark.parametrize("duration", [-1, "tomorrow", START - timedelta(days=1), float("nan")])
async def test_duration_that_is_none_is_refused(duration: Any) -> None:
    h = Harness([])
    with pytest.raises(InvalidValue):
        await h.advance(duration)


@pytest.mark.parametrize("duration", [None, True, [1]])
async def test_duration_of_a_wrong_type_is_refused(duration: Any) -> None:
    with pytest.raises(InvalidValueType, match="is no length of time"):
        await Harness([]).advance(duration)


async def test_sql_before_there_is_a_database_is_refused() -> None:
    with pytest.raises(UsageError, match="first `advance`"):
        Harness([]).sql("SELECT 1")


@pytest.mark.parametrize("what", ["advance", "stop", "restart", "start"])
async def test_hook_may_not_wait_for_its_own_loop(what: str) -> None:
    async def on_tick(context: StateContext) -> None:
        await getattr(h, what)()

    h = Harness([agent("a", on_tick=on_tick)])
    await h.advance(0)

    assert f"`{'stop' if what == 'restart' else what}` waits for the loop" in h.failures[0].message
    await h.stop()


async def test_two_advances_at_once_are_refused() -> None:
    async with Harness([Idle()]) as h:
        first = asyncio.create_task(h.advance("1 min"))
        await asyncio.sleep(0)

        with pytest.raises(UsageError, match="under way"):
            await h.advance(1)
        await first


async def test_same_name_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="already registered"):
        Harness([Counter(), Counter()])


# -- the clock by itself -----------------------------------------------------------------------------


async def test_virtual_clock_moves_a_controller_of_one_s_own(tmp_path: Path) -> None:
    clock = VirtualClock("2026-02-03T04:05:06Z", seed=3)
    manager = AgentManager()
    manager.register(Counter())
    controller = AELController(manager, store=tmp_path / "ael.db", clock=clock)

    clock.advance("1 min")
    await controller.run(iterations=61)

    assert clock.now == datetime(2026, 2, 3, 4, 6, 6, tzinfo=UTC)
    assert clock.monotonic() == 60.0


def test_virtual_clock_stands_still_by_itself() -> None:
    clock = VirtualClock()
    clock.advance("1 hour")

    assert clock.now == START

    clock.jump("1 hour")

    assert clock.now == START + timedelta(hours=1)


def test_seeds_of_a_virtual_clock_are_a_series() -> None:
    one, other, third = VirtualClock(seed=1), VirtualClock(seed=1), VirtualClock(seed=2)

    assert [one.seed() for _ in range(3)] == [other.seed() for _ in range(3)]
    assert one.seed() != third.seed()

"""Limits of tasks: reserved before a start, durable, seen in SQL, raised by commands, held by errors of a provider."""

from __future__ import annotations

import asyncio
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from ael_store import AgentBase, RetryAfter, Settings, TaskLimit, connect
from ael_store.cli.main import main
from ael_store.errors import InvalidSetting
from ael_store.testing import Harness
from tests.loops import controller_on, rows, running, until, worker

START = datetime(2026, 1, 1, tzinfo=UTC)
HELD = "SELECT count(*) AS n FROM v_tasks WHERE status = 'held'"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ael.db"


class Calls:
    """The function of the tasks: notes when each attempt starts, costs and fails as it is told."""

    def __init__(self, *, usd: Any = None, fails: Any = None) -> None:
        self.at: list[tuple[str, float]] = []
        self.usd = usd
        self.fails = fails or (lambda task, second: None)
        self.harness: Harness | None = None

    @property
    def seconds(self) -> list[float]:
        return [second for _, second in self.at]

    def loop(
        self, path: Path | str = ":memory:", policy: Any = None, start: datetime = START, **bounds: Any
    ) -> Harness:
        """A loop with `worker`, all whose tasks count against the limit `llm` of these bounds."""
        self.policy = policy or {}
        limits: Any = {"llm": bounds} if bounds else {}
        settings = Settings(limits=limits)
        self.harness = Harness([self.agent()], store=path, settings=settings, tick_rate=3600, start=start)
        return self.harness

    def agent(self) -> AgentBase:
        async def work(agent: Any, task: Any) -> str:
            assert self.harness is not None
            second = (self.harness.now - START).total_seconds()
            self.at.append((task.key, second))
            if self.usd is not None:
                task.cost(self.usd)
            error = self.fails(task, second)
            if error is not None:
                raise error
            return "done"

        return worker(work, **{"limit": "llm", **self.policy})


def submit(h: Harness, *keys: Any, **options: Any) -> None:
    for key in keys:
        h.emit("go", {"key": str(key), **options})


# -- per minute, per day -----------------------------------------------------------------------------


async def test_per_minute_counts_the_starts_of_the_sixty_seconds_before() -> None:
    calls = Calls()
    async with calls.loop(per_minute=3) as h:
        submit(h, "a")
        await h.advance(30)
        submit(h, "b", "c", "d", "e", "f", "g", "h")
        await h.advance(5)
        seen_early = calls.seconds[:]
        await h.advance(600)

    assert seen_early == [0, 30, 30]
    assert [key for key, _ in calls.at] == list("abcdefgh")
    assert calls.seconds == pytest.approx([0, 30, 30, 60, 90, 90, 120, 150], abs=0.1)
    for first, fourth in zip(calls.seconds, calls.seconds[3:], strict=False):
        assert fourth - first >= 60


@pytest.mark.parametrize("end", ["restart", "crash"])
async def test_what_was_started_before_a_restart_or_crash_still_counts(end: str) -> None:
    calls = Calls()
    async with calls.loop(per_minute=2, per_day=5) as h:
        submit(h, *range(8))
        await h.advance(10)
        assert len(calls.at) == 2
        await getattr(h, end)(down=20)
        await h.advance(25)
        assert len(calls.at) == 2
        await h.advance(10)
        assert len(calls.at) == 4
        await getattr(h, end)(down="2h")
        await h.advance("21h")
        assert len(calls.at) == 5
        await getattr(h, end)()
        await h.advance("1h")

    assert calls.seconds[5:] == pytest.approx([86_400, 86_400, 86_460], abs=0.1)


async def test_per_day_opens_again_at_midnight_utc() -> None:
    calls = Calls()
    async with calls.loop(per_day=2, start=START + timedelta(hours=23)) as h:
        submit(h, *range(5))
        await h.advance("3 days")

    assert calls.seconds == pytest.approx([23 * 3600] * 2 + [24 * 3600] * 2 + [48 * 3600], abs=0.1)


async def test_failed_attempts_count_too() -> None:
    calls = Calls(fails=lambda task, second: ValueError("x") if task.attempt < 3 else None)
    async with calls.loop(policy={"backoff": 0.1}, per_minute=2, breaker=0) as h:
        submit(h, "a", "b")
        await h.advance(300)

    assert len(calls.at) == 6
    assert all(later - earlier >= 60 for earlier, later in zip(calls.seconds, calls.seconds[2:], strict=False))


# -- concurrency -------------------------------------------------------------------------------------


async def test_concurrency_is_never_exceeded_and_other_tasks_go_on(path: Path) -> None:
    open_now: Counter[str] = Counter()
    peak: Counter[str] = Counter()
    gate = asyncio.Event()

    async def work(self: Any, task: Any) -> None:
        name = str(task.limit)
        open_now[name] += 1
        peak[name] = max(peak[name], open_now[name])
        await gate.wait()
        open_now[name] -= 1

    controller = controller_on(path, worker(work, limit="llm"), limits={"llm": {"concurrency": 2}})
    async with running(controller):
        for number in range(6):
            controller.event_bus.emit("go", "test", {"key": f"limited {number}"})
        for number in range(3):
            controller.event_bus.emit("go", "test", {"key": f"free {number}", "limit": "other"})
        await until(lambda: open_now == {"llm": 2, "other": 3})
        limited = rows(path, "SELECT status FROM v_tasks WHERE limit_name = 'llm' ORDER BY id")
        seen = rows(path, "SELECT name, status, concurrency, running, waiting FROM v_limits WHERE name = 'llm'")
        gate.set()
        await until(lambda: rows(path, "SELECT count(*) FROM v_tasks WHERE status = 'done'") == [9])

    assert limited == ["running"] * 2 + ["held"] * 4
    assert seen == [("llm", "full", 2, 2, 4)]
    assert peak["llm"] == 2


async def test_attempts_that_a_crash_ended_take_no_place() -> None:
    hang = True

    async def work(self: Any, task: Any) -> str:
        if hang:
            await asyncio.Event().wait()
        return "done"

    one = worker(work, limit="llm")
    settings = Settings(limits={"llm": TaskLimit(concurrency=1)})
    async with Harness([one], tick_rate=3600, settings=settings, patience=0.1) as h:
        submit(h, "a", "b")
        await h.advance()
        await h.crash(down=60)
        hang = False
        await h.advance(60)

        assert h.sql("SELECT status FROM v_tasks") == [{"status": "done"}] * 2


# -- money -------------------------------------------------------------------------------------------


async def test_money_is_reserved_before_the_start_and_what_it_cost_counts_after() -> None:
    """A dollar is reserved for each, a quarter is spent: with 2.50 a day the eighth could take too much."""
    calls = Calls(usd="0.25")
    async with calls.loop(policy={"max_usd": 1}, usd_per_day="2.5") as h:
        submit(h, *range(9))
        await h.advance("23h")
        assert len(calls.at) == 7
        assert h.sql(HELD) == [{"n": 2}]
        await h.advance("2h")

        assert calls.seconds[7:] == pytest.approx([86_400] * 2, abs=0.1)
        assert float(h.sql("SELECT sum(cost_usd) AS usd FROM v_tasks")[0]["usd"]) == 2.25


async def test_money_reserved_by_what_runs_is_not_given_out_twice(path: Path) -> None:
    begun: list[str] = []
    gate = asyncio.Event()

    async def work(self: Any, task: Any) -> None:
        begun.append(task.key)
        await gate.wait()
        task.cost(0)

    controller = controller_on(path, worker(work, limit="llm", max_usd="0.4"), limits={"llm": {"usd_per_day": 1}})
    async with running(controller):
        for number in range(5):
            controller.event_bus.emit("go", "test", {"key": str(number)})
        await until(lambda: rows(path, "SELECT count(*) FROM v_tasks WHERE status = 'held'") == [3])
        await until(lambda: len(begun) == 2)
        gate.set()
        await until(lambda: rows(path, "SELECT count(*) FROM v_tasks WHERE status = 'done'") == [5])

    assert begun == ["0", "1", "2", "3", "4"]


async def test_without_max_usd_one_runs_at_a_time_until_a_cost_is_known_and_then_the_largest_is_reserved(
    path: Path,
) -> None:
    begun: list[str] = []
    gates = {str(number): asyncio.Event() for number in range(5)}

    async def work(self: Any, task: Any) -> None:
        begun.append(task.key)
        await gates[task.key].wait()
        task.cost("0.8")

    controller = controller_on(path, worker(work, limit="llm"), limits={"llm": {"usd_per_day": "2.5"}})
    async with running(controller):
        for number in range(5):
            controller.event_bus.emit("go", "test", {"key": str(number)})
        await until(lambda: rows(path, "SELECT count(*) FROM v_tasks WHERE status = 'held'") == [4])
        await until(lambda: begun == ["0"])
        gates["0"].set()
        await until(lambda: begun == ["0", "1", "2"])
        gates["1"].set()
        gates["2"].set()
        await until(lambda: rows(path, "SELECT count(*) FROM v_tasks WHERE status = 'done'") == [3])
        assert rows(path, "SELECT status FROM v_tasks WHERE id > 3") == ["held"] * 2
        (spent,) = rows(path, "SELECT usd_today FROM v_limits")

    assert begun == ["0", "1", "2"]
    assert spent == pytest.approx(2.4)


async def test_attempt_whose_end_nobody_knows_counts_with_what_was_reserved() -> None:
    """Of two dollars one is gone with each crash, though what returned said that it cost nothing."""
    calls = Calls(usd=0)

    async def work(self: Any, task: Any) -> None:
        await h.crash(down=60)

    async with calls.loop(policy={"max_usd": 1}, usd_per_day=2) as h:
        sound, deadly = calls.agent(), worker(work, limit="llm", max_usd=1)
        await h.restart(agents=[deadly])
        submit(h, "a")
        await h.advance()
        await h.restart(agents=[sound])
        submit(h, "b", "c")
        await h.advance(60)
        assert [key for key, _ in calls.at] == ["a", "b", "c"]
        await h.restart(agents=[deadly])
        submit(h, "d")
        await h.advance()
        await h.restart(agents=[sound])
        submit(h, "e")
        await h.advance("20h")

        assert len(calls.at) == 3
        assert h.sql(HELD) == [{"n": 2}]
        outcomes = [row["outcome"] for row in h.sql("SELECT outcome FROM task_attempts ORDER BY id")]
        assert outcomes == ["interrupted", "done", "done", "done", "interrupted"]
        await h.advance("5h")
        assert [key for key, _ in calls.at[3:]] == ["d", "e"]


async def test_cost_above_what_was_reserved_counts_in_full() -> None:
    calls = Calls(usd=3)
    async with calls.loop(policy={"max_usd": 1}, usd_per_day=3) as h:
        submit(h, "a")
        await h.advance(1)
        submit(h, "b")
        await h.advance("22h")
        assert len(calls.at) == 1
        await h.advance("2h")
        assert len(calls.at) == 2


# -- what a person sees and does ---------------------------------------------------------------------


async def test_reached_limit_is_seen_in_tasks_limits_and_problems_and_goes_from_there(path: Path) -> None:
    calls = Calls()
    async with calls.loop(path, per_minute=1) as h:
        submit(h, "a", "b", "c")
        await h.advance(1)
        at_the_limit = (
            h.sql("SELECT key, status, attempts, limit_name FROM v_tasks ORDER BY id"),
            h.sql("SELECT name, status, per_minute, waiting, until FROM v_limits"),
            h.sql("SELECT subject, detail, since FROM v_problems WHERE kind = 'limit_reached'"),
        )
        await h.advance(300)

        tasks, limits, problems = at_the_limit
        assert [(row["key"], row["status"], row["attempts"], row["limit_name"]) for row in tasks] == [
            ("a", "done", 1, "llm"),
            ("b", "held", 0, "llm"),
            ("c", "held", 0, "llm"),
        ]
        (limit,) = limits
        assert (limit["name"], limit["status"], limit["per_minute"], limit["waiting"]) == ("llm", "full", 1, 2)
        assert limit["until"].startswith("2026-01-01T00:01:00")
        (problem,) = problems
        assert problem["subject"] == "llm"
        assert problem["detail"].startswith("2 tasks wait")
        assert problem["since"].startswith("2026-01-01T00:00:00")
        assert h.sql("SELECT status, waiting FROM v_limits") == [{"status": "open", "waiting": 0}]
        assert h.sql("SELECT kind FROM v_problems WHERE kind = 'limit_reached'") == []


async def test_raised_limit_lets_tasks_go_on_and_stays_raised_until_it_is_reset_or_the_settings_change(
    path: Path,
) -> None:
    calls = Calls()
    async with calls.loop(path, per_day=1) as h:
        submit(h, *range(12))
        await h.advance("1h")
        await h.stop()
        assert main(["limits", "raise", "llm", "--per-day", "4", "--db", str(path)]) == 0
        await h.advance("1h")
        assert len(calls.at) == 4
        await h.crash()
        await h.advance("23h")
        assert len(calls.at) == 8
        await h.stop()
        assert main(["limits", "raise", "llm", "--reset", "--db", str(path)]) == 0
        await h.advance("1 day")
        assert len(calls.at) == 9
        await h.stop()
        assert main(["limits", "raise", "llm", "--per-day", "100", "--db", str(path)]) == 0
    async with calls.loop(path, start=START + timedelta(days=3), per_day=2) as h:
        await h.advance("1h")

        assert len(calls.at) == 11
        assert h.sql("SELECT per_day FROM v_limits") == [{"per_day": 2}]


async def test_raise_on_a_running_loop_wakes_what_waits(path: Path) -> None:
    async def work(self: Any, task: Any) -> None:
        return None

    controller = controller_on(path, worker(work, limit="llm"), limits={"llm": {"per_day": 1}}, tick_rate=3600)
    async with running(controller):
        for number in range(3):
            controller.event_bus.emit("go", "test", {"key": str(number)})
        await until(lambda: rows(path, "SELECT count(*) FROM v_tasks WHERE status = 'held'") == [2])
        assert await asyncio.to_thread(main, ["limits", "raise", "llm", "--per-day", "10", "--db", str(path)]) == 0
        await until(lambda: rows(path, "SELECT count(*) FROM v_tasks WHERE status = 'done'") == [3])

    assert rows(path, "SELECT status, per_day, started_today FROM v_limits") == [("open", 10, 3)]


async def test_limit_that_no_setting_knows_bounds_nothing_and_is_a_problem_to_look_at(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    calls = Calls()
    async with calls.loop(path, policy={"limit": "lim"}, per_minute=1) as h:
        submit(h, *range(5))
        submit(h, "later", after="1h")
        await h.advance(1)

        assert len(calls.at) == 5
        assert [row["subject"] for row in h.sql("SELECT subject FROM v_problems WHERE kind = 'unknown_limit'")] == [
            "lim"
        ]
        warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert any("lim" in message and "limit" in message for message in warnings)


async def test_limit_of_submit_goes_before_that_of_the_function(path: Path) -> None:
    calls = Calls()
    async with calls.loop(path, per_day=1) as h:
        submit(h, "a", "b")
        submit(h, "c", limit="free")
        await h.advance("1h")
        await h.stop()
        with connect(path) as client:
            client.submit("work", agent="worker", key="d", limit="llm")
        await h.advance("1h")

        assert [key for key, _ in calls.at] == ["a", "c"]
        assert h.sql("SELECT limit_name FROM v_tasks WHERE key = 'c'") == [{"limit_name": "free"}]


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"concurrency": 0}, "concurrency"),
        ({"per_minute": -1}, "per_minute"),
        ({"per_minute": 1.5}, "per_minute"),
        ({"usd_per_day": "much"}, "usd_per_day"),
        ({"usd_per_day": -1}, "usd_per_day"),
        ({"per_minut": 3}, "per_minute"),
    ],
)
def test_impossible_limit_is_refused_with_its_name(table: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidSetting, match=words) as error:
        Settings(limits={"llm": table})  # type: ignore[dict-item]

    assert "llm" in str(error.value)


# -- errors of a provider ----------------------------------------------------------------------------


async def test_outage_of_a_provider_burns_no_attempts_and_is_asked_after_by_one_probe_at_a_time() -> None:
    """Without the breaker five tasks of two attempts would have failed within seconds."""
    outage = 6 * 3600

    def fails(task: Any, second: float) -> Exception | None:
        return ConnectionError("503") if second < outage else None

    calls = Calls(fails=fails)
    async with calls.loop(policy={"attempts": 2}, concurrency=10) as h:
        submit(h, *range(5))
        await h.advance("1h")
        in_the_outage = (
            h.sql("SELECT status FROM v_tasks"),
            h.sql("SELECT held_until_us, held_because FROM limits"),
            h.sql("SELECT subject, detail FROM v_problems WHERE kind = 'limit_reached'"),
        )
        submit(h, "late")
        await h.advance("1 day")

        tasks, held, problems = in_the_outage
        assert {row["status"] for row in tasks} == {"held"}
        assert held[0]["held_until_us"] is not None
        assert "503" in held[0]["held_because"]
        assert problems[0]["subject"] == "llm"
        assert [row["status"] for row in h.sql("SELECT status FROM v_tasks")] == ["done"] * 6
        during = [second for second in calls.seconds if 60 < second < outage]
        assert 1 < len(during) < outage / 60
        assert len(set(during)) == len(during), "one probe at a time"
        back = min(second for second in calls.seconds if second >= outage)
        assert max(calls.seconds) - back < 60, "the success of the probe lets all go on"
        assert h.sql("SELECT status FROM v_limits") == [{"status": "open"}]


async def test_errors_of_one_task_hold_nobody_else() -> None:
    calls = Calls(fails=lambda task, second: ValueError("its own fault") if task.key == "bad" else None)
    async with calls.loop(policy={"attempts": 6, "backoff": 1}, per_minute=100) as h:
        submit(h, "bad")
        await h.advance(20)
        bad = len(calls.at)
        submit(h, "good")
        await h.advance()

        assert bad >= 4
        assert h.state["end good"]["status"] == "done"
        await h.advance("1h")
        assert h.state["end bad"]["status"] == "failed"
        assert len(calls.at) == 7


async def test_success_in_between_begins_the_count_anew() -> None:
    calls = Calls(fails=lambda task, second: ValueError("x") if task.key.startswith("bad") else None)
    async with calls.loop(policy={"attempts": 1}, concurrency=1) as h:
        for key in ("bad 1", "bad 2", "good", "bad 3", "bad 4"):
            submit(h, key)
            await h.advance()
        assert len(calls.at) == 5
        submit(h, "good 2")
        await h.advance()
        assert h.state["end good 2"]["status"] == "done"


@pytest.mark.parametrize(("breaker", "started"), [(2, 2), (5, 5), (0, 8)])
async def test_breaker_is_a_setting_of_the_limit(breaker: int, started: int) -> None:
    calls = Calls(fails=lambda task, second: ValueError("down"))
    async with calls.loop(policy={"attempts": 1}, concurrency=1, breaker=breaker) as h:
        submit(h, *range(8))
        await h.advance()

        assert len(calls.at) == started


@pytest.mark.parametrize("end", ["restart", "crash"])
async def test_limit_that_errors_hold_stays_held_over_a_restart_until_a_probe_or_a_person_releases_it(
    path: Path, end: str
) -> None:
    down = True
    calls = Calls(fails=lambda task, second: ConnectionError("down") if down else None)
    async with calls.loop(path, policy={"attempts": 1}, concurrency=1) as h:
        submit(h, *range(6))
        await h.advance()
        before = len(calls.at)
        await getattr(h, end)()
        await h.advance(1)
        assert len(calls.at) == before
        down = False
        await h.stop()
        assert main(["limits", "release", "llm", "--db", str(path)]) == 0
        await h.advance(1)

        assert len(calls.at) == 6
        assert h.sql("SELECT held_until_us FROM limits") == [{"held_until_us": None}]


async def test_retry_after_holds_the_limit_for_all_its_tasks(path: Path) -> None:
    calls = Calls(fails=lambda task, second: RetryAfter(120, "slow down") if second < 100 else None)
    async with calls.loop(path, policy={"attempts": 1}, concurrency=5) as h:
        submit(h, "a")
        await h.advance(10)
        submit(h, "b")
        submit(h, "free", limit="other")
        await h.advance(20)
        first = calls.at[:]
        held = h.sql("SELECT status, attempts FROM v_tasks WHERE key = 'b'")
        await h.crash()
        await h.advance("1h")

        assert first == [("a", 0), ("free", 10)]
        assert held == [{"status": "held", "attempts": 0}]
        assert all(second >= 120 for key, second in calls.at[2:] if key != "free")
        assert {h.state[f"end {key}"]["status"] for key in "ab"} == {"done"}


async def test_tasks_that_fail_by_their_own_fault_do_not_keep_all_others_waiting_for_ever() -> None:
    """Three bad inputs look like an outage; each good one that comes is the next probe, and ends it."""
    calls = Calls(fails=lambda task, second: ValueError("bad input") if task.key.startswith("bad") else None)
    async with calls.loop(policy={"attempts": 3}, concurrency=1) as h:
        submit(h, "bad 1", "bad 2", "bad 3", "good 1", "good 2")
        await h.advance("3 days")

        assert [row["status"] for row in h.sql("SELECT status FROM v_tasks WHERE key LIKE 'good%'")] == ["done"] * 2
        assert {row["status"] for row in h.sql("SELECT status FROM v_tasks WHERE key LIKE 'bad%'")} == {"held"}

        submit(h, "good 3")
        await h.advance("11m")
        assert h.sql("SELECT status FROM v_tasks WHERE key = 'good 3'") == [{"status": "done"}]

        submit(h, "good 4")
        await h.advance("11m")
        assert {row["status"] for row in h.sql("SELECT status FROM v_tasks WHERE key LIKE 'bad%'")} == {"failed"}


async def test_submission_of_a_known_key_is_no_probe_that_a_held_limit_waits_for() -> None:
    calls = Calls(fails=lambda task, second: ConnectionError("down") if task.key == "bad" else None)
    async with calls.loop(policy={"attempts": 1}, concurrency=5, breaker=1) as h:
        submit(h, "known")
        await h.advance(1)
        submit(h, "bad")
        await h.advance("1h")
        submit(h, "known")
        await h.advance(1)
        submit(h, "new")
        await h.advance("1h")

        assert [key for key, _ in calls.at] == ["known", "bad", "new"]


async def test_cost_above_the_limit_of_a_day_ends_that_day_and_not_the_limit() -> None:
    """The estimate is the largest cost that the limit has seen this day."""
    calls = Calls(usd=3)
    async with calls.loop(usd_per_day="2.5") as h:
        submit(h, "a", "b", "c")
        await h.advance("20h")
        assert len(calls.at) == 1
        await h.advance("3 days")

        assert len(calls.at) == 3


@pytest.mark.parametrize("live", [True, False], ids=["with a loop", "without"])
async def test_limit_of_the_function_holds_for_a_task_that_was_submitted_by_name(path: Path, live: bool) -> None:
    async def work(self: Any, task: Any) -> None:
        return None

    def put() -> None:
        with connect(path) as client:
            for number in range(3):
                client.submit("work", agent="worker", key=str(number))

    limits = {"llm": {"per_day": 1}}
    async with running(controller_on(path, worker(work, limit="llm"), limits=limits)):
        if live:
            await asyncio.to_thread(put)
    if not live:
        put()
    controller = controller_on(path, worker(work, limit="llm"), limits=limits)
    async with running(controller):
        await until(lambda: controller.state_context.get("applied 0"))
        await controller.transact(lambda context: context.set("later", 1))
        await controller.transact(lambda context: context.set("later", 2))

    assert rows(path, "SELECT limit_name, count(*) FROM task_attempts GROUP BY limit_name") == [("llm", 1)]

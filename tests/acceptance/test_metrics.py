"""Metrics: recorded in the unit, committed with it, counted over restarts, kept by the hour."""

from __future__ import annotations

import math
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from ael_store import AgentBase, Settings, StateContext, connect, push_metrics
from ael_store.errors import InvalidKey, InvalidValue, InvalidValueType, NotAllowedHere, UnitClosed
from ael_store.store.fork import fork
from ael_store.store.reader import Reader
from ael_store.store.recover import recover
from ael_store.store.verify import verify
from ael_store.testing import Harness, run_tick
from tests.loops import controller_on, rows
from tests.store.files import quiet


class Sensor(AgentBase):
    """Measures in each tick, and fails in every fifth one after it has measured."""

    name = "kitchen"
    priority = 10
    fails = True

    def on_start(self, context):
        self.n = 0

    def on_tick(self, context):
        self.n += 1
        context.metrics.gauge("temperature", 20 + self.n / 10)
        context.metrics.count("reads")
        context.metrics.count("reads", 2)
        push_metrics("room", {"people": self.n % 3})
        if self.fails and self.n % 5 == 0:
            raise ValueError("on purpose")


class Quiet(Sensor):
    fails = False


def is_sound(path: Path) -> bool:
    problems = verify(path).problems
    assert not problems, problems[:5]
    return True


def series(h: Harness) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["channel"], row["name"]): row for row in h.sql("SELECT * FROM v_metric_series")}


def totals(path: Path) -> dict[str, tuple[int, float]]:
    """How often and how much, told by the samples."""
    with sqlite3.connect(path) as connection:
        rows = connection.execute("SELECT channel || '/' || name, count(*), sum(value) FROM v_metrics GROUP BY 1")
        return {name: (count, total) for name, count, total in rows}


# -- in the unit ------------------------------------------------------------------------------------


async def test_what_a_unit_measured_takes_effect_with_it_and_nothing_of_one_that_failed() -> None:
    async with Harness([Sensor()]) as h:
        await h.advance("19s")
        await h.stop()

        known = series(h)
        assert known["kitchen", "temperature"]["samples"] == 16  # of 20 ticks four failed
        assert known["kitchen", "temperature"]["value"] == 21.9
        assert (known["kitchen", "reads"]["value"], known["kitchen", "reads"]["samples"]) == (48, 16)
        assert h.sql("SELECT DISTINCT agent, kind FROM v_metrics WHERE channel = 'room'") == [
            {"agent": "kitchen", "kind": "gauge"}
        ]
        assert not h.sql("SELECT 1 FROM v_metrics WHERE iteration IN (5, 10, 15, 20)")
        assert is_sound(h.path)


async def test_metrics_alone_wait_like_idle_iterations_and_leave_no_unit(tmp_path: Path) -> None:
    await controller_on(tmp_path / "ael.db", Quiet()).run(iterations=50)

    commits, last = rows(tmp_path / "ael.db", "SELECT count(DISTINCT commit_id), max(id) FROM iterations")[0]
    assert commits < last / 5
    assert not rows(tmp_path / "ael.db", "SELECT 1 FROM v_ticks WHERE kind = 'tick'")
    found = rows(tmp_path / "ael.db", "SELECT count(*), count(DISTINCT iteration) FROM v_metrics")
    assert found == [(3 * last, last)]
    assert is_sound(tmp_path / "ael.db")


async def test_counters_go_on_after_a_crash() -> None:
    async with Harness([Quiet()], settings=Settings(tick_log="all")) as h:
        await h.advance("9s")
        await h.crash()
        await h.restart(agents=[Quiet()])
        await h.advance("9s")
        await h.stop()

        iterations = h.sql("SELECT count(*) AS n FROM v_iterations")[0]["n"]
        assert series(h)["kitchen", "reads"]["value"] == 3 * iterations
        assert totals(h.path)["kitchen/reads"] == (iterations, 3 * iterations)
        assert is_sound(h.path)


REFUSED = {
    InvalidValueType: ("21", True, None, {"a": 1}),
    InvalidValue: (math.nan, math.inf, 2**70),
}


@pytest.mark.parametrize(("value", "error"), [(value, error) for error, values in REFUSED.items() for value in values])
async def test_what_is_no_number_is_refused_with_the_name_of_the_metric(value: Any, error: type[Exception]) -> None:
    class Wrong(AgentBase):
        def on_tick(self, context):
            with pytest.raises(error, match=r"metric 'temp' of channel 'wrong'"):
                context.metrics.gauge("temp", value)
            with pytest.raises(error, match=r"metric 'temp' of channel 'room'"):
                push_metrics("room", {"fine": 1, "temp": value})

    done = await run_tick(Wrong("wrong"))

    assert done.check().metrics == {}


async def test_what_can_not_be_a_metric_is_refused() -> None:
    class Wrong(AgentBase):
        def on_tick(self, context):
            metrics = context.metrics
            for name in ("", "a\nb", "x" * 201):
                with pytest.raises(InvalidKey, match="the name of a metric"):
                    metrics.gauge(name, 1)
            with pytest.raises(InvalidValueType, match="the name of a metric is 7"):
                push_metrics("room", {7: 1})  # type: ignore[dict-item]
            with pytest.raises(InvalidValueType, match="wanted is a mapping"):
                push_metrics("room", [1])  # type: ignore[arg-type]
            with pytest.raises(InvalidValue, match="what can fall is a gauge"):
                metrics.count("reads", -1)
            metrics.count("reads")
            with pytest.raises(InvalidValue, match="was counted in this unit and can't be set as a gauge"):
                metrics.gauge("reads", 1)
            for number in range(999):
                metrics.timing("loop", number)
            with pytest.raises(InvalidValue, match="has recorded 1000 values"):
                metrics.timing("loop", 1)

    (await run_tick(Wrong("wrong"))).check()


async def test_run_tick_shows_what_was_measured() -> None:
    class Fetcher(AgentBase):
        def on_tick(self, context):
            context.metrics.gauge("level", 1)
            context.metrics.gauge("level", 2)
            with pytest.raises(ValueError), context.metrics.timer("fetch"):
                raise ValueError
            context.metrics.count("reads", 0.5)
            context.metrics.count("reads", 0.25)

    metrics = (await run_tick(Fetcher("fetcher"))).check().metrics

    assert metrics["fetcher", "level"] == [2.0]
    assert metrics["fetcher", "reads"] == [0.75]
    assert 0 <= metrics["fetcher", "fetch"][0] < 5


async def test_recorder_of_a_unit_that_has_ended_is_closed() -> None:
    kept: list[Any] = []

    class Keeper(AgentBase):
        def on_tick(self, context):
            kept.append(context.metrics)

    await run_tick(Keeper("keeper"))

    with pytest.raises(UnitClosed):
        kept[0].gauge("late", 1)


async def test_another_kind_and_too_many_metrics_are_left_out_and_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("ael_store.runtime.metric_book.MOST_METRICS", 3)

    class Careless(AgentBase):
        priority = 10

        def on_tick(self, context):
            if context.iteration == 1:
                context.metrics.gauge("level", 1)
            else:
                context.metrics.count("level")
            context.metrics.gauge(f"order {context.iteration}", 1)
            context.set("n", context.iteration)

    async with Harness([Careless("careless")]) as h:
        await h.advance("5s")

        assert sorted(name for _, name in series(h)) == ["level", "order 1", "order 2"]
        assert series(h)["careless", "level"]["samples"] == 1
        assert sum("it is a gauge, and was recorded as a counter" in line for line in caplog.messages) == 1
        assert sum("there are 3 metrics already" in line for line in caplog.messages) == 1
        assert h.sql("SELECT error_count FROM v_agents")[0]["error_count"] == 0


# -- outside hooks ----------------------------------------------------------------------------------


async def test_from_outside_they_are_a_unit_of_their_own_and_durable_on_return(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Harness([]) as h:
        monkeypatch.setattr("ael_store.compat._context", None)
        with pytest.raises(NotAllowedHere, match="no loop in this process"):
            push_metrics("room", {"people": 1})
        await h.stop()
        with connect(h.path) as client:
            client.push_metrics("room", {"people": 3, "noise": 0.5})
            await client.aio.push_metrics("room", {"people": 4})
            with pytest.raises(InvalidValueType, match="metric 'people'"):
                client.push_metrics("room", {"noise": 1, "people": "many"})  # type: ignore[dict-item]

        rows = h.sql("SELECT name, value, agent FROM v_metrics ORDER BY id")
        assert [(row["name"], row["value"]) for row in rows] == [("people", 3), ("noise", 0.5), ("people", 4)]
        assert {row["agent"] for row in rows} == {"(outside)"}
        assert is_sound(h.path)


def test_lone_context_checks_and_forgets() -> None:
    context = StateContext()

    context.metrics.gauge("level", 1)
    with pytest.raises(InvalidValueType):
        context.metrics.gauge("level", "high")  # type: ignore[arg-type]


# -- hours, retention, and the past -----------------------------------------------------------------


async def test_samples_go_and_their_hours_stay() -> None:
    settings = Settings(metric_days=0.1, tick_rate=30)
    async with Harness([Quiet()], settings=settings) as h:
        await h.advance("12h")
        for _ in range(20):
            await h.advance("1m")
        await h.stop()

        ticks = h.sql("SELECT tick_count FROM v_agents")[0]["tick_count"]
        hours = h.sql("SELECT * FROM v_metric_hours WHERE channel = 'kitchen' AND name = 'reads' ORDER BY hour")
        assert len(hours) == 13
        assert (hours[3]["samples"], hours[3]["total"], hours[3]["mean"]) == (120, 360, 3)
        assert sum(row["samples"] for row in hours) == ticks
        assert sum(row["total"] for row in hours) == series(h)["kitchen", "reads"]["value"] == 3 * ticks
        first = h.sql("SELECT min(recorded_at) AS at FROM v_metrics")[0]["at"]
        assert "T03" < first[10:13] < "T10"  # the look is every six hours
        gauge = h.sql("SELECT * FROM v_metric_hours WHERE name = 'temperature' ORDER BY hour LIMIT 1")[0]
        assert (gauge["min"], gauge["max"], gauge["last"]) == (20.1, 32.0, 32.0)
        assert is_sound(h.path)


async def test_clock_that_was_set_back_over_the_full_hour_joins_what_belongs_together(tmp_path: Path) -> None:
    for start in ("2026-01-01T10:30:00Z", "2026-01-01T11:15:00Z"):
        async with Harness([Quiet()], store=tmp_path / "ael.db", start=start, settings=Settings(tick_rate=60)) as h:
            await h.advance("1h")

    hours = h.sql("SELECT hour, samples FROM v_metric_hours WHERE name = 'reads' ORDER BY hour")
    assert [row["hour"][11:13] for row in hours] == ["10", "11", "12"]
    assert sum(row["samples"] for row in hours) == series(h)["kitchen", "reads"]["samples"] > 110
    assert is_sound(h.path)


async def test_samples_go_first_where_the_file_is_too_large() -> None:
    async with Harness([Quiet()], settings=Settings(tick_rate=1, history_bytes=200_000)) as h:
        await h.advance("2h")

        assert h.sql("SELECT count(*) AS n FROM v_metrics")[0]["n"] < 8000
        assert h.sql("SELECT count(*) AS n FROM v_iterations")[0]["n"] > 5000
        assert is_sound(h.path)


async def test_metrics_follow_an_agent_to_its_new_name() -> None:
    async with Harness([Quiet()]) as h:
        await h.advance("5s")
        renamed = Quiet("cellar")
        renamed.aliases = ("kitchen",)
        await h.restart(agents=[renamed])
        await h.advance("5s")
        await h.stop()

        reads = [row for row in series(h).values() if row["name"] == "reads"]
        assert [(row["channel"], row["value"]) for row in reads] == [
            ("cellar", 3 * h.sql("SELECT sum(tick_count) AS n FROM v_agents WHERE name = 'cellar'")[0]["n"])
        ]
        assert is_sound(h.path)


async def test_fork_has_the_metrics_of_then(tmp_path: Path) -> None:
    async with Harness([Quiet()], settings=Settings(tick_rate=60)) as h:
        await h.advance("150m")
        await h.stop()
        for at in (151, 100, 61, 30, 0):
            out = tmp_path / f"{at}.db"
            fork(h.path, out, quiet, at=at)

            with Reader(out).connect() as connection:
                found = connection.exec_driver_sql(
                    "SELECT name, samples, total, value FROM v_metric_series WHERE channel = 'kitchen' ORDER BY name"
                ).fetchall()
            assert is_sound(out)
            known = {row[0]: tuple(row[1:]) for row in found}
            assert known.get("reads") == ((at, 3 * at, 3 * at) if at else None)
            if at:
                assert known["temperature"][0] == totals(out)["kitchen/temperature"][0] == at
                assert known["temperature"][2] == pytest.approx(20 + at / 10)


# -- the proof --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        ("UPDATE metric_samples SET value = value + 1 WHERE id = 4", "table metric_samples, row 4"),
        ("DELETE FROM metric_samples WHERE id = 4", "table metric_samples: 1 rows between"),
        ("UPDATE metrics SET samples = samples + 1 WHERE id = 1", "metric 'temperature' of channel 'kitchen': counts"),
        ("UPDATE metric_hours SET most = 99 WHERE metric_id = 1", "table metric_hours, row 1"),
        ("DELETE FROM metric_hours WHERE metric_id = 1", "metric 'temperature' of channel 'kitchen': counts"),
    ],
)
async def test_verify_finds_what_was_changed(damage: str, problem: str) -> None:
    async with Harness([Quiet()], settings=Settings(tick_rate=600)) as h:
        await h.advance("2h")
        await h.stop()
        with sqlite3.connect(h.path) as connection:
            connection.execute(damage)
        connection.close()

        assert any(line.startswith(problem) for line in verify(h.path).problems)


async def test_recovered_database_has_them_and_counts_on(tmp_path: Path) -> None:
    async with Harness([Quiet()], settings=Settings(tick_rate=60)) as h:
        await h.advance("2h")
        await h.stop()
        with sqlite3.connect(h.path) as connection:
            connection.execute("PRAGMA foreign_keys = OFF")
            connection.execute("DELETE FROM metrics WHERE id = 2")
        connection.close()
        out = tmp_path / "saved.db"

        recover(h.path, out, quiet)

        assert is_sound(out)
        assert set(totals(out)) == {"kitchen/temperature", "room/people"}

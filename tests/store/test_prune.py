"""Retention: history before the horizon goes, and what the present and later moments are made of stays."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from ael_store import AgentBase, Settings
from ael_store.errors import HistoryGone
from ael_store.runtime.pruner import Pruner
from ael_store.store.reader import Reader
from ael_store.store.verify import verify
from ael_store.testing import Harness

KEEP_ALL: dict[str, Any] = {"history_days": 1000, "event_days": 1000, "history_bytes": 0}


class Scribbler(AgentBase):
    """Sets, deletes and emits at random, and fails now and then."""

    priority = 10

    async def on_tick(self, context):
        for _ in range(context.random.randrange(3)):
            key = f"k{context.random.randrange(12)}"
            if context.random.random() < 0.2:
                context.delete(key)
            else:
                context.set(key, context.random.randrange(1000))
        if context.random.random() < 0.5:
            context.emit(context.random.choice(["a", "b", "c"]), {"x": context.random.randrange(9)})
        if context.random.random() < 0.1:
            self.metadata["n"] = context.random.randrange(100)
        if context.random.random() < 0.05:
            raise ValueError("on purpose")


class Reader3(AgentBase):
    """Handles events, but for those that become dead letters."""

    name = "reader"
    subscriptions = ("a",)

    async def on_event(self, event, context):
        if event.data["x"] == 3:
            raise ValueError("indigestible")
        context.increment("handled")


@asynccontextmanager
async def scribbling(seed: int = 0, tick_rate: float = 1.0, **settings: Any) -> AsyncIterator[Harness]:
    agents = [Scribbler("one"), Scribbler("two"), Reader3()]
    options = Settings(**{**KEEP_ALL, "delivery_attempts": 2, **settings})
    async with Harness(agents, settings=options, seed=seed, tick_rate=tick_rate) as h:
        yield h


def is_sound(h: Harness) -> bool:
    problems = verify(h.path).problems
    assert not problems, problems[:5]
    return True


def begins_at(h: Harness) -> int:
    reader = Reader(h.path)
    try:
        return reader.horizon().iteration
    finally:
        reader.close()


@pytest.mark.parametrize("seed", range(4))
async def test_later_moments_are_what_they_were_and_earlier_ones_are_refused(seed: int) -> None:
    pictures: dict[int, dict[str, Any]] = {}
    async with scribbling(seed, history_rows=300) as h:
        for _ in range(30):
            await h.advance(10)
            pictures[h.iteration] = h.state
            assert is_sound(h)
        reader = Reader(h.path)
        horizon = reader.horizon()
        assert 0 < horizon.iteration < h.iteration
        compared = 0
        for iteration, state in pictures.items():
            if iteration < horizon.iteration:
                with pytest.raises(HistoryGone, match=f"history begins at iteration {horizon.iteration}"):
                    reader.moment(iteration)
            else:
                moment = reader.moment(iteration)
                assert {row["key"]: json.loads(row["value"]) for row in reader.state_at(moment)} == state
                compared += 1
        reader.close()
        assert compared > 5

        await h.crash()  # and it goes on as if nothing had been removed
        await h.advance(60)
        assert is_sound(h)


async def test_number_of_rows_stays_near_what_the_setting_says() -> None:
    async with scribbling(history_rows=500) as h:
        await h.advance("20m")
        rows = sum(
            h.sql(f"SELECT count(*) AS n FROM {table}")[0]["n"] for table in ("ticks", "events", "state_changes")
        )

        assert rows < 900  # those of the last minute, the base, and what dead letters need
        assert h.sql("SELECT count(*) AS n FROM iterations")[0]["n"] < 400


async def look(h: Harness) -> None:
    """Have the loop look now for what to remove, and remove it."""
    life = h.controller._life
    assert life is not None
    life.run.pruner.look_now()
    await h.advance(1)


async def test_history_ends_by_age_and_events_end_earlier() -> None:
    async with scribbling(history_days=0.02, event_days=0.01) as h:  # 28.8 and 14.4 minutes
        await h.advance("1h")
        await look(h)

        first_change = h.sql("SELECT min(started_at) AS at FROM v_iterations")[0]["at"]
        kept = h.sql("SELECT event_id FROM v_dead_letters UNION SELECT event_id FROM v_pending")
        first_event = h.sql(
            "SELECT min(emitted_at) AS at FROM v_events WHERE id NOT IN (SELECT event_id FROM v_dead_letters)"
        )[0]["at"]
        assert "2026-01-01T00:30" <= first_change <= "2026-01-01T00:33"
        assert "2026-01-01T00:44" <= first_event <= "2026-01-01T00:47"
        assert kept
        assert is_sound(h)


@pytest.mark.parametrize("restarts", [False, True])
async def test_nothing_is_too_old_by_a_clock_that_was_just_set_years_ahead(restarts: bool) -> None:
    async with scribbling(tick_rate=120, history_days=90, event_days=30) as h:
        await h.advance("1h")
        if restarts:
            await h.restart(down="20000 days")
        else:
            h.clock._start_us += 20_000 * 86_400_000_000
        await h.advance("20h")
        assert begins_at(h) == 0
        assert h.sql("SELECT min(id) AS id FROM v_events") == [{"id": 1}]

        await h.advance("12h")  # a day has gone by, by the clock that nothing but itself can tell to be wrong

        assert begins_at(h) > 0
        assert is_sound(h)


async def test_clock_that_was_behind_for_a_while_makes_nothing_old() -> None:
    async with scribbling(tick_rate=120, history_days=90, event_days=30) as h:
        await h.advance("1h")
        before = h.clock._start_us
        h.clock._start_us -= 20_000 * 86_400_000_000
        await h.advance("6h")
        h.clock._start_us = before
        await h.advance("30h")

        assert begins_at(h) == 0
        assert h.sql("SELECT min(id) AS id FROM v_events") == [{"id": 1}]


async def test_dead_letters_and_what_waits_for_an_absent_subscriber_are_kept() -> None:
    async with scribbling(history_rows=200, backlog_days=5) as h:
        await h.advance("1m")
        await h.restart(agents=[Scribbler("one"), Scribbler("two")])
        await h.advance("10m")
        waiting = [row["event_id"] for row in h.sql("SELECT event_id FROM v_pending WHERE subscriber = 'reader'")]
        letters = [row["event_id"] for row in h.sql("SELECT event_id FROM v_dead_letters")]
        horizon = begins_at(h)
        assert len(waiting) > 50
        assert letters
        assert h.sql("SELECT count(*) AS n FROM v_events WHERE iteration <= :n", n=horizon)[0]["n"] > 50
        handled = h.state["handled"]

        await h.restart(agents=[Scribbler("one"), Scribbler("two"), Reader3()])
        await h.advance("20m")

        assert h.state["handled"] > handled + 50
        assert not h.sql(
            "SELECT * FROM v_pending WHERE event_id IN (SELECT value FROM json_each(:ids))", ids=str(waiting)
        )
        left = h.sql("SELECT id FROM v_events WHERE id IN (SELECT value FROM json_each(:ids))", ids=str(waiting))
        dead = h.sql("SELECT event_id FROM v_dead_letters")
        assert {row["id"] for row in left} <= {row["event_id"] for row in dead}  # the others went with the next prune
        assert is_sound(h)


async def test_delayed_events_go_once_delivered_and_waiting_ones_stay() -> None:
    class Reminder(AgentBase):
        subscriptions = ("note",)
        was_asked = False

        async def on_tick(self, context):
            context.emit("note", {}, after=3 if self.was_asked else "300 days")
            self.was_asked = True

        async def on_event(self, event, context):
            pass

    async with Harness([Reminder("reminder")], settings=Settings(**{**KEEP_ALL, "history_rows": 200})) as h:
        await h.advance("1h")
        emitted = h.sql("SELECT max(id) AS n FROM delayed_events")[0]["n"]
        delayed = h.sql("SELECT id, event_id FROM delayed_events ORDER BY id")

        assert is_sound(h)
        assert emitted > 1000
        assert len(delayed) < 300
        assert delayed[0]["event_id"] is None


async def test_counts_of_agents_survive_and_hours_are_told_for_ever() -> None:
    async with scribbling(tick_rate=10, history_rows=300) as h:
        await h.advance("3h")

        hours = h.sql("SELECT hour, ticks, errors FROM v_agent_hours WHERE agent = 'one' ORDER BY hour")
        agent = h.sql("SELECT tick_count, error_count FROM v_agents WHERE name = 'one'")[0]
        assert [row["hour"][11:13] for row in hours] == ["00", "01", "02"]
        assert 350 < hours[1]["ticks"] + hours[1]["errors"] <= 360
        assert sum(row["errors"] for row in hours) <= agent["error_count"]
        assert h.sql("SELECT count(*) AS n FROM v_iterations")[0]["n"] < 1000
        assert is_sound(h)


async def test_prune_that_is_cut_short_goes_on_at_the_next_start(monkeypatch: pytest.MonkeyPatch) -> None:
    left = 3

    async def remove(self: Pruner, pruning: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            self.pruning = None  # as a process that was killed between two batches
            self.next_us = self._seen_rows = self._stat_us = 2**62
            return
        self._rows = 20
        await original(self, pruning)

    original = Pruner._remove
    async with scribbling(history_rows=100_000) as h:
        await h.advance("5m")
        path = h.path
        before = h.state
        monkeypatch.setattr(Pruner, "_remove", remove)
        h._options["settings"] = Settings(**{**KEEP_ALL, "history_rows": 200})
        await h.restart()
        await h.advance("90s")
        assert h.sql("SELECT value FROM positions WHERE name = 'pruning'")[0]["value"] != "null"
        assert begins_at(h) > 0
        assert is_sound(h)

        monkeypatch.setattr(Pruner, "_remove", original)
        await h.crash()
        await h.advance("1s")

        assert h.sql("SELECT value FROM positions WHERE name = 'pruning'") == [{"value": "null"}]
        assert h.sql("SELECT min(iteration) AS n FROM v_iterations")[0]["n"] == begins_at(h) + 1
        assert is_sound(h)
        assert set(before) <= set(h.state) | {f"k{n}" for n in range(12)}
        assert path.exists()


@pytest.mark.parametrize(
    ("table", "column", "kind"),
    [("state_changes", "value", "state_changes"), ("events", "data", "events"), ("ticks", "duration_us", "ticks")],
)
async def test_verify_finds_a_changed_row_from_before_the_horizon(table: str, column: str, kind: str) -> None:
    async with scribbling(history_rows=200) as h:
        await h.advance("5m")
        await h.stop()
        [number] = h.sql("SELECT min(row_id) AS n FROM row_digests WHERE why = 'base' AND kind = :kind", kind=kind)
        with sqlite3.connect(h.path) as connection:
            value = 77 if column == "duration_us" else "77"
            connection.execute(f"UPDATE {table} SET {column} = ? WHERE id = ?", (value, number["n"]))
        connection.close()

        problems = verify(h.path).problems

        assert any(f"table {table}, row {number['n']}, kept from before the horizon" in text for text in problems)


async def test_verify_finds_a_kept_row_that_is_gone() -> None:
    async with scribbling(history_rows=200) as h:
        await h.advance("5m")
        await h.stop()
        [number] = h.sql("SELECT min(row_id) AS n FROM row_digests WHERE why = 'base' AND kind = 'state_changes'")
        with sqlite3.connect(h.path) as connection:
            connection.execute("DELETE FROM state_changes WHERE id = ?", (number["n"],))
        connection.close()

        assert any("it is gone" in text for text in verify(h.path).problems)


class Loud(AgentBase):
    name = "loud"
    priority = 10

    async def on_tick(self, context):
        context.set("noise", "x" * 2000 + str(context.iteration))


async def test_file_stops_growing_at_its_size_and_shrinks_where_more_is_kept_than_allowed(tmp_path: Path) -> None:
    async with Harness([Loud()], settings=Settings(**{**KEEP_ALL, "history_bytes": 1_000_000})) as h:
        await h.advance("50m")
        await look(h)

        reader = Reader(h.path)
        used, free = reader.page_bytes()
        reader.close()
        assert used < 1_100_000
        assert free < 9_000_000  # more is given back
        assert is_sound(h)

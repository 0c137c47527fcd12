"""Past moments: what the database says of each is what a reader saw then."""

from __future__ import annotations

import json
import random
import re
import sqlite3
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event

from ael_store import AELController, Event, StateContext, Store, connect
from ael_store.errors import DatabaseNotUsable, HistoryGone, UsageError
from ael_store.store.reader import Reader
from ael_store.testing import Harness
from tests.loops import agent, controller_on, rows

START = datetime(2026, 1, 1, tzinfo=UTC)
KEYS = [f"key{number}" for number in range(8)] + ["other"]


def restless(seed: int) -> Callable[[StateContext], None]:
    """A tick that does something at random, and nothing in half of the iterations."""
    source = random.Random(seed)

    def tick(context: StateContext) -> None:
        for _ in range(source.choice((0, 0, 1, 3))):
            key = source.choice(KEYS)
            match source.randrange(5):
                case 0:
                    context.delete(key)
                case 1:
                    context.emit("poke", {"key": key})
                case 2:
                    raise ValueError("on purpose, and what it has set goes")
                case _:
                    context.set(key, source.choice([None, True, 3, 4.5, "text", [1], {"a": 1}]))

    return tick


def poked(event: Event, context: StateContext) -> None:
    context.set(event.data["key"], [context.iteration])


async def command(h: Harness, name: str, **arguments: Any) -> Any:
    """Carry out a command as `ael` does."""
    reply = h.controller._host.request(name, arguments, "test")
    await h.advance(0)
    return reply.result(timeout=0)


@pytest.fixture
async def h() -> AsyncIterator[Harness]:
    """A loop with one agent that counts; each iteration sets `n` to its number."""
    counter = agent("counter", tick=lambda context: context.set("n", context.iteration))
    async with Harness([counter]) as harness:
        yield harness


def whole(path: Path, moment: Any) -> dict[str, Any]:
    with Store(path).at(moment) as past:
        return past.get_all()


def idle_after(iteration: int) -> Callable[[StateContext], None]:
    def tick(context: StateContext) -> None:
        if context.iteration <= iteration:
            context.set("n", context.iteration)

    return tick


@pytest.mark.parametrize("seed", range(3))
async def test_every_past_state_is_what_a_reader_saw_after_that_iteration(seed: int) -> None:
    source = random.Random(seed)
    seen: dict[int, dict[str, Any]] = {0: {}}
    agents = [agent(f"a{number}", tick=restless(seed * 10 + number)) for number in range(3)]
    async with Harness([*agents, agent("p", event=poked, subscriptions=["poke"])], seed=seed) as h:

        def look(_summary: Any = None) -> None:
            seen[h.iteration] = h.state

        h.controller.observe(look)
        look()
        for _ in range(20):
            await h.advance(source.choice((1, 1, 3, 15)))
            if source.random() < 0.3:
                h.set(source.choice(KEYS), source.randrange(100))
            if source.random() < 0.2:
                await command(h, "loop.pause")
                await command(h, "state.set", key=source.choice(KEYS), value=[source.random()])
                look()
                await command(h, "loop.resume")
            if source.random() < 0.1:
                await h.restart(down=60)
                h.controller.observe(look)
                look()

        for number in range(h.iteration + 1):
            if number not in seen:  # it was idle
                seen[number] = seen[number - 1]
            with Store(h.path).at(number) as past:
                assert past.get_all() == seen[number], number
                for key in source.sample(KEYS, 2):
                    assert past.get(key, "nothing") == seen[number].get(key, "nothing")
                    assert (key in past) == (key in seen[number])
        reader = Reader(h.path)
        for _ in range(50):
            one, other = source.randrange(h.iteration + 1), source.randrange(h.iteration + 1)
            found = reader.differences(reader.moment(one), reader.moment(other), "key")
            differing = {row["key"]: (row["old"], row["new"]) for row in found if row["old"] != row["new"]}
            texts = [{key: json.dumps(value) for key, value in seen[n].items()} for n in (one, other)]
            assert set(differing) == {
                key for key in KEYS if key != "other" and texts[0].get(key) != texts[1].get(key)
            }, (one, other)
        reader.close()


async def test_before_the_first_iteration_nothing_was_there(h: Harness) -> None:
    with Store(h.path).at(0) as past:
        assert (past.iteration, past.at, past.get_all(), past.get_history()) == (0, None, {}, [])


async def test_iterations_that_share_a_commit_have_moments_of_their_own() -> None:
    async with Harness([agent("counter", tick=idle_after(3))]) as h:
        await h.advance(8)
        await command(h, "state.set", key="n", value="later")

        assert len(set(rows(h.path, "SELECT commit_id FROM iterations WHERE id > 3"))) < h.iteration - 3
        for number in range(4, h.iteration):
            with Store(h.path).at(number) as past:
                assert past.get("n") == 3


async def test_change_while_paused_belongs_to_the_last_iteration(h: Harness) -> None:
    await command(h, "loop.pause")
    last = h.iteration
    await command(h, "state.set", key="n", value="by hand")
    await command(h, "loop.resume")
    await h.advance(3)

    with Store(h.path).at(last) as past:
        assert past.get("n") == "by hand"
    with Store(h.path).at(last + 1) as past:
        assert past.get("n") == last + 1


async def test_what_a_run_does_before_its_first_iteration_belongs_to_the_last_one() -> None:
    starting = agent(
        "starting",
        start=lambda context: context.set("started", True),
        shutdown=lambda context: context.set("ended", True),
    )
    async with Harness([starting]) as h:
        assert whole(h.path, 0) == {"started": True}
        await h.advance(3)
        last = h.iteration
        await h.restart()

        assert whole(h.path, last - 1) == {"started": True}
        assert whole(h.path, last) == {"started": True, "ended": True}


# -- times -------------------------------------------------------------------------------------------


async def test_time_means_the_last_iteration_that_had_started(h: Harness) -> None:
    await h.advance(10)
    store = Store(h.path)

    for seconds, iteration in ((0, 1), (0.5, 1), (1, 2), (7.999999, 8), (10, 11), (11, 11)):
        for when in (
            START + timedelta(seconds=seconds),
            (START + timedelta(seconds=seconds)).replace(tzinfo=None),
            (START + timedelta(seconds=seconds)).isoformat(),
            (START + timedelta(seconds=seconds)).isoformat().replace("+00:00", "Z"),
        ):
            with store.at(when) as past:
                assert (past.iteration, past.get("n")) == (iteration, iteration)
                assert past.at == START + timedelta(seconds=iteration - 1)
    with store.at(START - timedelta(days=400)) as past:
        assert past.iteration == 0


async def test_time_that_was_twice_means_one_of_both() -> None:
    async with Harness([agent("counter", tick=lambda context: context.set("n", context.iteration))]) as h:
        await h.advance(10)
        h.clock._start_us -= 5_000_000  # the wall clock is set back by 5 s
        await h.advance(10)
        started = dict(rows(h.path, "SELECT id, started_us FROM iterations"))
        last = max(started)

        for us in sorted({*started.values(), *(us + 1 for us in started.values())}):
            with Store(h.path).at(datetime.fromtimestamp(us / 1e6, UTC)) as past:
                n = past.iteration
            assert started.get(n, 0) <= us, n
            assert n == last or us < started[n + 1], n


@pytest.mark.parametrize(
    ("moment", "message"),
    [
        ("", "is no moment"),
        ("yesterday", "is no moment"),
        ("-1", "is no moment"),
        ("1.5", "is no moment"),
        (-1, "is no moment"),
        (True, "is no moment"),
        (1.5, "is no moment"),
        (99, "there is no iteration 99 yet; the last one is 1"),
        ("9" * 30, "is no moment"),
        ("2999-01-01", "2999-01-01T00:00:00 is still to come"),
    ],
)
async def test_what_is_no_moment_yet_is_refused(h: Harness, moment: Any, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        Store(h.path).at(moment)


async def test_times_of_a_clock_that_is_ahead_are_past_where_iterations_have_them() -> None:
    counter = agent("counter", tick=lambda context: context.set("n", context.iteration))
    async with Harness([counter], start="2998-12-31T23:59:59") as h:
        await h.advance(10)

        assert whole(h.path, "2999-01-01") == {"n": 2}


# -- where history begins ----------------------------------------------------------------------------


def forget_up_to(path: Path, iteration: int) -> None:
    """Move the horizon, as a prune does before it removes anything."""
    with Store(path).at(iteration) as past:
        moment = past._moment
    horizon = {
        "iteration": iteration,
        "started_us": moment.started_us,
        "tick_id": moment.tick_id,
        "change_id": moment.change_id,
        "event_id": moment.event_id,
        "commit_id": moment.commit_id,
        "forgotten_event_id": moment.event_id,
    }
    connection = sqlite3.connect(path)
    with connection:
        connection.execute("INSERT INTO positions (name, value) VALUES ('horizon', ?)", (json.dumps(horizon),))
    connection.close()


async def test_what_was_removed_is_refused_with_where_history_begins(h: Harness) -> None:
    await h.advance(10)
    await h.stop()
    forget_up_to(h.path, 5)

    for gone in (0, 4, "4", START, START + timedelta(seconds=3.9)):
        with pytest.raises(HistoryGone, match=r"history begins at iteration 5, 2026-01-01T00:00:04\.000000Z"):
            Store(h.path).at(gone)
    for kept in (5, START + timedelta(seconds=4)):
        assert whole(h.path, kept) == {"n": 5}


async def test_moment_that_is_removed_while_somebody_looks_is_an_error_and_no_wrong_value(h: Harness) -> None:
    await h.advance(10)
    await h.stop()
    past = Store(h.path).at(4)
    reader = Reader(h.path)
    earlier, later = reader.moment(4), reader.moment(8)
    forget_up_to(h.path, 5)

    questions: list[Callable[[], Any]] = [
        lambda: past.get("n"),
        lambda: past.has("n"),
        past.get_all,
        past.get_history,
        lambda: reader.differences(later, earlier),
        lambda: reader.agents_at(earlier),
    ]
    for question in questions:
        with pytest.raises(HistoryGone):
            question()
    past.close()
    reader.close()


# -- the past as Python sees it ----------------------------------------------------------------------


async def test_past_state_reads_like_a_context(h: Harness) -> None:
    await h.advance(3)
    await command(h, "state.set", key="b/1", value={"x": [1]})
    at = h.iteration
    await h.advance(3)

    with h.controller.store.at(at) as past:
        assert list(past) == ["b/1", "n"]
        assert past.get_all("b/") == {"b/1": {"x": [1]}}
        assert past.get_all("b*") == {}
        assert past.get("none") is None
        assert past.get("none", 7) == 7
        assert "n" in past
        assert not past.has("none")
        assert repr(past) == f"<PastState of {h.path} after iteration {at}>"
        past.get("b/1")["x"].append(2)
        assert past.get("b/1") == {"x": [1]}


async def test_history_ends_at_the_moment_and_has_the_shape_of_a_context(h: Harness) -> None:
    await h.advance(4)

    with connect(h.path) as client, client.at(3) as past:
        assert past.get_history("n") == past.get_history()
        assert [(row["old_value"], row["new_value"], row["iteration"]) for row in past.get_history("n")] == [
            (None, 1, 1),
            (1, 2, 2),
            (2, 3, 3),
        ]
        assert past.get_history("n") == h.controller.state_context.get_history("n")[:3]
        assert past.get_history("none") == []


async def test_past_is_there_without_a_loop(tmp_path: Path) -> None:
    path = tmp_path / "ael.db"
    controller: AELController = controller_on(path, agent("c", tick=lambda c: c.set("n", c.iteration)), tick_rate=0)
    await controller.run(4)

    assert whole(path, 2) == {"n": 2}
    with controller.store.at(2) as past:
        assert past.get("n") == 2
    with connect(path) as client, client.at("3") as past:
        assert past.get("n") == 3


def test_database_that_is_not_there_has_no_past(tmp_path: Path) -> None:
    with pytest.raises(DatabaseNotUsable, match="does not exist"):
        Store(tmp_path / "ael.db").at(0)


# -- speed -------------------------------------------------------------------------------------------

QUESTIONS: dict[str, Callable[[Reader], Any]] = {
    "value": lambda reader: reader.value_at(reader.moment(3), "n"),
    "state": lambda reader: reader.state_at(reader.moment(3), "n"),
    "history": lambda reader: reader.history("n", 10, reader.moment(3)),
    "differences": lambda reader: reader.differences(reader.moment(2), reader.moment(4)),
    "undo": lambda reader: reader.undo_plan(agent="counter", since=3),
    "moment by time": lambda reader: reader.moment(START + timedelta(seconds=2)),
}


@pytest.mark.parametrize("question", QUESTIONS)
async def test_question_about_the_past_looks_at_no_whole_history(h: Harness, question: str) -> None:
    await h.advance(5)
    reader = Reader(h.path)
    asked: list[tuple[str, Any]] = []

    @event.listens_for(reader.engine, "before_cursor_execute")
    def note(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_more: Any) -> None:
        asked.append((statement, parameters))

    QUESTIONS[question](reader)
    reader.close()

    connection = sqlite3.connect(h.path)
    plans = [
        str(row[3])
        for statement, parameters in asked
        if statement.startswith("SELECT")
        for row in connection.execute(f"EXPLAIN QUERY PLAN {statement}", parameters)
    ]
    connection.close()
    slow = [step for step in plans if re.match(r"SCAN (c|t|e|i|state_changes|ticks|events|iterations)\b", step)]
    assert plans
    assert not slow, plans
    assert not [step for step in plans if "AUTOMATIC" in step], plans

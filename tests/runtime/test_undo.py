"""Undo writes back what was there before, and touches nothing that somebody has changed since."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from typing import Any

import pytest

from ael_store import StateContext, connect
from ael_store.errors import AgentNotFound, HistoryGone, UsageError
from ael_store.store.reader import Reader
from ael_store.store.verify import verify
from ael_store.testing import Harness
from ael_store.testing.virtual_clock import START
from tests.loops import agent, rows
from tests.store.test_moment import forget_up_to

Plan = dict[int, Callable[[StateContext], None]]


def scripted(name: str, plan: Plan) -> Any:
    """An agent that does in each iteration what the plan says, and later the same through `plan`."""

    def tick(context: StateContext) -> None:
        if (action := plan.get(context.iteration)) is not None:
            action(context)

    return agent(name, tick=tick)


@pytest.fixture
def bad() -> Plan:
    return {}


@pytest.fixture
def good() -> Plan:
    return {}


@pytest.fixture
async def h(bad: Plan, good: Plan) -> AsyncIterator[Harness]:
    """Two agents, `bad` and `good`; in iteration 1 the good one has set `a`, `b` and `c` to 1."""
    good[1] = lambda context: context.update({"a": 1, "b": 1, "c": 1})
    async with Harness([scripted("good", good), scripted("bad", bad)]) as harness:
        yield harness


async def undo(h: Harness, **scope: Any) -> Any:
    """Undo through the running loop, as `ael state undo` does."""
    reply = h.controller._host.request("state.undo", scope, "test")
    await h.advance(0)
    return reply.result(timeout=0)


# -- identity ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("runs", [True, False], ids=["loop", "alone"])
async def test_undo_after_do_is_as_before_but_for_keys_that_others_changed_since(
    h: Harness, bad: Plan, good: Plan, seed: int, runs: bool
) -> None:
    source = random.Random(seed)
    keys = [f"k{number}" for number in range(12)]
    contested = set(source.sample(keys, 4))

    def scribble(own: list[str]) -> Callable[[StateContext], None]:
        writes = [(source.choice(own), source.choice([None, 1, "x", [2], "gone"])) for _ in range(4)]

        def act(context: StateContext) -> None:
            for key, value in writes:
                context.delete(key) if value == "gone" else context.set(key, value)

        return act

    for iteration in range(2, 10):
        good[iteration] = scribble(keys)
    for iteration in range(10, 20):
        bad[iteration] = scribble(keys)
        good[iteration] = scribble(sorted(contested))
    await h.advance(8)
    before = h.state
    await h.advance(12)
    after = h.state
    if not runs:
        await h.stop()

    if runs:
        done = await undo(h, agent="bad", since=10)
    else:
        with connect(h.path) as client:
            done = client._change("state.undo", {"agent": "bad", "since": 10})

    left = set(keys) - contested
    assert {key: h.state.get(key, "none") for key in left} == {key: before.get(key, "none") for key in left}
    for row in done["kept"]:
        assert row["key"] in contested
        assert (row["agent"], row["why"]) == ("good", "changed since")
        assert h.state.get(row["key"], "none") == after.get(row["key"], "none")
    assert {row["key"] for row in done["undone"]} >= {key for key in left if before.get(key) != after.get(key)}
    assert not verify(h.path).problems


# -- what comes back ---------------------------------------------------------------------------------


async def test_value_from_before_all_of_its_changes_is_written_back(h: Harness, bad: Plan) -> None:
    bad[2], bad[3] = lambda c: c.set("a", 2), lambda c: c.set("a", 3)
    await h.advance(2)

    assert await undo(h, agent="bad", since=2) == {
        "undone": [{"key": "a", "from": 3, "to": 1}],
        "kept": [],
        "changed": True,
    }
    assert h.state["a"] == 1


async def test_new_key_goes_and_deleted_key_comes_back(h: Harness, bad: Plan) -> None:
    def act(context: StateContext) -> None:
        context.update({"new": 1, "b": None})
        context.delete("a")

    bad[2] = act
    await h.advance(1)

    done = await undo(h, iteration=2)

    assert done["undone"] == [
        {"key": "a", "from": None, "to": 1},
        {"key": "b", "from": None, "to": 1},
        {"key": "new", "from": 1, "to": None},
    ]
    assert h.state == {"a": 1, "b": 1, "c": 1}


async def test_key_that_another_agent_has_changed_since_is_kept_and_reported(h: Harness, bad: Plan, good: Plan) -> None:
    bad[2] = lambda c: c.update({"a": 2, "b": 2})
    good[3] = lambda c: c.set("a", 3)
    await h.advance(2)

    done = await undo(h, agent="bad", since=2)

    assert done["undone"] == [{"key": "b", "from": 2, "to": 1}]
    assert done["kept"] == [{"key": "a", "why": "changed since", "agent": "good", "iteration": 3}]
    assert h.state == {"a": 3, "b": 1, "c": 1}


async def test_what_another_agent_set_in_between_comes_back(h: Harness, bad: Plan, good: Plan) -> None:
    bad[2], good[3], bad[4] = (lambda c: c.set("a", 2)), (lambda c: c.set("a", 3)), (lambda c: c.set("a", 4))
    await h.advance(3)

    assert (await undo(h, agent="bad", since=2))["undone"] == [{"key": "a", "from": 4, "to": 3}]


async def test_key_that_came_back_by_itself_is_no_change(h: Harness, bad: Plan) -> None:
    bad[2], bad[3] = lambda c: c.set("a", 2), lambda c: c.set("a", 1)
    await h.advance(2)

    assert await undo(h, agent="bad", since=2) == {"undone": [], "kept": [], "changed": False}


async def test_one_change_is_undone_where_it_is_the_newest(h: Harness, bad: Plan) -> None:
    bad[2], bad[3] = lambda c: c.update({"a": 2, "b": 2}), lambda c: c.set("b", 3)
    await h.advance(2)
    first = {row["key"]: row["id"] for row in h.sql("SELECT id, key FROM v_state_history WHERE iteration = 2")}

    assert (await undo(h, change=first["a"]))["undone"] == [{"key": "a", "from": 2, "to": 1}]
    assert (await undo(h, change=first["b"]))["kept"] == [
        {"key": "b", "why": "changed since", "agent": "bad", "iteration": 3}
    ]


async def test_iteration_is_undone_whole_or_for_one_agent(h: Harness, bad: Plan, good: Plan) -> None:
    bad[2], good[2] = lambda c: c.set("a", 2), lambda c: c.set("b", 2)
    await h.advance(1)

    assert (await undo(h, iteration=2, agent="bad"))["undone"] == [{"key": "a", "from": 2, "to": 1}]
    assert (await undo(h, iteration=2))["undone"] == [{"key": "b", "from": 2, "to": 1}]


async def test_since_a_time_means_what_was_done_from_then_on(h: Harness, bad: Plan) -> None:
    for iteration in (2, 3, 4):
        bad[iteration] = lambda c: c.set("a", c.iteration)
    await h.advance(5)
    third = START + timedelta(seconds=2)

    for since, value in ((third, 2), (third + timedelta(microseconds=1), 3), (third - timedelta(microseconds=1), 2)):
        reader = Reader(h.path)
        [step] = reader.undo_plan(agent="bad", since=since.isoformat()).steps
        reader.close()
        assert step.before == str(value)


async def test_changes_from_outside_are_those_of_outside(h: Harness) -> None:
    h.set("a", "by hand")
    await h.advance(1)

    assert (await undo(h, agent="(outside)", since=2))["undone"] == [{"key": "a", "from": "by hand", "to": 1}]


async def test_redacted_value_can_not_come_back(h: Harness, bad: Plan) -> None:
    h.controller._host.request("state.redact", {"key": "a"}, "test")
    await h.advance(0)
    [redaction] = rows(h.path, "SELECT id FROM v_state_history WHERE operation = 'delete'")

    assert (await undo(h, change=redaction))["kept"] == [
        {"key": "a", "why": "redacted", "agent": "good", "iteration": 1}
    ]
    assert "a" not in h.state

    bad[h.iteration + 1] = lambda c: c.set("a", 3)
    await h.advance(1)
    assert (await undo(h, agent="bad", since=2))["undone"] == [{"key": "a", "from": 3, "to": None}]


async def test_text_that_looks_redacted_and_is_not_comes_back(h: Harness, bad: Plan, good: Plan) -> None:
    good[2], bad[3] = lambda c: c.set("a", "(redacted)"), lambda c: c.set("a", 3)
    await h.advance(2)

    assert (await undo(h, agent="bad", since=2))["undone"] == [{"key": "a", "from": 3, "to": "(redacted)"}]


# -- beside a loop -----------------------------------------------------------------------------------


async def test_what_was_changed_an_instant_before_and_is_not_committed_yet_is_kept(h: Harness, bad: Plan) -> None:
    bad[2] = lambda c: c.update({"a": 2, "b": 2, "c": 2})
    await h.advance(1)
    request = h.controller._host.request
    request("state.set", {"key": "a", "value": "mine"}, "test")
    request("state.delete", {"key": "b"}, "test")
    reply = request("state.undo", {"agent": "bad", "since": 2}, "test")
    await h.advance(0)

    done = reply.result(timeout=0)

    assert done["undone"] == [{"key": "c", "from": 2, "to": 1}]
    assert done["kept"] == [
        {"key": key, "why": "changed since", "agent": "(outside)", "iteration": h.iteration} for key in ("a", "b")
    ]
    assert h.state == {"a": "mine", "c": 1}


async def test_what_is_not_committed_yet_can_be_undone(h: Harness) -> None:
    h.set("a", "committed")
    await h.advance(1)
    request = h.controller._host.request
    request("state.set", {"key": "a", "value": "fresh"}, "test")
    request("state.set", {"key": "b", "value": "fresh"}, "test")
    request("state.set", {"key": "new", "value": "fresh"}, "test")
    reply = request("state.undo", {"agent": "(outside)", "since": 2}, "test")
    await h.advance(0)

    assert reply.result(timeout=0)["undone"] == [
        {"key": "a", "from": "fresh", "to": 1},
        {"key": "b", "from": "fresh", "to": 1},
        {"key": "new", "from": "fresh", "to": None},
    ]
    assert h.state == {"a": 1, "b": 1, "c": 1}


async def test_value_that_is_redacted_in_the_same_commit_does_not_come_back(h: Harness, bad: Plan) -> None:
    bad[2] = lambda c: c.set("a", 2)
    await h.advance(1)
    request = h.controller._host.request
    request("state.redact", {"key": "a"}, "test")
    reply = request("state.undo", {"agent": "(outside)", "since": 2}, "test")
    await h.advance(0)

    assert [row["why"] for row in reply.result(timeout=0)["kept"]] == ["redacted"]
    assert "a" not in h.state


async def test_second_undo_of_the_same_changes_keeps_what_the_first_has_written(h: Harness, bad: Plan) -> None:
    bad[2] = lambda c: c.set("a", 2)
    await h.advance(1)
    request = h.controller._host.request
    replies = [request("state.undo", {"agent": "bad", "since": 2}, "test") for _ in range(2)]
    await h.advance(0)

    first, second = (reply.result(timeout=0) for reply in replies)

    assert first["changed"]
    assert (second["changed"], [row["agent"] for row in second["kept"]]) == (False, ["(outside)"])


async def test_undo_is_one_unit_from_outside_and_audited(h: Harness, bad: Plan) -> None:
    bad[2] = lambda c: c.update({"a": 2, "b": 2})
    await h.advance(1)

    await undo(h, agent="bad", since=2)

    assert rows(h.path, "SELECT kind, agent, iteration FROM v_ticks ORDER BY id DESC LIMIT 1") == [
        ("outside", "(outside)", h.iteration)
    ]
    assert rows(h.path, "SELECT changes FROM ticks ORDER BY id DESC LIMIT 1") == [2]
    assert rows(h.path, "SELECT actor, name, arguments FROM commands") == [
        ("test", "state.undo", '{"agent":"bad","since":2}')
    ]


# -- what is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scope",
    [
        {},
        {"agent": "bad"},
        {"since": 1},
        {"agent": "bad", "since": 1, "change": 1},
        {"change": 1, "iteration": 1},
        {"change": 1, "agent": "bad"},
        {"agent": "bad", "since": 1, "iteration": 1},
        {"agent": "bad", "since": "soon"},
        {"agent": "bad", "since": 99},
        {"agent": "bad", "since": [1]},
        {"agent": ["bad"], "since": 1},
        {"iteration": 99},
        {"iteration": "1"},
        {"change": 99},
        {"change": 0},
        {"change": True},
        {"key": "a"},
    ],
    ids=str,
)
async def test_other_choices_are_refused_and_change_nothing(h: Harness, scope: dict[str, Any]) -> None:
    before = rows(h.path, "SELECT count(*) FROM state_changes")

    with pytest.raises(UsageError):
        await undo(h, **scope)

    assert rows(h.path, "SELECT count(*) FROM state_changes") == before


async def test_agent_that_nobody_knows_is_refused_with_those_that_are_known(h: Harness) -> None:
    with pytest.raises(AgentNotFound, match=r"known are: .*bad, good"):
        await undo(h, agent="worse", since=1)


async def test_what_history_does_not_reach_can_not_be_undone(h: Harness, bad: Plan) -> None:
    bad[2], bad[6] = lambda c: c.set("a", 2), lambda c: c.set("b", 6)
    await h.advance(8)
    await h.stop()
    [change] = rows(h.path, "SELECT id FROM v_state_history WHERE iteration = 2")
    forget_up_to(h.path, 5)

    reader = Reader(h.path)
    for scope in (
        {"agent": "bad", "since": 2},
        {"agent": "bad", "since": 5},
        {"agent": "bad", "since": START.isoformat()},
        {"iteration": 5},
        {"change": change},
    ):
        with pytest.raises(HistoryGone, match="history begins"):
            reader.undo_plan(**scope)
    [step] = reader.undo_plan(agent="bad", since=6).steps
    reader.close()
    assert (step.key, step.now, step.before) == ("b", "6", "1")

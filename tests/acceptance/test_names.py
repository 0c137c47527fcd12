"""Renamed agents keep everything, forgotten ones nothing: cursors, callbacks, dead letters, state, statistics."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from ael_store import AELController, StateContext
from ael_store.client import change
from ael_store.model.event import Event
from tests.loops import ShiftClock, agent, controller_on, iterations_of, rows, running, until


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ael.db"


class Life:
    """An agent that hears `x` as an agent and `y` by a callback, and counts in its own part of the state."""

    def __init__(
        self, path: Path, name: str, *, aliases: tuple[str, ...] = (), fails: bool = False, **options: Any
    ) -> None:
        self.heard: list[Any] = []
        self.fails = fails

        async def start(context: StateContext) -> None:
            self.controller.event_bus.subscribe("y", name, self.callback)

        async def tick(context: StateContext) -> None:
            context.own.increment("ticks")

        hooks = {"start": start, "tick": tick, "event": self.event}
        self.agent = agent(name, **hooks, subscriptions=["x"], aliases=aliases)  # type: ignore[arg-type]
        self.controller = controller_on(path, self.agent, delivery_attempts=1, backoff_after=100, **options)

    async def event(self, event: Event, context: StateContext) -> None:
        self.heard.append(event.data)
        if self.fails:
            raise ValueError("no")

    async def callback(self, event: Event) -> None:
        self.heard.append(event.data)


async def live(path: Path, name: str) -> None:
    """Leave a database in which an agent has missed two events, and has a dead letter."""
    first = Life(path, name, fails=True)
    first.controller.event_bus.emit("x", "test", "dead")
    await first.controller.run(iterations=2)
    away = controller_on(path)
    away.event_bus.emit("x", "test", "missed")
    away.event_bus.emit("y", "test", "missed by the callback")
    await away.run(iterations=1)


async def command(where: Path, what: str, /, **arguments: Any) -> Any:
    return await asyncio.to_thread(change, where, what, arguments)


# -- renaming ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["aliases", "a command", "a command to a running loop"])
async def test_renamed_agent_goes_on_where_the_old_name_was(path: Path, how: str) -> None:
    await live(path, "old")
    if how == "a command":
        await command(path, "agents.rename", name="old", new_name="new")
    elif how == "a command to a running loop":
        async with running(controller_on(path)):
            await command(path, "agents.rename", name="old", new_name="new")
    await command(path, "events.redeliver", all=True)
    new = Life(path, "new", aliases=("old",) if how == "aliases" else ())

    await new.controller.run(iterations=2)

    assert sorted(new.heard) == ["dead", "missed", "missed by the callback"]
    assert rows(path, "SELECT * FROM v_dead_letters") == []
    assert new.agent.tick_count == 4
    assert new.agent.error_count == 1
    assert rows(path, "SELECT key, value FROM v_state") == [("agent/new/ticks", "4")]
    assert rows(path, "SELECT subscriber, ended_us FROM subscriptions ORDER BY id") == [("new", None)] * 2
    assert rows(path, "SELECT name FROM v_agents") == ["new"]


async def test_new_name_is_that_of_the_pending_events_at_once(path: Path) -> None:
    await live(path, "old")
    new = Life(path, "new", aliases=("old",))
    new.agent.enabled = False

    await new.controller.run(iterations=1)

    assert rows(path, "SELECT subscriber, type FROM v_pending ORDER BY type") == [("new", "x"), ("new", "y")]


async def test_cursor_that_the_new_name_has_already_stays_its_own(path: Path) -> None:
    await live(path, "old")
    seen: list[str] = []
    other = controller_on(path)
    other.event_bus.subscribe("y", "new", lambda event: seen.append(event.data))
    other.event_bus.emit("y", "test", "later")
    await other.run(iterations=1)

    await command(path, "agents.rename", name="old", new_name="new")

    assert seen == ["later"]
    assert sorted(rows(path, "SELECT subscriber FROM subscriptions")) == ["new", "new", "old"]


# -- forgetting --------------------------------------------------------------------------------------


@pytest.mark.parametrize("loop", [False, True], ids=["without a loop", "in a running loop"])
async def test_forgotten_agent_leaves_nothing_and_comes_back_as_new(path: Path, loop: bool) -> None:
    await live(path, "a")
    back = Life(path, "a")
    if loop:
        async with running(controller_on(path)) as controller:
            await command(path, "agents.forget", name="a")
            assert nothing_left(path) == []
            controller.agent_manager.register(back.agent)
            back.controller = controller
            await until(lambda: back.agent.tick_count > 2)
            controller.event_bus.emit("x", "test", "new")
            await until(lambda: back.heard)
    else:
        await command(path, "agents.forget", name="a")
        assert nothing_left(path) == []
        await back.controller.run(iterations=3)
        back.controller.event_bus.emit("x", "test", "new")
        await back.controller.run(iterations=1)

    assert back.heard == ["new"]
    assert back.agent.error_count == 0
    ticks = rows(path, "SELECT value FROM v_state WHERE key = 'agent/a/ticks'")
    assert rows(path, "SELECT name, tick_count FROM v_agents") == [("a", int(ticks[0]))]


def nothing_left(path: Path) -> list[Any]:
    return [
        *rows(path, "SELECT * FROM v_state WHERE key GLOB 'agent/a/*'"),
        *rows(path, "SELECT * FROM v_agents WHERE name = 'a'"),
        *rows(path, "SELECT * FROM v_pending"),
        *rows(path, "SELECT * FROM v_dead_letters"),
        *rows(path, "SELECT * FROM v_problems WHERE kind <> 'overrun'"),
    ]


async def test_forgotten_agent_is_unknown_also_after_a_restart(path: Path) -> None:
    await live(path, "a")
    await command(path, "agents.forget", name="a")
    await controller_on(path).run(iterations=1)

    for name in ("enable", "forget", "release"):
        with pytest.raises(LookupError, match="no agent 'a' is known"):
            await command(path, f"agents.{name}", name="a")


@pytest.mark.parametrize("how", ["aliases", "a command"])
async def test_name_of_a_forgotten_agent_is_free(path: Path, how: str) -> None:
    await live(path, "wanted")
    await command(path, "agents.forget", name="wanted")
    await live(path, "other")
    if how == "a command":
        await command(path, "agents.rename", name="other", new_name="wanted")

    new = Life(path, "wanted", aliases=("other",) if how == "aliases" else ())
    await new.controller.run(iterations=1)

    assert sorted(new.heard) == ["missed", "missed by the callback"]
    assert rows(path, "SELECT name, tick_count FROM v_agents") == [("wanted", 3)]


async def test_recount_of_a_forgotten_agent_begins_after_it_was_forgotten(path: Path) -> None:
    await live(path, "a")
    last = rows(path, "SELECT max(id) FROM ticks")[0]

    await command(path, "agents.forget", name="a")

    totals = rows(path, "SELECT tick_id, ticks, errors, events FROM agent_totals")
    assert totals == [(rows(path, "SELECT max(id) FROM ticks")[0], 0, 0, 0)]
    assert totals[0][0] == last + 1, "the unit that removed its state is the last one"


async def test_delayed_events_of_a_forgotten_agent_still_happen(path: Path) -> None:
    """They were emitted by a unit that succeeded, and are for others."""

    async def start(context: StateContext) -> None:
        context.emit("x", "from before", after="1h")

    await controller_on(path, agent("a", start=start)).run(iterations=1)
    await command(path, "agents.forget", name="a")
    clock = ShiftClock()
    life = Life(path, "b", clock=clock)
    async with running(life.controller):
        clock.skip(3600)
        await until(lambda: life.heard == ["from before"])


async def test_scheduler_knows_an_unregistered_agent_no_more(path: Path) -> None:
    controller: AELController = controller_on(path, agent("a", tick=lambda context: None), agent("b"))
    async with running(controller):
        await until(lambda: "a" in controller.scheduler.get_stats()["average_durations"])
        controller.agent_manager.unregister("a")
        await iterations_of(controller, 2)

        assert "a" not in controller.scheduler.get_stats()["average_durations"]
        assert "b" in controller.scheduler.get_stats()["average_durations"]


async def test_callback_subscribed_before_its_agent_joins_is_the_agents_from_then_on(path: Path) -> None:
    heard: list[Any] = []
    controller = controller_on(path)
    controller.event_bus.subscribe("x", "late", lambda event: heard.append(event.data))
    late = agent("late", enabled=False)
    async with running(controller):
        controller.event_bus.emit("x", "test", 1)
        await until(lambda: heard == [1])
        controller.agent_manager.register(late)
        await until(lambda: rows(path, "SELECT status FROM v_agents") == ["disabled"])
        controller.event_bus.emit("x", "test", 2)
        await iterations_of(controller, 3)
        assert heard == [1]
        late.enabled = True
        await until(lambda: heard == [1, 2])

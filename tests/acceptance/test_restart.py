"""A restart resumes everything; a crash loses nothing that was committed; one owner at a time."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ael_store import AgentBase, StateContext, connect
from ael_store.errors import OwnedElsewhere
from ael_store.model.event import Event
from tests.loops import ShiftClock, agent, controller_on, iterations_of, rows, running, until


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ael.db"


def crash(path: Path, program: str, **options: Any) -> None:
    """Run a program until it says something, then end its process with SIGKILL."""
    head = """
import asyncio, sys
from pathlib import Path
from tests.loops import agent, controller_on, rows, until
path = Path(sys.argv[1])
def say(*_):
    print("now", flush=True)
"""
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", head + program, str(path)],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "now\n"
    process.send_signal(signal.SIGKILL)
    process.wait(20)
    process.stdout.close()


# -- what goes on ------------------------------------------------------------------------------------


async def test_state_numbers_statistics_and_metadata_go_on(path: Path) -> None:
    def make() -> AgentBase:
        async def tick(context: StateContext) -> None:
            context.increment("n")
            context.own.set("last", context.iteration)
            made.metadata["ticks"] = made.tick_count
            resumed.append(context.resumed)
            if context.iteration % 2 == 0:
                raise ValueError("every second one")

        made = agent("a", tick=tick)
        return made

    resumed: list[bool] = []
    for number in range(1, 4):
        one = make()
        controller = controller_on(path, one)
        await controller.run(iterations=4)
        assert (one.tick_count, one.error_count) == (2 * number, 2 * number)
        assert one.metadata == {"ticks": 2 * number + 1}
        assert controller.get_stats()["iteration"] == 4 * number

    assert rows(path, "SELECT key, value FROM v_state ORDER BY key") == [("agent/a/last", "11"), ("n", "6")]
    assert rows(path, "SELECT iteration FROM v_iterations ORDER BY 1") == list(range(1, 13))
    assert rows(path, "SELECT status, first_iteration, last_iteration FROM v_runs") == [
        ("stopped", 1, 4),
        ("stopped", 5, 8),
        ("stopped", 9, 12),
    ]
    assert resumed == [False] * 4 + [True] * 8
    (mean,) = rows(path, "SELECT mean_duration_ms FROM v_agents")
    assert mean > 0


async def test_round_robin_goes_on_with_the_next_agent(path: Path) -> None:
    served: list[str] = []

    def make(name: str) -> AgentBase:
        async def tick(context: StateContext) -> None:
            served.append(name)

        return agent(name, tick=tick)

    for _ in range(5):
        await controller_on(path, *map(make, "abc"), strategy="round_robin", max_agents=1).run(iterations=2)

    assert "".join(served) == "abcabcabca"


async def test_agents_cut_by_max_agents_stay_due_over_a_restart(path: Path) -> None:
    ticked: dict[str, int] = {}

    def make(name: str, priority: int) -> AgentBase:
        async def tick(context: StateContext) -> None:
            ticked[name] = ticked.get(name, 0) + 1

        return agent(name, tick=tick, priority=priority)

    for _ in range(30):
        agents = [make("high", 10), make("middle", 8), make("low", 1)]
        await controller_on(path, *agents, max_agents=1, tick_rate=0).run(iterations=1)

    assert sum(ticked.values()) == 30
    assert set(ticked) == {"high", "middle", "low"}


async def test_flags_of_an_operator_win_over_the_code_and_survive(path: Path) -> None:
    await controller_on(path, agent("a"), agent("b", enabled=False)).run(iterations=1)
    from ael_store.client import change

    await asyncio.to_thread(change, path, "agents.disable", {"name": "a"})
    await asyncio.to_thread(change, path, "agents.enable", {"name": "b"})
    one, two = agent("a"), agent("b", enabled=False)
    await controller_on(path, one, two).run(iterations=2)

    assert (one.tick_count, two.tick_count) == (1, 2)
    assert rows(path, "SELECT name, status FROM v_agents ORDER BY name") == [("a", "disabled"), ("b", "active")]


async def test_fire_time_that_passed_while_it_was_down_fires_once(path: Path) -> None:
    ticks = []
    for ahead_s in (0, 10, 4000, 4010, 20_000):
        clock = ShiftClock()
        clock.ahead_s = ahead_s
        one = agent("hourly", trigger="every 1h")
        await controller_on(path, one, clock=clock).run(iterations=2)
        ticks.append(one.tick_count)

    assert ticks == [0, 0, 1, 1, 2]


async def test_agent_takes_over_everything_of_its_alias(path: Path) -> None:
    async def tick(context: StateContext) -> None:
        context.own.increment("n")

    heard: list[Any] = []

    async def event(event: Event, context: StateContext) -> None:
        heard.append(event.data)

    await controller_on(path, agent("old", tick=tick, event=event, subscriptions=["x"])).run(iterations=2)
    between = controller_on(path)
    between.event_bus.emit("x", "test", 1)
    await between.run(iterations=1)
    new = agent("new", tick=tick, event=event, subscriptions=["x"], aliases=["older", "old"])
    await controller_on(path, new).run(iterations=1)

    assert new.tick_count == 3
    assert heard == [1]
    assert rows(path, "SELECT key, value FROM v_state") == [("agent/new/n", "3")]
    assert rows(path, "SELECT name, status FROM v_agents") == [("new", "active")]


async def test_history_reaches_back_over_restarts(path: Path) -> None:
    async def tick(context: StateContext) -> None:
        before = context.iteration - 1
        assert [row["new_value"] for row in context.get_history("k")[-1:]] == [before] * (before > 0)
        context.set("k", context.iteration)

    for _ in range(3):
        one = agent("a", tick=tick)
        controller = controller_on(path, one, tick_rate=0)
        await controller.run(iterations=60)
        assert one.error_count == 0

    history = controller.state_context.get_history("k")
    assert [row["new_value"] for row in history] == list(range(81, 181))
    assert history[0]["old_value"] == 80
    assert set(history[0]) == {"timestamp", "operation", "key", "old_value", "new_value", "agent", "iteration"}
    assert (history[0]["agent"], history[0]["operation"], history[0]["iteration"]) == ("a", "set", 81)
    assert len(controller.state_context.get_history()) == 180


async def test_agent_that_is_gone_is_absent_and_keeps_its_figures(path: Path) -> None:
    await controller_on(path, agent("a"), agent("b")).run(iterations=2)
    await controller_on(path, agent("b")).run(iterations=1)

    assert rows(path, "SELECT name, status, tick_count FROM v_agents ORDER BY name") == [
        ("a", "absent", 2),
        ("b", "active", 3),
    ]


async def test_memory_store_is_private_and_goes_with_the_controller() -> None:
    one, two = controller_on(":memory:", agent("a")), controller_on(":memory:", agent("a"))
    one.state_context.set("k", 1)
    await one.run(iterations=1)
    await two.run(iterations=1)

    assert one.state_context.get("k") == 1
    assert not two.state_context.has("k")
    assert one.store.path != two.store.path


# -- crashes -----------------------------------------------------------------------------------------


async def test_crashed_run_is_marked_and_what_was_pending_is_delivered(path: Path) -> None:
    crash(
        path,
        """
async def tick(context):
    context.set("n", context.iteration)
    context.emit("x", context.iteration)
async def event(event, context):
    if event.data == 2:
        say()
        await asyncio.sleep(60)
    context.set("handled", event.data)
asyncio.run(controller_on(path, agent("a", tick=tick, event=event, subscriptions=["x"]), slow_after=30).start())
""",
    )
    assert rows(path, "SELECT key, value FROM v_state ORDER BY key") == [("handled", "1"), ("n", "1")]
    heard: list[int] = []

    async def tick(context: StateContext) -> None:
        context.emit("x", 100 + context.iteration)

    async def event(event: Event, context: StateContext) -> None:
        heard.append(event.data)

    controller = controller_on(path, agent("a", tick=tick, event=event, subscriptions=["x"]))
    await controller.run(iterations=2)

    assert heard == [102, 103], "the second iteration was never committed, so it is the next one"
    assert rows(path, "SELECT status, first_iteration, last_iteration FROM v_runs") == [
        ("crashed", 1, 1),
        ("stopped", 2, 3),
    ]
    (recovered,) = controller.event_bus.get_event_history("ael_recovered")
    assert recovered.data["run"] == 1
    assert recovered.data["iteration"] == 1
    assert "crashed_run" in rows(path, "SELECT kind FROM v_problems")


async def test_delivered_events_are_not_delivered_again_after_a_crash(path: Path) -> None:
    crash(
        path,
        """
async def start(context):
    for number in range(5):
        context.emit("x", number)
async def event(event, context):
    context.set("handled", event.data)
async def main():
    made = agent("a", start=start, event=event, subscriptions=["x"])
    controller = controller_on(path, made, deliveries_per_iteration=2)
    controller.observe(lambda summary: summary.iteration == 2 and (say(), __import__("time").sleep(60)))
    await controller.start()
asyncio.run(main())
""",
    )
    heard: list[int] = []

    async def event(event: Event, context: StateContext) -> None:
        heard.append(event.data)

    assert rows(path, "SELECT type FROM v_pending") == ["x"]
    await controller_on(path, agent("a", event=event, subscriptions=["x"])).run(iterations=1)

    assert heard == [4]


async def test_idle_iterations_are_committed_together_and_a_crash_gives_their_numbers_again(path: Path) -> None:
    crash(
        path,
        """
async def tick(context):
    if context.iteration == 3:
        context.set("n", 3)
    if context.iteration == 20:
        say()
        await asyncio.sleep(60)
asyncio.run(controller_on(path, agent("a", tick=tick), slow_after=30, tick_rate=0.001).start())
""",
    )
    assert rows(path, "SELECT iteration FROM v_iterations ORDER BY 1") == [1, 2, 3]
    assert rows(path, "SELECT tick_count FROM v_agents") == [3]
    one = agent("a")
    controller = controller_on(path, one)
    await controller.run(iterations=1)

    assert controller.get_stats()["iteration"] == 4
    assert one.tick_count == 4
    assert rows(path, "SELECT iteration, run_id FROM v_iterations ORDER BY 1") == [(1, 1), (2, 1), (3, 1), (4, 2)]


async def test_idle_iterations_wait_ten_seconds_at_most(path: Path) -> None:
    clock = ShiftClock()
    controller = controller_on(path, agent("a"), clock=clock, tick_rate=0.005)
    async with running(controller):
        await iterations_of(controller, 3)
        assert rows(path, "SELECT count(*) FROM v_iterations") == [0]
        clock.skip(9)
        await iterations_of(controller, 2)
        assert rows(path, "SELECT count(*) FROM v_iterations") == [0]
        clock.skip(1.1)
        await until(lambda: rows(path, "SELECT count(*) FROM v_iterations")[0] > 5)


async def test_idle_iterations_of_a_slow_clock_are_committed_without_the_next_one(path: Path) -> None:
    clock = ShiftClock()
    async with running(controller_on(path, agent("a"), clock=clock, tick_rate=3600)):
        assert rows(path, "SELECT count(*) FROM v_iterations") == [0]
        clock.skip(10.5)
        await until(lambda: rows(path, "SELECT count(*) FROM v_iterations") == [1])


async def test_iterations_missed_by_a_crash_are_one_and_their_number_is_recorded(path: Path) -> None:
    crash(
        path,
        """
async def tick(context):
    context.set("n", context.iteration)
controller = controller_on(path, agent("a", tick=tick), tick_rate=100)
controller.observe(lambda summary: (say(), __import__("time").sleep(60)))
asyncio.run(controller.start())
""",
    )
    clock = ShiftClock()
    clock.ahead_s = 1050
    one = agent("a")
    await controller_on(path, one, tick_rate=100, clock=clock).run(iterations=1)

    assert rows(path, "SELECT iteration, missed FROM v_iterations ORDER BY 1") == [(1, 0), (2, 9)]
    assert one.tick_count == 2


async def test_time_after_a_clean_stop_is_not_missed(path: Path) -> None:
    await controller_on(path, agent("a"), tick_rate=100).run(iterations=1)
    clock = ShiftClock()
    clock.ahead_s = 1050
    await controller_on(path, agent("a"), tick_rate=100, clock=clock).run(iterations=1)

    assert rows(path, "SELECT sum(missed) FROM v_iterations") == [0]


# -- one owner ---------------------------------------------------------------------------------------


async def test_second_loop_is_refused_at_once_and_told_who_owns_the_database(path: Path) -> None:
    one, other = controller_on(path, agent("a")), controller_on(path, agent("a"))
    async with running(one):
        before = asyncio.get_running_loop().time()
        with pytest.raises(OwnedElsewhere) as error:
            await other.start()
        assert asyncio.get_running_loop().time() - before < 2
        assert rows(path, "SELECT count(*) FROM v_runs") == [1]

    text = str(error.value)
    assert f"pid {os.getpid()}" in text
    assert socket.gethostname() in text
    assert re.search(r"since 20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d", text)
    assert str(path) in text
    await other.run(iterations=1)


async def test_second_process_is_refused(path: Path) -> None:
    program = """
import asyncio, sys
from ael_store import AELController
asyncio.run(AELController(store=sys.argv[1]).start())
"""
    async with running(controller_on(path)):
        done = await asyncio.to_thread(
            subprocess.run, [sys.executable, "-c", program, str(path)], capture_output=True, text=True, timeout=60
        )

    assert done.returncode == 1
    assert f"pid {os.getpid()}" in done.stderr


async def test_client_of_another_part_works_with_and_without_a_loop(path: Path) -> None:
    await controller_on(path).run(iterations=1)
    client = connect(path)

    def use(number: int) -> None:
        assert client.set(f"k{number}", [number]) is True
        assert client.set(f"k{number}", [number]) is False
        assert client.get(f"k{number}") == [number]
        assert client.emit("x", number) > 0
        assert client.delete(f"k{number - 1}") is (number > 0)

    await asyncio.to_thread(use, 0)
    async with running(controller_on(path, tick_rate=3600)) as controller:
        await asyncio.to_thread(use, 1)
        assert controller.state_context.get_all() == {"k1": [1]}
    await asyncio.to_thread(use, 2)

    assert client.get_all() == {"k2": [2]}
    client.close()
    assert rows(path, "SELECT data FROM v_events WHERE type = 'x'") == ["0", "1", "2"]

"""Dead letters are delivered again for who asks: once for each request, out of order, with exactly-once effect."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ael_store import AELController, StateContext
from ael_store.client import change
from ael_store.errors import DeadLetterNotFound, UsageError
from ael_store.model.event import Event
from tests.loops import ShiftClock, agent, controller_on, iterations_of, rows, running, until

ROOT = Path(__file__).parents[2]
OPEN = "SELECT subscriber, event_id, attempts, error FROM v_dead_letters ORDER BY event_id"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ael.db"


class Handler:
    """Handles numbers, as a callback or as an `on_event`; those in `bad` fail."""

    def __init__(self, *bad: int) -> None:
        self.bad = set(bad)
        self.handled: list[int] = []
        self.seen: list[tuple[int, Any]] = []

    async def __call__(self, event: Event, context: StateContext | None = None) -> None:
        self.seen.append((event.data, event.metadata.get("redelivered")))
        if context is not None:
            context.increment(f"effects/{event.data}")
        if event.data in self.bad:
            raise ValueError(f"not {event.data}")
        self.handled.append(event.data)


async def emit(controller: AELController, *numbers: int) -> None:
    for number in numbers:
        controller.event_bus.emit("x", "test", number)
    await iterations_of(controller, 2)


def loop_on(path: Path, handler: Handler, *, subscriptions: list[str] | None = None, **options: Any) -> AELController:
    options.setdefault("delivery_attempts", 1)
    options.setdefault("quarantine_after", 1000)
    hearer = agent("h", event=handler, subscriptions=subscriptions or ["x"])
    return controller_on(path, hearer, backoff_after=100, **options)


def event_of(path: Path, data: int) -> int:
    return int(rows(path, "SELECT id FROM v_events WHERE type = 'x' AND data = ?", str(data))[0])


async def redeliver(path: Path, **arguments: Any) -> dict[str, Any]:
    """Ask as another process does: through the running loop, or under the lock."""
    answer: dict[str, Any] = await asyncio.to_thread(change, path, "events.redeliver", arguments)
    return answer


async def dead_letters_of(path: Path, *numbers: int, **options: Any) -> None:
    """Leave a database with these as dead letters of `h`."""
    async with running(loop_on(path, Handler(*numbers), **options)) as controller:
        await emit(controller, *numbers)
        await until(lambda: len(rows(path, OPEN)) == len(numbers))


# -- what happens ------------------------------------------------------------------------------------


async def test_redelivery_comes_out_of_order_says_so_and_moves_no_cursor(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    handler = Handler(2)
    async with running(loop_on(path, handler)) as controller:
        await emit(controller, 1, 2, 3)
        await until(lambda: handler.handled == [1, 3])
        handler.bad.clear()
        number = event_of(path, 2)

        cursor = rows(path, "SELECT cursor FROM subscriptions")
        answer = await redeliver(path, event_id=number)
        await until(lambda: handler.handled == [1, 3, 2])
        await until(lambda: rows(path, OPEN) == [])
        assert rows(path, "SELECT cursor FROM subscriptions") == cursor

    assert answer["requested"] == 1
    assert handler.seen == [(1, None), (2, None), (3, None), (2, True)]
    assert rows(path, "SELECT metadata FROM v_events WHERE id = ?", number) == ["{}"]
    ticks = rows(
        path, "SELECT outcome, subscription_id IS NULL FROM ticks WHERE cause_event_id = ? ORDER BY id", number
    )
    assert ticks == [(1, 1), (0, 1)]
    assert rows(path, "SELECT value FROM v_state WHERE key = 'effects/2'") == ["1"]
    assert f"h gets event {number} again, out of order" in caplog.text
    assert rows(path, "SELECT * FROM v_problems WHERE kind = 'dead_letters'") == []


async def test_redelivery_without_effect_leaves_its_row_too(path: Path) -> None:
    async def event(event: Event, context: StateContext) -> None:
        if "redelivered" not in event.metadata:
            raise ValueError("no")

    hearer = agent("h", event=event, subscriptions=["x"])
    async with running(controller_on(path, hearer, delivery_attempts=1)) as controller:
        await emit(controller, 1)
        await redeliver(path, all=True)
        await until(lambda: rows(path, OPEN) == [])

    assert rows(path, "SELECT outcome FROM v_ticks WHERE kind = 'event'") == ["error", "success"]


async def test_failed_redelivery_stays_a_dead_letter_and_is_not_tried_again_by_itself(path: Path) -> None:
    handler = Handler(1)
    clock = ShiftClock()
    async with running(loop_on(path, handler, clock=clock)) as controller:
        await emit(controller, 1)
        number = event_of(path, 1)
        for attempt in (2, 3):
            await redeliver(path, event_id=number)
            await until(lambda attempt=attempt: rows(path, OPEN) == [("h", number, attempt, "ValueError: not 1")])
        clock.skip(3600)
        await iterations_of(controller, 3)
        failed = rows(path, "SELECT count(*) FROM v_events WHERE type = 'agent_error'")

    assert len(handler.seen) == 3
    assert failed == [3]
    assert rows(path, "SELECT value FROM v_state WHERE key GLOB 'effects/*'") == []
    assert rows(path, "SELECT error_count FROM v_agents") == [3]
    assert rows(path, "SELECT requested_us FROM dead_letters") == [None]


async def test_failing_redelivery_runs_on_error_and_leads_to_back_off_as_any_delivery(path: Path) -> None:
    async def error(error: Exception, context: StateContext) -> None:
        context.increment("errors")

    handler = Handler(1)
    hearer = agent("h", event=handler, error=error, subscriptions=["x"])
    async with running(controller_on(path, hearer, delivery_attempts=1, backoff_after=2)) as controller:
        await emit(controller, 1)
        await redeliver(path, all=True)
        await until(lambda: rows(path, "SELECT value FROM v_state WHERE key = 'errors'") == ["2"])
        await until(lambda: rows(path, "SELECT subject FROM v_problems WHERE kind = 'failing_agent'") == ["h"])
        answer = await redeliver(path, all=True)
        await iterations_of(controller, 3)

    assert answer["requested"] == 1
    assert len(handler.seen) == 2, "it waits for the end of the back-off"


async def test_failing_subscription_holds_up_no_redelivery(path: Path) -> None:
    handler = Handler(1, 2)
    clock = ShiftClock()
    async with running(loop_on(path, handler, clock=clock, delivery_attempts=2)) as controller:
        await emit(controller, 1, 2)
        clock.skip(2)
        await until(lambda: len(rows(path, OPEN)) == 1)
        await until(lambda: rows(path, "SELECT attempts FROM v_pending") == [1])
        handler.bad.remove(1)

        await redeliver(path, all=True)

        await until(lambda: handler.handled == [1])
        assert rows(path, "SELECT attempts FROM v_pending") == [1]


async def test_redelivery_that_meets_a_conflict_is_tried_again_at_once(path: Path) -> None:
    async def event(event: Event, context: StateContext) -> None:
        runs.append(event.metadata.get("redelivered"))
        if len(runs) == 1:
            raise ValueError("at first")
        before = context.get("n", 0)
        if len(runs) == 2:
            await go.wait()
        context.set("n", before + 1)

    runs: list[Any] = []
    go = asyncio.Event()
    hearer = agent("h", event=event, subscriptions=["x"], background=True)
    async with running(controller_on(path, hearer, delivery_attempts=1)) as controller:
        await emit(controller, 1)
        await until(lambda: rows(path, OPEN))
        await redeliver(path, all=True)
        await until(lambda: len(runs) == 2)
        again = await redeliver(path, all=True)
        controller.state_context.set("n", 10)
        await iterations_of(controller, 2)
        go.set()
        await until(lambda: rows(path, OPEN) == [])

    assert again["requested"] == 0, "one that is under way was asked for already"
    assert runs == [None, True, True]
    assert rows(path, "SELECT outcome FROM v_ticks WHERE kind = 'event'") == ["error", "conflict", "success"]
    assert rows(path, "SELECT value FROM v_state WHERE key = 'n'") == ["11"]


async def test_redelivery_to_a_callback(path: Path) -> None:
    handler = Handler(1)
    controller = controller_on(path, delivery_attempts=1)
    controller.event_bus.subscribe("x", "outsider", handler)
    async with running(controller):
        await emit(controller, 1, 2)
        handler.bad.clear()
        await redeliver(path, all=True)
        await until(lambda: rows(path, OPEN) == [])

    assert handler.seen == [(1, None), (2, None), (1, True)]


async def test_redeliveries_and_new_events_take_turns(path: Path) -> None:
    dead = list(range(100, 130))
    await dead_letters_of(path, *dead)
    handler = Handler()
    controller = loop_on(path, handler, tick_rate=3600, deliveries_per_iteration=10)
    for number in range(30):
        controller.event_bus.emit("x", "test", number)
    await redeliver(path, all=True)
    async with running(controller):
        await until(lambda: len(handler.handled) == 60)

    assert [number for number in handler.handled if number < 100] == list(range(30))
    assert [number for number in handler.handled if number >= 100] == dead
    for start in range(0, 60, 10):
        chunk = handler.handled[start : start + 10]
        assert sum(number >= 100 for number in chunk) == 5, "neither waits for all of the other"


# -- when it waits -----------------------------------------------------------------------------------


async def test_request_without_a_loop_is_carried_out_by_the_next_one(path: Path) -> None:
    await dead_letters_of(path, 1, 2, 3)

    first = await redeliver(path, event_id=event_of(path, 3))
    rest = await redeliver(path, all=True, type="x")
    nothing = await redeliver(path, all=True)
    handler = Handler()
    await loop_on(path, handler).run(iterations=1)

    assert (first["requested"], rest["requested"], nothing["requested"]) == (1, 2, 0)
    assert not first["running"]
    assert handler.seen == [(3, True), (1, True), (2, True)]
    assert rows(path, OPEN) == []
    assert [name for name in rows(path, "SELECT name FROM commands") if name == "events.redeliver"] != []


@pytest.mark.parametrize("state", ["disabled", "quarantined", "absent"])
async def test_request_waits_for_a_subscriber_that_is_away_also_over_a_restart(path: Path, state: str) -> None:
    await dead_letters_of(path, 1, **({"quarantine_after": 1} if state == "quarantined" else {}))
    if state == "disabled":
        await asyncio.to_thread(change, path, "agents.disable", {"name": "h"})
    for _ in range(2):
        handler = Handler()
        controller = controller_on(path) if state == "absent" else loop_on(path, handler)
        async with running(controller):
            answer = await redeliver(path, all=True)
            await iterations_of(controller, 3)
            assert handler.seen == []
    assert rows(path, "SELECT requested_us IS NOT NULL FROM dead_letters") == [1]

    async with running(loop_on(path, handler)):
        if state != "absent":
            verb = "enable" if state == "disabled" else "release"
            await asyncio.to_thread(change, path, f"agents.{verb}", {"name": "h"})
        await until(lambda: handler.seen == [(1, True)])

    assert answer["already"] == answer["requested"] == 0 or answer["waiting"] == {"h": state}
    assert rows(path, OPEN) == []


async def test_answer_names_those_who_have_to_wait(path: Path) -> None:
    await dead_letters_of(path, 1)
    async with running(controller_on(path)):
        answer = await redeliver(path, all=True)

    assert answer["running"]
    assert answer["waiting"] == {"h": "absent"}


async def test_paused_loop_delivers_nothing_again_until_it_is_resumed(path: Path) -> None:
    await dead_letters_of(path, 1)
    handler = Handler()
    async with running(loop_on(path, handler)) as controller:
        await asyncio.to_thread(change, path, "loop.pause", {})
        answer = await redeliver(path, all=True)
        await asyncio.to_thread(change, path, "state.set", {"key": "k", "value": 1})
        assert handler.seen == []
        await asyncio.to_thread(change, path, "loop.resume", {})
        await until(lambda: handler.seen == [(1, True)])
        await iterations_of(controller)

    assert answer["paused"]


async def test_redacted_event_comes_again_without_what_it_said(path: Path) -> None:
    await dead_letters_of(path, 1, 2)
    handler = Handler()
    async with running(loop_on(path, handler)):
        await asyncio.to_thread(change, path, "loop.pause", {})
        number = event_of(path, 2)
        await redeliver(path, all=True)
        await asyncio.to_thread(change, path, "events.redact", {"id": number})
        await asyncio.to_thread(change, path, "loop.resume", {})
        await until(lambda: len(handler.seen) == 2)

    assert handler.seen == [(1, True), ("(redacted)", True)]


# -- what is refused ---------------------------------------------------------------------------------


async def test_ended_subscription_is_refused_by_name_and_shown_no_more(path: Path) -> None:
    await dead_letters_of(path, 1)
    number = event_of(path, 1)
    await redeliver(path, event_id=number)

    await asyncio.to_thread(change, path, "agents.forget", {"name": "h"})

    assert rows(path, OPEN) == []
    assert rows(path, "SELECT * FROM v_problems WHERE kind = 'dead_letters'") == []
    with pytest.raises(DeadLetterNotFound, match="the subscription of 'h' has ended"):
        await redeliver(path, event_id=number)
    assert (await redeliver(path, all=True))["requested"] == 0
    handler = Handler()
    await loop_on(path, handler).run(iterations=2)
    assert handler.seen == [], "who comes back after that starts from now"


async def test_subscription_that_ends_while_requests_wait_takes_them_along(path: Path) -> None:
    handler = Handler(1)
    controller = controller_on(path, delivery_attempts=1)
    controller.event_bus.subscribe("x", "outsider", handler)
    async with running(controller):
        await emit(controller, 1)
        await until(lambda: rows(path, OPEN))
        await asyncio.to_thread(change, path, "loop.pause", {})
        await redeliver(path, all=True)
        controller.event_bus.unsubscribe("x", "outsider")
        await asyncio.to_thread(change, path, "loop.resume", {})
        await iterations_of(controller, 2)

    assert len(handler.seen) == 1
    assert rows(path, "SELECT requested_us, redelivered_us FROM dead_letters") == [(None, None)]


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"event_id": 999}, DeadLetterNotFound, "event 999 is no dead letter; "),
        ({"event_id": 1, "subscriber": "nobody"}, DeadLetterNotFound, "no dead letter of 'nobody'"),
        ({}, UsageError, "name the event of a dead letter"),
        ({"event_id": 1, "all": True}, UsageError, "name the event of a dead letter"),
        ({"event_id": "1"}, UsageError, "wanted is the number of an event"),
    ],
)
async def test_impossible_request_is_refused(
    path: Path, arguments: dict[str, Any], error: type[Exception], match: str
) -> None:
    await dead_letters_of(path, 1)

    with pytest.raises(error, match=match):
        await redeliver(path, **arguments)


async def test_filters_choose_the_dead_letters(path: Path) -> None:
    one, two = Handler(1, 2), Handler(1, 2)
    agents = [agent("one", event=one, subscriptions=["x*"]), agent("two", event=two, subscriptions=["x.*"])]
    controller = controller_on(path, *agents, delivery_attempts=1, backoff_after=100)
    async with running(controller):
        controller.event_bus.emit("x.a", "test", 1)
        controller.event_bus.emit("x.b", "test", 2)
        await until(lambda: len(rows(path, OPEN)) == 4)
        one.bad.clear()
        two.bad.clear()
        for arguments, left in (
            ({"type": "x.b", "subscriber": "two"}, [("one", 1), ("one", 2), ("two", 1)]),
            ({"type": "*.a"}, [("one", 2)]),
            ({"subscriber": "nobody"}, [("one", 2)]),
            ({}, []),
        ):
            await redeliver(path, all=True, **arguments)
            found = (
                "SELECT subscriber, json(data) FROM v_dead_letters d JOIN v_events e ON e.id = event_id ORDER BY 1, 2"
            )
            await until(lambda left=left, found=found: [(name, int(n)) for name, n in rows(path, found)] == left)


async def test_changed_patterns_keep_the_dead_letters_and_the_attempts(path: Path) -> None:
    await dead_letters_of(path, 1)
    await redeliver(path, all=True)
    handler = Handler()

    await loop_on(path, handler, subscriptions=["x", "y.*"]).run(iterations=1)

    assert handler.seen == [(1, True)]
    assert rows(path, "SELECT pattern FROM subscription_patterns ORDER BY 1") == ["x", "y.*"]
    assert rows(path, "SELECT count(*) FROM subscriptions") == [1]


# -- over crashes ------------------------------------------------------------------------------------

CRASHING = """
import os, signal, sys
from pathlib import Path
from ael_store import AgentBase

class H(AgentBase):
    name = "h"
    subscriptions = ["x"]

    async def on_event(self, event, context):
        context.increment("effects")
        flag = Path("died")
        if not flag.exists():
            flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        context.set("done", True)

class Killer(AgentBase):
    name = "killer"
    priority = 10

    async def on_tick(self, context):
        if context.get("done"):
            print("committed", flush=True)
"""


def test_redelivery_that_a_kill_cut_off_comes_again_and_one_that_was_committed_does_not(tmp_path: Path) -> None:
    (tmp_path / "agents.py").write_text(CRASHING)
    path = tmp_path / "ael.db"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("AEL_")}
    environment = {**clean, "PYTHONPATH": str(ROOT)}

    command = [sys.executable, "-m", "ael_store", "run", "agents.py", "--tick-rate", "0.02"]
    asyncio.run(dead_letters_of(path, 1))
    asyncio.run(redeliver(path, all=True))

    killed = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, timeout=60, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert rows(path, "SELECT key FROM v_state") == []
    assert rows(path, "SELECT requested_us IS NOT NULL, redelivered_us FROM dead_letters") == [(1, None)]

    for _ in range(2):
        with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                assert any(line.startswith("committed") for line in process.stdout)
            finally:
                process.kill()
    assert rows(path, "SELECT new_value FROM v_state_history WHERE key = 'effects'") == ["1"]
    assert rows(path, OPEN) == []

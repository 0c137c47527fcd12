"""`ael events dead` and `ael events redeliver`, with and without a loop."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from ael_store import AgentBase
from tests.cli.conftest import Ael, Start, until
from tests.loops import agent, controller_on, rows

HEARER = """
from ael_store import AgentBase

class Hearer(AgentBase):
    name = "hearer"
    subscriptions = ["door.*"]

    def on_event(self, event, context):
        context.set("late", event.metadata["redelivered"])
        context.increment("heard")
"""


def fail(event: Any, context: Any) -> None:
    raise ValueError(f"door {event.data['door']} jams")


@pytest.fixture
def dead(tmp_path: Path) -> list[int]:
    """A database with three dead letters; their events."""
    path = tmp_path / "ael.db"

    def hearer() -> AgentBase:
        return agent("hearer", event=fail, subscriptions=["door.*"])

    controller = controller_on(path, hearer(), tick_rate=0, delivery_attempts=1, backoff_after=100)
    for door, type in enumerate(["door.open", "door.shut", "door.open"], 1):
        controller.event_bus.emit(type, "lock", {"door": door}, {"by": "me"})
    asyncio.run(controller.run(1))
    return [int(number) for number in rows(path, "SELECT event_id FROM v_dead_letters ORDER BY event_id")]


def test_dead_lists_what_was_given_up_oldest_first(ael: Ael, dead: list[int]) -> None:
    found = ael("events", "dead", "--json").json

    assert [row["event_id"] for row in found] == dead
    assert found[0] == {
        "subscriber": "hearer",
        "event_id": dead[0],
        "type": "door.open",
        "attempts": 1,
        "error": "ValueError: door 1 jams",
        "failed_at": found[0]["failed_at"],
        "source": "lock",
        "data": {"door": 1},
        "metadata": {"by": "me"},
        "requested_at": None,
    }
    header, first, *_ = ael("events", "dead").out.splitlines()
    assert header.split("\t") == [
        "subscriber",
        "event_id",
        "type",
        "attempts",
        "failed_at",
        "requested_at",
        "error",
    ]
    assert first.split("\t")[-1] == "ValueError: door 1 jams"


@pytest.mark.parametrize(
    ("options", "places"),
    [
        (["--type", "door.open"], [0, 2]),
        (["--type", "*.shut"], [1]),
        (["--type", "door.[a-z]*"], []),
        (["--subscriber", "hearer"], [0, 1, 2]),
        (["--subscriber", "nobody"], []),
        (["--limit", "2"], [1, 2]),
    ],
)
def test_filters(ael: Ael, dead: list[int], options: list[str], places: list[int]) -> None:
    found = ael("events", "dead", *options, "--json").json

    assert [row["event_id"] for row in found] == [dead[place] for place in places]


def test_no_dead_letters_is_no_error(ael: Ael, database: Path) -> None:
    assert ael("events", "dead", "--json").json == []
    assert ael("events", "dead").err == "no dead letters\n"
    assert ael("events", "redeliver", "--all").out == "there are no dead letters\n"


def test_dry_run_asks_for_nothing(ael: Ael, dead: list[int]) -> None:
    found = ael("events", "redeliver", "--all", "--type", "*open", "--dry-run", "--json").json

    assert [row["event_id"] for row in found] == [dead[0], dead[2]]
    assert ael("events", "redeliver", str(dead[1]), "--dry-run", "--json").json[0]["event_id"] == dead[1]
    assert ael("events", "redeliver", "99999", "--dry-run").code == 1
    assert [row["requested_at"] for row in ael("events", "dead", "--json").json] == [None] * 3


def test_redeliver_without_a_loop_is_done_by_the_next_one(ael: Ael, run_here: Ael, dead: list[int]) -> None:
    one = ael("events", "redeliver", str(dead[0]))
    rest = ael("events", "redeliver", "--all", "--json")

    assert one.out == "the next loop delivers 1 dead letter again, out of order (committed)\n"
    assert rest.json == {
        "requested": 2,
        "already": 0,
        "more": False,
        "running": False,
        "paused": False,
        "waiting": {},
    }
    assert ael("events", "redeliver", str(dead[0])).out == "1 of them are asked for already\n"
    assert all(row["requested_at"] for row in ael("events", "dead", "--json").json)
    Path("agents.py").write_text(HEARER)
    assert run_here("agents.py", "--iterations", "1").code == 0
    assert ael("state", "list", "--json").json == {"heard": 3, "late": True}
    assert ael("events", "dead", "--json").json == []


def test_redeliver_through_a_running_loop(ael: Ael, dead: list[int], start: Start) -> None:
    Path("agents.py").write_text(HEARER)
    start("run", "agents.py", "--tick-rate", "3600").wait_for("resumed at iteration 1")
    ael("agents", "disable", "hearer")

    waiting = ael("events", "redeliver", str(dead[0]))
    ael("agents", "enable", "hearer")
    done = ael("events", "redeliver", "--all", "--subscriber", "hearer")
    until(lambda: ael("events", "dead", "--json").json == [])

    assert waiting.out.splitlines() == [
        "the loop now delivers 1 dead letter again, out of order (committed)",
        "those of hearer wait: it is disabled",
    ]
    assert done.out == "the loop now delivers 2 dead letters again, out of order (committed)\n"
    assert ael("state", "get", "heard").out == "3\n"
    ael("pause")
    assert ael("events", "redeliver", "--all").out == "there are no dead letters\n"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "name the event of a dead letter, or say --all"),
        (["1", "--all"], 2, "name the event of a dead letter, or say --all"),
        (["1", "--type", "x"], 2, "--type goes with --all"),
        (["99999"], 1, "event 99999 is no dead letter; `ael events dead` lists those that there are"),
        (["x"], 2, "a valid integer"),
    ],
)
def test_impossible_request_is_refused(
    ael: Ael, dead: list[int], arguments: list[str], code: int, message: str
) -> None:
    done = ael("events", "redeliver", *arguments)

    assert done.code == code
    assert message in done.err


def test_ended_subscription_is_named(ael: Ael, dead: list[int]) -> None:
    ael("agents", "forget", "hearer", "--yes")

    done = ael("events", "redeliver", str(dead[0]))

    assert done.code == 1
    assert "the subscription of 'hearer' has ended" in done.err
    assert ael("events", "dead", "--json").json == []
    assert ael("status", "--json").json["dead_letters"] == 0

"""`ael why`: chains as people and programs see them, and each reason for which an agent does not run."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from ael_store import AgentBase, Settings
from ael_store.runtime.scheduler import Scheduler
from ael_store.testing import Harness
from tests.cli.conftest import Ael, Done
from tests.loops import EVERY, agent, controller_on, iterations_of, rows, running, until

Row = dict[str, Any]


class Idle(AgentBase):
    """Ticks without effect, in every iteration."""

    priority = EVERY

    async def on_tick(self, context: Any) -> None:
        pass


class Busy(Idle):
    """Changes something in every iteration, so that none is idle."""

    async def on_tick(self, context: Any) -> None:
        context.increment("n")


class Fails(Idle):
    """Fails in every tick, until told otherwise."""

    async def on_tick(self, context: Any) -> None:
        if not context.get("repaired"):
            raise ValueError("no sensor")


def explained(ael: Ael, name: str, *options: str) -> Row:
    done = ael("why", f"agent:{name}", "--json", *options)
    assert done.code == 0, done.err
    answer: Row = done.json
    return answer


def reasons(ael: Ael, name: str, *options: str) -> list[str]:
    return [row["reason"] for row in explained(ael, name, *options)["iterations"]]


def rows_of(ael: Ael, name: str, *options: str) -> dict[int, Row]:
    return {row["iteration"]: row for row in explained(ael, name, *options)["iterations"]}


@asynccontextmanager
async def harness(*agents: AgentBase, **options: Any) -> AsyncIterator[Harness]:
    """A loop on a virtual clock over `ael.db`."""
    async with Harness(agents, store="ael.db", **options) as h:
        yield h


async def beside(ael: Ael, *arguments: str) -> Done:
    """Carry out a command while the loop of this test answers."""
    return await asyncio.to_thread(ael, *arguments)


# -- chains -----------------------------------------------------------------------------------------


def test_chain_is_a_table_with_the_newest_first(ael: Ael, database: Path) -> None:
    done = ael("why", "state:temperature")

    lines = [line.split("\t") for line in done.out.splitlines()]
    assert lines[0] == ["what", "id", "at", "iteration", "who", "detail"]
    assert [line[0] for line in lines[1:]] == ["change", "unit"]
    assert lines[1][3:] == ["3", "counter", "temperature = 23, was 22"]
    assert lines[2][5].startswith("tick, success, 2 changes, 1 event, ")
    assert lines[2][5].endswith(": its turn came with iteration 3 of the clock")


def test_chain_as_json_has_values_and_numbers(ael: Ael, database: Path) -> None:
    change, unit = ael("why", "state:temperature", "--json").json

    assert (
        change.items()
        >= {
            "what": "change",
            "key": "temperature",
            "operation": "set",
            "old_value": 22,
            "new_value": 23,
            "agent": "counter",
            "iteration": 3,
            "unit_id": unit["id"],
        }.items()
    )
    assert (unit["what"], unit["kind"], unit["outcome"], unit["agent"]) == ("unit", "tick", "success", "counter")


def test_past_moment_is_explained_as_it_was(ael: Ael, database: Path) -> None:
    assert ael("why", "state:temperature", "--at", "2", "--json").json[0]["new_value"] == 22
    assert ael("why", "state:temperature", "--at", "9").code == 2


def test_deleted_key_is_explained_by_who_deleted_it(ael: Ael, database: Path) -> None:
    ael("state", "delete", "temperature")

    change, _, command = ael("why", "state:temperature", "--json").json
    assert (change["operation"], change["old_value"], command["name"]) == ("delete", 23, "state.delete")
    assert "delete temperature, which was 23" in ael("why", "state:temperature").out


def test_event_has_a_line_for_each_who_handled_it(ael: Ael, database: Path) -> None:
    number = rows(database, "SELECT max(id) FROM v_events WHERE type = 'measured'")[0]

    done = ael("why", f"event:{number}")

    lines = [line.split("\t") for line in done.out.splitlines()[1:]]
    assert [line[0] for line in lines] == ["event", "handled", "unit"]
    assert lines[0][5] == 'measured {"celsius":23}'
    assert lines[1][4:] == ["listener", "success"]


def test_redelivered_and_given_up_are_told(ael: Ael, tmp_path: Path) -> None:
    def fail(event: Any, context: Any) -> None:
        raise ValueError("indigestible")

    eater = agent("eater", event=fail, subscriptions=["meal"])
    cook = agent("cook", start=lambda context: context.emit("meal"))
    asyncio.run(controller_on(tmp_path / "ael.db", eater, cook, tick_rate=0, delivery_attempts=1).run(2))
    [number] = rows(tmp_path / "ael.db", "SELECT id FROM v_events WHERE type = 'meal'")

    out = ael("why", f"event:{number}").out

    assert "handled\t" in out
    assert "given up after 1 attempts: ValueError: indigestible" in out


def test_task_change_and_unit_are_subjects(ael: Ael, database: Path) -> None:
    change = ael("why", "state:temperature", "--json").json[0]

    assert ael("why", f"change:{change['id']}", "--json").json[0] == change
    assert ael("why", f"tick:{change['unit_id']}", "--json").json[0]["id"] == change["unit_id"]


def test_more_steps_than_asked_for_are_said_on_stderr(ael: Ael, database: Path) -> None:
    done = ael("why", "state:temperature", "--limit", "1", "--json")

    assert len(done.json) == 1
    assert done.err == "there is more: these are the newest 1 steps, --limit shows others\n"


@pytest.mark.parametrize(
    ("subject", "message"),
    [
        ("state:temprature", "did you mean temperature?"),
        ("agent:countr", "did you mean counter?"),
        ("event:900", "the newest is "),
        ("task:1", "the newest is 0"),
        ("state:ael_status", "answered by a running loop"),
    ],
)
def test_unknown_subject_is_exit_code_1_with_what_is_near(ael: Ael, database: Path, subject: str, message: str) -> None:
    done = ael("why", subject)

    assert done.code == 1
    assert message in done.err
    assert done.out == ""


@pytest.mark.parametrize("subject", ["temperature", "event:", "event:x", "event:0", "evnt:3", "agent:", ""])
def test_malformed_subject_is_wrong_usage_and_names_the_forms(ael: Ael, database: Path, subject: str) -> None:
    done = ael("why", subject)

    assert done.code == 2
    assert "state:KEY, event:ID, task:ID, change:ID, tick:ID or agent:NAME" in done.err


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["state", "temperature"], "state:temperature"),
        (["agent", "counter"], "agent:counter"),
        (["event:", "3"], "event:3"),
        (["state:two", "words"], "'state:two words'"),
    ],
)
def test_subject_in_several_words_is_asked_for_in_one(ael: Ael, database: Path, words: list[str], meant: str) -> None:
    done = ael("why", *words)

    assert done.code == 2
    assert f"write state:KEY, event:ID, task:ID, change:ID, tick:ID or agent:NAME; did you mean {meant}?" in done.err


def test_bare_key_is_asked_for_its_form(ael: Ael, database: Path) -> None:
    assert "did you mean state:temperature?" in ael("why", "temperature").err


# -- agents: it ran ---------------------------------------------------------------------------------


def test_agent_that_ran_is_told_with_its_units(ael: Ael, database: Path) -> None:
    answer = explained(ael, "counter")

    assert answer.keys() == {"agent", "now", "paused", "iterations"}
    assert (answer["agent"], answer["now"], answer["paused"]) == ("counter", None, None)
    assert [row["iteration"] for row in answer["iterations"]] == [3, 2, 1]
    row = answer["iterations"][0]
    assert (row["ran"], row["reason"], row["clock"]) == (True, "ran", True)
    assert [(u["kind"], u["outcome"], u["changes"], u["events"]) for u in row["units"]] == [("tick", "success", 2, 1)]
    assert "tick (unit " in row["why"]
    assert len(explained(ael, "counter", "--limit", "2")["iterations"]) == 2


def test_table_of_an_agent_has_a_line_for_each_iteration(ael: Ael, database: Path) -> None:
    lines = [line.split("\t") for line in ael("why", "agent:counter").out.splitlines()]

    assert lines[0] == ["iteration", "started_at", "ran", "why"]
    assert [line[0] for line in lines[1:]] == ["3", "2", "1"]
    assert {line[2] for line in lines[1:]} == {"yes"}


async def test_tick_without_effect_is_told_though_it_left_no_row(ael: Ael) -> None:
    async with harness(Idle("idle"), Busy("busy"), tick_rate=1) as h:
        await h.advance(3)

    assert reasons(ael, "idle") == ["no_effect"] * 4
    assert all(row["ran"] for row in explained(ael, "idle")["iterations"])


async def test_past_moment_looks_at_the_iterations_before_it(ael: Ael) -> None:
    async with harness(Busy("busy"), tick_rate=1) as h:
        await h.advance(5)

    assert list(rows_of(ael, "busy", "--at", "3")) == [3, 2, 1]


async def test_on_start_of_the_next_run_is_no_part_of_the_last_iteration(ael: Ael) -> None:
    class Starts(Idle):
        async def on_start(self, context: Any) -> None:
            context.increment("starts")

    async with harness(Starts("starts"), tick_rate=1) as h:
        await h.advance(2)
        await h.restart()

    last = rows_of(ael, "starts")[3]
    assert (last["ran"], last["reason"]) == (True, "no_effect")
    assert "after it, before the next: start (unit " in last["why"]


# -- agents: what kept it ---------------------------------------------------------------------------


async def test_agent_that_an_operator_has_disabled_says_since_when_and_by_whom(ael: Ael, tmp_path: Path) -> None:
    path = tmp_path / "ael.db"
    async with running(controller_on(path, Idle("idle"), Busy("busy"))) as controller:
        await iterations_of(controller, 3)
        before = controller.get_stats()["iteration"]
        await beside(ael, "agents", "disable", "idle")
        await iterations_of(controller, 3)
        now = (await beside(ael, "why", "agent:idle", "--json")).json
        assert (now["now"]["enabled"], now["now"]["ready"]) == (False, False)

    newest = explained(ael, "idle", "--limit", "1000")["iterations"]
    assert newest[0]["reason"] == "disabled"
    assert newest[0]["why"].startswith("disabled since 2")
    assert "(uid " in newest[0]["why"]
    by_number = {row["iteration"]: row for row in newest}
    assert by_number[before]["reason"] == "no_effect"


async def test_disabled_and_enabled_again_is_told_for_each_iteration(ael: Ael, tmp_path: Path) -> None:
    path = tmp_path / "ael.db"
    async with running(controller_on(path, Idle("idle"), Busy("busy"))) as controller:
        await iterations_of(controller, 2)
        await beside(ael, "agents", "disable", "idle")
        await iterations_of(controller, 3)
        await beside(ael, "agents", "enable", "idle")
        await iterations_of(controller, 3)

    told = reasons(ael, "idle", "--limit", "1000")[::-1]

    told = [word for word in told if word not in ("not_clock", "stopping")]
    shortened = [word for place, word in enumerate(told) if place == 0 or told[place - 1] != word]
    assert shortened == ["no_effect", "disabled", "no_effect"]


async def test_agent_that_was_enabled_first_of_all_may_have_been_disabled_before(ael: Ael, tmp_path: Path) -> None:
    """By its code, or not at all: enabling what is enabled is noted too."""
    async with running(controller_on(tmp_path / "ael.db", Idle("idle"), Busy("busy"))) as controller:
        await iterations_of(controller, 2)
        await beside(ael, "agents", "enable", "idle")
        await iterations_of(controller, 3)

    told = reasons(ael, "idle", "--limit", "1000")[::-1]

    assert told[0] == "unknown"
    assert "no_effect" in told
    assert "disabled" not in told


async def test_agent_that_its_code_keeps_disabled_says_so(ael: Ael) -> None:
    class Off(Idle):
        enabled = False

    async with harness(Off("off"), Busy("busy"), tick_rate=1) as h:
        await h.advance(1)

    row = explained(ael, "off")["iterations"][0]
    assert (row["reason"], row["why"]) == ("disabled", "disabled by its code; since when is not in the history")


async def test_absent_agent_was_there_last_when_it_did_something(ael: Ael) -> None:
    async with harness(Busy("gone"), Busy("busy"), tick_rate=1) as h:
        await h.advance(1)
        await h.restart(agents=[Busy("busy")])
        await h.advance(3)
        assert (await beside(ael, "why", "agent:gone", "--json")).json["now"]["registered"] is False

    found = rows_of(ael, "gone")
    assert {found[number]["reason"] for number in (4, 5, 6)} == {"absent"}
    assert "it was there last at 2" in found[6]["why"]
    assert found[2]["reason"] == "ran"


async def test_agent_that_joined_later_was_not_known_before(ael: Ael) -> None:
    async with harness(Busy("busy"), tick_rate=1) as h:
        await h.advance(1)
        await h.restart(agents=[Busy("busy"), Idle("new")])
        await h.advance(1)

    assert rows_of(ael, "new")[1]["reason"] == "unknown_agent"


async def test_backing_off_says_until_when_also_for_the_past(ael: Ael, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AEL_BACKOFF_AFTER", "2")
    monkeypatch.setenv("AEL_QUARANTINE_AFTER", "100")
    settings = Settings(backoff_after=2, quarantine_after=100)
    async with harness(Fails("fails"), Busy("busy"), tick_rate=1, settings=settings) as h:
        await h.advance(7)
        while h.sql("SELECT max(iteration) AS n FROM v_ticks WHERE agent = 'fails'")[0]["n"] == h.iteration:
            await h.advance(1)
        now = (await beside(ael, "why", "agent:fails", "--json")).json["now"]
        assert now["ready"] is False
        assert now["retry_at"] > now["at"]

    found = rows_of(ael, "fails", "--limit", "100")
    ran = {row["iteration"] for row in found.values() if row["ran"]}
    assert ran == set(rows("ael.db", "SELECT iteration FROM v_ticks WHERE agent = 'fails'"))
    assert {row["reason"] for row in found.values()} == {"ran", "backing_off"}
    newest = max(found)
    assert "errors in a row until 2" in found[newest]["why"]
    assert "reckoned" not in found[newest]["why"]


async def test_quarantine_says_since_when_and_how_it_ends(ael: Ael) -> None:
    settings = Settings(backoff_after=100, quarantine_after=2)
    async with harness(Fails("fails"), Busy("busy"), tick_rate=1, settings=settings) as h:
        await h.advance(4)
        now = (await beside(ael, "why", "agent:fails", "--json")).json["now"]
        assert now["quarantined_at"] is not None

    row = explained(ael, "fails")["iterations"][0]
    assert (row["ran"], row["reason"]) == (False, "quarantined")
    assert row["why"].startswith("quarantined since 2")
    assert "`ael agents release` ends it" in row["why"]


async def test_hook_in_the_background_keeps_its_agent_busy(ael: Ael, tmp_path: Path) -> None:
    go = threading.Event()

    def wait(context: Any) -> None:
        go.wait(20)
        context.set("waited", True)

    slow = agent("slow", tick=wait, background=True)
    async with running(controller_on(tmp_path / "ael.db", slow, Busy("busy"))) as controller:
        await iterations_of(controller, 5)
        answer = (await beside(ael, "why", "agent:slow", "--json")).json
        go.set()
        assert answer["now"]["busy"] == "on_tick"
        newest = answer["iterations"][0]
        assert newest["reason"] == "busy"
        assert newest["why"].startswith("its on_tick still runs, since 2")
        await until(lambda: controller.state_context.get("waited"))
        await iterations_of(controller, 2)

    past = rows_of(ael, "slow", "--limit", "1000")[newest["iteration"]]
    assert past["reason"] == "busy"
    assert " still ran, in unit " in past["why"]


async def test_on_start_that_fails_keeps_its_agent_from_ticks(ael: Ael) -> None:
    class Stuck(Busy):
        async def on_start(self, context: Any) -> None:
            raise ValueError("no port")

    settings = Settings(backoff_after=1)
    async with harness(Stuck("stuck"), Busy("busy"), tick_rate=1, settings=settings) as h:
        await h.advance(1)
        assert (await beside(ael, "why", "agent:stuck", "--json")).json["now"]["started"] is False

    assert set(reasons(ael, "stuck")) <= {"backing_off", "not_started", "ran"}


async def test_trigger_is_not_due_until_its_time_and_then_fires_without_effect(ael: Ael) -> None:
    class Hourly(Idle):
        trigger = "every 3s"

    async with harness(Hourly("hourly"), Busy("busy"), tick_rate=1) as h:
        await h.advance(6)
        now = (await beside(ael, "why", "agent:hourly", "--json")).json["now"]
        assert (now["ticked_by"], now["trigger"]) == ("trigger", "every 3s")

    # The first iteration is the one at the start, and the trigger counts from there.
    assert reasons(ael, "hourly") == [
        "no_effect",
        "trigger_not_due",
        "trigger_not_due",
        "no_effect",
        "trigger_not_due",
        "trigger_not_due",
        "trigger_not_due",
    ]
    assert rows_of(ael, "hourly")[6]["why"].startswith("its trigger 'every 3s' was not due until 2")


async def test_fire_times_within_idle_iterations_are_played_again(ael: Ael) -> None:
    """Idle iterations share a commit, which tells only where the trigger stands in the end."""

    class Often(Idle):
        trigger = "every 2s"

    async with harness(Often("often"), Idle("idle"), tick_rate=1) as h:
        await h.advance(9)

    found = rows_of(ael, "often")
    assert len(set(rows("ael.db", "SELECT commit_id FROM iterations"))) < 5
    waits, fires = "trigger_not_due", "no_effect"
    assert [found[number]["reason"] for number in sorted(found)] == [waits, *[waits, fires] * 4, waits]


async def test_iteration_that_an_event_woke_is_none_of_the_clock(ael: Ael) -> None:
    async with harness(Idle("idle"), agent("ear", event=lambda e, c: None, subscriptions=["rang"]), tick_rate=60) as h:
        await h.advance(1)
        h.emit("rang")
        await h.advance(1)

    row = explained(ael, "idle")["iterations"][0]
    assert (row["ran"], row["reason"], row["clock"]) == (False, "not_clock", False)
    assert explained(ael, "ear")["iterations"][0]["reason"] == "ran"


async def test_agent_without_on_tick_only_handles_events(ael: Ael) -> None:
    ear = agent("ear", event=lambda event, context: None, subscriptions=["rang"])
    async with harness(ear, Busy("busy"), tick_rate=1) as h:
        await h.advance(1)
        running_says = (await beside(ael, "why", "agent:ear", "--json")).json["iterations"][0]
        assert running_says["why"] == "it has no on_tick: it only handles events and tasks"

    row = explained(ael, "ear")["iterations"][0]
    assert (row["ran"], row["reason"]) == (False, "no_tick")
    assert "it was never ticked" in row["why"]


async def test_priority_decides_as_the_scheduler_does(ael: Ael) -> None:
    class Third(Idle):
        priority = 5

    async with harness(Third("third"), Busy("busy"), tick_rate=1) as h:
        await h.advance(11)

    scheduler, third = Scheduler(), Third("third")
    for number, row in rows_of(ael, "third", "--limit", "20").items():
        expected = "no_effect" if scheduler.should_run_agent(third, number) else "not_its_turn"
        assert row["reason"] == expected
    text = next(row["why"] for row in rows_of(ael, "third").values() if not row["ran"])
    assert "priority 5 has it run in every 3rd iteration of the clock; this was " in text


async def test_agent_that_max_agents_cut_stays_due(ael: Ael) -> None:
    async with harness(Busy("a"), Busy("b"), Busy("c"), tick_rate=1, max_agents=2) as h:
        await h.advance(5)

    found = [row for name in "abc" for row in explained(ael, name)["iterations"]]
    assert {row["reason"] for row in found} == {"ran", "not_selected"}
    cut = next(row for row in found if not row["ran"])
    assert "but cut by max_agents: it stays due" in cut["why"]


@pytest.mark.parametrize("strategy", ["round_robin", "load_aware"])
async def test_agent_that_was_not_selected_says_how_many_were_due(ael: Ael, strategy: str) -> None:
    agents = [Busy("a"), Busy("b"), Busy("c")]
    async with harness(*agents, tick_rate=1, max_agents=2, strategy=strategy) as h:
        await h.advance(5)

    found = [row for name in "abc" for row in explained(ael, name)["iterations"]]
    assert {row["reason"] for row in found} == {"ran", "not_selected"}
    cut = next(row for row in found if not row["ran"])
    assert cut["why"].startswith(f"not selected by {strategy} (")
    assert "max_agents = 2; " in cut["why"]
    assert "3 agents take turns now, 2 ran" in cut["why"]


async def test_what_the_history_can_not_tell_is_unknown(ael: Ael) -> None:
    """Two of three run without a row: which two, nobody has written down."""
    async with harness(Idle("a"), Idle("b"), Idle("c"), tick_rate=1, max_agents=2, strategy="round_robin") as h:
        await h.advance(3)

    row = explained(ael, "a")["iterations"][0]
    assert (row["ran"], row["reason"]) == (None, "unknown")
    assert row["why"].endswith("the history does not tell")
    assert "\tunknown\t" in ael("why", "agent:a").out


async def test_pause_is_told_now_and_before_the_iteration_that_followed(ael: Ael, tmp_path: Path) -> None:
    path = tmp_path / "ael.db"
    async with running(controller_on(path, Busy("busy"))) as controller:
        await iterations_of(controller, 2)
        await beside(ael, "pause")
        paused_at = rows(path, "SELECT max(id) FROM iterations")[0]
        answer = (await beside(ael, "why", "agent:busy", "--json")).json
        assert answer["now"]["paused"] is True
        assert "(uid " in answer["paused"]["by"]
        assert "now: the loop is paused since 2" in (await beside(ael, "why", "agent:busy")).out
        await beside(ael, "resume")
        await iterations_of(controller, 2)

    found = rows_of(ael, "busy", "--limit", "1000")
    told = [number for number, row in found.items() if "the loop was paused before it since 2" in row["why"]]
    assert len(told) == 1
    assert paused_at <= told[0] <= paused_at + 1
    assert explained(ael, "busy")["paused"] is None


def test_history_that_was_removed_is_said_on_stderr(ael: Ael, database: Path) -> None:
    import sqlite3

    with sqlite3.connect(database) as connection:
        connection.execute("DELETE FROM iterations WHERE id = 1")
        connection.execute("INSERT INTO positions (name, value) VALUES ('horizon', '{\"iteration\": 1}')")
    connection.close()

    done = ael("why", "agent:counter", "--json")

    assert [row["iteration"] for row in done.json["iterations"]] == [3, 2]
    assert "before the beginning of the history" in ael("why", "agent:counter").err
    assert ael("why", "agent:counter", "--at", "0").code == 1


# -- what is said is true ---------------------------------------------------------------------------


class Witness(AgentBase):
    """Notes on a list of its own in which iterations its hooks ran; now and then it changes something or fails."""

    def __init__(self, *arguments: Any, seen: set[int], **attributes: Any) -> None:
        super().__init__(*arguments, **attributes)
        self.seen = seen

    async def on_tick(self, context: Any) -> None:
        self.seen.add(context.iteration)
        dice = context.random.random()
        if dice < 0.2:
            context.increment(f"n of {self.name}")
        elif dice < 0.3:
            raise ValueError("on purpose")
        elif dice < 0.35:
            context.emit("rang")


class Listens(Witness):
    async def on_event(self, event: Any, context: Any) -> None:
        self.seen.add(context.iteration)


@pytest.mark.parametrize("strategy", ["priority", "round_robin", "load_aware"])
@pytest.mark.parametrize("max_agents", [None, 2])
async def test_what_is_said_of_an_agent_is_what_it_did(ael: Ael, strategy: str, max_agents: int | None) -> None:
    """In every iteration: where it is said to have run it ran, and where not it did not; `unknown` is allowed."""
    seen: dict[str, set[int]] = {name: set() for name in ("first", "third", "tenth", "often", "ear")}
    # An agent is made anew from a copy for each run, and copies of a set are other sets.
    shared = {name: _Shared(found) for name, found in seen.items()}

    def agents() -> list[AgentBase]:
        return [
            Witness("first", seen=shared["first"], priority=10),
            Witness("third", seen=shared["third"], priority=5),
            Witness("tenth", seen=shared["tenth"], priority=1),
            Witness("often", seen=shared["often"], trigger="every 3s"),
            Listens("ear", seen=shared["ear"], priority=7, subscriptions=("rang",)),
        ]

    settings = Settings(backoff_after=2, quarantine_after=50)
    options = {"tick_rate": 1, "settings": settings, "strategy": strategy, "max_agents": max_agents, "seed": 3}
    async with harness(*agents(), **options) as h:
        await h.advance(30)
        await h.restart(down=5)
        await h.advance(30)

    verdicts: list[str] = []
    for name, truth in seen.items():
        for number, row in rows_of(ael, name, "--limit", "1000").items():
            verdicts.append(row["reason"])
            if row["ran"] is not None:
                assert row["ran"] == (number in truth), (name, row)
    assert len(verdicts) > 250
    assert verdicts.count("unknown") < len(verdicts) * (0.7 if max_agents or strategy == "load_aware" else 0.1)


class _Shared(set[int]):
    """A set that passes on what is added."""

    def __init__(self, to: set[int]) -> None:
        super().__init__()
        self.to = to

    def add(self, number: int) -> None:
        self.to.add(number)

    def __deepcopy__(self, _memo: Any) -> _Shared:
        return self

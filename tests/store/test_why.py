"""Chains of causes: from a value to the tick, command or start with which it began, over restarts and gaps."""

from __future__ import annotations

import asyncio
import re
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ael_store import AgentBase, Settings, connect
from ael_store.errors import HistoryGone
from ael_store.runtime.prune_alone import prune_alone
from ael_store.store import agent_facts, event_fate, questions, why
from ael_store.store.reader import Reader
from ael_store.store.why import Chain, chain_of
from tests.loops import agent, controller_on, rows, worker

RESULT = "end a task"


def run(path: Path, *agents: AgentBase, iterations: int = 2, **options: Any) -> None:
    asyncio.run(controller_on(path, *agents, tick_rate=0, **options).run(iterations))


@contextmanager
def reading(path: Path) -> Iterator[Reader]:
    reader = Reader(path)
    try:
        yield reader
    finally:
        reader.close()


def chain(path: Path, subject: str, **options: Any) -> Chain | None:
    kind, _, name = subject.partition(":")
    with reading(path) as reader:
        return chain_of(reader, kind, name if kind == "state" else int(name), **options)  # type: ignore[arg-type]


def steps(path: Path, subject: str, **options: Any) -> list[dict[str, Any]]:
    found = chain(path, subject, **options)
    assert found is not None
    return found.steps


def told(path: Path, subject: str, **options: Any) -> list[str]:
    """Return each step in a few words."""
    words: dict[str, Callable[[dict[str, Any]], str]] = {
        "change": lambda step: f"change {step['key']} by {step['agent']}",
        "event": lambda step: f"event {step['type']} from {step['source']}",
        "task": lambda step: f"task {step['name']}",
        "unit": lambda step: f"{step['kind']} of {step['agent']}",
        "command": lambda step: step["name"],
        "run": lambda step: f"run {step['id']}",
        "gone": lambda step: "gone",
    }
    return [words[step["what"]](step) for step in steps(path, subject, **options)]


def once(emit: str) -> Callable[[Any], None]:
    """Return an `on_tick` that emits once in the life of the database."""

    def tick(context: Any) -> None:
        if context.setdefault("emitted", True) and not context.own.has("done"):
            context.own.set("done", True)
            context.emit(emit, {"n": 1})

    return tick


def double(_self: Any, _task: Any, n: int) -> int:
    return 2 * n


def pass_on(event: Any, context: Any) -> None:
    context.emit("go", {"args": [21], "key": "a task"})


def the_worker() -> AgentBase:
    return worker(double)


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clock that emits in one run, and a chain of handlers that goes on from it in the next."""
    path = tmp_path_factory.mktemp("long") / "ael.db"
    listener: dict[str, Any] = {"event": pass_on, "subscriptions": ["rang"]}
    run(path, agent("listener", **listener), the_worker(), iterations=1)
    run(path, agent("bell", tick=once("rang")), iterations=2)
    run(path, agent("listener", **listener), the_worker(), iterations=100)
    return path


def test_chain_leads_from_a_change_over_task_and_events_to_the_tick_of_an_earlier_run(long: Path) -> None:
    assert told(long, f"state:{RESULT}") == [
        "change end a task by worker",
        "task of worker",
        "task work",
        "event of worker",
        "event go from listener",
        "event of listener",
        "event rang from bell",
        "tick of bell",
    ]
    found = steps(long, f"state:{RESULT}")
    assert found[0]["new_value"] == {"status": "done", "result": 42, "error": None}
    assert found[2]["result"] == 42
    assert found[-1]["because"].startswith("its turn came with iteration ")
    assert {"id", "agent", "kind", "outcome", "iteration", "started_at", "duration_ms"} <= found[-1].keys()


def test_chain_agrees_with_the_view_of_causes(long: Path) -> None:
    found = steps(long, f"state:{RESULT}")

    in_sql = rows(
        long,
        "WITH RECURSIVE chain AS (SELECT * FROM v_causes WHERE effect = 'change' AND effect_id = ? UNION ALL "
        "SELECT c.* FROM chain JOIN v_causes c ON c.effect = chain.cause AND c.effect_id = chain.cause_id) "
        "SELECT effect, effect_id, unit_id FROM chain",
        found[0]["id"],
    )

    things = [step for step in found if step["what"] in ("change", "event", "task")]
    assert [(step["what"], step["id"], step["unit_id"]) for step in things] == in_sql
    assert [step["id"] for step in found if step["what"] == "unit"] == [unit for _, _, unit in in_sql]


@pytest.mark.parametrize("effect", ["change", "event", "task"])
def test_every_chain_of_a_database_agrees_with_the_view(long: Path, effect: str) -> None:
    for number, cause, cause_id in rows(
        long, "SELECT effect_id, cause, cause_id FROM v_causes WHERE effect = ?", effect
    ):
        following = [step for step in steps(long, f"{effect}:{number}") if step["what"] in ("event", "task")]
        following = following[effect in ("event", "task") :]

        if cause is not None:
            assert (following[0]["what"], following[0]["id"]) == (cause, cause_id)
        else:
            assert following == []


def test_limit_ends_a_chain_and_says_so(long: Path) -> None:
    assert (cut := chain(long, f"state:{RESULT}", limit=3)) is not None
    assert (len(cut.steps), cut.more) == (3, True)
    assert (whole := chain(long, f"state:{RESULT}", limit=8)) is not None
    assert (len(whole.steps), whole.more) == (8, False)


def test_command_from_outside_ends_a_chain(tmp_path: Path) -> None:
    path = tmp_path / "ael.db"
    run(path, agent("idle"))
    client = connect(path)
    for value in ("night", "day", "night"):
        client.set("mode", value)
    client.delete("mode")
    number = client.emit("ring", {"n": 3})

    assert told(path, "state:mode") == ["change mode by (outside)", "outside of (outside)", "state.delete"]
    [change, _, command] = steps(path, "state:mode")
    assert (change["operation"], change["old_value"], change["new_value"]) == ("delete", "night", None)
    assert command["arguments"] == {"key": "mode"}
    assert "(uid " in command["actor"]
    [_, _, set_to] = steps(path, "change:2")
    assert set_to["arguments"] == {"key": "mode", "value": "day"}
    assert steps(path, f"event:{number}")[-1]["arguments"]["data"] == {"n": 3}


def test_change_of_the_program_outside_of_hooks_is_told_from_a_command(tmp_path: Path) -> None:
    path = tmp_path / "ael.db"

    async def main() -> None:
        controller = controller_on(path, agent("idle"), tick_rate=0)
        controller.state_context.set("a", 1)
        await controller.run(iterations=2)

    run(path, agent("idle"))
    connect(path).set("b", 2)
    asyncio.run(main())

    assert told(path, "state:a") == ["change a by (outside)", "outside of (outside)"]
    assert "no command was noted" in steps(path, "state:a")[-1]["because"]


def test_start_of_the_run_ends_a_chain(tmp_path: Path) -> None:
    path = tmp_path / "ael.db"
    run(path, agent("idle"))
    run(path, agent("starter", start=lambda context: context.set("ready", True)))

    assert told(path, "state:ready") == ["change ready by starter", "start of starter", "run 2"]
    assert steps(path, "state:ready")[-1]["status"] == "stopped"


def test_delayed_event_leads_back_to_the_unit_that_emitted_it(tmp_path: Path) -> None:
    path = tmp_path / "ael.db"

    def begin(context: Any) -> None:
        context.emit("later", after=0.001)

    def hear(event: Any, context: Any) -> None:
        context.set("heard", True)

    agents = (agent("starter", start=begin), agent("listener", event=hear, subscriptions=["later"]))
    asyncio.run(controller_on(path, *agents, tick_rate=0.005).run(5))

    assert told(path, "state:heard") == [
        "change heard by listener",
        "event of listener",
        "event later from starter",
        "outside of (outside)",
        "start of starter",
        "run 1",
    ]


def test_trigger_is_named_as_the_cause_of_its_tick(tmp_path: Path) -> None:
    path = tmp_path / "ael.db"
    often = agent("often", tick=lambda context: context.increment("n"), trigger="every 1ms")
    asyncio.run(controller_on(path, often, tick_rate=0.01).run(5))

    [_, unit] = steps(path, "state:n")

    assert unit["because"].startswith("its trigger 'every 1ms', due at 2")


def test_on_error_leads_to_the_unit_that_failed(tmp_path: Path) -> None:
    path = tmp_path / "ael.db"

    def fail(event: Any, context: Any) -> None:
        raise ValueError("broken")

    def note(error: Any, context: Any) -> None:
        context.set("note", str(error))

    fails = agent("fails", event=fail, error=note, subscriptions=["rang"])
    run(path, fails, agent("bell", tick=once("rang")), iterations=3)

    assert told(path, "state:note") == [
        "change note by fails",
        "error of fails",
        "event of fails",
        "event rang from bell",
        "tick of bell",
    ]


def test_event_tells_who_has_handled_it_who_waits_and_who_gave_it_up(tmp_path: Path) -> None:
    path = tmp_path / "ael.db"

    def fail(event: Any, context: Any) -> None:
        raise ValueError("indigestible")

    def agents() -> list[AgentBase]:
        return [
            agent("eager", event=lambda event, context: None, subscriptions=["ra*"]),
            agent("other", event=lambda event, context: None, subscriptions=["tick"]),
            agent("fails", event=fail, subscriptions=["rang"]),
        ]

    run(path, *agents(), agent("away", event=lambda event, context: None, subscriptions=["rang"]), iterations=1)
    run(path, *agents(), agent("bell", tick=once("rang")), iterations=2, delivery_attempts=1)
    [number] = rows(path, "SELECT id FROM v_events WHERE type = 'rang'")

    event = steps(path, f"event:{number}")[0]

    assert {(unit["subscriber"], unit["outcome"]) for unit in event["handled"]} == {
        ("eager", "success"),
        ("fails", "error"),
    }
    assert event["pending"] == [{"subscriber": "away", "attempts": 0}]
    [letter] = event["dead_letters"]
    assert (letter["subscriber"], letter["attempts"], letter["error"]) == ("fails", 1, "ValueError: indigestible")


def test_handler_that_was_away_is_found_far_behind_the_event(long: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_fate, "LOOK_UNITS", 0)  # as if ten thousand units of others were between
    [number] = rows(long, "SELECT id FROM v_events WHERE type = 'rang'")

    assert [unit["subscriber"] for unit in steps(long, f"event:{number}")[0]["handled"]] == ["listener"]


def test_past_moment_has_the_chain_of_then(tmp_path: Path) -> None:
    path = tmp_path / "ael.db"
    run(path, agent("counter", tick=lambda context: context.set("n", context.iteration)), iterations=5)

    assert steps(path, "state:n", at=3)[0]["new_value"] == 3
    assert steps(path, "state:n")[0]["new_value"] == 5
    assert chain(path, "change:4", at=3) is None
    assert chain(path, "change:400") is None
    assert chain(path, "state:other") is None


# -- what retention has removed ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A history of 110 iterations: a key that is set in each, one that was deleted early, and a chain of events."""
    path = tmp_path_factory.mktemp("whole") / "ael.db"

    def count(context: Any) -> None:
        context.increment("n")
        if context.iteration == 2:
            context.set("short", 1)
            context.emit("rang")
        if context.iteration == 3:
            context.delete("short")
        if context.iteration % 7 == 0:
            context.emit("rang")

    def hear(event: Any, context: Any) -> None:
        if not context.has("heard"):
            context.set("heard", True)
        context.emit("echo", {"of": event.id})

    ear = agent("ear", event=hear, subscriptions=["rang"])
    late = agent("late", event=lambda event, context: context.increment("late"), subscriptions=["echo"])
    run(path, agent("clock", tick=count), ear, late, iterations=9)
    connect(path).set("mode", "night")
    run(path, agent("clock", tick=count), ear, late, iterations=101)
    return path


@pytest.fixture
def pruned(whole: Path, tmp_path: Path) -> Path:
    """A copy of it whose history begins at the end of iteration 10."""
    path = tmp_path / "ael.db"
    shutil.copy(whole, path)
    asyncio.run(prune_alone(path, Settings(history_rows=1), lambda _line: None))
    with reading(path) as reader:
        assert reader.horizon().iteration == 10
    return path


def test_chain_ends_with_a_step_that_says_where_history_begins(pruned: Path) -> None:
    assert told(pruned, "state:heard") == ["change heard by ear", "event of ear", "gone"]
    end = steps(pruned, "state:heard")[-1]
    assert (end["subject"], end["why"].partition(" is ")[2]) == ("event", "before the beginning of the history")
    assert told(pruned, "state:n") == ["change n by clock", "tick of clock"]


def test_command_before_the_beginning_is_not_made_up(pruned: Path) -> None:
    connect(pruned).set("other", 1)

    assert told(pruned, "state:mode") == ["change mode by (outside)", "outside of (outside)", "gone"]


def test_value_with_which_history_begins_is_kept_and_what_led_to_it_is_gone(pruned: Path) -> None:
    [change, unit, end] = steps(pruned, "state:n", at=10)

    assert (change["new_value"], change["old_value"], change["old_is_gone"]) == (10, None, True)
    assert (unit["kind"], end["what"]) == ("tick", "gone")
    [following, _] = steps(pruned, "state:n", at=11)
    assert (following["old_value"], following["old_is_gone"]) == (10, False)


def test_subject_that_is_gone_is_refused_with_where_history_begins(pruned: Path) -> None:
    for subject in ("event:2", "change:1", "tick:1"):
        with pytest.raises(HistoryGone, match="history begins at iteration 10, 2"):
            chain(pruned, subject)
    with pytest.raises(HistoryGone, match="'short' had no value where the history begins"):
        chain(pruned, "state:short")
    with pytest.raises(HistoryGone):
        chain(pruned, "state:n", at=3)


@pytest.mark.parametrize(("kind", "table"), [("change", "state_changes"), ("event", "events"), ("tick", "ticks")])
def test_whatever_is_left_has_the_chain_that_it_had_up_to_where_it_ends(
    whole: Path, pruned: Path, kind: str, table: str
) -> None:
    numbers = rows(whole, f"SELECT id FROM {table} ORDER BY id")
    left = set(rows(pruned, f"SELECT id FROM {table}"))
    assert 0 < len(left) < len(numbers)
    for number in numbers:
        if number not in left:
            with pytest.raises(HistoryGone):
                chain(pruned, f"{kind}:{number}")
            continue
        before = [(step["what"], step["id"]) for step in steps(whole, f"{kind}:{number}")]
        after = [(step["what"], step["id"]) for step in steps(pruned, f"{kind}:{number}")]
        if after[-1][0] == "gone":
            after.pop()
            assert after == before[: len(after)]
        else:
            assert after == before


# -- speed ------------------------------------------------------------------------------------------

SHORT = {"s", "a", "d", "y", "r", "runs", "(subquery)"}
"""Subscriptions, agents, dead letters, types and runs; and what another part of the query has found."""


QUERIES = {**questions.COMMON, **why.QUERIES, **event_fate.QUERIES, **agent_facts.QUERIES}


@pytest.mark.parametrize("question", sorted(QUERIES))
def test_no_question_scans_a_long_table(long: Path, question: str) -> None:
    """Each looks rows up by number, or walks an index as far as it needs."""
    names = dict.fromkeys(("id", "until", "after", "most", "event", "agent", "key", "at_us", "iteration", "commit"), 1)
    connection = sqlite3.connect(long)

    plan = [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {QUERIES[question]}", names)]

    connection.close()
    scanned = {re.sub(r"-\d+", "", line.split()[1]) for line in plan if line.startswith("SCAN ")}
    assert scanned <= SHORT, plan

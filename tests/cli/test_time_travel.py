"""`--at`, `ael state diff` and `ael state undo`: shapes, messages, what is refused, and a loop that runs beside."""

from __future__ import annotations

import io
import json
import shutil
import sqlite3
import sys
from pathlib import Path
from typing import Any

import pytest

from ael_store import StateContext
from ael_store.testing import Harness
from tests.cli.conftest import Ael, Start, until
from tests.loops import agent, rows
from tests.store.test_moment import forget_up_to

# The database of these tests: three iterations, in each of which `counter` sets `temperature` and `agent/counter/mine`.

# -- the state as it was -----------------------------------------------------------------------------


def test_list_at_an_iteration_has_the_shape_of_the_list(ael: Ael, database: Path) -> None:
    assert ael("state", "list", "--at", "2", "--json").json == {"agent/counter/mine": [2], "temperature": 22}
    assert ael("state", "list", "agent/", "--at", "1", "--json").json == {"agent/counter/mine": [1]}
    assert ael("state", "list", "--at", "0", "--json").json == {}
    assert ael("state", "list", "--at", "0").err == "the state was empty\n"
    assert ael("state", "list", "--at", "3").out == ael("state", "list").out


def test_time_stands_for_the_last_iteration_that_had_started(ael: Ael, database: Path) -> None:
    second = rows(database, "SELECT started_at FROM v_iterations WHERE iteration = 2")[0]

    assert ael("state", "get", "temperature", "--at", second).out == "22\n"
    assert ael("state", "get", "temperature", "--at", "1999-12-31").code == 1


def test_key_that_was_not_there_yet_is_said_to_be_missing_then(ael: Ael, database: Path) -> None:
    ael("state", "set", "mode", "1")

    done = ael("state", "get", "temprature", "--at", "2", "--json")

    assert (done.code, done.out) == (1, "")
    assert "there was no key 'temprature' after iteration 2 in" in done.err
    assert "; did you mean temperature?" in done.err
    assert ael("state", "get", "mode", "--at", "2").code == 1
    assert ael("state", "history", "mode", "--at", "2").code == 1


def test_key_that_is_gone_now_is_there_in_the_past(ael: Ael, database: Path) -> None:
    ael("state", "delete", "temperature")

    assert ael("state", "get", "temperature").code == 1
    assert ael("state", "get", "temperature", "--at", "2", "--json").json == 22


def test_history_ends_at_the_moment(ael: Ael, database: Path) -> None:
    found = ael("state", "history", "temperature", "--at", "2", "--json").json

    assert [row["new_value"] for row in found] == [22, 21]
    assert found == ael("state", "history", "temperature", "--json").json[1:]


@pytest.mark.parametrize("moment", ["4", "-1", "tomorrow", "", "2999-01-01"])
@pytest.mark.parametrize(
    "command",
    [("state", "list"), ("state", "get", "temperature"), ("state", "history", "temperature"), ("agents", "list")],
)
def test_what_is_no_moment_yet_is_wrong_usage(ael: Ael, database: Path, command: tuple[str, ...], moment: str) -> None:
    done = ael(*command, "--at", moment)

    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("ael: ")


def test_what_was_removed_is_a_failure_that_says_from_when_on_history_is_there(ael: Ael, database: Path) -> None:
    forget_up_to(database, 2)

    for command in (
        ("state", "list"),
        ("state", "get", "temperature"),
        ("state", "history", "temperature"),
        ("agents", "list"),
    ):
        done = ael(*command, "--at", "1")
        assert (done.code, done.out) == (1, "")
        assert "history begins at iteration 2" in done.err
    assert ael("state", "diff", "1").code == 1
    assert ael("state", "undo", "--iteration", "1", "--dry-run").code == 1
    assert ael("state", "get", "temperature", "--at", "2").code == 0


# -- the agents as they were -------------------------------------------------------------------------


async def test_agents_at_a_moment_have_the_counts_of_then(ael: Ael, tmp_path: Path) -> None:
    """Errors and events are exact; ticks are those that left a row since the last full hour."""

    def work(context: StateContext) -> None:
        if context.iteration % 3 == 0:
            raise ValueError(f"in {context.iteration}")
        context.emit("made", context.iteration)

    seen: dict[int, list[dict[str, Any]]] = {}
    agents = [
        agent("worker", tick=work),
        agent("idle", tick=lambda context: None),
        agent("listener", event=lambda event, context: None, subscriptions=["made"]),
    ]
    async with Harness(agents, store=tmp_path / "ael.db", tick_rate=600) as h:
        for _ in range(40):
            await h.advance(600)
            seen[h.iteration] = h.sql("SELECT * FROM v_agents ORDER BY name")
        last = h.iteration
    exact = ("name", "priority", "enabled", "status", "error_count", "event_count", "last_error", "metadata")
    keys = list(ael("agents", "list", "--json").json[0])

    for number, expected in seen.items():
        found = ael("agents", "list", "--at", str(number), "--json").json
        assert list(found[0]) == keys
        for then, now in zip(found, expected, strict=True):
            for column in exact:
                assert then[column] == (json.loads(now[column]) if column == "metadata" else now[column]), number
            if then["name"] == "worker" or number == last:
                assert (then["tick_count"], then["last_tick_at"]) == (now["tick_count"], now["last_tick_at"])
            assert now["tick_count"] - 6 <= then["tick_count"] <= now["tick_count"], number


async def test_agents_at_a_moment_are_those_of_then_with_their_flags(ael: Ael, tmp_path: Path) -> None:
    path = tmp_path / "ael.db"
    early, late = agent("early", tick=lambda c: c.increment("n")), agent("late", tick=lambda c: c.increment("m"))
    async with Harness([early], store=path) as h:

        async def switch(verb: str) -> int:
            reply = h.controller._host.request(f"agents.{verb}", {"name": "early"}, "test")
            await h.advance(1)
            reply.result(timeout=0)
            return h.iteration

        await h.advance(3)
        enabled = h.iteration
        disabled = await switch("disable")
        await h.restart(agents=[early, late])
        await h.advance(3)
        both = h.iteration
        again = await switch("enable")
        await h.advance(1)

    def then(moment: int) -> dict[str, str]:
        return {row["name"]: row["status"] for row in ael("agents", "list", "--at", str(moment), "--json").json}

    assert then(enabled) == {"early": "active"}
    assert then(both) == {"early": "disabled", "late": "active"}
    assert then(disabled) == {"early": "disabled", "late": "active"}  # a start carries the iteration before
    assert then(again) == {"early": "active", "late": "active"}


def test_agents_of_now_are_those_at_the_last_iteration(ael: Ael, database: Path) -> None:
    assert ael("agents", "list", "--at", "3", "--json").json == ael("agents", "list", "--json").json
    assert ael("agents", "list", "--at", "3").out == ael("agents", "list").out


# -- differences -------------------------------------------------------------------------------------


def changes(found: Any) -> list[tuple[Any, ...]]:
    return [(row["key"], row["change"], row["old"], row["new"]) for row in found]


def test_difference_between_two_moments(ael: Ael, database: Path) -> None:
    assert changes(ael("state", "diff", "1", "3", "--json").json) == [
        ("agent/counter/mine", "changed", [1], [3]),
        ("temperature", "changed", 21, 23),
    ]
    assert changes(ael("state", "diff", "3", "1", "--json").json)[1] == ("temperature", "changed", 23, 21)
    assert changes(ael("state", "diff", "0", "1", "--json").json)[1] == ("temperature", "added", None, 21)
    assert changes(ael("state", "diff", "1", "0", "--json").json)[1] == ("temperature", "removed", 21, None)
    assert ael("state", "diff", "2", "2", "--json").json == []
    assert ael("state", "diff", "2", "2").err == "nothing is different\n"


def test_difference_to_now_needs_no_second_moment(ael: Ael, database: Path) -> None:
    ael("state", "set", "mode", '"night"')
    ael("state", "delete", "temperature")

    table = ael("state", "diff", "2").out.splitlines()

    assert table == [
        "key\tchange\told\tnew",
        "agent/counter/mine\tchanged\t[2]\t[3]",
        'mode\tadded\t\t"night"',
        "temperature\tremoved\t22\t",
    ]
    assert changes(ael("state", "diff", "2", "--prefix", "m", "--json").json) == [("mode", "added", None, "night")]
    assert ael("state", "diff", "2", "--prefix", "m*", "--json").json == []


def test_value_that_went_and_came_back_is_no_difference(ael: Ael, database: Path) -> None:
    ael("state", "set", "temperature", "0")
    ael("state", "set", "temperature", "23")

    assert ael("state", "diff", "3", "--json").json == []


def test_difference_between_two_databases(ael: Ael, database: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.db"
    shutil.copy(database, other)
    ael("state", "set", "mode", "1")
    ael("state", "set", "temperature", "5", "--db", str(other))

    assert changes(ael("state", "diff", "other.db", "--json").json) == [
        ("mode", "added", None, 1),
        ("temperature", "changed", 5, 23),
    ]
    assert changes(ael("state", "diff", "ael.db", "other.db", "--prefix", "t", "--json").json) == [
        ("temperature", "changed", 23, 5)
    ]
    assert changes(ael("state", "diff", f"{other}@1", "2", "--prefix", "t", "--json").json) == [
        ("temperature", "changed", 21, 22)
    ]
    assert changes(ael("state", "diff", "1", f"sqlite:///{other}@2", "--prefix", "t", "--json").json) == [
        ("temperature", "changed", 21, 22)
    ]
    assert ael("state", "diff", "other.db@3", "ael.db@3", "--json").code == 0


def test_databases_are_compared_where_the_one_of_the_command_is_missing(
    ael: Ael, database: Path, tmp_path: Path
) -> None:
    database.rename(tmp_path / "a.db")
    shutil.copy(tmp_path / "a.db", tmp_path / "b@c.db")

    assert ael("state", "diff", "a.db", "b@c.db", "--json").json == []
    assert len(ael("state", "diff", "a.db", "b@c.db@2", "--json").json) == 2
    assert ael("state", "diff", "a.db").code == 74


def test_number_is_a_moment_also_where_a_file_has_that_name(ael: Ael, database: Path, tmp_path: Path) -> None:
    shutil.copy(database, tmp_path / "2")
    ael("state", "set", "temperature", "5")

    assert changes(ael("state", "diff", "2", "--prefix", "t", "--json").json) == [("temperature", "changed", 22, 5)]
    assert changes(ael("state", "diff", "./2", "--prefix", "t", "--json").json) == [("temperature", "changed", 23, 5)]


@pytest.mark.parametrize(
    ("side", "message"),
    [
        ("nowhere.db", "neither a moment (412, 2026-01-31T12:00:00Z) nor a database that exists"),
        ("ael.db@", "'' is no moment"),
        ("ael.db@soon", "'soon' is no moment"),
        ("@2", "neither a moment"),
        ("99", "there is no iteration 99 yet"),
        ("ael.db@99", "there is no iteration 99 yet"),
        ("postgresql://x/y", "neither a moment"),
        ("", "neither a moment"),
    ],
)
def test_what_is_neither_a_moment_nor_a_database_is_wrong_usage(
    ael: Ael, database: Path, side: str, message: str
) -> None:
    for arguments in ((side,), ("1", side)):
        done = ael("state", "diff", *arguments)
        assert (done.code, done.out) == (2, "")
        assert message in done.err


def test_file_that_is_no_database_is_refused_by_its_name(ael: Ael, database: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no database, but a text that is long enough for a header " * 20)

    done = ael("state", "diff", "notes.txt")

    assert done.code == 65
    assert "notes.txt" in done.err


# -- undo --------------------------------------------------------------------------------------------


def everything(path: Path) -> list[str]:
    with sqlite3.connect(path) as connection:
        dump = list(connection.iterdump())
    connection.close()
    return dump


def test_undo_writes_back_and_says_so(ael: Ael, database: Path) -> None:
    done = ael("state", "undo", "--agent", "counter", "--since", "2", "--yes")

    assert done.out.splitlines() == [
        "what\tkey\tfrom\tto\twhy",
        "undone\tagent/counter/mine\t[3]\t[1]\t",
        "undone\ttemperature\t23\t21\t",
    ]
    assert done.err == "wrote back 2 values (committed)\n"
    assert ael("state", "list", "--json").json == {"agent/counter/mine": [1], "temperature": 21}
    assert ael("db", "verify").code == 0


def test_undo_with_json_says_what_is_undone_and_what_is_kept(ael: Ael, database: Path) -> None:
    ael("state", "set", "temperature", "5")

    assert ael("state", "undo", "--iteration", "3", "--agent", "counter", "--json").json == {
        "undone": [{"key": "agent/counter/mine", "from": [3], "to": [2]}],
        "kept": [{"key": "temperature", "why": "changed since", "agent": "(outside)", "iteration": 3}],
        "changed": True,
    }
    table = ael("state", "undo", "--change", "1").out.splitlines()
    assert len(table) == 2
    assert table[1].startswith("kept\t")


def test_one_change_is_found_by_the_number_that_the_history_shows(ael: Ael, database: Path) -> None:
    newest = ael("state", "history", "temperature").out.splitlines()[1].split("\t")[0]

    assert ael("state", "undo", "--change", newest, "--json").json["undone"] == [
        {"key": "temperature", "from": 23, "to": 22}
    ]


def test_dry_run_says_the_same_and_writes_nothing(ael: Ael, database: Path) -> None:
    before = everything(database)

    dry = ael("state", "undo", "--agent", "counter", "--since", "2", "--dry-run", "--json").json
    shown = ael("state", "undo", "--agent", "counter", "--since", "2", "--dry-run")

    assert shown.err == "would write back 2 values\n"
    assert everything(database) == before
    done = ael("state", "undo", "--agent", "counter", "--since", "2", "--json").json
    assert dry == {**done, "changed": False}
    assert done["changed"] is True


def test_nothing_to_undo_asks_nothing_and_changes_nothing(ael: Ael, database: Path) -> None:
    before = everything(database)

    done = ael("state", "undo", "--agent", "listener", "--since", "1")

    assert (done.code, done.err) == (0, "there is nothing to undo\n")
    assert everything(database) == before


def test_undo_asks_on_a_terminal(ael: Ael, database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ael_store.cli.agents.is_interactive", lambda: True)
    monkeypatch.setattr(sys, "stdin", io.StringIO("n\n"))
    before = everything(database)

    done = ael("state", "undo", "--iteration", "3")

    assert done.code == 1
    assert "Write back 2 values?" in done.err
    assert everything(database) == before


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "say what to undo in one of three ways"),
        (("--since", "2"), 2, "say what to undo in one of three ways"),
        (("--agent", "counter"), 2, "say what to undo in one of three ways"),
        (("--change", "1", "--iteration", "1"), 2, "say what to undo in one of three ways"),
        (("--agent", "countr", "--since", "2"), 1, "there is no agent 'countr'; did you mean counter?"),
        (("--agent", "counter", "--since", "soon"), 2, "is no moment"),
        (("--iteration", "4"), 2, "there is no iteration 4 yet"),
        (("--change", "999"), 2, "there is no change 999"),
        (("--change", "0"), 2, "--change"),
    ],
)
def test_other_choices_are_refused(
    ael: Ael, database: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    before = everything(database)

    done = ael("state", "undo", *arguments)

    assert (done.code, done.out) == (code, "")
    assert message in done.err
    assert everything(database) == before


# -- beside a loop -----------------------------------------------------------------------------------


def test_running_loop_answers_and_undoes(ael: Ael, start: Start, counter: str, tmp_path: Path) -> None:
    process = start("run", counter, "--tick-rate", "0.02")
    process.wait_for("iteration 1 ")
    until(lambda: ael("state", "get", "count", "--json").out not in ("", "1\n"), process)
    ael("state", "set", "mode", '"night"')
    made = ael("state", "history", "mode", "--json").json[0]

    assert ael("state", "get", "count", "--at", "1").out == "1\n"
    assert changes(ael("state", "diff", "0", "1", "--json").json) == [("count", "added", None, 1)]
    assert ael("state", "undo", "--change", str(made["id"]), "--json").json == {
        "undone": [{"key": "mode", "from": "night", "to": None}],
        "kept": [],
        "changed": True,
    }
    assert ael("state", "get", "mode").code == 1
    assert ael("state", "get", "mode", "--at", str(made["iteration"])).out == "night\n"
    assert process.process.poll() is None

"""`ael agents`: with no loop running, but for what needs one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Ael, Start, until
from tests.loops import rows


def statuses(database: Path) -> dict[str, str]:
    return dict(rows(database, "SELECT name, status FROM v_agents"))


def test_list_has_a_row_for_each_agent(ael: Ael, database: Path) -> None:
    found = {row["name"]: row for row in ael("agents", "list", "--json").json}

    assert set(found) == {"counter", "listener", "broken"}
    assert (found["counter"]["tick_count"], found["counter"]["status"]) == (3, "active")
    assert found["counter"]["metadata"] == {}
    assert found["counter"]["enabled"] is True
    assert found["broken"]["last_error"] == "ValueError: no sensor"
    header, *lines = ael("agents", "list").out.splitlines()
    assert header.split("\t")[:4] == ["name", "status", "priority", "ticks"]
    assert lines[0].split("\t")[:5] == ["broken", "active", "10", "0", "3"]


def test_show_tells_all_about_one(ael: Ael, database: Path) -> None:
    found = ael("agents", "show", "listener", "--json").json
    assert [one["pattern"] for one in found["subscriptions"]] == ["meas*"]
    assert found["last_ticks"][0]["kind"] == "event"

    text = ael("agents", "show", "broken").out
    assert "last error     ValueError: no sensor\n" in text
    assert "error\tValueError: no sensor" not in text.splitlines()[0]
    assert "\ttick\terror\t" in text


@pytest.mark.parametrize("verb", ["show", "enable", "disable", "release", "run", "forget"])
def test_unknown_agent_is_told_with_those_that_are_near(ael: Ael, database: Path, verb: str) -> None:
    done = ael("agents", verb, "listner")

    assert (done.code, done.out) == (1, "")
    assert done.err == "ael: there is no agent 'listner'; did you mean listener?\n"


def test_disable_and_enable_say_what_changed(ael: Ael, database: Path) -> None:
    assert ael("agents", "disable", "counter").out == "disabled agent counter (committed)\n"
    assert statuses(database)["counter"] == "disabled"
    assert ael("agents", "disable", "counter").out == "agent counter is disabled already\n"
    assert ael("agents", "enable", "counter", "--json").json == {"name": "counter", "changed": True}
    assert statuses(database)["counter"] == "active"


def test_release_of_a_healthy_agent_changes_nothing(ael: Ael, database: Path) -> None:
    assert ael("agents", "release", "counter").out == "agent counter is neither quarantined nor backing off\n"


def test_rename_takes_state_along(ael: Ael, database: Path) -> None:
    assert ael("agents", "rename", "counter", "meter").out == "renamed agent counter to meter (committed)\n"

    assert "meter" in statuses(database)
    assert "agent/meter/mine" in ael("state", "list", "--json").json
    assert ael("agents", "rename", "meter", "listener").code == 2


def test_forget_first_says_what_would_go(ael: Ael, database: Path) -> None:
    before = statuses(database)

    done = ael("agents", "forget", "counter", "--dry-run", "--json")

    assert done.json == {
        "name": "counter",
        "status": "active",
        "ticks": 3,
        "keys": ["agent/counter/mine"],
        "subscriptions": [],
        "changed": False,
    }
    assert "state key agent/counter/mine" in ael("agents", "forget", "counter", "--dry-run").out
    assert statuses(database) == before


def test_forget_removes_statistics_and_own_state(ael: Ael, database: Path) -> None:
    assert ael("agents", "forget", "counter").out == "forgot agent counter and 1 state keys (committed)\n"

    assert "counter" not in statuses(database)
    assert ael("state", "list", "agent/", "--json").json == {}
    assert rows(database, "SELECT count(*) FROM v_ticks WHERE agent = 'counter'") == [3]


def test_forget_asks_on_a_terminal_and_takes_no_for_an_answer(
    ael: Ael, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def say_no(question: str, **_options: object) -> None:
        import typer

        asked.append(question)
        raise typer.Abort

    monkeypatch.setattr("typer.confirm", say_no)
    monkeypatch.setattr("ael_store.cli.agents.is_interactive", lambda: True)

    done = ael("agents", "forget", "counter")

    assert asked == ["Forget agent counter with 3 ticks and 1 state keys?"]
    assert done.code == 1
    assert done.err == "ael: given up: nothing was changed\n"
    assert "counter" in statuses(database)
    assert ael("agents", "forget", "counter", "--yes").code == 0


HANDS = """
import time
from ael_store import AgentBase

class Report(AgentBase):
    name = "report"
    trigger = "every 30d"

    def on_tick(self, context):
        context.increment("reports")

class Quiet(AgentBase):
    name = "quiet"
    priority = 0

class Slow(AgentBase):
    name = "slow"
    trigger = "every 30d"

    def on_tick(self, context):
        while not context.get("enough", False):
            time.sleep(0.02)

class Failing(AgentBase):
    name = "failing"
    trigger = "every 30d"

    def on_tick(self, context):
        raise ValueError("no paper")

class Ear(AgentBase):
    name = "ear"
    subscriptions = ["ring"]

    def on_event(self, event, context):
        pass
"""


def test_run_ticks_an_agent_at_once_and_is_committed_with_it(ael: Ael, start: Start, tmp_path: Path) -> None:
    """The clock of this loop stands still for an hour, and no trigger fires."""
    (tmp_path / "agents.py").write_text(HANDS)
    (tmp_path / "ael.toml").write_text("slow_after = 0.2\nbackoff_after = 2\n")
    loop = start("run", "agents.py", "--tick-rate", "3600", "--quiet")
    until(lambda: (tmp_path / "ael.db").exists() and ael("status", "--json").json["iteration"] == 1)
    path = tmp_path / "ael.db"
    first_fire = ael("agents", "show", "report", "--json").json["schedule"]

    number = ael("agents", "run", "report", "--json").json["iteration"]

    assert number > 1
    assert rows(path, "SELECT iteration, kind, outcome FROM v_ticks WHERE agent = 'report'") == [
        (number, "tick", "success")
    ]
    assert rows(path, "SELECT ticks FROM v_iterations WHERE iteration = ?", number) == [1]
    assert rows(path, "SELECT value FROM v_state WHERE key = 'reports'") == ["1"]
    assert ael("agents", "run", "report").out == f"agent report ticks in iteration {number + 1} (committed)\n"
    assert ael("agents", "show", "report", "--json").json["tick_count"] == 2
    assert ael("agents", "show", "report", "--json").json["schedule"] == first_fire
    [actor] = set(rows(path, "SELECT actor FROM commands WHERE name = 'agents.run'"))
    assert "pid " in actor

    assert ael("agents", "run", "quiet").code == 0
    assert rows(path, "SELECT outcome FROM v_ticks WHERE agent = 'quiet'") == ["success"]

    assert ael("agents", "run", "slow").code == 0
    assert "is busy with another hook" in ael("agents", "run", "slow").err
    ael("state", "set", "enough", "true")

    for refusal, agent, before in (
        ("has no on_tick", "ear", ()),
        ("is disabled: `ael agents enable report` first", "report", ("agents", "disable", "report")),
        ("is paused: `ael resume` first", "quiet", ("pause",)),
    ):
        assert not before or ael(*before).code == 0
        done = ael("agents", "run", agent)
        assert (done.code, done.out) == (2, "")
        assert refusal in done.err
    assert ael("resume").code == 0

    assert [ael("agents", "run", "failing").code for _ in range(2)] == [0, 0]
    assert rows(path, "SELECT outcome FROM v_ticks WHERE agent = 'failing'") == ["error", "error"]
    assert "is backing off until 2" in ael("agents", "run", "failing").err
    assert ael("agents", "release", "failing").code == 0
    assert ael("agents", "run", "failing").code == 0
    assert loop.stop() == 0
    assert ael("db", "verify").code == 0


def test_run_with_no_loop_says_so(ael: Ael, database: Path) -> None:
    done = ael("agents", "run", "counter")

    assert (done.code, done.out) == (1, "")
    assert done.err == "ael: no loop runs on this database, so no agent can run: start it with `ael run`\n"

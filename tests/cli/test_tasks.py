"""`ael tasks` and `ael limits`, with and without a loop."""

from __future__ import annotations

import getpass
from pathlib import Path

import pytest

from tests.cli.conftest import Ael, Process, Start, until
from tests.loops import rows

AGENTS = """
import pathlib, time
from ael_store import AgentBase, task

class Worker(AgentBase):
    name = "worker"

    async def on_event(self, event, context):
        pass

    async def on_start(self, context):
        context.increment("starts")
        if not context.get("asked"):
            context.set("asked", True)
            context.ask("Buy?", {"price": 3}, choices=("yes", "no"), key="ask")

    async def on_task(self, task, context):
        context.increment(f"applied {task.key}")
        context.set(f"end {task.key}", [task.status, task.result, task.answered_by])

    @task(limit="llm")
    def add(self, task, a, b=0):
        task.cost("0.25")
        return a + b

    @task(attempts=1)
    def fail(self, task):
        if pathlib.Path("repaired").exists():
            return "repaired"
        raise ValueError("broken")

    def long(self, task):
        task.progress(0.4, "half way")
        while not task.cancelled and not pathlib.Path("go").exists():
            time.sleep(0.005)
        return "went"

def free(task, value):
    return value
"""
SETTINGS = """
[limits.llm]
per_day = 2
usd_per_day = 5
"""
LIMIT = {
    "name": "llm",
    "concurrency": None,
    "per_minute": None,
    "per_day": 2,
    "usd_per_day": 5.0,
}


@pytest.fixture
def path(tmp_path: Path, run_here: Ael) -> Path:
    """A database that such a loop has left; its question is task 1."""
    (tmp_path / "agents.py").write_text(AGENTS)
    (tmp_path / "ael.toml").write_text(SETTINGS)
    assert run_here("agents.py", "--iterations", "2", "--tick-rate", "0").code == 0
    return tmp_path / "ael.db"


@pytest.fixture
def loop(path: Path, start: Start, ael: Ael) -> Process:
    """The loop, running."""
    process = start("run", "agents.py", "--tick-rate", "3600")
    until(lambda: ael("state", "get", "starts").out == "2\n", process)
    return process


def status(ael: Ael, number: int) -> str:
    return str(ael("tasks", "show", str(number), "--json").json["status"])


def test_submitted_without_a_loop_it_waits_and_the_next_loop_runs_it_once(ael: Ael, path: Path, run_here: Ael) -> None:
    first = ael("tasks", "submit", "add", "4", "5", "--agent", "worker", "--key", "k", "--priority", "8")
    again = ael("tasks", "submit", "add", "9", "--agent", "worker", "--key", "k", "--json")
    waiting = ael("tasks", "list", "--status", "waiting", "--name", "add", "--json").json
    run_here("agents.py", "--iterations", "3", "--tick-rate", "0.01")
    until(lambda: status(ael, 2) == "done" or run_here("agents.py", "--iterations", "1").code)

    assert first.out == "submitted task 2 (add) with key k (committed)\n"
    assert again.json == {"id": 2, "key": "k", "new": False}
    assert [(row["id"], row["args"], row["priority"], row["attempts"]) for row in waiting] == [(2, [4, 5], 8, 0)]
    found = ael("tasks", "show", "2", "--json").json
    assert (found["result"], found["cost_usd"], found["limit_name"]) == (9, 0.25, "llm")
    assert ael("state", "get", "applied k").out == "1\n"


def test_submitted_to_a_running_loop_it_runs_at_once(ael: Ael, loop: Process) -> None:
    done = ael("tasks", "submit", "agents:free", '{"a": [1, null, "č"]}', "--json").json
    until(lambda: status(ael, done["id"]) == "done", loop)

    shown = ael("tasks", "show", str(done["id"]), "--json").json
    assert shown["result"] == {"a": [1, None, "č"]}
    assert shown["attempts"] == 1
    assert [attempt["outcome"] for attempt in shown["attempts_made"]] == ["done"]
    assert ael("events", "list", "--type", "task_finished", "--json").json[0]["data"]["result"] == shown["result"]


def test_after_is_a_length_of_time_or_a_time(ael: Ael, path: Path) -> None:
    ael("tasks", "submit", "fail", "--agent", "worker", "--after", "30m")
    ael("tasks", "submit", "fail", "--agent", "worker", "--after", "90")
    ael("tasks", "submit", "fail", "--agent", "worker", "--after", "2031-01-01T00:00:00Z")

    waits = rows(path, "SELECT (next_us - created_us) / 1000000 FROM tasks WHERE id IN (2, 3) ORDER BY id")
    assert waits == pytest.approx([1800, 90], abs=2)
    assert rows(path, "SELECT next_at FROM v_tasks WHERE id = 4") == ["2031-01-01T00:00:00.000000Z"]


def test_list_and_show_tell_the_live_progress_of_what_runs(ael: Ael, loop: Process) -> None:
    ael("tasks", "submit", "long", "--agent", "worker", "--key", "long")
    until(lambda: ael("tasks", "list", "--status", "running", "--json").json[0]["progress"], loop)

    listed = ael("tasks", "list", "--agent", "worker", "--name", "long", "--json").json
    assert [row["progress"] for row in listed] == [{"fraction": 0.4, "note": "half way", "attempt": 1}]
    assert "40 % half way" in ael("tasks", "list").out
    assert "40 % half way" in ael("tasks", "show", "2").out
    Path("go").touch()
    until(lambda: status(ael, 2) == "done", loop)
    assert ael("tasks", "show", "2", "--json").json["progress"] is None


def test_filters_and_limit_of_the_list_newest_last(ael: Ael, path: Path) -> None:
    for number in range(3):
        ael("tasks", "submit", "add", str(number), "--agent", "worker")
    ael("tasks", "submit", "agents:free", "1")

    def ids(*options: str) -> list[int]:
        return [row["id"] for row in ael("tasks", "list", *options, "--json").json]

    assert ids() == [1, 2, 3, 4, 5]
    assert ids("--limit", "2") == [4, 5]
    assert ids("--name", "add") == [2, 3, 4]
    assert ids("--agent", "worker") == [1, 2, 3, 4]
    assert ids("--status", "done") == []
    assert ael("tasks", "list", "--status", "done").code == 0


@pytest.mark.parametrize("live", [True, False], ids=["with a loop", "without"])
def test_question_is_answered_once_by_whom_is_named(
    ael: Ael, path: Path, request: pytest.FixtureRequest, live: bool
) -> None:
    if live:
        request.getfixturevalue("loop")
    shown = ael("tasks", "show", "1").out
    wrong = ael("tasks", "answer", "1", "maybe", "--by", "Ana")
    done = ael("tasks", "answer", "1", "yes", "--by", "Ana")
    twice = ael("tasks", "answer", "1", "no", "--by", "Ben")

    assert "Buy?" in shown
    assert '"price"' in shown or "price" in shown
    assert (wrong.code, twice.code, done.code) == (2, 2, 0)
    assert "yes" in wrong.err
    assert "no" in wrong.err
    assert "Ana" in twice.err
    request.getfixturevalue("loop")
    until(lambda: ael("state", "get", "applied ask").code == 0)
    assert ael("state", "get", "end ask").json == ["done", "yes", "Ana"]
    assert ael("tasks", "show", "1", "--json").json["answered_by"] == "Ana"


def test_answer_is_by_the_user_unless_it_says_otherwise(ael: Ael, path: Path) -> None:
    assert ael("tasks", "answer", "1", "no").code == 0

    assert ael("tasks", "show", "1", "--json").json["answered_by"] == getpass.getuser()


def test_failed_task_is_retried_and_its_agent_gets_the_new_result(ael: Ael, loop: Process) -> None:
    ael("tasks", "submit", "fail", "--agent", "worker", "--key", "f")
    until(lambda: ael("state", "get", "applied f").out == "1\n", loop)
    failed = ael("tasks", "show", "2", "--json").json
    Path("repaired").touch()
    retried = ael("tasks", "retry", "2")
    until(lambda: ael("state", "get", "applied f").out == "2\n", loop)

    assert (failed["status"], failed["error"]) == ("failed", "ValueError: broken")
    assert "ValueError: broken" in failed["attempts_made"][0]["traceback"]
    assert retried.code == 0
    assert ael("state", "get", "end f").json == ["done", "repaired", None]
    assert ael("tasks", "show", "2", "--json").json["key"] == "f"


def test_cancel_ends_what_runs_and_what_waits(ael: Ael, loop: Process) -> None:
    ael("tasks", "submit", "long", "--agent", "worker", "--key", "long")
    ael("tasks", "submit", "fail", "--agent", "worker", "--key", "later", "--after", "1h")
    until(lambda: status(ael, 2) == "running", loop)

    assert [ael("tasks", "cancel", number).code for number in ("2", "3")] == [0, 0]
    until(lambda: ael("state", "get", "applied long").code == ael("state", "get", "applied later").code == 0, loop)

    assert [status(ael, 2), status(ael, 3)] == ["cancelled"] * 2
    assert ael("state", "get", "end long").json == ["cancelled", None, None]
    assert ael("tasks", "cancel", "3").code == 0


def test_cancel_and_retry_without_a_loop(ael: Ael, path: Path, run_here: Ael) -> None:
    ael("tasks", "submit", "agents:free", "1")

    assert ael("tasks", "cancel", "2", "--json").json["id"] == 2
    assert status(ael, 2) == "cancelled"
    assert ael("tasks", "retry", "2").code == 0
    assert status(ael, 2) == "waiting"
    until(lambda: run_here("agents.py", "--iterations", "2").code or status(ael, 2) == "done")


def test_release_of_a_restored_database(ael: Ael, path: Path, run_here: Ael) -> None:
    ael("tasks", "submit", "agents:free", "1")
    ael("db", "backup", "backup.db")
    ael("db", "restore", "backup.db")
    run_here("agents.py", "--iterations", "2")

    held = ael("tasks", "list", "--status", "held", "--json").json
    dry = ael("tasks", "release", "2", "--dry-run", "--json")
    assert [row["id"] for row in held] == [1, 2]
    assert [row["id"] for row in dry.json] == [2]
    assert status(ael, 2) == "held"
    assert ael("tasks", "release", "2").code == 0
    assert (status(ael, 1), status(ael, 2)) == ("held", "waiting")
    assert ael("tasks", "release", "--all").out == "released 1 task (committed)\n"
    assert status(ael, 1) == "waiting"
    assert ael("tasks", "release", "--all").code == 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ("tasks show 77", 1, "there is no task 77; `ael tasks list` shows those that there are"),
        ("tasks cancel 77", 1, "there is no task 77"),
        ("tasks retry 77", 1, "there is no task 77"),
        ("tasks answer 77 yes", 1, "there is no task 77"),
        ("tasks release 77", 1, "there is no task 77"),
        ("tasks show x", 2, "integer"),
        ("tasks release", 2, "name a task, or say --all"),
        ("tasks release 1 --all", 2, "--all"),
        ("tasks answer 1 maybe", 2, "yes"),
        ("tasks retry 1", 2, "task 1"),
        ("tasks submit fail --agent nobody", 1, "no agent 'nobody' is known; known are: worker"),
        ("tasks submit fail {bad --agent worker", 2, "is not JSON"),
        ("tasks submit fail --agent worker --after soon", 2, "soon"),
        ("tasks submit fail --agent worker --priority 11", 2, "priority"),
        ("tasks list --status odd", 2, "waiting"),
        ("limits show nope", 2, "there is no limit 'nope'; known are llm"),
        ("limits raise llm", 2, "--reset"),
        ("limits raise llm --per-day -1", 2, "per_day"),
        ("limits raise llm --usd-per-day much", 2, "usd_per_day"),
        ("limits release nope", 2, "there is no limit 'nope'"),
    ],
)
def test_misuse_is_refused_with_the_reason_and_changes_nothing(
    ael: Ael, path: Path, arguments: str, code: int, message: str
) -> None:
    before = rows(path, "SELECT * FROM tasks")

    done = ael(*arguments.split())

    assert (done.code, done.out) == (code, "")
    assert message in done.err
    assert "Traceback" not in done.err
    assert rows(path, "SELECT * FROM tasks") == before


def test_running_loop_refuses_what_it_can_not_do_with_the_reason(ael: Ael, loop: Process, path: Path) -> None:
    ael("tasks", "submit", "long", "--agent", "worker")
    until(lambda: status(ael, 2) == "running", loop)
    before = rows(path, "SELECT * FROM tasks")
    for arguments, code, message in (
        ("tasks submit no.such:thing", 2, "no.such"),
        ("tasks submit agents:nothing", 2, "nothing"),
        ("tasks submit nothing --agent worker", 2, "nothing"),
        ("tasks submit fail --agent nobody", 1, "nobody"),
        ("tasks answer 1 maybe", 2, "yes"),
        ("tasks answer 2 yes", 2, "no question"),
        ("tasks retry 2", 2, "running"),
        ("tasks cancel 77", 1, "there is no task 77"),
        ("limits raise llm --per-minute 0", 2, "per_minute"),
    ):
        done = ael(*arguments.split())
        assert (done.code, done.out) == (code, ""), arguments
        assert message in done.err
    assert rows(path, "SELECT * FROM tasks") == before
    Path("go").touch()


def test_commands_without_a_database_create_none(ael: Ael, tmp_path: Path) -> None:
    for arguments in ("tasks list", "tasks show 1", "tasks submit a:b", "limits show", "tasks release --all"):
        assert ael(*arguments.split()).code != 0
    assert list(tmp_path.iterdir()) == []


def test_limits_show_what_is_used_and_what_waits(ael: Ael, loop: Process) -> None:
    for number in range(3):
        ael("tasks", "submit", "add", str(number), "--agent", "worker")
    until(lambda: ael("limits", "show", "llm", "--json").json[0]["waiting"] == 1, loop)
    until(lambda: [row["status"] for row in ael("tasks", "list", "--json").json[1:]] == ["done", "done", "held"], loop)

    (limit,) = ael("limits", "show", "--json").json
    assert {name: limit[name] for name in LIMIT} == LIMIT
    assert (limit["status"], limit["running"], limit["waiting"], limit["started_today"]) == ("full", 0, 1, 2)
    assert limit["usd_today"] == 0.5
    assert limit["until"].endswith("T00:00:00.000000Z")
    _header, line = ael("limits", "show").out.splitlines()
    assert line.split("\t")[0] == "llm"
    assert "2/2" in line
    assert "llm" in ael("status").out


def test_raise_lets_tasks_go_on_and_reset_takes_it_back(ael: Ael, loop: Process) -> None:
    for number in range(4):
        ael("tasks", "submit", "add", str(number), "--agent", "worker")
    until(lambda: ael("limits", "show", "--json").json[0]["waiting"] == 2, loop)
    raised = ael("limits", "raise", "llm", "--per-day", "3", "--json").json
    until(lambda: ael("limits", "show", "--json").json[0]["waiting"] == 1, loop)
    loop.stop()
    offline = ael("limits", "raise", "llm", "--usd-per-day", "7.5")
    both = ael("limits", "show", "llm", "--json").json[0]
    reset = ael("limits", "raise", "llm", "--reset", "--json").json

    assert {**raised, "usd_per_day": float(raised["usd_per_day"])} == {**LIMIT, "per_day": 3}
    assert offline.code == 0
    assert (both["per_day"], both["usd_per_day"]) == (3, 7.5)
    assert {**reset, "usd_per_day": float(reset["usd_per_day"])} == LIMIT


def test_refused_change_of_a_limit_makes_no_limit_of_that_name(ael: Ael, path: Path) -> None:
    assert ael("limits", "raise", "typo", "--usd-per-day", "much").code == 2
    assert ael("limits", "raise", "typo", "--per-day", "-1").code == 2

    assert [row["name"] for row in ael("limits", "show", "--json").json] == ["llm"]


def test_changes_are_audited_with_who_made_them(ael: Ael, path: Path) -> None:
    ael("tasks", "submit", "agents:free", "1")
    ael("tasks", "cancel", "2")
    ael("limits", "raise", "llm", "--per-day", "9")

    names = rows(path, "SELECT name FROM commands ORDER BY id")
    assert names[:2] == ["tasks.submit", "tasks.cancel"]
    assert len(names) == 3
    assert names[2].startswith("limits.")
    assert all(getpass.getuser() in actor for actor in rows(path, "SELECT actor FROM commands"))


def test_times_of_json_are_those_of_the_views(ael: Ael, loop: Process) -> None:
    """ISO-8601 UTC text with microseconds, everywhere."""
    ael("tasks", "submit", "agents:free", "1")
    until(lambda: status(ael, 2) == "done", loop)

    shown = ael("tasks", "show", "2", "--json").json
    times = [
        value for key, value in [*shown.items(), *shown["attempts_made"][0].items()] if key.endswith("_at") and value
    ]
    assert len(times) >= 5
    assert all(len(time) == len("2026-01-31T12:00:00.000000Z") for time in times), times

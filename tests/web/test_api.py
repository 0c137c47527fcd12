"""The data as JSON, changes, and their description."""

from __future__ import annotations

import hashlib
import json
import re
import sqlite3
from pathlib import Path
from urllib.parse import quote

import pytest
from starlette.routing import Route

from ael_store.errors import UsageError
from ael_store.web.address import read_address
from ael_store.web.app import routes
from ael_store.web.openapi import describe
from ael_store.web.tree import tree_of
from tests.web.conftest import ROOT, Site, port_in, running, until

STATIC = ROOT / "ael_store/web/static"


def test_description_names_exactly_the_routes_that_there_are() -> None:
    served = {
        (re.sub(r":\w+}", "}", route.path), method.lower())
        for route in routes()
        if isinstance(route, Route) and route.path.startswith(("/api/", "/metrics", "/livez", "/readyz"))
        for method in (route.methods or set()) - {"HEAD"}
    }

    described = {(path, method) for path, methods in describe()["paths"].items() for method in methods}

    assert described == served


def test_description_says_what_is_taken(site: Site) -> None:
    described = site.get("/api/v1/openapi.json").json

    assert described == json.loads(json.dumps(describe()))
    for path, methods in described["paths"].items():
        for method, operation in methods.items():
            in_path = {one["name"] for one in operation.get("parameters", ()) if one["in"] == "path"}
            assert in_path == set(re.findall(r"{(\w+)}", path))
            assert ("security" in operation) == (method == "post")


def test_every_list_answers_and_pages_to_its_end(site: Site) -> None:
    for name, number in (("events", "id"), ("iterations", "iteration"), ("state", "key"), ("state/history", "id")):
        begin = site.get(f"/api/v1/{name}?limit=2&before=6" if name != "state" else "/api/v1/state?limit=2").json
        found = list(begin["items"])
        following = begin["next"]
        while following is not None:
            page = site.get(following).json
            found += page["items"]
            following = page["next"]
        numbers = [row[number] for row in found]
        assert numbers == sorted(set(numbers), reverse=name != "state"), name
        assert len(found) >= 5


def test_status_says_what_the_command_line_says(site: Site) -> None:
    facts = site.get("/api/v1/status").json

    assert facts["status"] == "running" and facts["running"] and facts["answers"]
    assert {"iteration", "pid", "revision", "agents", "problems", "dead_letters", "rate", "recent"} <= set(facts)
    assert any(problem["kind"] == "dead_letters" for problem in facts["problems"])


def test_past_moment_is_what_it_was(site: Site) -> None:
    then = site.get("/api/v1/status?at=3").json
    count = site.get("/api/v1/state?at=3&key=count").json["items"][0]

    assert (then["iteration"], then["status"]) == (3, "past")
    changes = site.get("/api/v1/state/history?key=count&after=0&limit=50").json["items"]
    until_three = [change["new_value"] for change in changes if change["iteration"] <= 3]
    until_nine = [change["new_value"] for change in changes if change["iteration"] <= 9]
    assert count["value"] == until_three[-1] < until_nine[-1]
    ticks = {row["name"]: row["tick_count"] for row in site.get("/api/v1/agents?at=3").json["items"]}
    assert ticks["counter"] == len(until_three)
    assert site.get("/api/v1/state/diff?from=3&to=9&prefix=count").json["items"] == [
        {"key": "count", "old": until_three[-1], "new": until_nine[-1]}
    ]


def test_iteration_says_what_it_did(site: Site) -> None:
    done = site.get("/api/v1/iterations/1").json

    assert {unit["agent"] for unit in done["units"]} >= {"counter"}
    assert {"count", "evil/deep"} <= {change["key"] for change in done["changes"]}
    assert any(event["type"].startswith("hostile") for event in done["events_emitted"])


def test_events_are_found_by_type_source_and_text(site: Site) -> None:
    found = site.get("/api/v1/events?type=be*&source=counter&text=%22N%22:5&limit=1000").json["items"]

    assert [event["data"]["n"] for event in found if event["data"]["n"] == 5] == [5]
    assert {event["type"] for event in found} == {"beat"}
    assert site.get("/api/v1/events?text=nowhere").json["items"] == []


@pytest.mark.parametrize("path", ["state?key=nothing", "agents/nobody", "iterations/999999999", "tasks/9999"])
def test_what_is_not_there_is_404(site: Site, path: str) -> None:
    answer = site.get(f"/api/v1/{path}")

    assert answer.status == 404
    assert answer.json["error"]


def test_paths_of_the_ancestor_answer(site: Site) -> None:
    status = site.get("/api/status").json
    events = site.get("/api/events?limit=3").json["events"]

    assert status["running"] and status["iteration"] > 5
    assert {"tick_rate", "start_time", "agent_manager", "event_bus", "state_context"} <= set(status)
    assert len(events) == 3
    assert set(events[0]) == {"id", "type", "source", "data", "metadata", "timestamp", "iteration"}


def test_agent_is_disabled_in_the_database_and_audited(site: Site) -> None:
    assert site.post("/api/v1/agents/counter/disable").json == {"name": "counter", "changed": True}
    try:
        with sqlite3.connect(f"{site.database.as_uri()}?mode=ro", uri=True) as database:
            assert database.execute("SELECT status FROM v_agents WHERE name = 'counter'").fetchone() == ("disabled",)
            newest = database.execute("SELECT name, arguments FROM commands ORDER BY id DESC LIMIT 1").fetchone()
            assert newest == ("agents.disable", '{"name":"counter"}')
        assert not site.post("/api/v1/agents/counter/disable").json["changed"]
        assert "Enable" in site.page("/agents/counter")
    finally:
        assert site.post("/api/v1/agents/counter/enable").json["changed"]
    assert site.post("/api/v1/agents/nobody/disable").status == 404


def test_agent_is_run_at_once(site: Site) -> None:
    said = site.post("/api/v1/agents/counter/run").json

    assert said["name"] == "counter"
    with sqlite3.connect(f"{site.database.as_uri()}?mode=ro", uri=True) as database:
        ticks = "SELECT count(*) FROM v_ticks WHERE agent = 'counter' AND kind = 'tick' AND iteration = ?"
        assert database.execute(ticks, (said["iteration"],)).fetchone() == (1,)
    assert 'action="/api/v1/agents/counter/run"' in site.page("/agents/counter")
    assert 'aria-label="Run counter now"' in site.page("/agents")
    assert site.post("/api/v1/agents/nobody/run").status == 404
    deaf = next(row["name"] for row in site.get("/api/v1/agents").json["items"] if row["name"] != "counter")
    refused = site.post(f"/api/v1/agents/{quote(deaf)}/run")
    assert (refused.status, "no on_tick" in refused.json["error"]) == (400, True)


def test_loop_is_paused_stepped_and_resumed(site: Site) -> None:
    assert site.post("/api/v1/loop/pause").json == {"changed": True}
    try:
        before = until(lambda: site.get("/api/v1/status").json)["live_iteration"]
        assert site.post("/api/v1/loop/step", {"iterations": 2}).json["until"] >= before + 2
        assert "The loop is paused" in site.page("/") or "Something is wrong" in site.page("/")
    finally:
        assert site.post("/api/v1/loop/resume").json == {"changed": True}
    assert site.post("/api/v1/loop/step").status == 400


def test_dead_letter_is_asked_for_again_and_failed_task_retried(site: Site) -> None:
    letter = site.get("/api/v1/events/dead").json["items"][0]
    task = site.get("/api/v1/tasks?status=failed").json["items"][0]

    asked = site.post(f"/api/v1/events/{letter['event_id']}/redeliver", {"subscriber": letter["subscriber"]})
    retried = site.post(f"/api/v1/tasks/{task['id']}/retry")

    assert asked.json["requested"] == 1
    assert retried.json["what"] == "it runs again"
    until(lambda: site.get(f"/api/v1/tasks/{task['id']}").json["attempts"] == task["attempts"] + 1)
    assert site.post("/api/v1/events/999999/redeliver").status == 404


def test_question_is_answered_by_a_form_without_scripts(site: Site) -> None:
    question = next(row for row in site.get("/api/v1/tasks").json["items"] if row["question"])
    path = f"/api/v1/tasks/{question['id']}/answer"
    form = {
        "Content_Type": "application/x-www-form-urlencoded",
        "Authorization": f"Bearer {site.token}",
    }

    assert site.ask("POST", path, b"choice=maybe", **form).status == 400
    answer = site.ask("POST", path, b"choice=yes&back=/tasks", **form)

    assert (answer.status, answer.headers["location"]) == (303, "/tasks")
    done = site.get(f"/api/v1/tasks/{question['id']}").json
    assert (done["status"], done["result"]) == ("done", "yes")
    assert done["answered_by"].endswith("(dashboard)")


@pytest.mark.parametrize("back", ["//evil.example", "https://evil.example", "/\\\\evil.example", "javascript:x"])
def test_form_leads_nowhere_else(site: Site, back: str) -> None:
    answer = site.ask(
        "POST",
        "/api/v1/agents/counter/enable",
        f"back={back}".encode(),
        Content_Type="application/x-www-form-urlencoded",
        Authorization=f"Bearer {site.token}",
    )

    assert answer.status == 200
    assert "location" not in answer.headers


def test_database_that_nobody_runs_is_shown_and_changed(tmp_path: Path) -> None:
    (tmp_path / "agents.py").write_text(
        "from ael_store import AgentBase\nclass One(AgentBase):\n    name = 'one'\n    priority = 10\n"
        "    def on_tick(self, context): context.increment('n')\n"
    )
    with running(tmp_path, "run", "agents.py", "--iterations", "2", "--tick-rate", "0") as process:
        assert process.wait(60) == 0
    with running(tmp_path, "web", "0") as process:
        site = Site(tmp_path / "ael.db", port_in(tmp_path, process))

        assert "The loop is not running" in site.page("/")
        assert site.get("/api/v1/status").json["status"] == "stopped"
        assert site.post("/api/v1/agents/one/disable").json == {"name": "one", "changed": True}
        assert site.get("/api/v1/agents/one").json["status"] == "disabled"
        assert site.post("/api/v1/loop/step").status == 409

        site.database.rename(tmp_path / "away.db")  # as a restore does for a moment
        assert site.get("/api/v1/status").status == 503
        assert "does not exist" in site.get("/", Accept="text/html").text
        (tmp_path / "away.db").rename(site.database)
        assert site.get("/api/v1/status").status == 200


def test_vendored_files_are_those_of_the_manifest() -> None:
    folder = STATIC / "vendor/uplot"
    manifest = json.loads((folder / "manifest.json").read_text())

    found = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.name != "manifest.json"
    }

    assert found == manifest["sha256"]
    assert f"v{manifest['version']}" in (folder / "uPlot.esm.js").read_text()
    assert "MIT" in (folder / "LICENSE").read_text()


def test_pages_name_nothing_from_elsewhere_and_no_inline_code() -> None:
    ours = [path for path in (ROOT / "ael_store/web").rglob("*") if path.suffix in (".html", ".js", ".css")]

    for path in ours:
        if "vendor" in path.parts:
            continue
        text = path.read_text()
        assert not re.search(r"(?:https?:)?//[a-z]+\.[a-z]", text), path
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", text), (
            path
        )
        if path.suffix == ".html":
            assert not re.search(r"\sstyle=|<style|\son[a-z]+=|\|\s*safe|Markup|<script(?![^>]*src=)", text), path


def test_keys_are_a_tree() -> None:
    tree = tree_of([{"key": key} for key in ("a", "a/b", "a/c/d", "x//y", "/".join("0123456789abc"))])

    assert [name for name, _ in tree.leaves] == ["a"]
    assert [name for name, _ in tree.branches["a"].leaves] == ["b"]
    assert tree.branches["a"].branches["c"].prefix == "a/c/"
    assert tree.branches["x"].branches[""].leaves[0][0] == "y"
    assert (tree.count, tree.branches["a"].count) == (5, 2)


@pytest.mark.parametrize(
    ("text", "address"),
    [("8200", "127.0.0.1:8200"), (":80", "127.0.0.1:80"), ("[::1]:9", "[::1]:9"), ("0.0.0.0:0", "0.0.0.0:0")],
)
def test_address_is_read(text: str, address: str) -> None:
    assert str(read_address(text)) == address


@pytest.mark.parametrize("text", ["agents.py", "host", "1:2:3", "127.0.0.1:70000", "http://x:1", "::1", ""])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        read_address(text)

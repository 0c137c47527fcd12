"""A database that a loop is writing, in the real Datasette with the metadata that the documentation ships."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ael_store.store.upgrade import HEAD, create_database
from tests.cli.conftest import Process, until
from tests.docs.datasette_metadata import COMMAND, FILE, made, recipes, text, views
from tests.loops import rows
from tests.migrations.fill import fill

AGENTS = """
from ael_store import AgentBase

class Thermometer(AgentBase):
    name = "kitchen"
    priority = 10

    def on_start(self, context):
        context.ask("Go on?")

    def on_tick(self, context):
        context.increment("temperature")
        context.metrics.gauge("temperature", context.get("temperature"))
        context.emit("measured", {"degrees": context.get("temperature")})

class Siren(AgentBase):
    name = "siren"
    subscriptions = ["measured"]

    def on_event(self, event, context):
        raise RuntimeError("no power")
"""

Get = Callable[[str], str]


def test_metadata_is_what_the_pages_say() -> None:
    assert FILE.read_text("utf-8") == text(), f"{FILE.name} is behind the pages: {COMMAND}"


def test_metadata_describes_every_view_and_column_and_hides_the_tables(tmp_path: Path) -> None:
    path = tmp_path / "ael.db"
    create_database(path)
    fill(path, HEAD)
    described = made()["databases"]["ael"]["tables"]

    columns = {view: rows(path, f"SELECT name FROM pragma_table_info('{view}')") for view in views()}
    assert {view: list(about["columns"]) for view, about in views().items()} == columns
    names = rows(path, "SELECT name FROM sqlite_schema WHERE type IN ('table', 'view') AND name NOT LIKE 'sqlite_%'")
    assert set(described) == set(names)
    assert {name for name in names if not described[name].get("hidden")} == set(columns)


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a database on which a loop runs in a process of its own."""
    folder = tmp_path_factory.mktemp("live")
    (folder / "agents.py").write_text(AGENTS)
    loop = Process("run", "agents.py", "--tick-rate", "0.05", "--db", "ael.db", "--log-level", "ERROR", cwd=folder)
    try:
        until(lambda: (folder / "ael.db").exists() and iteration(folder) > 3, loop)
        yield folder
    finally:
        loop.process.kill()
        loop.wait()


def iteration(folder: Path) -> int:
    found = rows(folder / "ael.db", "SELECT count(*) FROM sqlite_schema WHERE name = 'v_iterations'")
    return rows(folder / "ael.db", "SELECT coalesce(max(iteration), 0) FROM v_iterations")[0] if found[0] else 0


@pytest.fixture(scope="module")
def get(live: Path) -> Iterator[Get]:
    """Ask the real Datasette, a process of its own on 127.0.0.1."""
    server = subprocess.Popen(
        [sys.executable, "-m", "datasette", "ael.db", "--metadata", FILE, "--host", "127.0.0.1", "--port", "0"],
        cwd=live,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stderr is not None
        lines = iter(server.stderr.readline, "")
        address = next((hit[0] for line in lines if (hit := re.search(r"http://127\.0\.0\.1:\d+", line))), None)
        assert address is not None, "Datasette ended before it listened"

        def ask(path: str) -> str:
            with urllib.request.urlopen(f"{address}{path}", timeout=30) as answer:
                return str(answer.read().decode())

        yield ask
    finally:
        server.kill()
        server.communicate()


@pytest.mark.parametrize("name", recipes())
def test_canned_query_runs_while_the_loop_goes_on(name: str, live: Path, get: Get) -> None:
    before = iteration(live)

    answer = json.loads(get(f"/ael/{name}.json?key=temperature"))

    assert answer.get("error") is None
    assert not answer["truncated"]
    assert name == "cost-per-day" or answer["rows"]
    until(lambda: iteration(live) > before)


@pytest.mark.parametrize("view", views())
def test_page_of_a_view_shows_what_it_means(view: str, get: Get) -> None:
    page = get(f"/ael/{view}")

    assert f"{view}: " in page
    assert "Error" not in re.sub(r"<td.*?</td>", "", page, flags=re.DOTALL)


def test_durations_have_their_unit(get: Get) -> None:
    assert re.search(r"[\d.]+(&nbsp;| )(µs|ms|s)\b", get("/ael/v_ticks"))


def test_datasette_can_only_read(live: Path, get: Get) -> None:
    sql = urllib.parse.quote("DELETE FROM state")

    with pytest.raises(urllib.error.HTTPError) as refused:
        get(f"/ael.json?sql={sql}")

    answer: dict[str, Any] = json.loads(refused.value.read())
    assert "must be a SELECT" in answer["error"]
    assert rows(live / "ael.db", "SELECT count(*) FROM v_state")[0] > 0

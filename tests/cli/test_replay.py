"""`ael replay`: what it prints, and how it ends."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.cli.conftest import Ael

OTHER = """
from pathlib import Path
from ael_store import AgentBase

class Counter(AgentBase):
    name = "counter"

    def on_tick(self, context):
        print("counting")
        context.increment("count")
        if context.iteration == 3:
            context.set("three", [3])
            context.emit("third", {"n": 3})

class Writer(AgentBase):
    name = "writer"

    def on_tick(self, context):
        context.increment("count")
        Path("written").write_text("x")
"""

PRECISE = """
from dataclasses import dataclass
from ael_store import AgentBase

class Step(AgentBase):
    @dataclass
    class Config:
        by: int = 1

    priority = 10

    async def on_tick(self, context):
        context.increment("sum", self.config.by)
"""


@pytest.fixture
def recorded(run_here: Ael, counter: str, tmp_path: Path) -> Path:
    """Five iterations of the counter, in `ael.db` of the working folder; other code is in `other.py`."""
    assert run_here(counter, "--iterations", "5", "--tick-rate", "0").code == 0
    (tmp_path / "other.py").write_text(OTHER)
    return tmp_path


def test_same_code_ends_with_0(recorded: Path, ael: Ael) -> None:
    done = ael("replay", "agents.py", "--agent", "counter")

    assert (done.code, done.out, done.err) == (0, "", "5 units replayed: 5 the same, 0 different\n")


def test_other_code_ends_with_1_and_tells_what_differs(recorded: Path, ael: Ael) -> None:
    done = ael("replay", "other.py", "--agent", "counter")

    header, *lines = [line.split("\t") for line in done.out.splitlines()]
    assert done.code == 1
    assert header == ["unit", "iteration", "kind", "what", "name", "recorded", "now"]
    assert [line[1:] for line in lines] == [
        ["3", "tick", "write", "three", "nothing", "[3]"],
        [
            "3",
            "tick",
            "event",
            "third",
            "nothing",
            '{"type":"third","data":{"n":3},"metadata":{},"source":"counter","to":null}',
        ],
    ]
    assert done.err.splitlines() == ["counting"] * 5 + ["5 units replayed: 4 the same, 1 different"]


def test_json_is_a_report(recorded: Path, ael: Ael) -> None:
    same = ael("replay", "agents.py", "--agent", "counter", "--json")
    other = ael("replay", "other.py", "--agent", "counter", "--iteration", "3", "--json")

    assert (same.code, other.code) == (0, 1)
    assert same.json == {"units": 5, "same": 5, "different": 0, "skipped": {}, "differences": [], "notes": []}
    (write, event) = other.json["differences"]
    unit = write["unit"]
    assert write == {
        "unit": unit,
        "iteration": 3,
        "kind": "tick",
        "what": "write",
        "name": "three",
        "recorded": None,
        "replayed": {"value": [3]},
    }
    assert event["what"] == "event" and event["replayed"]["data"] == {"n": 3}


def test_units_are_chosen(recorded: Path, ael: Ael) -> None:
    def summary(*options: str) -> str:
        done = ael("replay", "agents.py", "--agent", "counter", *options)
        assert done.code == 0, done
        return done.err.partition(" replayed")[0]

    assert summary("--iteration", "2") == "1 unit"
    assert summary("--iterations", "2..4") == "3 units"
    assert summary("--last", "2", "--kind", "tick", "--kind", "start") == "2 units"


def test_effects_are_refused_unless_they_are_allowed(recorded: Path, ael: Ael, tmp_path: Path) -> None:
    (tmp_path / "other.py").write_text(OTHER.replace('name = "counter"', 'name = "x"').replace('"writer"', '"counter"'))

    refused = ael("replay", "other.py", "--agent", "counter", "--last", "1")
    assert not (tmp_path / "written").exists()
    allowed = ael("replay", "other.py", "--agent", "counter", "--last", "1", "--allow-effects")

    assert refused.code == 1
    assert refused.out.splitlines()[1].split("\t")[2:] == ["tick", "effect", "open", "nothing", "refused"]
    assert allowed.code == 0
    assert (tmp_path / "written").exists()


def test_agents_of_tables_are_replayed_with_their_config(run_here: Ael, ael: Ael, tmp_path: Path) -> None:
    table = '[agents.step]\nclass = "Step"\nconfig = {{ by = {} }}\n'
    (tmp_path / "precise.py").write_text(PRECISE)
    (tmp_path / "ael.toml").write_text(table.format(3))
    assert run_here("precise.py", "--iterations", "3", "--tick-rate", "0").code == 0

    same = ael("replay", "precise.py")
    (tmp_path / "ael.toml").write_text(table.format(4))
    other = ael("replay", "precise.py")

    assert same.code == 0
    assert other.code == 1 and len(other.out.splitlines()) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--iteration", "1", "--last", "2"], "--iteration and --last each say"),
        (["--iterations", "1-2"], "wanted are two numbers, like 400..412"),
        (["--iterations", "1..x"], "the last of --iterations is 'x'"),
        (["--unit", "-"], "--unit is '-'"),
        (["--last", "0"], "last is 0"),
        (["--kind", "outside"], "kind 'outside' can't be replayed; choose of tick"),
        (["--iteration", "77"], "no recorded unit in iteration 77"),
        (["--agent", "nobody"], "no agent is named 'nobody'; there are: 'counter', 'bell'"),
    ],
)
def test_wrong_usage_ends_with_2(recorded: Path, ael: Ael, options: list[str], message: str) -> None:
    agent = [] if "--agent" in options else ["--agent", "counter"]

    done = ael("replay", "agents.py", *agent, *options)

    assert done.code == 2
    assert message in done.err and done.err.count("\n") == 1


def test_what_is_not_there_is_told(recorded: Path, ael: Ael) -> None:
    assert ael("replay", "none.py").code == 2
    assert ael("replay", "agents.py", "--agent", "counter", "--db", "none.db").code == 74
    assert not Path("none.db").exists()
    bell = ael("replay", "agents.py", "--agent", "bell")
    assert (bell.code, "no recorded unit" in bell.err) == (2, True)


def test_nothing_is_written_anywhere(recorded: Path, ael: Ael, tmp_path: Path) -> None:
    def files() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file() and path.stat().st_size}

    before = {name: text for name, text in files().items() if not name.endswith("-shm")}
    sys.modules.pop("other", None)

    ael("replay", "other.py", "--agent", "counter")

    assert {name: text for name, text in files().items() if not name.endswith("-shm")} == before
    assert not (tmp_path / "__pycache__").exists()

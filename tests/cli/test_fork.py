"""`ael fork`: what it prints, refuses and ends with."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from ael_store.store.verify import verify
from tests.cli.conftest import Ael
from tests.loops import rows


def test_fork_says_what_it_made(ael: Ael, database: Path, tmp_path: Path) -> None:
    done = ael("fork", "--at", "2", "out.db", "--set", "temperature=7", "--set", 'note="a=b"', "--json")

    out = tmp_path / "out.db"
    assert done.code == 0
    removed = done.json["removed"]
    assert {**done.json, "removed": None, "moment": None} == {
        "path": str(out),
        "from": str(database),
        "iteration": 2,
        "moment": None,
        "set": ["temperature", "note"],
        "removed": None,
        "tasks_held": 0,
        "changed": True,
    }
    assert (removed["iterations"], removed["state_changes"]) == (1, 2)
    assert [done.json["moment"]] == rows(database, "SELECT started_at FROM v_iterations WHERE iteration = 2")
    assert verify(out).problems == []
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    assert ael("state", "get", "temperature", "--db", "out.db").out == "7\n"
    assert ael("state", "get", "note", "--db", "out.db").out == "a=b\n"
    assert ael("state", "get", "agent/counter/mine", "--db", "out.db", "--json").json == [2]
    [(actor, name, error)] = rows(out, "SELECT actor, name, error FROM commands")
    assert (name, error) == ("fork.set", None)
    assert f"pid {os.getpid()}" in actor


def test_fork_for_people_is_short(ael: Ael, database: Path, tmp_path: Path) -> None:
    told = ael("fork", "--at", "2", "out.db", "--dry-run").out
    done = ael("fork", "--at", "2", "out.db", "--set", "a=1").out

    assert told.startswith(f"would fork {database} at iteration 2 (")
    assert done.splitlines()[0] == told.rstrip().replace("would fork", "forked")
    assert done.splitlines()[0].endswith(f"into {tmp_path / 'out.db'}; without 1 iterations, 2 state changes, 3 events")
    assert done.splitlines()[1:] == ["set a"]


def test_status_of_a_fork_names_its_parent(ael: Ael, database: Path) -> None:
    assert ael("status", "--json").json["forked"] is None
    ael("fork", "--at", "2", "out.db")

    forked = ael("status", "--db", "out.db", "--json").json["forked"]

    assert (forked["from"], forked["iteration"]) == (str(database), 2)
    assert [f'"{forked["instance"]}"'] == rows(database, "SELECT value FROM meta WHERE name = 'instance'")
    assert f"forked     from {database} at iteration 2" in ael("status", "--db", "out.db").out.splitlines()


def test_time_travel_works_in_a_fork(ael: Ael, database: Path) -> None:
    ael("fork", "--at", "2", "out.db", "--set", "temperature=7")

    assert ael("state", "get", "temperature", "--db", "out.db", "--at", "1").out == "21\n"
    refused = ael("state", "get", "temperature", "--db", "out.db", "--at", "3")
    assert (refused.code, "the last one is 2" in refused.err) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--set", "temperature"], 2, "--set is 'temperature', wanted is KEY=JSON"),
        (["--set", "a=hot"], 2, "value of 'a': 'hot' is not JSON"),
        (["--set", "a=1", "--set", "a=2"], 2, "--set gives 'a' two values"),
        (["--set", "ael_status=1"], 2, "is kept by the loop"),
        (["--set", "a=1e999"], 2, "state key 'a'"),
        (["--at", "4"], 2, "there is no iteration 4 yet; the last one is 3"),
        (["--at", "yesterday"], 2, "'yesterday' is no moment"),
    ],
)
def test_wrong_usage_is_refused_before_anything_is_written(
    ael: Ael, database: Path, tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    done = ael("fork", "out.db", *arguments)

    assert (done.code, message in done.err) == (code, True), done.err
    assert not (tmp_path / "out.db").exists()


def test_file_that_exists_is_refused_without_force(ael: Ael, database: Path, tmp_path: Path) -> None:
    assert ael("fork", "--at", "1", "out.db").code == 0

    refused, forced = ael("fork", "out.db"), ael("fork", "out.db", "--force")

    assert (refused.code, "out.db exists" in refused.err) == (2, True)
    assert forced.code == 0
    assert rows(tmp_path / "out.db", "SELECT max(id) FROM iterations") == [3]


def test_database_that_is_not_there_is_not_made(ael: Ael, tmp_path: Path) -> None:
    done = ael("fork", "out.db")

    assert (done.code, "does not exist" in done.err) == (74, True)
    assert list(tmp_path.iterdir()) == []

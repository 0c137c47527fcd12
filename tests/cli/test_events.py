"""`ael events` with no loop running, and following the log."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tests.cli.conftest import Ael, Start
from tests.loops import rows


def test_list_shows_the_newest_oldest_first(ael: Ael, database: Path) -> None:
    found = ael("events", "list", "--type", "measured", "--limit", "2", "--json").json

    assert [(event["type"], event["source"], event["data"]) for event in found] == [
        ("measured", "counter", {"celsius": 22}),
        ("measured", "counter", {"celsius": 23}),
    ]
    assert set(found[0]) == {"id", "type", "source", "data", "metadata", "iteration", "emitted_at"}
    assert found[0]["metadata"] == {}


def test_list_piped_is_tab_separated_and_complete(ael: Ael, database: Path) -> None:
    ael("events", "emit", "long", json.dumps("x" * 500 + "\t"))

    header, line = ael("events", "list", "--limit", "1").out.splitlines()

    assert header == "id\temitted_at\titeration\ttype\tsource\tdata"
    assert line.split("\t")[5] == json.dumps("x" * 500 + "\t")


@pytest.mark.parametrize(
    ("options", "types"),
    [
        (["--type", "ael_*"], {"ael_started", "ael_shutdown"}),
        (["--type", "*ured"], {"measured"}),
        (["--type", "mea?ured"], set()),
        (["--source", "counter"], {"measured"}),
        (["--source", "counter", "--type", "ael_*"], set()),
    ],
)
def test_filters(ael: Ael, database: Path, options: list[str], types: set[str]) -> None:
    assert {event["type"] for event in ael("events", "list", *options, "--json").json} == types


def test_since_id_gives_the_first_that_follow(ael: Ael, database: Path) -> None:
    all_ids = [event["id"] for event in ael("events", "list", "--json").json]

    found = ael("events", "list", "--since-id", str(all_ids[1]), "--limit", "2", "--json").json

    assert [event["id"] for event in found] == all_ids[2:4]


def test_emit_returns_the_number_of_the_event(ael: Ael, database: Path) -> None:
    done = ael("events", "emit", "door", '{"open": true}', "--source", "me", "--metadata", '{"a": 1}', "--json")

    number = done.json["id"]
    assert done.json == {"id": number, "type": "door", "source": "me"}
    assert rows(database, "SELECT type, source, data, metadata FROM v_events WHERE id = ?", number) == [
        ("door", "me", '{"open":true}', '{"a":1}')
    ]
    assert ael("events", "emit", "door").out == f"emitted door as event {number + 1} (committed)\n"


@pytest.mark.parametrize(
    "arguments",
    [["door", "open"], ["door", "1", "--metadata", "[1]"], [""], ["door", json.dumps("x" * 300_000)]],
    ids=["no JSON", "metadata is a list", "empty type", "too large"],
)
def test_impossible_event_is_refused(ael: Ael, database: Path, arguments: list[str]) -> None:
    before = rows(database, "SELECT count(*) FROM events")

    assert ael("events", "emit", *arguments).code == 2
    assert rows(database, "SELECT count(*) FROM events") == before


def test_tail_shows_the_last_then_each_new_one_until_ctrl_c(ael: Ael, database: Path, start: Start) -> None:
    tail = start("events", "tail", "--json", "--type", "d*")
    other = start("events", "tail", "--limit", "1")
    other.wait_for("ael_shutdown")
    numbers = [ael("events", "emit", kind, "[1]", "--json").json["id"] for kind in ("door", "other", "dark")]

    other.wait_for(" dark ")
    tail.wait_for('"dark"')

    assert [json.loads(line)["id"] for line in tail.lines] == [numbers[0], numbers[2]]
    assert tail.stop(signal.SIGINT) == 0
    assert other.stop(signal.SIGINT) == 0
    assert [line.split()[3] for line in other.lines] == ["ael_shutdown", "door", "other", "dark"]


def test_tail_goes_on_after_an_event(ael: Ael, database: Path, start: Start) -> None:
    first = ael("events", "list", "--json").json[0]["id"]

    tail = start("events", "tail", "--since-id", str(first), "--type", "measured", "--json")
    tail.wait_for('"celsius":23')

    assert len(tail.lines) == 3
    tail.stop(signal.SIGINT)


def test_tail_ends_where_the_database_is_replaced(database: Path, start: Start) -> None:
    tail = start("events", "tail")
    tail.wait_for("ael_shutdown")

    database.rename(database.with_name("moved.db"))

    tail.wait_for("was replaced or removed meanwhile: start again")
    assert tail.wait() == 74

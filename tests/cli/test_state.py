"""`ael state` with no loop running: shapes, messages, and what is refused."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import Ael
from tests.loops import rows


def test_list_shows_keys_with_values(ael: Ael, database: Path) -> None:
    lines = ael("state", "list").out.splitlines()

    assert lines[0] == "key\tvalue\tagent\titeration\tupdated_at"
    assert [line.split("\t")[:4] for line in lines[1:]] == [
        ["agent/counter/mine", "[3]", "counter", "3"],
        ["temperature", "23", "counter", "3"],
    ]


def test_list_with_json_is_one_object(ael: Ael, database: Path) -> None:
    assert ael("state", "list", "--json").json == {"agent/counter/mine": [3], "temperature": 23}
    assert ael("state", "list", "agent/", "--json").json == {"agent/counter/mine": [3]}
    assert ael("state", "list", "none", "--json").json == {}


def test_prefix_is_text_and_no_pattern(ael: Ael, database: Path) -> None:
    ael("state", "set", "a*b", "1")

    assert ael("state", "list", "a*", "--json").json == {"a*b": 1}
    assert "no key begins with 'x'" in ael("state", "list", "x").err


@pytest.mark.parametrize(
    ("value", "plain", "as_json"),
    [
        ('"night"', "night\n", '"night"\n'),
        ("21.5", "21.5\n", "21.5\n"),
        ("null", "null\n", "null\n"),
        ('{"a": [1, 2]}', '{\n  "a": [\n    1,\n    2\n  ]\n}\n', '{"a":[1,2]}\n'),
        ('"two\\nlines"', "two\nlines\n", '"two\\nlines"\n'),
    ],
)
def test_get_prints_a_text_as_it_is_and_with_json_the_value(
    ael: Ael, database: Path, value: str, plain: str, as_json: str
) -> None:
    ael("state", "set", "mode", value)

    assert ael("state", "get", "mode").out == plain
    assert ael("state", "get", "mode", "--json").out == as_json


def test_missing_key_is_named_with_those_that_are_near(ael: Ael, database: Path) -> None:
    done = ael("state", "get", "temprature")

    assert (done.code, done.out) == (1, "")
    assert "there is no key 'temprature' in the state of" in done.err
    assert "; did you mean temperature?" in done.err


@pytest.mark.parametrize("command", [("get",), ("delete",), ("history",)])
def test_every_command_of_a_missing_key_fails(ael: Ael, database: Path, command: tuple[str]) -> None:
    done = ael("state", *command, "nothing-like-it", "--json")

    assert (done.code, done.out) == (1, "")
    assert "there is no key 'nothing-like-it'" in done.err


def test_key_that_only_a_loop_answers_points_to_status(ael: Ael, database: Path) -> None:
    done = ael("state", "get", "ael_status")

    assert done.code == 1
    assert "see `ael status`" in done.err


def test_set_says_what_is_committed(ael: Ael, database: Path) -> None:
    assert ael("state", "set", "temperature", "21.5").out == "set temperature = 21.5 (committed)\n"
    assert ael("state", "set", "temperature", "21.5").out == "temperature is 21.5 already\n"
    assert rows(database, "SELECT value, agent FROM v_state WHERE key = 'temperature'") == [("21.5", "(outside)")]


def test_set_with_json_says_it_in_json(ael: Ael, database: Path) -> None:
    assert ael("state", "set", "mode", '"night"', "--json").json == {"key": "mode", "value": "night", "changed": True}
    assert ael("state", "set", "mode", '"night"', "--json").json["changed"] is False


@pytest.mark.parametrize("number", ["-5", "-1.5e3"])
def test_negative_number_is_a_value_and_no_option(ael: Ael, database: Path, number: str) -> None:
    assert ael("state", "set", "offset", number, "--json").json["value"] == float(number)


def test_value_is_read_from_stdin(ael: Ael, database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps("x" * 100_000)))

    assert ael("state", "set", "long", "-").code == 0
    assert ael("state", "get", "long", "--json").json == "x" * 100_000


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("night", """'night' is not JSON (Expecting value: line 1 column 1 (char 0)); a text needs its own quotes"""),
        ("it's", """'"it'"'"'s"'"""),
        ("{'a': 1}", "is not JSON"),
        ("NaN", "JSON has no NaN"),
        ("1e999", "inf is not a finite number"),
        ("99999999999999999999", "does not fit in 64 bits"),
        ('"\\u0000"', "NUL"),
        ('"\\ud800"', "lone surrogate"),
        ("[" * 200 + "]" * 200, "nested deeper"),
        ("[" * 100_000, "nested too deep"),
        ("", "is not JSON"),
    ],
    ids=lambda value: value[:12],
)
def test_value_that_is_not_json_is_refused_and_changes_nothing(
    ael: Ael, database: Path, value: str, message: str
) -> None:
    before = rows(database, "SELECT * FROM v_state")

    done = ael("state", "set", "mode", value)

    assert (done.code, done.out) == (2, "")
    assert message in done.err
    assert rows(database, "SELECT * FROM v_state") == before


@pytest.mark.parametrize("key", ["", "a\x1bb", "k" * 513, "ael_status", "\udcff"])
def test_impossible_key_is_refused(ael: Ael, database: Path, key: str) -> None:
    assert ael("state", "set", key, "1").code == 2


def test_limits_of_the_settings_hold(ael: Ael, database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AEL_VALUE_BYTES", "10")

    done = ael("state", "set", "long", '"0123456789"')

    assert done.code == 2
    assert "the limit is 10" in done.err


def test_delete_removes_the_key(ael: Ael, database: Path) -> None:
    assert ael("state", "delete", "temperature").out == "deleted temperature (committed)\n"
    assert rows(database, "SELECT key FROM v_state") == ["agent/counter/mine"]
    assert ael("state", "delete", "agent/counter/mine", "--json").json == {
        "key": "agent/counter/mine",
        "changed": True,
    }


def test_history_is_newest_first_with_values(ael: Ael, database: Path) -> None:
    ael("state", "delete", "temperature")

    found = ael("state", "history", "temperature", "--json", "--limit", "2").json

    assert [(row["operation"], row["old_value"], row["new_value"], row["agent"]) for row in found] == [
        ("delete", 23, None, "(outside)"),
        ("set", 22, 23, "counter"),
    ]
    assert set(found[0]) == {
        "id",
        "key",
        "operation",
        "old_value",
        "new_value",
        "agent",
        "iteration",
        "changed_at",
    }
    table = ael("state", "history", "temperature").out.splitlines()
    assert table[0].split("\t")[3:] == ["agent", "operation", "old_value", "new_value"]
    assert len(table) == 5


def test_change_is_audited(ael: Ael, database: Path) -> None:
    ael("state", "set", "mode", "1")

    [(name, arguments)] = rows(database, "SELECT name, arguments FROM commands")
    assert name == "state.set"
    assert json.loads(arguments) == {"key": "mode", "value": 1}

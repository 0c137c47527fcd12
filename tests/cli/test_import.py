"""`ael state import`: a file is checked whole, then all of it takes effect as one unit, or nothing does."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ael_store.cli.call import Call
from ael_store.cli.export import FORMATS, export_state, text_of
from ael_store.cli.import_state import READ, _Found, import_state
from ael_store.model.values import DEFAULT_LIMITS, encode
from ael_store.runtime.control import longest_line
from ael_store.store.upgrade import create_database
from tests.cli.conftest import Ael, Start, until
from tests.loops import rows

BEFORE = {"a": 1, "b": [1, {"c": "ü"}], "c": None}


@pytest.fixture
def state(ael: Ael, tmp_path: Path) -> dict[str, Any]:
    """A database with three keys."""
    create_database(tmp_path / "ael.db")
    put("before.json", json.dumps(BEFORE))
    assert ael("state", "import", "before.json").code == 0
    return BEFORE


def put(name: str, text: str) -> str:
    Path(name).write_text(text, "utf-8")
    return name


def state_of(ael: Ael) -> dict[str, Any]:
    found: dict[str, Any] = ael("state", "list", "--json").json
    return found


# -- what it does -----------------------------------------------------------------------------------


def test_merge_keeps_what_is_not_in_the_file(ael: Ael, state: dict[str, Any]) -> None:
    put("s.json", '{"a": 2, "c": null, "d": "new"}')

    done = ael("state", "import", "s.json", "--merge")

    assert done.out == "1 added, 1 changed, 1 unchanged, 0 removed (committed)\n"
    assert state_of(ael) == {**state, "a": 2, "d": "new"}


def test_replace_removes_what_is_not_in_the_file(ael: Ael, state: dict[str, Any]) -> None:
    put("s.json", '{"a": 2, "d": "new"}')

    done = ael("state", "import", "s.json", "--replace", "--json")

    assert done.json == {"added": 1, "changed": 1, "unchanged": 0, "removed": 2, "absent": 2, "dry_run": False}
    assert state_of(ael) == {"a": 2, "d": "new"}


def test_it_is_one_unit_and_the_audit_has_no_values(ael: Ael, state: dict[str, Any], tmp_path: Path) -> None:
    put("s.json", '{"a": 2, "d": "secret"}')

    assert ael("state", "import", "s.json", "--replace").code == 0

    last = rows(tmp_path / "ael.db", "SELECT max(tick_id) FROM state_changes")[0]
    changed = rows(tmp_path / "ael.db", f"SELECT count(*) FROM state_changes WHERE tick_id = {last}")
    assert changed == [4]
    audit = rows(tmp_path / "ael.db", "SELECT arguments FROM commands WHERE name = 'state.import' ORDER BY id DESC")
    assert json.loads(audit[0]) == {"values": "(2 keys)", "replace": True}
    assert ael("db", "verify").code == 0


def test_one_of_both_must_be_said_where_it_matters(ael: Ael, state: dict[str, Any]) -> None:
    put("s.json", '{"d": 1}')

    done = ael("state", "import", "s.json")

    assert done.code == 2
    assert "is not empty: --merge keeps keys that are not in the file, --replace removes them" in done.err
    assert ael("state", "import", "s.json", "--merge", "--replace").code == 2
    assert state_of(ael) == state


def test_dry_run_counts_and_changes_nothing(ael: Ael, state: dict[str, Any]) -> None:
    put("s.json", '{"a": 2, "c": null, "d": "new"}')

    done = ael("state", "import", "s.json", "--dry-run")
    replaced = ael("state", "import", "s.json", "--dry-run", "--replace", "--json")

    assert done.out.splitlines() == [
        "would be 1 added, 1 changed, 1 unchanged, 0 removed",
        "keys that are not in the file: 1; --merge keeps them, --replace removes them",
    ]
    assert replaced.json == {"added": 1, "changed": 1, "unchanged": 1, "removed": 1, "absent": 1, "dry_run": True}
    assert state_of(ael) == state


def test_import_of_the_same_changes_nothing(ael: Ael, state: dict[str, Any], tmp_path: Path) -> None:
    before = rows(tmp_path / "ael.db", "SELECT count(*) FROM state_changes")
    assert ael("state", "export", "--output", "s.csv").code == 0

    assert (
        ael("state", "import", "s.csv", "--replace").out == "0 added, 0 changed, 3 unchanged, 0 removed (committed)\n"
    )

    assert rows(tmp_path / "ael.db", "SELECT count(*) FROM state_changes") == before


def test_empty_file_replaces_only_where_that_is_meant(ael: Ael, state: dict[str, Any]) -> None:
    put("s.jsonl", "")

    done = ael("state", "import", "s.jsonl", "--replace")

    assert done.code == 2
    assert "holds no key, so --replace would remove all 3: say --yes if that is meant" in done.err
    assert state_of(ael) == state
    assert ael("state", "import", "s.jsonl", "--replace", "--yes").code == 0
    assert state_of(ael) == {}


def test_removal_is_asked_about_where_a_person_can_answer(
    ael: Ael, state: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def refuse(question: str, yes: bool) -> None:
        asked.append(question)
        raise KeyboardInterrupt

    monkeypatch.setattr("ael_store.cli.import_state.confirm", refuse)
    put("s.json", '{"a": 2}')

    assert ael("state", "import", "s.json", "--replace").code == 130
    assert asked == ["Remove 2 keys that are not in s.json?"]
    assert state_of(ael) == state
    assert ael("state", "import", "s.json", "--merge").code == 0


# -- formats ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        '{"key": "x", "value": [1]}\n\n{"key": "y", "value": "é"}\n',
        '{"value": [1], "key": "x"}\r\n{"key": "y", "value": "é"}\r\n',
        'key,value\nx,[1]\ny,"""é"""\n',
        '\ufeffvalue,key\r\n[1],x\r\n"""é""",y\r\n',
        '{"x": [1], "y": "é"}',
        '\n{\n  "x": [1],\n  "y": "é"\n}\n',
    ],
)
def test_format_is_seen(ael: Ael, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    create_database(tmp_path / "ael.db")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))

    assert ael("state", "import", "-").code == 0
    assert state_of(ael) == {"x": [1], "y": "é"}


def test_name_or_option_says_the_format(ael: Ael, tmp_path: Path) -> None:
    create_database(tmp_path / "ael.db")
    text = '{"key": "x", "value": 1}'

    assert ael("state", "import", put("s.json", text)).code == 0
    assert state_of(ael) == {"key": "x", "value": 1}
    assert ael("state", "import", put("s.txt", text), "--replace").code == 0
    assert state_of(ael) == {"x": 1}
    assert ael("state", "import", "s.txt", "--replace", "--format", "json").code == 0
    assert state_of(ael) == {"key": "x", "value": 1}
    assert ael("state", "import", "s.txt", "--merge", "--format", "xml").code == 2


# -- what is wrong ----------------------------------------------------------------------------------

BAD = {
    "not json": (2, "this is not JSON"),
    '{"key": "x"}': (2, 'wanted is an object {"key": …, "value": …}'),
    '{"key": "x", "value": 1, "agent": "a"}': (2, "wanted is an object"),
    '{"key": 1, "value": 1}': (2, "is int, not str"),
    '{"key": "", "value": 1}': (2, "can't be empty"),
    '{"key": "x", "value": NaN}': (2, "JSON has no NaN"),
    '{"key": "x", "value": 1e400}': (2, "is not a finite number"),
    '{"key": "x", "value": 18446744073709551616}': (2, "does not fit in 64 bits"),
    '{"key": "x", "value": "\\ud800"}': (2, "lone surrogate"),
    '{"key": "ok", "value": 2}': (2, "state key 'ok' stands at line 1 already"),
    '{"key": "ael_status", "value": 2}': (2, "is kept by the loop and can't be written"),
    '{"key": "x", "value": {"a": 1, "a": 2}}': (2, "an object has the key 'a' twice"),
    f'{{"key": "x", "value": {"[" * 101 + "]" * 101}}}': (2, "nested deeper than the limit"),
}


@pytest.mark.parametrize("line", BAD, ids=[line[:50] for line in BAD])
def test_one_bad_line_changes_nothing(ael: Ael, state: dict[str, Any], line: str) -> None:
    put("s.jsonl", f'{{"key": "ok", "value": 1}}\n{line}\n{{"key": "fine", "value": 1}}\n')

    done = ael("state", "import", "s.jsonl", "--merge")

    number, message = BAD[line]
    assert done.code == 2
    assert f"line {number}: " in done.err
    assert message in done.err
    assert "nothing was changed" in done.err
    assert state_of(ael) == state


def test_every_bad_line_is_named(ael: Ael, state: dict[str, Any]) -> None:
    put("s.csv", 'key,value\nx,1\ny,night\n"z\n",1\nw,1,2\nv,"[1,\n2]"\nu,"[1,\nx]"\n')

    done = ael("state", "import", "s.csv", "--merge")

    assert done.code == 2
    assert [line.strip()[:8] for line in done.err.splitlines()[1:]] == ["line 3: ", "line 4: ", "line 6: ", "line 9: "]
    assert 'a text needs quotes of its own: "night"' in done.err
    assert state_of(ael) == state


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("s.json", b"[1]", "wanted is an object of keys and values"),
        ("s.json", b'{"x": 1, "x": 2}', "an object has the key 'x' twice"),
        ("s.json", b"", "this is not JSON"),
        ("s.csv", b"", "the columns are none; wanted are key, value"),
        ("s.csv", b"key,value,agent\n", "the columns are key, value, agent; wanted are key, value"),
        ("s.csv", b'key,value\nx,"1\n', "this is not CSV"),
        ("s.jsonl", b'{"key": "x", "value": 1}\n\xff\n', "s.jsonl, line 2: this is no UTF-8 text"),
    ],
)
def test_what_is_no_such_file_is_refused(ael: Ael, state: dict[str, Any], name: str, raw: bytes, message: str) -> None:
    Path(name).write_bytes(raw)

    done = ael("state", "import", name, "--merge")

    assert done.code == 2
    assert message in done.err
    assert state_of(ael) == state


def test_missing_file_is_said(ael: Ael, state: dict[str, Any]) -> None:
    assert "no.csv can't be read (No such file or directory)" in ael("state", "import", "no.csv").err


# -- beside a loop ----------------------------------------------------------------------------------


def test_running_loop_takes_it_as_one_unit(ael: Ael, start: Start, counter: str, tmp_path: Path) -> None:
    loop = start("run", counter, "--tick-rate", "0.01", "--quiet")
    until(lambda: (tmp_path / "ael.db").exists() and ael("status", "--json").json["takes_commands"], loop)
    put("s.json", json.dumps({f"k{number}": number for number in range(2000)}))

    done = ael("state", "import", "s.json", "--merge", "--json")

    assert done.json["added"] == 2000
    ticks = rows(
        tmp_path / "ael.db",
        "SELECT DISTINCT t.id FROM v_state_history h JOIN state_changes c ON c.id = h.id"
        " JOIN ticks t ON t.id = c.tick_id WHERE h.key GLOB 'k*'",
    )
    assert len(ticks) == 1

    put("big.json", json.dumps({f"b{number}": "x" * 1_000_000 for number in range(8)}))
    refused = ael("state", "import", "big.json", "--merge")

    assert refused.code == 2
    assert f"a running loop takes {longest_line(DEFAULT_LIMITS) / 1e6:.1f} MB at once: stop the loop" in refused.err
    assert loop.stop() == 0
    assert ael("state", "import", "big.json", "--merge", "--json").json["added"] == 8


# -- there and back ---------------------------------------------------------------------------------

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT
    | st.sampled_from(["\r\n", '"', ",", "=1+1", "\u2028\x85", "true", "null", " ", "\ufeff"])
)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3))
KEYS = st.text(max_size=10).filter(lambda text: text != "" and text.isprintable()) | st.sampled_from(
    ["key", "value", '"', "a,b", "'", "agent/x/y", "ä", "\U0001f600", "=1"]
)


STATES = st.dictionaries(KEYS, VALUES, max_size=4)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(state=STATES, other=STATES, form=st.sampled_from(FORMATS))
def test_export_then_import_gives_the_same_state(
    tmp_path: Path, two: tuple[Call, Call], state: dict[str, Any], other: dict[str, Any], form: str
) -> None:
    one, another = two
    for call, values in ((one, state), (another, other)):
        call.change("state.import", values=values, replace=True)

    export_state(one, output=Path(f"s.{form}"), force=True)
    import_state(another, Path(f"s.{form}"), replace=True, yes=True)

    texts = {key: encode(value, "") for key, value in state.items()}
    assert state_texts(one.path) == state_texts(another.path) == texts


@settings(max_examples=200, deadline=None)
@given(state=STATES, form=st.sampled_from(FORMATS))
def test_text_of_an_export_is_read_as_it_was(state: dict[str, Any], form: str) -> None:
    texts = {key: encode(value, "") for key, value in state.items()}
    rows = [{"key": key, "value": text} for key, text in texts.items()]
    found = _Found(DEFAULT_LIMITS)

    READ[form]("".join(text_of(form, iter(rows), ("key", "value"), ("value",), as_object=form == "json")), found)

    assert (found.texts, found.complaints) == (texts, [])


@pytest.fixture
def two(tmp_path: Path) -> tuple[Call, Call]:
    """Two databases."""
    for name in ("one.db", "two.db"):
        create_database(tmp_path / name)
    return Call("one.db"), Call("two.db")


def state_texts(path: Path) -> dict[str, str]:
    return dict(rows(path, "SELECT key, value FROM v_state"))

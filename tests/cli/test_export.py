"""`ael … export`: what stands in the database, whole and exact, in pieces that keep no loop waiting."""

from __future__ import annotations

import csv
import json
import signal
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from ael_store.cli import export as command
from ael_store.client import change
from ael_store.store import export
from ael_store.store.moment import Horizon
from ael_store.store.reader import Reader
from tests.cli.conftest import Ael, Start, until
from tests.loops import rows

NOUNS = {"history": "v_state_history", "events": "v_events", "ticks": "v_ticks", "tasks": "v_tasks"}


def lines(text: str) -> list[Any]:
    return [json.loads(line) for line in text.splitlines()]


def view(path: Path, noun: str, *, where: str = "1") -> list[dict[str, Any]]:
    """Return the rows of a view as an export in JSON should have them."""
    connection = sqlite3.connect(path)
    connection.row_factory = sqlite3.Row
    found = [dict(row) for row in connection.execute(f"SELECT * FROM {NOUNS[noun]} WHERE {where} ORDER BY id")]
    connection.close()
    for row in found:
        for name in {"old_value", "new_value", "data", "metadata", "args", "result"} & set(row):
            row[name] = None if row[name] is None else json.loads(row[name])
    return found


def put(values: dict[str, Any]) -> None:
    """Set keys of the database in the working folder."""
    change(Path("ael.db"), "state.import", {"values": values})


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make pieces so small that every export needs several."""
    monkeypatch.setattr(export, "ROWS", 2)
    monkeypatch.setattr(export, "NUMBERS", 3)


# -- logs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noun", NOUNS)
def test_log_is_exported_as_its_view_has_it(ael: Ael, database: Path, small_pieces: None, noun: str) -> None:
    assert ael("tasks", "submit", "os:getcwd", "--key", "k").code == 0
    expected = view(database, noun)

    assert expected
    assert lines(ael(noun, "export").out) == expected
    assert ael(noun, "export", "--json").json == expected


@pytest.mark.parametrize("noun", NOUNS)
def test_csv_has_a_header_and_json_text(ael: Ael, database: Path, noun: str) -> None:
    done = ael(noun, "export", "--format", "csv")

    header, *found = csv.reader(done.out.splitlines())
    assert header == rows(database, f"SELECT name FROM pragma_table_info('{NOUNS[noun]}')")
    assert found == [
        ["" if cell is None else str(cell) for cell in row]
        for row in rows(database, f"SELECT * FROM {NOUNS[noun]} ORDER BY id")
    ]


@pytest.mark.parametrize("noun", NOUNS)
def test_moments_bound_by_iteration_both_included(ael: Ael, database: Path, noun: str) -> None:
    assert ael("tasks", "submit", "os:getcwd").code == 0

    assert lines(ael(noun, "export", "--since", "2").out) == view(database, noun, where="iteration >= 2")
    assert lines(ael(noun, "export", "--until", "2").out) == view(database, noun, where="iteration <= 2")
    assert lines(ael(noun, "export", "--since", "2", "--until", "2").out) == view(database, noun, where="iteration = 2")
    assert lines(ael(noun, "export", "--since", "3", "--until", "2").out) == []


def test_a_time_stands_for_the_iterations_that_began_by_then(ael: Ael, database: Path) -> None:
    second = rows(database, "SELECT started_at FROM v_iterations WHERE iteration = 2")[0]

    assert lines(ael("events", "export", "--since", second).out) == view(database, "events", where="iteration >= 2")
    assert lines(ael("events", "export", "--until", second).out) == view(database, "events", where="iteration <= 2")
    assert lines(ael("events", "export", "--since", "1999-01-01").out) == view(database, "events")


def test_conditions_leave_rows_out(ael: Ael, database: Path, small_pieces: None) -> None:
    assert lines(ael("events", "export", "--type", "meas*").out) == view(database, "events", where="type = 'measured'")
    assert lines(ael("events", "export", "--type", "nope").out) == []
    mine = view(database, "history", where="agent = 'counter' AND key = 'temperature'")
    assert lines(ael("history", "export", "--agent", "counter", "--key", "temperature").out) == mine
    assert mine


def test_since_id_goes_on_where_an_export_ended(ael: Ael, database: Path) -> None:
    before = lines(ael("events", "export").out)
    assert ael("events", "emit", "later").code == 0

    after = lines(ael("events", "export", "--since-id", str(before[-1]["id"])).out)

    assert [row["type"] for row in after] == ["later"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--since", "99"], "there is no iteration 99 yet"),
        (["--since", "soon"], "is no moment"),
        (["--since", "1", "--since-id", "1"], "exclude each other"),
        (["--format", "xml"], "there is no format 'xml'; there are jsonl, csv, json"),
        (["--json", "--format", "csv"], "exclude each other"),
        (["--output", "no/where.csv"], "there is no folder"),
        (["--output", "."], "is a folder"),
    ],
)
def test_impossible_wishes_are_refused(ael: Ael, database: Path, arguments: list[str], message: str) -> None:
    done = ael("events", "export", *arguments)

    assert done.code in (2, 74)
    assert message in done.err
    assert done.out == ""


def test_what_retention_removed_is_said_or_refused(ael: Ael, database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Reader, "horizon", lambda self: Horizon(iteration=2))

    assert "the history begins with iteration 3" in ael("events", "export").err
    refused = ael("events", "export", "--since", "2")
    assert refused.code == 1
    assert "--since 3 gives all that is left" in refused.err
    assert ael("events", "export", "--since", "3").code == 0


# -- the state --------------------------------------------------------------------------------------


def test_state_is_exported_in_order_of_the_keys(ael: Ael, database: Path, small_pieces: None) -> None:
    put({key: {"of": [key, None, 2**63 - 1]} for key in ("z", "a", "ä", "agent/counter/x")})
    state = ael("state", "list", "--json").json

    assert lines(ael("state", "export").out) == [{"key": key, "value": state[key]} for key in sorted(state)]
    assert ael("state", "export", "--json").json == state
    assert [row["key"] for row in lines(ael("state", "export", "agent/").out)] == [
        "agent/counter/mine",
        "agent/counter/x",
    ]
    found = dict(list(csv.reader(ael("state", "export", "--format", "csv").out.splitlines()))[1:])
    assert {key: json.loads(value) for key, value in found.items()} == state


def test_state_of_a_past_moment(ael: Ael, database: Path) -> None:
    assert ael("state", "delete", "temperature").code == 0

    assert ael("state", "export", "--at", "2", "--json").json["temperature"] == 22
    assert "temperature" not in ael("state", "export", "--json").json


def test_state_is_one_moment_also_while_a_loop_changes_it(ael: Ael, database: Path, small_pieces: None) -> None:
    keys = [f"k{number}" for number in range(6)]
    put(dict.fromkeys(keys, 0))
    reader = Reader(database)
    pieces = export.values_at(reader, reader.moment(None))

    found = dict(next(pieces))
    put({**dict.fromkeys(keys, 1), "later": 1})
    assert ael("state", "delete", "k5").code == 0
    for piece in pieces:
        found.update(piece)
    reader.close()

    assert {key: text for key, text in found.items() if key[0] == "k"} == dict.fromkeys(keys, "0")
    assert "later" not in found


def test_export_keeps_no_transaction_open_between_pieces(database: Path, small_pieces: None) -> None:
    reader = Reader(database)
    log = export.LOGS["history"]

    for _ in export.pieces_of(reader, log, export.span_of(reader, log, None, None), {}):
        with sqlite3.connect(database) as connection:
            busy, _, _ = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            connection.execute("UPDATE meta SET value = value")
        connection.close()
        assert not busy
    reader.close()


# -- files ------------------------------------------------------------------------------------------


def test_file_gets_the_format_that_its_name_says(ael: Ael, database: Path, tmp_path: Path) -> None:
    for name in ("s.jsonl", "s.csv", "s.json", "s.txt"):
        assert ael("state", "export", "--output", name).code == 0

    assert json.loads((tmp_path / "s.json").read_text()) == ael("state", "export", "--json").json
    assert (tmp_path / "s.csv").read_text().startswith("key,value\n")
    assert (tmp_path / "s.txt").read_text() == (tmp_path / "s.jsonl").read_text() == ael("state", "export").out
    assert (tmp_path / "s.csv").stat().st_mode & 0o777 == 0o600


def test_result_is_told(ael: Ael, database: Path, tmp_path: Path) -> None:
    count = rows(database, "SELECT count(*) FROM v_events")[0]

    assert ael("events", "export", "--output", "e.csv").out == f"e.csv: {count} rows\n"
    again = ael("events", "export", "--output", "e.csv", "--force", "--json").json
    assert again == {"path": str(tmp_path / "e.csv"), "format": "csv", "rows": count}


def test_file_that_exists_is_kept_unless_told(ael: Ael, database: Path, tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text("mine")

    done = ael("events", "export", "--output", "e.csv")

    assert done.code == 2
    assert "e.csv exists; name another file, or replace it with --force" in done.err
    assert (tmp_path / "e.csv").read_text() == "mine"


@pytest.mark.parametrize("name", ["ael.db", "ael.db-wal", "./ael.db.lock", "link.db"])
def test_database_is_never_replaced(ael: Ael, database: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "link.db").hardlink_to(database)
    before = database.read_bytes()

    done = ael("events", "export", "--output", name, "--force")

    assert done.code == 2
    assert "belongs to the database itself" in done.err
    assert database.read_bytes() == before


def test_what_is_no_file_is_written_to_as_it_is(ael: Ael, database: Path) -> None:
    assert ael("tasks", "export", "--output", "/dev/null").out == "/dev/null: 0 rows\n"


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(28, "No space left on device")])
@pytest.mark.parametrize("force", [[], ["--force"]])
def test_export_that_ends_early_leaves_no_file(
    ael: Ael,
    database: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    small_pieces: None,
    failure: BaseException,
    force: list[str],
) -> None:
    if force:
        (tmp_path / "e.jsonl").write_text("before")
    before = sorted(path.name for path in tmp_path.iterdir() if "-" not in path.name)

    def fail(line: str) -> str:
        raise failure

    monkeypatch.setattr(command, "_json", fail)
    done = ael("events", "export", "--output", "e.jsonl", *force)

    assert done.code in (130, 74)
    assert sorted(path.name for path in tmp_path.iterdir() if "-" not in path.name) == before
    assert not force or (tmp_path / "e.jsonl").read_text() == "before"


def test_progress_is_told_after_a_second(ael: Ael, database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(0, 10_000, 2))
    monkeypatch.setattr("ael_store.cli.output.time.monotonic", lambda: next(now))

    done = ael("events", "export")

    assert f"{len(done.out.splitlines())} rows, 100%" in done.err


# -- real processes ---------------------------------------------------------------------------------


def test_ctrl_c_leaves_nothing_behind(start: Start, database: Path, tmp_path: Path) -> None:
    connection = sqlite3.connect(database)
    with connection:
        connection.execute("UPDATE events SET data = json_quote(hex(zeroblob(2000000)))")
    connection.close()
    process = start("events", "export", "--output", "e.jsonl")

    def is_written() -> bool:
        try:
            return any(file.stat().st_size for file in tmp_path.glob(".e.jsonl.export-*"))
        except FileNotFoundError:  # it has its name by now
            return True

    until(lambda: is_written() or process.process.poll() is not None, process)

    process.process.send_signal(signal.SIGINT)
    code = process.wait()

    assert code in (0, 130)  # it may have been faster
    assert list(tmp_path.glob(".e.jsonl*")) == []
    assert (tmp_path / "e.jsonl").exists() == (code == 0)


def test_export_beside_a_running_loop(ael: Ael, start: Start, counter: str) -> None:
    loop = start("run", counter, "--tick-rate", "0.001", "--quiet")
    until(lambda: Path("ael.db").exists() and ael("state", "export").out, loop)

    found = lines(ael("history", "export", "--key", "count").out)

    assert [row["new_value"] for row in found] == list(range(1, len(found) + 1))
    assert loop.stop() == 0

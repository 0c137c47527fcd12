"""What comes from agents is shown as text, on a terminal and in a pipe."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from ael_store.cli import export, output, sql
from ael_store.cli.output import Column, milliseconds, print_table, size
from tests.cli.conftest import Ael

HOSTILE = "[red]x[/red] \x1b[31mred\x1b]0;title\x07 \x9b31m \u202eevil\r\n\tend"


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make stdout a terminal of 100 columns."""
    monkeypatch.setattr(output, "on_terminal", lambda: True)
    monkeypatch.setattr(sql, "on_terminal", lambda: True)
    monkeypatch.setattr(export, "on_terminal", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")  # for rich
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)


def controls(text: str) -> set[str]:
    """Return what a terminal would act on, without the colours of our own."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    return {character for character in text if not character.isprintable()}


@pytest.fixture
def hostile(ael: Ael, database: Path) -> Path:
    assert ael("state", "set", "[bold]key", json.dumps(HOSTILE)).code == 0
    assert ael("events", "emit", "evil[red]", json.dumps(HOSTILE), "--source", "[blink]").code == 0
    return database


COMMANDS = [
    ["state", "list"],
    ["state", "get", "[bold]key"],
    ["state", "history", "[bold]key"],
    ["events", "list"],
    ["sql", "SELECT * FROM v_state"],
    ["sql", "SELECT * FROM v_state", "--csv"],
    ["sql", "SELECT '" + HOSTILE + "' AS a"],
    ["state", "list", "--json"],
    ["events", "list", "--json"],
    ["sql", "SELECT '" + HOSTILE + "' AS a", "--json"],
    ["sql", "SELECT *, '" + HOSTILE + "' AS a FROM v_agents"],
    ["state", "export"],
    ["events", "export", "--format", "csv"],
]


@pytest.mark.parametrize("arguments", COMMANDS, ids=lambda arguments: " ".join(arguments)[:30])
def test_hostile_text_reaches_no_terminal(ael: Ael, hostile: Path, terminal: None, arguments: list[str]) -> None:
    done = ael(*arguments)

    assert done.code == 0
    assert controls(done.out) <= {"\n", "\t"}
    assert "\x1b[31m" not in done.out


@pytest.mark.parametrize("arguments", COMMANDS[:5], ids=" ".join)
def test_nor_the_reader_of_a_pipe(ael: Ael, hostile: Path, arguments: list[str]) -> None:
    assert controls(ael(*arguments).out) <= {"\n", "\t"}


def test_nothing_is_markup(ael: Ael, hostile: Path, terminal: None) -> None:
    assert "[bold]key" in ael("state", "list").out
    assert "evil[red]" in ael("events", "list").out
    assert '"[red]x[/red] ' in ael("state", "list").out


def test_json_gives_back_exactly_what_was_stored(ael: Ael, hostile: Path) -> None:
    assert ael("state", "get", "[bold]key", "--json").json == HOSTILE
    assert ael("events", "list", "--limit", "1", "--json").json[0]["data"] == HOSTILE


def test_message_can_not_forge_lines(ael: Ael, database: Path) -> None:
    done = ael("agents", "show", "x\nael: all is well \x1b[2J")

    assert controls(done.err) == {"\n"}
    assert done.err.count("ael: ") == 2
    assert done.err.count("\n") == 1


def test_terminal_cuts_only_what_may_shrink(ael: Ael, database: Path, terminal: None) -> None:
    ael("state", "set", "long", json.dumps("x" * 500))

    lines = ael("state", "list").out.splitlines()

    assert all(len(re.sub(r"\x1b\[[0-9;]*m", "", line)) <= 100 for line in lines)
    assert "agent/counter/mine" in ael("state", "list").out
    assert "…" in next(line for line in lines if "long" in line)


def test_terminal_is_paged_for_many_rows(monkeypatch: pytest.MonkeyPatch, terminal: None, capsys) -> None:
    monkeypatch.setattr(output, "PAGE", 2)

    print_table([Column("n", right=True)], ([str(n)] for n in range(5)))

    shown = re.sub(r"\x1b\[[0-9;]*m| ", "", capsys.readouterr().out).split()
    assert [line for line in shown if line != "n"] == ["0", "1", "2", "3", "4"]


def test_colours_are_left_out_where_they_are_not_wanted(
    ael: Ael, database: Path, terminal: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "\x1b[" in ael("status").out
    monkeypatch.delenv("FORCE_COLOR")
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[" not in ael("status").out


def test_empty_table_says_so_on_stderr(ael: Ael, database: Path) -> None:
    done = ael("events", "list", "--type", "none")

    assert done.out == "id\temitted_at\titeration\ttype\tsource\tdata\n"
    assert done.err == "no such events\n"


def test_figures_for_people() -> None:
    assert [milliseconds(value) for value in (None, 0.0123, 12.34)] == ["", "0.012", "12.3"]
    assert [size(count) for count in (0, 999, 1000, 1_500_000, 2_000_000_000, 3_000_000_000_000)] == [
        "0 bytes",
        "999 bytes",
        "1.0 kB",
        "1.5 MB",
        "2.0 GB",
        "3000.0 GB",
    ]

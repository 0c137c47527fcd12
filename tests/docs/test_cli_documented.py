"""Each command stands in the reference with its arguments and options, and nothing else does."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from ael_store import errors
from ael_store.cli.app import make_app
from ael_store.cli.run import _figures_of
from ael_store.cli.status import FACTS
from ael_store.runtime.measure import IterationSummary
from ael_store.runtime.watchdog import STALLED

REFERENCE = (Path(__file__).parents[2] / "docs/reference/cli.md").read_text("utf-8")
GLOBAL = {"--db", "--json", "--debug", "--help"}


def commands(group: Any, path: str = "ael") -> Iterator[tuple[str, Any]]:
    """Yield each command that does something, with its name."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command


COMMANDS = dict(commands(get_command(make_app())))
SECTIONS: dict[str, str] = {}
"""Heading without its backquotes to text."""
for part in re.split(r"^##+ ", REFERENCE, flags=re.MULTILINE)[1:]:
    heading, _, text = part.partition("\n")
    SECTIONS[heading.strip("`")] = text


def arguments(command: Any) -> list[str]:
    return [parameter.metavar for parameter in command.params if parameter.param_type_name == "argument"]


def options(command: Any) -> set[str]:
    return {
        option
        for parameter in command.params
        if parameter.param_type_name == "option"
        for option in (*parameter.opts, *parameter.secondary_opts)
    } - GLOBAL


@pytest.mark.parametrize("name", COMMANDS)
def test_command_is_documented_with_its_arguments_and_options(name: str) -> None:
    heading = " ".join([name, *arguments(COMMANDS[name])])

    assert heading in SECTIONS
    documented = set(re.findall(r"`(--[a-z-]+)", SECTIONS[heading]))
    assert documented - {"--json"} == options(COMMANDS[name])


def test_nothing_else_is_documented() -> None:
    documented = {heading for heading in SECTIONS if heading.startswith("ael ")}

    assert documented == {" ".join([name, *arguments(command)]) for name, command in COMMANDS.items()}


def test_global_options_are_documented() -> None:
    assert set(re.findall(r"^\| `(--\w+)", SECTIONS["Options of all commands"], re.MULTILINE)) == GLOBAL
    for command in COMMANDS.values():
        assert {option for parameter in command.params for option in parameter.opts} >= GLOBAL - {"--help"}


def test_each_command_has_a_short_help() -> None:
    for name, command in COMMANDS.items():
        help = command.get_short_help_str(limit=200)
        assert 10 < len(help) < 68, f"{name}: {help}"


def test_exit_codes_of_all_errors_are_documented() -> None:
    codes = {
        error.exit_code for error in vars(errors).values() if isinstance(error, type) and hasattr(error, "exit_code")
    }

    documented = set(map(int, re.findall(r"^\| `(\d+)`", SECTIONS["Exit codes"], re.MULTILINE)))

    assert documented == codes | {0, 130, STALLED}


def example(heading: str) -> dict[str, Any]:
    found = re.search(r"```json\n(.*?)```", SECTIONS[heading], re.DOTALL)
    assert found is not None
    example: dict[str, Any] = json.loads(found[1])
    return example


def test_shapes_shown_are_those_that_are_printed() -> None:
    figures = {item.name: 0 for item in fields(IterationSummary)}
    summary = IterationSummary(**{**figures, "failed": ()})  # type: ignore[arg-type]

    assert list(example("ael status")) == list(FACTS)
    assert list(example("ael run TARGET")) == list(_figures_of(summary))


def test_one_sentence_a_line() -> None:
    prose = re.sub(r"```.*?```|^\|.*$", "", REFERENCE, flags=re.DOTALL | re.MULTILINE)

    assert not re.findall(r"^.*[a-z)`]\. [A-Z`].*$", prose, re.MULTILINE)

"""Commands and options of `ael` that the pages name exist."""

from __future__ import annotations

import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from ael_store.cli.app import make_app
from tests.docs.markdown import blocks, page_id, pages, prose


def named(page: Path) -> list[tuple[int, list[str]]]:
    """Return the words after each `ael` in code of a page, with the line."""
    found: list[tuple[int, str]] = []
    for number, line in prose(page):
        found += [(number, code) for code in re.findall(r"`(ael [^`]+)`", line)]
    for block in blocks(page):
        if block.language in ("sh", "console"):
            for offset, line in enumerate(block.text.splitlines()):
                if match := re.match(r"(?:\$ )?(?:\w+=\S+ )*(ael .*)", line):
                    found.append((block.line + offset, match[1]))
    return [(number, shlex.split(text, comments=True)[1:]) for number, text in found]


@cache
def everything() -> Any:
    return get_command(make_app())


def problem_with(words: list[str]) -> str | None:
    """Return what is wrong with a command line, None where nothing is."""
    command = everything()
    path: list[str] = []
    options = {option for parameter in command.params for option in parameter.opts}
    for word in words:
        if word.startswith("--"):
            if word.split("=")[0] not in options | {"--help"}:
                return f"{' '.join(path)} has no {word}"
        elif hasattr(command, "commands"):
            path.append(word)
            if word not in command.commands:
                return f"there is no command {' '.join(path)}"
            command = command.commands[word]
            options |= {option for one in command.params for option in (*one.opts, *one.secondary_opts)}
        elif word in ("|", ">", "2>", "&"):
            return None
    return None


@pytest.mark.parametrize("page", [page for page in pages() if named(page)], ids=page_id)
def test_commands_exist(page: Path) -> None:
    wrong = [
        f"{page_id(page)}:{number}: ael {' '.join(words)}: {problem}"
        for number, words in named(page)
        if (problem := problem_with(words))
    ]

    assert not wrong, "\n".join(wrong)

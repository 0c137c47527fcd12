"""Reading arguments: JSON, and names that are nearly right."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Annotated, Any, NoReturn

import typer

from ael_store.errors import InvalidValue

__all__ = ["At", "nearest", "read_json"]

At = Annotated[
    str | None,
    typer.Option("--at", metavar="MOMENT", help="As it was: after this iteration, or at this ISO time."),
]
"""The option of commands that can look at a past moment."""


def read_json(text: str, what: str) -> Any:
    """Return the value of a JSON argument; `-` reads it from stdin. Raises InvalidValue with a hint."""
    source = text
    if text == "-":
        try:
            source = sys.stdin.read()
        except UnicodeDecodeError:
            raise InvalidValue(f"{what}: stdin is no UTF-8 text") from None
    try:
        return json.loads(source, parse_constant=_refuse)
    except RecursionError:
        raise InvalidValue(f"{what}: nested too deep") from None
    except ValueError as error:
        place = "stdin" if text == "-" else _shown(text)
        hint = ""
        if text != "-" and not text.lstrip().startswith(("{", "[", '"')):
            hint = f"; a text needs its own quotes inside those of the shell: {shlex.quote(json.dumps(text))}"
        raise InvalidValue(f"{what}: {place} is not JSON ({error}){hint}") from None


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"JSON has no {constant}")


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:60]}…")


def nearest(name: str, names: Iterable[str]) -> str:
    """Return `; did you mean …?` with the names that are like this one, nothing where there is none."""
    found = get_close_matches(name, list(names), 3, 0.6)
    return f"; did you mean {' or '.join(found)}?" if found else ""

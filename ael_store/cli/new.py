"""`ael new`: a small project that works."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Annotated

import typer

from ael_store.cli.call import Call
from ael_store.cli.command import command
from ael_store.cli.output import print_json, say
from ael_store.telemetry import printable

__all__ = ["add_to"]


def add_to(app: typer.Typer) -> None:
    """Add this command."""
    command(app, "new")(new)


def new(call: Call, folder: Annotated[str, typer.Argument(metavar="DIR", help="A new or empty folder.")]) -> None:
    """Make a small project: agents, ael.toml, a test."""
    from ael_store.cli.project import create_project

    files = create_project(Path(folder))
    if call.json:
        print_json({"folder": os.path.abspath(folder), "files": [os.fsdecode(file) for file in files]})
        return
    for file in files:
        say(f"made {printable(os.path.join(folder, file.name))}")
    inside = "" if os.path.abspath(folder) == os.getcwd() else f"cd {shlex.quote(folder)} && "
    say(f"\nnow: {printable(inside)}ael run agents.py")

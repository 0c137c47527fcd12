"""The tree of commands."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Annotated, Any

import typer
from typer.main import get_command

from ael_store._version import __version__
from ael_store.cli import (
    agents,
    config,
    db,
    doctor,
    events,
    export,
    fork,
    limits,
    loop,
    metrics,
    new,
    replay,
    run,
    service,
    sql,
    state,
    status,
    tasks,
    web,
    why,
)
from ael_store.cli.command import new_app, take_global_options
from ael_store.cli.failure import complain

__all__ = ["carry_out", "make_app"]


def make_app() -> typer.Typer:
    """Return all commands."""
    app = new_app(help="ael: a durable agent loop on SQLite.", add_completion=True)
    take_global_options(app, [VERSION])
    for noun in (
        new,
        run,
        status,
        doctor,
        why,
        agents,
        state,
        events,
        tasks,
        export,
        limits,
        metrics,
        loop,
        sql,
        fork,
        replay,
        config,
        service,
        db,
        web,
    ):
        noun.add_to(app)
    return app


@cache
def _root() -> Any:
    return get_command(make_app())


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ael {__version__}")
        raise typer.Exit


VERSION = inspect.Parameter(
    "version",
    inspect.Parameter.KEYWORD_ONLY,
    default=False,
    annotation=Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_show_version, is_eager=True)
    ],
)


def carry_out(arguments: list[str]) -> int:
    """Carry out a command line and return its exit code; wrong usage is complained of here."""
    try:
        code = _root().main(arguments, prog_name="ael", standalone_mode=False)
    except typer.Abort:
        complain("given up: nothing was changed")
        return 1
    except Exception as error:
        if not isinstance(error, UsageMistake):
            raise
        complain(_mistake(error))
        return 2
    return code if isinstance(code, int) else 0


UsageMistake = typer.BadParameter.__mro__[1]
"""The base of what typer raises for a command line that it can't read; it has no public name of its own."""


def _mistake(error: Any) -> str:
    text = error.format_message().rstrip(".")
    path = error.ctx.command_path if error.ctx is not None else "ael"
    return f"{text[:1].lower()}{text[1:]}; `{path} --help` says what there is"

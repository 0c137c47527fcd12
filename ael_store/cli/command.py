"""How a command is declared: a function of a `Call` and its own parameters becomes a command of typer.

`--db`, `--json` and `--debug` are added to each, and to each group, so that they are accepted before and after
the verb.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from ael_store.cli.call import Call
from ael_store.errors import UsageError

__all__ = ["Declared", "command", "group", "new_app"]

Declared = Callable[..., None]

GLOBAL = (
    inspect.Parameter(
        "db",
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[
            str | None,
            typer.Option("--db", metavar="PATH", help="The database: a path or URL. Default: setting db."),
        ],
    ),
    inspect.Parameter(
        "json",
        inspect.Parameter.KEYWORD_ONLY,
        default=False,
        annotation=Annotated[bool, typer.Option("--json", help="Print JSON.")],
    ),
    inspect.Parameter(
        "debug",
        inspect.Parameter.KEYWORD_ONLY,
        default=False,
        annotation=Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")],
    ),
)
CONTEXT = inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)


def new_app(**options: Any) -> typer.Typer:
    """Return an empty group of commands whose help is plain text."""
    plain: dict[str, Any] = {"rich_markup_mode": None, "add_completion": False, "pretty_exceptions_enable": False}
    return typer.Typer(**plain | options)


def group(parent: typer.Typer, name: str, help: str) -> typer.Typer:
    """Return a new noun below `parent`."""
    app = new_app()
    parent.add_typer(app, name=name, help=help)
    take_global_options(app)
    return app


def take_global_options(app: typer.Typer, more: Sequence[inspect.Parameter] = ()) -> None:
    """Accept the global options before a verb of this group; without a verb its help is shown."""

    def before(context: typer.Context, *, db: str | None, json: bool, debug: bool, **_more: Any) -> None:
        context.obj = Call(db, json, debug).over(context.obj)
        if context.invoked_subcommand is None:
            typer.echo(context.get_help(), err=True)
            raise typer.Exit(2)

    _declare(before, [CONTEXT, *GLOBAL, *more])
    app.callback(invoke_without_command=True)(before)


def command(
    app: typer.Typer,
    name: str,
    *,
    more: Sequence[inspect.Parameter] = (),
    values: bool = False,
) -> Callable[[Declared], Declared]:
    """Make a function a command; its first parameter is the `Call`, the others are typer's.

    `more` are parameters that its `**` takes. With `values` an argument may begin with a dash, as negative
    numbers do.
    """

    def declare(function: Declared) -> Declared:
        def run(context: typer.Context, *, db: str | None, json: bool, debug: bool, **arguments: Any) -> None:
            for parameter, value in arguments.items():
                if isinstance(value, str):
                    _check_text(parameter, value)
            function(Call(db, json, debug).over(context.obj), **arguments)

        signature = inspect.signature(function, eval_str=True)
        own = [
            parameter
            for parameter in list(signature.parameters.values())[1:]
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        _declare(run, [CONTEXT, *own, *more, *GLOBAL])
        run.__doc__ = function.__doc__
        settings = {"ignore_unknown_options": True} if values else None
        app.command(name, context_settings=settings)(run)
        return function

    return declare


def _declare(function: Declared, parameters: Sequence[inspect.Parameter]) -> None:
    """Give a function the signature that typer reads."""
    kinds = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    function.__signature__ = inspect.Signature(kinds)  # type: ignore[attr-defined]
    function.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}


def _check_text(parameter: str, value: str) -> None:
    """Refuse bytes that are no text, except in names of files."""
    if parameter not in ("folder", "target") and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise UsageError(f"{parameter} is {value!r}, which is no UTF-8 text") from None

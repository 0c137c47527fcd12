"""`ael replay`: today's code on recorded units."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from ael_store.cli.call import Call
from ael_store.cli.command import command
from ael_store.cli.completion import complete
from ael_store.cli.output import Column, note, number, print_json, print_table, progress
from ael_store.cli.run import _folder_of
from ael_store.errors import UsageError

if TYPE_CHECKING:
    from ael_store.model.unit import Kind
    from ael_store.testing.replay_report import ReplayReport

__all__ = ["add_to"]


def add_to(app: typer.Typer) -> None:
    """Add this command."""
    command(app, "replay")(replay)


def replay(
    call: Call,
    target: Annotated[str, typer.Argument(metavar="TARGET", help="As for `ael run`.")],
    agent: Annotated[
        str | None, typer.Option("--agent", metavar="NAME", help="Whose units.", autocompletion=complete("agent"))
    ] = None,
    iteration: Annotated[str | None, typer.Option("--iteration", metavar="N", help="Those of an iteration.")] = None,
    iterations: Annotated[str | None, typer.Option("--iterations", metavar="A..B", help="From one to another.")] = None,
    unit: Annotated[str | None, typer.Option("--unit", metavar="ID", help="One, by its number.")] = None,
    last: Annotated[str | None, typer.Option("--last", metavar="N", help="The last ones.")] = None,
    kind: Annotated[list[str] | None, typer.Option("--kind", metavar="KIND", help="Only such units.")] = None,
    allow_effects: Annotated[bool, typer.Option("--allow-effects", help="Let hooks touch the outside.")] = False,
) -> None:
    """Run today's code on recorded units; tell what differs."""
    spans = {"--iteration": iteration, "--iterations": iterations, "--unit": unit, "--last": last}
    given = [name for name, value in spans.items() if value is not None]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} each say which units to replay: pass one of them")
    asked: dict[str, Any] = {
        "iterations": _number(iteration, "--iteration") if iterations is None else _range(iterations),
        "unit": _number(unit, "--unit"),
        "last": _number(last, "--last"),
        "kinds": [cast("Kind", name) for name in kind or ()],
    }
    sys.dont_write_bytecode = True  # importing the agents writes nothing either
    loaded = call.load({}, beside=_folder_of(target))
    call.check_revision()

    from ael_store.runtime.target import load_agents
    from ael_store.testing.replayer import replay as replay_units

    # What agents print is no data of this command.
    with contextlib.redirect_stdout(sys.stderr):
        report = asyncio.run(
            replay_units(
                call.path,
                lambda: load_agents(target, loaded.agents),
                agent=agent,
                allow_effects=allow_effects,
                settings=loaded.settings,
                tell=progress(),
                **asked,
            )
        )
    _show(report, call.json)
    if not report.ok:
        raise typer.Exit(1)


def _show(report: ReplayReport, as_json: bool) -> None:
    if as_json:
        print_json(report.to_dict())
        return
    from ael_store.testing.replay_report import shown

    columns = (
        Column("unit", right=True),
        Column("iteration", right=True),
        Column("kind"),
        Column("what"),
        Column("name"),
        Column("recorded", shrinks=True),
        Column("now", shrinks=True),
    )
    if report.differences:
        print_table(
            columns,
            (
                (
                    number(difference.unit),
                    number(difference.iteration),
                    difference.kind,
                    difference.what,
                    difference.name,
                    shown(difference.recorded),
                    "refused" if difference.what == "effect" else shown(difference.replayed),
                )
                for difference in report.differences
            ),
        )
    note(report.summary)
    for line in report.notes:
        note(line)


def _number(text: str | None, option: str) -> int | None:
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise UsageError(f"{option} is {text!r}; wanted is a whole number")
    return int(text)


def _range(text: str) -> tuple[int, int]:
    first, dots, last = text.partition("..")
    if not dots:
        raise UsageError(f"--iterations is {text!r}; wanted are two numbers, like 400..412")
    numbers = _number(first, "the first of --iterations"), _number(last, "the last of --iterations")
    return cast("tuple[int, int]", numbers)

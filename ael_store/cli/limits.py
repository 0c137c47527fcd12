"""`ael limits`: what tasks may use, what they have used, and more of it."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ael_store.cli.arguments import nearest
from ael_store.cli.call import Call
from ael_store.cli.command import command, group
from ael_store.cli.completion import complete
from ael_store.cli.output import Column, number, print_json, print_table, say, when
from ael_store.errors import UsageError
from ael_store.telemetry import printable

__all__ = ["add_to"]

COLORS = {"open": "green", "full": "yellow", "held": "red"}

Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of a limit.", autocompletion=complete("limit"))]


def add_to(app: typer.Typer) -> None:
    """Add the commands of this noun."""
    limits = group(app, "limits", "Look at the limits of tasks and change them.")
    command(limits, "show")(show)
    command(limits, "raise")(raise_limit)
    command(limits, "release")(release)


def show(
    call: Call,
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Only this limit.", autocompletion=complete("limit"))
    ] = None,
) -> None:
    """Show limits, what is used of them, and what waits for them."""
    with call.reader() as reader:
        rows = reader.limits()
    if name is not None:
        known = [row["name"] for row in rows]
        rows = [row for row in rows if row["name"] == name]
        if not rows:
            hint = nearest(name, known) or f"; known are {', '.join(known) or 'none'}"
            raise UsageError(f"there is no limit {name!r}{hint}")
    if call.json:
        print_json(rows)
        return
    columns = (
        Column("name"),
        Column("status", colors=COLORS),
        Column("running", right=True),
        Column("minute", right=True),
        Column("today", right=True),
        Column("usd_today", right=True),
        Column("waiting", right=True),
        Column("until"),
        Column("reason", shrinks=True),
    )
    cells = (
        (
            row["name"],
            row["status"],
            _of(row["running"], row["concurrency"]),
            _of(row["started_last_minute"], row["per_minute"]),
            _of(row["started_today"], row["per_day"]),
            _of(f"{row['usd_today']:.4g}", None if row["usd_per_day"] is None else f"{row['usd_per_day']:g}"),
            number(row["waiting"]),
            when(row["until"]),
            row["reason"] or "",
        )
        for row in rows
    )
    print_table(columns, cells, empty="no limits: a table [limits.NAME] in ael.toml makes one")


def _of(used: object, bound: object) -> str:
    return f"{used}" if bound is None else f"{used}/{bound}"


def raise_limit(
    call: Call,
    name: Name,
    concurrency: Annotated[int | None, typer.Option("--concurrency", metavar="N", help="Most running at once.")] = None,
    per_minute: Annotated[int | None, typer.Option("--per-minute", metavar="N", help="Most begun in 60 s.")] = None,
    per_day: Annotated[int | None, typer.Option("--per-day", metavar="N", help="Most begun in a day (UTC).")] = None,
    usd_per_day: Annotated[
        str | None, typer.Option("--usd-per-day", metavar="USD", help="Most money in a day.")
    ] = None,
    reset: Annotated[bool, typer.Option("--reset", help="As the settings say.")] = False,
) -> None:
    """Set bounds of a limit until its settings change or --reset."""
    given = {"concurrency": concurrency, "per_minute": per_minute, "per_day": per_day, "usd_per_day": usd_per_day}
    bounds = {bound: value for bound, value in given.items() if value is not None}
    if bool(bounds) == reset:
        raise UsageError("say what it is to be (--per-minute N, --usd-per-day USD …), or else --reset")
    done: dict[str, Any] = call.change("limits.raise", name=name, bounds=bounds, reset=reset)
    if call.json:
        print_json(done)
        return
    said = ", ".join(f"{bound} {value:g}" for bound, value in done.items() if bound != "name" and value is not None)
    say(f"limit {printable(name)}: {said or 'no bounds'} (committed)")


def release(call: Call, name: Name) -> None:
    """End the pause of a limit whose tasks failed."""
    changed = bool(call.change("limits.release", name=name))
    if call.json:
        print_json({"name": name, "changed": changed})
    else:
        say(f"limit {printable(name)} goes on (committed)" if changed else f"limit {printable(name)} is not held")

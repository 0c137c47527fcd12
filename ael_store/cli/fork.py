"""`ael fork`: a new database that starts from a past moment of this one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ael_store.cli.arguments import read_json
from ael_store.cli.call import Call
from ael_store.cli.command import command
from ael_store.cli.output import note, print_json, progress, say
from ael_store.errors import UsageError
from ael_store.model.values import check_key, encode
from ael_store.telemetry import printable

if TYPE_CHECKING:
    from ael_store.store.fork import ForkReport

__all__ = ["add_to"]


def add_to(app: typer.Typer) -> None:
    """Add this command."""
    command(app, "fork")(fork)


def fork(
    call: Call,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The new file.")],
    at: Annotated[
        str | None,
        typer.Option("--at", metavar="MOMENT", help="An iteration or an ISO time; the last iteration without it."),
    ] = None,
    values: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=JSON", help="Give a key another value; may be repeated.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")] = False,
) -> None:
    """Make a new database that starts from a past moment of this one."""
    from ael_store.runtime.control import actor
    from ael_store.store.fork import fork

    call.check_revision()
    report = fork(
        call.path,
        out,
        progress(),
        at=at,
        values=_values(call, values or []),
        actor=actor(),
        settings=call.loaded.settings,
        force=force,
        dry_run=dry_run,
    )
    for line in report.untold:
        note(f"not told by the history: {line}")
    if call.json:
        print_json(
            {
                "path": str(report.path),
                "from": str(report.source),
                "iteration": report.moment.iteration,
                "moment": report.moment.at,
                "set": report.keys,
                "removed": report.removed,
                "tasks_held": report.tasks_held,
                "changed": not dry_run,
            }
        )
    else:
        _show(report, dry_run)


def _values(call: Call, assignments: list[str]) -> dict[str, str]:
    """Return the keys and JSON texts of `--set`; refuses what is no key or no value before anything is written."""
    from ael_store.runtime.context import VIRTUAL_KEYS

    found: dict[str, str] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise UsageError(f"--set is {assignment!r}, wanted is KEY=JSON")
        check_key(key, call.limits)
        if key in VIRTUAL_KEYS:
            raise UsageError(f"state key {key!r} is kept by the loop and can't be written")
        if key in found:
            raise UsageError(f"--set gives {key!r} two values")
        found[key] = encode(read_json(text, f"value of {key!r}"), f"state key {key!r}", call.limits)
    return found


def _show(report: ForkReport, dry_run: bool) -> None:
    removed = report.removed
    parts = [f"{removed[table]} {table}" for table in ("iterations", "state_changes", "events") if table in removed]
    say(
        f"{'would fork' if dry_run else 'forked'} {printable(str(report.source))} at iteration "
        f"{report.moment.iteration} ({report.moment.at or 'before the first'}) into {printable(str(report.path))}"
        + (f"; without {', '.join(parts).replace('_', ' ')}" if parts else "")
    )
    if report.keys:
        say(f"{'would set' if dry_run else 'set'} {', '.join(map(printable, report.keys))}")
    if report.tasks_held:
        say(f"{report.tasks_held} tasks are not over; the first run holds them until `ael tasks release`")

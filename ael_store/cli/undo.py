"""`ael state undo`: what some changes have done, taken back by new changes."""

from __future__ import annotations

from typing import Annotated, Any

import orjson
import typer

from ael_store.cli.agents import confirm
from ael_store.cli.arguments import nearest
from ael_store.cli.call import Call
from ael_store.cli.completion import complete
from ael_store.cli.output import Column, json_cell, note, number, print_json, print_table
from ael_store.errors import AgentNotFound

__all__ = ["undo"]

COLORS = {"undone": "green", "kept": "yellow"}


def undo(
    call: Call,
    agent: Annotated[
        str | None,
        typer.Option(
            "--agent",
            metavar="NAME",
            help="Changes by this agent; with --since or --iteration.",
            autocompletion=complete("agent"),
        ),
    ] = None,
    since: Annotated[
        str | None, typer.Option("--since", metavar="MOMENT", help="From this iteration or ISO time on.")
    ] = None,
    change: Annotated[int | None, typer.Option("--change", metavar="ID", min=1, help="One change.")] = None,
    iteration: Annotated[
        int | None, typer.Option("--iteration", metavar="N", min=0, help="All changes of an iteration.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be written.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Write back the values from before some changes."""
    from ael_store.runtime.undo import report

    scope = {"agent": agent, "since": since, "change": change, "iteration": iteration}
    with call.reader() as reader:
        try:
            done = report(reader.undo_plan(**scope).steps, changed=False)
        except AgentNotFound:
            raise _unknown(agent or "", [row["name"] for row in reader.agents()]) from None
    if done["undone"] and not dry_run:
        keys = len(done["undone"])
        confirm(f"Write back {keys} value{'s' if keys > 1 else ''}?", yes)
        done = call.change("state.undo", **{name: value for name, value in scope.items() if value is not None})
    if call.json:
        print_json(done)
    else:
        _show(done, dry_run)


def _show(done: dict[str, Any], dry_run: bool) -> None:
    rows = [("undone", row["key"], _cell(row["from"]), _cell(row["to"]), "") for row in done["undone"]]
    rows += [("kept", row["key"], "", "", _why(row)) for row in done["kept"]]
    columns = (
        Column("what", colors=COLORS),
        Column("key"),
        Column("from", shrinks=True),
        Column("to", shrinks=True),
        Column("why"),
    )
    print_table(columns, rows)
    if not rows:
        note("there is nothing to undo")
        return
    undone, kept = len(done["undone"]), len(done["kept"])
    also = f", {'would keep' if dry_run else 'kept'} {kept}" if kept else ""
    if dry_run:
        note(f"would write back {undone} values{also}")
    else:
        note(f"wrote back {undone} values{' (committed)' if undone else ''}{also}")


def _cell(value: Any) -> str:
    return "" if value is None else json_cell(orjson.dumps(value).decode())


def _why(row: dict[str, Any]) -> str:
    who = "" if row["agent"] is None else f" by {row['agent']}"
    when = "" if row["iteration"] is None else f" in iteration {number(row['iteration'])}"
    return f"{row['why']}{who}{when}"


def _unknown(name: str, names: list[str]) -> AgentNotFound:
    hint = nearest(name, names) or (f"; known are {', '.join(names[:20])}" if names else "; none is known yet")
    return AgentNotFound(f"there is no agent {name!r}{hint}")

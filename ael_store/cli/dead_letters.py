"""`ael events dead` and `ael events redeliver`: what subscribers could not handle, and one more attempt."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ael_store.cli.call import Call
from ael_store.cli.completion import complete
from ael_store.cli.output import Column, decoded, number, print_json, print_table, say, when
from ael_store.errors import DeadLetterNotFound, UsageError
from ael_store.telemetry import printable

__all__ = ["dead", "redeliver"]

MOST_SHOWN = 10_000
"""Dead letters that a dry run lists at most: as many as one command takes up."""

Type = Annotated[
    str | None,
    typer.Option(
        "--type", metavar="TYPE", help="Only this type; * stands for any text.", autocompletion=complete("event type")
    ),
]
Subscriber = Annotated[
    str | None,
    typer.Option(
        "--subscriber", metavar="NAME", help="Only of this subscriber.", autocompletion=complete("subscriber")
    ),
]


def dead(
    call: Call,
    subscriber: Subscriber = None,
    type: Type = None,
    limit: Annotated[int, typer.Option("--limit", metavar="N", min=1, help="Most of them to show.")] = 100,
) -> None:
    """Show the newest deliveries that were given up, oldest first."""
    with call.reader() as reader:
        rows = reader.dead_letters(subscriber=subscriber, type=type, limit=limit)
    _show(call, rows)


def redeliver(
    call: Call,
    event_id: Annotated[int | None, typer.Argument(metavar="[ID]", min=1, help="The event of a dead letter.")] = None,
    subscriber: Subscriber = None,
    type: Type = None,
    all: Annotated[bool, typer.Option("--all", help="All dead letters instead of one event's.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say which it would be.")] = False,
) -> None:
    """Deliver dead letters once more; they come out of order."""
    if (event_id is None) == (not all):
        raise UsageError("name the event of a dead letter, or say --all; `ael events dead` lists them")
    if type is not None and not all:
        raise UsageError("--type goes with --all; an event has its type")
    if dry_run:
        _show(call, _wanted(call, event_id, subscriber, type))
        return
    answer = call.change("events.redeliver", event_id=event_id, subscriber=subscriber, type=type, all=all)
    if call.json:
        print_json(answer)
        return
    for line in _told(answer):
        say(line)


def _wanted(call: Call, event_id: int | None, subscriber: str | None, type: str | None) -> list[dict[str, Any]]:
    """Return what `redeliver` would take up."""
    with call.reader() as reader:
        rows = reader.dead_letters(subscriber=subscriber, type=type, event_id=event_id, limit=MOST_SHOWN)
    if event_id is not None and not rows:
        raise DeadLetterNotFound(f"event {event_id} is no dead letter; `ael events dead` lists those that there are")
    return [row for row in rows if row["requested_at"] is None]


def _told(answer: dict[str, Any]) -> list[str]:
    """Return the answer of the loop, or of the command that did without one, in words."""
    requested, already = answer["requested"], answer["already"]
    if not requested:
        return [f"{already} of them are asked for already" if already else "there are no dead letters"]
    if not answer["running"]:
        moment = "the next loop delivers"
    elif answer["paused"]:
        moment = "after `ael resume` the loop delivers"
    else:
        moment = "the loop now delivers"
    what = "1 dead letter" if requested == 1 else f"{requested} dead letters"
    lines = [f"{moment} {what} again, out of order (committed)"]
    lines += [f"those of {printable(name)} wait: it is {reason}" for name, reason in answer["waiting"].items()]
    if already:
        lines.append(f"{already} more are asked for already")
    if answer["more"]:
        lines.append("there are more; say it again when these are delivered")
    return lines


def _show(call: Call, rows: list[dict[str, Any]]) -> None:
    if call.json:
        print_json([decoded(row, "data", "metadata") for row in rows])
        return
    columns = (
        Column("subscriber"),
        Column("event_id", right=True),
        Column("type"),
        Column("attempts", right=True),
        Column("failed_at"),
        Column("requested_at"),
        Column("error", shrinks=True),
    )
    cells = (
        (
            row["subscriber"],
            number(row["event_id"]),
            row["type"],
            number(row["attempts"]),
            when(row["failed_at"]),
            when(row["requested_at"]),
            row["error"],
        )
        for row in rows
    )
    print_table(columns, cells, empty="no dead letters")

"""`ael events`: what happened, as it happens, and making something happen."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ael_store.cli.agents import confirm
from ael_store.cli.arguments import read_json
from ael_store.cli.call import Call
from ael_store.cli.command import command, group
from ael_store.cli.completion import complete
from ael_store.cli.dead_letters import dead, redeliver
from ael_store.cli.export import export_events
from ael_store.cli.output import (
    Column,
    colored,
    decoded,
    flush,
    json_cell,
    number,
    print_json,
    print_json_line,
    print_table,
    say,
    when,
)
from ael_store.errors import AelError, DatabaseNotUsable, UsageError
from ael_store.telemetry import printable

if TYPE_CHECKING:
    from ael_store.store.reader import Reader

__all__ = ["add_to"]


class EventNotFound(AelError, LookupError):
    """The log has no such event."""


POLL_S = 0.2
PAGE = 1000

Type = Annotated[
    str | None,
    typer.Option(
        "--type", metavar="TYPE", help="Only this type; * stands for any text.", autocompletion=complete("event type")
    ),
]
Source = Annotated[str | None, typer.Option("--source", metavar="NAME", help="Only from this source.")]
SinceId = Annotated[
    int | None, typer.Option("--since-id", metavar="ID", min=0, help="Only events after this one, oldest first.")
]


def add_to(app: typer.Typer) -> None:
    """Add the commands of this noun."""
    events = group(app, "events", "Read the event log, follow it, and emit.")
    command(events, "list")(list_events)
    command(events, "tail")(tail)
    command(events, "emit", values=True)(emit)
    command(events, "redact")(redact)
    command(events, "dead")(dead)
    command(events, "redeliver")(redeliver)
    command(events, "export")(export_events)


def list_events(
    call: Call,
    type: Type = None,
    source: Source = None,
    since_id: SinceId = None,
    limit: Annotated[int, typer.Option("--limit", metavar="N", min=1, help="Most events to show.")] = 100,
) -> None:
    """Show the newest events, oldest first."""
    with call.reader() as reader:
        rows = reader.events(type=type, source=source, after=since_id, limit=limit)
    if call.json:
        print_json([_decoded(row) for row in rows])
        return
    columns = (
        Column("id", right=True),
        Column("emitted_at"),
        Column("iteration", right=True),
        Column("type"),
        Column("source"),
        Column("data", shrinks=True),
    )
    print_table(columns, map(_cells, rows), empty="no such events")


def tail(
    call: Call,
    type: Type = None,
    source: Source = None,
    since_id: SinceId = None,
    limit: Annotated[int, typer.Option("--limit", metavar="N", min=0, help="How many past events to begin with.")] = 10,
) -> None:
    """Show the last events and follow the log until Ctrl-C."""
    try:
        with call.reader() as reader:
            for row in _follow(reader, type, source, since_id, limit):
                if call.json:
                    print_json_line(_decoded(row))
                else:
                    _print_line(row)
    except KeyboardInterrupt:
        return


def _follow(
    reader: Reader, type: str | None, source: str | None, since_id: int | None, limit: int
) -> Iterator[dict[str, Any]]:
    """Yield events as they are committed, without end."""
    file = _identity(reader)
    last = _newest(reader) if since_id is None else since_id
    if since_id is None and limit:
        past = reader.events(type=type, source=source, limit=limit)
        yield from past
        last = max([last, *(row["id"] for row in past)])
    while True:
        # Read before the events are: what does not match is not looked at again.
        newest = _newest(reader)
        if newest > last:
            found = reader.events(type=type, source=source, after=last, limit=PAGE)
            yield from found
            last = found[-1]["id"] if len(found) == PAGE else max([newest, *(row["id"] for row in found)])
            continue
        time.sleep(POLL_S)
        if _identity(reader) != file:
            raise DatabaseNotUsable(f"{reader.path} was replaced or removed meanwhile: start again")


def _newest(reader: Reader) -> int:
    return reader.last_ids(["events"])["events"]


def _identity(reader: Reader) -> tuple[int, int] | None:
    """Say which file the database is."""
    try:
        found = os.stat(reader.path)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def emit(
    call: Call,
    type: Annotated[
        str, typer.Argument(metavar="TYPE", help="The type of the event.", autocompletion=complete("event type"))
    ],
    data: Annotated[
        str | None, typer.Argument(metavar="[JSON]", help="Its data as JSON; - reads it from stdin.")
    ] = None,
    metadata: Annotated[str | None, typer.Option("--metadata", metavar="JSON", help="Its metadata, an object.")] = None,
    source: Annotated[str, typer.Option("--source", metavar="NAME", help="Who it is from.")] = "outside",
) -> None:
    """Emit an event; it is delivered once, as those of agents are."""
    arguments: dict[str, Any] = {"type": type, "source": source}
    if data is not None:
        arguments["data"] = read_json(data, f"data of {type!r}")
    if metadata is not None:
        arguments["metadata"] = read_json(metadata, f"metadata of {type!r}")
        if not isinstance(arguments["metadata"], dict):
            raise UsageError(f"metadata of {type!r} is {metadata!r}; wanted is a JSON object")
    event_id = call.change("events.emit", **arguments)
    if call.json:
        print_json({"id": event_id, "type": type, "source": source})
    else:
        say(f"emitted {printable(type)} as event {event_id} (committed)")


def redact(
    call: Call,
    event_id: Annotated[int, typer.Argument(metavar="ID", min=1, help="The event.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Blank the data and metadata of an event for good."""
    with call.reader() as reader:
        found = reader.events(after=event_id - 1, limit=1)
        if not found or found[0]["id"] != event_id:
            raise EventNotFound(f"there is no event {event_id} in {reader.path}")
    what = f"event {event_id} ({found[0]['type']} from {found[0]['source']})"
    if not dry_run:
        confirm(f"Blank {what} for good? Nothing brings it back but a backup.", yes)
        call.change("events.redact", id=event_id)
    if call.json:
        print_json({"id": event_id, "type": found[0]["type"], "changed": not dry_run})
    elif dry_run:
        say(f"would blank {printable(what)}")
    else:
        say(f"blanked {printable(what)} (committed); backups made before still have it")


# -- the small things -------------------------------------------------------------------------------


def _decoded(row: dict[str, Any]) -> dict[str, Any]:
    return decoded(row, "data", "metadata")


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        str(row["id"]),
        when(row["emitted_at"]),
        number(row["iteration"]),
        row["type"],
        row["source"],
        json_cell(row["data"]),
    )


def _print_line(row: dict[str, Any]) -> None:
    """Print an event in one line, at once."""
    id_, moment, iteration, type, source, data = map(printable, _cells(row))
    say("  ".join([colored(moment, "dim"), f"{id_:>6}", f"{iteration:>6}", colored(type, "cyan"), source, data]))
    flush()

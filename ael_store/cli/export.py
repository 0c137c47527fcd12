"""`ael … export`: the state, and the logs of what happened, as JSON lines, CSV or JSON.

Rows are read and written piece by piece, so a million of them need no memory and keep no loop waiting.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import orjson
import typer

from ael_store.cli.arguments import At
from ael_store.cli.call import Call
from ael_store.cli.command import command, group
from ael_store.cli.completion import complete
from ael_store.cli.destination import STDOUT, destination, is_stdout
from ael_store.cli.output import csv_line, note, on_terminal, print_json, progress, say
from ael_store.errors import UsageError
from ael_store.telemetry import printable, printable_json

__all__ = ["ENDINGS", "FORMATS", "add_to", "export_events", "export_metrics", "export_state", "export_tasks", "text_of"]

FORMATS = ("jsonl", "csv", "json")
ENDINGS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".json": "json"}

Row = Mapping[str, Any]
Piece = tuple[Sequence[Row], float]
"""Some rows, and which part of the whole is done with them, from 0 to 1."""

Format = Annotated[
    str | None,
    typer.Option("--format", metavar="FORMAT", help="jsonl, csv or json. Default: as FILE ends, else jsonl."),
]
Output = Annotated[Path, typer.Option("--output", metavar="FILE", help="A new file; - is stdout.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")]
Since = Annotated[
    str | None, typer.Option("--since", metavar="MOMENT", help="Only from this iteration or ISO time on.")
]
Until = Annotated[str | None, typer.Option("--until", metavar="MOMENT", help="Only up to this iteration or ISO time.")]
SinceId = Annotated[int | None, typer.Option("--since-id", metavar="ID", min=0, help="Only what follows this number.")]
Agent = Annotated[
    str | None, typer.Option("--agent", metavar="NAME", help="Only of this agent.", autocompletion=complete("agent"))
]


def add_to(app: typer.Typer) -> None:
    """Add the nouns that have nothing but this verb."""
    command(group(app, "history", "Export every change of the state."), "export")(export_history)
    command(group(app, "ticks", "Export the units of work."), "export")(export_ticks)


# -- the commands -----------------------------------------------------------------------------------


def export_state(
    call: Call,
    prefix: Annotated[
        str, typer.Argument(metavar="[PREFIX]", help="Only keys that begin so.", autocompletion=complete("key"))
    ] = "",
    at: At = None,
    format: Format = None,
    output: Output = STDOUT,
    force: Force = False,
) -> None:
    """Write every key with its value, as `ael state import` reads it."""
    from ael_store.store.export import values_at

    target = _Target(call, output, _format_of(call, format, output), force)
    with call.reader() as reader:
        moment = reader.moment(at)
        known = reader.rows("SELECT count(*) AS keys FROM keys")[0]["keys"]

        def pieces() -> Iterator[Piece]:
            written = 0
            for found in values_at(reader, moment, prefix):
                written += len(found)
                yield [{"key": key, "value": value} for key, value in found], written / known

        target.write(pieces(), ("key", "value"), ("value",), as_object=target.format == "json")


def export_history(
    call: Call,
    key: Annotated[
        str | None, typer.Option("--key", metavar="KEY", help="Only of this key.", autocompletion=complete("key"))
    ] = None,
    agent: Agent = None,
    since: Since = None,
    until: Until = None,
    since_id: SinceId = None,
    format: Format = None,
    output: Output = STDOUT,
    force: Force = False,
) -> None:
    """Write every change of the state, oldest first."""
    _export(call, "history", since, until, since_id, format, output, force, key=key, agent=agent)


def export_events(
    call: Call,
    type: Annotated[
        str | None,
        typer.Option(
            "--type", metavar="TYPE", help="Only this type; * is any text.", autocompletion=complete("event type")
        ),
    ] = None,
    source: Annotated[str | None, typer.Option("--source", metavar="NAME", help="Only from this source.")] = None,
    since: Since = None,
    until: Until = None,
    since_id: SinceId = None,
    format: Format = None,
    output: Output = STDOUT,
    force: Force = False,
) -> None:
    """Write every event, oldest first."""
    _export(call, "events", since, until, since_id, format, output, force, type=type, source=source)


def export_ticks(
    call: Call,
    agent: Agent = None,
    since: Since = None,
    until: Until = None,
    since_id: SinceId = None,
    format: Format = None,
    output: Output = STDOUT,
    force: Force = False,
) -> None:
    """Write every unit of work that left a trace, oldest first."""
    _export(call, "ticks", since, until, since_id, format, output, force, agent=agent)


def export_tasks(
    call: Call,
    agent: Agent = None,
    since: Since = None,
    until: Until = None,
    since_id: SinceId = None,
    format: Format = None,
    output: Output = STDOUT,
    force: Force = False,
) -> None:
    """Write every task, oldest first."""
    _export(call, "tasks", since, until, since_id, format, output, force, agent=agent)


def export_metrics(
    call: Call,
    channel: Annotated[str | None, typer.Option("--channel", metavar="NAME", help="Only of this channel.")] = None,
    name: Annotated[str | None, typer.Option("--name", metavar="NAME", help="Only of this metric.")] = None,
    since: Since = None,
    until: Until = None,
    since_id: SinceId = None,
    format: Format = None,
    output: Output = STDOUT,
    force: Force = False,
) -> None:
    """Write every sample of every metric, oldest first."""
    _export(call, "metrics", since, until, since_id, format, output, force, channel=channel, name=name)


def _export(
    call: Call,
    noun: str,
    since: str | None,
    until: str | None,
    since_id: int | None,
    format: str | None,
    output: Path,
    force: bool,
    **wanted: str | None,
) -> None:
    from ael_store.store.export import LOGS, Span, columns_of, pieces_of, span_of

    if since is not None and since_id is not None:
        raise UsageError("--since and --since-id exclude each other")
    target = _Target(call, output, _format_of(call, format, output), force)
    log = LOGS[noun]
    with call.reader() as reader:
        span = span_of(reader, log, since, until)
        if since_id is not None:
            span = Span(since_id, span.until)
        elif since is None and (began := reader.horizon().iteration):
            note(f"the history begins with iteration {began + 1}; what was before it was removed")
        conditions = {column: value for column, value in wanted.items() if value is not None}

        def pieces() -> Iterator[Piece]:
            for piece in pieces_of(reader, log, span, conditions):
                yield piece.rows, (piece.reached - span.after) / (span.until - span.after)

        target.write(pieces(), columns_of(reader, log), log.json_columns)


def _format_of(call: Call, format: str | None, output: Path) -> str:
    """Return how to write: as told, else as the name of the file says, else as `--json` says, else JSON lines."""
    if format is not None and format not in FORMATS:
        raise UsageError(f"there is no format {format!r}; there are {', '.join(FORMATS)}")
    if not is_stdout(output):
        return format or ENDINGS.get(output.suffix.lower(), "jsonl")
    if call.json and format not in (None, "json"):
        raise UsageError(f"--json and --format {format} exclude each other where the data goes to stdout")
    return "json" if call.json else format or "jsonl"


# -- writing ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Target:
    """Where an export goes, and how it is written."""

    call: Call
    output: Path
    format: str
    force: bool

    def write(
        self, pieces: Iterator[Piece], columns: Sequence[str], json_columns: Sequence[str], *, as_object: bool = False
    ) -> None:
        """Write rows as they come and tell how far it is; `as_object` makes one object of keys and values."""
        tell, written = progress(), 0

        def rows() -> Iterator[Row]:
            nonlocal written
            for found, part in pieces:
                yield from found
                written += len(found)
                tell(f"{written} rows, {min(part, 1.0):.0%}")

        to_stdout = is_stdout(self.output)
        lines = text_of(self.format, rows(), columns, json_columns, as_object=as_object, to_stdout=to_stdout)
        with destination(self.output, self.call.path, force=self.force) as put:
            for line in lines:
                put(line)
        if to_stdout:
            return
        if self.call.json:
            print_json({"path": str(self.output.absolute()), "format": self.format, "rows": written})
        else:
            say(f"{printable(str(self.output))}: {written} rows")


def text_of(
    format: str,
    rows: Iterator[Row],
    columns: Sequence[str],
    json_columns: Sequence[str],
    *,
    as_object: bool = False,
    to_stdout: bool = False,
) -> Iterator[str]:
    """Yield rows as lines of text, as they come: exactly, except that a terminal gets nothing that it would act on."""
    if format == "csv":
        escapes = to_stdout and on_terminal()
        for cells in chain([columns], (row.values() for row in rows)):
            yield csv_line(["" if cell is None else printable(str(cell)) for cell in cells] if escapes else cells)
        return
    if as_object:
        lines = _enclosed((f"{_json(row['key'])}:{row['value']}" for row in rows), "{}")
    else:
        lines = (_json(_with_values(row, json_columns)) for row in rows)
        lines = lines if format == "jsonl" else _enclosed(lines, "[]")
    for line in lines:
        yield f"{printable_json(line) if to_stdout else line}\n"


def _json(value: Any) -> str:
    return orjson.dumps(value).decode()


def _with_values(row: Row, json_columns: Sequence[str]) -> dict[str, Any]:
    """Return a row with the JSON text of some columns as it stands, not as a text that holds JSON."""
    return {
        name: orjson.Fragment(cell) if name in json_columns and cell is not None else cell for name, cell in row.items()
    }


def _enclosed(texts: Iterator[str], brackets: str) -> Iterator[str]:
    """Yield the lines of one JSON value, each text on a line of its own."""
    yield brackets[0]
    before = next(texts, None)
    for text in texts:
        yield f"{before},"
        before = text
    if before is not None:
        yield before
    yield brackets[1]

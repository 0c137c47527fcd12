"""`ael metrics`: what agents measure."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ael_store.cli.arguments import nearest
from ael_store.cli.call import Call
from ael_store.cli.command import command, group
from ael_store.cli.export import export_metrics
from ael_store.cli.output import Column, number, print_json, print_table, when
from ael_store.errors import UsageError

__all__ = ["add_to"]


def add_to(app: typer.Typer) -> None:
    """Add the commands of this noun."""
    metrics = group(app, "metrics", "Look at what agents measure.")
    command(metrics, "list")(list_metrics)
    command(metrics, "show")(show)
    command(metrics, "export")(export_metrics)


def list_metrics(
    call: Call, channel: Annotated[str | None, typer.Argument(metavar="[CHANNEL]", help="Only this channel.")] = None
) -> None:
    """List metrics and what they stand at."""
    with call.reader() as reader:
        rows = reader.metrics(channel)
        if not rows and channel is not None:
            known = list(dict.fromkeys(row["channel"] for row in reader.metrics()))
            hint = nearest(channel, known) or f"; channels are {', '.join(known) or 'none'}"
            raise UsageError(f"no metric was recorded in channel {channel!r}{hint}")
    if call.json:
        print_json(rows)
        return
    columns = (
        Column("channel"),
        Column("name"),
        Column("kind"),
        Column("value", right=True),
        Column("samples", right=True),
        Column("updated"),
    )
    cells = (
        (
            row["channel"],
            row["name"],
            row["kind"],
            _value(row["value"], row["kind"]),
            number(row["samples"]),
            when(row["updated_at"]),
        )
        for row in rows
    )
    print_table(columns, cells, empty="no metrics: an agent records one with context.metrics.gauge(NAME, VALUE)")


def show(
    call: Call,
    channel: Annotated[str, typer.Argument(metavar="CHANNEL", help="Its channel: the agent that records it.")],
    name: Annotated[str, typer.Argument(metavar="NAME", help="Its name.")],
    hours: Annotated[bool, typer.Option("--hours", help="By the hour instead of the samples.")] = False,
    limit: Annotated[int, typer.Option("--limit", metavar="N", min=1, help="The newest N, 48 hours by default.")] = 48,
) -> None:
    """Show the newest samples of a metric, or its hours, oldest first."""
    with call.reader() as reader:
        rows = reader.metric_hours(channel, name, limit) if hours else reader.samples(channel, name, limit)
        metric = next((row for row in reader.metrics(channel) if row["name"] == name), None)
        if metric is None:
            known = [f"{row['channel']} {row['name']}" for row in reader.metrics()]
            hint = nearest(f"{channel} {name}", known) or "; `ael metrics list` lists them"
            raise UsageError(f"there is no metric {name!r} in channel {channel!r}{hint}")
    if call.json:
        print_json(rows)
    elif hours:
        _show_hours(rows, metric["kind"])
    else:
        columns = (Column("recorded"), Column("value", right=True), Column("agent"), Column("iteration", right=True))
        cells = (
            (when(row["recorded_at"]), _value(row["value"], metric["kind"]), row["agent"], number(row["iteration"]))
            for row in rows
        )
        print_table(columns, cells, empty="its samples were removed; --hours shows what is kept")


def _show_hours(rows: list[dict[str, Any]], kind: str) -> None:
    columns = ("total",) if kind == "counter" else ("min", "mean", "max", "last")
    cells = (
        (when(row["hour"]), number(row["samples"]), *(_value(row[column], kind) for column in columns)) for row in rows
    )
    print_table(
        (Column("hour"), Column("samples", right=True), *(Column(column, right=True) for column in columns)),
        cells,
        empty="",
    )


def _value(value: float, kind: str) -> str:
    """Return a number as people read it; of a timing with its unit."""
    text = number(int(value)) if value.is_integer() and abs(value) < 1e15 else f"{value:.6g}"
    return f"{text} s" if kind == "timing" else text

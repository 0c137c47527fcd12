"""`ael sql`: one SELECT, read-only."""

from __future__ import annotations

import csv
import io
import math
import os
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from ael_store.cli.call import Call
from ael_store.cli.command import command
from ael_store.cli.failure import complain
from ael_store.cli.output import Column, on_terminal, print_json_rows, print_table, write
from ael_store.errors import AelError, UsageError
from ael_store.telemetry import printable

__all__ = ["add_to"]


def add_to(app: typer.Typer) -> None:
    """Add this command."""
    command(app, "sql", values=True)(sql)


def sql(
    call: Call,
    statement: Annotated[str, typer.Argument(metavar="SELECT", help="One statement; - reads it from stdin.")],
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    timeout: Annotated[
        float, typer.Option("--timeout", metavar="SECONDS", help="How long SQLite may work on it.")
    ] = 10.0,
) -> None:
    """Answer one SQL statement that only reads."""
    from ael_store.store.query import query

    if as_csv and call.json:
        raise UsageError("--csv and --json exclude each other")
    if not (math.isfinite(timeout) and timeout > 0):
        raise UsageError(f"--timeout is {timeout:g}; wanted is a number of seconds above 0")
    text = sys.stdin.read() if statement == "-" else statement
    call.check_revision()
    rows: Iterator[Any] = query(call.path, text, timeout_s=timeout, give_up=_end)
    names = next(rows)
    if call.json:
        keys = _unique(names)
        print_json_rows({key: _value(cell) for key, cell in zip(keys, row, strict=True)} for row in rows)
    elif as_csv:
        _print_csv(names)
        for row in rows:
            _print_csv([_text(cell) for cell in row])
    else:
        columns = [Column(name) for name in names]
        print_table(columns, ([_text(cell) for cell in row] for row in rows))


def _end(error: AelError) -> None:
    """End the process: SQLite is inside something that nothing else ends."""
    complain(str(error))
    os._exit(error.exit_code)


def _print_csv(cells: list[str]) -> None:
    """Print a line as programs read it: exactly, except that a terminal gets no control characters."""
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow([printable(cell) for cell in cells] if on_terminal() else cells)
    write(line.getvalue())


def _unique(names: list[str]) -> list[str]:
    """Return names of which none comes twice, so that no column is lost in an object."""
    seen: dict[str, int] = {}
    unique = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        unique.append(name if seen[name] == 1 else f"{name}_{seen[name]}")
    return unique


def _value(cell: Any) -> Any:
    """Return a cell for JSON; bytes and infinity have no other form there than text."""
    if isinstance(cell, bytes) or (isinstance(cell, float) and not math.isfinite(cell)):
        return _text(cell)
    return cell


def _text(cell: Any) -> str:
    if cell is None:
        return ""
    return f"x'{cell.hex()}'" if isinstance(cell, bytes) else str(cell)

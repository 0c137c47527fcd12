"""`ael sql`: one SELECT, read-only."""

from __future__ import annotations

import math
import os
import shutil
import sys
from collections.abc import Iterator
from itertools import chain, islice
from typing import Annotated, Any

import typer

from ael_store.cli.call import Call
from ael_store.cli.command import command
from ael_store.cli.failure import complain
from ael_store.cli.output import (
    GAP,
    PAGE,
    Column,
    colored,
    csv_line,
    note,
    on_terminal,
    print_json_rows,
    print_table,
    write,
)
from ael_store.errors import AelError, UsageError
from ael_store.telemetry import printable

__all__ = ["add_to"]

WIDE = 27
"""Characters that a column of a table gets on a terminal, if it has so many: a time is not cut."""


def add_to(app: typer.Typer) -> None:
    """Add this command."""
    command(app, "sql", values=True)(sql)


def sql(
    call: Call,
    statement: Annotated[
        str | None, typer.Argument(metavar="[SELECT]", help="One statement; - reads it from stdin.")
    ] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    timeout: Annotated[
        float, typer.Option("--timeout", metavar="SECONDS", help="How long SQLite may work on it.")
    ] = 10.0,
) -> None:
    """Answer one SQL statement that only reads."""
    from ael_store.store.query import query

    if statement is None:
        _introduce()
        raise typer.Exit(2)
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
        for line in chain([names], ([_text(cell) for cell in row] for row in rows)):
            write(csv_line([printable(cell) for cell in line] if on_terminal() else line))
    elif on_terminal():
        _print_for_people(names, rows)
    else:
        print_table([Column(name) for name in names], ([_text(cell) for cell in row] for row in rows))


def _introduce() -> None:
    """Say what there is to ask, on stderr as the help for other wrong usage."""
    from ael_store.schema.sqlite_views import ABOUT

    width = max(map(len, ABOUT))
    note("These views keep their names and columns from version to version:")
    note("")
    for view, about in ABOUT.items():
        note(f"  {view:{width}}  {about}")
    note("")
    note("Ask like this:")
    note("")
    note('  ael sql "SELECT * FROM v_events ORDER BY id DESC LIMIT 10"')
    note("  ael sql \"SELECT key, value FROM v_state WHERE agent = 'NAME'\" --json")
    note("  ael sql \"SELECT name FROM pragma_table_info('v_state')\"")


def _end(error: AelError) -> None:
    """End the process: SQLite is inside something that nothing else ends."""
    complain(str(error))
    os._exit(error.exit_code)


def _print_for_people(names: list[str], rows: Iterator[Any]) -> None:
    """Print a table where it fits the terminal, wide cells cut; else each row as lines of name and value, whole."""
    first = list(islice(rows, PAGE))
    columns, least = [], GAP * (len(names) - 1)
    for place, name in enumerate(names):
        cells = [row[place] for row in first if row[place] is not None]
        width = max((len(_text(cell)) for cell in cells), default=0)
        numbers = bool(cells) and all(isinstance(cell, int | float) for cell in cells)
        columns.append(Column(name, right=numbers, shrinks=width > WIDE and len(names) > 1))
        least += max(len(name), min(width, WIDE))
    rows = chain(first, rows)
    if len(names) > 1 and least > shutil.get_terminal_size().columns:
        _print_records(names, rows)
    else:
        print_table(columns, ([_text(cell) for cell in row] for row in rows))


def _print_records(names: list[str], rows: Iterator[Any]) -> None:
    width = max(map(len, names))
    for number, row in enumerate(rows):
        write("\n" if number else "")
        for name, cell in zip(names, row, strict=True):
            write(f"{colored(printable(name).ljust(width), 'bold')}  {printable(_text(cell))}\n")


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

"""What commands print: JSON, tables, values. Data goes to stdout, messages to stderr.

On a terminal tables have colours and cut long values; piped they are tab-separated with one header line, and
complete. Keys, payloads and messages come from anywhere, so each is shown as text: nothing in them is markup,
and what a terminal would act on is escaped.
"""

from __future__ import annotations

import csv
import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import orjson

from ael_store.errors import StorageFailed
from ael_store.telemetry import printable, printable_json

__all__ = [
    "Column",
    "ReaderGone",
    "colored",
    "csv_line",
    "decoded",
    "flush",
    "json_cell",
    "milliseconds",
    "note",
    "number",
    "on_terminal",
    "pretty",
    "print_json",
    "print_json_line",
    "print_json_rows",
    "print_table",
    "progress",
    "say",
    "size",
    "when",
    "write",
]


class ReaderGone(Exception):
    """Who read our output has seen enough, as in `ael events list | head`."""


PAGE = 1000
"""Rows of a table on a terminal whose widths are computed together."""

GAP = 2
"""Spaces between the columns of a table."""
NARROWEST = 8

COLORS = {"red": "31", "green": "32", "yellow": "33", "cyan": "36", "bold": "1", "dim": "2"}


def on_terminal() -> bool:
    """True where a person looks at stdout."""
    return sys.stdout.isatty()


def colored(text: str, color: str) -> str:
    """Return a text in a colour where stdout has colours."""
    if not text or not color or not on_terminal() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return text
    return f"\x1b[{COLORS[color]}m{text}\x1b[0m"


# -- text -------------------------------------------------------------------------------------------


def say(text: str) -> None:
    """Print a line for people on stdout."""
    write(f"{text}\n")


def note(text: str) -> None:
    """Print a message or progress on stderr."""
    print(printable(text), file=sys.stderr, flush=True)


def progress() -> Callable[[str], None]:
    """Return what tells of the steps of long work on stderr: nothing in the first second, then a line a second."""
    last = time.monotonic()

    def tell(line: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= 1.0:
            last = now
            note(line)

    return tell


def flush() -> None:
    """Hand over to the system what was printed; raises StorageFailed where that fails."""
    try:
        sys.stdout.flush()
    except OSError as error:
        raise _failed(error) from None


def write(text: str) -> None:
    """Print a text on stdout as it is; raises StorageFailed where that fails."""
    try:
        try:
            sys.stdout.write(text)
        except UnicodeEncodeError:
            # As JSON escapes it, because in JSON all that is not ASCII stands in strings.
            sys.stdout.write("".join(c if c.isascii() else json.dumps(c)[1:-1] for c in text))
    except OSError as error:
        raise _failed(error) from None


def _failed(error: OSError) -> Exception:
    if isinstance(error, BrokenPipeError):
        return ReaderGone()
    return StorageFailed(f"standard output can't be written: {error.strerror}")


# -- JSON -------------------------------------------------------------------------------------------


def print_json(value: Any) -> None:
    """Print a value as JSON: indented on a terminal, in one line otherwise."""
    if on_terminal():
        say(pretty(value))
    else:
        say(printable_json(orjson.dumps(value).decode()))


def print_json_rows(rows: Iterable[Any]) -> None:
    """Print an array of values, each on a line of its own, as they come."""
    between = "["
    for row in rows:
        write(between + "\n" * on_terminal() + printable_json(orjson.dumps(row).decode()))
        between = ","
    say("[]" if between == "[" else "\n]" if on_terminal() else "]")


def print_json_line(value: Any) -> None:
    """Print a value as one line of JSON, at once."""
    write(printable_json(orjson.dumps(value).decode()) + "\n")
    flush()


def pretty(value: Any) -> str:
    """Return a value as JSON text for people, in several lines."""
    return printable_json(orjson.dumps(value, option=orjson.OPT_INDENT_2).decode(), keep="\n")


def decoded(row: Mapping[str, Any], *columns: str) -> dict[str, Any]:
    """Return a row with the JSON text of some columns as values."""
    return {
        name: orjson.loads(value) if name in columns and value is not None else value for name, value in row.items()
    }


# -- CSV --------------------------------------------------------------------------------------------


def csv_line(cells: Iterable[Any]) -> str:
    """Return a line of CSV with its end, `\\n`; None is an empty cell."""
    line = io.StringIO(newline="")
    csv.writer(line, lineterminator="\r\n").writerow(cells)  # it quotes only the ends of lines that it knows
    return f"{line.getvalue()[:-2]}\n"


# -- cells ------------------------------------------------------------------------------------------


LONGEST_CELL = 1000
"""Characters of a value that a terminal gets at most; it cuts them to its width."""


def json_cell(text: str | None) -> str:
    """Return JSON text for a cell, nothing for None."""
    if text is None:
        return ""
    if len(text) > LONGEST_CELL and on_terminal():
        text = f"{text[:LONGEST_CELL]}…"
    return printable_json(text)


def number(value: int | None) -> str:
    """Return a number for a cell, nothing for None."""
    return "" if value is None else str(value)


def when(moment: str | None) -> str:
    """Return a time of the views for a cell: to the second on a terminal, whole otherwise."""
    if moment is None:
        return ""
    return f"{moment[:10]} {moment[11:19]}" if on_terminal() else moment


def milliseconds(duration: float | None) -> str:
    """Return a duration for a cell."""
    return "" if duration is None else f"{duration:.3f}" if duration < 10 else f"{duration:.1f}"


def size(count: float) -> str:
    """Return a number of bytes for people."""
    if count < 1000:
        return f"{count} bytes"
    units = ["kB", "MB", "GB"]
    while (count := count / 1000) >= 1000 and len(units) > 1:
        del units[0]
    return f"{count:.1f} {units[0]}"


# -- tables -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a table."""

    title: str
    right: bool = False
    shrinks: bool = False
    """May be cut on a terminal."""
    colors: Mapping[str, str] = field(default_factory=dict)
    """Colours of certain texts."""


def print_table(columns: Sequence[Column], rows: Iterable[Sequence[str]], empty: str = "") -> None:
    """Print rows under a header; where there are none, `empty` is said on stderr."""
    rows = iter(rows)
    page = list(islice(rows, PAGE))
    if not page and empty:
        note(empty)
    if not page and on_terminal():
        return
    if not on_terminal():
        write("\t".join(column.title for column in columns) + "\n")
    while page:
        if on_terminal():
            _print_page(columns, page)
        else:
            write("".join("\t".join(map(printable, row)) + "\n" for row in page))
        page = list(islice(rows, PAGE))


def _print_page(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
    from rich.cells import cell_len
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(markup=False, highlight=False, emoji=False)
    cells = [[printable(cell) for cell in row] for row in rows]
    widths = [
        max(cell_len(column.title), *(cell_len(row[place]) for row in cells)) for place, column in enumerate(columns)
    ]
    firm = sum(width for column, width in zip(columns, widths, strict=True) if not column.shrinks)
    left = console.width - firm - GAP * (len(columns) - 1)
    share = max(NARROWEST, left // max(1, sum(column.shrinks for column in columns)))

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, GAP, 0, 0))
    any_shrinks = any(column.shrinks for column in columns)
    for column in columns:
        table.add_column(
            column.title,
            justify="right" if column.right else "left",
            no_wrap=any_shrinks,
            overflow="ellipsis" if any_shrinks else "fold",
            max_width=share if column.shrinks else None,
        )
    for row in cells:
        table.add_row(
            *(Text(cell, style=column.colors.get(cell, "")) for column, cell in zip(columns, row, strict=True))
        )
    console.print(table)

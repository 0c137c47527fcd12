"""`ael state diff`: what is different between two moments, or between two databases."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ael_store.cli.call import Call
from ael_store.cli.output import Column, json_cell, print_json, print_table
from ael_store.errors import UsageError
from ael_store.model.values import decode, same

if TYPE_CHECKING:
    from ael_store.store.moment import Moment
    from ael_store.store.reader import Reader

__all__ = ["diff"]

COLORS = {"added": "green", "removed": "red", "changed": "yellow"}

Side = "a moment (an iteration, an ISO time), a database, or PATH@MOMENT"


@dataclass(frozen=True, slots=True)
class _Difference:
    """One key whose values differ: JSON text, None for no value."""

    key: str
    old: str | None
    new: str | None

    @property
    def change(self) -> str:
        return "added" if self.old is None else "removed" if self.new is None else "changed"


def diff(
    call: Call,
    one: Annotated[str, typer.Argument(metavar="A", help=f"From: {Side}.")],
    other: Annotated[str | None, typer.Argument(metavar="[B]", help="To: the same; the database as it is now.")] = None,
    prefix: Annotated[str, typer.Option("--prefix", metavar="PREFIX", help="Only keys that begin so.")] = "",
) -> None:
    """Show which keys differ between two moments or two databases."""
    first, first_at = _side(one)
    second, second_at = _side(other)
    with ExitStack() as stack:
        first_reader = stack.enter_context(call.reader(first))
        second_reader = first_reader
        if first != second:
            second_reader = stack.enter_context(call.reader(second))
        if first_reader.path == second_reader.path:
            found = _between(first_reader, first_reader.moment(first_at), first_reader.moment(second_at), prefix)
        else:
            before = _values(first_reader, first_reader.moment(first_at), prefix)
            found = _compared(before, _values(second_reader, second_reader.moment(second_at), prefix))
    if call.json:
        print_json(
            [
                {
                    "key": row.key,
                    "change": row.change,
                    "old": None if row.old is None else decode(row.old),
                    "new": None if row.new is None else decode(row.new),
                }
                for row in found
            ]
        )
        return
    columns = (
        Column("key"),
        Column("change", colors=COLORS),
        Column("old", shrinks=True),
        Column("new", shrinks=True),
    )
    rows = ((row.key, row.change, json_cell(row.old), json_cell(row.new)) for row in found)
    print_table(columns, rows, empty="nothing is different")


def _side(text: str | None) -> tuple[Path | None, int | str | None]:
    """Return the database of an argument, None for that of the command, and the moment, None for now."""
    from ael_store.store.moment import read_moment

    if text is None:
        return None, None
    try:
        read_moment(text)
    except UsageError:
        pass
    else:
        return None, text
    if (found := _database(text)) is not None:
        return found, None
    path, _, moment = text.rpartition("@")
    if path and (found := _database(path)) is not None:
        read_moment(moment)
        return found, moment
    raise UsageError(
        f"{text!r} is neither a moment (412, 2026-01-31T12:00:00Z) nor a database that exists (PATH, PATH@412)"
    )


def _database(text: str) -> Path | None:
    """Return the file that a path or a URL names, None where there is none."""
    from ael_store.store.sqlite import database_path

    try:
        path = database_path(text)
    except UsageError:
        return None
    return path if path.exists() else None


def _between(reader: Reader, one: Moment, other: Moment, prefix: str) -> list[_Difference]:
    """Return what differs between two moments of one database; costs what was changed between them."""
    rows = reader.differences(one, other, prefix)
    return [_Difference(row["key"], row["old"], row["new"]) for row in rows if not _equal(row["old"], row["new"])]


def _values(reader: Reader, moment: Moment, prefix: str) -> dict[str, str]:
    return {row["key"]: row["value"] for row in reader.state_at(moment, prefix)}


def _compared(before: dict[str, str], after: dict[str, str]) -> list[_Difference]:
    """Return what differs between two states."""
    return [
        _Difference(key, before.get(key), after.get(key))
        for key in sorted(before.keys() | after.keys())
        if not _equal(before.get(key), after.get(key))
    ]


def _equal(one: str | None, other: str | None) -> bool:
    return one == other if one is None or other is None else same(one, other)

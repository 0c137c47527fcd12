"""`ael state`: what the agents know, and how it came to be."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ael_store.cli.agents import confirm
from ael_store.cli.arguments import At, nearest, read_json
from ael_store.cli.call import Call
from ael_store.cli.command import command, group
from ael_store.cli.completion import complete
from ael_store.cli.diff import diff
from ael_store.cli.export import export_state
from ael_store.cli.import_state import import_state
from ael_store.cli.output import Column, decoded, json_cell, number, pretty, print_json, print_table, say, when
from ael_store.cli.undo import undo
from ael_store.errors import AelError
from ael_store.model.event import REDACTED
from ael_store.model.values import check_key, decode, encode
from ael_store.telemetry import printable, printable_json

if TYPE_CHECKING:
    from ael_store.store.moment import Moment
    from ael_store.store.reader import Reader

__all__ = ["add_to"]

Key = Annotated[str, typer.Argument(metavar="KEY", help="A key of the state.", autocompletion=complete("key"))]


class KeyNotFound(AelError, LookupError):
    """The state has no such key."""


def add_to(app: typer.Typer) -> None:
    """Add the commands of this noun."""
    state = group(app, "state", "Read and change the state.")
    command(state, "list")(list_keys)
    command(state, "get")(get)
    command(state, "set", values=True)(set_key)
    command(state, "delete")(delete)
    command(state, "history")(history)
    command(state, "diff")(diff)
    command(state, "undo")(undo)
    command(state, "redact")(redact)
    command(state, "export")(export_state)
    command(state, "import")(import_state)


def list_keys(
    call: Call,
    prefix: Annotated[
        str, typer.Argument(metavar="[PREFIX]", help="Only keys that begin so.", autocompletion=complete("key"))
    ] = "",
    at: At = None,
) -> None:
    """Show keys and values."""
    with call.reader() as reader:
        rows = reader.state(prefix) if at is None else reader.state_at(reader.moment(at), prefix)
    if call.json:
        print_json({row["key"]: decode(row["value"]) for row in rows})
        return
    columns = (
        Column("key"),
        Column("value", shrinks=True),
        Column("agent"),
        Column("iteration", right=True),
        Column("updated_at"),
    )
    print_table(
        columns,
        (
            (
                row["key"],
                json_cell(row["value"]),
                row["agent"],
                number(row["iteration"]),
                when(row["updated_at"]),
            )
            for row in rows
        ),
        empty=f"no key begins with {prefix!r}" if prefix else f"the state {'is' if at is None else 'was'} empty",
    )


def get(call: Call, key: Key, at: At = None) -> None:
    """Print a value: a text as it is, anything else as JSON."""
    check_key(key)
    with call.reader() as reader:
        moment = None if at is None else reader.moment(at)
        text = reader.value(key) if moment is None else reader.value_at(moment, key)
        if text is None:
            raise _missing(reader, key, moment)
    value = decode(text)
    if call.json:
        print_json(value)
    elif isinstance(value, str):
        say(printable(value, keep="\n\t"))
    elif isinstance(value, list | dict):
        say(pretty(value))
    else:
        say(text)


def set_key(
    call: Call,
    key: Key,
    value: Annotated[str, typer.Argument(metavar="JSON", help="The value as JSON; - reads it from stdin.")],
) -> None:
    """Give a key a value."""
    check_key(key)
    given = read_json(value, f"value of {key!r}")
    encoded = encode(given, f"state key {key!r}", call.limits)
    changed = bool(call.change("state.set", key=key, value=given))
    if call.json:
        print_json({"key": key, "value": given, "changed": changed})
    elif changed:
        say(f"set {printable(key)} = {_short(encoded)} (committed)")
    else:
        say(f"{printable(key)} is {_short(encoded)} already")


def delete(call: Call, key: Key) -> None:
    """Remove a key."""
    check_key(key)
    if not call.change("state.delete", key=key):
        with call.reader() as reader:
            raise _missing(reader, key)
    if call.json:
        print_json({"key": key, "changed": True})
    else:
        say(f"deleted {printable(key)} (committed)")


def history(
    call: Call,
    key: Key,
    limit: Annotated[int, typer.Option("--limit", metavar="N", min=1, help="Most changes to show.")] = 100,
    at: At = None,
) -> None:
    """Show the changes of a key, newest first."""
    check_key(key)
    with call.reader() as reader:
        moment = None if at is None else reader.moment(at)
        rows = reader.history(key, limit, moment)
        if not rows:
            raise _missing(reader, key, moment)
    if call.json:
        print_json([decoded(row, "old_value", "new_value") for row in rows])
        return
    columns = (
        Column("id", right=True),
        Column("changed_at"),
        Column("iteration", right=True),
        Column("agent"),
        Column("operation", colors={"delete": "yellow"}),
        Column("old_value", shrinks=True),
        Column("new_value", shrinks=True),
    )
    print_table(
        columns,
        (
            (
                number(row["id"]),
                when(row["changed_at"]),
                number(row["iteration"]),
                row["agent"],
                row["operation"],
                json_cell(row["old_value"]),
                json_cell(row["new_value"]),
            )
            for row in rows
        ),
    )


def redact(
    call: Call,
    key: Key,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Remove a key and blank every value that it ever had."""
    check_key(key)
    with call.reader() as reader:
        found = reader.rows(
            "SELECT count(*) AS n FROM v_state_history WHERE key = :key AND new_value <> :blank",
            key=key,
            blank=REDACTED,
        )
        values = found[0]["n"]
        if not values and not reader.history(key, 1):
            raise _missing(reader, key)
    if not dry_run:
        confirm(f"Blank {values} values of {key!r} for good? Nothing brings them back but a backup.", yes)
        call.change("state.redact", key=key)
    if call.json:
        print_json({"key": key, "values": values, "changed": not dry_run})
    elif dry_run:
        say(f"would blank {values} values of {printable(key)} and remove it from the state")
    else:
        say(f"blanked {values} values of {printable(key)} (committed); backups made before still have them")


# -- the small things -------------------------------------------------------------------------------


def _short(text: str) -> str:
    """Return JSON text for a message."""
    return printable_json(text if len(text) <= 200 else f"{text[:200]}…")


def _missing(reader: Reader, key: str, moment: Moment | None = None) -> AelError:
    from ael_store.runtime.context import VIRTUAL_KEYS

    if key in VIRTUAL_KEYS:
        return KeyNotFound(f"{key!r} is answered by a running loop to its agents only: see `ael status`")
    if moment is not None:
        names = [row["key"] for row in reader.state_at(moment)]
        hint = nearest(key, names) or ("" if names else "; the state was empty")
        return KeyNotFound(f"there was no key {key!r} after iteration {moment.iteration} in {reader.path}{hint}")
    names = [row["key"] for row in reader.rows("SELECT key FROM v_state")]
    hint = nearest(key, names) or ("" if names else "; the state is empty")
    return KeyNotFound(f"there is no key {key!r} in the state of {reader.path}{hint}")

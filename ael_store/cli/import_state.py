"""`ael state import`: many keys at once, from what `ael state export` writes.

The file is read and checked whole before anything is changed; then it is one unit, so it takes effect whole or not.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from ael_store.cli.agents import confirm
from ael_store.cli.call import Call
from ael_store.cli.destination import STDOUT
from ael_store.cli.export import ENDINGS, FORMATS
from ael_store.cli.output import print_json, say
from ael_store.errors import AelError, DatabaseNotUsable, InvalidValue, UsageError
from ael_store.model.values import Limits, check_key, decode, encode, same

__all__ = ["import_state"]

COLUMNS = ["key", "value"]
MOST_COMPLAINTS = 50


def import_state(
    call: Call,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What `ael state export` wrote; - is stdin.")],
    merge: Annotated[bool, typer.Option("--merge", help="Keep keys that are not in the file.")] = False,
    replace: Annotated[bool, typer.Option("--replace", help="Remove keys that are not in the file.")] = False,
    format: Annotated[
        str | None,
        typer.Option("--format", metavar="FORMAT", help="jsonl, csv or json. Default: as FILE ends or begins."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would change.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Give many keys their values as one unit, or none of them."""
    if merge and replace:
        raise UsageError("--merge and --replace exclude each other")
    if format is not None and format not in FORMATS:
        raise UsageError(f"there is no format {format!r}; there are {', '.join(FORMATS)}")
    call.check_revision()
    wanted = _read(file, format, call.limits)
    present = _present(call)
    if present and not (merge or replace or dry_run):
        raise UsageError(
            f"the state of {call.path} is not empty: --merge keeps keys that are not in the file, --replace removes "
            "them; --dry-run says how many that are"
        )
    if present and replace and not (wanted or yes or dry_run):
        raise UsageError(
            f"{file} holds no key, so --replace would remove all {len(present)}: say --yes if that is meant"
        )
    absent = sum(key not in wanted for key in present)
    counts = _compare(present, wanted) | {"removed": absent if replace else 0}
    if not dry_run:
        if counts["removed"]:
            confirm(f"Remove {absent} keys that are not in {file}?", yes)
        values = {key: decode(text) for key, text in wanted.items()}
        counts = call.change("state.import", values=values, replace=replace)
    if call.json:
        print_json({**counts, "absent": absent, "dry_run": dry_run})
        return
    figures = ", ".join(f"{count} {what}" for what, count in counts.items())
    say(f"would be {figures}" if dry_run else f"{figures} (committed)")
    if dry_run and absent and not replace:
        say(f"keys that are not in the file: {absent}; --merge keeps them, --replace removes them")


def _present(call: Call) -> dict[str, str]:
    """Return the state as it is, as JSON texts."""
    from ael_store.store.export import values_at

    with call.reader() as reader:
        return {key: text for piece in values_at(reader, reader.moment(None)) for key, text in piece}


def _compare(present: dict[str, str], wanted: dict[str, str]) -> dict[str, int]:
    """Count what an import would do."""
    counts = {"added": 0, "changed": 0, "unchanged": 0}
    for key, text in wanted.items():
        before = present.get(key)
        counts["added" if before is None else "unchanged" if same(before, text) else "changed"] += 1
    return counts


# -- reading ----------------------------------------------------------------------------------------


@dataclass
class _Found:
    """What stands in a file: JSON texts by key, where each stands, and what is wrong."""

    limits: Limits
    texts: dict[str, str] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    complaints: list[str] = field(default_factory=list)

    def take(self, place: str, key: Any, value: Any) -> None:
        """Note a key with its value; what is wrong with them is noted instead."""
        from ael_store.runtime.context import VIRTUAL_KEYS

        try:
            check_key(key, self.limits)
            text = encode(value, f"state key {key!r}", self.limits)
        except AelError as error:
            self.complaints.append(f"{place}: {error}")
            return
        if key in VIRTUAL_KEYS:
            self.complaints.append(f"{place}: state key {key!r} is kept by the loop and can't be written")
        elif key in self.texts:
            self.complaints.append(f"{place}: state key {key!r} stands at {self.places[key]} already")
        else:
            self.texts[key], self.places[key] = text, place


def _read(file: Path, format: str | None, limits: Limits) -> dict[str, str]:
    """Return JSON texts by key; raises InvalidValue, naming every line that is wrong."""
    name = "stdin" if file == STDOUT else str(file)
    try:
        raw = sys.stdin.buffer.read() if file == STDOUT else file.read_bytes()
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise InvalidValue(f"{name}, line {line}: this is no UTF-8 text; nothing was changed") from None
    except OSError as error:
        raise DatabaseNotUsable(f"{name} can't be read ({error.strerror})") from None
    found = _Found(limits)
    READ[format or ENDINGS.get(file.suffix.lower()) or _guess(text)](text, found)
    if found.complaints:
        shown = found.complaints[:MOST_COMPLAINTS]
        if len(found.complaints) > len(shown):
            shown.append(f"and {len(found.complaints) - len(shown)} more")
        raise InvalidValue(f"{name} can't be imported; nothing was changed\n" + "\n".join(shown))
    return found.texts


def _guess(text: str) -> str:
    """Return the format that a text seems to have, by its first line."""
    first = text.lstrip().partition("\n")[0].rstrip("\r")
    if sorted(first.split(",")) == COLUMNS:
        return "csv"
    try:
        value = json.loads(first)
    except (ValueError, RecursionError):
        return "json"
    return "jsonl" if isinstance(value, dict) and sorted(value) == COLUMNS else "json"


def _read_lines(text: str, found: _Found) -> None:
    # Not splitlines(): it also ends lines at characters that JSON strings may hold.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        place = f"line {number}"
        try:
            row = _json(line)
        except ValueError as error:
            found.complaints.append(f"{place}: this is not JSON ({error})")
            continue
        if not isinstance(row, dict) or sorted(row) != COLUMNS:
            found.complaints.append(f'{place}: wanted is an object {{"key": …, "value": …}}')
            continue
        found.take(place, row["key"], row["value"])


def _read_object(text: str, found: _Found) -> None:
    try:
        values = _json(text)
    except ValueError as error:
        found.complaints.append(f"this is not JSON ({error})")
        return
    if not isinstance(values, dict):
        found.complaints.append("wanted is an object of keys and values")
        return
    for key, value in values.items():
        found.take(f"key {key!r}", key, value)


def _read_csv(text: str, found: _Found) -> None:
    before = csv.field_size_limit(sys.maxsize)
    try:
        rows = csv.reader(io.StringIO(text, newline=""), strict=True)
        header = next(rows, [])
        if sorted(header) != COLUMNS:
            found.complaints.append(f"line 1: the columns are {', '.join(header) or 'none'}; wanted are key, value")
            return
        key_at = header.index("key")
        begin = rows.line_num + 1
        for row in rows:
            place, begin = f"line {begin}", rows.line_num + 1
            if len(row) == len(COLUMNS):
                _take_cells(found, place, row[key_at], row[1 - key_at])
            elif row:
                found.complaints.append(f"{place}: it has {len(row)} cells; wanted are 2")
    except csv.Error as error:
        found.complaints.append(f"line {rows.line_num}: this is not CSV ({error})")
    finally:
        csv.field_size_limit(before)


def _take_cells(found: _Found, place: str, key: str, text: str) -> None:
    try:
        value = _json(text)
    except ValueError as error:
        hint = "" if text[:1] in ("{", "[", '"') else f"; a text needs quotes of its own: {json.dumps(text[:60])}"
        found.complaints.append(f"{place}: the value of {key!r} is not JSON ({error}){hint}")
        return
    found.take(place, key, value)


def _json(text: str) -> Any:
    """Return a value of JSON, every number as it stands; raises ValueError."""
    try:
        return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("nested too deep") from None


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"JSON has no {constant}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object; one that has a key twice says two things, and neither is taken."""
    made = dict(pairs)
    if len(made) < len(pairs):
        twice = next(key for place, (key, _) in enumerate(pairs) if key in dict(pairs[:place]))
        raise ValueError(f"an object has the key {twice!r} twice")
    return made


READ = {"jsonl": _read_lines, "csv": _read_csv, "json": _read_object}
"""How each format is read."""

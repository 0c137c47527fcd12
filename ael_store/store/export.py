"""What is exported: logs in order of their numbers, and the state as of one moment, piece by piece.

Each piece is a read of its own, because one long read would keep the write-ahead log of a running loop from being
emptied. A piece is bounded in rows, in bytes and in numbers looked at, and so are the memory and the time that it
takes. That the pieces fit together is due to the numbers: a log is read up to the row that was the newest at the
start, and a value is that of one change, whatever has happened to the key since.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import text

from ael_store.errors import HistoryGone
from ael_store.model.event import glob_of
from ael_store.schema.recent import CHANGES
from ael_store.store.moment import Moment, read_moment, refuse_gone
from ael_store.store.reader import Reader

__all__ = ["LOGS", "Log", "Piece", "Span", "columns_of", "pieces_of", "span_of", "values_at"]

ROWS = 1000
BYTES = 4_194_304
NUMBERS = 50_000
"""Numbers that one piece looks at where a condition leaves rows out."""

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Log:
    """A view whose rows have numbers in the order in which they came about."""

    view: str
    table: str
    json_columns: tuple[str, ...]
    in_moment: str | None = None
    """Field of `Moment` that holds its newest number; None where only the iteration of a row says when it was."""


LOGS: dict[str, Log] = {
    "history": Log("v_state_history", "state_changes", ("old_value", "new_value"), "change_id"),
    "events": Log("v_events", "events", ("data", "metadata"), "event_id"),
    "ticks": Log("v_ticks", "ticks", (), "tick_id"),
    "tasks": Log("v_tasks", "tasks", ("args", "result")),
    "metrics": Log("v_metrics", "metric_samples", ()),
}


@dataclass(frozen=True, slots=True)
class Span:
    """Rows of a log by their numbers: `after < id <= until`."""

    after: int
    until: int


@dataclass(frozen=True, slots=True)
class Piece:
    """Some rows, and how far they reach: all that there is up to this number."""

    rows: list[Row]
    reached: int


# -- logs -------------------------------------------------------------------------------------------


def columns_of(reader: Reader, log: Log) -> list[str]:
    """Return the names of the columns of a log, in order."""
    return [row["name"] for row in reader.rows("SELECT name FROM pragma_table_info(:view)", view=log.view)]


def span_of(reader: Reader, log: Log, since: str | None, until: str | None) -> Span:
    """Return which rows belong to the iterations from `since` to `until`, both included: each a number or a time.

    A time stands for the iterations that began then or later, or that had begun by then. Without `until` it is what
    there is now. Raises UsageError for what is no moment or has not been yet, HistoryGone for what was removed.
    """
    newest = reader.last_ids([log.table])[log.table]
    after = 0 if since is None else _before(reader, log, read_moment(since))
    if until is not None:
        newest = min(newest, _number_of(reader, log, reader.moment(until)))
    return Span(after, newest)


def _before(reader: Reader, log: Log, since: int | datetime) -> int:
    """Return the last number of a log before the first iteration that is wanted."""
    if isinstance(since, datetime):
        moment = reader.moment(since - timedelta(microseconds=1))
        return _number_of(reader, log, moment) if moment.iteration else 0
    began = reader.horizon().iteration
    if began and since <= began:
        raise HistoryGone(
            f"the history begins with iteration {began + 1}, and iteration {since} is before that: what was there was "
            f"removed; --since {began + 1} gives all that is left"
        )
    reader.moment(since)  # one that has not been yet is refused
    return _number_of(reader, log, reader.moment(since - 1)) if since else 0


def _number_of(reader: Reader, log: Log, moment: Moment) -> int:
    """Return the newest number of a log at a moment."""
    if log.in_moment is not None:
        return int(getattr(moment, log.in_moment))
    later = reader.rows(
        f"SELECT id FROM {log.view} WHERE iteration > :iteration ORDER BY id LIMIT 1", iteration=moment.iteration
    )
    return int(later[0]["id"]) - 1 if later else reader.last_ids([log.table])[log.table]


def pieces_of(reader: Reader, log: Log, span: Span, wanted: Mapping[str, str]) -> Iterator[Piece]:
    """Yield the rows of a log in order. `wanted` are texts that columns must have; in a `type` `*` is any text."""
    where, parameters = ["id > :after", "id <= :until"], {}
    for column, value in wanted.items():
        is_pattern = column == "type" and "*" in value
        where.append(f"{column} GLOB :{column}" if is_pattern else f"{column} = :{column}")
        parameters[column] = glob_of(value) if is_pattern else value
    query = text(f"SELECT * FROM {log.view} WHERE {' AND '.join(where)} ORDER BY id LIMIT {ROWS}")
    after = span.after
    while after < span.until:
        until = min(span.until, after + NUMBERS) if wanted else span.until
        rows, bytes_taken = [], 0
        with reader.connect() as connection:
            for row in connection.execute(query, {**parameters, "after": after, "until": until}).mappings():
                rows.append(dict(row))
                bytes_taken += _bytes_of(rows[-1])
                if bytes_taken >= BYTES:
                    break
        is_cut = len(rows) == ROWS or bytes_taken >= BYTES
        after = rows[-1]["id"] if is_cut else until
        yield Piece(rows, after)


def _bytes_of(row: Row) -> int:
    return sum(len(cell) for cell in row.values() if isinstance(cell, str))


# -- the state --------------------------------------------------------------------------------------


def values_at(reader: Reader, moment: Moment, prefix: str = "") -> Iterator[list[tuple[str, str]]]:
    """Yield keys and JSON texts at a moment in order of the keys, also while a loop changes them.

    Raises HistoryGone where retention has removed the moment meanwhile.
    """
    # The cell is the answer where the key was not changed since; else it is one seek in the index of the key.
    # char(1114111), the last code point, comes after every character that a key may have.
    query = text(
        "SELECT k.name AS key, CASE WHEN s.change_id <= :change THEN s.value ELSE "
        "(SELECT c.value FROM state_changes c WHERE c.id = (SELECT id "
        f"FROM {CHANGES} WHERE key_id = k.id AND id <= :change ORDER BY id DESC LIMIT 1)) END AS value "
        "FROM keys k LEFT JOIN state s ON s.key_id = k.id "
        "WHERE k.name >= :prefix AND k.name > :last AND k.name < :prefix || char(1114111) "
        f"ORDER BY k.name LIMIT {ROWS}"
    )
    last, is_cut = "", True
    while is_cut:
        found: list[tuple[str, str]] = []
        count = bytes_taken = 0
        with reader.connect() as connection:
            refuse_gone(connection, moment)
            for key, value in connection.execute(query, {"change": moment.change_id, "prefix": prefix, "last": last}):
                count, last = count + 1, key
                if value is not None:
                    found.append((key, value))
                    bytes_taken += len(value)
                    if bytes_taken >= BYTES:
                        break
        is_cut = count == ROWS or bytes_taken >= BYTES
        if found:
            yield found

"""One SQL statement of a user, which can only read: `ael sql`.

Five fences, each enough for most of it: the file is opened read-only, SQLite refuses writes (`query_only`), an
authorizer knows the few actions that reading takes and refuses all others (ATTACH would create files, PRAGMA
would change the connection), nothing may be larger than a few values, and a time limit ends what takes too long.
SQLite looks at the clock between two instructions; for one that does not end a second thread does.
"""

from __future__ import annotations

import contextlib
import re
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ael_store.errors import AelError, UsageError
from ael_store.store.revision import explain, reading

__all__ = ["QueryFailed", "query"]

ROWS = 200
BATCH_BYTES = 4_194_304
"""Rows are taken up together until they hold so much."""

LONGEST = 67_108_864
"""The longest text or blob that a statement may make: values are smaller, and what is not would fill the memory."""

PATIENCE_S = 1.0
"""How long a single instruction may go on when the time is over."""

STEPS = 1000
"""Instructions of SQLite between two looks at the clock: a fraction of a millisecond."""

READING_PRAGMAS = frozenset(
    (
        "collation_list",
        "compile_options",
        "data_version",
        "database_list",
        "foreign_key_list",
        "freelist_count",
        "function_list",
        "index_info",
        "index_list",
        "index_xinfo",
        "journal_mode",
        "module_list",
        "page_count",
        "page_size",
        "pragma_list",
        "schema_version",
        "table_info",
        "table_list",
        "table_xinfo",
        "user_version",
    )
)
WITH_ARGUMENT = frozenset(name for name in READING_PRAGMAS if name.endswith(("_info", "_xinfo", "_list")))
TABLE_FUNCTIONS = ("json_each", "json_tree", *(f"pragma_{name}" for name in sorted(WITH_ARGUMENT)))
"""Functions that a SELECT reads from. SQLite declares such a table at its first use in a connection, which looks
to the authorizer like CREATE TABLE, so that is done before."""

FORBIDDEN_FUNCTIONS = frozenset(("load_extension", "fts3_tokenizer", "readfile", "writefile", "edit"))

OF_THE_STATEMENT = frozenset(
    (
        sqlite3.SQLITE_ERROR,
        sqlite3.SQLITE_MISMATCH,
        sqlite3.SQLITE_MISUSE,
        sqlite3.SQLITE_NOMEM,
        sqlite3.SQLITE_RANGE,
        sqlite3.SQLITE_TOOBIG,
    )
)
"""Errors that say nothing about the database."""

Row = tuple[Any, ...]


class QueryFailed(AelError):
    """SQLite refused a statement or it took too long; the message says where."""


def query(
    path: Path, sql: str, *, timeout_s: float, give_up: Callable[[QueryFailed], None] | None = None
) -> Iterator[list[str] | Row]:
    """Yield the names of the columns, then the rows. The time that the caller takes for them does not count.

    `give_up` is called, in another thread, where the time is over and SQLite is inside an instruction that can't be
    interrupted (a search of a text of megabytes in another one): only the end of the process ends that.
    Raises QueryFailed, UsageError where there is not exactly one statement, and what opening a database raises.
    """
    if not _has_statement(sql):
        raise UsageError("there is no SQL statement in the argument")
    if "\0" in sql:
        raise UsageError("the SQL statement holds a NUL character")
    with reading(path) as connection:
        connection.execute("PRAGMA query_only = ON")
        for function in TABLE_FUNCTIONS:
            with contextlib.suppress(sqlite3.OperationalError):  # not in this build of SQLite
                connection.execute(f"EXPLAIN SELECT * FROM {function}")
        connection.text_factory = lambda raw: raw.decode("utf-8", "replace")
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, LONGEST)
        connection.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
        fence = _Fence(timeout_s, give_up)
        connection.set_authorizer(fence.authorize)
        connection.set_progress_handler(fence.is_over, STEPS)
        try:
            yield from fence.rows(connection, sql)
        except sqlite3.Error as error:
            raise _explain(error, fence, connection, path, sql) from error


class _Fence:
    """The limits of one statement."""

    def __init__(self, timeout_s: float, give_up: Callable[[QueryFailed], None] | None) -> None:
        self.timeout_s = timeout_s
        self.give_up = give_up
        self.left_s = timeout_s
        self.deadline = 0.0
        self.refused = ""

    def rows(self, connection: sqlite3.Connection, sql: str) -> Iterator[list[str] | Row]:
        with self._working():
            cursor = connection.execute(sql)
            rows = _batch(cursor)
        if cursor.description is None:
            raise UsageError("this statement returns no rows; `ael sql` takes one SELECT")
        yield [column[0] for column in cursor.description]
        while rows:
            yield from rows
            with self._working():
                rows = _batch(cursor)

    @contextlib.contextmanager
    def _working(self) -> Iterator[None]:
        self.deadline = time.monotonic() + self.left_s
        watch = threading.Timer(max(0.0, self.left_s) + PATIENCE_S, self._lose_patience)
        watch.daemon = True
        if self.give_up is not None:
            watch.start()
        try:
            yield
        finally:
            watch.cancel()
            self.left_s = self.deadline - time.monotonic()

    def _lose_patience(self) -> None:
        if self.give_up is not None:
            self.give_up(self.took_too_long())

    def took_too_long(self) -> QueryFailed:
        """Return the error."""
        return QueryFailed(f"the statement took longer than {self.timeout_s:g} s and was ended; --timeout allows more")

    def is_over(self) -> int:
        return time.monotonic() > self.deadline

    def authorize(
        self, action: int, first: str | None, second: str | None, _database: str | None, _inner: str | None
    ) -> int:
        match action:
            case sqlite3.SQLITE_SELECT | sqlite3.SQLITE_READ | sqlite3.SQLITE_RECURSIVE:
                return sqlite3.SQLITE_OK
            case sqlite3.SQLITE_FUNCTION if second not in FORBIDDEN_FUNCTIONS:
                return sqlite3.SQLITE_OK
            case sqlite3.SQLITE_PRAGMA if (first or "").lower() in (WITH_ARGUMENT if second else READING_PRAGMAS):
                return sqlite3.SQLITE_OK
        name = _ACTIONS.get(action, "this")
        subject = {sqlite3.SQLITE_PRAGMA: first, sqlite3.SQLITE_FUNCTION: second}.get(action)
        self.refused = self.refused or (f"{name} {subject}" if subject else name)
        return sqlite3.SQLITE_DENY


def _batch(cursor: sqlite3.Cursor) -> list[Row]:
    """Return the next rows: not many, and not many bytes."""
    rows: list[Row] = []
    size = 0
    for row in cursor:
        rows.append(row)
        size += sum(len(cell) for cell in row if isinstance(cell, str | bytes))
        if len(rows) >= ROWS or size >= BATCH_BYTES:
            break
    return rows


_ACTIONS = {
    getattr(sqlite3, f"SQLITE_{name}"): name.replace("_", " ")
    for name in (
        "ALTER_TABLE",
        "ANALYZE",
        "ATTACH",
        "CREATE_INDEX",
        "CREATE_TABLE",
        "CREATE_TEMP_INDEX",
        "CREATE_TEMP_TABLE",
        "CREATE_TEMP_TRIGGER",
        "CREATE_TEMP_VIEW",
        "CREATE_TRIGGER",
        "CREATE_VIEW",
        "CREATE_VTABLE",
        "DELETE",
        "DETACH",
        "DROP_INDEX",
        "DROP_TABLE",
        "DROP_TEMP_INDEX",
        "DROP_TEMP_TABLE",
        "DROP_TEMP_TRIGGER",
        "DROP_TEMP_VIEW",
        "DROP_TRIGGER",
        "DROP_VIEW",
        "DROP_VTABLE",
        "FUNCTION",
        "INSERT",
        "PRAGMA",
        "REINDEX",
        "SAVEPOINT",
        "TRANSACTION",
        "UPDATE",
    )
}


def _has_statement(sql: str) -> bool:
    """Say whether anything is left without comments, spaces and semicolons."""
    return bool(re.sub(r"--[^\n]*|/\*.*?(\*/|$)|[\s;]", "", sql, flags=re.DOTALL))


def _explain(error: sqlite3.Error, fence: _Fence, connection: sqlite3.Connection, path: Path, sql: str) -> AelError:
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_MISUSE) & 0xFF
    text = str(error)
    if code == sqlite3.SQLITE_INTERRUPT:
        return fence.took_too_long()
    if fence.refused:
        return QueryFailed(f"{fence.refused} is not allowed here: `ael sql` only reads")
    if "one statement" in text:
        return UsageError("there is more than one SQL statement; `ael sql` takes one")
    if code not in OF_THE_STATEMENT:
        return explain(error, path)
    return QueryFailed(f"SQL: {text}{_position(text, sql)}{_hint(text, connection)}")


def _position(text: str, sql: str) -> str:
    """Return where the word that SQLite names stands, if it stands there once."""
    found = re.match(r'near "(.+)": ', text, re.DOTALL) or re.match(r"no such \w+: (?:\w+\.)?(.+)", text)
    if found is None or sql.count(found[1]) != 1:
        return ""
    at = sql.index(found[1])
    line, column = sql.count("\n", 0, at) + 1, at - (sql.rfind("\n", 0, at) + 1) + 1
    return f" (line {line}, column {column})" if "\n" in sql else f" (at character {column})"


def _hint(text: str, connection: sqlite3.Connection) -> str:
    """Name the view that was probably meant."""
    found = re.match(r"no such table: (?:main\.)?(.+)", text)
    if found is None:
        return ""
    names = [name for (name,) in connection.execute("SELECT name FROM sqlite_schema WHERE type IN ('view', 'table')")]
    near = get_close_matches(found[1], names, 1)
    views = ", ".join(sorted(name for name in names if name.startswith("v_")))
    return f"; did you mean {near[0]}?" if near else f"; the views are {views}"

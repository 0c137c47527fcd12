"""What can be saved of a damaged database, in a new file.

The damaged file is only read: all work is done on a private copy, in the folder of the new file. Each table is read
by SQLite where SQLite's own check finds nothing wrong with it, else page by page (`leaf_pages.py`); what was saved is
written into a new database of the same revision and made consistent (`mend.py`). The report says exactly what is
missing where that can be known: the numbers of iterations, units, changes, events and samples have no gaps.

A bit that changed inside a value is no damage to SQLite, and is copied as it is: `ael db verify` finds those.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from sqlalchemy.exc import DBAPIError

from ael_store.clock import SystemClock
from ael_store.errors import (
    AelError,
    DatabaseDamaged,
    DatabaseNotUsable,
    NotADatabase,
    OwnedElsewhere,
    StorageFailed,
    UsageError,
)
from ael_store.store.advice import newest_backup
from ael_store.store.backup import BESIDE, need_space, size_of
from ael_store.store.create import create_schema
from ael_store.store.damaged_copy import DamagedCopy, copy_damaged
from ael_store.store.leaf_pages import LeafPages, Row, Tree
from ael_store.store.lock import current_holder
from ael_store.store.mend import (
    WITHOUT_GAPS,
    StateReport,
    close_history,
    drop_orphans,
    last_numbers,
    missing,
    missing_commits,
    name_lost,
    rebuild,
    restart_counts,
    runs_told,
)
from ael_store.store.revision import (
    CORE,
    HEAD,
    alembic_config,
    explain,
    known_revisions,
    migration_engine,
    refuse_newer,
)
from ael_store.store.schema_check import check
from ael_store.store.verify import verify
from ael_store.store.whole_file import discard, publish, reserve, sync

__all__ = ["RecoverReport", "TableReport", "recover"]

Tell = Callable[[str], None]
Range = tuple[int, int]

CHUNK = 1000
SHOWN = 20
"""How much of a list is shown to people; `--json` has all of it."""
VERSION = "alembic_version"
TYPES: dict[str, type | tuple[type, ...]] = {"INTEGER": int, "TEXT": str, "REAL": float, "BLOB": bytes}


@dataclass
class TableReport:
    """What was saved of one table."""

    name: str
    saved: int = 0
    dropped: int = 0
    """Rows that were read and make no sense: a wrong type, a second one of its kind, without what they refer to."""
    unreadable: int = 0
    """Rows whose place was found, but not their content."""
    lost_pages: int = 0
    """Pages of the table that can't be read; how many rows they held is not known."""
    missing: list[Range] = field(default_factory=list)
    """First and last number of what is gone, of tables whose numbers have no gaps."""
    highest: int = 0
    """The highest number that its interior pages name, where its last rows are gone."""
    open_ended: bool = False
    """True where rows after the last number that is known may be gone too."""
    damaged: bool = False
    """True where SQLite could not read it whole."""

    @property
    def complete(self) -> bool:
        if self.name in WITHOUT_GAPS:
            return not (self.missing or self.open_ended)
        return not (self.dropped or self.unreadable or self.lost_pages)


@dataclass
class RecoverReport:
    """What `recover` did."""

    source: Path
    target: Path
    revision: str
    tables: list[TableReport]
    names: dict[str, list[int]]
    """Numbers of keys, event types, sources and agents whose name is gone; they are called `(lost 17)`."""
    state: StateReport
    log_is_broken: bool
    """True where the write-ahead log held commits that can't be read."""
    unreadable_bytes: int
    """Bytes that the disk did not give."""
    backup: Path | None
    """The newest backup beside the damaged file, as the alternative."""
    unproven: list[str] = field(default_factory=list)
    """What `ael db verify` said of the rows that were saved: lost ones, and values that changed silently."""
    told: list[int] = field(default_factory=list)
    """Numbers of changes that are gone and were written again from the state."""
    placed: list[int] = field(default_factory=list)
    """Numbers that were given to deletions that are gone, of which only the range is known."""

    @property
    def complete(self) -> bool:
        """True where nothing is lost."""
        tables = {table.name: table.complete for table in self.tables}
        tables["state"] |= tables["state_changes"]  # which it was rebuilt from
        return all(tables.values()) and not (
            self.unproven or self.names or self.state.uncertain or self.state.lost or self.log_is_broken
        )

    def lines(self) -> Iterator[str]:
        """Yield the report for people, what is lost first."""
        for table in self.tables:
            lost = [
                f"{count} {what}"
                for count, what in (
                    (table.dropped, "rows make no sense"),
                    (table.unreadable, "rows can't be read"),
                    (table.lost_pages, "pages can't be read"),
                )
                if count
            ]
            if table.missing:
                lost.append(f"missing are {_ranges(table.missing)}")
            if table.open_ended:
                lost.append("and what came after, if there was more")
            if lost and not table.complete:
                yield f"{table.name}: {', '.join(lost)}; {table.saved} rows are saved"
        for name, numbers in self.names.items():
            yield f"{name}: the names of {_ranges([(number, number) for number in numbers])} are lost"
        for what, keys in (
            ("lost are the values of the keys", self.state.lost),
            ("perhaps not the newest are the values of the keys", self.state.uncertain),
            ("rebuilt from their history are the keys", self.state.rebuilt),
        ):
            if keys:
                yield f"state: {what} {', '.join(map(repr, keys[:SHOWN]))}{_more(keys)}"
        if self.log_is_broken:
            yield "the write-ahead log held commits that can't be read: the newest iterations may be missing"
        if self.told:
            yield f"state_changes: {_ranges([(one, one) for one in self.told])} were written again from the state"
        if self.placed:
            yield (
                f"state_changes: {_ranges([(one, one) for one in self.placed])} stand for deletions that are lost; "
                "which of the missing ones these were is not known"
            )
        for problem in self.unproven[:SHOWN]:
            yield f"not proven: {problem}"
        if len(self.unproven) > SHOWN:
            yield f"not proven:{_more(self.unproven)}"
        saved = sum(table.saved for table in self.tables)
        yield f"{self.target}: {saved} rows saved, " + ("nothing is lost" if self.complete else "not everything")
        if not self.complete and self.backup is not None:
            yield f"the newest backup beside the damaged file is {self.backup}"


def _ranges(ranges: list[Range]) -> str:
    """Return numbers for people, neighbours together."""
    joined: list[Range] = []
    for begin, end in ranges:
        if joined and begin == joined[-1][1] + 1:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((begin, end))
    texts = [str(begin) if begin == end else f"{begin} to {end}" for begin, end in joined]
    return ", ".join(texts[:SHOWN]) + _more(texts)


def _more(items: list[str]) -> str:
    return f" and {len(items) - SHOWN} more" if len(items) > SHOWN else ""


def recover(path: Path, target: Path, tell: Tell) -> RecoverReport:
    """Write what can be read of a damaged database into the new file `target`, and say what can't.

    Raises UsageError where `target` exists, OwnedElsewhere where a loop owns the damaged file, NotADatabase where
    it is none of ours, SchemaTooNew, StorageFailed where space is short, DatabaseDamaged where nothing can be saved.
    """
    path, target = path.resolve(), target.absolute()
    _check_names(path, target)
    need_space(target.parent, 3 * size_of(path), f"recovering {path}", "a copy of the file and the new one")
    copy = reserve(target, "damaged")
    try:
        tell(f"copying {path}")
        copied = copy_damaged(path, copy, tell)
        fresh = reserve(target, "recover")
        try:
            report = _Recovery(path, target, copy, fresh, copied, tell).run()
            if not publish(fresh, target):
                raise UsageError(f"{target} has appeared meanwhile: name another file")
        except (DBAPIError, sqlite3.Error) as error:
            raise explain(error, target) from error
        finally:
            discard(fresh)
    except OSError as error:
        if isinstance(error, AelError):
            raise
        raise StorageFailed(
            f"{target} can't be written ({error.strerror}): free some space or check the disk"
        ) from error
    finally:
        discard(copy)
    tell(f"{target} is written and checked")
    return report


def _check_names(path: Path, target: Path) -> None:
    if not path.is_file():
        raise DatabaseNotUsable(f"{path} is no file" if path.exists() else f"{path} does not exist")
    if not os.access(path, os.R_OK):
        raise DatabaseNotUsable(f"{path} can't be read: check its permissions")
    for end in ("", *BESIDE):
        if os.path.lexists(taken := target.with_name(target.name + end)):
            raise UsageError(f"{taken} exists; recover only writes a new file: name another one with --to")
    if not target.parent.is_dir():
        raise DatabaseNotUsable(f"{target} can't be created: there is no folder {target.parent}; create it first")
    if (holder := current_holder(path)) is not None:
        raise OwnedElsewhere(f"{path} is owned by {holder}; stop it first")


@dataclass(frozen=True, slots=True)
class _Column:
    name: str
    type: str
    required: bool
    is_rowid: bool
    default: Any

    def accepts(self, value: Any) -> bool:
        if value is None:
            return not self.required or self.is_rowid
        wanted = TYPES.get(self.type, object)
        return isinstance(value, wanted) or (wanted is float and isinstance(value, int))


class _Broken:
    """Stands for a text that none of ours can be."""


BROKEN = _Broken()


def _text(raw: bytes) -> Any:
    try:
        return raw.decode() if b"\0" not in raw else BROKEN  # a lost page of a long value is read as zeros
    except UnicodeDecodeError:
        return BROKEN


class _Recovery:
    """One recovery, step by step."""

    def __init__(self, path: Path, target: Path, copy: Path, fresh: Path, copied: DamagedCopy, tell: Tell) -> None:
        self.path = path
        self.target = target
        self.copy = copy
        self.fresh = fresh
        self.copied = copied
        self.tell = tell
        self.tables: dict[str, TableReport] = {}
        self.columns: dict[str, list[_Column]] = {}
        self.last: dict[str, int] = {}

    def run(self) -> RecoverReport:
        with contextlib.closing(self._open(self.copy)) as damaged:
            sound = self._sound_tables(damaged)
            pages = None
            if self.copy.stat().st_size:
                with self.copy.open("rb") as file:
                    pages = LeafPages(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            if pages is None:
                raise NotADatabase(f"{self.path} is empty")
            roots = self._roots(pages)
            if roots and not CORE & set(roots):
                raise NotADatabase(f"{self.path} is a SQLite database that ael_store did not make")
            revision = self._revision(damaged, sound, pages, roots)
            self._create(revision)
            with contextlib.closing(self._open(self.fresh)) as fresh:
                report = self._fill(fresh, damaged, sound, pages, roots, revision)
        sync(self.fresh)
        if revision == HEAD:
            report.unproven = verify(self.fresh).problems
        if not report.complete:
            with contextlib.closing(self._open(self.fresh)) as fresh:
                report.told, report.placed = self._begin_anew(fresh)
            sync(self.fresh)
        found = check(self.fresh)
        if found.problems:
            raise DatabaseDamaged(
                f"what was saved of {self.path} does not fit together: {'; '.join(found.problems[:3])}"
            )
        return report

    def _open(self, path: Path) -> sqlite3.Connection:
        connection = sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True, isolation_level=None)
        connection.text_factory = _text
        for pragma in ("trusted_schema = OFF", "cell_size_check = ON", "foreign_keys = OFF"):
            connection.execute(f"PRAGMA {pragma}")
        return connection

    # -- what is there ----------------------------------------------------------------------------

    def _sound_tables(self, damaged: sqlite3.Connection) -> set[str]:
        """Return the tables with which SQLite finds nothing wrong."""
        try:
            damaged.execute("PRAGMA query_only = ON")
            names = [name for (name,) in damaged.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")]
        except sqlite3.DatabaseError:
            return set()
        sound = set()
        for name in names:
            if isinstance(name, str) and '"' not in name:
                with contextlib.suppress(sqlite3.DatabaseError):
                    found = [row[0] for row in damaged.execute(f'PRAGMA integrity_check("{name}")')]
                    if found == ["ok"]:
                        sound.add(name)
        return sound

    def _roots(self, pages: LeafPages) -> dict[str, int]:
        """Return the root page of each table, as far as the schema can be read."""
        roots: dict[str, int] = {}
        schema, *others = pages.trees([1])
        for tree in [schema, *(others if schema.lost else [])]:
            for row in _rows(pages, tree):
                if row is None or len(row[1]) != 5:
                    continue
                kind, name, _table, root, sql = row[1]
                is_table = kind == "table" and isinstance(sql, str) and sql.startswith("CREATE TABLE")
                if is_table and isinstance(name, str) and isinstance(root, int):
                    roots.setdefault(name, root)
        return roots

    def _revision(self, damaged: sqlite3.Connection, sound: set[str], pages: LeafPages, roots: dict[str, int]) -> str:
        found: list[Any] = []
        if VERSION in sound:
            found = [row[0] for row in damaged.execute(f"SELECT version_num FROM {VERSION}")]
        elif VERSION in roots:
            tree = pages.trees([roots[VERSION]])[0]
            found = [row[1][0] for row in _rows(pages, tree) if row is not None and len(row[1]) == 1]
        found = [one for one in found if isinstance(one, str)]
        if len(found) == 1:
            refuse_newer(self.path, found[0], known_revisions(alembic_config()))
            return str(found[0])
        self.tell(f"the revision of {self.path} can't be read; {HEAD} is assumed")
        return HEAD

    def _create(self, revision: str) -> None:
        """Make an empty database of that revision."""
        engine = migration_engine(self.fresh)
        try:
            with engine.connect() as connection:
                if revision == HEAD:
                    with connection.begin():
                        create_schema(connection)
                else:
                    from alembic import command

                    config = alembic_config()
                    config.attributes["connection"] = connection
                    command.upgrade(config, revision)
        finally:
            engine.dispose()

    # -- saving -----------------------------------------------------------------------------------

    def _fill(
        self,
        fresh: sqlite3.Connection,
        damaged: sqlite3.Connection,
        sound: set[str],
        pages: LeafPages,
        roots: dict[str, int],
        revision: str,
    ) -> RecoverReport:
        names = [
            name
            for (name,) in fresh.execute("SELECT name FROM sqlite_schema WHERE type = 'table' ORDER BY name")
            if name != VERSION and not name.startswith("sqlite_")
        ]
        fresh.execute("PRAGMA journal_mode = MEMORY")
        fresh.execute("BEGIN IMMEDIATE")
        for name in names:
            self.columns[name] = _columns(fresh, name)
            self.tables[name] = TableReport(name)
            fresh.execute(f'DELETE FROM "{name}"')
        broken = [name for name in names if name not in sound or not self._copy_table(fresh, damaged, name)]
        self._read_pages(fresh, pages, roots, broken)
        if not any(table.saved for table in self.tables.values()):
            raise DatabaseDamaged(f"nothing of {self.path} can be saved{self._alternative()}")
        report = self._mend(fresh, revision)
        fresh.execute("COMMIT")
        fresh.execute("PRAGMA journal_mode = WAL")
        return report

    def _alternative(self) -> str:
        backup = newest_backup(self.path)
        return "" if backup is None else f"; the newest backup beside it is {backup}"

    def _copy_table(self, fresh: sqlite3.Connection, damaged: sqlite3.Connection, name: str) -> bool:
        """Copy a sound table; False where its columns are not those that its revision has."""
        columns = self.columns[name]
        there = [row[1] for row in damaged.execute(f'PRAGMA table_info("{name}")')]
        if there != [column.name for column in columns]:
            return False
        listed = ", ".join(f'"{column.name}"' for column in columns)
        table = self.tables[name]
        fresh.execute("SAVEPOINT copying")
        try:
            self._insert(fresh, name, damaged.execute(f'SELECT {listed} FROM "{name}"'))
        except sqlite3.DatabaseError:  # the check did not see it
            fresh.execute("ROLLBACK TO copying")
            self.tables[name] = TableReport(name)
            return False
        finally:
            fresh.execute("RELEASE copying")
        self.tell(f"{name}: {table.saved} rows")
        return True

    def _read_pages(
        self, fresh: sqlite3.Connection, pages: LeafPages, roots: dict[str, int], broken: list[str]
    ) -> None:
        """Save what the pages of tables hold that SQLite can't read."""
        if not broken:
            return
        name_of = {root: name for name, root in roots.items()}
        strays: list[Tree] = []
        for tree in pages.trees([1, *name_of]):
            name = name_of.get(tree.root)
            if name in broken:
                assert name is not None
                table = self.tables[name]
                table.lost_pages += len(tree.lost)
                table.open_ended |= tree.open_ended
                table.highest = tree.highest if tree.open_ended else 0
                self._insert_tree(fresh, pages, tree, name)
            elif name is None and tree.root != 1:
                strays.append(tree)
        for tree in strays:
            candidates = [name for name in broken if self._fits(pages, tree, name)]
            rootless = [name for name in candidates if name not in roots]
            if len(rootless or candidates) == 1:
                self._insert_tree(fresh, pages, tree, (rootless or candidates)[0])
        for name in broken:
            table = self.tables[name]
            table.damaged = True
            if name not in roots and not table.saved:
                table.lost_pages += 1
                table.open_ended = True
            self.tell(f"{name}: {table.saved} rows, by its pages")

    def _fits(self, pages: LeafPages, tree: Tree, name: str) -> bool:
        rows = [row for row in _rows(pages, tree) if row is not None]
        return bool(rows) and all(self._values(row, name) is not None for row in rows)

    def _insert_tree(self, fresh: sqlite3.Connection, pages: LeafPages, tree: Tree, name: str) -> None:
        table = self.tables[name]

        def values() -> Iterator[tuple[Any, ...]]:
            for row in _rows(pages, tree):
                if row is None:
                    table.unreadable += 1
                elif (found := self._values(row, name)) is None:
                    table.dropped += 1
                else:
                    yield found

        self._insert(fresh, name, values())

    def _values(self, row: Row, name: str) -> tuple[Any, ...] | None:
        """Return the columns of a row, None where they are not those of this table."""
        columns = self.columns[name]
        rowid, values = row
        if not 1 <= len(values) <= len(columns):
            return None
        whole = [*values, *(column.default for column in columns[len(values) :])]
        for place, column in enumerate(columns):
            if not column.accepts(whole[place]):
                return None
            if column.is_rowid:
                whole[place] = rowid
        return tuple(whole)

    def _insert(self, fresh: sqlite3.Connection, name: str, rows: Iterable[tuple[Any, ...]]) -> None:
        """Insert rows; those that a constraint refuses are counted, those that are there already are not.

        All indexes have them at once, so none is recent any more.
        """
        table = self.tables[name]
        places = ", ".join("nullif(?, 1)" if column.name == "recent" else "?" for column in self.columns[name])
        sql = f'INSERT INTO "{name}" VALUES ({places})'
        rows = iter(rows)
        while chunk := list(islice(rows, CHUNK)):
            fresh.execute("SAVEPOINT chunk")
            try:
                fresh.executemany(sql, chunk)
                table.saved += len(chunk)
            except (sqlite3.Error, OverflowError):
                fresh.execute("ROLLBACK TO chunk")
                for row in chunk:
                    self._insert_one(fresh, table, sql, row)
            fresh.execute("RELEASE chunk")

    def _insert_one(self, fresh: sqlite3.Connection, table: TableReport, sql: str, row: tuple[Any, ...]) -> None:
        try:
            fresh.execute(sql, row)
        except sqlite3.IntegrityError as error:
            if error.sqlite_errorcode not in (sqlite3.SQLITE_CONSTRAINT_PRIMARYKEY, sqlite3.SQLITE_CONSTRAINT_ROWID):
                table.dropped += 1
        except (sqlite3.InterfaceError, sqlite3.ProgrammingError, OverflowError):  # a text that is none
            table.dropped += 1
        else:
            table.saved += 1

    # -- mending ----------------------------------------------------------------------------------

    def _mend(self, fresh: sqlite3.Connection, revision: str) -> RecoverReport:
        names = {table: [column.name for column in columns] for table, columns in self.columns.items()}
        runs_told(fresh)
        lost_names = name_lost(fresh, names)
        last = {
            name: number
            for name, number in last_numbers(fresh, names).items()
            if self.tables[name].damaged or self.copied.log_is_broken  # else the mention itself is what is wrong
        }
        for name in self._without_gaps():
            table = self.tables[name]
            newest = fresh.execute(f'SELECT coalesce(max(id), 0) FROM "{name}"').fetchone()[0]
            if table.highest > max(newest, last.get(name, 0)):
                last[name] = table.highest
        self._find_missing(fresh, last)
        state = StateReport()
        if self.tables["state"].damaged:
            state = rebuild(fresh, self.tables["state_changes"].missing)
        for name, count in drop_orphans(fresh).items():
            self.tables[name].dropped += count
            self.tables[name].saved -= count
        self.last = last
        self._write_facts(fresh)
        return RecoverReport(
            self.path,
            self.target,
            revision,
            list(self.tables.values()),
            lost_names,
            state,
            self.copied.log_is_broken,
            self.copied.unreadable_bytes,
            newest_backup(self.path),
        )

    def _without_gaps(self) -> list[str]:
        """The tables without gaps that this revision has."""
        return [name for name in WITHOUT_GAPS if name in self.tables]

    def _find_missing(self, fresh: sqlite3.Connection, last: dict[str, int]) -> None:
        for name in self._without_gaps():
            table = self.tables[name]
            damaged = table.damaged or table.dropped > 0
            table.missing = missing(fresh, name, last.get(name, 0), damaged=damaged)

    def _begin_anew(self, fresh: sqlite3.Connection) -> tuple[list[int], list[int]]:
        """Make what is there consistent in itself, so that from here on it can be verified again."""
        names = {table: [column.name for column in columns] for table, columns in self.columns.items()}
        fresh.execute("BEGIN IMMEDIATE")
        told, placed = close_history(fresh, names, self.tables["state_changes"].missing)
        restart_counts(fresh, names)
        self._find_missing(fresh, self.last)
        self._write_facts(fresh)
        fresh.execute("COMMIT")
        return told, placed

    def _write_facts(self, fresh: sqlite3.Connection) -> None:
        """Write who may own it next, and what the next run has to know of what is lost."""
        at_us = SystemClock().now_us()
        token = fresh.execute(
            "SELECT max(token) FROM (SELECT max(token) AS token FROM lease UNION ALL SELECT max(token) FROM runs)"
        ).fetchone()[0]
        fresh.execute("DELETE FROM lease")
        fresh.execute(
            "INSERT INTO lease (id, token, holder, taken_us) VALUES (1, ?, 'ael db recover', ?)",
            ((token or 0) + 1, at_us),
        )
        gaps = {name: table.missing for name, table in self.tables.items() if table.missing}
        if commits := missing_commits(fresh):
            gaps["commits"] = commits
        recovered = {"from": str(self.path), "at_us": at_us, "missing": gaps, "last": self.last}
        fresh.execute(
            "INSERT INTO meta (name, value) VALUES ('recovered', ?) "
            "ON CONFLICT (name) DO UPDATE SET value = excluded.value",
            (json.dumps(recovered),),
        )


def _rows(pages: LeafPages, tree: Tree) -> Iterator[Row | None]:
    """Yield the rows of a tree; one whose number is out of order is as good as unreadable."""
    for number in tree.leaves:
        low, high = tree.bounds.get(number, (-(2**63), 2**63 - 1))
        rows = list(pages.rows(number))
        numbers = [row[0] for row in rows if row is not None]
        at = 0
        for row in rows:
            if row is None:
                yield None
                continue
            following = numbers[at + 1] if at + 1 < len(numbers) else high
            at += 1
            if low < row[0] <= min(high, following):
                low = row[0]
                yield row
            else:
                yield None


def _columns(fresh: sqlite3.Connection, name: str) -> list[_Column]:
    found = fresh.execute(f'PRAGMA table_info("{name}")').fetchall()
    keys = [row for row in found if row[5]]
    columns = []
    for _number, column, kind, required, default, key in found:
        value = None if default is None else fresh.execute(f"SELECT {default}").fetchone()[0]
        is_rowid = bool(key) and len(keys) == 1 and kind.upper() == "INTEGER"
        columns.append(_Column(column, kind.upper(), bool(required), is_rowid, value))
    return columns

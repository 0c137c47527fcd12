"""A new database that starts from a past moment of another one, and remembers its parent.

Made like a backup: a copy by SQLite, beside a running loop too, which has its name only once it is whole, checked and
durable. Between copy and name it is cut back (`cut.py`), which the parent never notices. The history of the fork is
the parent's up to the moment, with the same numbers; what it does from then on is its own.
"""

from __future__ import annotations

import json
import os
import sqlite3
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, delete, insert, select
from sqlalchemy.exc import DBAPIError

from ael_store.clock import SystemClock
from ael_store.errors import DatabaseNotUsable, UsageError
from ael_store.model.records import CommandRecord, Commit, TickRow
from ael_store.model.state import State
from ael_store.schema.tables import KINDS, OUTCOMES, metadata
from ael_store.settings import Settings
from ael_store.store.backup import check_target, copy_database, need_space, size_of, taken, verified_copy
from ael_store.store.cut import HOLDER, Cut
from ael_store.store.moment import Moment, moment_at
from ael_store.store.reader import Reader
from ael_store.store.revision import explain, migration_engine, refuse_other
from ael_store.store.whole_file import discard, publish, replace, reserve, sync
from ael_store.store.writer import Writer

__all__ = ["ForkReport", "fork"]

Tell = Callable[[str], None]

INTERNED = ("keys", "event_types", "event_sources", "moves")


@dataclass(frozen=True, slots=True)
class ForkReport:
    """What `fork` did, or with `dry_run` would do."""

    path: Path
    source: Path
    moment: Moment
    keys: list[str]
    """State keys that were given another value."""
    removed: dict[str, int]
    """Rows that came after the moment, by table."""
    tasks_held: int
    """Tasks that were not over; the first run holds them."""
    untold: list[str]
    """What of the moment the history does not say any more, as sentences."""


def fork(
    path: Path,
    out: Path,
    tell: Tell,
    *,
    at: int | str | None = None,
    values: Mapping[str, str] | None = None,
    actor: str = "this process",
    settings: Settings | None = None,
    force: bool = False,
    dry_run: bool = False,
) -> ForkReport:
    """Make the file `out` from a database as it was at a moment, by default after its last iteration.

    `values` are JSON texts that keys of the state get then, in a commit of their own. `settings` say when an agent
    backs off. Only reads the database, which may be in use. Raises HistoryGone and UsageError for moments that are
    not there, UsageError where `out` exists, OwnedElsewhere where it is in use, StorageFailed where space is short or
    the disk fails, DatabaseDamaged where the copy does not pass; nothing has the name `out` then.
    """
    path, out = path.resolve(), out.absolute()
    settings, values = settings or Settings(), values or {}
    if out.is_dir():
        raise UsageError(f"{out} is a folder: name a file in it")
    check_target(path, out, force)
    if not out.parent.is_dir():
        raise DatabaseNotUsable(f"{out} can't be created: there is no folder {out.parent}; create it first")
    refuse_other(path)
    with _reading(path) as reader, reader.connect() as connection:
        if dry_run:
            cut = Cut(connection, _moment(connection, at), settings)
            return _report(cut, path, out, values, cut.count())
        if at is not None:
            at = moment_at(connection, at).iteration  # refused before anything is copied

    need_space(out.parent, 2 * size_of(path), f"the fork of {path}", "twice the database")
    tell(f"copying {path}")
    temporary = reserve(out, "fork")
    try:
        copy_database(path, temporary, tell)
        verified_copy(temporary, path, tell)  # a value that has changed silently must not get a digest of ours
        tell(f"cutting {out} back")
        report = _cut_back(temporary, path, out, at, values, settings)
        if values:
            _set(temporary, values, actor)
        sync(temporary)
        verified_copy(temporary, path, tell)
        if force:
            check_target(path, out, force)
            replace(temporary, out)
        elif not publish(temporary, out):
            raise taken(out)
    except (DBAPIError, sqlite3.Error) as error:
        raise explain(error, temporary) from error
    finally:
        discard(temporary)
    tell(f"{out} is made and verified")
    return report


def _reading(path: Path) -> closing[Reader]:
    return closing(Reader(path))


def _moment(connection: Connection, at: int | str | None) -> Moment:
    i = metadata.tables["iterations"]
    if at is None:
        at = connection.execute(select(i.c.id).order_by(i.c.id.desc()).limit(1)).scalar() or 0
    return moment_at(connection, at)


def _report(cut: Cut, path: Path, out: Path, values: Mapping[str, str], removed: dict[str, int]) -> ForkReport:
    return ForkReport(out, path, cut.past.moment, list(values), removed, cut.tasks_left, cut.rewind.untold)


# -- the copy becomes the fork ----------------------------------------------------------------------


def _cut_back(
    temporary: Path, path: Path, out: Path, at: int | str | None, values: Mapping[str, str], settings: Settings
) -> ForkReport:
    lease = metadata.tables["lease"]
    with _writing(temporary) as connection:
        with connection.begin():
            cut = Cut(connection, _moment(connection, at), settings)
            token = connection.execute(select(lease.c.token)).scalar_one()
            removed = cut.carry_out(connection)
            _name_parent(connection, path, cut)
        raw: Any = connection.connection.dbapi_connection
        cut.write_back(raw, token)
        raw.executescript("PRAGMA incremental_vacuum")  # `execute` would free a single page
    return _report(cut, path, out, values, removed)


def _name_parent(connection: Connection, path: Path, cut: Cut) -> None:
    """Give the copy an identity of its own, and note where it comes from."""
    meta, moment = metadata.tables["meta"], cut.past.moment
    known: dict[str, Any] = {row[0]: json.loads(row[1]) for row in connection.execute(select(meta))}
    facts: dict[str, Any] = {
        "instance": str(uuid.uuid4()),
        "forked": {
            "from": str(path),
            "instance": known.get("instance"),
            "iteration": moment.iteration,
            "at_us": SystemClock().now_us(),
            "moment": moment.at,
        },
    }
    if "recovered" in known and not cut.past.is_present:  # numbers after the moment are given out again
        facts["recovered"] = {**known["recovered"], "last": {}}
    connection.execute(delete(meta).where(meta.c.name.in_(list(facts))))
    connection.execute(insert(meta), [{"name": name, "value": json.dumps(fact)} for name, fact in facts.items()])


def _set(temporary: Path, values: Mapping[str, str], actor: str) -> None:
    """Give keys of the state other values, in a commit as a command without a loop makes it."""
    with _reading(temporary) as reader:
        resumed = reader.resume(values, tasks=False)
        last_ids = reader.last_ids(INTERNED)
    clock = SystemClock()
    now_us = clock.now_us()
    changes = State(resumed.cells, resumed.change_id).apply(values, resumed.tick_id + 1, 0)
    commit = Commit(
        "command", resumed.commit_id + 1, resumed.token + 1, resumed.iteration, None, now_us, resumed.tick_id
    )
    if changes:
        commit.tick_id += 1
        commit.changes = changes
        commit.ticks = [
            TickRow(
                id=commit.tick_id,
                iteration=resumed.iteration,
                place=0,
                agent_id=0,
                kind=KINDS["outside"],
                outcome=OUTCOMES["success"],
                started_us=now_us,
                duration_us=0,
                seed=clock.seed(),
                change_id=resumed.change_id,
                event_id=resumed.event_id,
                changes=len(changes),
                events=0,
                seen_change_id=None,
                cause_event_id=None,
                subscription_id=None,
            )
        ]
    # The values are in the history, where `ael state redact` finds them.
    arguments = json.dumps({"keys": list(values)}, ensure_ascii=False)
    commit.commands = [CommandRecord(resumed.command_id + 1, commit.id, now_us, actor, "fork.set", arguments, None)]
    writer = Writer()
    writer.last_ids = last_ids
    with _writing(temporary) as connection:
        raw: Any = connection.connection.dbapi_connection
        writer.write(raw, commit, take_from=resumed.token, holder=f"pid {os.getpid()}: {HOLDER}")


@contextmanager
def _writing(temporary: Path) -> Iterator[Connection]:
    """Give a connection to the copy, which is made durable as a whole in the end."""
    engine = migration_engine(temporary)
    try:
        with engine.connect() as connection:
            raw: Any = connection.connection.dbapi_connection
            raw.execute("PRAGMA synchronous = OFF")
            yield connection
    finally:
        engine.dispose()

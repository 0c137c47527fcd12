"""Taking a database from an owner that does nothing with it any more: it hangs, or somebody has stopped it.

First the owner is fenced: the token that each of its commits checks moves on, in a transaction of its own. Only
then the lock changes hands. In this order nobody can find the lock free while the old owner could still write: a
process that is killed between the two leaves an owner that holds the lock and will end at its next commit.

An owner that was stopped inside a write transaction still has SQLite's own lock, which nobody can take from it but
the kernel, at its end.
"""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path
from typing import Any

from sqlalchemy import create_engine, event, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from ael_store.clock import SystemClock
from ael_store.errors import OwnedElsewhere
from ael_store.schema.tables import metadata
from ael_store.store.lock import Holder
from ael_store.store.sqlite import translate

__all__ = ["fence"]

PATIENCE_S = 2.0
"""How long the owner may take to end a transaction that it is in."""

LOCKS = Path("/proc/locks")
WRITE_LOCK_BYTE = 120
"""Where in the shared memory of a log SQLite locks for writing."""


def fence(path: Path, holder: Holder) -> None:
    """Move the fencing token, so that the owner of a database can commit nothing more; durable on return.

    Does nothing where there is no database yet. Raises OwnedElsewhere, with what to do, where the owner is inside
    a write transaction and stays there.
    """
    if not path.exists():
        return
    lease = metadata.tables["lease"]
    engine = create_engine("sqlite+pysqlite://", creator=lambda: _connect(path), poolclass=NullPool)

    @event.listens_for(engine, "begin")
    def begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    try:
        with engine.begin() as connection:
            connection.execute(
                update(lease).values(
                    token=lease.c.token + 1, holder=f"pid {os.getpid()}: take-over", taken_us=SystemClock().now_us()
                )
            )
    except DBAPIError as error:
        if getattr(error.orig, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY:
            raise _write_lock_held(path, holder) from error
        raise translate(error, path) from error
    finally:
        engine.dispose()


def _connect(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True, isolation_level=None, timeout=PATIENCE_S)


def _write_lock_held(path: Path, holder: Holder) -> OwnedElsewhere:
    pid = _writer(path) or (holder.pid if holder.is_here else None)
    if pid is None:
        return OwnedElsewhere(f"{path} is in a write transaction of {holder}: end that process, then start again")
    if pid != holder.pid:
        return OwnedElsewhere(
            f"{path} can't be taken over: pid {pid}, which is not its owner, is inside a transaction and holds the "
            "write lock; end that program's transaction, then start again"
        )
    return OwnedElsewhere(
        f"{path} can't be taken over: pid {pid} is inside a transaction and holds the write lock; kill it: "
        f"`kill -9 {pid}`, then start again (without --take-over). What it has not committed is rolled back"
    )


def _writer(path: Path) -> int | None:
    """Return the process that holds SQLite's write lock, as the kernel has it; None where that can't be told."""
    try:
        inode = path.with_name(path.name + "-shm").stat().st_ino
        lines = LOCKS.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        fields = line.split()  # 1: POSIX ADVISORY WRITE 4711 fd:00:1234 120 120
        if len(fields) < 8 or fields[1] != "POSIX" or fields[3] != "WRITE" or not fields[7].isdigit():
            continue
        found = fields[5].rpartition(":")[2]
        if found == str(inode) and int(fields[6]) <= WRITE_LOCK_BYTE <= int(fields[7]) and int(fields[4]) > 0:
            return int(fields[4])
    return None

"""Making a new database: at the newest schema at once, under another name, so that it appears whole."""

from __future__ import annotations

import json
import os
import sqlite3
import uuid
from functools import cache
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, create_mock_engine, insert, select
from sqlalchemy.dialects import sqlite
from sqlalchemy.exc import DBAPIError

from ael_store._version import __version__
from ael_store.clock import SystemClock
from ael_store.errors import DatabaseNotUsable
from ael_store.schema.sqlite_views import VIEWS
from ael_store.schema.tables import metadata
from ael_store.store.revision import HEAD, explain, migration_engine, refuse_half_restored
from ael_store.store.whole_file import discard, publish, reserve, sync

__all__ = ["create_database", "create_schema", "describe_database", "exists"]

VERSION_TABLE = (
    "CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL, "
    "CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num))"
)


def create_database(path: Path) -> None:
    """Create a database at the newest schema, mode 0600; it is durable and whole when it appears.

    Does nothing where a file of that name exists, also one that appeared meanwhile. Raises DatabaseNotUsable
    where the folder is missing or can't be written, StorageFailed where the disk is full.
    """
    refuse_half_restored(path)
    if exists(path):
        return
    temporary = reserve(path, "new")
    try:
        engine = migration_engine(temporary)
        try:
            with engine.begin() as connection:
                create_schema(connection)
        finally:
            engine.dispose()
        sync(temporary)
        publish(temporary, path)
    except (DBAPIError, sqlite3.Error) as error:
        raise explain(error, path) from error
    finally:
        discard(temporary)


def exists(path: Path) -> bool:
    """Say whether there is a file; a link that leads nowhere, or something else than a file, is refused."""
    if not os.path.lexists(path):
        return False
    if not path.exists():
        raise DatabaseNotUsable(
            f"{path} is a link to {os.readlink(path)}, which does not exist: create it or remove it"
        )
    if path.is_dir():
        raise DatabaseNotUsable(f"{path} is a folder; name a file with --db or AEL_DB")
    if not path.is_file():
        raise DatabaseNotUsable(f"{path} is no file; name another one with --db or AEL_DB")
    return True


def create_schema(connection: Connection) -> None:
    """Make the newest schema with its first rows, without Alembic."""
    for statement in _tables_and_indexes():
        connection.exec_driver_sql(statement)
    for name, text in VIEWS.items():
        connection.exec_driver_sql(f"CREATE VIEW {name} AS\n{text}")
    connection.exec_driver_sql(VERSION_TABLE)
    connection.exec_driver_sql("INSERT INTO alembic_version (version_num) VALUES (?)", (HEAD,))
    connection.execute(insert(metadata.tables["lease"]).values(id=1, token=0, holder="", taken_us=0))
    connection.execute(
        insert(metadata.tables["agents"]).values(
            id=0,
            name="(outside)",
            priority=0,
            enabled=0,
            registered=0,
            failures=0,
            metadata="{}",
            created_us=0,
        )
    )
    describe_database(connection)


@cache
def _tables_and_indexes() -> tuple[str, ...]:
    """Return what `metadata.create_all` would carry out; to put it together takes longer than to carry it out."""
    statements: list[str] = []

    def keep(ddl: Any, *_parameters: Any) -> None:
        statements.append(str(ddl.compile(dialect=sqlite.dialect())))

    metadata.create_all(create_mock_engine("sqlite://", keep), checkfirst=False)
    return tuple(statements)


def describe_database(connection: Connection) -> None:
    """Write the facts of a new database into `meta`: its identity, when and by what it was made."""
    meta = metadata.tables["meta"]
    if connection.execute(select(meta.c.name).where(meta.c.name == "instance")).first() is None:
        facts = {
            "instance": str(uuid.uuid4()),
            "created_us": SystemClock().now_us(),
            "created_by": __version__,
        }
        connection.execute(insert(meta), [{"name": name, "value": json.dumps(fact)} for name, fact in facts.items()])

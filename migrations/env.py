"""How Alembic reaches the database, from the library and from the plain `alembic` command.

One upgrade or downgrade is one transaction, however many revisions it passes: begin (which takes SQLite's
write lock), drop the views, let the revisions work on the tables, create the views of the revision that was
reached and those of the user, check, commit. So the database is afterwards at the revision asked for, or
exactly as it was. The revision is read under the write lock, so several upgrades at once do the work once.
And revisions never meet a view, over which SQLite stumbles when a table is rebuilt or loses a column. Our
views of each revision are frozen in `views/`.

A transaction per revision was rejected: a failure in the second of three would leave a database that neither
the old program nor the new one accepts.

The library passes its connection in `config.attributes["connection"]`. The plain command takes the database
from `-x db=…`, else AEL_DB, else `ael.db`, and holds the database's lock while it changes something. Only
`alembic upgrade` creates a database.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from logging.config import fileConfig
from pathlib import Path
from typing import Any

from alembic import context
from alembic.util import CommandError
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from ael_store.errors import AelError
from ael_store.schema.tables import metadata
from ael_store.store.create import describe_database, exists
from ael_store.store.lock import DatabaseLock
from ael_store.store.revision import current_revision, explain, migration_engine
from ael_store.store.sqlite import database_path
from ael_store.store.upgrade import confirm, prepare_file

VIEWS = Path(__file__).parent / "views"
LOCK_WAIT_S = 30.0

config = context.config


def view_statements(connection: Connection, revision: str) -> list[str]:
    """Return the CREATE VIEW statements of a revision."""
    file = VIEWS / f"{revision}.{connection.dialect.name}.sql"
    if not file.exists():
        raise CommandError(f"{file} is missing: the views of revision {revision}, copied from the one before it")
    text = file.read_text(encoding="utf-8")
    text = re.sub(r"^--.*\n", "", text, flags=re.MULTILINE)
    return [statement.strip() for statement in text.split(";\n") if statement.strip()]


def take_views_down(connection: Connection) -> list[str]:
    """Drop all views, and return the statements that make those again that are the user's own."""
    texts = [file.read_text(encoding="utf-8") for file in VIEWS.glob(f"*.{connection.dialect.name}.sql")]
    ours = {name for text in texts for name in re.findall(r"^CREATE VIEW (\w+)", text, re.MULTILINE)}
    views = "SELECT name, sql FROM sqlite_schema WHERE type = 'view' ORDER BY rowid"
    triggers = "SELECT tbl_name, sql FROM sqlite_schema WHERE type = 'trigger' ORDER BY rowid"
    found = {str(name): str(sql) for name, sql in connection.exec_driver_sql(views)}
    theirs = [sql for name, sql in found.items() if name not in ours]
    theirs += [str(sql) for name, sql in connection.exec_driver_sql(triggers) if name in found.keys() - ours]
    for name in found:
        quoted = name.replace('"', '""')
        connection.exec_driver_sql(f'DROP VIEW "{quoted}"')
    return theirs


def configure(connection: Connection) -> None:
    tell = config.attributes.get("progress")

    def applied(ctx: Any, step: Any, heads: Any, run_args: Any) -> None:
        if tell is not None:
            before, after = step.down_revision_ids, step.up_revision_ids
            if not step.is_upgrade:
                before, after = after, before
            tell(f"schema {', '.join(before) or 'empty'} -> {', '.join(after) or 'empty'}")

    context.configure(
        connection=connection,
        target_metadata=metadata,
        render_as_batch=True,
        transactional_ddl=True,
        compare_server_default=True,
        on_version_apply=applied,
    )


def look(connection: Connection) -> None:
    """Run a command that reads: current, check, revision --autogenerate."""
    configure(connection)
    context.run_migrations()


def change(connection: Connection) -> None:
    """Run a command that moves the database to another revision, as one transaction."""
    with connection.begin():
        configure(connection)
        theirs = take_views_down(connection)
        context.run_migrations()
        for revision in context.get_context().get_current_heads():
            for statement in view_statements(connection, revision):
                connection.exec_driver_sql(statement)
            describe_database(connection)
        for statement in theirs:
            connection.exec_driver_sql(statement)
        confirm(connection)


def command_name() -> str:
    """Return which function of `alembic.command` the plain command runs."""
    parsed = getattr(config.cmd_opts, "cmd", None)
    return parsed[0].__name__ if parsed else ""


def run_plain_command() -> None:
    """Run for the `alembic` command, which brings no connection."""
    if config.config_file_name is not None:
        fileConfig(config.config_file_name, disable_existing_loggers=False)
    chosen = context.get_x_argument(as_dictionary=True).get("db") or os.environ.get("AEL_DB") or "ael.db"
    name = command_name()
    try:
        path = database_path(str(chosen))
        if name != "upgrade" or exists(path):
            current_revision(path)  # what is missing or no database of ours gets no lock file
        if name in ("upgrade", "downgrade", "stamp"):
            with DatabaseLock(path).held(f"alembic {name}", LOCK_WAIT_S):
                prepare_file(path, create=name == "upgrade")
                connect(path, change)
        else:
            connect(path, look)
    except AelError as error:
        raise CommandError(str(error)) from error


def connect(path: Path, work: Callable[[Connection], None]) -> None:
    """Let `work` have a connection, which can write only where it is to change something."""
    engine = migration_engine(path, read_only=work is look)
    try:
        with engine.connect() as connection:
            work(connection)
    except DBAPIError as error:
        raise explain(error, path) from error
    finally:
        engine.dispose()


if context.is_offline_mode():
    raise CommandError("--sql is not supported: revisions look at the database that they change")
if config.attributes.get("connection") is not None:
    change(config.attributes["connection"])
else:
    run_plain_command()

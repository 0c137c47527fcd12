"""`ael db`: the schema's life."""

from __future__ import annotations

from typing import Annotated

import typer

from ael_store.cli.agents import confirm
from ael_store.cli.call import Call
from ael_store.cli.command import command, group
from ael_store.cli.output import colored, note, print_json, say
from ael_store.errors import UsageError
from ael_store.telemetry import printable

__all__ = ["add_to"]

LOCK_WAIT_S = 5.0
"""How long to wait for a command that holds the lock for a moment."""

DAMAGED, OUT_OF_DATE, PROBLEMS = 65, 78, 1

Backup = Annotated[bool, typer.Option("--backup/--no-backup", help="Make a verified copy beside it first.")]


def add_to(app: typer.Typer) -> None:
    """Add the commands of this noun."""
    db = group(app, "db", "Look after the database and its schema.")
    command(db, "upgrade", values=True)(upgrade)
    command(db, "downgrade", values=True)(downgrade)
    command(db, "current")(current)
    command(db, "check")(check)


def upgrade(
    call: Call,
    revision: Annotated[str, typer.Argument(metavar="[REV]", help="A revision, +N, or head.")] = "head",
    backup: Backup = True,
) -> None:
    """Bring the schema up to date, whole or not at all."""
    _move(call, "upgrade", revision, backup)


def downgrade(
    call: Call,
    revision: Annotated[str, typer.Argument(metavar="REV", help="A revision, or -1 for the one before.")],
    backup: Backup = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Bring the schema back for an older ael; loses what that can't hold."""
    from ael_store.store.revision import current_revision

    call.check_exists()
    before = current_revision(call.path)
    target = _target(call, before, revision)
    if dry_run:
        if call.json:
            print_json({"from": before, "to": target, "backup": None, "changed": False})
        else:
            kept = "a backup would be made first" if backup else "no backup would be made"
            say(f"would downgrade {printable(str(call.path))} from {before} to {target}; {kept}")
        return
    if before != target:
        confirm(f"Downgrade from {before} to {target}? What the older schema can't hold is lost.", yes)
    _move(call, "downgrade", revision, backup)


def current(call: Call) -> None:
    """Print the revision of the schema."""
    from ael_store.store.revision import HEAD, current_revision

    call.check_exists()
    revision = current_revision(call.path)
    if call.json:
        print_json({"revision": revision, "head": HEAD, "up_to_date": revision == HEAD})
        return
    say(revision or "")
    if revision is None:
        note(f"{call.path} is empty: `ael run` or `ael db upgrade` makes it a database")
    elif revision != HEAD:
        note(f"this program needs {HEAD}" + (": run `ael db upgrade`" if revision < HEAD else ", which is older"))


def check(call: Call) -> None:
    """Look for damage and for differences from what should be there."""
    from ael_store.store.upgrade import check

    call.check_exists()
    report = check(call.path)
    if call.json:
        print_json(
            {
                "revision": report.revision,
                "head": report.head,
                "up_to_date": report.up_to_date,
                "damaged": report.damaged,
                "problems": report.problems,
            }
        )
    else:
        for problem in report.problems:
            say(colored(printable(problem), "red" if report.damaged else "yellow"))
        if not report.up_to_date and report.revision is not None:
            say(f"revision {report.revision}, this program needs {report.head}")
        if report.up_to_date and not report.problems:
            say(f"{printable(str(call.path))}: revision {report.revision}, no problems")
    if report.damaged:
        raise typer.Exit(DAMAGED)
    if not report.up_to_date:
        raise typer.Exit(OUT_OF_DATE)
    if report.problems:
        raise typer.Exit(PROBLEMS)


# -- the small things -------------------------------------------------------------------------------


def _move(call: Call, verb: str, revision: str, backup: bool) -> None:
    """Upgrade or downgrade under the lock, and say what was done."""
    from ael_store.store import upgrade as schema
    from ael_store.store.lock import DatabaseLock

    call.check_exists()
    schema.current_revision(call.path)  # before a lock file is made beside something else
    with DatabaseLock(call.path).held(f"ael db {verb}", LOCK_WAIT_S):
        if verb == "upgrade":
            report = schema.upgrade(call.path, revision=revision, backup=backup, progress=note)
        else:
            report = schema.downgrade(call.path, revision, backup=backup, progress=note)
    changed = report.from_revision != report.to_revision
    if call.json:
        print_json(
            {
                "from": report.from_revision,
                "to": report.to_revision,
                "backup": None if report.backup is None else str(report.backup),
                "changed": changed,
            }
        )
    elif changed:
        before = "an empty file" if report.from_revision is None else report.from_revision
        say(f"{verb}d {printable(str(call.path))} from {before} to {report.to_revision}")
        if report.backup is not None:
            say(f"backup: {printable(str(report.backup))}")
    else:
        say(f"{printable(str(call.path))} is at revision {report.to_revision} already")


def _target(call: Call, before: str | None, revision: str) -> str:
    """Return the id of the revision that `downgrade` would go to."""
    from ael_store.store.revision import alembic_config, known_revisions, refuse_newer
    from ael_store.store.upgrade import place_of

    known = known_revisions(alembic_config())
    refuse_newer(call.path, before, known)
    if before is None:
        raise UsageError(f"{call.path} is empty: there is nothing to downgrade")
    return known[place_of(known, known.index(before), revision)]

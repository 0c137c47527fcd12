"""`ael db`: the life of the schema and of the file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ael_store.cli.agents import confirm
from ael_store.cli.call import Call
from ael_store.cli.command import command, group
from ael_store.cli.output import Column, colored, note, number, print_json, print_table, progress, say, size
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
    command(db, "verify")(verify)
    command(db, "backup")(backup)
    command(db, "restore")(restore)
    command(db, "recover")(recover)
    command(db, "prune")(prune)
    command(db, "size")(show_size)


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


def verify(call: Call) -> None:
    """Prove that the database holds what was committed."""
    from ael_store.store.verify import verify

    call.check_exists()
    report = verify(call.path, tell=progress())
    if call.json:
        print_json(
            {
                "commits": report.commits,
                "sealed": report.sealed,
                "rows": report.rows,
                "keys": report.keys,
                "problems": report.problems,
                "more": report.more,
            }
        )
    else:
        for problem in report.problems:
            say(colored(printable(problem), "red"))
        if report.more:
            say(f"… and {report.more} more")
        if not report.problems:
            bare = report.commits - report.sealed
            seals = f"; {bare} commit{'s' * (bare > 1)} without digests: from before those, or cut short by a fork"
            say(
                f"{printable(str(call.path))}: {report.commits} commits, {report.keys} keys and {report.rows} rows are "
                "what was committed" + (seals if bare else "")
            )
    if report.problems:
        raise typer.Exit(DAMAGED)


def backup(
    call: Call,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new file, or a folder for a file with a dated name.")],
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
) -> None:
    """Make a verified copy, also while a loop runs."""
    from ael_store.store.backup import make_backup

    call.check_exists()
    report = make_backup(call.path, out, progress(), force=force)
    if call.json:
        print_json(
            {
                "path": str(report.path),
                "bytes": report.bytes,
                "revision": report.revision,
                "iteration": report.iteration,
                "verified": True,
            }
        )
    else:
        say(f"{printable(str(report.path))}: {size(report.bytes)}, iteration {report.iteration}, verified")


def restore(
    call: Call,
    backup: Annotated[Path, typer.Argument(metavar="BACKUP", help="A file that `ael db backup` or an upgrade made.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")] = False,
) -> None:
    """Put a backup in the place of the database, which is kept."""
    from ael_store.store.lock import DatabaseLock, current_holder
    from ael_store.store.restore import restore

    if dry_run:
        report = restore(call.path, backup, note, dry_run=True)
        if (holder := current_holder(call.path)) is not None:
            note(f"{call.path} is owned by {holder}: stop it before you restore")
    else:
        with DatabaseLock(call.path).held("ael db restore", LOCK_WAIT_S):
            report = restore(call.path, backup, note)
    if call.json:
        print_json(
            {
                "path": str(report.path),
                "backup": str(report.backup),
                "iteration": report.now.iteration,
                "at": report.now.at,
                "revision": report.now.revision,
                "iteration_before": None if report.before is None else report.before.iteration,
                "at_before": None if report.before is None else report.before.at,
                "kept": None if report.kept is None else str(report.kept),
                "changed": not dry_run,
            }
        )
        return
    say(
        f"{'would restore' if dry_run else 'restored'} {printable(str(report.path))} to iteration "
        f"{report.now.iteration} ({report.now.at or 'no time'})"
        + (f", it was at {report.before.iteration} ({report.before.at or 'no time'})" if report.before else "")
    )
    if report.kept is not None:
        say(f"{'would keep' if dry_run else 'kept'} the old file as {printable(str(report.kept))}")


def recover(
    call: Call,
    damaged: Annotated[Path, typer.Argument(metavar="DAMAGED", help="The damaged file; it is only read.")],
    to: Annotated[Path, typer.Option("--to", metavar="OUT", help="The new file.")],
) -> None:
    """Save what can be read of a damaged database into a new file."""
    from ael_store.store.recover import recover

    report = recover(damaged, to, progress())
    if call.json:
        print_json(
            {
                "from": str(report.source),
                "to": str(report.target),
                "revision": report.revision,
                "complete": report.complete,
                "tables": {
                    table.name: {
                        "saved": table.saved,
                        "dropped": table.dropped,
                        "unreadable": table.unreadable,
                        "lost_pages": table.lost_pages,
                        "missing": table.missing,
                        "open_ended": table.open_ended,
                    }
                    for table in report.tables
                },
                "names_lost": report.names,
                "state": {
                    "rebuilt": report.state.rebuilt,
                    "uncertain": report.state.uncertain,
                    "lost": report.state.lost,
                },
                "changes_told": report.told,
                "deletions_placed": report.placed,
                "log_is_broken": report.log_is_broken,
                "unreadable_bytes": report.unreadable_bytes,
                "unproven": report.unproven,
                "backup": None if report.backup is None else str(report.backup),
            }
        )
    else:
        for line in report.lines():
            say(printable(line))
    if not report.complete:
        raise typer.Exit(PROBLEMS)


# -- the small things -------------------------------------------------------------------------------


def _move(call: Call, verb: str, revision: str, backup: bool) -> None:
    """Upgrade or downgrade under the lock, and say what was done."""
    from ael_store.store import upgrade as schema
    from ael_store.store.lock import DatabaseLock
    from ael_store.store.place import check_place

    call.check_exists()
    check_place(call.path, allow_shared_folder=call.loaded.settings.allow_shared_folder)
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


def prune(
    call: Call,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
) -> None:
    """Remove the history that the settings do not keep."""
    from ael_store.store.lock import LOOP, current_holder

    if dry_run:
        _show_plan(call)
        return
    holder = current_holder(call.path) if call.path.exists() else None
    if holder is not None and holder.what == LOOP:
        call.change("db.prune")
        if call.json:
            print_json({"removed": None, "running": True})
        else:
            say("the loop removes it between its iterations; its log says how much")
        return
    import asyncio

    from ael_store.runtime.prune_alone import prune_alone

    call.check_revision()
    removed = asyncio.run(prune_alone(call.path, call.loaded.settings, progress()))
    if call.json:
        print_json({"removed": removed, "running": False})
    else:
        say(f"removed {removed} rows; free pages are used again" if removed else "there is nothing to remove")


def _show_plan(call: Call) -> None:
    from ael_store.clock import SystemClock, iso
    from ael_store.runtime.pruner import prune_limits

    settings = call.loaded.settings
    limits = prune_limits(
        settings.history_days,
        settings.event_days,
        settings.history_rows,
        settings.history_bytes,
        SystemClock().now_us(),
    )
    with call.reader() as reader:
        plan = reader.whole_prune(limits)
    if call.json:
        print_json(plan)
        return
    if not plan["rows"]:
        say("there is nothing to remove")
        return
    began = "" if plan["started_us"] is None else f", {iso(plan['started_us'])}"
    say(f"history would begin after iteration {plan['iteration']}{began}")
    columns = (Column("table"), Column("rows", right=True))
    print_table(columns, ((name, number(rows)) for name, rows in plan["tables"].items()))
    say(f"about {plan['rows']} rows and {size(plan['bytes'])}, without what is needed for the present")


def show_size(call: Call) -> None:
    """Show what takes the room, by table."""
    from ael_store.store.size import measure

    call.check_revision()
    report = measure(call.path)
    if call.json:
        print_json(
            {
                "file_bytes": report.file_bytes,
                "used_bytes": report.used_bytes,
                "free_bytes": report.free_bytes,
                "tables": [
                    {"name": table.name, "rows": table.rows, "bytes": table.bytes, "index_bytes": table.index_bytes}
                    for table in report.tables
                ],
            }
        )
        return
    columns = (
        Column("table"),
        Column("rows", right=True),
        Column("size", right=True),
        Column("indexes", right=True),
    )
    cells = (
        (
            table.name,
            number(table.rows),
            "" if table.bytes is None else size(table.bytes),
            "" if table.index_bytes is None else size(table.index_bytes),
        )
        for table in report.tables
        if table.rows
    )
    print_table(columns, cells, empty="every table is empty")
    note(f"{size(report.file_bytes)} in the file, {size(report.free_bytes)} of them in free pages")

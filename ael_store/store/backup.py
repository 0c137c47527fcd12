"""A verified copy of a database, made while others may read and write.

A backup has its name only once it is whole, checked and durable; what a killed process leaves is a file with a
leading dot, which the next backup into the same folder removes.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from ael_store.clock import SystemClock, from_us
from ael_store.errors import DatabaseDamaged, DatabaseNotUsable, NotADatabase, OwnedElsewhere, StorageFailed, UsageError
from ael_store.store.advice import advice
from ael_store.store.lock import current_holder
from ael_store.store.progress import Tell, telling
from ael_store.store.revision import HEAD, current_revision, reading
from ael_store.store.schema_check import check
from ael_store.store.verify import verify
from ael_store.store.whole_file import discard, publish, replace, reserve, sync

__all__ = [
    "BESIDE",
    "BackupReport",
    "back_up",
    "check_target",
    "copy_database",
    "make_backup",
    "need_space",
    "require_space",
    "size_of",
    "taken",
    "verified_copy",
]

BESIDE = ("-wal", "-shm", "-journal")
"""What SQLite keeps beside a database."""


@dataclass(frozen=True, slots=True)
class BackupReport:
    """A backup that was made."""

    path: Path
    bytes: int
    revision: str
    iteration: int
    """The last iteration that it holds, 0 where there is none."""


# -- what an upgrade does first ---------------------------------------------------------------------


def require_space(path: Path, *, backup: bool) -> None:
    """Refuse to begin where the disk can't hold a rebuilt table, and a backup, beside the database."""
    times, why = (2, "twice the database") if backup else (1, "as much as the database")
    need_space(path.parent, times * size_of(path), f"the upgrade of {path}", why)


def back_up(path: Path, tell: Tell) -> Path:
    """Make a checked copy beside the database and return its path, which names its revision and time.

    Checked is its structure; whether the database is what was committed is not the upgrade's question.
    """
    return make_backup(path, path.parent, tell, prove=False).path


# -- `ael db backup` --------------------------------------------------------------------------------


def make_backup(path: Path, out: Path, tell: Tell, *, force: bool = False, prove: bool = True) -> BackupReport:
    """Copy a database to the file `out`, or into the folder `out` under a name that tells its revision and time.

    Only reads the database, which may be in use. With `force` a file that is there is replaced, at once and whole;
    without `prove` the copy is checked by SQLite alone, and not by `verify`.
    Raises UsageError where `out` exists, OwnedElsewhere where it is a database in use, StorageFailed where space is
    short or the disk fails, DatabaseDamaged where the copy does not pass; nothing has the name `out` then.
    """
    path, out = path.resolve(), out.absolute()
    target = out / path.name if out.is_dir() else out
    if not out.is_dir():
        check_target(path, target, force)
    if not target.parent.is_dir():
        raise DatabaseNotUsable(f"{target} can't be created: there is no folder {target.parent}; create it first")
    if current_revision(path) is None:
        raise NotADatabase(f"{path} is empty: there is nothing to back up")
    size = size_of(path)
    need_space(target.parent, size, f"the backup of {path}", "the database")
    tell(f"backing up {path} ({megabytes(size)})")
    temporary = reserve(target, "bak")
    try:
        copy_database(path, temporary, tell)
        sync(temporary)
        report = verified_copy(temporary, path, tell, prove=prove)
        if out.is_dir():
            target = _name_in_folder(temporary, target, report.revision)
        elif force:
            check_target(path, target, force)
            replace(temporary, target)
        elif not publish(temporary, target):
            raise taken(target)
    finally:
        discard(temporary)
    tell(f"backup {target} is made and verified")
    return BackupReport(target, report.bytes, report.revision, report.iteration)


def _name_in_folder(temporary: Path, like: Path, revision: str) -> Path:
    """Give a backup a name of its own in a folder and return it."""
    made = from_us(SystemClock().now_us()).strftime("%Y%m%dT%H%M%SZ")
    name = f"{like.name}.bak-{revision}-{made}"
    target = like.with_name(name)
    more = 1
    while not publish(temporary, target):
        more += 1
        target = like.with_name(f"{name}-{more}")
    return target


def check_target(path: Path, target: Path, force: bool) -> None:
    """Refuse a name that belongs to something else."""
    if target in (path, *(path.with_name(path.name + end) for end in (*BESIDE, ".lock"))):
        raise UsageError(f"{target} belongs to the database itself: name another file")
    for end in BESIDE:  # a copy of that name would be read together with somebody else's log
        if os.path.lexists(target.with_name(target.name + end)):
            raise OwnedElsewhere(
                f"{target.name}{end} lies in {target.parent}, so a database {target.name} is or was in use there: "
                "name another file"
            )
    if not os.path.lexists(target):
        return
    if not force:
        raise taken(target)
    if target.exists() and (target.samefile(path) or not target.is_file()):
        raise UsageError(f"{target} can't be replaced: name another file")
    if (holder := current_holder(target)) is not None:
        raise OwnedElsewhere(f"{target} is owned by {holder}: name another file")


def taken(target: Path) -> UsageError:
    """Return the refusal of a name that exists."""
    return UsageError(f"{target} exists; name another file or a folder, or replace it with --force")


# -- copying and verifying --------------------------------------------------------------------------


def copy_database(path: Path, temporary: Path, tell: Tell) -> None:
    """Write what a database holds at this moment into an empty file, by SQLite; tells how far it is."""
    expected = megabytes(size_of(path))

    def written(_seconds: int) -> str:
        return f"{megabytes(temporary.stat().st_size)} of at most {expected} are written"

    with telling(tell, written), reading(path) as connection:
        connection.execute("VACUUM INTO ?", (str(temporary),))


def verified_copy(temporary: Path, source: Path, tell: Tell, *, prove: bool = True) -> BackupReport:
    """Say what a fresh copy holds; raises DatabaseDamaged where it can't be trusted."""
    revision = current_revision(temporary)
    with telling(tell, lambda seconds: f"checking the copy, {seconds} s so far"), reading(temporary) as connection:
        found = [str(row[0]) for row in connection.execute("PRAGMA integrity_check(5)")]
        problems = [line for line in found if line != "ok"]
        iteration = 0
        if not problems:
            iteration = connection.execute("SELECT coalesce(max(id), 0) FROM iterations").fetchone()[0]
    if prove and not problems and revision is not None:
        oddities = check(temporary).problems  # tables of a user, for example: a copy of them is a good copy
        for oddity in oddities:
            tell(f"{source}: {oddity}")
        if revision == HEAD:
            problems = [problem for problem in verify(temporary).problems if problem not in oddities]
    if problems or revision is None:
        raise DatabaseDamaged(
            f"a copy of {source} does not pass the check ({'; '.join(problems[:5]) or 'it is empty'}), so it was not "
            f"kept; {advice(source)}"
        )
    return BackupReport(temporary, temporary.stat().st_size, revision, iteration)


# -- space ------------------------------------------------------------------------------------------


def size_of(path: Path) -> int:
    """Return the bytes of a database and its log."""
    size = path.stat().st_size
    with contextlib.suppress(FileNotFoundError):
        size += path.with_name(path.name + "-wal").stat().st_size
    return size


def need_space(folder: Path, size: int, what: str, why: str) -> None:
    """Raise StorageFailed where a folder has less than `size` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise StorageFailed(
            f"{folder} has {megabytes(free)} free, {what} needs {megabytes(size)} ({why}): "
            "free some space and start again; nothing was changed"
        )


def megabytes(size: int) -> str:
    return f"{size / 1_000_000:.1f} MB"

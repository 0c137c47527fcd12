"""What `ael doctor` looks at of a database: its place, its files, who holds it, what is in it."""

from __future__ import annotations

import os
import shlex
import stat
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

from ael_store.cli.finding import Finding, all_of, fail, ok, warn
from ael_store.cli.output import size
from ael_store.errors import AelError, LoopNotRunning
from ael_store.settings import Settings
from ael_store.store.advice import advice, newest_backup
from ael_store.store.examination import Examination, examine
from ael_store.store.lock import LOOP, Holder, current_holder
from ael_store.store.place import MOUNTS, check_place, mount_of, readable_by_others, refuse_hard_links
from ael_store.store.revision import HEAD, alembic_config, known_revisions, refuse_newer

__all__ = ["ADVICE", "database_checks"]

MEGABYTE = 1_000_000
LEAST_FREE, FEW_FREE = 20 * MEGABYTE, 500 * MEGABYTE
LEAST_INODES, FEW_INODES = 20, 1000
LARGE_LOG = 64 * MEGABYTE
OLD_BACKUP = timedelta(days=30)
PATIENCE_S = 2.0
MOST_PROBLEMS = 20
SKEW = timedelta(seconds=5)

IN_MEMORY = ("tmpfs", "ramfs")
SHARED = ("9p", "virtiofs", "drvfs", "fuse.vmhgfs-fuse", "fuse.osxfs", "vboxsf")

ADVICE = {
    "crashed_run": "nothing, where the loop runs again; the log before that moment says why it ended",
    "quarantined_agent": "`ael agents show {0}`; repair what fails, then `ael agents release {0}`",
    "failing_agent": "`ael agents show {0}`; it is tried again by itself",
    "dead_letters": "`ael events dead`; repair what fails, then `ael events redeliver --subscriber {0}`",
    "lagging_subscriber": "`ael why {0}`",
    "expired_subscriber": "unregister what is gone for good, or set a longer backlog_days",
    "overrun": "`ael agents list` shows who takes long: background = true for it, or a longer tick_rate",
    "paused_loop": "look at the log, then `ael resume`",
    "limit_reached": "`ael limits show {0}`; `ael limits raise {0}` lets more through today",
    "unknown_limit": "write a table [limits.{0}] into the settings file",
    "held_tasks": "`ael tasks list`; then `ael tasks release`, or cancel them",
    "question": "`ael tasks list`; `ael tasks answer` gives the answer",
    "unapplied_result": "`ael tasks show`; repair the on_task of its agent",
    "failed_tasks": "`ael tasks list --status failed`; `ael tasks retry` runs one again",
}
"""What to do about each kind of row in `v_problems`."""


def database_checks(path: Path, settings: Settings, *, is_default: bool) -> Iterator[Finding]:
    """Yield what is found; a database that is missing has a place all the same."""
    if not path.parent.is_dir() or path.is_dir():
        yield from all_of([("folder", partial(_folder, path, settings))])
        return
    holder = current_holder(path)
    checks: list[tuple[str, Callable[[], Iterable[Finding]]]] = [
        ("folder", partial(_folder, path, settings)),
        ("file system", partial(_file_system, path)),
        ("disk", partial(_disk, path)),
        ("lock", partial(_lock, path, holder)),
    ]
    if not path.exists():
        near = sorted(path.parent.glob(f"*/{path.name}")) if is_default else []
        hint = f"; or did you mean --db {shlex.quote(str(near[0].relative_to(path.parent)))}?" if near else ""
        yield warn("database", f"{path} does not exist", f"`ael run` creates it, --db or AEL_DB names another{hint}")
        yield from all_of(checks)
        return
    checks += [
        ("files", partial(_files, path)),
        ("log", partial(_log, path, holder)),
        ("backups", partial(_backups, path)),
        ("database", partial(_contents, path, settings, holder)),
    ]
    yield from all_of(checks)


# -- the place --------------------------------------------------------------------------------------


def _folder(path: Path, settings: Settings) -> Iterator[Finding]:
    try:
        check_place(path, allow_shared_folder=settings.allow_shared_folder)
    except AelError as error:
        yield _failed("folder", error)
        return
    mode, owner = path.parent.stat().st_mode, path.parent.stat().st_uid
    if mode & stat.S_IWGRP and owner != 0:
        yield ok("folder", f"{path.parent} can be written, by its group too")
    else:
        yield ok("folder", f"{path.parent} can be written")


def _file_system(path: Path) -> Iterator[Finding]:
    try:
        kind, mount = mount_of(path.parent, MOUNTS.read_text("utf-8", "surrogateescape"))
    except OSError:
        yield ok("file system", "not known on this platform; it must be a local disk")
        return
    if kind in IN_MEMORY:
        yield warn("file system", f"{kind} at {mount} is in memory", "keep the database on a disk if it is to last")
    elif kind == "overlay":
        yield warn(
            "file system",
            f"overlay at {mount} goes with its container",
            "in a container, mount a volume on a local disk there",
        )
    elif kind in SHARED:
        yield warn(
            "file system",
            f"{kind} at {mount} is a folder of the host",
            "let nothing on the host open the database while the loop runs; a volume of its own is safer",
        )
    else:
        yield ok("file system", f"{kind or 'unknown'} at {mount or '?'}")


def _disk(path: Path) -> Iterator[Finding]:
    """Compare the room with what the database needs: as much again for a backup, twice for an upgrade."""
    room = os.statvfs(path.parent)
    free = room.f_bavail * room.f_frsize
    used = sum(_size(path, suffix) for suffix in ("", "-wal"))
    text = f"{size(free)} free" + (f", the database has {size(used)}" if used else "")
    if free < LEAST_FREE:
        yield fail("disk", text, "free some space: the loop stands still when there is none")
    elif free < 2 * used:
        yield warn("disk", text, "free some space: a backup takes as much again, an upgrade twice as much")
    elif free < FEW_FREE:
        yield warn("disk", text, "free some space, or bound the history: `ael db size`, history_bytes")
    else:
        yield ok("disk", text)
    if room.f_files:
        if room.f_favail < LEAST_INODES:
            yield fail("inodes", f"{room.f_favail} files more fit on this file system", "remove some files")
        elif room.f_favail < FEW_INODES:
            yield warn("inodes", f"{room.f_favail} files more fit on this file system", "remove some files")


# -- who holds it -----------------------------------------------------------------------------------


def _lock(path: Path, holder: Holder | None) -> Iterator[Finding]:
    socket = path.with_name(f"{path.name}.sock")
    if holder is None:
        yield ok("lock", "nobody holds the database")
        if socket.exists():
            yield warn(
                "socket",
                f"{socket} was left behind by a loop that was killed",
                "nothing; the next start replaces it",
            )
        return
    if holder.what != LOOP:
        yield ok("lock", f"held by {holder}")
        return
    if holder.socket is None:
        yield warn(
            "lock",
            f"held by {holder}, which takes no commands",
            "it may be just starting; else its log says why it has no socket, and `ael` can only read meanwhile",
        )
        return
    from ael_store.runtime.control import HEALTH, ask

    try:
        health = ask(holder.socket, HEALTH, {}, PATIENCE_S)
    except LoopNotRunning:
        yield fail(
            "lock",
            f"held by {holder}, which does not answer within {PATIENCE_S:.0f} s",
            f"`kill {holder.pid}`, and -9 where that does not help; or `ael run … --take-over`",
        )
        return
    except OSError as error:
        yield warn(
            "lock", f"held by {holder}; {holder.socket} can't be reached ({error})", "ask as the user of the loop"
        )
        return
    if health.get("waiting_for_room_since"):
        yield fail("lock", f"held by {holder}, which waits for room on the disk", "free some space")
    else:
        yield ok("lock", f"held by {holder}, which answers: {health['status']}, iteration {health['iteration']}")


# -- the files --------------------------------------------------------------------------------------


def _files(path: Path) -> Iterator[Finding]:
    try:
        refuse_hard_links(path)
    except AelError as error:
        yield _failed("files", error)
    status = path.stat()
    if status.st_uid != os.geteuid():
        yield warn(
            "files",
            f"{path} belongs to user {status.st_uid}, and this is user {os.geteuid()}",
            "run loop and commands as the same user",
        )
    public = readable_by_others(path)
    if public:
        names = " ".join(shlex.quote(str(file)) for file in public)
        yield warn("files", f"everybody on this machine may read {names}", f"`chmod o= {names}`")
    if not public and status.st_uid == os.geteuid():
        yield ok("files", f"{path}, mode {stat.S_IMODE(status.st_mode):04o}, {size(status.st_size)}")


def _log(path: Path, holder: Holder | None) -> Iterator[Finding]:
    length = _size(path, "-wal")
    if length > LARGE_LOG:
        yield warn(
            "log",
            f"{path.name}-wal has {size(length)}",
            "end programs that keep reading the database: the log can't be emptied while they do"
            if holder
            else "the next start empties it",
        )
    else:
        yield ok("log", f"{size(length)} of write-ahead log")


def _backups(path: Path) -> Iterator[Finding]:
    newest = newest_backup(path)
    if newest is None:
        yield warn("backups", "there is none beside the database", "`ael db backup OUT`, from a timer, to another disk")
        return
    age = datetime.now(UTC) - datetime.fromtimestamp(newest.stat().st_mtime, UTC)
    text = f"the newest beside the database is {newest.name}, {max(0, age.days)} days old"
    if age > OLD_BACKUP:
        yield warn("backups", text, "`ael db backup OUT`, from a timer; those elsewhere are not known here")
    else:
        yield ok("backups", text)


def _size(path: Path, suffix: str) -> int:
    try:
        return path.with_name(path.name + suffix).stat().st_size
    except FileNotFoundError:
        return 0


# -- what is in it ----------------------------------------------------------------------------------


def _contents(path: Path, settings: Settings, holder: Holder | None) -> Iterator[Finding]:
    if holder is None and _size(path, "-journal"):
        yield warn(
            "database",
            f"{path.name}-journal waits to be rolled back: somebody was killed in the middle of a change of the file",
            "nothing; the next start or command does it",
        )
        return
    try:
        found = examine(path)
        refuse_newer(path, found.revision, known_revisions(alembic_config()))
    except AelError as error:
        yield _failed("database", error)
        return
    if found.damage:
        yield fail("database", f"{path} is damaged: {found.damage[0]}", advice(path))
        return
    yield from _schema(found, settings)
    if found.revision == HEAD:
        how = "sound, its newest commits are what was committed" if found.complete else "too large to look at in 3 s"
        yield ok("database", f"{how} (`ael db verify` looks at everything)")
        yield from _history(found, holder)
        yield from _problems(found)


def _schema(found: Examination, settings: Settings) -> Iterator[Finding]:
    if found.revision is None:
        yield warn("schema", "the file is empty", "`ael run` makes it a database")
    elif found.revision == HEAD:
        yield ok("schema", f"revision {HEAD}, the newest")
    elif settings.upgrade == "never":
        yield fail("schema", f"revision {found.revision}; this program needs {HEAD}", "`ael db upgrade`")
    else:
        yield warn(
            "schema",
            f"revision {found.revision}; this program needs {HEAD}",
            "`ael run` upgrades it after a backup, and `ael db upgrade` without a loop",
        )


def _history(found: Examination, holder: Holder | None) -> Iterator[Finding]:
    run, loops = found.last_run, holder is not None and holder.what == LOOP
    if found.lease is not None and found.lease["token"]:
        yield ok("lease", f"token {found.lease['token']}, taken by {found.lease['holder']}")
    if run is None:
        yield ok("last run", "there was none yet")
    elif run["status"] == "running" and not loops:
        yield warn(
            "last run",
            f"run {run['run_id']} (pid {run['pid']}, since {run['started_at']}) ended without a clean stop",
            "look at the log before its end; `ael run` goes on from the last commit",
        )
    else:
        ended = f" at {run['ended_at']}" if run["ended_at"] else f" since {run['started_at']}"
        yield ok("last run", f"run {run['run_id']} {run['status']}{ended}")
    if found.newest_at is not None:
        ahead = datetime.fromisoformat(found.newest_at) - datetime.now(UTC)
        if ahead > SKEW:
            yield warn(
                "clock",
                f"the newest iteration is {ahead.total_seconds():.0f} s in the future of this machine's clock",
                "set the clock, best by NTP; the order of events does not depend on it, schedules do",
            )


def _problems(found: Examination) -> Iterator[Finding]:
    for problem in found.problems[:MOST_PROBLEMS]:
        kind, subject = str(problem["kind"]), str(problem["subject"])
        since = f" (since {problem['since']})" if problem["since"] else ""
        fix = ADVICE.get(kind, "`ael status`").format(shlex.quote(subject))
        yield warn(kind.replace("_", " "), f"{subject}: {problem['detail'] or ''}{since}", fix)
    more = len(found.problems) - MOST_PROBLEMS
    if more > 0:
        yield warn("problems", f"{more} more", '`ael sql "SELECT * FROM v_problems"`')
    if not found.problems:
        yield ok("problems", "none in v_problems")


def _failed(check: str, error: AelError) -> Finding:
    """Return an error as a finding; most messages say themselves what to do."""
    found, mark, fix = str(error).partition("; nothing was changed. ")
    return fail(check, found, fix if mark else None)

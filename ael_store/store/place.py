"""The place a database lies in: which file a name means, whether it may be written there, and whether it has room.

A database is three files that SQLite makes under one name, and a lock beside them. So a name is followed to the
file that it means before anything else is done with it: every name of a file meets the same lock and the same log.
Only writers look at the place; whoever only reads may try.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import secrets
import stat
from pathlib import Path

from ael_store.errors import DatabaseNotUsable

__all__ = ["check_place", "lack_of_room", "mount_of", "readable_by_others", "real_path", "refuse_hard_links"]

MOUNTS = Path("/proc/self/mountinfo")

NETWORK = frozenset(
    {
        "nfs",
        "nfs4",
        "cifs",
        "smb3",
        "smbfs",
        "ncpfs",
        "afs",
        "ceph",
        "glusterfs",
        "lustre",
        "gpfs",
        "beegfs",
        "ocfs2",
        "gfs2",
        "davfs",
        "fuse.ceph",
        "fuse.davfs",
        "fuse.gcsfuse",
        "fuse.glusterfs",
        "fuse.rclone",
        "fuse.s3fs",
        "fuse.smbnetfs",
        "fuse.sshfs",
    }
)
"""File systems that several machines write. Not 9p and virtiofs: they carry a folder of the same machine into a
sandbox or a virtual machine, and are all that such a place may have."""

LINKS_FOLLOWED = 40
PROBE_BYTES = 262_144
PAGE_BYTES = 4096
SUFFIXES = ("", "-wal", "-shm", ".lock")


# -- which file a name means ------------------------------------------------------------------------


def real_path(path: Path) -> Path:
    """Return the path of the file that a name means, with every link on the way followed.

    A link that leads nowhere stays as it is, for the caller to refuse. Raises DatabaseNotUsable for a link that
    belongs to somebody else than root and this user: its owner could have any file written.
    """
    path = Path(os.path.realpath(path.parent)) / path.name
    found = path
    for _ in range(LINKS_FOLLOWED):
        try:
            status = found.lstat()
        except OSError:
            return path  # the last link leads nowhere; or there is no file yet
        if not stat.S_ISLNK(status.st_mode):
            return found
        if status.st_uid not in (0, os.geteuid()):
            raise DatabaseNotUsable(
                f"{found} is a link that belongs to user {status.st_uid}, who could lead it anywhere: "
                f"name the file itself ({os.path.realpath(found)})"
            )
        target = found.parent / os.readlink(found)
        found = Path(os.path.realpath(target.parent)) / target.name
    raise DatabaseNotUsable(f"{path} is a link that leads to itself; remove it, or name another file")


# -- whether it may be written there ----------------------------------------------------------------


def check_place(path: Path, *, allow_shared_folder: bool = False) -> None:
    """Raise DatabaseNotUsable unless a database can be kept safely at this path. Changes nothing.

    The path is one that `real_path` returned. With `allow_shared_folder` a folder that everybody may write is
    accepted.
    """
    folder = path.parent
    if not folder.is_dir():
        raise DatabaseNotUsable(f"{folder} is no folder; create it, or name another file with --db or AEL_DB")
    if path.is_symlink():
        raise DatabaseNotUsable(
            f"{path} is a link to {os.readlink(path)}, which does not exist: create it or remove it"
        )
    if path.is_dir():
        raise DatabaseNotUsable(f"{path} is a folder; name a file with --db or AEL_DB")
    if path.exists() and not path.is_file():
        raise DatabaseNotUsable(f"{path} is no file; name another one with --db or AEL_DB")
    _refuse_network(path)
    _refuse_read_only(path)
    if not allow_shared_folder:
        _refuse_shared(folder)


def _refuse_read_only(path: Path) -> None:
    """Refuse a folder or a file that this process can't write; SQLite needs both."""
    for place, noun in ((path.parent, "folder"), (path, "file")):
        if (noun == "file" and not place.exists()) or os.access(place, os.W_OK):
            continue
        if os.statvfs(place).f_flag & os.ST_RDONLY:
            why, fix = "its file system is mounted read-only", "mount it for writing"
        else:
            status = place.stat()
            why = f"mode {stat.S_IMODE(status.st_mode):04o}, owner {status.st_uid}, this user is {os.geteuid()}"
            fix = f"`chmod u+w {place}`" if status.st_uid == os.geteuid() else f"let this user write the {noun}"
        raise DatabaseNotUsable(
            f"{place} can't be written ({why}): {fix}, or name another file with --db or AEL_DB; "
            "commands that only read work here"
        )


def _refuse_shared(folder: Path) -> None:
    """Refuse a folder in which everybody may remove and replace files: the lock and the log are files too."""
    mode = folder.stat().st_mode
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        raise DatabaseNotUsable(
            f"{folder} may be written by everybody (mode {stat.S_IMODE(mode):04o}), who could replace the database "
            f"and its lock: `chmod o-w {folder}`, or set allow_shared_folder"
        )


def _refuse_network(path: Path) -> None:
    try:
        mounts = MOUNTS.read_text("utf-8", "surrogateescape")
    except OSError:
        return
    kind, mount = mount_of(path.parent, mounts)
    if kind in NETWORK:
        raise DatabaseNotUsable(
            f"{path} lies on a network file system ({kind}, mounted at {mount}), where the log's shared memory does "
            "not work and locks can't be trusted: name a file on a local disk with --db or AEL_DB"
        )


def mount_of(folder: Path, mounts: str) -> tuple[str, str]:
    """Return the type and the place of the file system that holds a folder, by the text of a mountinfo file."""
    found = ("", "")
    for line in mounts.splitlines():
        before, dash, after = line.partition(" - ")
        fields = before.split(" ")
        if not dash or len(fields) < 6:
            continue
        place = _unescaped(fields[4])
        if len(place) >= len(found[1]) and folder.is_relative_to(place):  # of equal ones the last covers the others
            found = (after.split(" ")[0], place)
    return found


def _unescaped(text: str) -> str:
    """Undo how the kernel writes spaces, tabs, line ends and backslashes in paths."""
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(code, character)
    return text


def refuse_hard_links(path: Path) -> None:
    """Raise DatabaseNotUsable where the file has a second name: it would have a log and a lock of its own."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return
    if status.st_nlink > 1:
        with os.scandir(path.parent) as entries:
            here = sorted(entry.path for entry in entries if entry.inode() == status.st_ino and entry.name != path.name)
        where = f"one more is {here[0]}" if here else f"find them with `find DIR -samefile {path}`"
        raise DatabaseNotUsable(
            f"{path} has {status.st_nlink} names (hard links), and what is written under one is missing or damaged "
            f"under the others: {where}; remove all but one"
        )


def readable_by_others(path: Path) -> list[Path]:
    """Return the files of a database that everybody may read or write."""
    found = []
    for suffix in SUFFIXES:
        file = path.with_name(path.name + suffix)
        with contextlib.suppress(FileNotFoundError):
            if file.stat().st_mode & (stat.S_IROTH | stat.S_IWOTH):
                found.append(file)
    return found


# -- whether it has room ----------------------------------------------------------------------------


def lack_of_room(path: Path) -> str | None:
    """Return why a failed write to a database may have failed for lack of room, None where there is room.

    SQLite tells a full disk from other failures, but not a quota and a limit of the process: those come as the
    same error as a broken disk. So it is tried out on a file of its own, and compared with the limit.
    """
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if limit != resource.RLIM_INFINITY and limit <= _largest(path) + PAGE_BYTES:
        return f"this process may write files of at most {limit} bytes (ulimit -f)"
    probe = path.with_name(f".{path.name}.room-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        descriptor = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        return _room_error(error)
    try:
        left = PROBE_BYTES
        while left > 0:
            left -= os.write(descriptor, bytes(left))
    except OSError as error:
        return _room_error(error)
    finally:
        os.close(descriptor)
        with contextlib.suppress(OSError):
            probe.unlink()
    return None


def _largest(path: Path) -> int:
    sizes = [0]
    for suffix in ("", "-wal"):
        with contextlib.suppress(OSError):
            sizes.append(path.with_name(path.name + suffix).stat().st_size)
    return max(sizes)


def _room_error(error: OSError) -> str | None:
    match error.errno:
        case errno.ENOSPC:
            return "the disk is full"
        case errno.EDQUOT:
            return "the disk quota is used up"
        case errno.EFBIG:
            return "this process may write no larger files (ulimit -f)"
    return None

"""Files that appear whole: written under another name in the same folder, made durable, then named.

Never over a file that is there already, unless asked to. What a killed process left unfinished is removed by the
next one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from pathlib import Path

from ael_store.errors import AelError, DatabaseNotUsable, StorageFailed

__all__ = ["create_file", "discard", "keep", "publish", "remove", "replace", "reserve", "sweep", "sync", "sync_folder"]

OURS_ALONE = 0o600

_mine: set[Path] = set()
"""Unfinished files of this process."""


def reserve(path: Path, purpose: str) -> Path:
    """Create an empty file beside `path` to work on; `discard` it in the end, whatever happens."""
    sweep(path, purpose)
    temporary = path.with_name(f".{path.name}.{purpose}-{os.getpid()}-{secrets.token_hex(4)}")
    create_file(temporary, path)
    _mine.add(temporary)
    return temporary


def sweep(path: Path, purpose: str) -> None:
    """Remove what killed processes left, so that a start that is killed again and again fills no disk."""
    folder, prefix = path.parent, f".{path.name}.{purpose}-"
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            if name.startswith(prefix) and folder / name not in _mine:
                owner = name.removeprefix(prefix).partition("-")[0]
                if owner.isdigit() and (int(owner) == os.getpid() or not _is_alive(int(owner))):
                    (folder / name).unlink()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def create_file(file: Path, path: Path) -> None:
    """Create an empty file that only its owner reads; FileExistsError passes."""
    try:
        os.close(os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, OURS_ALONE))
    except OSError as error:
        if isinstance(error, FileExistsError):
            raise
        raise _file_error(error, path) from error


def _file_error(error: OSError, path: Path) -> AelError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
        return StorageFailed(f"{path} can't be written ({error.strerror}): free some space or check the disk")
    if not path.parent.is_dir():
        return DatabaseNotUsable(f"{path} can't be created: there is no folder {path.parent}; create it first")
    return DatabaseNotUsable(
        f"{path} can't be created ({error.strerror}): check the permissions of the folder {path.parent}"
    )


def publish(temporary: Path, target: Path) -> bool:
    """Give a finished file its name; False where that name is taken."""
    try:
        try:
            os.link(temporary, target)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            try:  # a file system without hard links
                create_file(target, target)
            except FileExistsError:
                return False
            os.replace(temporary, target)
        sync_folder(target.parent)
    except OSError as error:
        raise _file_error(error, target) from error
    return True


def replace(temporary: Path, target: Path) -> None:
    """Give a finished file its name, at once and durably, in the place of a file that has it."""
    try:
        os.replace(temporary, target)
        sync_folder(target.parent)
    except OSError as error:
        raise _file_error(error, target) from error


def keep(file: Path, name: Path) -> bool:
    """Give a file a second name, durably; False where the file system knows no second names."""
    try:
        os.link(file, name)
        sync_folder(name.parent)
    except OSError as error:
        if error.errno in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
            return False
        raise _file_error(error, name) from error
    return True


def remove(*files: Path) -> None:
    """Remove files of one folder durably; those that are not there are no error."""
    try:
        for file in files:
            file.unlink(missing_ok=True)
        sync_folder(files[0].parent)
    except OSError as error:
        raise _file_error(error, files[0]) from error


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync(file: Path) -> None:
    """Make a closed file durable. Not for a file that this process has open through SQLite.

    Raises StorageFailed, also where SQLite has kept a log beside it: when it closes a database it moves the log
    into it, and tells nobody that this failed.
    """
    for suffix in ("-journal", "-wal"):
        if os.path.lexists(log := file.with_name(file.name + suffix)):
            raise StorageFailed(f"{log} can't be moved into {file.name}: free some space or check the disk")
    descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        raise _file_error(error, file) from error
    finally:
        os.close(descriptor)


def discard(temporary: Path) -> None:
    """Remove an unfinished file and what SQLite kept beside it; where that fails, the next `sweep` does it."""
    for suffix in ("", "-journal", "-wal", "-shm"):
        with contextlib.suppress(OSError):
            temporary.with_name(temporary.name + suffix).unlink()
    _mine.discard(temporary)

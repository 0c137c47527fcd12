"""A verified copy of a database beside it, made while others may read and write."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path

from ael_store.clock import SystemClock, from_us
from ael_store.errors import StorageFailed
from ael_store.store.revision import current_revision, reading
from ael_store.store.whole_file import discard, publish, reserve, sync

__all__ = ["back_up", "require_space"]


def require_space(path: Path) -> None:
    """Refuse to begin where the disk can't hold a backup and a rebuilt table beside the database."""
    size = path.stat().st_size
    with contextlib.suppress(FileNotFoundError):
        size += path.with_name(path.name + "-wal").stat().st_size
    free = shutil.disk_usage(path.parent).free
    if free < 2 * size:
        raise StorageFailed(
            f"{path.parent} has {_megabytes(free)} free, the upgrade of {path} needs {_megabytes(2 * size)} "
            "(twice the database): free some space and start again; nothing was changed"
        )


def _megabytes(size: int) -> str:
    return f"{size / 1_000_000:.1f} MB"


def back_up(path: Path, tell: Callable[[str], None]) -> Path:
    """Make a verified copy beside the database and return its path, which names its revision and time.

    It has its name only once it is whole and durable.
    """
    tell(f"backing up {path} ({_megabytes(path.stat().st_size)})")
    temporary = reserve(path, "bak")
    try:
        with reading(path) as connection:
            connection.execute("VACUUM INTO ?", (str(temporary),))
        revision = _verified_revision(temporary)
        sync(temporary)
        made = from_us(SystemClock().now_us()).strftime("%Y%m%dT%H%M%SZ")
        name = f"{path.name}.bak-{revision}-{made}"
        target = path.with_name(name)
        more = 1
        while not publish(temporary, target):
            more += 1
            target = path.with_name(f"{name}-{more}")
    finally:
        discard(temporary)
    tell(f"backup {target} is made and verified")
    return target


def _verified_revision(path: Path) -> str:
    """Return the revision of a fresh copy; raises StorageFailed where it is not a sound database."""
    revision = current_revision(path)
    with reading(path) as connection:
        result = [row[0] for row in connection.execute("PRAGMA integrity_check(5)")]
    if revision is None or result != ["ok"]:
        raise StorageFailed(f"the backup {path} can't be trusted ({'; '.join(result)}): check the disk")
    return revision

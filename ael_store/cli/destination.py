"""Where exported text goes: to stdout as it comes, or into a file that has its name only once it is whole."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ael_store.cli.output import write
from ael_store.errors import AelError, DatabaseNotUsable, StorageFailed, UsageError

__all__ = ["STDOUT", "destination", "is_stdout"]

STDOUT = Path("-")
Put = Callable[[str], object]

OF_A_DATABASE = ("", "-wal", "-shm", "-journal", ".lock", ".sock")


def is_stdout(output: Path) -> bool:
    return output == STDOUT


@contextmanager
def destination(output: Path, database: Path, *, force: bool) -> Iterator[Put]:
    """Give the function that writes text. A file is durable when the block ends, and not there where it fails.

    What is no regular file (a pipe, /dev/null) is written to as it is. Raises UsageError where there is a file of
    that name, unless `force` lets it be replaced; never one of the database.
    """
    if is_stdout(output):
        yield write
        return
    target = output.absolute()
    if target.exists() and not target.is_file():
        if target.is_dir():
            raise UsageError(f"{output} is a folder: name a file in it")
        with _opened(target, output) as put:
            yield put
        return
    _check(target, output, database, force)

    from ael_store.store.whole_file import discard, publish, replace, reserve, sync

    if not target.parent.is_dir():
        raise DatabaseNotUsable(f"{output} can't be created: there is no folder {target.parent}; create it first")
    temporary = reserve(target, "export")
    try:
        with _opened(temporary, output) as put:
            yield put
        sync(temporary)
        if force:
            replace(temporary, target)
        elif not publish(temporary, target):
            raise _taken(output)
    finally:
        discard(temporary)


def _check(target: Path, output: Path, database: Path, force: bool) -> None:
    own = [database.with_name(database.name + end) for end in OF_A_DATABASE]
    if target.resolve() in own or (target.exists() and target.samefile(database)):
        raise UsageError(f"{output} belongs to the database itself: name another file")
    if os.path.lexists(target) and not force:
        raise _taken(output)


def _taken(output: Path) -> UsageError:
    return UsageError(f"{output} exists; name another file, or replace it with --force")


@contextmanager
def _opened(file: Path, output: Path) -> Iterator[Put]:
    try:
        with file.open("w", encoding="utf-8", newline="") as opened:
            yield opened.write
    except OSError as error:
        if isinstance(error, AelError | BrokenPipeError):
            raise
        raise StorageFailed(
            f"{output} can't be written ({error.strerror}): free some space or check the disk"
        ) from error

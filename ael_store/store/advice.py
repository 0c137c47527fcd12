"""What to do about a damaged database, for the messages that say so."""

from __future__ import annotations

import glob
import re
import shlex
from pathlib import Path

__all__ = ["advice", "newest_backup", "was_ours"]

BACKUP = re.compile(r"\.bak-[^-]+-(\d{8}T\d{6}Z)(?:-(\d+))?")


def newest_backup(path: Path) -> Path | None:
    """Return the newest backup beside a database, None where there is none.

    A backup has its name only once it is verified and durable, so the name is enough.
    """
    found: list[tuple[str, int, Path]] = []
    for name in glob.glob(f"{glob.escape(path.name)}.bak-*", root_dir=path.parent):
        if match := BACKUP.fullmatch(name.removeprefix(path.name)):
            found.append((match[1], int(match[2] or 1), path.with_name(name)))
    return max(found)[2] if found else None


def advice(path: Path) -> str:
    """Return the sentence that ends a message about damage: the exact commands, and the newest backup."""
    target = path.with_name(f"{path.name}.recovered")
    saves = f"`ael db recover {_quoted(path)} --to {_quoted(target)}` saves what can be read into a new file"
    backup = newest_backup(path)
    if backup is None:
        return f"{saves}; there is no backup beside it"
    return f"{saves}; the newest backup beside it is {backup}: `ael db restore {_quoted(backup)} --db {_quoted(path)}`"


def was_ours(path: Path) -> bool:
    """Say whether a loop or a command once worked on a database of that name."""
    return path.with_name(f"{path.name}.lock").exists() or newest_backup(path) is not None


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))

"""A new project for `ael new DIR`: the files of `template/`, complete or not there at all."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from pathlib import Path

from ael_store.errors import StorageFailed, UsageError

__all__ = ["create_project"]

# Named so that packaging tools, linters and pytest leave them alone where they lie.
_FILES = {
    "agents.py": "agents.py.txt",
    "ael.toml": "ael.toml.txt",
    "test_agents.py": "test_agents.py.txt",
    "README.md": "README.md.txt",
    ".gitignore": "gitignore.txt",
}


def create_project(folder: Path) -> list[Path]:
    """Write a small project into a new or empty folder and return its files.

    Missing parents are made. Raises UsageError where the folder holds something or can't be made, and
    StorageFailed where writing fails; then nothing has changed.
    """
    folder = Path(os.path.abspath(folder))
    name = _check_name(folder)
    made: list[Path] = []
    try:
        if os.path.lexists(folder):
            _check_empty(folder)
        for parent in reversed(folder.parents):
            if not parent.exists():
                parent.mkdir()
                made.append(parent)
        _write(folder, name)
    except BaseException as error:
        for parent in reversed(made):
            parent.rmdir()
        if not isinstance(error, OSError):
            raise
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise StorageFailed(f"{folder} can't be written: {error.strerror}") from error
        raise UsageError(f"{folder} can't be made: {error.strerror}; name another folder") from error
    return [folder / file for file in _FILES]


def _check_name(folder: Path) -> str:
    """Return the name of the project."""
    name = folder.name
    if not name or not name.isprintable() or name != name.strip() or name[0] in "-." or len(name.encode()) > 200:
        raise UsageError(
            f"{name!r} is no name for a project; wanted are up to 200 printable characters "
            "that do not begin with '-' or '.'"
        )
    return name


def _check_empty(folder: Path) -> None:
    if not folder.is_dir():
        raise UsageError(f"{folder} is a file; name a folder that does not exist yet")
    found = sorted(entry.name for entry in folder.iterdir())
    if found:
        shown = ", ".join(found[:3]) + (", …" if len(found) > 3 else "")
        raise UsageError(f"{folder} is not empty (it holds {shown}); name a folder that does not exist yet")


def _write(folder: Path, name: str) -> None:
    """Write all files into a folder of our own, then move them in one step."""
    template = Path(__file__).parent / "template"
    exists = folder.exists()
    private = Path(tempfile.mkdtemp(prefix=".ael-new-", dir=folder if exists else folder.parent))
    try:
        draft = private / "draft"
        draft.mkdir()  # with the usual permissions, which `private` does not have
        for file, source in _FILES.items():
            text = (template / source).read_text("utf-8").replace("{{name}}", name)
            (draft / file).write_text(text, "utf-8")
        if exists:
            _move(draft, folder)
        else:
            draft.rename(folder)
    finally:
        shutil.rmtree(private, ignore_errors=True)


def _move(draft: Path, folder: Path) -> None:
    """Move the files into a folder that stays the same one, because somebody may be standing in it."""
    moved: list[Path] = []
    try:
        for file in _FILES:
            (draft / file).rename(folder / file)
            moved.append(folder / file)
    except BaseException:
        for path in moved:
            path.unlink()
        raise

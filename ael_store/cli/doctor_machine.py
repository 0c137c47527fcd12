"""What `ael doctor` looks at besides the database: this program and what it stands on."""

from __future__ import annotations

import os
import platform
import re
import resource
import stat
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib import metadata

from ael_store._version import __version__
from ael_store.cli.finding import Finding, fail, ok, warn
from ael_store.errors import InvalidSetting
from ael_store.settings import LoadedSettings
from ael_store.store.sqlite_build import sqlite_build

__all__ = [
    "clock",
    "extras",
    "libraries",
    "limits_of_process",
    "python",
    "secrets",
    "settings_file",
    "sqlite",
    "system",
]

DISTRIBUTION = "ael-store"

OLDEST_PYTHON = (3, 11)
FEW_FILES = 256
BUILT = datetime(2026, 1, 1, tzinfo=UTC)
"""No clock of a machine that runs this is right where it shows an earlier time."""


def python() -> Iterator[Finding]:
    version, where = platform.python_version(), sys.executable
    if sys.version_info < OLDEST_PYTHON:
        yield fail("python", f"Python {version} ({where})", "use Python 3.11 or newer")
    elif sys.version_info.releaselevel != "final":
        yield warn("python", f"Python {version} is a preview ({where})", "use a release of Python for what has to last")
    else:
        yield ok("python", f"Python {version} ({where}), ael_store {__version__}")


def sqlite() -> Iterator[Finding]:
    build = sqlite_build()
    name = f"SQLite {build.version}"
    if build.is_too_old:
        yield fail("sqlite", name, "use a Python that is built with SQLite 3.37 or newer")
    elif not build.has_threads:
        yield fail("sqlite", f"{name}, built without threads", "use a Python whose SQLite is built with threads")
    elif build.may_damage:
        yield warn(
            "sqlite",
            f"{name} may damage a file that two programs write at the same moment (mended in 3.51.3 and 3.50.7)",
            "let no other program write the database, the loop alone is safe; or use a Python with a newer SQLite",
        )
    else:
        yield ok("sqlite", name)


def system() -> Iterator[Finding]:
    name = f"{platform.system()} {platform.release()} on {platform.machine()}"
    if sys.platform not in ("linux", "darwin"):
        yield fail("platform", name, "run ael on Linux or macOS")
    elif "Microsoft" in platform.release():
        yield fail("platform", f"{name} (WSL 1), whose locks can't be trusted", "use WSL 2: `wsl --set-version NAME 2`")
    else:
        yield ok("platform", name)


def clock() -> Iterator[Finding]:
    now = datetime.now(UTC)
    text = f"{now:%Y-%m-%d %H:%M:%S} UTC"
    if now < BUILT:
        yield fail("clock", f"it is {text} by this machine", "set the clock, best by NTP: schedules and history use it")
    else:
        yield ok("clock", text if time.localtime().tm_gmtoff == 0 else f"{text} ({time.strftime('%H:%M %Z')} here)")


def limits_of_process() -> Iterator[Finding]:
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if files != resource.RLIM_INFINITY and files < FEW_FILES:
        yield warn("limits", f"this process may open {files} files", f"`ulimit -n {FEW_FILES}` or more")
    else:
        yield ok("limits", f"{files if files != resource.RLIM_INFINITY else 'any number of'} open files")


# -- what is installed ------------------------------------------------------------------------------


def libraries() -> Iterator[Finding]:
    """Compare what is installed with what this distribution asks for."""
    good = []
    for name, wanted, marker in _requirements():
        if marker:
            continue
        found = _version(name)
        if found is None:
            yield fail("libraries", f"{name} is not installed", "`pip install ael-store` again")
        elif not _fits(found, wanted):
            yield fail("libraries", f"{name} is {found}; wanted is {wanted}", f"`pip install '{name}{wanted}'`")
        else:
            good.append(f"{name} {found}")
    if good:
        yield ok("libraries", ", ".join(good))


def extras() -> Iterator[Finding]:
    """Tell which optional parts are installed, and refuse one whose versions do not fit."""
    wanted: dict[str, list[tuple[str, str]]] = {}
    for name, versions, marker in _requirements():
        if match := re.fullmatch(r"""extra\s*==\s*["']([^"']+)["']""", marker):
            wanted.setdefault(match[1], []).append((name, versions))
    there, missing = [], []
    for extra, parts in sorted(wanted.items()):
        found = [(name, versions, _version(name)) for name, versions in parts]
        if any(version is None for _, _, version in found):
            missing.append(extra)
            continue
        for name, versions, version in found:
            if not _fits(str(version), versions):
                yield warn(
                    "extras",
                    f"{extra} wants {name}{versions}, and {version} is there",
                    f"`pip install '{name}{versions}'`",
                )
        there.append(extra)
    without = f"not installed: {', '.join(missing)} (`pip install 'ael-store[NAME]'`)" if missing else ""
    yield ok("extras", "; ".join(part for part in (", ".join(there), without) if part) or "there are none")


def _requirements() -> Iterator[tuple[str, str, str]]:
    """Yield what the distribution asks for: name, versions, marker; nothing where it is not installed as one."""
    try:
        lines = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return
    for line in lines:
        requirement, _, marker = line.partition(";")
        if match := re.match(r"([\w.-]+)\s*(?:\[[^]]*\])?\s*\(?([^()]*)\)?\s*$", requirement.strip()):
            yield match[1], ",".join(sorted(match[2].replace(" ", "").split(","), reverse=True)), marker.strip()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _fits(version: str, wanted: str) -> bool:
    """Say whether a version is within the bounds of a requirement, by its numbers."""
    numbers = _numbers(version)
    for bound in filter(None, wanted.split(",")):
        match = re.match(r"(>=|<=|==|!=|~=|>|<)(.*)", bound)
        if match is None:
            continue
        limit = _numbers(match[2])
        width = max(len(numbers), len(limit))
        left, right = (tuple(n) + (0,) * (width - len(n)) for n in (numbers, limit))
        match match[1]:
            case ">=" | "~=":
                good = left >= right
            case "<=":
                good = left <= right
            case ">":
                good = left > right
            case "<":
                good = left < right
            case "!=":
                good = left != right
            case _:
                good = left[: len(limit)] == tuple(limit)
        if not good:
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else ()


# -- the settings -----------------------------------------------------------------------------------


def settings_file(loaded: LoadedSettings) -> Iterator[Finding]:
    """Tell where settings come from, and what is odd about them."""
    for warning in loaded.warnings:
        yield warn("settings", warning, "unset it, or correct its name")
    changed = sum(origin != "default" for origin in loaded.origins.values())
    where = "no settings file" if loaded.file is None else str(loaded.file)
    if loaded.file is not None:
        mode = loaded.file.stat().st_mode
        if mode & stat.S_IWOTH:
            yield warn(
                "settings",
                f"{loaded.file} may be written by everybody, who could have any code run",
                f"`chmod o-w {loaded.file}`",
            )
    yield ok("settings", f"{where}; {changed} settings differ from the defaults (`ael config show --origin`)")


def secrets(loaded: LoadedSettings) -> Iterator[Finding]:
    """Look every secret of the [agents.*] tables up."""
    names: set[str] = set()
    for table in loaded.agents.values():
        names.update(table.secret_names())
        try:
            table.read_config(os.environ)
        except InvalidSetting as error:
            yield warn("secrets", str(error), "give it, where this is the environment that the loop runs in")
            return
    if names:
        yield ok("secrets", f"{', '.join(sorted(names))}: all there")

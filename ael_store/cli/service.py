"""`ael service`: a project as a service of systemd."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Annotated, Any

import typer

from ael_store.cli.call import Call
from ael_store.cli.command import command, group
from ael_store.cli.output import note, print_json, say, write
from ael_store.cli.unit_file import MARK, UnitFile
from ael_store.errors import AelError, StorageFailed, UsageError
from ael_store.settings import RULES, load_settings
from ael_store.telemetry import printable

__all__ = ["add_to"]

MANAGER_S = 60.0
"""How long `systemctl` may take, which waits for a service to start or stop."""

Target = Annotated[
    str, typer.Argument(metavar="[TARGET]", help="What `ael run` is given; a folder means agents.py in it.")
]
System = Annotated[bool, typer.Option("--system", help="For the whole machine instead of this user.")]


def add_to(app: typer.Typer) -> None:
    """Add these commands."""
    service = group(app, "service", "Run a project as a service of systemd.")
    command(service, "install")(install)
    command(service, "uninstall")(uninstall)
    command(service, "status")(status)


def install(
    call: Call,
    target: Target = "agents.py",
    system: System = False,
    start: Annotated[bool, typer.Option("--start", help="Enable it and start it, too.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", "--print", help="Print the unit; write nothing.")] = False,
) -> None:
    """Write a unit that runs a project."""
    unit = _unit(call, target, system)
    text = unit.text()
    if dry_run:
        if call.json:
            print_json({"unit": unit.name, "path": str(unit.path), "text": text, "changed": False})
        else:
            write(text)
        return
    changed = _write(unit, text)
    reached = _manage(unit, "daemon-reload")
    if start:
        if not reached:
            raise AelError(f"{unit.path} is written, but there is no service manager to start it (`systemctl` failed)")
        _must(unit, "enable", "--now", unit.name)
    if call.json:
        print_json({"unit": unit.name, "path": str(unit.path), "text": text, "changed": changed})
        return
    say(f"{printable(str(unit.path))} {'is written' if changed else 'was up to date'}")
    if not start:
        note(f"start it, now and with the machine: {_spelt(unit, 'enable', '--now', unit.name)}")
    if not system:
        note("a service of a user ends when the user logs out, unless: loginctl enable-linger")
    for name in sorted(name for name in os.environ if name.startswith("AEL_") and name[4:].lower() in RULES):
        note(f"{name} is set here and not in the service: write it into the settings file")


def uninstall(call: Call, target: Target = "agents.py", system: System = False) -> None:
    """Stop the service and remove its unit; the database stays."""
    unit = _unit(call, target, system)
    if not unit.path.exists():
        raise AelError(f"there is no unit {unit.path}; `ael service status` names the one of a target")
    _refuse_other(unit)
    if _manage(unit, "disable", "--now", unit.name):
        _remove(unit)
        _manage(unit, "daemon-reload")
    else:
        _remove(unit)
        note("no service manager was reached: if the service runs, end it by `kill PID`; `ael status` names the pid")
    if call.json:
        print_json({"unit": unit.name, "path": str(unit.path)})
    else:
        say(f"{printable(str(unit.path))} is removed")


def status(call: Call, target: Target = "agents.py", system: System = False) -> None:
    """Show the unit of a project, and how its service is."""
    unit = _unit(call, target, system)
    installed = unit.path.exists()
    facts: dict[str, Any] = {
        "unit": unit.name,
        "path": str(unit.path),
        "installed": installed,
        "up_to_date": installed and unit.path.read_text("utf-8", "replace") == unit.text(),
        "enabled": _ask(unit, "is-enabled"),
        "active": _ask(unit, "is-active"),
        "database": str(unit.database),
    }
    if call.json:
        print_json(facts)
        return
    say(f"unit      {printable(str(unit.path))}")
    if not installed:
        say("          not installed; `ael service install` writes it")
    elif not facts["up_to_date"]:
        say("          differs from what `ael service install` would write now")
    for name in ("enabled", "active"):
        say(f"{name:<10}{facts[name] or 'unknown: no service manager was reached'}")
    say(f"database  {printable(str(unit.database))}")
    say(f"log       {_spelt(unit, command='journalctl')} -u {unit.name}")


# -- the unit ---------------------------------------------------------------------------------------


def _unit(call: Call, target: str, system: bool) -> UnitFile:
    """Return the unit of a target, whether it is installed or not; refuses what a service could not run."""
    place, colon, attribute = target.rpartition(":")
    if not colon or os.path.exists(target):
        place, colon, attribute = target, "", ""
    path = Path(place).absolute()
    if path.is_dir():
        path /= "agents.py"
    if path.suffix == ".py":
        if not path.is_file():
            raise UsageError(f"there is no file {path}; name what `ael run` is to run")
        folder, name = path.parent, path.name
    else:
        folder, name = Path.cwd(), place
    folder = folder.resolve()
    loaded = load_settings({"db": call.db}, environ={}, folder=folder)
    from ael_store.store.sqlite import database_path

    address = loaded.settings.db
    if address == ":memory:":
        raise UsageError("':memory:' ends with its process: name a file with --db or in the settings file")
    if call.db is None and loaded.origins["db"] == "default":
        address = str(folder / address)
    database = database_path(address)
    if not database.parent.is_dir():
        raise UsageError(f"{database.parent} is no folder; create it, or name another database")
    return UnitFile(f"{name}{colon}{attribute}", folder, database, loaded, call.db, system)


def _write(unit: UnitFile, text: str) -> bool:
    """Write the unit; says whether something has changed."""
    if unit.path.exists():
        _refuse_other(unit)
        if unit.path.read_text("utf-8") == text:
            return False
    temporary = unit.path.with_name(f".{unit.path.name}.{os.getpid()}")
    try:
        unit.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(text, "utf-8")
            temporary.chmod(0o644)
            temporary.replace(unit.path)
        finally:
            temporary.unlink(missing_ok=True)
    except PermissionError:
        raise UsageError(_not_allowed(unit)) from None
    except OSError as error:
        raise StorageFailed(f"{unit.path} can't be written: {error.strerror}") from error
    return True


def _remove(unit: UnitFile) -> None:
    try:
        unit.path.unlink()
    except PermissionError:
        raise UsageError(_not_allowed(unit)) from None


def _not_allowed(unit: UnitFile) -> str:
    how = "call it with sudo, or use --print and copy what it prints" if unit.for_system else "look at its folder"
    return f"{unit.path} can't be written by this user: {how}"


def _refuse_other(unit: UnitFile) -> None:
    try:
        first = unit.path.read_text("utf-8", "replace").partition("\n")[0]
    except OSError as error:
        raise UsageError(f"{unit.path} can't be read: {error.strerror}") from None
    if not first.startswith(MARK):
        raise UsageError(f"{unit.path} was not written by `ael service install`: move it away first")


# -- systemctl --------------------------------------------------------------------------------------


def _command(unit: UnitFile, *words: str, command: str = "systemctl") -> list[str]:
    return [command, *([] if unit.for_system else ["--user"]), *words]


def _spelt(unit: UnitFile, *words: str, command: str = "systemctl") -> str:
    return " ".join(_command(unit, *words, command=command))


def _call(unit: UnitFile, *words: str) -> subprocess.CompletedProcess[str] | None:
    """Return what systemctl did, None where there is none."""
    if shutil.which("systemctl") is None:
        return None
    try:
        return subprocess.run(
            _command(unit, *words),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=MANAGER_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None


def _manage(unit: UnitFile, *words: str) -> bool:
    """Have the service manager do something; says whether it did."""
    done = _call(unit, *words)
    return done is not None and done.returncode == 0


def _must(unit: UnitFile, *words: str) -> None:
    done = _call(unit, *words)
    if done is None or done.returncode != 0:
        why = "it can't be called" if done is None else done.stderr.strip() or f"exit code {done.returncode}"
        raise AelError(f"`{_spelt(unit, *words)}` failed: {why}; `ael doctor` and the journal say more")


def _ask(unit: UnitFile, question: str) -> str | None:
    """Return the answer of one word; None where no service manager gives one."""
    done = _call(unit, question, unit.name)
    word = "" if done is None else done.stdout.strip()
    return word or None

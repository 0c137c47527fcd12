"""`ael doctor`: look at everything, and say what to do. Changes nothing, and works whatever state a database is in."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from typing import Any

import typer

from ael_store.cli.call import Call
from ael_store.cli.command import command
from ael_store.cli.finding import Finding, all_of, fail
from ael_store.cli.output import colored, print_json, say
from ael_store.errors import AelError, InvalidSetting
from ael_store.settings import LoadedSettings, Settings, load_settings
from ael_store.telemetry import printable

__all__ = ["add_to"]

COLORS = {"fail": "red", "warn": "yellow", "ok": "green"}


def add_to(app: typer.Typer) -> None:
    """Add this command."""
    command(app, "doctor")(doctor)


def doctor(call: Call) -> None:
    """Look at everything, and say what to do about it."""
    findings = list(_look(call))
    groups = {status: [one for one in findings if one.status == status] for status in COLORS}
    if call.json:
        print_json(
            {
                "status": next(status for status, found in groups.items() if found),
                **{status: len(found) for status, found in groups.items()},
                "checks": [_as_json(one) for found in groups.values() for one in found],
            }
        )
    else:
        for status, found in groups.items():
            for one in found:
                say(f"{colored(f'{status:<4}', COLORS[status])}  {printable(one.check)}: {printable(one.found)}")
                if one.fix is not None:
                    say(f"      → {printable(one.fix)}")
        say(", ".join(f"{len(found)} {status}" for status, found in groups.items()))
    if groups["fail"]:
        raise typer.Exit(1)


def _as_json(one: Finding) -> dict[str, Any]:
    return {"check": one.check, "status": one.status, "found": one.found, "fix": one.fix}


def _look(call: Call) -> Iterator[Finding]:
    from ael_store.cli import doctor_machine as machine

    yield from all_of(
        [
            ("python", machine.python),
            ("platform", machine.system),
            ("sqlite", machine.sqlite),
            ("libraries", machine.libraries),
            ("extras", machine.extras),
            ("clock", machine.clock),
            ("limits", machine.limits_of_process),
        ]
    )
    loaded = _load(call)
    if isinstance(loaded, LoadedSettings):
        yield from all_of(
            [
                ("settings", partial(machine.settings_file, loaded)),
                ("secrets", partial(machine.secrets, loaded)),
            ]
        )
        settings, address, is_default = loaded.settings, loaded.settings.db, loaded.origins["db"] == "default"
    else:  # the database can be looked at all the same, where something else says which it is
        yield loaded
        settings, address = Settings(), call.db or os.environ.get("AEL_DB", "").strip()
        if not address:
            return
        is_default = False
    yield from _look_at_database(address, settings, is_default)


def _load(call: Call) -> LoadedSettings | Finding:
    try:
        return load_settings({"db": call.db})
    except InvalidSetting as error:
        return fail("settings", str(error), "correct it; no command works before")


def _look_at_database(address: str, settings: Settings, is_default: bool) -> Iterator[Finding]:
    from ael_store.cli.doctor_database import database_checks
    from ael_store.store.sqlite import database_path

    if address == ":memory:":
        yield fail("database", "':memory:' is private to one loop and ends with it", "name a file with --db or AEL_DB")
        return
    try:
        path = database_path(address)
    except AelError as error:
        yield fail("database", str(error), "name a file with --db or AEL_DB")
        return
    yield from database_checks(path, settings, is_default=is_default)

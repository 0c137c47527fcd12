"""`ael web`: the dashboard, beside a loop that runs or on a database that nobody runs."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from ael_store.cli.call import Call
from ael_store.cli.command import command
from ael_store.cli.output import note

if TYPE_CHECKING:
    from ael_store.web.launch import Launch

__all__ = ["add_to", "introduce"]


def add_to(app: typer.Typer) -> None:
    """Add this command."""
    command(app, "web")(web)


def web(
    call: Call,
    address: Annotated[
        str | None, typer.Argument(metavar="[HOST:PORT]", help="Where to listen. Default: setting web, or port 8123.")
    ] = None,
    read_only: Annotated[bool | None, typer.Option("--read-only", help="Only show, and change nothing.")] = None,
    hosts: Annotated[
        str | None, typer.Option("--hosts", metavar="NAMES", help="Further names of this server, with commas between.")
    ] = None,
) -> None:
    """Serve the dashboard until Ctrl-C."""
    from ael_store.web.address import DEFAULT, listen, read_address
    from ael_store.web.launch import become, launch_of, refuse_without_extra

    refuse_without_extra()
    settings = call.load({"web": address, "web_read_only": read_only, "web_hosts": hosts}).settings
    where = read_address(settings.web or DEFAULT)
    call.check_revision()
    listening = listen(where)
    launch = launch_of(call.path, settings, where, listening, is_child=False)
    introduce(launch)
    become(launch)


def introduce(launch: Launch) -> None:
    """Say where to look, and to a person how to log in; the token itself goes to no log."""
    note(f"dashboard at {launch.address.url} (Ctrl-C ends it)")
    if launch.token is None:
        return
    if sys.stderr.isatty():
        note(f"to change things: {launch.address.url}login#{launch.token.text().decode()}")
    else:
        note(f"the token for changes is in {launch.token.path}")

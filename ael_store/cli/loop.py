"""`ael pause`, `ael resume`, `ael step`: hold a loop still and look at it iteration by iteration."""

from __future__ import annotations

from typing import Annotated

import typer

from ael_store.cli.call import Call
from ael_store.cli.command import command
from ael_store.cli.output import print_json, say

__all__ = ["add_to"]


def add_to(app: typer.Typer) -> None:
    """Add these commands."""
    command(app, "pause")(pause)
    command(app, "resume")(resume)
    command(app, "step")(step)


def pause(call: Call) -> None:
    """Hold the loop still, also over restarts; commands still work."""
    _switch(call, "loop.pause", paused=True)


def resume(call: Call) -> None:
    """Let a paused loop go on."""
    _switch(call, "loop.resume", paused=False)


def step(
    call: Call,
    iterations: Annotated[int, typer.Argument(metavar="[N]", help="How many iterations.")] = 1,
) -> None:
    """Let a paused loop run N iterations."""
    until = call.change("loop.step", iterations=iterations)
    if call.json:
        print_json({"iterations": iterations, "until_iteration": until})
    else:
        noun = "iteration" if iterations == 1 else "iterations"
        say(f"stepping {iterations} {noun}, up to iteration {until}")


def _switch(call: Call, name: str, *, paused: bool) -> None:
    changed = bool(call.change(name))
    if call.json:
        print_json({"paused": paused, "changed": changed})
        return
    done, already = ("paused", "is paused already") if paused else ("resumed", "is not paused")
    say(f"{done} the loop (committed)" if changed else f"the loop {already}")

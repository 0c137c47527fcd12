"""Settings that change while a loop runs: what a running loop takes up, and what has to wait for its next start.

A settings file is read again at SIGHUP. One that is wrong changes nothing. What changes goes through the loop as a
command, so that it falls between two iterations, is part of a commit, and stands in the audit with its values.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ael_store.errors import InvalidSetting, UsageError
from ael_store.settings import AT_START, RULES, Settings

if TYPE_CHECKING:
    from ael_store.runtime.run import Run

__all__ = ["change_settings", "compare", "describe"]

log = logging.getLogger("ael_store.settings")


def compare(old: Settings, new: Settings) -> tuple[dict[str, Any], list[str]]:
    """Return what a running loop can take up of new settings, by name, and the names of what it can't."""
    changed = {name: getattr(new, name) for name in RULES if getattr(new, name) != getattr(old, name)}
    live = {name: value for name, value in changed.items() if name not in AT_START}
    waiting = [name for name in changed if name in AT_START]
    if new.limits != old.limits:
        waiting.append("limits")
    return live, waiting


def describe(old: Settings, live: Mapping[str, Any], waiting: list[str]) -> str:
    """Return the sentence that the log has about it."""
    parts = [f"{name} is {value!r} (was {getattr(old, name)!r})" for name, value in live.items()]
    if waiting:
        parts.append(f"{', '.join(waiting)}: changed too, and taken up by the next start")
    return "settings were read again: " + ("; ".join(parts) or "nothing has changed")


def change_settings(run: Run, changes: Any = None, refused: str | None = None) -> list[str]:
    """Take up new values of settings, from the next iteration on; returns their names. The command `settings.reload`.

    With `refused` it only says, for the audit, why they were not taken up.
    """
    if refused is not None:
        raise InvalidSetting(refused)
    if not isinstance(changes, dict):
        raise UsageError("changes must be an object of settings and their values")
    for name in changes:
        if name not in RULES:
            raise UsageError(f"there is no setting {name!r}")
        if name in AT_START:
            raise UsageError(f"setting {name} is taken up by the next start only")
    _take_up(run, replace(run.settings, **changes))
    return list(changes)


def _take_up(run: Run, settings: Settings) -> None:
    before = run.settings
    run.settings = run.roster.settings = run.deliveries.settings = run.tasks.settings = settings
    run.workbench.slow_after_s = settings.slow_after
    run.scheduler.budget_s = settings.tick_rate or 0.05
    if settings.tick_timeout != before.tick_timeout:
        for slot in run.roster:
            if slot.agent.tick_timeout is None:
                slot.limit_s = settings.tick_timeout
    run.pruner.look_now()

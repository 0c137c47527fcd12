"""What a shell completes from the database: names of agents, keys, numbers of tasks.

A shell asks at each press of the tab key, so nothing here may say anything, raise, or take long: where the settings
or the database are not as they should be, there is nothing to complete.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ael_store.settings import load_settings
from ael_store.store.names import Noun, names
from ael_store.store.sqlite import database_path

__all__ = ["complete"]


def complete(noun: Noun) -> Callable[..., list[str]]:
    """Return the function that typer asks for the names of a noun."""

    def names_of_noun(ctx: Any, incomplete: str) -> list[str]:
        try:
            return names(database_path(load_settings({"db": _db(ctx)}).settings.db), noun, incomplete)
        except Exception:
            return []

    return names_of_noun


def _db(ctx: Any) -> str | None:
    """Return what `--db` says, after the verb or before it."""
    while ctx is not None:
        if ctx.params.get("db"):
            return str(ctx.params["db"])
        ctx = ctx.parent
    return None

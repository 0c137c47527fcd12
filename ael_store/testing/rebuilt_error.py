"""Builds an exception again from what is recorded of it: the name of its class, and its message."""

from __future__ import annotations

import builtins
import sys
from ast import literal_eval
from collections.abc import Callable
from typing import Any

__all__ = ["rebuild_error"]


def rebuild_error(type_name: str, message: str, module: str) -> Exception | None:
    """Return an exception of this class with this message; None where its class is gone or makes another message.

    A class of a script has no module in its name and is looked for in `module`. Attributes of the exception other
    than its arguments are not there again.
    """
    if type_name == "Timeout":
        return TimeoutError(message)
    if type_name.endswith("CancelledError"):  # `on_error` gets an Exception in its place
        return RuntimeError(f"{type_name}: {message}" if message else type_name)
    cls = _find(type_name, module)
    if cls is None:
        return None
    attempts: list[Callable[[], Any]] = [
        lambda: cls(literal_eval(message)) if issubclass(cls, KeyError) else cls(message) if message else cls(),
        lambda: cls(message),
        lambda: cls.__new__(cls, message),
    ]
    for attempt in attempts:
        try:
            error = attempt()
            if type(error) is cls and str(error) == message:
                return error
        except Exception:  # a class of the user's: it may want anything
            continue
    return None


def _find(type_name: str, module: str) -> type[Exception] | None:
    """Return the class of a recorded name; modules are only looked for among those that are imported."""
    places = [(builtins, type_name), (sys.modules.get(module), type_name)]
    parts = type_name.split(".")
    places += [(sys.modules.get(".".join(parts[:end])), ".".join(parts[end:])) for end in range(1, len(parts))]
    places.append((sys.modules.get(module), parts[-1]))
    for place, path in places:
        found: Any = place
        for name in path.split("."):
            found = getattr(found, name, None)
        if isinstance(found, type) and issubclass(found, Exception):
            return found
    return None

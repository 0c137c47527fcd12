"""The unit of work that runs here: known to the hook, to tasks it makes, and to the threads of the loop."""

from __future__ import annotations

from contextvars import ContextVar

from ael_store.model.unit import Unit

__all__ = ["current_unit", "in_attempt"]

current_unit: ContextVar[Unit | None] = ContextVar("ael_unit", default=None)

in_attempt: ContextVar[bool] = ContextVar("ael_attempt", default=False)
"""True in an attempt at a task, and in what it starts."""

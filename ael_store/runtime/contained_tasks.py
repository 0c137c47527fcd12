"""Keeps `SystemExit` and its like inside the asyncio tasks that hooks make.

asyncio lets `SystemExit` and `KeyboardInterrupt` through: raised in a task, they end the event loop at once, and
with it every agent; `GeneratorExit` ends whoever awaits the task. Raised by the hook itself they are a failure of
the hook; a hook that uses `asyncio.gather` must not be able to do more. So as long as a run lives, asyncio tasks that
are made inside a unit of work, or in an attempt at a task, get a coroutine around theirs that turns these into a
`RuntimeError`. Those of everybody else are left as they are.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Generator
from typing import Any

from ael_store.runtime.current import current_unit, in_attempt

__all__ = ["contain_tasks"]

_ENDING = (SystemExit, KeyboardInterrupt, GeneratorExit)


def contain_tasks(loop: asyncio.AbstractEventLoop) -> Callable[[], None]:
    """Contain the tasks of hooks in this event loop from now on; returns how to undo that."""
    before = loop.get_task_factory()

    def make(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> Any:
        context = options.get("context")
        if context is None:
            ours = current_unit.get() is not None or in_attempt.get()
        else:
            ours = context.get(current_unit) is not None or bool(context.get(in_attempt))
        if ours and asyncio.iscoroutine(coroutine):
            coroutine = _Contained(coroutine)
        if before is not None:
            return before(loop, coroutine, **options)
        return asyncio.Task(coroutine, loop=loop, **options)

    def undo() -> None:
        if loop.get_task_factory() is make:
            loop.set_task_factory(before)

    loop.set_task_factory(make)
    return undo


class _Contained(Coroutine[Any, Any, Any]):
    """A coroutine that lets none of these out; everything else of it is that of the one inside."""

    def __init__(self, inner: Coroutine[Any, Any, Any]) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __await__(self) -> Generator[Any, Any, Any]:
        return self._inner.__await__()

    def send(self, value: Any) -> Any:
        try:
            return self._inner.send(value)
        except _ENDING as error:
            raise _failure(error) from error

    def throw(self, *error: Any) -> Any:
        try:
            return self._inner.throw(*error)
        except _ENDING as raised:
            raise _failure(raised) from raised

    def close(self) -> None:
        self._inner.close()


def _failure(error: BaseException) -> RuntimeError:
    return RuntimeError(f"a task raised {type(error).__name__}")

"""The fixture `replay`, which pytest finds by itself where ael-store is installed.

pytest imports this in every run, so it imports nothing of the package before the fixture is used.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from ael_store.testing.replay_report import ReplayReport

__all__ = ["replay"]


@pytest.fixture(name="replay")
def replay() -> Callable[..., ReplayReport]:
    """`ael_store.testing.replay` as a plain function: `replay("ael.db", "agents.py", agent="fan").check()`."""

    def run(path: Any, agents: Any, **options: Any) -> ReplayReport:
        from ael_store.testing.replayer import replay

        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return asyncio.run(replay(path, agents, **options))
        return _in_a_thread(lambda: asyncio.run(replay(path, agents, **options)))

    return run


def _in_a_thread(action: Callable[[], ReplayReport]) -> ReplayReport:
    """Run something in a thread, for a test that has an event loop of its own, and wait for it."""
    results: list[ReplayReport] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            results.append(action())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, name="ael-replay")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]

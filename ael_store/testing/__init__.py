"""Testing agents: one hook by itself (`run_tick`), a loop on a clock that moves only when told (`Harness`), `replay`.

    result = await run_tick(Thermometer(), state={"temperature": 24.0})

    async with Harness([Thermometer(), Fan()]) as h:
        await h.advance("3 days")

    report = await replay("ael.db", "agents.py", agent="thermometer")  # today's code on recorded ticks

Needs no test framework, and works in all of them that can run a coroutine. Everything is imported when it is first
used, because pytest imports the plugin in here at each of its starts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ael_store.testing.harness import FailedUnit as FailedUnit
    from ael_store.testing.harness import Harness as Harness
    from ael_store.testing.one_tick import TickResult as TickResult
    from ael_store.testing.one_tick import run_tick as run_tick
    from ael_store.testing.one_tick import task_attempt as task_attempt
    from ael_store.testing.replay_report import Difference as Difference
    from ael_store.testing.replay_report import ReplayReport as ReplayReport
    from ael_store.testing.replayer import replay as replay
    from ael_store.testing.virtual_clock import VirtualClock as VirtualClock

_HOMES = {
    "Difference": "replay_report",
    "FailedUnit": "harness",
    "Harness": "harness",
    "ReplayReport": "replay_report",
    "TickResult": "one_tick",
    "VirtualClock": "virtual_clock",
    "replay": "replayer",
    "run_tick": "one_tick",
    "task_attempt": "one_tick",
}

__all__ = [
    "Difference",
    "FailedUnit",
    "Harness",
    "ReplayReport",
    "TickResult",
    "VirtualClock",
    "replay",
    "run_tick",
    "task_attempt",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'ael_store.testing' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"ael_store.testing.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})

"""Testing agents: one hook by itself (`run_tick`), or a whole loop on a clock that moves only when told (`Harness`).

    result = await run_tick(Thermometer(), state={"temperature": 24.0})

    async with Harness([Thermometer(), Fan()]) as h:
        await h.advance("3 days")

Needs no test framework, and works in all of them that can run a coroutine.
"""

from ael_store.testing.harness import FailedUnit, Harness
from ael_store.testing.one_tick import TickResult, run_tick, task_attempt
from ael_store.testing.virtual_clock import VirtualClock

__all__ = ["FailedUnit", "Harness", "TickResult", "VirtualClock", "run_tick", "task_attempt"]

"""Hourly marks: each agent's counters as they stand when an hour is over.

They are counters and not differences, so nothing has to be remembered over a restart, ticks that left no row are
counted, and a prune takes nothing from them. An agent that did nothing since its last mark gets none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ael_store.model.records import AgentMark

if TYPE_CHECKING:
    from ael_store.runtime.run import Run

__all__ = ["HOUR_US", "mark_hour"]

HOUR_US = 3_600_000_000


def mark_hour(run: Run) -> None:
    """When an hour is over, have the next commit write the counters of those that did something in it."""
    now_us = run.clock.now_us()
    if now_us < run.hour_us + HOUR_US and now_us >= run.hour_us:
        return
    hour_us, run.hour_us = run.hour_us, now_us // HOUR_US * HOUR_US
    for slot in run.roster:
        stats = slot.stats
        counts = (stats.ticks, stats.errors, stats.events, stats.measured, stats.total_us)
        if run.marked.get(stats.agent_id) != counts:
            run.marked[stats.agent_id] = counts
            run.journal.commit.marks.append(AgentMark(stats.agent_id, hour_us, run.journal.iteration, *counts))

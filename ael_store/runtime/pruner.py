"""Removes what is older than the settings keep: tasks that are over, in small batches, each part of a commit."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ael_store.runtime.run import Run

__all__ = ["prune"]

EVERY_US = 3_600_000_000
"""How often it is looked for what is too old."""

BATCH = 200
"""Tasks that one commit removes: a few milliseconds."""

DAY_US = 86_400_000_000

log = logging.getLogger("ael_store.loop")


async def prune(run: Run) -> None:
    """Have the next commit remove a batch of what is too old; in most iterations there is nothing to do."""
    now_us = run.clock.now_us()
    if now_us < run.prune_us:
        return
    # What began today counts for limits, however short tasks are kept.
    before_us = min(now_us - round(run.settings.task_days * DAY_US), now_us // DAY_US * DAY_US)
    found = await asyncio.to_thread(run.store.reader.old_tasks, before_us, BATCH)
    run.prune_us = now_us if len(found) == BATCH else now_us + EVERY_US
    if found:
        run.journal.commit.pruned_tasks = found
        log.info("removing %d tasks that ended more than %g days ago", len(found), run.settings.task_days)

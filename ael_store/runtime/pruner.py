"""Removes what is older, or more, than the settings keep: between iterations, a small batch in each commit.

A batch is made as large as fits into a few milliseconds, so that an iteration that becomes due meanwhile is not late.
What to remove is looked for every six hours, and whenever much has been written.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from typing import TYPE_CHECKING

from ael_store.clock import iso

if TYPE_CHECKING:
    from ael_store.runtime.run import Run
    from ael_store.store.prune import PruneLimits, Pruning

__all__ = ["Pruner", "prune_limits"]

DAY_US = 86_400_000_000
EVERY_US = 6 * 3_600_000_000
"""How often it is looked for what is too old or too much, at least."""

MINUTE_US = 60_000_000

CLOCK_SET_S = 3600
"""A wall clock that moves so far against the monotonic one was set."""

MOST_NEW_ROWS = 60_000
"""So many new rows are a reason to look, too."""

FIRST_ROWS, LEAST_ROWS, MOST_ROWS = 200, 50, 5000
BATCH_S = 0.015
"""How long a batch should take."""

TASKS = 200
"""How many tasks one commit removes."""

SHRINK_PAGES = 100
"""How many free pages one commit gives back to the file system."""
FREE_SHARE, LEAST_FREE_BYTES = 0.1, 8_388_608
"""From which share, and size, of the file on free pages are given back; until then new rows take them."""

log = logging.getLogger("ael_store.loop")


def prune_limits(
    history_days: float, event_days: float, rows: int, size: int, now_us: int, settled_us: int | None = None
) -> PruneLimits:
    """Return what the settings keep, seen from now."""
    from ael_store.store.prune import PruneLimits

    history_us = now_us - round(history_days * DAY_US)
    events_us = max(history_us, now_us - round(event_days * DAY_US))
    return PruneLimits(history_us, events_us, rows, size, now_us, settled_us)


class Pruner:
    """The removal of one run, a step at a time."""

    def __init__(
        self, run: Run, pruning: Pruning | None, batch_s: float = BATCH_S, *, trusts_clock: bool = False
    ) -> None:
        self.run = run
        self.batch_s = batch_s
        self.pruning = pruning
        """What is being removed; None where nothing is."""
        self._plan: Pruning | None = None
        """What is to be removed next."""
        self.busy = True
        """False once a look has found nothing to remove."""
        self.removed = 0
        """Rows that were removed so far."""
        self.next_us = run.started_us + MINUTE_US
        self._seen_rows = self._written
        self._stat_us = self._seen_bytes = 0
        self._rows = FIRST_ROWS
        self._began_with = 0
        self._shrinks = False
        """The file has many free pages, so that each commit gives some back."""
        self._ended = self._took_s = 0.0
        """When the last step ended, by the monotonic clock, and how long it took."""
        self._trusts_clock = trusts_clock
        self._clock_set, self._steady_s = 0.0, 0.0
        """How far the wall clock is ahead of the monotonic one, and since when."""

    def due(self, now_us: int) -> bool:
        """True where a step should be made now."""
        if (
            self.pruning is not None
            or self._plan is not None
            or now_us >= self.next_us
            or self._written - self._seen_rows >= self._new_rows
        ):
            return True
        return now_us >= self._stat_us and self._has_grown(now_us)

    def _has_grown(self, now_us: int) -> bool:
        """True where the file is larger than allowed, and larger than at the last look; asked once a minute."""
        self._stat_us = now_us + MINUTE_US
        allowed = self.run.settings.history_bytes
        try:
            size = os.stat(self.run.store.path).st_size
        except OSError:
            return False
        return bool(allowed) and size > allowed and size - self._seen_bytes > allowed // 100

    @property
    def _written(self) -> int:
        """How many rows of history there ever were."""
        journal = self.run.journal
        return journal.tick_id + journal.event_id + journal.state.change_id + journal.metrics.sample_id

    @property
    def _new_rows(self) -> int:
        """After how many new rows a look is due."""
        allowed = self.run.settings.history_rows
        return min(MOST_NEW_ROWS, max(100, allowed // 4)) if allowed else MOST_NEW_ROWS

    def starved(self) -> bool:
        """True where iterations follow each other so closely that a step has to be made between two of them.

        A fifth of the time goes to it then, or a loop that runs back to back would grow its file for ever.
        """
        run = self.run
        return self.due(run.clock.now_us()) and run.clock.monotonic() - self._ended >= 4 * self._took_s

    def look_now(self) -> None:
        """Do not wait for the next look."""
        self.next_us = 0

    async def step(self) -> None:
        """Remove a batch, or look for what is to be removed next; takes some milliseconds. Between iterations."""
        began = self.run.clock.monotonic()
        try:
            await self._step()
        finally:
            self._ended = self.run.clock.monotonic()
            self._took_s = self._ended - began

    async def _step(self) -> None:
        run = self.run
        if self.pruning is not None:
            await self._remove(self.pruning)
            return
        if self._plan is not None:
            await self._begin(self._plan)
            self._plan = None
            return
        self._seen_rows = self._written
        now_us = run.clock.now_us()
        settings = run.settings
        days = min(settings.history_days, settings.event_days)
        limits = prune_limits(
            settings.history_days,
            settings.event_days,
            settings.history_rows,
            settings.history_bytes,
            now_us,
            self._settled_us(now_us, days),
        )
        reader = run.store.reader
        (used, free), plan = await asyncio.to_thread(lambda: (reader.page_bytes(), reader.plan_prune(limits)))
        self._seen_bytes = used + free
        self._shrinks = free >= max(LEAST_FREE_BYTES, FREE_SHARE * (used + free))
        if plan is not None:
            self._plan = plan  # begun with the next step: an iteration may go between
        elif not (await self._remove_samples(now_us, used) or await self._remove_tasks(now_us) or await self._shrink()):
            self.next_us, self.busy = now_us + EVERY_US, False

    def _settled_us(self, now_us: int, days: float) -> int | None:
        """Return None where the wall clock went evenly for a day, or half of what is kept, and else when that began.

        Nothing is removed for its age by a clock that was just set, or is wrong since the machine started.
        """
        if self._trusts_clock:
            return None
        monotonic = self.run.clock.monotonic()
        ahead = now_us / 1e6 - monotonic
        if abs(ahead - self._clock_set) > CLOCK_SET_S:
            self._clock_set, self._steady_s = ahead, monotonic
        settle_s = min(1.0, days / 2) * DAY_US / 1e6
        return None if monotonic - self._steady_s >= settle_s else now_us - round(settle_s * 1e6)

    async def _begin(self, plan: Pruning) -> None:
        """Move the horizon: from this commit on nothing is promised of what lies before it."""
        from ael_store.store.moment import HORIZON
        from ael_store.store.prune import PRUNING

        run, to = self.run, plan.to
        commit = run.journal.commit
        commit.totals += await asyncio.to_thread(run.store.reader.totals_up_to, to.tick_id)
        commit.positions[HORIZON] = to.to_json()
        commit.positions[PRUNING] = plan.to_json()
        await run.commit("command")
        self.pruning, self._began_with = plan, self.removed
        if to.iteration > plan.before.iteration:
            began = "" if to.started_us is None else f" ({iso(to.started_us)})"
            log.info("removing history up to iteration %d%s", to.iteration, began)

    async def _remove(self, pruning: Pruning) -> None:
        from ael_store.store.prune import PruneStep

        step = PruneStep(pruning, self._rows)
        self.run.journal.commit.prune = step
        self.run.journal.commit.shrink_pages = SHRINK_PAGES if self._shrinks else 0
        await self._commit()
        self.pruning = step.next
        self.removed += step.removed
        if step.next is None:
            rows = self.removed - self._began_with
            log.info("removed %d rows of history up to iteration %d", rows, pruning.to.iteration)

    async def _remove_tasks(self, now_us: int) -> bool:
        """Remove a batch of tasks that are over; True where there may be more."""
        run = self.run
        if not run.journal.task_id:
            return False
        # What began today counts for limits, however short tasks are kept.
        before_us = min(now_us - round(run.settings.task_days * DAY_US), now_us // DAY_US * DAY_US)
        settled_us = self._settled_us(now_us, run.settings.task_days)
        found = await asyncio.to_thread(run.store.reader.old_tasks, before_us, settled_us, TASKS)
        if found:
            from ael_store.store.moment import REMOVED_TASKS

            given = {"tasks": run.journal.task_id, "task_attempts": run.journal.attempt_id}
            run.journal.commit.pruned_tasks = found
            run.journal.commit.positions[REMOVED_TASKS] = json.dumps(given, separators=(",", ":"))
            self.removed += len(found)
            await self._commit()
            log.info("removed %d tasks that ended more than %g days ago", len(found), run.settings.task_days)
        return len(found) == TASKS

    async def _remove_samples(self, now_us: int, used: int) -> bool:
        """Remove a batch of samples of metrics; True where there may be more. Their hours stay."""
        run = self.run
        if not run.journal.metrics.sample_id:
            return False
        days, most_bytes = run.settings.metric_days, run.settings.history_bytes
        before_us, settled_us = now_us - round(days * DAY_US), self._settled_us(now_us, days)
        too_large = 0 < most_bytes < used
        old = await asyncio.to_thread(run.store.reader.old_samples, before_us, settled_us, too_large, self._rows)
        if old:
            run.journal.commit.pruned_samples = old[-1]
            self.removed += len(old)
            await self._commit()
            self.look_now()
        return bool(old)

    async def _shrink(self) -> bool:
        """Give free pages back to the file system where they are many; True where there are more."""
        if not self._shrinks:
            return False
        self.run.journal.commit.shrink_pages = SHRINK_PAGES
        await self._commit()
        return True

    async def _commit(self) -> None:
        """Commit one batch by itself, and let the next one be as large as time allows."""
        run = self.run
        began = run.clock.monotonic()
        await run.commit("command")
        took_s = run.clock.monotonic() - began
        if run.clock.real:
            wanted = self._rows * min(2.0, max(0.25, self.batch_s / max(took_s, 1e-4)))
            self._rows = int(min(MOST_ROWS, max(LEAST_ROWS, wanted)))

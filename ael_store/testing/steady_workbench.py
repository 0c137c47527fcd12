"""Runs hooks as the loop does, but so that the speed of the machine does not matter.

Under a virtual clock a hook is never slow, whatever it takes: it is not set aside after `slow_after`. What runs in
the background by choice (`background=True`) takes effect when the loop has nothing else to do, in the order in
which it began, however fast each was. Only the limit of a hook (`tick_timeout`) is real time, so that a hook that
hangs ends.
"""

from __future__ import annotations

import asyncio
import logging

from ael_store.runtime.tick import CANCEL_PATIENCE_S, Job, Workbench, _Lane

__all__ = ["SteadyWorkbench"]

GLANCE_S = 0.05
"""How often a hook that waits for something is compared with its limit."""

log = logging.getLogger("ael_store.testing")


class SteadyWorkbench(Workbench):
    """A workbench whose results depend on nothing but the hooks."""

    _left_alone: frozenset[Job] = frozenset()
    """Jobs in the background that time goes on without."""

    # -- in the foreground --

    async def _watch(self, lane: _Lane) -> None:
        """Wait until the lane is through; end a hook that has run for longer than its limit."""
        try:
            await asyncio.sleep(0)  # a lane whose hooks wait for nothing is through after this
            if not lane.task.done():
                await self._watch_waiting(lane)
        except asyncio.CancelledError:
            if lane.job is not None:
                lane.job.aborted = True
            lane.task.cancel()
            await asyncio.wait({lane.task}, timeout=CANCEL_PATIENCE_S)
            raise

    async def _watch_waiting(self, lane: _Lane) -> None:
        loop = asyncio.get_running_loop()
        job: Job | None = None
        since = 0.0
        while not lane.task.done():
            if lane.job is not job:
                job, since = lane.job, loop.time()
            wait_s = GLANCE_S
            if job is not None and job.limit_s:
                left_s = since + job.limit_s - loop.time()
                if left_s <= 0:
                    job.timed_out = True
                    lane.task.cancel()
                    await asyncio.wait({lane.task}, timeout=CANCEL_PATIENCE_S)
                    if not lane.task.done() and lane.job is job:
                        self._set_aside(lane, job)
                        self._leave_alone(job)
                        return
                    continue
                wait_s = min(wait_s, left_s)
            await asyncio.wait({lane.task}, timeout=wait_s)

    # -- in the background --

    def _end_in_background(self, job: Job) -> None:
        """It stays in the background until `take_up`, unless the run is ending."""
        if job.aborted or job in self.left_alone:
            super()._end_in_background(job)

    async def take_up(self, patience_s: float) -> None:
        """Wait for what runs in the background, up to `patience_s` of real time, and hand over what has ended."""
        waiting = {task for job, task in self.background.items() if job not in self._left_alone and not task.done()}
        if waiting:
            await asyncio.wait(waiting, timeout=patience_s)
        self._hand_over()
        for job in self.background:
            if job not in self._left_alone:
                log.warning(
                    "agent %s: on_%s still runs after %g s of real time; virtual time goes on without it",
                    job.unit.subject,
                    job.unit.kind,
                    patience_s,
                )
        self._left_alone = frozenset(self.background)

    def _hand_over(self) -> None:
        for job, task in list(self.background.items()):
            if task.done():
                super()._end_in_background(job)

    def abort(self) -> list[Job]:
        """Cancel everything in the background and return the jobs; what has ended is handed over."""
        self._hand_over()
        return super().abort()

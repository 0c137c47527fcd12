"""The short form of `./dev torture soak`: too short to judge memory, long enough for handles and threads."""

from __future__ import annotations

import asyncio
import gc
from pathlib import Path

import pytest

from ael_store import StateContext
from ael_store.runtime.tick import Job
from tests.faults import soak
from tests.faults.soak import Sample, growth
from tests.loops import agent, controller_on

ITERATIONS = 3000


@pytest.mark.timeout(300)
def test_long_life_keeps_its_files_and_threads_and_does_everything_once(tmp_path: Path) -> None:
    report = soak.run(count=ITERATIONS, seed=0, workers=1, tell=print, folder=tmp_path)

    assert report.failures == ()
    assert report.trials == ITERATIONS


async def test_units_that_ran_in_the_background_are_let_go_when_they_have_ended(tmp_path: Path) -> None:
    async def tick(context: StateContext) -> None:
        await asyncio.sleep(0)

    controller = controller_on(tmp_path / "ael.db", agent("slow", tick=tick, background=True), tick_rate=0)
    jobs: list[int] = []

    def observe(_summary: object) -> None:
        if controller.get_stats()["iteration"] in (10, 60):
            gc.collect()
            jobs.append(sum(isinstance(item, Job) for item in gc.get_objects()))

    controller.observe(observe)
    await controller.run(60)

    assert len(jobs) == 2
    assert jobs[1] < jobs[0] + 10


def test_growth_is_the_slope_after_the_first_tenth() -> None:
    def sample(iteration: int, memory_kb: int) -> Sample:
        return Sample(iteration, memory_kb, files=10, threads=4, log_bytes=0)

    rising = [sample(number * 1000, 50_000 + 20 * number) for number in range(1, 21)]
    settled = [sample(1000, 10_000), sample(2000, 40_000), *(sample(number * 1000, 50_000) for number in range(3, 21))]

    assert growth(rising) == pytest.approx(2000)
    assert growth(settled) == 0

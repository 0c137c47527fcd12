"""The short form of `./dev torture tasks`, and the proof that it notices what is broken."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.faults import tasks
from tests.faults.tasks import BREAKAGES

KILLS = 8


@pytest.mark.timeout(300)
def test_killed_again_and_again_no_task_is_lost_no_result_counts_twice_no_limit_is_exceeded(tmp_path: Path) -> None:
    seed = random.randrange(1_000_000)
    print(f"./dev torture tasks --kills {KILLS} --seed {seed}")

    report = tasks.run(count=KILLS, seed=seed, workers=1, tell=print, folder=tmp_path)

    assert report.failures == ()
    assert report.trials == KILLS
    assert (report.lost, report.duplicated, report.silent) == (0, 0, 0)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("breakage", BREAKAGES)
def test_tasks_broken_on_purpose_are_caught(breakage: str, tmp_path: Path) -> None:
    series = tasks.run_broken(tmp_path, 1, breakage)

    assert series.found, series

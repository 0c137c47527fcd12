"""The short form of `./dev torture points`."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.faults import points

CASES = 16


@pytest.mark.timeout(300)
def test_killed_at_a_named_point_the_loop_loses_nothing_and_does_nothing_twice(tmp_path: Path) -> None:
    seed = random.randrange(1_000_000)
    print(f"./dev torture points --points {CASES} --seed {seed}")

    report = points.run(count=CASES, seed=seed, workers=1, tell=print, folder=tmp_path)

    assert report.failures == ()
    assert report.trials > CASES // 2
    assert (report.lost, report.duplicated, report.silent) == (0, 0, 0)

"""The short form of `./dev torture upgrade`."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.faults import upgrade
from tests.faults.shim import require

CASES = 8


@pytest.mark.timeout(300)
def test_start_that_upgrades_is_finished_by_the_next_one(tmp_path: Path) -> None:
    require()
    seed = random.randrange(1_000_000)
    print(f"./dev torture upgrade --calls {CASES} --seed {seed}")

    report = upgrade.run(count=CASES, seed=seed, workers=2, tell=print, folder=tmp_path)

    assert report.failures == ()
    assert report.trials > CASES // 3
    assert (report.lost, report.duplicated, report.silent) == (0, 0, 0)

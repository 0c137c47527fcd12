"""The short form of `./dev torture powercuts`."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.faults import powercuts
from tests.faults.shim import require

CASES = 80


@pytest.mark.timeout(300)
def test_power_cut_takes_nothing_that_was_reported_and_a_store_that_never_syncs_is_caught(tmp_path: Path) -> None:
    require()
    seed = random.randrange(1_000_000)
    print(f"./dev torture powercuts --powercuts {CASES} --seed {seed}")

    report = powercuts.run(count=CASES, seed=seed, workers=1, tell=print, folder=tmp_path)

    assert report.failures == ()
    assert report.trials > CASES // 2
    assert (report.lost, report.duplicated, report.silent) == (0, 0, 0)

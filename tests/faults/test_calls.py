"""The short form of `./dev torture calls`."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.faults import calls
from tests.faults.shim import require

CASES = 24


@pytest.mark.timeout(300)
def test_failed_call_loses_nothing_and_is_told(tmp_path: Path) -> None:
    require()
    seed = random.randrange(1_000_000)
    print(f"./dev torture calls --calls {CASES} --seed {seed}")

    report = calls.run(count=CASES, seed=seed, workers=1, tell=print, folder=tmp_path)

    assert report.failures == ()
    assert report.trials > CASES // 2
    assert (report.lost, report.duplicated, report.silent) == (0, 0, 0)

"""The short form of `./dev torture takeover`."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.faults import takeover

TRIALS = 2


@pytest.mark.timeout(300)
def test_owner_that_was_overtaken_while_it_stood_still_writes_no_row_when_continued(tmp_path: Path) -> None:
    seed = random.randrange(1_000_000)
    print(f"./dev torture takeover --seed {seed}")

    report = takeover.run(count=TRIALS, seed=seed, workers=1, tell=print, folder=tmp_path)

    assert report.failures == ()
    assert report.trials == TRIALS
    assert (report.lost, report.duplicated, report.silent) == (0, 0, 0)

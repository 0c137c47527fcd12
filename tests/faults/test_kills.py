"""The short form of `./dev torture kills`, and the example killed the same way."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.faults import kills
from tests.faults.kills import Killer

KILLS = 20
EXAMPLE = Path(__file__).parents[2] / "examples" / "system_monitor.py"


@pytest.fixture
def seed() -> int:
    """Which moments; shown where the test fails."""
    seed = random.randrange(1_000_000)
    print(f"./dev torture kills --kills {KILLS} --seed {seed}")
    return seed


@pytest.mark.timeout(300)
def test_killed_again_and_again_the_loop_loses_nothing_and_does_nothing_twice(tmp_path: Path, seed: int) -> None:
    report = kills.run(count=KILLS, seed=seed, workers=1, tell=print, folder=tmp_path)

    assert report.failures == ()
    assert report.trials == KILLS
    assert (report.lost, report.duplicated, report.silent) == (0, 0, 0)


@pytest.mark.timeout(300)
def test_killed_again_and_again_the_example_goes_on(tmp_path: Path, seed: int) -> None:
    killer = Killer(tmp_path, seed, EXAMPLE)

    for number in range(4):
        killer.kill_whole(number)
    killer.finish_whole()

    assert killer.series.found == []
    assert killer.series.kills == 4
    assert {"metrics_cpu", "metrics_memory", "metrics_disk"} <= killer.ledger.keys

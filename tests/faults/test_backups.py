"""Backup, restore, upgrade and recovery, each killed at a few of the places of the long form."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.backups import run

KILLS = 10

pytestmark = pytest.mark.timeout(240)


def test_work_on_files_that_is_killed_midway_leaves_nothing_half_done(tmp_path: Path) -> None:
    report = run(count=KILLS, seed=3, workers=1, tell=print, folder=tmp_path)

    assert report.failures == ()
    assert report.trials >= KILLS // 2  # one whose moment came too late was not killed
    assert (report.lost, report.silent) == (0, 0)

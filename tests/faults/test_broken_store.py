"""A store that is broken on purpose is caught, and the sound one passes the same kills."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults import broken_store
from tests.faults.broken_store import BREAKAGES


@pytest.mark.timeout(300)
@pytest.mark.parametrize("breakage", BREAKAGES)
def test_store_broken_on_purpose_is_caught(breakage: str, tmp_path: Path) -> None:
    series = broken_store.kill_until_caught(breakage, tmp_path, seed=1)

    assert series.caught is not None, series


@pytest.mark.timeout(300)
def test_sound_store_passes_the_same_kills(tmp_path: Path) -> None:
    series = broken_store.kill_until_caught(None, tmp_path, seed=1)

    assert series.caught is None
    assert series.kills > len(broken_store.CASES) // 2

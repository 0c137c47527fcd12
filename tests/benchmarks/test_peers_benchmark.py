"""The loop beside the ancestor and, where they are installed, its peers."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.environment import PACKAGES
from benchmarks.peers import PeerOptions, measure_peers, report_peers


def test_peers_that_are_not_installed_are_named_and_the_rest_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AEL_PEERS", str(tmp_path / "nowhere"))

    found = measure_peers(PeerOptions(tmp_path, ("normal",), rounds=2, share=0.1), lambda message: None)

    assert found.absent == list(PACKAGES.values())
    assert found.loop_pragmas == {"normal": "wal normal"}, "as read back from the loop's own connection"
    compared = {comparison.peer: comparison for comparison in found.comparisons}
    assert set(compared) == {"ancestor 1", "ancestor 10"}
    assert compared["ancestor 10"].times.median > 0.005, "no sync: at most two hundred times as long"
    assert "Absent, not measured: dbos," in report_peers(found)

"""The benchmark runs and says what it measured; how long anything takes is not asserted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import machine
from benchmarks.__main__ import main
from benchmarks.loop import time_loop
from benchmarks.plain import write_plainly
from tests.acceptance.database import ask

TINY = ["--agents", "1,3", "--rounds", "2", "--iterations", "4", "--allow-tmpfs"]


def test_benchmark_prints_figures_and_writes_them_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"

    status = main([*TINY, "--folder", str(tmp_path), "--json", str(out)])

    assert status == 0
    found = json.loads(out.read_text())
    assert found["machine"]["cpus"] >= 1
    assert {"sqlalchemy", "aiosqlite"} <= set(found["machine"]["packages"])
    results = {(result["agents"], result["durability"]): result for result in found["write"]["results"]}
    assert set(results) == {(1, "full"), (1, "normal"), (3, "full"), (3, "normal")}
    for result in results.values():
        assert 0 < result["ratio"]["min"] <= result["ratio"]["median"] <= result["ratio"]["max"]
        assert result["iteration_ms"]["median"] > 0 < result["commit_ms"]["median"]
    assert {claim["what"] for claim in found["write"]["claims"]} == {
        "iteration of 1 agents",
        "event, emitted and handled",
        "state operation",
        "empty iteration",
    }
    printed = capsys.readouterr().out
    assert "fsync p50" in printed
    assert "plain sqlite3" in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json"], "its files are gone"


def test_benchmark_refuses_a_folder_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "FASTEST_DISK_US", float("inf"))

    status = main(["--folder", str(tmp_path)])

    assert status == 2
    assert "name another --folder" in capsys.readouterr().err


def test_both_contestants_write_the_same_rows(tmp_path: Path) -> None:
    time_loop(tmp_path / "ours.db", 3, 2, 4, "normal")
    write_plainly(tmp_path / "plain.db", 3, 2, 4, "normal")

    ours = ask(tmp_path / "ours.db", "SELECT new_value FROM v_state_history ORDER BY id")
    assert ours == ask(tmp_path / "plain.db", "SELECT value FROM change ORDER BY id")
    assert len(ours) == 3 * 6
    events = "SELECT data FROM v_events WHERE type GLOB 'measured.*' ORDER BY id"
    assert ask(tmp_path / "ours.db", events) == ask(tmp_path / "plain.db", "SELECT data FROM event ORDER BY id")
    assert ask(tmp_path / "ours.db", "SELECT count(*), sum(ticks) FROM v_iterations") == ask(
        tmp_path / "plain.db", "SELECT count(*), sum(ticks) FROM iteration"
    )

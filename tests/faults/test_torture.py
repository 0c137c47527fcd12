"""The front of the trials: what it runs, prints and answers."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.faults.torture import PLANS, Plan, main
from tests.faults.trial import Report


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A trial called `made_up` whose `run` a test sets."""
    module: Any = ModuleType("tests.faults.made_up")
    monkeypatch.setitem(sys.modules, "tests.faults.made_up", module)
    monkeypatch.setitem(PLANS, "made_up", Plan("made_up", "nothing", "inventions", usual=3, full=30))
    return module


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_every_trial_is_there(plan: Plan) -> None:
    assert importlib.util.find_spec(plan.module) is not None


def test_good_trial_is_a_row_and_leaves_no_folder(
    made_up: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []

    def run(**arguments: Any) -> Report:
        calls.append((arguments["count"], arguments["seed"], arguments["workers"]))
        (arguments["folder"] / "ael.db").touch()
        return Report("kills made up", arguments["count"], note="all well")

    made_up.run = run

    assert main(["made_up", "--seed", "7", "--folder", str(tmp_path)]) == 0
    assert main(["made_up", "--seed", "7", "--full", "--workers", "1", "--folder", str(tmp_path)]) == 0
    assert main(["made_up", "--seed", "7", "--inventions", "5", "--folder", str(tmp_path)]) == 0

    assert calls == [(3, 7, 2), (30, 7, 1), (5, 7, 2)]
    assert "kills made up" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_violation_ends_with_1_and_says_how_to_repeat_it(
    made_up: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made_up.run = lambda **arguments: Report("kills made up", 3, lost=1, failures=("lost: the silver",))

    status = main(["made_up", "--seed", "7", "--folder", str(tmp_path), "--json", str(tmp_path / "found.json")])

    shown = capsys.readouterr().out
    assert status == 1
    assert "made_up: repeat it with ./dev torture made_up --inventions 3 --seed 7" in shown
    assert "lost: the silver" in shown
    [trial] = json.loads((tmp_path / "found.json").read_text())["trials"]
    assert (trial["good"], trial["lost"], trial["failures"]) == (False, 1, ["lost: the silver"])


def test_trial_that_breaks_or_does_nothing_is_no_success(
    made_up: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(**arguments: Any) -> Report:
        raise OSError("no more forks")

    made_up.run = broken
    assert main(["made_up", "--folder", str(tmp_path)]) == 1
    assert "OSError: no more forks" in capsys.readouterr().out

    made_up.run = lambda **arguments: Report("kills made up", 0)
    assert main(["made_up", "--folder", str(tmp_path)]) == 1
    assert "no fault was injected" in capsys.readouterr().out


def test_unknown_trial_is_refused_with_those_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["earthquakes"])

    assert ended.value.code == 2
    assert "there is no trial 'earthquakes', there are kills, points" in capsys.readouterr().err

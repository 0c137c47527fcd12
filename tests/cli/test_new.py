"""`ael new` and what a newcomer does next."""

from __future__ import annotations

from pathlib import Path

from tests.cli.conftest import Ael, Start


def test_new_says_what_it_made_and_what_to_do(ael: Ael, tmp_path: Path) -> None:
    done = ael("new", "home")

    assert done.code == 0
    assert "made home/agents.py\n" in done.out
    assert done.out.endswith("now: cd home && ael run agents.py\n")
    assert (tmp_path / "home/ael.toml").exists()


def test_new_with_json_lists_the_files(ael: Ael, tmp_path: Path) -> None:
    found = ael("new", "home", "--json").json

    assert found["folder"] == str(tmp_path / "home")
    assert str(tmp_path / "home/agents.py") in found["files"]


def test_folder_that_is_not_empty_is_refused(ael: Ael, tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")

    done = ael("new", ".")

    assert (done.code, done.out) == (2, "")
    assert "is not empty (it holds notes)" in done.err


def test_settings_beside_the_target_are_used_from_elsewhere(ael: Ael, start: Start, tmp_path: Path) -> None:
    ael("new", "home")

    run = start("run", "home/agents.py", "--iterations", "2", "--tick-rate", "0")

    assert run.wait() == 0
    assert (tmp_path / "home/ael.db").exists()
    assert not (tmp_path / "ael.db").exists()
    assert ael("state", "get", "readings", "--db", "home/ael.db").out == "2\n"

"""`ael new` makes a project that works, or nothing."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ael_store.cli import project
from ael_store.cli.project import create_project
from ael_store.errors import StorageFailed, UsageError
from ael_store.settings import Settings, load_settings

FILES = [".gitignore", "README.md", "ael.toml", "agents.py", "test_agents.py"]


def contents(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_project_is_made_with_its_name_in_it(tmp_path):
    files = create_project(tmp_path / "home")

    assert contents(tmp_path) == ["home"]
    assert sorted(file.name for file in files) == contents(tmp_path / "home") == FILES
    assert (tmp_path / "home/README.md").read_text().startswith("# home\n")
    assert not any("{{" in file.read_text() for file in files)


def test_missing_parents_are_made(tmp_path):
    create_project(tmp_path / "houses/one")

    assert contents(tmp_path / "houses/one") == FILES


def test_empty_folder_is_filled_and_stays_the_same_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    files = create_project(Path("."))

    assert files[0].parent == tmp_path
    assert sorted(os.listdir(".")) == FILES


def test_permissions_are_the_usual_ones(tmp_path):
    (tmp_path / "usual").mkdir()

    create_project(tmp_path / "home")

    assert (tmp_path / "home").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_folder_that_holds_something_is_refused_and_left_alone(tmp_path):
    (tmp_path / "notes").write_text("mine")

    with pytest.raises(UsageError, match=r"is not empty \(it holds notes\); name a folder"):
        create_project(tmp_path)
    with pytest.raises(UsageError, match="is a file"):
        create_project(tmp_path / "notes")

    assert contents(tmp_path) == ["notes"]


@pytest.mark.parametrize("name", ["-rf", ".hidden", "two\nlines", " ", "x" * 201])
def test_unsuitable_name_is_refused(tmp_path, name):
    with pytest.raises(UsageError, match="is no name for a project"):
        create_project(tmp_path / name)

    assert contents(tmp_path) == []


@pytest.mark.parametrize("existing", [False, True])
def test_nothing_is_left_of_a_project_that_failed_half_way(tmp_path, monkeypatch, existing):
    home = tmp_path / "a/home"
    if existing:
        home.mkdir(parents=True)
    monkeypatch.setitem(project._FILES, "more.py", "no such template")

    with pytest.raises(UsageError, match="can't be made"):
        create_project(home)

    assert contents(tmp_path) == (["a"] if existing else [])
    assert not existing or contents(home) == []


def test_nothing_is_left_when_moving_fails(tmp_path, monkeypatch):
    rename = Path.rename

    def fail(path: Path, target: Path) -> Path:
        if target.name == "README.md":
            raise OSError(errno.ENOSPC, "No space left on device")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)

    with pytest.raises(StorageFailed, match="No space left"):
        create_project(tmp_path)

    assert contents(tmp_path) == []


def test_place_below_a_file_is_refused(tmp_path):
    (tmp_path / "notes").write_text("mine")

    with pytest.raises(UsageError, match="can't be made"):
        create_project(tmp_path / "notes/home")


def test_settings_of_the_project_load_and_differ_from_no_default(tmp_path):
    create_project(tmp_path / "home")

    loaded = load_settings(environ={}, folder=tmp_path / "home")

    assert loaded.origins["tick_rate"] == "ael.toml"
    assert loaded.settings.db == str(tmp_path / "home/ael.db")
    changed = {name for name in loaded.origins if loaded.origins[name] != "default"}
    assert changed == {"db", "tick_rate", "log_level"}


def test_settings_shown_as_comments_are_right_too(tmp_path):
    create_project(tmp_path / "home")
    file = tmp_path / "home/ael.toml"
    shown = re.findall(r"^(?:# )?(\w+ = .*|\[agents.*)", file.read_text(), re.MULTILINE)
    file.write_text("\n".join(shown))

    loaded = load_settings(environ={}, folder=tmp_path / "home")

    defaults = Settings()
    differing = {name for name in loaded.origins if getattr(loaded.settings, name) != getattr(defaults, name)}
    assert differing == {"db", "max_agents"}
    assert sum(origin == "ael.toml" for origin in loaded.origins.values()) == 16
    assert loaded.agents["kitchen"].agent_class == "Thermometer"
    assert list(loaded.agents["kitchen"].secret_names()) == ["KITCHEN_TOKEN"]


def test_tests_of_the_project_pass(tmp_path):
    create_project(tmp_path / "home")

    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(command, cwd=tmp_path / "home", env=environ, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 passed" in done.stdout

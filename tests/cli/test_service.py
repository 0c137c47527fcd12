"""`ael service`: the unit of a project, written, checked by systemd itself, and removed."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from ael_store.cli.project import create_project
from tests.cli.conftest import Ael


@pytest.fixture(autouse=True)
def units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where units of this user go; no service manager is in reach."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.delenv("DBUS_SESSION_BUS_ADDRESS", raising=False)
    (tmp_path / "runtime").mkdir(mode=0o700)
    return tmp_path / "config" / "systemd" / "user"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    create_project(tmp_path / "my home %x")
    return tmp_path / "my home %x"


def lines(text: str) -> dict[str, str]:
    return dict(line.split("=", 1) for line in text.splitlines() if "=" in line and not line.startswith("#"))


def test_unit_is_written_and_removed_again(ael: Ael, project: Path, units: Path) -> None:
    done = ael("service", "install", str(project), "--json")
    assert done.code == 0, done.err
    unit = Path(done.json["path"])
    assert (unit.parent, unit.name) == (units, done.json["unit"])
    assert unit.name.startswith("ael-my-home-x-")
    assert unit.read_text() == done.json["text"] == ael("service", "install", str(project), "--print").out
    assert not ael("service", "install", str(project), "--json").json["changed"]

    status = ael("service", "status", str(project), "--json").json
    assert (status["installed"], status["up_to_date"], status["active"]) == (True, True, None)
    assert status["database"] == str(project / "ael.db")

    assert ael("service", "uninstall", str(project)).code == 0
    assert not list(units.iterdir())
    done = ael("service", "uninstall", str(project))
    assert (done.code, "there is no unit" in done.err) == (1, True)


def test_unit_says_what_a_loop_needs(ael: Ael, project: Path) -> None:
    (project / "ael.toml").write_text("grace = 90\nstall_limit = 600\n")

    unit = lines(ael("service", "install", str(project), "--print").out)

    assert unit["Type"] == "notify"
    assert unit["RestartPreventExitStatus"] == "2 65 78"
    assert unit["WorkingDirectory"] == str(project).replace("%", "%%")
    assert unit["ExecStart"].endswith(" -m ael_store run agents.py")
    assert (unit["TimeoutStopSec"], unit["WatchdogSec"]) == ("120", "660")
    assert (unit["NoNewPrivileges"], unit["ProtectSystem"]) == ("yes", "strict")


def test_database_elsewhere_can_be_written_too(ael: Ael, project: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()

    text = ael("service", "install", str(project), "--db", "data/x.db", "--print").out

    assert f"--db {tmp_path}/data/x.db\n" in text
    assert f'ReadWritePaths={tmp_path}/data "{str(project).replace("%", "%%")}"\n' in text


def test_each_target_has_a_unit_of_its_own(ael: Ael, project: Path, tmp_path: Path) -> None:
    create_project(tmp_path / "other" / "my home %x")
    (project / "night.py").write_text("")

    names = {
        ael("service", "install", str(target), "--json").json["unit"]
        for target in (project, tmp_path / "other" / "my home %x", project / "night.py")
    }

    assert len(names) == 3


def test_unit_of_somebody_else_is_left_alone(ael: Ael, project: Path, units: Path) -> None:
    name = ael("service", "status", str(project), "--json").json["unit"]
    units.mkdir(parents=True)
    (units / name).write_text("[Unit]\n")

    for verb in ("install", "uninstall"):
        done = ael("service", verb, str(project))
        assert (done.code, "was not written by" in done.err) == (2, True)
    assert (units / name).read_text() == "[Unit]\n"


def test_what_could_not_run_is_refused(ael: Ael, project: Path, tmp_path: Path) -> None:
    assert "there is no file" in ael("service", "install").err
    assert "is no folder" in ael("service", "install", str(project), "--db", "none/x.db").err
    assert "ends with its process" in ael("service", "install", str(project), "--db", ":memory:").err
    (project / "ael.toml").write_text("tickrate = 1\n")
    assert "did you mean 'tick_rate'?" in ael("service", "install", str(project)).err
    assert not (tmp_path / "config").exists()


def test_start_without_a_service_manager_says_so(ael: Ael, project: Path) -> None:
    done = ael("service", "install", str(project), "--start")

    assert done.code == 1
    assert "there is no service manager to start it" in done.err


def test_variables_of_the_shell_are_named_because_the_service_has_them_not(
    ael: Ael, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AEL_TICK_RATE", "5")

    assert "AEL_TICK_RATE is set here and not in the service" in ael("service", "install", str(project)).err


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="NO SYSTEMD HERE: no unit was verified")
@pytest.mark.parametrize("options", [["--user"], []], ids=["user", "system"])
def test_systemd_finds_nothing_wrong_with_the_unit(ael: Ael, project: Path, tmp_path: Path, options: list[str]) -> None:
    system = [] if options else ["--system"]
    name = ael("service", "status", str(project), *system, "--json").json["unit"]
    (tmp_path / name).write_text(ael("service", "install", str(project), *system, "--print").out)

    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *options, str(tmp_path / name)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ},
    )

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

"""The plain `alembic` command in a checkout, and the revisions inside an installed package."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

from ael_store.store.lock import DatabaseLock
from ael_store.store.upgrade import HEAD, check, current_revision

CHECKOUT = Path(__file__).resolve().parents[2]


def alembic(*arguments: str, db: Path | str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "alembic", *arguments],
        cwd=CHECKOUT,
        env=os.environ | {"AEL_DB": str(db)},
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def test_alembic_upgrades_shows_and_downgrades(path: Path) -> None:
    missing = alembic("current", db=path)
    assert missing.returncode != 0
    assert "does not exist" in missing.stdout + missing.stderr
    assert os.listdir(path.parent) == []

    assert alembic("upgrade", "head", db=path).returncode == 0
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert check(path).problems == []

    assert alembic("downgrade", "-1", db=f"sqlite:///{path}").returncode == 0
    assert current_revision(path) == "0007"
    assert check(path).problems == []
    assert alembic("current", db=path).stdout.split() == ["0007"]


def test_alembic_takes_the_lock_before_it_changes_anything(path: Path) -> None:
    with DatabaseLock(path).held("a test"):
        running = subprocess.Popen(
            [sys.executable, "-m", "alembic", "-x", f"db={path}", "upgrade", "head"],
            cwd=CHECKOUT,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            running.wait(timeout=1.5)
            raise AssertionError("it did not wait")
        except subprocess.TimeoutExpired:
            assert not path.exists()
    _, errors = running.communicate()

    assert running.returncode == 0, errors
    assert current_revision(path) == HEAD


def test_revisions_inside_an_installed_package_are_used(tmp_path: Path) -> None:
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(CHECKOUT / "ael_store", tmp_path / "site" / "ael_store", ignore=ignore)
    shutil.copytree(CHECKOUT / "migrations", tmp_path / "site" / "ael_store" / "_migrations", ignore=ignore)
    script = """
import sys
from pathlib import Path
from ael_store.store.revision import alembic_config
from ael_store.store.upgrade import check, downgrade, upgrade
path = Path("ael.db")
path.touch()
assert upgrade(path).to_revision == "0008"
assert downgrade(path, "0002", backup=False).to_revision == "0002"
assert check(path).problems == []
print(alembic_config().get_main_option("script_location"))
"""

    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=False,
    )

    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(tmp_path / "site" / "ael_store" / "_migrations")

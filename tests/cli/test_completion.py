"""What a shell completes: commands, options and names from the database, and never a message."""

from __future__ import annotations

import os
import shlex
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import ROOT, Ael


def completed(line: str, **environment: str) -> tuple[list[str], str]:
    """Return what bash would be offered at the end of a line, and what was said besides."""
    words = shlex.split(line)
    done = subprocess.run(
        [sys.executable, "-m", "ael_store"],
        capture_output=True,
        text=True,
        check=False,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "_AEL_COMPLETE": "complete_bash",
            "COMP_WORDS": line,
            "COMP_CWORD": str(len(words) if line.endswith(" ") else len(words) - 1),
            **environment,
        },
    )
    return done.stdout.split(), done.stderr


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("ael st", ["status", "step", "state"]),
        ("ael state get t", ["temperature"]),
        ("ael state list agent/", ["agent/counter/mine"]),
        ("ael agents show ", ["broken", "counter", "listener"]),
        ("ael tasks list --agent li", ["listener"]),
        ("ael events emit mea", ["measured"]),
        ("ael agents show --db none.db ", []),
        ("ael state get [", []),
    ],
)
def test_names_are_completed(database: Path, line: str, offered: list[str]) -> None:
    assert completed(line) == (offered, "")


def test_database_before_the_verb_is_the_one_that_is_asked(database: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    shutil.move(database, tmp_path / "other" / "x.db")

    assert completed("ael --db other/x.db state get t") == (["temperature"], "")


def test_nothing_is_said_where_nothing_can_be_known(database: Path, tmp_path: Path) -> None:
    assert completed("ael agents show ", AEL_TICKRATE="1", AEL_GRACE="long") == ([], "")

    with sqlite3.connect(database) as connection:
        connection.execute("DROP VIEW v_agents")
    connection.close()
    assert completed("ael agents show ") == ([], "")

    database.write_bytes(os.urandom(5000))
    assert completed("ael agents show ") == ([], "")


def test_script_for_the_shell_is_shown_and_installed(ael: Ael, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))

    shown = ael("--show-completion", "bash")
    assert (shown.code, "_AEL_COMPLETE=complete_bash" in shown.out) == (0, True)

    assert ael("--install-completion", "bash").code == 0
    assert "_ael_completion" in (tmp_path / ".bash_completions" / "ael.sh").read_text()

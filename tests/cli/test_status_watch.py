"""`ael status --watch`, on terminals of any size and without one."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from tests.cli.conftest import PATIENCE_S, ROOT, Ael, Start


def watch(columns: int, rows: int, until: str) -> tuple[int, str, str]:
    """Watch in a terminal of this size until a text is there, press Ctrl-C; return exit code, all, the last screen."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    written, pressed, give_up = b"", False, time.monotonic() + PATIENCE_S
    with subprocess.Popen(
        ["setsid", "--ctty", sys.executable, "-m", "ael_store", "status", "--watch"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**environment, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color"},
    ) as process:
        os.close(theirs)
        while time.monotonic() < give_up:
            if select.select([ours], [], [], 0.1)[0]:
                try:
                    written += os.read(ours, 65536)
                except OSError:
                    break
            if until.encode() in written and not pressed:
                os.write(ours, b"\x03")
                pressed = True
        os.close(ours)
        if process.poll() is None:
            process.kill()
    text = written.decode()
    screen = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text.rsplit("\x1b[H", 1)[-1]).replace("\r", "")
    return process.returncode, text, screen


@pytest.mark.skipif(shutil.which("setsid") is None, reason="no setsid here, which gives a process a terminal")
@pytest.mark.parametrize(("columns", "rows"), [(100, 30), (40, 16)])
def test_screen_shows_overview_and_agents_and_is_given_back(database: Path, columns: int, rows: int) -> None:
    code, text, screen = watch(columns, rows, "listener")

    assert code == 0
    assert text.count("\x1b[?1049h") == text.count("\x1b[?1049l") == 1
    lines = screen.splitlines()
    assert len(lines) <= rows
    assert max(map(len, lines)) <= columns + len("^C")
    assert "loop       not running" in screen
    assert re.search(r"^broken +active +\d+ +\d+", screen, re.MULTILINE)
    assert "Traceback" not in text


def test_without_a_terminal_there_is_a_line_each_second(database: Path, start: Start) -> None:
    watched = start("status", "--watch", "--json")
    watched.wait_for('"iteration":3')

    assert watched.stop(signal.SIGINT) == 0
    assert json.loads(watched.lines[0])["status"] == "stopped"


def test_database_that_goes_away_is_waited_for(database: Path, start: Start, tmp_path: Path) -> None:
    watched = start("status", "--watch")
    watched.wait_for("stopped, iteration 3, 3 active, 0 pending, 0 problems")
    database.rename(tmp_path / "away.db")
    watched.wait_for("ael.db does not exist")

    (tmp_path / "away.db").rename(database)
    shown = len(watched.lines)
    while len(watched.lines) <= shown or "stopped, iteration 3" not in watched.lines[-1]:
        time.sleep(0.05)
    assert watched.stop(signal.SIGINT) == 0


def test_database_that_is_missing_from_the_start_is_refused(ael: Ael) -> None:
    done = ael("status", "--watch")

    assert (done.code, "does not exist" in done.err) == (74, True)

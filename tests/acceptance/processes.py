"""Real `ael` processes for tests of hangs and deaths: nothing of them outlives the test."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["ael", "running_ael", "wait_for"]

PATIENCE_S = 60.0


def ael(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder until it ends; settings are those of `environment` only."""
    return subprocess.run(
        _command(*arguments),
        check=False,
        cwd=folder,
        env=_clean(environment),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )


@contextmanager
def running_ael(folder: Path, *arguments: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """A command that runs for the length of a block; what it says is in `log` in the folder."""
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(
            _command(*arguments), cwd=folder, env=_clean(environment), stdout=log, stderr=subprocess.STDOUT
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[bytes] | None = None) -> Any:
    """Return the first true result of a condition; fails where the process ends before, or nothing happens."""
    give_up = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        assert process is None or process.poll() is None, f"the process has ended with {process.returncode}"
        assert time.monotonic() < give_up, "it did not come true"
        time.sleep(0.02)
    return found


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "ael_store", *arguments]


def _clean(environment: dict[str, str]) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AEL_")}
    root = str(Path(__file__).parents[2])
    return {**kept, "PYTHONPATH": root, "PYTHONDONTWRITEBYTECODE": "1", **environment}

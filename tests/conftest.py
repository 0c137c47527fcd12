"""What holds for every test."""

from __future__ import annotations

import compileall
import signal
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def pytest_configure(config: pytest.Config) -> None:
    """Let the hundreds of processes that the tests start find bytecode, also where PYTHONDONTWRITEBYTECODE is set."""
    if not hasattr(config, "workerinput"):  # once, not in each process of xdist
        for folder in ("ael_store", "migrations", "tests/faults"):
            compileall.compile_dir(ROOT / folder, quiet=2)


@pytest.fixture(autouse=True)
def own_singletons(monkeypatch: pytest.MonkeyPatch) -> None:
    """Begin as a new process does: without a manager, bus, context or controller of its own."""
    for name in ("_manager", "_bus", "_context", "_controller"):
        monkeypatch.setattr(f"ael_store.compat.{name}", None)


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """Let processes of the tests be interrupted, also where the tests run in the background of a shell."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say aloud that nobody looked at the dashboard; a line among others would be read over."""
    skipped = [one for one in terminalreporter.stats.get("skipped", []) if "no browser: " in str(one.longrepr)]
    if skipped:
        line = f"{len(skipped)} TESTS OF THE DASHBOARD DID NOT RUN: install chromium"
        terminalreporter.write_sep("!", line, red=True, bold=True)

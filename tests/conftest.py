"""What holds for every test."""

from __future__ import annotations

import compileall
import logging
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ael_store.telemetry import OWN_NAME

ROOT = Path(__file__).parents[1]


def pytest_configure(config: pytest.Config) -> None:
    """Let the hundreds of processes that the tests start find bytecode, also where PYTHONDONTWRITEBYTECODE is set."""
    if not hasattr(config, "workerinput"):  # once, not in each process of xdist
        for folder in ("ael_store", "migrations", "tests/faults"):
            compileall.compile_dir(ROOT / folder, quiet=2)


@pytest.fixture(autouse=True)
def as_a_new_process(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Begin without a manager, bus, context or controller, and leave no agents and no log to the next test."""
    for name in ("_manager", "_bus", "_context", "_controller"):
        monkeypatch.setattr(f"ael_store.compat.{name}", None)
    root = logging.getLogger()
    known, level = set(sys.modules), root.level

    yield

    folder = str(tmp_path_factory.getbasetemp())
    for name in set(sys.modules) - known:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(folder):
            del sys.modules[name]
    for handler in [handler for handler in root.handlers if handler.get_name() == OWN_NAME]:
        root.removeHandler(handler)
        root.setLevel(level)


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """Let processes of the tests get signals, also where the tests run in the background of a shell or below nohup."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say aloud that nobody looked at the dashboard; a line among others would be read over."""
    skipped = [one for one in terminalreporter.stats.get("skipped", []) if "no browser: " in str(one.longrepr)]
    if skipped:
        line = f"{len(skipped)} TESTS OF THE DASHBOARD DID NOT RUN: install chromium"
        terminalreporter.write_sep("!", line, red=True, bold=True)

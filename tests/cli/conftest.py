"""The command line, called in this process and as real processes."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ael_store.cli.main import main
from tests.loops import agent, controller_on

PATIENCE_S = 30.0
ROOT = Path(__file__).parents[2]

COUNTER = """
from ael_store import AgentBase

class Counter(AgentBase):
    name = "counter"
    priority = 10

    def on_tick(self, context):
        context.increment("count")

class Bell(AgentBase):
    name = "bell"
    subscriptions = ["ring"]

    def on_event(self, event, context):
        context.increment("rung")
"""


@dataclass(frozen=True)
class Done:
    """How a command ended and what it printed."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Ael = Callable[..., Done]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a folder of one's own, without settings from outside."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("AEL_")]:
        monkeypatch.delenv(name)
    return tmp_path


@pytest.fixture
def ael(capsys: pytest.CaptureFixture[str]) -> Ael:
    """Carry out a command in this process."""

    def call(*arguments: str) -> Done:
        capsys.readouterr()
        code = main(arguments)
        printed = capsys.readouterr()
        return Done(code, printed.out, printed.err)

    return call


@pytest.fixture(scope="session")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database that a loop has filled and left in order."""
    path = tmp_path_factory.mktemp("filled") / "ael.db"

    def count(context: Any) -> None:
        context.set("temperature", 20 + context.iteration)
        context.own.set("mine", [context.iteration])
        context.emit("measured", {"celsius": 20 + context.iteration})

    def fail(context: Any) -> None:
        raise ValueError("no sensor")

    counter = agent("counter", tick=count)
    listener = agent("listener", event=lambda event, context: None, subscriptions=["meas*"])
    asyncio.run(controller_on(path, counter, listener, agent("broken", tick=fail), tick_rate=0).run(3))
    return path


@pytest.fixture
def database(filled: Path, tmp_path: Path) -> Path:
    """A copy of it, `ael.db` in the working folder."""
    path = tmp_path / "ael.db"
    shutil.copy(filled, path)
    return path


@pytest.fixture
def run_here(ael: Ael, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Ael:
    """Carry out `ael run` in this process; its log is in `err`."""
    monkeypatch.setattr("ael_store.telemetry.configure_logging", lambda *_arguments: None)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    caplog.set_level("INFO")

    def run(*arguments: str) -> Done:
        caplog.clear()
        done = ael("run", *arguments)
        return Done(done.code, done.out, done.err + caplog.text)

    return run


# -- real processes ---------------------------------------------------------------------------------


class Process:
    """A running `ael`; its lines can be waited for."""

    def __init__(self, *arguments: str, **options: Any) -> None:
        self.lines: list[str] = []
        self.folder = Path(options.get("cwd", os.getcwd()))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "ael_store", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), **options.pop("env", {})},
            **options,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def wait_for(self, text: str) -> str:
        """Return the first line with this text."""
        return str(until(lambda: next((line for line in list(self.lines) if text in line), None), self))

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal and return the exit code."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        code = self.process.wait(PATIENCE_S)
        self._reader.join(PATIENCE_S)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code


def until(condition: Callable[[], Any], about: Any = "") -> Any:
    """Return the first true result of a condition that another process brings about."""
    deadline = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"this did not come true: {getattr(about, 'text', about)}")
        time.sleep(0.005)
    return found


Start = Callable[..., Process]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start `ael` as a process of its own; it is killed in the end."""
    started: list[Process] = []

    def begin(*arguments: str, **options: Any) -> Process:
        started.append(Process(*arguments, **options))
        return started[-1]

    yield begin
    for process in started:
        if process.process.poll() is None:
            process.stop(signal.SIGKILL)


@pytest.fixture
def counter(tmp_path: Path) -> str:
    """A file of agents: `counter` counts ticks, `bell` counts events."""
    (tmp_path / "agents.py").write_text(COUNTER)
    return "agents.py"

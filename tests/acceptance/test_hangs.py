"""An event loop that stands still is noticed, named, and in the end ended; hooks that never end keep nobody."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import signal
import sqlite3
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ael_store import StateContext
from ael_store.runtime.tick import Workbench
from ael_store.runtime.watchdog import STALLED, Watchdog
from ael_store.store.unit_note import read_note
from tests.acceptance.processes import ael, running_ael, wait_for
from tests.loops import agent, controller_on, iterations_of, rows, running, until

AGENTS = """
import asyncio, os, time
from ael_store import AgentBase

HOW = os.environ.get("HOW")

async def child():
    time.sleep(3600)

class Stuck(AgentBase):
    name = "stuck"
    priority = 10
    tick_timeout = 0.1

    async def on_start(self, context):
        if HOW == "on_start":
            time.sleep(3600)

    async def on_tick(self, context):
        match HOW:
            case "on_tick": time.sleep(3600)
            case "loop":
                while True: pass
            case "task": await asyncio.gather(child())
            case "to_thread": await asyncio.to_thread(time.sleep, 3600)
            case "swallows":
                while True:
                    try:
                        await asyncio.sleep(3600)
                    except asyncio.CancelledError:
                        pass

    async def on_shutdown(self, context):
        if HOW == "on_shutdown":
            time.sleep(3600)

class Blocked(AgentBase):
    name = "blocked"
    priority = 10
    tick_timeout = 0.1

    def on_tick(self, context):
        if HOW == "thread":
            time.sleep(3600)

class Good(AgentBase):
    name = "good"
    priority = 10

    async def on_tick(self, context):
        context.increment("good")
"""

STALL = {"AEL_STALL_WARN": "0.2", "AEL_STALL_LIMIT": "0.6"}

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "agents.py").write_text(AGENTS)
    return tmp_path / "ael.db"


# -- the event loop stands still -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "kind"), [("on_tick", "tick"), ("loop", "tick"), ("task", "tick"), ("on_shutdown", "shutdown")]
)
def test_standstill_ends_the_process_with_70_and_the_next_start_knows_the_agent(
    path: Path, how: str, kind: str
) -> None:
    stalled = ael(path.parent, "run", "agents.py", "--iterations", "1", "--log-format", "json", **STALL, HOW=how)

    assert stalled.returncode == STALLED, stalled.stderr
    lines = [json.loads(line) for line in stalled.stderr.splitlines()]
    warned, *_, ended = [line for line in lines if line["logger"] == "ael_store.watchdog"]
    assert (warned["level"], ended["level"]) == ("error", "critical")
    assert f" s in on_{kind} of 'stuck' (iteration 1), at agents.py:" in warned["event"]
    assert f"in on_{kind} of 'stuck' (iteration 1)" in ended["event"]
    assert "agents.py" in warned["stack"]
    assert "ael_store/cli" not in warned["stack"]
    note = read_note(path)
    assert note is not None
    assert [(unit.kind, unit.subject) for unit in note.units] == [(kind, "stuck")]
    if how == "on_tick":
        again = ael(path.parent, "run", "agents.py", "--iterations", "1")
        assert again.returncode == 0, again.stderr
        assert rows(path, "SELECT last_error FROM v_agents WHERE name = 'stuck'") == [
            f"{note.reason} in its on_tick, and the process was ended (run 1)"
        ]


def test_status_answers_while_the_event_loop_stands_still_and_says_so(path: Path) -> None:
    with running_ael(path.parent, "run", "agents.py", HOW="on_tick", AEL_STALL_LIMIT="0") as process:
        wait_for(lambda: (note := read_note(path)) is not None and note.units, process)
        began = time.monotonic()
        facts = json.loads(ael(path.parent, "status", "--json").stdout)
        elapsed_s = time.monotonic() - began

    assert (facts["running"], facts["pid"], facts["answers"]) == (True, process.pid, False)
    assert elapsed_s < 30


def test_time_in_which_the_process_is_stopped_does_not_count(path: Path) -> None:
    with running_ael(path.parent, "run", "agents.py", AEL_TICK_RATE="0.02", **STALL) as process:
        wait_for(lambda: path.exists() and _good(path), process)
        process.send_signal(signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)
        before = _good(path)
        time.sleep(1.5)  # longer than the limit: this is what is tested
        process.send_signal(signal.SIGCONT)
        wait_for(lambda: _good(path) > before + 20, process)
        process.terminate()
        assert process.wait() == 0
    assert "ends with exit code" not in (path.parent / "log").read_text()


def _good(path: Path) -> int:
    try:
        found = rows(path, "SELECT value FROM v_state WHERE key = 'good'")
    except sqlite3.OperationalError:
        return 0
    return int(found[0]) if found else 0


class Stand:
    """A tick that blocks the event loop once, until it is let through."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.begun = 0

    async def __call__(self, context: StateContext) -> None:
        self.begun += 1
        if self.begun == 1:
            assert self.go.wait(30)


def _release(when: Callable[[], Any], go: threading.Event) -> threading.Thread:
    """Let a blocked event loop go on as soon as something has happened, seen from another thread."""

    def wait() -> None:
        give_up = time.monotonic() + 20
        while not when() and time.monotonic() < give_up:
            time.sleep(0.005)
        go.set()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


async def test_standstill_that_ends_is_told_twice_and_then_that_it_is_over(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stand = Stand()
    caplog.set_level(logging.WARNING)
    thread = _release(lambda: caplog.text.count("the event loop stands still") >= 2, stand.go)
    controller = controller_on(path, agent("stuck", tick=stand), stall_warn=0.05, stall_limit=0)
    async with running(controller):
        await until(lambda: "it goes on" in caplog.text)
    thread.join()

    told = [record for record in caplog.records if record.name == "ael_store.watchdog"]
    assert [record.levelname for record in told][-1] == "WARNING"
    assert " in on_tick of 'stuck' (iteration 1), at " in told[0].getMessage()
    assert "in on_tick of 'stuck' (iteration 1); it goes on" in told[-1].getMessage()
    stack = told[0].stack  # type: ignore[attr-defined]
    assert "self.go.wait(30)" in stack
    assert rows(path, "SELECT count(*) FROM v_runs WHERE status = 'stopped'") == [1]


async def test_standstill_outside_of_hooks_is_told_too(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    blocked = threading.Event()

    def block(summary: Any) -> None:
        blocked.wait(20)

    caplog.set_level(logging.WARNING)
    controller = controller_on(path, agent("good"), stall_warn=0.05, stall_limit=0)
    controller.observe(block)
    thread = _release(lambda: "stands still" in caplog.text, blocked)
    async with running(controller):
        await until(lambda: "it goes on" in caplog.text)
    thread.join()

    assert re.search(r"stands still for \d\.\d s outside of hooks, at threading.py:\d+ in wait", caplog.text)


async def test_debugger_is_left_in_peace(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A watched thread whose frames are traced is being stepped through; it may stand as long as it likes."""
    ended = list[int]()
    bench = Workbench.__new__(Workbench)
    bench.note = None
    watchdog = Watchdog(bench, 0.02, 0.05, end=ended.append)
    looked = threading.Event()
    debugged = watchdog._is_debugged
    answers = list[bool]()

    def look() -> bool:
        answers.append(debugged())
        if len(answers) >= 5:
            looked.set()
        return answers[-1]

    watchdog._is_debugged = look  # type: ignore[method-assign]

    def stepped() -> None:
        assert looked.wait(20)

    tracing = sys.gettrace()
    sys.settrace(lambda frame, event, argument: lambda *_: None)
    try:
        watchdog.start()
        stepped()
    finally:
        sys.settrace(tracing)
        watchdog.stop()
    await asyncio.sleep(0)

    assert answers[:5] == [True] * 5
    assert ended == []
    assert "stands still" not in caplog.text


async def test_limits_of_zero_start_no_thread(path: Path) -> None:
    controller = controller_on(path, agent("good"), stall_warn=0, stall_limit=0)
    async with running(controller):
        assert "ael-watchdog" not in {thread.name for thread in threading.enumerate()}


async def test_report_that_blocks_does_not_keep_the_process_alive(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The log may be what the loop hangs in."""
    monkeypatch.setattr("ael_store.runtime.watchdog.REPORT_PATIENCE_S", 0.05)
    release, ended = threading.Event(), threading.Event()

    class Blocking(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            release.wait(20)

    handler = Blocking()
    logger = logging.getLogger("ael_store.watchdog")
    logger.addHandler(handler)
    bench = Workbench.__new__(Workbench)
    bench.note = None
    bench.background, bench._lane = {}, type("Lane", (), {"job": None})()
    codes = list[int]()

    def end(code: int) -> None:
        codes.append(code)
        ended.set()
        watchdog.stop()

    watchdog = Watchdog(bench, 0.02, 0.1, end=end)
    try:
        watchdog.start()
        assert ended.wait(20), "the event loop stands still here"
    finally:
        release.set()
        logger.removeHandler(handler)
    assert codes == [STALLED]


# -- hooks that never end --------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["thread", "to_thread", "swallows"])
def test_process_ends_although_a_hook_never_does(path: Path, how: str) -> None:
    done = ael(
        path.parent, "run", "agents.py", "--iterations", "6", "--tick-rate", "0.05", "--slow-after", "0.05",
        "--grace", "0.3", HOW=how,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert rows(path, "SELECT status FROM v_runs") == ["stopped"]
    assert _good(path) > 1, "the others went on"
    hung = "blocked" if how == "thread" else "stuck"
    assert set(rows(path, "SELECT outcome FROM v_ticks WHERE agent = ?", hung)) <= {"timeout", "cancelled"}
    assert "Traceback" not in done.stderr


async def test_hook_that_swallows_its_cancellation_is_left_alone_and_its_agent_waits(path: Path) -> None:
    begun, cancelled, contexts = list[int](), list[int](), list[StateContext]()
    go = asyncio.Event()

    async def deaf(context: StateContext) -> None:
        begun.append(context.iteration)
        if len(begun) > 1:
            return
        contexts.append(context)
        context.set("leak", 1)
        while not go.is_set():
            try:
                await go.wait()
            except asyncio.CancelledError:
                cancelled.append(1)

    agents = agent("deaf", tick=deaf, tick_timeout=0.02), agent("good")
    controller = controller_on(path, *agents, slow_after=0.01)
    async with running(controller):
        await until(lambda: rows(path, "SELECT 1 FROM v_ticks WHERE agent = 'deaf' AND outcome = 'timeout'"))
        await iterations_of(controller, 5)
        assert len(begun) == 1, "it is not ticked as long as its hook runs"
        go.set()
        await until(lambda: len(begun) > 1)

    assert cancelled
    assert not controller.state_context.has("leak")
    assert agents[1].error_count == 0

"""A loop whose runs die as soon as they have begun starts paused, says so, and waits for an operator."""

from __future__ import annotations

import contextlib
import signal
import sqlite3
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from ael_store import StateContext
from ael_store.settings import Settings
from ael_store.testing import Harness
from tests.acceptance.processes import ael, running_ael, wait_for
from tests.loops import agent, rows

AGENTS = """
from ael_store import AgentBase

class Counter(AgentBase):
    name = "counter"
    priority = 10

    async def on_start(self, context):
        context.increment("starts")

    async def on_tick(self, context):
        context.increment("ticks")
"""

REASON = "runs that began within the last minute ended without a clean stop"


@pytest.mark.timeout(180)
def test_loop_starts_paused_after_a_kill_and_goes_on_when_told_to(tmp_path: Path) -> None:
    path = tmp_path / "ael.db"
    (tmp_path / "agents.py").write_text(AGENTS)

    with running_ael(tmp_path, "run", "agents.py") as process:
        wait_for(partial(has_run, path), process)
        process.send_signal(signal.SIGKILL)
        process.wait()
    starts = rows(path, "SELECT value FROM v_state WHERE key = 'starts'")

    with running_ael(tmp_path, "run", "agents.py", AEL_UNCLEAN_STARTS="1", AEL_TICK_RATE="0.05") as process:
        wait_for(lambda: rows(path, "SELECT 1 FROM v_problems WHERE kind = 'paused_loop'"), process)
        status = ael(tmp_path, "status").stdout
        assert f"paused loop  loop: 1 {REASON.replace('runs', 'run')} (since " in status
        assert "; `ael resume` lets it go on" in status
        assert rows(path, "SELECT value FROM v_state WHERE key = 'starts'") == starts, "no agent has run"
        resumed = ael(tmp_path, "resume")
        assert resumed.returncode == 0, resumed.stderr
        wait_for(lambda: rows(path, "SELECT value FROM v_state WHERE key = 'ticks'"), process)
        assert not rows(path, "SELECT 1 FROM v_problems WHERE kind = 'paused_loop'")
        process.terminate()
        assert process.wait() == 0
    assert rows(path, "SELECT value FROM v_state WHERE key = 'starts'") == [str(int((starts or ["0"])[0]) + 1)]
    assert f"1 {REASON.replace('runs', 'run')}: the loop starts paused" in (tmp_path / "log").read_text()


def has_run(path: Path) -> bool:
    with contextlib.suppress(sqlite3.OperationalError):  # it is just being made
        return path.exists() and bool(rows(path, "SELECT id FROM runs"))
    return False


# -- the rule, on a virtual clock ---------------------------------------------------------------------


def harness(path: Path, **settings: int) -> tuple[Harness, list[str]]:
    """Return a loop that can crash, and the list of what its agent did."""
    did: list[str] = []

    def note(what: str) -> Callable[[StateContext], None]:
        def hook(context: StateContext) -> None:
            did.append(what)

        return hook

    worker = agent("worker", start=note("start"), tick=note("tick"), shutdown=note("shutdown"))
    return Harness([worker], store=path, settings=Settings(**{"unclean_starts": 3, **settings})), did  # type: ignore[arg-type]


def paused(h: Harness) -> bool:
    return h.sql("SELECT value FROM positions WHERE name = 'paused'") == [{"value": "true"}]


async def crash(h: Harness, times: int, apart: str = "1s") -> None:
    for _ in range(times):
        await h.start()
        await h.crash(down=apart)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ael.db"


async def test_paused_loop_runs_no_hook_until_it_is_resumed_and_stays_paused_over_restarts(path: Path) -> None:
    h, did = harness(path)
    await crash(h, 3)
    did.clear()
    await h.advance("1h")
    assert paused(h) and did == []
    await h.restart()
    await h.advance("1h")
    assert paused(h) and did == []
    assert [row["detail"] for row in h.sql("SELECT detail FROM v_problems WHERE kind = 'paused_loop'")] == [
        f"3 {REASON}"
    ]

    h.controller._host.request("loop.resume", {})
    await h.advance("2s")
    assert did[:2] == ["start", "tick"]
    assert not paused(h)
    await h.stop()


async def test_fewer_unclean_ends_or_longer_runs_or_a_clean_stop_in_between_pause_nothing(path: Path) -> None:
    h, _ = harness(path)
    await crash(h, 2)
    await h.start()
    assert not paused(h), "two are not three"
    await h.stop()
    await crash(h, 2)
    await h.start()
    assert not paused(h), "a clean stop was in between"
    await h.crash(down="61s")
    await crash(h, 2)
    await h.start()
    assert not paused(h), "the first of three was more than a minute ago"
    await h.crash(down="1s")
    await h.start()
    assert paused(h)
    await h.stop()


async def test_limit_of_zero_never_pauses(path: Path) -> None:
    h, did = harness(path)
    h._options["settings"] = Settings(unclean_starts=0)
    h._controller = h._new_controller()
    await crash(h, 8)
    await h.advance("1s")
    assert not paused(h) and did.count("start") == 9
    await h.stop()


async def test_step_runs_one_iteration_of_a_loop_that_has_paused_itself(path: Path) -> None:
    h, did = harness(path)
    await crash(h, 3)
    await h.start()
    did.clear()
    h.controller._host.request("loop.step", {"iterations": 1})
    await h.advance("10s")
    assert did == ["start", "tick"]
    assert paused(h)
    await h.stop()

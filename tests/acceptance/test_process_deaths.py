"""An agent that takes the whole process down is known at the next start, and quarantined after three times.

The deaths of one test are real. The others leave a database and a note as a process does that dies in a hook: the
run is not ended, and the note was not closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import stat
import threading
from pathlib import Path
from typing import Any

import pytest

from ael_store import AgentBase, StateContext
from ael_store.runtime.controller import AELController
from ael_store.store import unit_note
from ael_store.store.unit_note import NotedUnit, UnitNote, note_path, read_note
from ael_store.testing import Harness
from tests.acceptance.processes import ael
from tests.loops import EVERY, ShiftClock, agent, controller_on, rows, running, until

AGENTS = """
import ctypes, os, signal
from ael_store import AgentBase

class Deadly(AgentBase):
    name = "deadly"
    priority = 10

    async def on_start(self, context):
        context.set("started", True)

    async def on_tick(self, context):
        match os.environ.get("DEATH"):
            case "abort": os.abort()
            case "segfault": ctypes.string_at(0)
            case "kill": os.kill(os.getpid(), signal.SIGKILL)
            case "exit": os._exit(3)

class Good(AgentBase):
    name = "good"
    priority = 9

    async def on_start(self, context):
        pass

    def on_tick(self, context):
        context.increment("good")
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ael.db"


async def die(path: Path, *units: tuple[str, str]) -> None:
    """Leave a run that has not ended, and the note that these units (kind, agent) ran."""
    controller = controller_on(path, tick_rate=3600, unclean_starts=0)
    run = asyncio.create_task(controller.start())
    (run_id,) = await until(lambda: rows(path, "SELECT run_id FROM v_runs WHERE status = 'running'"))
    assert controller._task is not None
    controller._task.cancel()  # no commit, no clean end
    with contextlib.suppress(asyncio.CancelledError):
        await run
    note = UnitNote.create(path, run_id)
    for kind, name in units:
        note.begin(7, kind, name)


def deaths(path: Path, name: str) -> int:
    (number,) = rows(path, "SELECT deaths FROM agents WHERE name = ?", name)
    return int(number)


def status(path: Path, name: str) -> str:
    (word,) = rows(path, "SELECT status FROM v_agents WHERE name = ?", name)
    return str(word)


class Idle(AgentBase):
    """Does nothing on its own in the run of a test, so it succeeds in nothing either."""

    trigger = "every 1000s"

    async def on_tick(self, context: StateContext) -> None: ...


async def once(path: Path, *agents: AgentBase, **settings: Any) -> AELController:
    settings.setdefault("unclean_starts", 0)
    controller = controller_on(path, *agents, tick_rate=0, **settings)
    await controller.run(1)
    return controller


# -- real deaths -------------------------------------------------------------------------------------


@pytest.mark.timeout(120)
def test_after_three_deaths_the_next_start_runs_the_others_and_leaves_this_one_quarantined(path: Path) -> None:
    folder = path.parent
    (folder / "agents.py").write_text(AGENTS)
    ends = {"abort": -signal.SIGABRT, "segfault": -signal.SIGSEGV, "exit": 3}
    for number, (death, code) in enumerate(ends.items()):
        died = ael(folder, "run", "agents.py", DEATH=death)
        assert died.returncode == code, died.stderr
        assert deaths(path, "deadly") == number, "a death is counted at the next start"
        assert rows(path, "SELECT count(*) FROM v_iterations") == [0]

    fourth = ael(folder, "run", "agents.py", "--iterations", "2", "--tick-rate", "0", DEATH="kill")

    assert fourth.returncode == 0, fourth.stderr
    assert "run 3 died while on_tick of 'deadly' (iteration 1) ran" in fourth.stderr
    assert "agent deadly is quarantined" in fourth.stderr
    assert rows(path, "SELECT key, value FROM v_state ORDER BY key") == [("good", "1"), ("started", "true")]
    assert deaths(path, "deadly") == 3
    last = "the process died while its on_tick ran (run 3)"
    assert rows(path, "SELECT status, last_error FROM v_agents WHERE name = 'deadly'") == [("quarantined", last)]
    assert rows(path, "SELECT json_extract(data, '$.deaths') FROM v_events WHERE type = 'agent_quarantined'") == [3]
    (detail,) = rows(path, "SELECT detail FROM v_problems WHERE kind = 'quarantined_agent'")
    assert detail == f"3 deaths of the process in a row; last: {last}"
    assert not note_path(path).exists()


# -- who is blamed, and for how long -----------------------------------------------------------------


async def test_success_in_what_it_died_in_ends_the_count(path: Path) -> None:
    await once(path, agent("a"))
    await die(path, ("tick", "a"))
    await once(path, agent("a"))

    assert deaths(path, "a") == 0


async def test_success_of_another_hook_does_not_end_the_count(path: Path) -> None:
    def sick() -> AgentBase:
        return agent("a", start=lambda context: None, trigger="every 1000s")

    await once(path, sick())
    for number in (1, 2):
        await die(path, ("tick", "a"))
        await once(path, sick())
        assert deaths(path, "a") == number
    await die(path, ("start", "a"))
    await once(path, sick(), quarantine_after_deaths=4)

    assert deaths(path, "a") == 0, "here it died in `on_start`, and now that went well"


async def test_each_unit_that_ran_is_suspected_and_others_are_not(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    await once(path, Idle("a"), Idle("b"), Idle("c"))
    await die(path, ("tick", "a"), ("event", "b"), ("outside", "(outside)"), ("tick", "unknown"))
    await once(path, Idle("a"), Idle("b"), Idle("c"))

    assert [deaths(path, name) for name in "abc"] == [1, 1, 0]
    assert rows(path, "SELECT last_error FROM v_agents WHERE name = 'b'") == [
        "the process died while its on_event ran (run 2, 3 others too)"
    ]
    assert "on_tick of 'a' (iteration 7) and on_event of 'b' (iteration 7) and " in caplog.text


async def test_death_is_counted_once_also_when_the_next_run_dies_before_it_begins_a_unit(path: Path) -> None:
    await once(path, Idle("a"))
    await die(path, ("tick", "a"))
    stale = note_path(path).read_bytes()
    await once(path, Idle("a"))
    await die(path)
    note_path(path).write_bytes(stale)  # of a run before
    await once(path, Idle("a"))

    assert deaths(path, "a") == 1


async def test_note_of_before_the_machine_was_started_blames_nobody(
    path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    await once(path, Idle("a"))
    await die(path, ("tick", "a"))
    boot = tmp_path / "boot_id"
    boot.write_text("another\n")
    monkeypatch.setattr(unit_note, "BOOT_ID", boot)
    await once(path, Idle("a"))

    assert deaths(path, "a") == 0
    assert rows(path, "SELECT count(*) FROM v_runs WHERE status = 'crashed'") == [1]


async def test_quarantine_by_deaths_is_probed_after_an_hour_and_released_by_success(path: Path) -> None:
    clock = ShiftClock()
    await once(path, agent("a", trigger="every 10ms"))
    await die(path, ("tick", "a"))
    sick, other = agent("a", trigger="every 10ms"), agent("other")
    controller = controller_on(path, sick, other, clock=clock, quarantine_after_deaths=1)
    async with running(controller):
        assert status(path, "a") == "quarantined"
        ticked = sick.tick_count
        clock.skip(3500)
        before = other.tick_count
        await until(lambda: other.tick_count > before + 2)
        assert sick.tick_count == ticked, "only those of the first run"
        clock.skip(200)
        await until(lambda: sick.tick_count > ticked)

    assert (status(path, "a"), deaths(path, "a")) == ("active", 0)


async def test_probe_that_fails_otherwise_keeps_the_quarantine(path: Path) -> None:
    def fail(context: StateContext) -> None:
        raise ValueError("broken")

    clock = ShiftClock()
    await once(path, agent("a", tick=fail))
    await die(path, ("tick", "a"))
    sick, other = agent("a", tick=fail), agent("other")
    controller = controller_on(path, sick, other, clock=clock, quarantine_after_deaths=1)
    async with running(controller):
        clock.skip(3700)
        await until(lambda: sick.error_count == 2)
        before = other.tick_count
        await until(lambda: other.tick_count > before + 3)

    assert sick.error_count == 2, "one probe an hour"
    assert status(path, "a") == "quarantined"


async def test_release_and_changed_code_end_the_count(path: Path) -> None:
    await once(path, Idle("a"))
    await die(path, ("tick", "a"))
    await once(path, Idle("a"), quarantine_after_deaths=1)
    assert status(path, "a") == "quarantined"
    assert ael(path.parent, "agents", "release", "a").returncode == 0
    assert (status(path, "a"), deaths(path, "a")) == ("active", 0)

    await die(path, ("tick", "a"))
    await once(path, Idle("a"), quarantine_after_deaths=1)
    assert status(path, "a") == "quarantined"

    class Mended(Idle):
        async def on_tick(self, context: StateContext) -> None:
            context.set("mended", True)

    await once(path, Mended("a"))
    assert (status(path, "a"), deaths(path, "a")) == ("active", 0)


async def test_count_of_zero_is_never_quarantined(path: Path) -> None:
    await once(path, Idle("a"))
    for _ in range(4):
        await die(path, ("tick", "a"))
        await once(path, Idle("a"), quarantine_after_deaths=0)

    assert (deaths(path, "a"), status(path, "a")) == (4, "active")


async def test_renamed_agent_takes_its_deaths_along(path: Path) -> None:
    await once(path, Idle("old"))
    await die(path, ("tick", "old"))
    await once(path, Idle("new", aliases=["old"]))

    assert deaths(path, "new") == 1


# -- the note itself ---------------------------------------------------------------------------------


async def test_units_are_noted_while_they_run_and_the_note_goes_with_the_run(path: Path) -> None:
    go, goes, seen = asyncio.Event(), threading.Event(), list[str]()

    async def slow(context: StateContext) -> None:
        await go.wait()

    def look(context: StateContext) -> None:
        note = read_note(path)
        assert note is not None
        seen[:] = sorted(f"{unit.kind} {unit.subject}" for unit in note.units)

    def hang(context: StateContext) -> None:
        goes.wait(30)

    controller = controller_on(
        path,
        agent("slow", tick=slow, background=True),
        agent("hanging", tick=hang, tick_timeout=0.05),
        agent("looking", tick=look),
        slow_after=0.02,
    )
    async with running(controller):
        assert stat.S_IMODE(note_path(path).stat().st_mode) == 0o600
        await until(lambda: seen == ["tick hanging", "tick looking", "tick slow"])
        await until(lambda: rows(path, "SELECT 1 FROM v_ticks WHERE agent = 'hanging' AND outcome = 'timeout'"))
        seen.clear()
        await until(lambda: seen == ["tick hanging", "tick looking", "tick slow"], "an abandoned thread still runs")
        goes.set()
        go.set()
        await until(lambda: seen == ["tick looking"])

    assert not note_path(path).exists()


def garbage(path: Path) -> None:
    path.write_bytes(os.urandom(unit_note.SIZE))


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1500])


def link(path: Path) -> None:
    victim = path.with_name("victim")
    path.rename(victim)
    path.symlink_to(victim)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("spoil", [garbage, truncated, link, pipe, Path.unlink], ids=lambda spoil: spoil.__name__)
async def test_what_is_no_note_blames_nobody_and_is_replaced(path: Path, spoil: Any) -> None:
    await once(path, Idle("a"))
    await die(path, ("tick", "a"))
    spoil(note_path(path))
    victim = path.with_name("victim")
    before = victim.read_bytes() if victim.exists() else b""

    def look(context: StateContext) -> None:
        note = read_note(path)
        assert note is not None
        assert [unit.subject for unit in note.units] == ["b"]

    await once(path, Idle("a"), agent("b", tick=look, priority=EVERY))

    assert deaths(path, "a") == 0
    assert rows(path, "SELECT tick_count FROM v_agents WHERE name = 'b'") == [1]
    assert (victim.read_bytes() if victim.exists() else b"") == before


async def test_note_that_can_not_be_written_is_warned_of_and_the_loop_goes_on(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    note_path(path).mkdir()
    with caplog.at_level(logging.WARNING):
        await once(path, agent("a"))

    assert f"{note_path(path)} can't be written" in caplog.text
    assert rows(path, "SELECT tick_count FROM v_agents WHERE name = 'a'") == [1]


def test_more_units_than_places_are_run_without_being_noted(path: Path) -> None:
    note = UnitNote.create(path, 1)
    places = [note.begin(1, "tick", f"agent {number}") for number in range(unit_note.ENTRIES + 5)]
    found = read_note(path)
    assert found is not None and len(found.units) == unit_note.ENTRIES
    for place in places:
        note.end(place)

    assert note.begin(2, "event", "ü" * 200)
    found = read_note(path)
    assert found is not None and found.units == (NotedUnit(2, "event", "ü" * 200),)
    note.close()
    note.end(places[0])
    assert note.begin(3, "tick", "late") == 0


async def test_crash_of_a_harness_blames_nobody(tmp_path: Path) -> None:
    harness = Harness([agent("a")], store=tmp_path / "ael.db")
    for _ in range(6):
        await harness.advance("1s")
        await harness.crash()
    await harness.advance("1s")

    assert harness.sql("SELECT deaths FROM agents WHERE name = 'a'") == [{"deaths": 0}]
    assert not harness.sql("SELECT * FROM v_problems WHERE kind = 'paused_loop'")
    await harness.stop()

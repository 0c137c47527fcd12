"""An agent's own data are brought up to date once, whole or not at all, before newer code works on them."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from ael_store import AgentBase, Event, StateContext
from ael_store.errors import AelError, InvalidAgent
from ael_store.store.fork import fork
from ael_store.store.verify import verify
from ael_store.testing import Harness, replay, run_tick
from tests.acceptance.processes import ael
from tests.loops import controller_on, iterations_of, rows, running, until


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ael.db"


class First(AgentBase):
    """Keeps its readings in whole degrees."""

    priority = 10

    async def on_tick(self, context: StateContext) -> None:
        context.own.set("degrees", 20)
        self.metadata["unit"] = "C"


class Second(AgentBase):
    """Keeps them in tenths, and notes the order of its hooks."""

    priority = 10
    version = 1
    subscriptions = ("look",)

    async def on_upgrade(self, from_version: int, context: StateContext) -> None:
        context.own.set("tenths", 10 * context.own.get("degrees", 0))
        context.own.delete("degrees")
        self.metadata["unit"] = "0.1 C"
        note(context, f"upgrade {from_version}")
        context.emit("upgraded", {"agent": self.name})

    async def on_start(self, context: StateContext) -> None:
        note(context, "start")

    async def on_event(self, event: Event, context: StateContext) -> None:
        note(context, "event")

    async def on_tick(self, context: StateContext) -> None:
        note(context, "tick")

    async def on_shutdown(self, context: StateContext) -> None:
        note(context, "shutdown")


def note(context: StateContext, what: str) -> None:
    context.own.set("order", [*context.own.get("order", []), what])


def broken(message: str = "no way") -> type[AgentBase]:
    async def on_upgrade(self: AgentBase, from_version: int, context: StateContext) -> None:
        context.own.set("tenths", "half done")
        self.metadata["unit"] = "half done"
        context.emit("upgraded", None)
        raise ValueError(message)

    return type("Broken", (Second,), {"on_upgrade": on_upgrade})


def order(path: Path, name: str = "probe") -> Any:
    found = rows(path, "SELECT value FROM v_state WHERE key = ?", f"agent/{name}/order")
    return found and json.loads(found[0])


def version(path: Path, name: str = "probe") -> Any:
    return rows(path, "SELECT data_version FROM agents WHERE name = ?", name)[0]


# -- once, and whole ---------------------------------------------------------------------------------


async def test_upgrade_runs_once_before_everything_else_and_commits_with_the_version(path: Path) -> None:
    await controller_on(path, First("probe")).run(iterations=2)
    assert version(path) is None

    await controller_on(path, Second("probe")).run(iterations=1)

    assert version(path) == 1
    assert order(path) == ["upgrade 0", "start", "tick", "shutdown"]
    assert rows(path, "SELECT value FROM v_state WHERE key LIKE 'agent/probe/t%'") == ["200"]
    assert rows(path, "SELECT count(*) FROM v_events WHERE type = 'upgraded'") == [1]
    unit = rows(path, "SELECT kind, outcome, iteration FROM v_ticks WHERE agent = 'probe' AND kind = 'start'")
    assert unit == [("start", "success", 2), ("start", "success", 2)]
    await controller_on(path, Second("probe")).run(iterations=1)
    assert order(path)[4:] == ["start", "tick", "shutdown"]
    assert verify(path).problems == []


async def test_new_agent_stores_its_version_without_an_upgrade(path: Path) -> None:
    await controller_on(path, Second("probe")).run(iterations=1)

    assert version(path) == 1
    assert order(path) == ["start", "tick", "shutdown"]


async def test_code_without_on_upgrade_only_counts_its_version_on(path: Path) -> None:
    class Third(First):
        version = 3

    await controller_on(path, First("probe")).run(iterations=1)
    await controller_on(path, Third("probe")).run(iterations=1)

    assert version(path) == 3
    assert rows(path, "SELECT value FROM moves WHERE kind = 'version'") == ['{"from":0,"to":3,"unit":null}']


async def test_agent_registered_while_the_loop_runs_is_upgraded_before_its_first_tick(path: Path) -> None:
    controller = controller_on(path, First("probe"), First("other"))
    async with running(controller):
        controller.agent_manager.unregister("probe")
        await iterations_of(controller, 2)
        controller.agent_manager.register(Second("probe"))
        await until(lambda: order(path) and "tick" in order(path))

    assert order(path)[:3] == ["upgrade 0", "start", "tick"]


async def test_plain_hook_and_instances_of_a_class_are_upgraded_each_by_itself(path: Path) -> None:
    class Plain(First):
        version = 2

        def on_upgrade(self, from_version: int, context: StateContext) -> None:  # type: ignore[override]
            context.increment("upgrades")
            context.own.set("from", from_version)

    await controller_on(path, First("one"), First("two")).run(iterations=1)
    await controller_on(path, Plain("one"), Plain("two"), Plain("three")).run(iterations=1)

    assert rows(path, "SELECT value FROM v_state WHERE key = 'upgrades'") == ["2"]
    assert rows(path, "SELECT key FROM v_state WHERE key LIKE '%/from' ORDER BY 1") == [
        "agent/one/from",
        "agent/two/from",
    ]
    assert rows(path, "SELECT data_version FROM agents WHERE id > 0") == [2, 2, 2]


async def test_renamed_agent_keeps_its_version(path: Path) -> None:
    await controller_on(path, Second("old")).run(iterations=1)

    await controller_on(path, Second("new", aliases=["old"])).run(iterations=1)

    assert version(path, "new") == 1
    assert order(path, "new") == ["start", "tick", "shutdown"] * 2


async def test_forgotten_agent_begins_anew(path: Path, tmp_path: Path) -> None:
    await controller_on(path, First("probe")).run(iterations=1)
    await controller_on(path, Second("probe")).run(iterations=1)
    assert ael(tmp_path, "agents", "forget", "probe", "--yes").returncode == 0
    assert version(path) is None

    await controller_on(path, Second("probe")).run(iterations=1)

    assert (version(path), order(path)) == (1, ["start", "tick", "shutdown"])


# -- where it fails ----------------------------------------------------------------------------------


async def test_failed_upgrade_leaves_nothing_and_is_tried_again_while_others_go_on(path: Path) -> None:
    async with Harness([First("probe"), First("other")], store=path) as h:
        await h.advance("2s")
        await h.restart(agents=[broken()("probe"), First("other")])
        await h.advance("30s")

        assert version(path) is None
        assert order(path) == []
        assert h.state["agent/probe/degrees"] == 20
        assert rows(path, "SELECT metadata FROM v_agents WHERE name = 'probe'") == ['{"unit":"C"}']
        assert rows(path, "SELECT count(*) FROM v_events WHERE type = 'upgraded'") == [0]
        errors = rows(path, "SELECT json_extract(data, '$.hook') FROM v_events WHERE type = 'agent_error'")
        assert set(errors) == {"on_upgrade"}
        assert 5 < len(errors) < 15  # it backs off
        assert rows(path, "SELECT kind FROM v_problems WHERE subject = 'probe'") == ["failing_agent"]
        assert h.state["agent/other/degrees"] == 20
        assert rows(path, "SELECT tick_count FROM v_agents ORDER BY name") == [34, 3]

        await h.restart(agents=[Second("probe"), First("other")])
        await h.advance("2s")

        assert order(path)[:3] == ["upgrade 0", "start", "tick"]
        assert version(path) == 1
        assert rows(path, "SELECT kind FROM v_problems WHERE subject = 'probe'") == []


async def test_process_that_dies_in_an_upgrade_leaves_the_old_data(path: Path) -> None:
    class Deadly(Second):
        async def on_upgrade(self, from_version: int, context: StateContext) -> None:
            context.own.set("tenths", 1)
            await h.crash()

    h = Harness([First("probe")], store=path)
    await h.advance("1s")
    await h.restart(agents=[Deadly("probe")])

    assert version(path) is None
    assert rows(path, "SELECT key FROM v_state WHERE key LIKE 'agent/probe/%'") == ["agent/probe/degrees"]
    await h.crash(agents=[Second("probe")])
    await h.advance("1s")
    assert order(path)[:2] == ["upgrade 0", "start"]
    await h.stop()


# -- code that is older than the data ----------------------------------------------------------------


async def test_older_code_does_not_touch_newer_data_and_others_go_on(path: Path, tmp_path: Path) -> None:
    await controller_on(path, Second("probe")).run(iterations=1)
    controller = controller_on(path, First("probe"), First("other"))
    async with running(controller):
        await iterations_of(controller, 5)
        (problem,) = rows(path, "SELECT detail FROM v_problems WHERE subject = 'probe'")
        assert "its data are of version 1, its code is of version 0" in problem
        assert rows(path, "SELECT status FROM v_agents WHERE name = 'probe'") == ["quarantined"]
        released = await asyncio.to_thread(ael, tmp_path, "agents", "release", "probe")
        assert released.returncode != 0
        assert "can't be released: its data are of version 1" in released.stderr
        by_hand = await asyncio.to_thread(ael, tmp_path, "agents", "run", "probe")
        assert "does not run: its data are of version 1" in by_hand.stderr
    (event,) = rows(path, "SELECT data FROM v_events WHERE type = 'agent_quarantined'")
    assert "its data are of version 1" in event
    assert order(path) == ["start", "tick", "shutdown"]
    assert rows(path, "SELECT tick_count FROM v_agents WHERE name = 'other'")[0] > 3

    await controller_on(path, Second("probe")).run(iterations=1)

    assert order(path) == ["start", "tick", "shutdown"] * 2
    assert rows(path, "SELECT status FROM v_agents WHERE name = 'probe'") == ["active"]
    assert verify(path).problems == []


@pytest.mark.parametrize("wrong", ["1.0", -1, True, None, 2**63, 1.5])
def test_version_that_is_no_whole_number_is_refused(path: Path, wrong: Any) -> None:
    made = type("Wrong", (First,), {"version": wrong})("probe")

    with pytest.raises(InvalidAgent, match=r"version is .*, wanted is an integer from 0"):
        controller_on(path, made)


# -- tools -------------------------------------------------------------------------------------------


async def test_run_tick_runs_an_upgrade(path: Path) -> None:
    result = await run_tick(Second("probe"), {"agent/probe/degrees": 21}, upgrade_from=0)

    assert result.check().writes["agent/probe/tenths"] == 210
    assert result.deletes == {"agent/probe/degrees"}


async def test_replay_runs_an_upgrade_as_it_was(path: Path) -> None:
    await controller_on(path, First("probe")).run(iterations=1)
    with pytest.raises(AelError):
        await replay(path, Second("probe"), kinds=["start"])
    await controller_on(path, broken()("probe")).run(iterations=1)
    await controller_on(path, Second("probe")).run(iterations=1)

    report = await replay(path, Second("probe"), kinds=["start"])

    failed = rows(path, "SELECT count(*) FROM v_ticks WHERE kind = 'start' AND outcome = 'error'")[0]
    assert failed > 0
    assert (report.units, report.same, report.different) == (failed + 2, 2, failed)


async def test_fork_of_a_moment_before_the_upgrade_has_the_version_of_then(path: Path, tmp_path: Path) -> None:
    await controller_on(path, First("probe")).run(iterations=3)
    await controller_on(path, Second("probe")).run(iterations=1)
    before, after = tmp_path / "before.db", tmp_path / "after.db"

    fork(path, before, lambda line: None, at=2)
    fork(path, after, lambda line: None, at=4)

    assert (version(before), version(after)) == (None, 1)
    await controller_on(before, Second("probe")).run(iterations=1)
    assert order(before)[0] == "upgrade 0"
    assert verify(before).problems == []

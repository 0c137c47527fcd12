"""The page of the loop's events says what a real loop emits, with the fields of their data."""

from __future__ import annotations

import json
import re
import sqlite3
from pathlib import Path

from ael_store import AELController, AgentBase, AgentManager, Event, Settings, StateContext
from tests.docs.markdown import ROOT

PAGE = (ROOT / "docs/reference/events.md").read_text("utf-8")


class Good(AgentBase):
    name = "good"

    async def on_tick(self, context: StateContext) -> None: ...


class Bad(AgentBase):
    name = "bad"

    async def on_tick(self, context: StateContext) -> None:
        raise RuntimeError("on purpose")


class Watcher(AgentBase):
    name = "watcher"
    subscriptions = ["agent.*"]

    async def on_event(self, event: Event, context: StateContext) -> None: ...


class Asker(AgentBase):
    name = "asker"

    async def on_start(self, context: StateContext) -> None:
        context.ask("Go on?", timeout=0)


async def run_once(path: Path) -> None:
    manager = AgentManager()
    for agent in (Good(priority=10), Bad(priority=10), Watcher(), Asker()):
        manager.register(agent)
    await AELController(manager, tick_rate=0, store=path, settings=Settings(quarantine_after=1)).run(iterations=3)


async def test_loop_emits_what_is_documented(tmp_path: Path) -> None:
    path = tmp_path / "ael.db"
    await run_once(path)
    with sqlite3.connect(path) as connection:  # as a killed process would have left it
        connection.execute("UPDATE runs SET status = 'running', ended_us = NULL, last_iteration = NULL, digest = NULL")
    connection.close()
    await run_once(path)

    connection = sqlite3.connect(path)
    emitted: dict[str, set[str]] = {}
    for type, data in connection.execute("SELECT type, data FROM v_events WHERE source IN ('ael_controller', 'asker')"):
        fields = set(json.loads(data))
        assert emitted.setdefault(type, fields) == fields
    connection.close()

    sections = re.findall(r"^## ([\w.]+)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    documented = {name: set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)) for name, text in sections}
    assert emitted == documented

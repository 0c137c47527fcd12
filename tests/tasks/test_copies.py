"""A copy of a database starts with its unfinished tasks held: nothing is paid or sent twice by accident."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ael_store.cli.main import main
from ael_store.testing import Harness
from tests.loops import worker

STATUS = "SELECT key, status FROM v_tasks ORDER BY key"


class Provider:
    """Counts calls by key; hangs while it is told to."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.gone: set[str] = set()

    def loop(self, path: Path) -> Harness:
        async def work(agent: Any, task: Any) -> str:
            self.calls.append(task.key)
            if task.key == "running" and not self.gone:
                self.gone.add(task.key)
                await h.crash()
            if task.key == "failed":
                raise ValueError("no")
            return "paid"

        h = Harness([worker(work, attempts=1)], store=path, tick_rate=3600)
        return h


@pytest.fixture
async def original(tmp_path: Path) -> tuple[Path, Provider]:
    """A database with a task of each kind, its process killed: done, failed, running, waiting for a time."""
    path = tmp_path / "ael.db"
    provider = Provider()
    async with provider.loop(path) as h:
        for key, after in (("done", None), ("failed", None), ("waiting", "10 days")):
            h.emit("go", {"key": key, "after": after})
        await h.advance("1h")
        h.emit("go", {"key": "running"})
        await h.advance()
        await h.crash()
    assert sorted(provider.calls) == ["done", "failed", "running"]
    provider.calls.clear()
    return path, provider


def ael(*arguments: Any) -> None:
    assert main([str(argument) for argument in arguments]) == 0


async def check_held_until_released(path: Path, provider: Provider, capsys: pytest.CaptureFixture[str]) -> None:
    async with provider.loop(path) as h:
        await h.advance("30 days")

        assert provider.calls == []
        assert h.sql(STATUS) == [
            {"key": "done", "status": "done"},
            {"key": "failed", "status": "failed"},
            {"key": "running", "status": "held"},
            {"key": "waiting", "status": "held"},
        ]
        assert (h.state["applied done"], h.state["applied failed"]) == (1, 1)
        (problem,) = h.sql("SELECT subject, detail FROM v_problems WHERE kind = 'held_tasks'")
        assert "2 tasks are held" in problem["detail"]
        h.emit("go", {"key": "new in the copy"})
        h.emit("go", {"key": "done"})
        h.emit("go", {"key": "running"})
        await h.advance("1h")
        assert provider.calls == ["new in the copy"]
        await h.restart()
        await h.advance("1h")
        assert provider.calls == ["new in the copy"], "held over a restart too"

        await h.stop()
        capsys.readouterr()
        ael("tasks", "release", "--all", "--dry-run", "--db", path)
        assert "work" in capsys.readouterr().out
        await h.advance("1h")
        await h.stop()
        assert provider.calls == ["new in the copy"]
        ael("tasks", "release", "--all", "--db", path)
        await h.advance("1 day")

        assert sorted(provider.calls[1:]) == ["running", "waiting"]
        assert {row["status"] for row in h.sql(STATUS) if row["key"] != "failed"} == {"done"}
        assert (h.state["applied running"], h.state["applied waiting"]) == (1, 1)
    ael("db", "verify", "--db", path)


async def test_tasks_of_a_restored_database_are_held_until_they_are_released(
    original: tuple[Path, Provider], capsys: pytest.CaptureFixture[str]
) -> None:
    path, provider = original
    ael("db", "backup", path.with_name("backup.db"), "--db", path)
    ael("db", "restore", path.with_name("backup.db"), "--db", path)

    await check_held_until_released(path, provider, capsys)


async def test_tasks_of_a_recovered_database_are_held_until_they_are_released(
    original: tuple[Path, Provider], capsys: pytest.CaptureFixture[str]
) -> None:
    path, provider = original
    out = path.with_name("recovered.db")
    ael("db", "recover", path, "--to", out)

    await check_held_until_released(out, provider, capsys)


async def test_what_a_release_would_do_is_said_right_after_a_restore_too(
    original: tuple[Path, Provider], capsys: pytest.CaptureFixture[str]
) -> None:
    """Before any loop has begun: it is a copy already, so what waits is held and not `waiting`."""
    path, _provider = original
    ael("db", "backup", path.with_name("backup.db"), "--db", path)
    ael("db", "restore", path.with_name("backup.db"), "--db", path)
    capsys.readouterr()

    ael("tasks", "release", "--all", "--dry-run", "--json", "--db", path)

    assert capsys.readouterr().out.count('"work"') == 2


async def test_release_right_after_a_restore_holds_for_the_start_that_follows(original: tuple[Path, Provider]) -> None:
    path, provider = original
    ael("db", "backup", path.with_name("backup.db"), "--db", path)
    ael("db", "restore", path.with_name("backup.db"), "--db", path)
    ael("tasks", "release", "--all", "--db", path)
    async with provider.loop(path) as h:
        await h.advance("30 days")

        assert sorted(provider.calls) == ["running", "waiting"]


async def test_single_task_is_released_and_the_others_stay(original: tuple[Path, Provider]) -> None:
    path, provider = original
    ael("db", "backup", path.with_name("backup.db"), "--db", path)
    ael("db", "restore", path.with_name("backup.db"), "--db", path)
    async with provider.loop(path) as h:
        await h.advance("1h")
        (waiting,) = h.sql("SELECT id FROM v_tasks WHERE key = 'waiting'")
        await h.stop()
        ael("tasks", "release", waiting["id"], "--db", path)
        await h.advance("30 days")

        assert provider.calls == ["waiting"]
        assert h.sql("SELECT key FROM v_tasks WHERE status = 'held'") == [{"key": "running"}]


async def test_the_original_goes_on_after_a_backup(original: tuple[Path, Provider]) -> None:
    path, provider = original
    ael("db", "backup", path.with_name("backup.db"), "--db", path)
    async with provider.loop(path) as h:
        await h.advance("30 days")

        assert sorted(provider.calls) == ["running", "waiting"]
        assert h.sql("SELECT key FROM v_tasks WHERE status = 'held'") == []


async def test_cancelled_task_of_a_copy_ends_without_running(original: tuple[Path, Provider]) -> None:
    path, provider = original
    ael("db", "backup", path.with_name("backup.db"), "--db", path)
    ael("db", "restore", path.with_name("backup.db"), "--db", path)
    async with provider.loop(path) as h:
        await h.advance("1h")
        (held,) = h.sql("SELECT id FROM v_tasks WHERE key = 'running'")
        await h.stop()
        ael("tasks", "cancel", held["id"], "--db", path)
        await h.advance("1h")

        assert provider.calls == []
        assert h.state["end running"]["status"] == "cancelled"

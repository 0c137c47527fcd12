"""`/livez` and `/readyz` beside real loops that work, wait, hang, stop and die."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.web.conftest import Site, port_in, running, until

AGENTS = """
from ael_store import AgentBase

class Still(AgentBase):
    name = "still"
    priority = 10

    def on_tick(self, context):
        pass
"""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "agents.py").write_text(AGENTS)
    (tmp_path / "ael.toml").write_text("tick_rate = 0.2\nidle_commit = 0.5\n")
    yield tmp_path


def health(site: Site) -> tuple[int, int, str]:
    live, ready = site.get("/livez"), site.get("/readyz")
    assert live.json["live"] == (live.status == 200)
    assert ready.json["ready"] == (ready.status == 200)
    return live.status, ready.status, ready.json["reason"]


def test_they_tell_the_truth_of_a_loop_that_hangs_waits_and_dies(folder: Path) -> None:
    with running(folder, "run", "agents.py", "--quiet") as loop:
        until((folder / "ael.db").exists, loop)
        with running(folder, "web", "127.0.0.1:0") as server:
            site = Site(folder / "ael.db", port_in(folder, server))
            until(lambda: health(site)[:2] == (200, 200), loop)
            shown = site.get("/readyz").json
            assert shown["age_s"] < shown["allowed_s"] == 0.5 + 0.4 + 5
            assert (shown["pid"], shown["status"]) == (loop.pid, "running")

            assert site.post("/api/v1/loop/pause").status == 200
            until(lambda: health(site)[:2] == (200, 503))
            assert health(site)[2] == "the loop is paused"
            assert site.post("/api/v1/loop/resume").status == 200
            until(lambda: health(site)[:2] == (200, 200))

            loop.send_signal(signal.SIGSTOP)
            until(lambda: health(site)[:2] == (503, 503))
            assert "does not answer" in health(site)[2] or "the last committed iteration began" in health(site)[2]
            loop.send_signal(signal.SIGCONT)
            until(lambda: health(site)[:2] == (200, 200))

            loop.kill()
            loop.wait()
            until(lambda: health(site)[:2] == (503, 503))
            assert health(site)[2] == "no loop holds the database; the last run is one that crashed"

            (folder / "ael.db").rename(folder / "gone.db")
            until(lambda: "does not exist" in health(site)[2])
            assert health(site)[:2] == (503, 503)

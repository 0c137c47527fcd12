"""The dashboard of `ael run --web`: its life and its end, its port, its memory, and what it needs."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from ael_store.cli.run import read_plain_arguments, with_address
from tests.web.conftest import AGENTS, PATIENCE_S, Site, environment, port_in, running, until

MOST_KIB = 40 * 1024


def children_of(pid: int) -> list[int]:
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    return [int(child) for child, parent in re.findall(r"(\d+)\s+(\d+)", listed) if int(parent) == pid]


def memory_of(pid: int) -> int:
    """Return what a process takes in KiB, its part of what it shares with the loop beside it; 0 where nobody tells."""
    with contextlib.suppress(FileNotFoundError):
        found = re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
        assert found is not None
        return int(found[1])
    return 0


def is_there(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


def ael(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ael_store", *arguments],
        check=False,
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )


def test_dashboard_is_small_comes_back_by_itself_and_ends_with_its_loop(tmp_path: Path) -> None:
    (tmp_path / "agents.py").write_text(AGENTS)
    with running(tmp_path, "run", "agents.py", "--web", "0", "--quiet") as process:
        site = Site(tmp_path / "ael.db", port_in(tmp_path, process))
        until(lambda: site.get("/api/v1/status").status == 200, process)
        (first,) = children_of(process.pid)
        for path in ("/", "/agents", "/state", "/state?key=count", "/events", "/iterations", "/iterations/1", "/tasks"):
            site.page(path)
        assert memory_of(first) < MOST_KIB

        os.kill(first, signal.SIGKILL)
        assert site.get("/api/v1/status").status == 200  # waits at the port, which the loop has kept open
        (second,) = children_of(process.pid)
        assert second != first

        process.kill()
        process.wait()
        until(lambda: not is_there(second))


def test_server_loads_nothing_of_the_store_that_it_does_not_need() -> None:
    code = "import ael_store.web.server, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True)

    assert not {"sqlalchemy", "alembic", "apscheduler", "typer", "rich", "aiosqlite"} & set(done.stdout.split())


def test_loop_loads_nothing_of_the_web_framework() -> None:
    code = "import ael_store.web.beside, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True)

    assert not {"starlette", "uvicorn", "jinja2", "anyio"} & set(done.stdout.split())


def test_taken_port_is_an_error_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "agents.py").write_text(AGENTS)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"

        done = ael(tmp_path, "run", "agents.py", "--web", address, "--iterations", "1")

    assert done.returncode == 1
    assert done.stderr.startswith(f"ael: the dashboard can't listen at {address}: another program listens there")
    assert not (tmp_path / "ael.db").exists()


def test_missing_extra_says_how_to_install_it(tmp_path: Path) -> None:
    (tmp_path / "agents.py").write_text(AGENTS)
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util\nfind = importlib.util.find_spec\n"
        "gone = ('starlette', 'uvicorn')\n"
        "importlib.util.find_spec = lambda name, *more: None if name in gone else find(name, *more)\n"
    )
    inherited = {**environment(), "PYTHONPATH": f"{tmp_path}{os.pathsep}{environment()['PYTHONPATH']}"}

    for arguments in (["web"], ["run", "agents.py", "--web"]):
        done = subprocess.run(
            [sys.executable, "-m", "ael_store", *arguments],
            check=False, cwd=tmp_path, env=inherited, capture_output=True, text=True, timeout=PATIENCE_S,
        )  # fmt: skip
        assert done.returncode == 1
        assert done.stderr == (
            "ael: the dashboard needs starlette, uvicorn, which are not installed: "
            f"`{sys.executable} -m pip install 'ael-store[web]'`\n"
        )


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["web"], 74, "does not exist"),
        (["web", "nowhere"], 2, "'nowhere' is no address; write HOST:PORT"),
        (["run", "agents.py", "--web=nowhere"], 2, "'nowhere' is no address"),
        (["run", "agents.py", "--web", "--db", ":memory:"], 2, "no dashboard can read"),
    ],
)
def test_wrong_use_is_one_message(tmp_path: Path, arguments: list[str], code: int, said: str) -> None:
    (tmp_path / "agents.py").write_text(AGENTS)

    done = ael(tmp_path, *arguments)

    assert done.returncode == code
    assert done.stderr.count("\n") == 1 and said in done.stderr


@pytest.mark.parametrize(
    ("given", "web"),
    [
        (["run", "--web", "agents.py"], "127.0.0.1:8123"),
        (["run", "agents.py", "--web"], "127.0.0.1:8123"),
        (["run", "agents.py", "--web", "8200", "--quiet"], "8200"),
        (["run", "agents.py", "--web", "0.0.0.0:80"], "0.0.0.0:80"),
        (["run", "agents.py", "--web=8200"], "8200"),
    ],
)
def test_web_stands_with_or_without_an_address(given: list[str], web: str) -> None:
    read = read_plain_arguments(with_address(given))

    assert read is not None
    assert (read[1], read[2]["web"]) == ("agents.py", web)

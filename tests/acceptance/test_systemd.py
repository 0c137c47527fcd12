"""`ael run` as a service: what it tells its manager, and a real systemd that kills it where it hangs.

The first tests play the manager with a socket of their own. The last one starts systemd itself as the manager of a
user, in a namespace of its own, with units that `ael service install` wrote; it needs root and systemd.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ael_store.store.upgrade import downgrade
from tests.acceptance.processes import PATIENCE_S, ael, running_ael, wait_for

AGENTS = """
import os, time
from ael_store import AgentBase

class Counter(AgentBase):
    name = "counter"
    priority = 10

    async def on_tick(self, context):
        context.increment("count")
        if os.path.exists("hang"):
            time.sleep(600)
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "agents.py").write_text(AGENTS)
    return tmp_path


class Manager:
    """Plays the service manager."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.told: list[dict[str, str]] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(address)
        self._socket.setblocking(False)

    def hear(self) -> list[dict[str, str]]:
        """Return all messages so far."""
        while True:
            try:
                text = self._socket.recv(4096).decode()
            except BlockingIOError:
                return self.told
            self.told.append(dict(line.split("=", 1) for line in text.splitlines()))

    def count(self, name: str) -> int:
        return sum(name in message for message in self.hear())

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    manager = Manager(str(tmp_path / "notify"))
    yield manager
    manager.close()


def first(condition: Callable[[], bool], within_s: float) -> bool:
    """Wait until a condition comes true, or the time is over; says which."""
    give_up = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > give_up:
            return False
        time.sleep(0.02)
    return True


def test_signs_of_life_come_from_an_idle_loop_and_a_paused_one(project: Path, manager: Manager) -> None:
    environment = {"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "1500000", "AEL_TICK_RATE": "3600"}
    with running_ael(project, "run", "agents.py", **environment) as loop:
        wait_for(lambda: manager.count("READY"), loop)
        wait_for(lambda: manager.count("WATCHDOG") >= 3, loop)  # nothing is due for an hour

        assert ael(project, "pause").returncode == 0
        seen = manager.count("WATCHDOG")
        wait_for(lambda: manager.count("WATCHDOG") >= seen + 3, loop)
        wait_for(lambda: any("paused" in message.get("STATUS", "") for message in manager.hear()), loop)
        assert ael(project, "resume").returncode == 0

        loop.send_signal(signal.SIGTERM)
        assert loop.wait(PATIENCE_S) == 0
    assert manager.count("STOPPING") == 1
    assert [message["STATUS"] for message in manager.told if "READY" in message] == ["iteration 0, running"]


def test_loop_that_hangs_gives_no_sign_of_life(project: Path, manager: Manager) -> None:
    environment = {"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "1500000", "AEL_TICK_RATE": "0.05"}
    with running_ael(project, "run", "agents.py", **environment) as loop:
        wait_for(lambda: manager.count("WATCHDOG") >= 2, loop)

        (project / "hang").touch()
        assert first(lambda: manager.count("WATCHDOG") == manager.count("WATCHDOG"), 1.0)
        time.sleep(0.5)  # the last one may be on its way
        seen = manager.count("WATCHDOG")
        assert not first(lambda: manager.count("WATCHDOG") > seen, 2.0)


def test_ready_comes_after_an_upgrade_and_more_time_is_asked_for_before(project: Path, manager: Manager) -> None:
    assert ael(project, "run", "agents.py", "--iterations", "1").returncode == 0
    downgrade(project / "ael.db", "0001", backup=False)

    with running_ael(project, "run", "agents.py", NOTIFY_SOCKET=manager.address) as loop:
        wait_for(lambda: manager.count("READY"), loop)

    order = [next(iter(message)) for message in manager.hear()]
    assert order.index("READY") > order.index("EXTEND_TIMEOUT_USEC")
    assert any("0002" in message["STATUS"] for message in manager.told if "EXTEND_TIMEOUT_USEC" in message)


# -- a real systemd ---------------------------------------------------------------------------------

INSIDE = """
import json, os, signal, subprocess, sys, time
from pathlib import Path

python, *projects = sys.argv[1:]
subprocess.run(["mount", "-t", "tmpfs", "tmpfs", "/run"], check=True)
os.makedirs("/run/systemd/system")
os.makedirs("/run/user", mode=0o700)
os.environ |= {"XDG_RUNTIME_DIR": "/run/user", "XDG_CONFIG_HOME": "/run/config", "HOME": "/root"}
os.environ.pop("DBUS_SESSION_BUS_ADDRESS", None)
manager = subprocess.Popen(["SYSTEMD", "--user"], stdout=2)

def until(condition):
    give_up = time.monotonic() + 40
    while not (found := condition()) and time.monotonic() < give_up:
        time.sleep(0.1)
    return found

def systemctl(*words):
    return subprocess.run(["systemctl", "--user", *words], capture_output=True, text=True)

def ael(*words):
    done = subprocess.run([python, "-m", "ael_store", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout) if "--json" in words else done.stdout

def shown(unit):
    names = ("ActiveState", "SubState", "StatusText", "NRestarts", "MainPID", "Result", "ExecMainStatus")
    lines = systemctl("show", unit, *(f"-p{name}" for name in names)).stdout.splitlines()
    return dict(line.split("=", 1) for line in lines)

facts = {}
assert until(lambda: systemctl("daemon-reload").returncode == 0)
units = []
for project in projects:
    text = ael("service", "install", project, "--json")
    unit = text["unit"]
    folder = Path(text["path"] + ".d")
    folder.mkdir()
    (folder / "quick.conf").write_text("[Service]\\nWatchdogSec=2\\nRestartSec=0.2\\nEnvironment=PYTHONPATH=ROOT\\n")
    ael("service", "install", project, "--start", "--json")
    units.append(unit)
facts["started"] = [shown(unit) for unit in units]
facts["status"] = [ael("service", "status", project, "--json") for project in projects]
facts["running"] = [ael("status", "--json", "--db", f"{project}/ael.db") for project in projects]

hung, other = projects[0], projects[1]
pid = facts["started"][0]["MainPID"]
Path(hung, "hang").touch()
assert until(lambda: shown(units[0])["NRestarts"] != "0"), shown(units[0])
Path(hung, "hang").unlink()
assert until(lambda: shown(units[0])["ActiveState"] == "active" and shown(units[0])["MainPID"] not in ("0", pid))
facts["restarted"] = [shown(unit) for unit in units]

Path(other, "ael.toml").write_text("tick_rate = 0.1\\ngrace = 3\\n")
assert systemctl("reload", units[1]).returncode == 0
database = f"{other}/ael.db"
told = "SELECT arguments FROM commands WHERE name = 'settings.reload'"
assert until(lambda: ael("sql", told, "--json", "--db", database))
assert until(lambda: shown(units[1])["ActiveState"] == "active")
facts["reloaded"] = [ael("sql", told, "--json", "--db", database), shown(units[1])]

Path(other, "agents.py").write_text("1 / 0")
os.kill(int(facts["started"][1]["MainPID"]), signal.SIGKILL)
assert until(lambda: shown(units[1])["ActiveState"] == "failed"), shown(units[1])
facts["refused"] = shown(units[1])

ael("service", "uninstall", hung)
facts["stopped"] = ael("status", "--json", "--db", f"{hung}/ael.db")
facts["gone"] = shown(units[0])
manager.terminate()
print(json.dumps(facts))
"""

SYSTEMD = next((place for place in ("/lib/systemd/systemd", "/usr/lib/systemd/systemd") if os.path.exists(place)), None)

UNSHARE = ("unshare", "-m", "-p", "--fork")


def can_start_systemd() -> bool:
    if SYSTEMD is None or os.geteuid() != 0 or shutil.which("unshare") is None:
        return False
    return subprocess.run([*UNSHARE, "true"], check=False, capture_output=True).returncode == 0


@pytest.mark.skipif(not can_start_systemd(), reason="NO REAL SYSTEMD HERE (needs root): no unit was started by it")
def test_systemd_starts_watches_restarts_and_stops_projects_side_by_side(tmp_path: Path) -> None:
    projects = []
    for name in ("one", "two"):
        folder = tmp_path / name / "home"
        folder.mkdir(parents=True)
        (folder / "agents.py").write_text(AGENTS)
        (folder / "ael.toml").write_text("tick_rate = 0.1\n")
        projects.append(str(folder))
    root = str(Path(__file__).parents[2])
    script = INSIDE.replace("SYSTEMD", str(SYSTEMD)).replace("ROOT", root)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AEL_")}

    done = subprocess.run(
        [*UNSHARE, "--kill-child", "--mount-proc", sys.executable, "-c", script, sys.executable, *projects],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
        env={**environment, "PYTHONPATH": root},
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])

    assert [unit["ActiveState"] for unit in facts["started"]] == ["active", "active"]
    assert all(unit["StatusText"].startswith("iteration ") for unit in facts["started"])
    assert [status["active"] for status in facts["status"]] == ["active", "active"]
    assert [str(status["pid"]) for status in facts["running"]] == [unit["MainPID"] for unit in facts["started"]]

    hung, other = facts["restarted"]
    assert hung["NRestarts"] == "1"
    assert (other["NRestarts"], other["MainPID"]) == ("0", facts["started"][1]["MainPID"])

    [change], unit = facts["reloaded"]
    assert json.loads(change["arguments"]) == {"changes": {"grace": 3.0}}
    assert unit["MainPID"] == other["MainPID"]

    assert (facts["refused"]["ExecMainStatus"], facts["refused"]["NRestarts"]) == ("2", "1")
    assert facts["stopped"]["run"]["status"] == "stopped"
    assert facts["gone"]["ActiveState"] == "inactive"

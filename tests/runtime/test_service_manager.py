"""What is told to a service manager: real datagrams on a real socket."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ael_store.runtime.service_manager import ServiceManager


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, socket.socket]]:
    """A socket as systemd opens it: the value of NOTIFY_SOCKET, and where it arrives."""
    name = str(tmp_path / "notify") if request.param == "path" else f"@ael-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(name.replace("@", "\0") if name[0] == "@" else name)
        receiver.settimeout(5.0)
        yield name, receiver


def fields(receiver: socket.socket) -> dict[str, str]:
    return dict(line.split("=", 1) for line in receiver.recv(4096).decode().splitlines())


def test_ready_reloading_and_stopping(manager: tuple[str, socket.socket]) -> None:
    address, receiver = manager
    service = ServiceManager.from_environment({"NOTIFY_SOCKET": address})

    service.ready("iteration 7,\nrunning")
    assert fields(receiver) == {"READY": "1", "STATUS": "iteration 7, running"}
    before_us = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    service.reloading()
    told = fields(receiver)
    assert (told["RELOADING"], told["STATUS"]) == ("1", "reloading")
    assert before_us <= int(told["MONOTONIC_USEC"]) <= time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    service.stopping()  # to begin anew: nothing is told
    service.ready("iteration 8")
    assert fields(receiver)["READY"] == "1"
    service.stopping()
    assert fields(receiver)["STOPPING"] == "1"
    service.close()


def test_sign_of_life_comes_no_more_often_than_it_is_wanted(manager: tuple[str, socket.socket]) -> None:
    address, receiver = manager
    environ = {"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(os.getpid())}
    service = ServiceManager.from_environment(environ)

    assert (service.watchdog_s, service.period_s) == (3.0, 1.0)
    service.alive("not yet")
    service.ready("iteration 0")
    assert fields(receiver)["READY"] == "1"
    service._alive_at -= 1.0
    for iteration in range(1000):
        service.alive(f"iteration {iteration}")

    assert fields(receiver) == {"STATUS": "iteration 0", "WATCHDOG": "1"}
    receiver.setblocking(False)
    with pytest.raises(BlockingIOError):
        receiver.recv(4096)
    service.close()


def test_watchdog_of_another_process_is_not_ours(manager: tuple[str, socket.socket]) -> None:
    environ = {"NOTIFY_SOCKET": manager[0], "WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"}

    assert ServiceManager.from_environment(environ).period_s is None


def test_manager_that_takes_nothing_holds_nobody(manager: tuple[str, socket.socket]) -> None:
    address, _ = manager
    service = ServiceManager.from_environment({"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "1"})

    service.ready("iteration 0")
    began = time.monotonic()
    for iteration in range(5000):  # far more than a socket keeps
        service.alive(f"iteration {iteration}")

    assert time.monotonic() - began < 5.0
    service.close()


@pytest.mark.parametrize("environ", [{}, {"NOTIFY_SOCKET": ""}, {"NOTIFY_SOCKET": "vsock:2:1"}])
def test_without_one_nothing_happens(environ: dict[str, str]) -> None:
    service = ServiceManager.from_environment(environ)

    service.ready("ready")
    service.alive("iteration 1")
    assert service.period_s is None


def test_socket_that_is_gone_is_no_error(tmp_path: Path) -> None:
    service = ServiceManager.from_environment({"NOTIFY_SOCKET": str(tmp_path / "gone"), "WATCHDOG_USEC": "30"})

    service.ready("ready")
    service.alive("iteration 1")
    service.close()


def test_more_time_is_asked_for_once_an_upgrade_has_told_of_a_step(manager: tuple[str, socket.socket]) -> None:
    address, receiver = manager
    service = ServiceManager.from_environment({"NOTIFY_SOCKET": address})
    lines: list[str] = []

    async def upgrade() -> None:
        async with service.patience(lines.append) as progress:
            await asyncio.to_thread(progress, "revision 0001 -> 0002")

    asyncio.run(upgrade())

    assert lines == ["revision 0001 -> 0002"]
    assert fields(receiver) == {"EXTEND_TIMEOUT_USEC": "60000000", "STATUS": "revision 0001 -> 0002"}
    service.close()

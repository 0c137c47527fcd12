"""The short form of `./dev torture values`."""

from __future__ import annotations

import random
import socket
from contextlib import ExitStack
from pathlib import Path

import pytest

from ael_store.runtime import control
from tests.cli.conftest import until
from tests.faults import values

VALUES = 150


@pytest.mark.timeout(300)
def test_what_comes_in_is_stored_exactly_or_refused_with_its_name(tmp_path: Path) -> None:
    seed = random.randrange(1_000_000)
    print(f"./dev torture values --values {VALUES} --seed {seed}")

    report = values.run(count=VALUES, seed=seed, workers=1, tell=print, folder=tmp_path)

    assert report.failures == ()
    assert report.trials >= VALUES
    assert (report.lost, report.duplicated, report.silent) == (0, 0, 0)


def test_connection_that_never_ends_its_line_holds_nobody_up_and_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "FRAME_S", 0.5)
    monkeypatch.setattr(control, "MOST_CONNECTIONS", 3)

    with values.Target(tmp_path / "ael.db") as target, ExitStack() as stack:
        slow = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(3)]
        for connection in slow:
            connection.settimeout(values.PATIENCE_S)
            connection.connect(target.socket)
            connection.sendall(b'{"command": "state.set", ')

        one_too_many = target.send(b'{"command": "loop.health"}\n')
        target.transact(lambda context: context.set("goes", "on"))

        assert one_too_many is not None and "try again" in one_too_many["error"]
        assert [connection.recv(1) for connection in slow] == [b""] * 3
        until(lambda: target.send(b'{"command": "loop.health"}\n')["ok"], "there is room again")
        assert target.client.get("goes") == "on"

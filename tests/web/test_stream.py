"""Streams: each row once, in order, resumed by its number, whatever happened in between."""

from __future__ import annotations

import socket
import sqlite3
from itertools import islice
from typing import Any

import pytest

from tests.web.conftest import Site, port_in, running


def in_database(site: Site, sql: str, *parameters: Any) -> list[Any]:
    with sqlite3.connect(f"{site.database.as_uri()}?mode=ro", uri=True) as database:
        return [row[0] for row in database.execute(sql, parameters)]


def test_commits_are_told_as_they_come(site: Site) -> None:
    with site.stream("/api/v1/stream") as messages:
        found = list(islice(messages, 3))

    assert {name for name, _, _ in found} == {"commit"}
    numbers = [data["iteration"] for _, _, data in found]
    assert numbers == sorted(set(numbers))


@pytest.mark.parametrize(
    ("path", "table", "number"),
    [("events", "events", "id"), ("state", "state_changes", "id"), ("iterations", "iterations", "iteration")],
)
def test_stream_misses_nothing_after_a_break(site: Site, path: str, table: str, number: str) -> None:
    with site.stream(f"/api/v1/{path}/stream?after=2") as messages:
        first = list(islice(messages, 4))
    last = first[-1][1]
    with site.stream(f"/api/v1/{path}/stream", Last_Event_ID=last) as messages:
        second = list(islice(messages, 6))

    ids = [int(id_) for _, id_, _ in first + second]
    assert ids == in_database(site, f"SELECT id FROM {table} WHERE id > 2 ORDER BY id LIMIT 10")
    assert ids == [data[number] for _, _, data in first + second]


def test_stream_is_resumed_by_another_server(site: Site) -> None:
    """The restart of a server: another process knows from the id alone where to go on."""
    with site.stream("/api/v1/events/stream?after=0&type=beat") as messages:
        first = list(islice(messages, 2))
    folder = site.database.parent / "other"
    folder.mkdir()
    with running(folder, "web", "0", "--db", str(site.database)) as process:
        other = Site(site.database, port_in(folder, process))
        with other.stream("/api/v1/events/stream?type=beat", Last_Event_ID=first[-1][1]) as messages:
            second = list(islice(messages, 3))
        # a server that is told to end does so with streams open, at once
        with other.stream("/api/v1/stream") as messages:
            next(messages)
            process.terminate()
            assert process.wait(10) == 0

    assert [data["data"]["n"] for _, _, data in first + second] == [5, 10, 15, 20, 25]


@pytest.mark.parametrize("path", ["events", "state", "iterations"])
def test_stream_without_a_number_begins_now(site: Site, path: str) -> None:
    for _ in range(3):
        with site.stream(f"/api/v1/{path}/stream") as messages:
            found = list(islice(messages, 3))
        assert "resync" not in {name for name, _, _ in found}
        numbers = [int(id_) for _, id_, _ in found]
        assert numbers == list(range(numbers[0], numbers[0] + 3))


def test_stream_sends_only_what_is_asked_for(site: Site) -> None:
    with site.stream("/api/v1/events/stream?after=0&type=be*&source=counter&text=beat") as messages:
        found = list(islice(messages, 3))

    assert {data["type"] for _, _, data in found} == {"beat"}


def test_number_from_the_future_is_told_to_begin_anew(site: Site) -> None:
    """As after a restore: what the client has seen is not in this file."""
    with site.stream("/api/v1/events/stream", Last_Event_ID="999999999") as messages:
        name, id_, data = next(messages)
        following = next(messages)

    assert (name, int(id_)) == ("resync", data["newest"])
    assert following[0] == "event" and int(following[1]) > data["newest"]


def test_client_that_reads_nothing_delays_nobody(site: Site) -> None:
    """Forty streams of everything that nobody reads, and the loop and a page go on."""
    deaf = []
    try:
        for _ in range(40):
            one = socket.create_connection(("127.0.0.1", site.port))
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            one.sendall(f"GET /api/v1/state/stream?after=0 HTTP/1.1\r\nHost: {site.host}\r\n\r\n".encode())
            deaf.append(one)
        assert "counter" in site.page("/agents")
        with site.stream("/api/v1/iterations/stream") as messages:
            numbers = [int(id_) for _, id_, _ in islice(messages, 30)]
    finally:
        for one in deaf:
            one.close()

    assert numbers == list(range(numbers[0], numbers[0] + 30))


def test_too_many_streams_are_refused(site: Site) -> None:
    held = []
    try:
        for _ in range(100):
            one = socket.create_connection(("127.0.0.1", site.port))
            one.sendall(f"GET /api/v1/stream HTTP/1.1\r\nHost: {site.host}\r\n\r\n".encode())
            assert one.recv(12) == b"HTTP/1.1 200"
            held.append(one)
        assert site.get("/api/v1/stream").status == 503
        assert site.get("/api/v1/status").status == 200
    finally:
        for one in held:
            one.close()

"""Serving: uvicorn on a socket that is open already, until a signal or the end of whoever started it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Iterator
from pathlib import Path

import uvicorn

from ael_store.model.values import Limits
from ael_store.web.app import make_app
from ael_store.web.database import Database
from ael_store.web.facts import Facts
from ael_store.web.launch import Launch
from ael_store.web.service import Service
from ael_store.web.tail import Tail

__all__ = ["serve"]

GOODBYE_S = 1
"""How long open requests get when the server ends; streams end at once, and browsers come back to the next one."""

MOST_CONNECTIONS = 500
LONGEST_HEAD = 65_536
"""Bytes of a request's head."""


class _Server(uvicorn.Server):
    """Ends the streams first: uvicorn waits for open requests before it says anything to the application."""

    def __init__(self, config: uvicorn.Config, tail: Tail) -> None:
        super().__init__(config)
        self.tail = tail

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to whoever serves: uvicorn would raise them again after it has ended."""
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.tail.stop()
        await super().shutdown(sockets)


async def serve(launch: Launch, ended: asyncio.Event) -> None:
    """Serve until the event is set."""
    token = launch.token
    if token is not None:
        token.make()
    path = Path(launch.path)
    database = Database(path, Limits(**launch.limits), allow_shared_folder=launch.allow_shared_folder)
    tail = Tail(database)
    service = Service(database, tail, Facts(database), token, launch.idle_commit)
    config = uvicorn.Config(
        make_app(service, launch.address, token, hosts=launch.hosts, read_only=launch.read_only),
        loop="asyncio",
        http="h11",
        ws="none",
        lifespan="off",
        interface="asgi3",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=GOODBYE_S,
        limit_concurrency=MOST_CONNECTIONS,
        h11_max_incomplete_event_size=LONGEST_HEAD,
    )
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    server = _Server(config, tail)
    watch = asyncio.create_task(_end_with(ended, server))
    try:
        await server.serve(sockets=[socket.socket(fileno=launch.descriptor)])
    finally:
        watch.cancel()
        await database.close()


async def _end_with(ended: asyncio.Event, server: uvicorn.Server) -> None:
    await ended.wait()
    server.should_exit = True

"""How the server is started: what it is told, its open port, and whether its libraries are there.

Whoever starts it, a command or a loop, imports nothing of the web framework.
"""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from ael_store.errors import AelError
from ael_store.model.values import Limits
from ael_store.settings import Settings
from ael_store.web.address import Address
from ael_store.web.token import Token, token_path

__all__ = ["ExtraMissing", "Launch", "become", "environment", "launch_of", "refuse_without_extra"]

LIBRARIES = ("starlette", "uvicorn", "jinja2", "sse_starlette", "prometheus_client")


class ExtraMissing(AelError):
    """The libraries of the dashboard are not installed."""


def refuse_without_extra() -> None:
    """Raise ExtraMissing where the dashboard can't start, with the way to install it."""
    missing = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        raise ExtraMissing(
            f"the dashboard needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed: "
            f"`{sys.executable} -m pip install 'ael-store[web]'`"
        )


@dataclass(frozen=True, slots=True)
class Launch:
    """What a server is told; JSON values only."""

    path: str
    host: str
    port: int
    descriptor: int
    """The listening socket, inherited."""
    is_child: bool
    """Whether it ends with its input."""
    read_only: bool
    hosts: list[str]
    allow_shared_folder: bool
    log_level: str
    log_format: str
    limits: dict[str, int]
    idle_commit: float

    @property
    def address(self) -> Address:
        return Address(self.host, self.port)

    @property
    def token(self) -> Token | None:
        """The token of its database; None where none is wanted, because it only shows, and only to this machine."""
        return None if self.read_only and self.address.is_loopback else Token(token_path(Path(self.path)))

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-m", "ael_store.web", json.dumps(asdict(self))]

    @classmethod
    def from_json(cls, text: str) -> Launch:
        return cls(**json.loads(text))


def launch_of(path: Path, settings: Settings, address: Address, listening: socket.socket, *, is_child: bool) -> Launch:
    """Return what a server is told. Raises TokenNotUsable where its token can't be used.

    A missing token is made, for a child by itself: before a loop has started, nothing is known of its folder.
    """
    launch = Launch(
        path=str(path),
        host=address.host,
        port=listening.getsockname()[1],
        descriptor=listening.fileno(),
        is_child=is_child,
        read_only=settings.web_read_only,
        hosts=[name for part in (settings.web_hosts or "").split(",") if (name := part.strip().lower())],
        allow_shared_folder=settings.allow_shared_folder,
        log_level=settings.log_level,
        log_format=settings.log_format,
        limits=asdict(Limits(settings.key_bytes, settings.value_bytes, settings.event_bytes, settings.value_depth)),
        idle_commit=settings.idle_commit,
    )
    token = launch.token
    if token is not None and not is_child:
        token.make()
    elif token is not None and os.path.lexists(token.path):
        token.text()
    return launch


def environment() -> dict[str, str]:
    """Return the environment of a server: its allocator keeps one heap, and gives back what it no longer needs."""
    return {"MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "131072", **os.environ}


def become(launch: Launch) -> None:
    """Turn this process into the server; does not return."""
    os.set_inheritable(launch.descriptor, True)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, launch.command, environment())

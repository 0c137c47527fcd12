"""Tells the service manager how the process is, as systemd's `sd_notify` has it; without one, nothing happens.

A unit of `Type=notify` counts as started at READY=1, which comes after an upgrade of the database and after the
agents have started. What keeps its watchdog quiet is work that is done, not a process that exists: an iteration that
is committed, or the loop's own finding that nothing is due and nothing waits to be committed. (A commit only to prove
that the loop lives would fill the database at night.) While the disk is full the loop tries the same commit again,
for as long as `full_limit` says; that counts too, or the watchdog would end what waits with good reason.

A message is one datagram, and a manager that takes none must not hold the loop: a sign of life that does not get
through is dropped, what happens once is given a second.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections.abc import AsyncIterator, Callable, Mapping

__all__ = ["ServiceManager"]

PATIENCE_S = 1.0
"""How long a message that comes once may take."""
STATUS_S = 1.0
"""How often the status is told at most."""
EXTEND_S = 60
"""By how much more time is asked for, each time."""
LONGEST_STATUS = 200

log = logging.getLogger("ael_store.service")


class ServiceManager:
    """The one that started this process, or nobody. Belongs to the loop's thread, but for `extend`."""

    def __init__(self, address: str | None = None, watchdog_s: float | None = None) -> None:
        self.address = address
        self.watchdog_s = watchdog_s
        """Within which time it wants a sign of life; None where it does not."""
        self._socket: socket.socket | None = None
        self._status = ""
        self._status_at = -STATUS_S
        self._alive_at = 0.0
        self._is_ready = self._is_reloading = False
        if address is not None:
            try:
                self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            except OSError as error:
                log.warning("the service manager can't be told anything: %s", error)

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None) -> ServiceManager:
        """Return the service manager that the variables NOTIFY_SOCKET and WATCHDOG_USEC name, if they do."""
        environ = os.environ if environ is None else environ
        address = environ.get("NOTIFY_SOCKET", "")
        if not address:
            return cls()
        if address[0] not in "/@":
            log.warning("NOTIFY_SOCKET is %r, which is no socket of this machine: nothing is told to it", address)
            return cls()
        return cls(address, _watchdog_s(environ))

    # -- what happens once --

    def ready(self, status: str) -> None:
        """The loop runs, or runs again with other settings."""
        self._is_ready, self._is_reloading, self._alive_at = True, False, time.monotonic()
        self._tell({"READY": "1", "STATUS": status}, PATIENCE_S)

    def reloading(self) -> None:
        """Settings are read again, or the process starts anew; `ready` comes when that is done."""
        self._is_reloading = True
        now_us = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self._tell({"RELOADING": "1", "MONOTONIC_USEC": str(now_us), "STATUS": "reloading"}, PATIENCE_S)

    def stopping(self) -> None:
        """The loop has begun to end; nothing is told where the process is to begin anew in its place."""
        if self._is_reloading:
            return
        self._tell({"STOPPING": "1", "STATUS": "stopping"}, PATIENCE_S)

    def extend(self, status: str) -> None:
        """Something takes long and goes on: the time that a start may take begins anew. From any thread."""
        self._tell({"EXTEND_TIMEOUT_USEC": str(EXTEND_S * 1_000_000), "STATUS": status}, PATIENCE_S)

    @contextlib.asynccontextmanager
    async def patience(self, progress: Callable[[str], None]) -> AsyncIterator[Callable[[str], None]]:
        """Give what passes lines of an upgrade on to `progress`; from the first one on, more time is asked for.

        A step can't tell how far it is, so more is asked for as long as the block lasts.
        """
        step = ""

        def tell(line: str) -> None:
            nonlocal step
            step = line
            progress(line)
            self.extend(line)

        async def ask() -> None:
            while True:
                await asyncio.sleep(EXTEND_S / 3)
                if step:
                    self.extend(step)

        asking = asyncio.create_task(ask(), name="ael-patience") if self._socket is not None else None
        try:
            yield tell
        finally:
            if asking is not None:
                asking.cancel()

    # -- signs of life --

    @property
    def period_s(self) -> float | None:
        """How long the loop may wait until it gives the next sign of life; None where none is wanted."""
        return None if self.watchdog_s is None else self.watchdog_s / 3

    def alive(self, status: str) -> None:
        """The loop has committed an iteration, or it has nothing to do. Costs next to nothing when called often."""
        if self._socket is None or not self._is_ready:
            return
        now = time.monotonic()
        message = {}
        if status != self._status and now - self._status_at >= STATUS_S:
            message["STATUS"] = status
        if self.period_s is not None and now - self._alive_at >= self.period_s / 2:
            message["WATCHDOG"] = "1"
        if not message or not self._tell(message, 0.0):
            return
        if "STATUS" in message:
            self._status, self._status_at = status, now
        if "WATCHDOG" in message:
            self._alive_at = now

    def close(self) -> None:
        """Tell nothing more."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _tell(self, message: Mapping[str, str], patience_s: float) -> bool:
        """Send a message; says whether it went out."""
        if self._socket is None or self.address is None:
            return False
        text = "\n".join(f"{name}={_line(value)}" for name, value in message.items())
        address = f"\0{self.address[1:]}" if self.address[0] == "@" else self.address
        try:
            self._socket.settimeout(patience_s)
            self._socket.sendto(text.encode(), address)
        except OSError as error:  # a full queue too
            log.debug("the service manager was not told %s: %s", "+".join(message), error)
            return False
        return True


def _watchdog_s(environ: Mapping[str, str]) -> float | None:
    """Return the time of the watchdog, where it is meant for this process."""
    if environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    try:
        watchdog_us = int(environ.get("WATCHDOG_USEC", "0"))
    except ValueError:
        return None
    return watchdog_us / 1e6 if watchdog_us > 0 else None


def _line(text: str) -> str:
    """Return a text that is one line and not long."""
    return " ".join(text[:LONGEST_STATUS].split())

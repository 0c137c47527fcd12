"""The private socket by which commands reach a running loop.

A line of JSON in, a line of JSON out: `{"command": "state.set", "arguments": {…}}` is answered, once the change is
committed, by `{"ok": true, "result": …}` or `{"ok": false, "error": …, "type": …}`. The socket has mode 0600 and
stands beside the database; who asks is taken from the kernel, not from the request. Three need no commit and are
answered at once: `loop.health`, so that whoever gets no answer knows that the loop hangs, `tasks.progress`, and
`agents.now`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import pwd
import socket
import struct
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from ael_store import errors
from ael_store.errors import AelError, LoopNotRunning, OwnedElsewhere, UsageError
from ael_store.store.lock import Holder, current_holder

if TYPE_CHECKING:
    from ael_store.model.values import Limits
    from ael_store.runtime.host import Host

__all__ = ["AGENT_NOW", "HEALTH", "PROGRESS", "ControlServer", "actor", "ask", "longest_line", "refuse_if_it_answers"]

HEALTH = "loop.health"
PROGRESS = "tasks.progress"
AGENT_NOW = "agents.now"

LONGEST_PATH = 100
FRAME_S = 30.0
"""How long a connection may take to send a whole line."""
MOST_CONNECTIONS = 100
ANSWER_TIMEOUT_S = 60.0
HANG_PATIENCE_S = 2.0
"""How long an owner that is to be overtaken may take to answer."""

log = logging.getLogger("ael_store.control")


def _private_socket(path: Path) -> socket.socket:
    """Return a socket that only this user may connect to; raises OSError.

    The umask, which is the whole process's, is another one for a moment in which nothing else of this thread runs.
    """
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        made.bind(str(path))
    except BaseException:
        made.close()
        raise
    finally:
        os.umask(before)
    return made


class ControlServer:
    """Takes commands of other processes of the same user."""

    def __init__(self, database: Path, host: Host) -> None:
        self.host = host
        self._database = database
        self._server: asyncio.Server | None = None
        self._path: Path | None = None
        self._inode: int | None = None
        self._folder: Path | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def start(self) -> str | None:
        """Open the socket and return its path; None where the machine allows none (commands are refused then)."""
        path = self._database.with_name(self._database.name + ".sock")
        if len(os.fsencode(path)) > LONGEST_PATH:
            self._folder = Path(tempfile.mkdtemp(prefix="ael-"))
            path = self._folder / "sock"
        try:
            path.unlink(missing_ok=True)
            longest = longest_line(self.host.outside.limits)
            self._server = await asyncio.start_unix_server(self._serve, sock=_private_socket(path), limit=longest)
        except OSError as error:
            log.warning("no socket for commands at %s (%s): `ael` can only read while the loop runs", path, error)
            return None
        self._path = path
        with contextlib.suppress(OSError):
            self._inode = path.lstat().st_ino
        return str(path)

    async def stop(self) -> None:
        """Close the socket; a command that waits gets its answer first."""
        if self._server is not None:
            self._server.close()
            if self._connections:
                await asyncio.wait(self._connections, timeout=0.2)
                for task in self._connections:
                    task.cancel()
        if self._path is not None:
            with contextlib.suppress(OSError):
                if self._path.lstat().st_ino == self._inode:  # else it is that of an owner that has taken over
                    self._path.unlink()
        if self._folder is not None:
            with contextlib.suppress(OSError):
                self._folder.rmdir()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            if len(self._connections) > MOST_CONNECTIONS:
                await _send(writer, _refused(f"{MOST_CONNECTIONS} others are connected already; try again"))
                return
            who = _peer(writer.get_extra_info("socket"))
            while line := await _line(reader):
                await _send(writer, await self._answer(line, who))
        except ValueError:
            with contextlib.suppress(OSError, TimeoutError):
                await _send(writer, _refused("the command is longer than any value may be"))
        except (OSError, TimeoutError, asyncio.CancelledError):
            pass
        finally:
            self._connections.discard(task)
            writer.close()

    async def _answer(self, line: bytes, who: str) -> dict[str, Any]:
        try:
            request = json.loads(line.decode())  # orjson would make a float of an integer that does not fit
            name, arguments = request["command"], request.get("arguments", {})
            if not isinstance(name, str) or not isinstance(arguments, dict):
                raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return _refused("this is no command: a JSON object with `command` is wanted")
        if name == HEALTH:
            return {"ok": True, "result": self.host.health()}
        if name == PROGRESS:
            return {"ok": True, "result": self.host.progress()}
        if name == AGENT_NOW:
            return {"ok": True, "result": self.host.agent_now(str(arguments.get("name")))}
        try:
            result = await asyncio.wrap_future(self.host.request(name, arguments, who))
        except Exception as error:
            return {"ok": False, "type": type(error).__name__, "error": str(error)}
        return {"ok": True, "result": result}


def longest_line(limits: Limits) -> int:
    """Return how much one command may hold: the largest value, each byte of it escaped, and the rest."""
    return 6 * max(limits.value_bytes, 2 * limits.event_bytes) + 6 * limits.key_bytes + 65_536


async def _line(reader: asyncio.StreamReader) -> bytes:
    """Return the next line; empty at the end, also where that comes within a line."""
    async with asyncio.timeout(FRAME_S):
        line = await reader.readline()
    return line if line.endswith(b"\n") else b""


async def _send(writer: asyncio.StreamWriter, answer: dict[str, Any]) -> None:
    try:
        line = orjson.dumps(answer)
    except (TypeError, ValueError):  # a message that quotes what is no text
        line = json.dumps(answer).encode()
    writer.write(line + b"\n")
    async with asyncio.timeout(FRAME_S):
        await writer.drain()


def _refused(why: str) -> dict[str, Any]:
    return {"ok": False, "type": "UsageError", "error": why}


def _peer(connection: Any) -> str:
    """Return who is at the other end: user, uid and pid."""
    try:
        raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        pid, uid, _ = struct.unpack("3i", raw)
    except (OSError, AttributeError):
        return "unknown"
    return _user(uid, pid)


def _user(uid: int, pid: int) -> str:
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:
        name = "?"
    return f"{name} (uid {uid}, pid {pid})"


def actor() -> str:
    """Return who this process is, as the audit names it."""
    return _user(os.getuid(), os.getpid())


def ask(
    path: str,
    command: str,
    arguments: dict[str, Any],
    patience_s: float = ANSWER_TIMEOUT_S,
    *,
    longest: int | None = None,
) -> Any:
    """Have a running loop carry out a command; returns its result once that is committed.

    Raises the error that the loop refused it with, UsageError where it has more than `longest` bytes, or
    LoopNotRunning where nobody answers.
    """
    request = orjson.dumps({"command": command, "arguments": arguments}) + b"\n"
    if longest is not None and len(request) > longest:
        raise UsageError(
            f"{command} has {len(request) / 1e6:.1f} MB, and a running loop takes {longest / 1e6:.1f} MB at once: "
            "stop the loop, do the same again, and start it"
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(patience_s)
        try:
            connection.connect(path)
            connection.sendall(request)
            with connection.makefile("rb") as file:
                line = file.readline()
        except OSError as error:
            raise LoopNotRunning(
                f"the loop does not answer at {path} ({error}): it is just starting or ending; try again"
            ) from None
    if not line:
        raise LoopNotRunning("the loop ended before it answered; look at `ael status` and try again")
    answer = orjson.loads(line)
    if answer.get("ok"):
        return answer.get("result")
    kind = getattr(errors, str(answer.get("type")), AelError)
    if not (isinstance(kind, type) and issubclass(kind, AelError)):
        kind = AelError
    raise kind(answer.get("error", "refused"))


def refuse_if_it_answers(database: Path, holder: Holder) -> None:
    """Raise OwnedElsewhere where the owner of a database answers: then it does not hang and is not overtaken.

    An owner that has no socket yet gets the time to open it, or to end.
    """
    give_up = time.monotonic() + HANG_PATIENCE_S
    path = holder.socket
    while path is None:
        now = current_holder(database)
        if time.monotonic() > give_up or now is None:
            return
        path = now.socket
        time.sleep(0.05)
    try:
        ask(path, HEALTH, {}, HANG_PATIENCE_S)
    except LoopNotRunning:
        return
    raise OwnedElsewhere(
        f"{database} is owned by {holder}, and pid {holder.pid} answers; stop it instead of taking over"
    )

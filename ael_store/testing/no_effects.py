"""Keeps replayed code from touching anything outside: network, processes, files that are written.

An audit hook of Python refuses what hooks try while a `NoEffects` is entered, in every thread of the process: threads
that a hook starts know nothing of the unit that they belong to. Audit hooks can't be removed, so there is one, which
does nothing as long as none is entered.

It sees what goes through Python. What is open already can be written to, and libraries in C that call the system by
themselves are not seen: this keeps honest code honest, and is no sandbox.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Any

from ael_store.errors import EffectBlocked

__all__ = ["NoEffects"]

REFUSED = frozenset(
    (
        "ftplib.connect",
        "http.client.connect",
        "imaplib.open",
        "nntplib.connect",
        "os.chflags",
        "os.chmod",
        "os.chown",
        "os.exec",
        "os.fork",
        "os.forkpty",
        "os.kill",
        "os.killpg",
        "os.link",
        "os.mkdir",
        "os.posix_spawn",
        "os.remove",
        "os.removexattr",
        "os.rename",
        "os.rmdir",
        "os.setxattr",
        "os.spawn",
        "os.startfile",
        "os.symlink",
        "os.system",
        "os.truncate",
        "os.utime",
        "poplib.connect",
        "pty.spawn",
        "smtplib.connect",
        "socket.bind",
        "socket.connect",
        "socket.gethostbyaddr",
        "socket.gethostbyname",
        "socket.sendmsg",
        "socket.sendto",
        "socket.sethostname",
        "subprocess.Popen",
        "syslog.openlog",
        "syslog.syslog",
        "telnetlib.Telnet.open",
        "webbrowser.open",
    )
)
"""Audit events that are refused whatever their arguments."""

UNHEARD = (("_posixsubprocess", "fork_exec"), ("os", "mkfifo"), ("os", "mknod"))
"""Functions that raise no audit event, with their module; `multiprocessing` starts processes by the first."""

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

_entered: list[NoEffects] = []
_lock = threading.RLock()
_listens = False
_before: list[tuple[Any, str, Callable[..., Any]]] = []
"""Functions that stand aside while one is entered."""


class NoEffects(AbstractContextManager["NoEffects"]):
    """While it is entered, what touches the outside raises EffectBlocked and is noted here."""

    def __init__(self) -> None:
        self._blocked: dict[str, None] = {}

    def take(self) -> list[str]:
        """Return what was refused since the last call, by the names of Python's audit events."""
        blocked, self._blocked = self._blocked, {}
        return list(blocked)

    def __enter__(self) -> NoEffects:
        global _listens
        with _lock:
            if not _listens:
                sys.addaudithook(_hear)
                _listens = True
            if not _entered:
                _stand_aside()
                gc.freeze()  # what was there before ends later: it may remove files then, and this is not the hook's
            _entered.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with _lock:
            _entered.remove(self)
            if not _entered:
                gc.unfreeze()
                _put_back()

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """Let everything pass for the length of a `with` block."""
        with _lock:
            _entered.remove(self)
        try:
            yield
        finally:
            with _lock:
                _entered.append(self)


def _hear(event: str, arguments: tuple[Any, ...]) -> None:
    if _entered and _is_refused(event, arguments):
        _refuse(event)


def _is_refused(event: str, arguments: tuple[Any, ...]) -> bool:
    if event in REFUSED:
        return True
    if event == "open":
        return _writes(*arguments)
    if event == "socket.getaddrinfo":
        return not _is_numeric(arguments[0])
    if event == "sqlite3.connect":
        return not _only_reads(arguments[0])
    return False


def _writes(path: Any, mode: Any, flags: Any) -> bool:
    """True where a file is opened to write; the null device and what is open already may be."""
    if isinstance(path, int) or path in (os.devnull, os.fsencode(os.devnull)):
        return False
    if isinstance(flags, int) and flags & WRITES:
        return True
    return isinstance(mode, str) and any(letter in mode for letter in "wax+")


def _is_numeric(host: Any) -> bool:
    """True where finding the address of a host asks nobody."""
    if host is None:
        return True
    text = host.decode("ascii", "replace") if isinstance(host, bytes) else str(host)
    return text in ("", "localhost") or ":" in text or text.replace(".", "").isdigit()


def _only_reads(database: Any) -> bool:
    text = os.fsdecode(database) if isinstance(database, str | bytes | os.PathLike) else ""
    if text in ("", ":memory:"):
        return True
    query = text.partition("?")[2].split("&")
    return text.startswith("file:") and ("mode=ro" in query or "mode=memory" in query)


def _refuse(event: str) -> None:
    for one in _entered:
        one._blocked[event] = None
    raise EffectBlocked(
        f"{event}: a replay touches nothing outside; move this into a task (`context.submit`), or allow it with "
        "--allow-effects"
    )


def _stand_aside() -> None:
    import importlib

    for module_name, name in UNHEARD:
        try:
            module = importlib.import_module(module_name)
        except ImportError:
            continue
        function = getattr(module, name, None)
        if function is not None:
            _before.append((module, name, function))
            setattr(module, name, _refuser(f"{module_name}.{name}".removeprefix("_posix"), function))


def _refuser(event: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def refuse(*arguments: Any, **options: Any) -> Any:
        if _entered:
            _refuse(event)
        return function(*arguments, **options)

    return refuse


def _put_back() -> None:
    while _before:
        module, name, function = _before.pop()
        setattr(module, name, function)

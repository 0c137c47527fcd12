"""Processes for tasks with `process=True`: a function at the top of a module, with JSON in and JSON out.

A process is started when one is needed and used again; it takes one attempt at a time. One that is to end (timeout,
cancellation) is killed, one that dies takes nothing with it but its attempt: the pool of `concurrent.futures` can do
neither. Messages are JSON over a pipe, so nothing is pickled.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

import orjson

from ael_store.errors import AelError, Fatal, RetryAfter
from ael_store.model.unit import Failure

if TYPE_CHECKING:
    from ael_store.runtime.attempt import Attempt

__all__ = ["Processes", "TaskFailed"]

END_PATIENCE_S = 1.0


class TaskFailed(AelError):
    """What a task raised in a process of its own."""

    def __init__(self, type: str, message: str, traceback: str = "") -> None:
        super().__init__(f"{type}: {message}" if message else type)
        self.failure = Failure(type, message, traceback)


class Processes:
    """Processes that run functions, and those that are idle."""

    def __init__(self) -> None:
        self._idle: list[_Worker] = []
        self._busy: set[_Worker] = set()

    async def run(self, path: str, handle: Attempt, arguments: list[Any]) -> Any:
        """Run `module:function` in a process; raises what it raised, as TaskFailed, RetryAfter or Fatal."""
        worker = self._idle.pop() if self._idle else await asyncio.to_thread(_Worker)
        self._busy.add(worker)
        healthy = False
        try:
            module = sys.modules.get(path.partition(":")[0])
            message = {
                "path": path,
                "file": getattr(module, "__file__", None),
                "key": handle.key,
                "id": handle.id,
                "name": handle.name,
                "attempt": handle.attempt,
                "args": arguments,
            }
            answer = await worker.ask(message, handle)
            healthy = True
        finally:
            self._busy.discard(worker)
            if healthy:
                self._idle.append(worker)
            else:
                worker.kill()
        return _result_of(answer)

    async def close(self) -> None:
        """End every process."""
        for worker in [*self._idle, *self._busy]:
            worker.kill()
        self._idle.clear()


def _result_of(answer: dict[str, Any]) -> Any:
    kind = answer["kind"]
    if kind == "result":
        return answer["result"]
    message = str(answer["message"])
    if kind == "retry":
        raise RetryAfter(answer["after"], message)
    if kind == "fatal":
        raise Fatal(message)
    raise TaskFailed(answer["type"], message, answer["traceback"])


class _Worker:
    """One process, and this end of its pipe."""

    def __init__(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.pipe, theirs = spawn.Pipe()
        self.process = spawn.Process(target=_serve, args=(theirs,), name="ael-task", daemon=True)
        self.process.start()
        theirs.close()

    async def ask(self, message: dict[str, Any], handle: Attempt) -> dict[str, Any]:
        """Have it run a function; returns its last message. What it says on the way goes to the handle."""
        loop = asyncio.get_running_loop()
        self.pipe.send_bytes(orjson.dumps(message))
        while True:
            ready: asyncio.Future[None] = loop.create_future()
            descriptor = self.pipe.fileno()
            loop.add_reader(descriptor, lambda ready=ready: ready.done() or ready.set_result(None))  # type: ignore[misc]
            try:
                await ready
            finally:
                loop.remove_reader(descriptor)
            try:
                answer: dict[str, Any] = orjson.loads(self.pipe.recv_bytes())
            except (EOFError, OSError):
                await asyncio.to_thread(self.process.join, END_PATIENCE_S)
                raise TaskFailed("ProcessDied", _ended(self.process.exitcode)) from None
            if answer["kind"] == "progress":
                handle.progress(answer["fraction"], answer["note"])
            elif answer["kind"] == "cost":
                handle.cost(answer["usd"])
            else:
                return answer

    def kill(self) -> None:
        """End it at once."""
        with contextlib.suppress(OSError, ValueError):
            self.process.kill()
        self.pipe.close()


def _ended(code: int | None) -> str:
    if code is None:
        return "it did not end"
    if code < 0:
        try:
            return signal.Signals(-code).name
        except ValueError:
            return f"signal {-code}"
    return f"exit code {code}"


# -- in the process ---------------------------------------------------------------------------------


class _Remote:
    """What the function gets in its process: the same as elsewhere, told over the pipe."""

    def __init__(self, pipe: Connection, message: dict[str, Any]) -> None:
        self._pipe = pipe
        self.key: str = message["key"]
        self.id: int = message["id"]
        self.name: str = message["name"]
        self.attempt: int = message["attempt"]
        self.args: list[Any] = message["args"]
        self.cancelled = False
        """A process that should end is killed."""

    def progress(self, fraction: float | None, note: str = "") -> None:
        self._tell({"kind": "progress", "fraction": fraction, "note": str(note)})

    def cost(self, usd: Any) -> None:
        self._tell({"kind": "cost", "usd": str(usd)})

    def _tell(self, message: dict[str, Any]) -> None:
        self._pipe.send_bytes(orjson.dumps(message))


def _serve(pipe: Connection) -> None:
    """Run functions until the other end is gone."""
    from ael_store.runtime.task_function import import_function

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the loop, which ends this process
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            message = orjson.loads(pipe.recv_bytes())
        except (EOFError, OSError):
            return
        answer: dict[str, Any]
        try:
            function = import_function(message["path"], message["file"])
            answer = {"kind": "result", "result": function(_Remote(pipe, message), *message["args"])}
        except RetryAfter as error:
            answer = {"kind": "retry", "after": error.after, "message": str(error)}
        except Fatal as error:
            answer = {"kind": "fatal", "message": str(error)}
        except BaseException as error:
            answer = _failure(error)
        try:
            raw = orjson.dumps(answer, option=orjson.OPT_PASSTHROUGH_DATACLASS | orjson.OPT_PASSTHROUGH_DATETIME)
        except TypeError as error:
            raw = orjson.dumps({"kind": "fatal", "message": f"its result is no JSON: {error}"})
        try:
            pipe.send_bytes(raw)
        except OSError:
            return


def _end_with_parent() -> None:
    """A loop that was killed starts its tasks again: this one must not go on beside them."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _failure(error: BaseException) -> dict[str, Any]:
    text = "".join(traceback.format_exception(error)).encode("utf-8", "backslashreplace").decode()
    message = str(error).encode("utf-8", "backslashreplace").decode()
    return {"kind": "error", "type": type(error).__qualname__, "message": message, "traceback": text}

"""For other processes: read and change a database, whether or not a loop runs on it.

    with connect("ael.db") as client:
        client.emit("door_opened", {"door": "front"})

    async with connect("ael.db") as client:
        await client.aio.set("mode", "night")

A change on a running loop goes through that loop and is part of its next commit; with no loop running the client
takes the lock for a moment and commits itself. Either way it is durable when the call returns.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

from ael_store.clock import SystemClock, from_us, to_us
from ael_store.errors import DatabaseNotUsable, LoopNotRunning, OwnedElsewhere
from ael_store.model.event import Emission, Event
from ael_store.model.metric import numbers_of
from ael_store.model.records import Commit
from ael_store.model.state import State
from ael_store.model.values import DEFAULT_LIMITS, Limits, check_key, decode, encode
from ael_store.runtime.commands import PAUSED, Desk, carry_out
from ael_store.runtime.control import actor, ask, longest_line
from ael_store.runtime.delivery import Deliveries
from ael_store.runtime.journal import Journal
from ael_store.runtime.outside import Request
from ael_store.runtime.roster import Roster
from ael_store.runtime.task_function import PLAIN, policy_of, reference_of
from ael_store.runtime.tasks import TaskBoard
from ael_store.settings import Settings
from ael_store.store.lock import current_holder
from ael_store.store.past_state import PastState
from ael_store.store.reader import Reader
from ael_store.store.sqlite import database_path
from ael_store.store.store import Store

__all__ = ["AsyncClient", "Client", "change", "connect"]

TRIES = 3
WITH_WHOLE_STATE = ("agents.rename", "agents.forget", "state.import", "state.undo")
"""Commands that look at more than one key."""


def connect(path: str | os.PathLike[str], *, allow_shared_folder: bool = False) -> Client:
    """Return a client of a database; its attribute `aio` is the same client with async methods.

    With no loop running it writes itself, and refuses a folder that everybody may write unless that is allowed.
    Raises DatabaseNotUsable where there is no such file: only a loop creates a database.
    """
    return Client(path, allow_shared_folder=allow_shared_folder)


class Client:
    """The plain client: each call blocks until it is done. May be used from any thread."""

    def __init__(self, path: str | os.PathLike[str], *, allow_shared_folder: bool = False) -> None:
        self.path: Path = database_path(path)
        self.allow_shared_folder = allow_shared_folder
        if not self.path.exists():
            raise DatabaseNotUsable(
                f"{self.path} does not exist; a loop creates it: `ael run`, or AELController(store=…)"
            )
        self._reader = Reader(self.path)
        self.aio = AsyncClient(self)

    # -- changing --

    def emit(
        self,
        type: str,
        data: Any = None,
        metadata: Mapping[str, Any] | None = None,
        *,
        source: str = "outside",
    ) -> int:
        """Emit an event and return its number; durable on return."""
        event = Event(type, source, data, metadata=metadata)
        Emission.of(event, DEFAULT_LIMITS, now_us=None)  # refuses what JSON would alter on its way
        arguments = {
            "type": type,
            "data": data,
            "metadata": event.metadata or None,
            "source": source,
        }
        return int(self._change("events.emit", arguments))

    def set(self, key: str, value: Any) -> bool:
        """Give a key a value; durable on return. True if that changed anything."""
        check_key(key)
        encode(value, f"state key {key!r}")
        return bool(self._change("state.set", {"key": key, "value": value}))

    def delete(self, key: str) -> bool:
        """Remove a key; durable on return. True if it existed."""
        return bool(self._change("state.delete", {"key": key}))

    def submit(
        self,
        function: Callable[..., Any] | str,
        *args: Any,
        agent: str | None = None,
        key: str | None = None,
        after: float | str | timedelta | datetime | None = None,
        priority: int = 5,
        limit: str | None = None,
    ) -> int:
        """Submit a task and return its number; durable on return. A key that is known gives the number it has.

        `function` is one at the top of a module, or a name: `module:function`, a registered one, or with `agent` a
        method of it. The agent gets the result; without one it comes as the event `task_finished`.
        """
        name, owner = reference_of(function)
        encode(list(args), f"the arguments of task {name!r}")
        policy = PLAIN if isinstance(function, str) else policy_of(function)
        arguments: dict[str, Any] = {
            "name": name,
            "args": list(args),
            "agent": agent or owner,
            "key": key,
            "priority": priority,
            "limit": limit or policy.limit,
        }
        if isinstance(after, datetime):
            arguments["at"] = from_us(to_us(after)).isoformat()
        else:
            arguments["after"] = after.total_seconds() if isinstance(after, timedelta) else after
        return int(self._change("tasks.submit", arguments)["id"])

    def answer(self, task_id: int, choice: str, *, by: str) -> None:
        """Answer a question; durable on return. Raises UsageError where it was answered, or takes no such answer."""
        self._change("tasks.answer", {"id": task_id, "choice": choice, "by": by})

    def push_metrics(self, channel: str, data: Mapping[str, float]) -> None:
        """Record numbers as gauges of a channel; durable on return, all of them or none.

        Raises InvalidValueType or InvalidValue, naming the metric, for anything but an int or a finite float.
        """
        numbers = numbers_of(channel, data)
        self._change("metrics.push", {"channel": channel, "data": numbers})

    def _change(self, command: str, arguments: dict[str, Any]) -> Any:
        return change(self.path, command, arguments, allow_shared_folder=self.allow_shared_folder)

    # -- reading --

    def get(self, key: str, default: Any = None) -> Any:
        """Return the committed value of a key, or `default`."""
        text = self._reader.value(key)
        return default if text is None else decode(text)

    def get_all(self) -> dict[str, Any]:
        """Return every key with its committed value."""
        return {row["key"]: decode(row["value"]) for row in self._reader.state()}

    def at(self, moment: int | str | datetime) -> PastState:
        """Return the state after an iteration, or as it was at a time (aware, or ISO text); close it when done.

        Raises HistoryGone where retention has removed that moment, UsageError where it has not been yet.
        """
        return PastState(self.path, moment)

    def close(self) -> None:
        """Close the connections; the client may not be used after it."""
        self._reader.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> AsyncClient:
        return self.aio

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.close)


class AsyncClient:
    """The same client for async code: the methods of `Client`, awaited."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def emit(
        self,
        type: str,
        data: Any = None,
        metadata: Mapping[str, Any] | None = None,
        *,
        source: str = "outside",
    ) -> int:
        """Emit an event and return its number; durable on return."""
        return await asyncio.to_thread(lambda: self._client.emit(type, data, metadata, source=source))

    async def submit(
        self,
        function: Callable[..., Any] | str,
        *args: Any,
        agent: str | None = None,
        key: str | None = None,
        after: float | str | timedelta | datetime | None = None,
        priority: int = 5,
        limit: str | None = None,
    ) -> int:
        """Submit a task and return its number; durable on return."""
        options = {"agent": agent, "key": key, "after": after, "priority": priority, "limit": limit}
        return await asyncio.to_thread(lambda: self._client.submit(function, *args, **options))  # type: ignore[arg-type]

    async def answer(self, task_id: int, choice: str, *, by: str) -> None:
        """Answer a question; durable on return."""
        await asyncio.to_thread(lambda: self._client.answer(task_id, choice, by=by))

    async def set(self, key: str, value: Any) -> bool:
        """Give a key a value; durable on return. True if that changed anything."""
        return await asyncio.to_thread(self._client.set, key, value)

    async def delete(self, key: str) -> bool:
        """Remove a key; durable on return. True if it existed."""
        return await asyncio.to_thread(self._client.delete, key)

    async def push_metrics(self, channel: str, data: Mapping[str, float]) -> None:
        """Record numbers as gauges of a channel; durable on return, all of them or none."""
        await asyncio.to_thread(self._client.push_metrics, channel, data)

    async def get(self, key: str, default: Any = None) -> Any:
        """Return the committed value of a key, or `default`."""
        return await asyncio.to_thread(self._client.get, key, default)

    async def get_all(self) -> dict[str, Any]:
        """Return every key with its committed value."""
        return await asyncio.to_thread(self._client.get_all)


def change(
    path: Path,
    command: str,
    arguments: dict[str, Any],
    limits: Limits = DEFAULT_LIMITS,
    *,
    allow_shared_folder: bool = False,
) -> Any:
    """Carry out a command: through the running loop, or directly under the lock. Durable on return.

    Raises what the command was refused with; OwnedElsewhere where a loop runs that takes no commands.
    """
    for attempt in range(TRIES):
        holder = current_holder(path)
        if holder is not None and holder.socket is not None:
            try:
                return ask(holder.socket, command, arguments, longest=longest_line(limits))
            except LoopNotRunning:
                if attempt == TRIES - 1 or current_holder(path) == holder:
                    raise
                continue
        try:
            return _run_directly(Store(path, allow_shared_folder=allow_shared_folder), command, arguments, limits)
        except OwnedElsewhere:
            now = current_holder(path)
            if attempt == TRIES - 1 or now is None or now.socket is None:
                raise
    raise AssertionError("unreachable")


def _run_directly(store: Store, command: str, arguments: dict[str, Any], limits: Limits) -> Any:
    """Carry out a command in this process; from a running event loop in a thread of its own."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(_directly(store, command, arguments, limits))
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as threads:
        return threads.submit(asyncio.run, _directly(store, command, arguments, limits)).result()


async def _directly(store: Store, command: str, arguments: dict[str, Any], limits: Limits) -> Any:
    wanted = None if command in WITH_WHOLE_STATE else [arguments.get("key", "")]
    with_tasks = command.startswith(("tasks.", "limits.", "agents.forget"))
    with_metrics = command in ("metrics.push", "agents.rename")
    resumed = await store.open(
        f"ael {command}", upgrade_schema=False, create=False, keys=wanted, tasks=with_tasks, metrics=with_metrics
    )
    try:
        run_id = resumed.run_id
        state = State(resumed.cells, resumed.change_id)
        journal = Journal(resumed, state, run_id)
        settings = Settings()
        roster, clock = Roster(journal, settings, resumed), SystemClock()
        tasks = TaskBoard(journal, settings, roster, clock, resumed, limits)
        desk = Desk(
            state,
            journal,
            roster,
            Deliveries(journal, settings, resumed.subscriptions, resumed.requested),
            tasks,
            clock,
            limits,
            running=False,
            find_dead_letters=store.reader.dead_letter_records,
            find_task=store.reader.task_record,
            find_undo=store.reader.undo_plan,
            paused=resumed.positions.get(PAUSED) == "true",
        )
        refused: Exception | None = None
        result: Any = None
        try:
            result = carry_out(desk, Request(command, None, arguments, actor()))
        except Exception as error:
            refused = error
        commit: Commit = journal.take("command", desk.clock.now_us())
        commit.run_id = None
        await store.commit(commit, take_from=resumed.token, holder=f"pid {os.getpid()}: ael {command}")
        tasks.committed(commit.known_keys)
        if refused is not None:
            raise refused
        return result
    finally:
        await store.close()

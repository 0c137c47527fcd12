"""What manager, bus and context are attached to: the loop of a controller, whether it runs or not."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ael_store.clock import Clock, iso
from ael_store.errors import AelError, LoopNotRunning
from ael_store.model.event import Event
from ael_store.model.unit import Unit
from ael_store.model.values import Limits, decode
from ael_store.runtime.agent import AgentBase
from ael_store.runtime.measure import IterationSummary
from ael_store.runtime.outside import Outside, Request
from ael_store.runtime.service_manager import ServiceManager
from ael_store.store.reader import Reader, history_entry

if TYPE_CHECKING:
    from ael_store.runtime.run import Run
    from ael_store.store.store import Store

__all__ = ["Host"]


class Host:
    """Answers the context, the bus and the manager of one controller. May be used from any thread."""

    def __init__(self, clock: Clock, store: Store, limits: Limits, service: ServiceManager) -> None:
        self.clock = clock
        self.store = store
        self.limits = limits
        self.service = service
        self.outside = Outside(clock)
        self.outside.limits = limits
        self.run: Run | None = None
        self.observers: list[Callable[[IterationSummary], None]] = []

    # -- the run comes and goes --

    def attach(self, run: Run) -> None:
        self.run = run
        self.outside.wake = run.wake
        self.outside.attach(run.state)

    def detach(self, run: Run) -> None:
        if self.run is run:
            self.outside.detach()
            self.outside.wake = lambda: None
            self.run = None

    def refuse_waiting(self, error: BaseException | None) -> None:
        """Tell those who wait for a command or a `transact` that the loop has ended."""
        with self.outside.lock:
            kept = [request for request in self.outside.queue if request.reply is None]
            refused = [request for request in self.outside.queue if request.reply is not None]
            self.outside.queue.clear()
            self.outside.queue.extend(kept)
        for request in refused:
            assert request.reply is not None
            if not request.reply.done():
                request.reply.set_exception(
                    error if isinstance(error, AelError) else LoopNotRunning("the loop ended before it could do this")
                )

    # -- contexts and bus --

    def owns(self, unit: Unit) -> bool:
        run = self.run
        return run is not None and unit.state is run.state

    def submit(self, name: str, action: Callable[[Unit], Any]) -> None:
        self.outside.submit(Request(name, action))

    def request(self, name: str, arguments: dict[str, Any], actor: str | None = None) -> Future[Any]:
        """Queue a command or a `transact`; the future is done once it is committed."""
        reply: Future[Any] = Future()
        if self.run is None:
            reply.set_exception(LoopNotRunning("the loop does not run; `await controller.start()` first"))
        else:
            self.outside.submit(Request(name, None, arguments, actor, reply))
        return reply

    def preview(self) -> Unit:
        return self.outside.preview()

    def virtual(self, key: str) -> Any:
        run = self.run
        if run is None:
            return "stopped" if key == "ael_status" else None
        return run.virtual(key)

    def history(self, key: str | None, limit: int) -> list[dict[str, Any]]:
        run = self.run
        fresh = [] if run is None else _uncommitted(run, key)
        known = {row["id"] for row in fresh}
        with self._reader() as reader:
            rows = [] if reader is None else reader.history(key, limit)
        past = [{"id": row["id"], **history_entry(row)} for row in reversed(rows) if row["id"] not in known]
        found = (past + fresh)[-limit:]
        for row in found:
            del row["id"]
        return found

    def recent_events(self, limit: int) -> list[Event]:
        run = self.run
        fresh = [] if run is None else list(run.journal.commit.events)
        known = {record.id for record in fresh}
        with self._reader() as reader:
            past = [] if reader is None else reader.recent_events(limit)
        records = [record for record in past if record.id not in known] + fresh
        return [Event.from_record(record) for record in records[-limit:]]

    def health(self) -> dict[str, Any]:
        """Return how the loop is doing right now; answered at once, whatever it waits for."""
        run = self.run
        full_since_us = None if run is None else run.full_since_us
        return {
            "pid": os.getpid(),
            "status": self.virtual("ael_status"),
            "iteration": 0 if run is None else run.journal.iteration,
            "waiting_for_room_since": None if full_since_us is None else iso(full_since_us),
        }

    def progress(self) -> dict[str, dict[str, Any]]:
        """Return how far the attempts at tasks are that run now, by task."""
        run = self.run
        return {} if run is None else run.tasks.progress()

    def agent_now(self, name: str) -> dict[str, Any] | None:
        """Return what the loop knows right now of an agent; None while no run is there."""
        from ael_store.runtime.why import agent_now

        run = self.run
        return None if run is None else agent_now(run, name)

    def event_count(self) -> int:
        run = self.run
        return 0 if run is None else run.journal.event_id

    @contextmanager
    def _reader(self) -> Iterator[Reader | None]:
        if self.store.is_open:
            yield self.store.reader
        elif self.store.path.exists():
            reader = Reader(self.store.path)
            try:
                yield reader
            finally:
                reader.close()
        else:
            yield None

    # -- the manager --

    def agents_changed(self) -> None:
        run = self.run
        if run is not None:
            run.roster_dirty = True
            run.wake()

    def agent_changed(self, agent: AgentBase) -> None:
        run = self.run
        if run is not None:
            run.flags_changed.append(agent)
            run.wake()


def _uncommitted(run: Run, key: str | None) -> list[dict[str, Any]]:
    """Return the changes of the iteration so far."""
    commit = run.journal.commit
    ticks = {row.id: row for row in list(commit.ticks)}
    names = {record.id: name for name, record in run.roster.records.items()}
    return [
        {
            "id": change.id,
            "timestamp": iso(ticks[change.tick_id].started_us),
            "operation": "delete" if change.new is None else "set",
            "key": change.key,
            "old_value": None if change.old is None else decode(change.old.text),
            "new_value": None if change.new is None else decode(change.new.text),
            "agent": names.get(ticks[change.tick_id].agent_id, "(outside)"),
            "iteration": ticks[change.tick_id].iteration,
        }
        for change in list(commit.changes)
        if key in (None, change.key) and change.tick_id in ticks
    ]

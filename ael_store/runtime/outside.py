"""Changes from outside hooks: calls of other code in this process, and commands of other processes.

Each is a unit of its own, queued in order and applied in the next iteration, which it wakes. Before the loop runs
(and after it) they wait for the next start. Reads see the last commit.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from ael_store.clock import Clock
from ael_store.model.state import State
from ael_store.model.unit import Unit
from ael_store.model.values import Limits

__all__ = ["Outside", "Request"]


@dataclass(slots=True)
class Request:
    """One change that waits: `action(unit)`, or an operator's `command` with its arguments."""

    name: str
    action: Callable[[Unit], Any] | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    actor: str | None = None
    """Who asked, for the audit; None for other code of this process."""
    reply: Future[Any] | None = None
    """Gets the result once it is committed."""

    @property
    def shows(self) -> bool:
        """True where who reads the state before it is applied sees what it changes."""
        return self.action is not None and not self.name.startswith(("events.", "tasks.", "metrics."))


class Outside:
    """The queue of changes, and what readers outside hooks see. May be used from any thread."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.limits = Limits()
        self.queue: deque[Request] = deque()
        self.lock = threading.RLock()
        self.state: State | None = None
        """The state of the running loop; None while there is none."""
        self._preview = State()
        self.wake: Callable[[], None] = lambda: None

    def submit(self, request: Request) -> None:
        """Queue a change and wake the loop."""
        with self.lock:
            self.queue.append(request)
            if self.state is None and request.shows:
                unit = self.unit(self._preview)
                request.action(unit)  # type: ignore[misc]
                self._preview.apply(unit.writes, 0, 0)
            else:
                self.wake()

    def take(self) -> list[Request]:
        """Return everything that waits, in order."""
        with self.lock:
            requests = list(self.queue)
            self.queue.clear()
            return requests

    def preview(self) -> Unit:
        """Return a throw-away unit on the last commit; without a loop on what waits for it."""
        with self.lock:
            state = self.state
            if state is None:
                return self.unit(self._preview)
            unit = self.unit(state)
            unit.shadow = state.uncommitted
            return unit

    def unit(self, state: State) -> Unit:
        return Unit(
            "outside",
            "outside",
            state,
            iteration=0,
            now_us=self.clock.now_us(),
            seed=0,
            limits=self.limits,
        )

    def attach(self, state: State) -> None:
        """A loop runs: its state is what readers see."""
        with self.lock:
            self.state = state
            self._preview = State()

    def detach(self) -> None:
        """The loop has ended: readers see what it left, and what waits for the next one."""
        with self.lock:
            if self.state is not None:
                self._preview = State(self.state.committed_cells())
                self.state = None
                for request in self.queue:
                    if request.shows:
                        unit = self.unit(self._preview)
                        request.action(unit)  # type: ignore[misc]
                        self._preview.apply(unit.writes, 0, 0)

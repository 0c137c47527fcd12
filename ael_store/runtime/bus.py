"""The event bus as agents and other code see it.

In a loop the log in the database is the bus: `emit` inside a hook belongs to the running unit, `subscribe` opens a
durable cursor, and callbacks run in the delivery step, each in a unit of its own. A lone bus works in memory, and
its callbacks run at once.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping
from datetime import datetime
from itertools import count
from typing import Any, Protocol

from ael_store.clock import from_us
from ael_store.errors import InvalidValueType
from ael_store.model.event import Emission, Event, check_name, compile_patterns
from ael_store.model.unit import SubscriptionRequest, Unit
from ael_store.model.values import DEFAULT_LIMITS, Limits
from ael_store.runtime.current import current_unit

__all__ = ["BusHost", "Callback", "EventBus"]

Callback = Callable[[Event], Any]
HISTORY = 1000

log = logging.getLogger("ael_store.bus")


class BusHost(Protocol):
    """What an attached bus asks its loop for."""

    limits: Limits

    def owns(self, unit: Unit) -> bool: ...

    def submit(self, name: str, action: Callable[[Unit], Any]) -> None: ...

    def preview(self) -> Unit: ...

    def recent_events(self, limit: int) -> list[Event]:
        """Return the newest events, oldest first."""
        ...

    def event_count(self) -> int:
        """Return how many events the log has seen; 0 while no loop runs."""
        ...


class EventBus:
    """Publish and subscribe: `bus.subscribe("too_hot", "fan", callback)`, `bus.emit("too_hot", "sensor", {…})`."""

    def __init__(self) -> None:
        self._host: BusHost | None = None
        self._lock = threading.RLock()
        self._callbacks: dict[tuple[str, str], Callback] = {}
        self._history: deque[Event] = deque(maxlen=HISTORY)
        self._history_after = 0
        self._numbers = count(1)
        self._emitted = 0
        self._failed = 0
        self._tasks: set[asyncio.Task[Any]] = set()

    # -- subscribing --

    def subscribe(self, event_type: str, subscriber_name: str, callback: Callback) -> None:
        """Call `callback(event)` (plain or async) for each event whose type matches; `*` stands for any text.

        In a loop the cursor belongs to (subscriber, pattern) and survives restarts: subscribing the same again
        goes on where it was, and one seen for the first time starts from now.
        """
        check_name(event_type, "an event type")
        check_name(subscriber_name, "a subscriber's name")
        if not callable(callback):
            raise InvalidValueType(f"the callback of {subscriber_name!r} is {callback!r}, which can't be called")
        self._request(SubscriptionRequest(subscriber_name, event_type, callback))

    def unsubscribe(self, event_type: str, subscriber_name: str) -> bool:
        """End a subscription and its cursor; True if it was there."""
        existed = (subscriber_name, event_type) in self._callbacks
        self._request(SubscriptionRequest(subscriber_name, event_type, None))
        return existed

    def unsubscribe_all(self, subscriber_name: str) -> int:
        """End all subscriptions of a subscriber; returns how many there were."""
        number = sum(name == subscriber_name for name, _ in self._callbacks)
        self._request(SubscriptionRequest(subscriber_name, None, None))
        return number

    def _request(self, request: SubscriptionRequest) -> None:
        unit = self._running_unit()
        if unit is not None:
            unit.check_open(f"subscription of {request.subscriber}")
            unit.subscriptions.append(request)
        else:
            self._carry_out(request)
            if self._host is not None:
                self._host.submit("events.subscribe", lambda unit: unit.subscriptions.append(request))

    def _carry_out(self, request: SubscriptionRequest) -> None:
        """Note a callback, or forget it; the cursor is the loop's business."""
        with self._lock:
            if request.callback is not None and request.pattern is not None:
                self._callbacks[request.subscriber, request.pattern] = request.callback
            else:
                for name, pattern in list(self._callbacks):
                    if name == request.subscriber and request.pattern in (None, pattern):
                        del self._callbacks[name, pattern]

    # -- emitting --

    def publish(self, event: Event | Mapping[str, Any]) -> Event:
        """Emit an event, or a mapping with `type`, `source` and the like; returns the event."""
        if not isinstance(event, Event):
            if not isinstance(event, Mapping):
                raise InvalidValueType(
                    f"publish got {type(event).__name__}, wanted is an Event or a mapping with its fields"
                )
            fields = dict(event)
            if "type" not in fields:
                raise InvalidValueType(f"publish got a mapping without 'type': {sorted(map(str, fields))}")
            timestamp = fields.get("timestamp")
            if isinstance(timestamp, str):
                timestamp = datetime.fromisoformat(timestamp)
            event = Event(
                fields["type"],
                fields.get("source", "outside"),
                fields.get("data"),
                timestamp,
                fields.get("metadata"),
            )
            return self._publish(event, keep_time=timestamp is not None)
        return self._publish(event, keep_time=True)

    def emit(self, event_type: str, source: str, data: Any = None, metadata: Mapping[str, Any] | None = None) -> Event:
        """Emit an event. In a hook it exists only if the unit succeeds; its `id` is None until then."""
        return self._publish(Event(event_type, source, data, metadata=metadata), keep_time=False)

    def _publish(self, event: Event, keep_time: bool) -> Event:
        unit = self._running_unit()
        if unit is not None:
            unit.emit(Emission.of(event, unit.limits, now_us=None if keep_time else unit.now_us))
            return event
        host = self._host
        if host is not None:
            if not keep_time:
                event._timestamp = from_us(host.preview().now_us)  # the loop's clock
            emission = Emission.of(event, host.limits, now_us=None)
            host.submit("events.emit", lambda unit: unit.emit(emission))
            return event
        Emission.of(event, DEFAULT_LIMITS, now_us=None)
        self._call_now(event)
        return event

    def _call_now(self, event: Event) -> None:
        """A lone bus: number the event, keep it, and run the callbacks."""
        with self._lock:
            event.id = next(self._numbers)
            self._history.append(event)
            self._emitted += 1
            callbacks = [
                (name, callback)
                for (name, pattern), callback in self._callbacks.items()
                if compile_patterns((pattern,))(event.type)
            ]
        for name, callback in callbacks:
            try:
                result = callback(event)
            except Exception:
                self._failed += 1
                log.exception("callback of %r failed on %r", name, event.type)
                continue
            if inspect.isawaitable(result):
                self._await(name, result)

    def _await(self, name: str, result: Any) -> None:
        async def finish() -> None:
            try:
                await result
            except Exception:
                self._failed += 1
                log.exception("callback of %r failed", name)

        try:
            task = asyncio.get_running_loop().create_task(finish())
        except RuntimeError:
            asyncio.run(finish())
        else:
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    # -- looking back --

    def get_event_history(self, event_type: str | None = None, source: str | None = None) -> list[Event]:
        """Return the last 1000 events, oldest first, or those of them with this type and source."""
        if self._host is not None:
            events = [event for event in self._host.recent_events(HISTORY) if (event.id or 0) > self._history_after]
        else:
            with self._lock:
                events = list(self._history)
        return [
            event
            for event in events
            if (event_type is None or event.type == event_type) and (source is None or event.source == source)
        ]

    def clear_history(self) -> None:
        """Forget what `get_event_history` returned so far, in this process; the log keeps it."""
        with self._lock:
            if self._host is not None:
                events = self._host.recent_events(1)
                self._history_after = (events[-1].id or 0) if events else self._history_after
            self._history.clear()

    def get_stats(self) -> dict[str, Any]:
        """Return how many events there were in this process, and who is subscribed."""
        with self._lock:
            patterns: dict[str, list[str]] = {}
            for name, pattern in self._callbacks:
                patterns.setdefault(pattern, []).append(name)
            return {
                "total_events": self._emitted if self._host is None else self._host.event_count(),
                "history_size": len(self._history) if self._host is None else min(HISTORY, self._host.event_count()),
                "subscriptions": patterns,
                "total_subscribers": len(self._callbacks),
                "failed_callbacks": self._failed,
            }

    def _running_unit(self) -> Unit | None:
        if self._host is None:
            return None
        unit = current_unit.get()
        return unit if unit is not None and self._host.owns(unit) else None

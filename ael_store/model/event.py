"""Events: what agents tell each other.

`Event` is what users see. `EventRecord` is what the log holds: texts instead of values, so that each handler
gets values of its own, decoded when it looks at them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from ael_store.clock import from_us, to_us
from ael_store.errors import InvalidValue, InvalidValueType, NotAllowedHere
from ael_store.model.values import DEFAULT_LIMITS, Limits, decode, encode, shown, type_name

__all__ = ["Emission", "Event", "EventRecord", "check_name", "compile_patterns", "glob_of"]


REDACTED = '"(redacted)"'
"""What stands where a value was, as JSON text."""


class Event:
    """Something that happened: a type, a source, data and metadata.

    `id` and `iteration` are None until the unit of work that emitted the event has succeeded. `timestamp` is an
    aware UTC time. What a handler changes in `data` or `metadata` stays with that handler.
    """

    __slots__ = ("_answer", "_data", "_metadata", "_record", "_timestamp", "id", "iteration", "source", "type")

    def __init__(
        self,
        type: str,
        source: str,
        data: Any = None,
        timestamp: datetime | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        self.type = type
        self.source = source
        self.id: int | None = None
        self.iteration: int | None = None
        self._record: EventRecord | None = None
        self._answer: Callable[[Event, str], None] | None = None
        """Where it is being handled: emits a reply in the unit of the handler."""
        self._data = data
        self._timestamp = timestamp if timestamp is not None else datetime.now(UTC)
        if metadata is not None and not isinstance(metadata, Mapping):
            raise InvalidValueType(
                f"metadata of event {shown(type)} is {shown(metadata)} ({type_name(metadata)}), wanted is a mapping"
            )
        self._metadata: dict[str, Any] | None = dict(metadata or {})

    @classmethod
    def from_record(cls, record: EventRecord) -> Event:
        """Return an event of the log; its data are decoded when they are asked for."""
        event = cls.__new__(cls)
        event.type = record.type
        event.source = record.source
        event.id = record.id
        event.iteration = record.iteration
        event._record = record
        event._answer = None
        event._data = None
        event._timestamp = None  # type: ignore[assignment]
        event._metadata = None
        return event

    @property
    def data(self) -> Any:
        """What it carries: a JSON value, or None."""
        if self._record is not None:
            self._decode(self._record)
        return self._data

    @data.setter
    def data(self, value: Any) -> None:
        if self._record is not None:
            self._decode(self._record)
        self._data = value

    @property
    def metadata(self) -> dict[str, Any]:
        """What is known about it beside its data."""
        if self._record is not None:
            self._decode(self._record)
        if self._metadata is None:
            self._metadata = {}
        return self._metadata

    @property
    def timestamp(self) -> datetime:
        """When it was emitted, in UTC."""
        if self._record is not None:
            self._decode(self._record)
        return self._timestamp

    def _decode(self, record: EventRecord) -> None:
        self._data = None if record.data is None else decode(record.data)
        self._metadata = {} if record.metadata is None else decode(record.metadata)
        self._timestamp = from_us(record.timestamp_us)
        self._record = None

    def reply(self, data: Any = None, *, type: str | None = None) -> Event:
        """Emit an event to the source of this one, and to nobody else; returns it.

        Its type is that of this event with `.reply` behind it, unless `type` says another. Its metadata name what it
        answers (`in_reply_to`, the event's number) and who it is for (`to`). An agent gets it in `on_event`, whatever
        its `subscriptions` are; a callback gets it where it subscribed for that type under the source's name; for a
        source outside it is in the log. Raises NotAllowedHere where the event is not being handled.
        """
        if self._answer is None:
            raise NotAllowedHere(
                "`reply` belongs to the handler of an event, while it runs: call it on the event that `on_event` gets"
            )
        event = Event(
            f"{self.type}.reply" if type is None else type, "", data, None, {"in_reply_to": self.id, "to": self.source}
        )
        self._answer(event, self.source)
        return event

    def to_dict(self) -> dict[str, Any]:
        """Return the event as a JSON object; the time as ISO text."""
        return {
            "id": self.id,
            "type": self.type,
            "source": self.source,
            "data": self.data,
            "metadata": self.metadata,
            "timestamp": self.timestamp.isoformat(),
            "iteration": self.iteration,
        }

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Event):
            return NotImplemented
        return (self.type, self.source, self.data, self.metadata, self.timestamp, self.id) == (
            other.type,
            other.source,
            other.data,
            other.metadata,
            other.timestamp,
            other.id,
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Event(id={self.id}, type={self.type!r}, source={self.source!r}, data={self.data!r})"


@dataclass(slots=True)
class EventRecord:
    """An event of the log, its values as JSON text."""

    id: int
    type: str
    source: str
    data: str | None
    metadata: str | None
    timestamp_us: int
    tick_id: int
    iteration: int
    hops: int | None = None
    """How many handlers of events led to it, one after another; None for none."""
    target: str | None = None
    """Of a reply, the name of who alone gets it; None for everybody who wants its type."""


@dataclass(slots=True)
class Emission:
    """An event that a unit wants to emit, checked and encoded; `due_us` where it is to happen later.

    `is_counted` where that is after a length of time, which passes whatever the wall clock says.
    """

    type: str
    source: str
    data: str | None
    metadata: str | None
    timestamp_us: int | None
    due_us: int | None
    event: Event
    is_counted: bool = False
    target: str | None = None

    @classmethod
    def of(
        cls,
        event: Event,
        limits: Limits = DEFAULT_LIMITS,
        *,
        now_us: int | None,
        due_us: int | None = None,
        is_counted: bool = False,
    ) -> Emission:
        """Check and encode an event; with `now_us` the event happens at the `now` of its unit."""
        check_name(event.type, "an event type", wildcards=False)
        what = f"event {event.type!r}"
        check_name(event.source, f"the source of {what}")
        value, details = event.data, event.metadata
        data = None if value is None else encode(value, f"data of {what}", limits, limits.event_bytes)
        metadata = encode(details, f"metadata of {what}", limits, limits.event_bytes) if details else None
        timestamp_us = None
        if now_us is None:
            if not isinstance(event.timestamp, datetime):
                raise InvalidValueType(f"timestamp of {what} is {type(event.timestamp).__name__}, wanted is a datetime")
            timestamp_us = to_us(event.timestamp)
        else:
            event._timestamp = from_us(now_us)
        return cls(event.type, event.source, data, metadata, timestamp_us, due_us, event, is_counted)


def check_name(name: Any, what: str, *, wildcards: bool = True) -> str:
    """Return a name that can stand in the log; raises InvalidValue or InvalidValueType."""
    if type(name) is not str:
        raise InvalidValueType(f"{what} is {shown(name)} ({type_name(name)}), not str")
    if not name or not name.isprintable() or len(name) > 200:
        raise InvalidValue(f"{what} is {name[:60]!r}: wanted are 1 to 200 printable characters")
    if not wildcards and "*" in name:
        raise InvalidValue(f"{what} is {name!r}: '*' stands for any text in patterns and can't be emitted")
    return name


def compile_patterns(patterns: Iterable[str]) -> Callable[[str], bool]:
    """Return a test for event types: true where one of the patterns matches, `*` standing for any text."""
    exact = frozenset(pattern for pattern in patterns if "*" not in pattern)
    wild = [".*".join(map(re.escape, pattern.split("*"))) for pattern in patterns if "*" in pattern]
    if not wild:
        return exact.__contains__
    match = re.compile("|".join(f"(?:{part})" for part in wild), re.DOTALL).fullmatch
    return lambda name: name in exact or match(name) is not None


def glob_of(pattern: str) -> str:
    """Return the pattern for SQLite's GLOB operator, in which `?` and `[` are special too."""
    return re.sub(r"[\[?]", lambda found: f"[{found[0]}]", pattern)

"""Leads `get_state_context()` and `get_event_bus()` to the loops of tests.

These two are one object each in a process, and agents may have taken hold of them at any time. A test has loops of
its own, also several at once, so while there are any, both ask here: inside a hook they belong to its unit of work,
as in a real loop; outside hooks to the loop of the test, where it is the only one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from ael_store.compat import get_event_bus, get_state_context
from ael_store.errors import NotAllowedHere
from ael_store.model.event import Event
from ael_store.model.unit import Unit
from ael_store.model.values import Limits
from ael_store.runtime.bus import BusHost
from ael_store.runtime.context import ContextHost
from ael_store.runtime.current import current_unit

__all__ = ["LoopHost", "routed"]


class LoopHost(ContextHost, BusHost, Protocol):
    """What answers a context and a bus; `run` is None while no loop runs."""

    @property
    def run(self) -> Any: ...


class _Router:
    """A host that asks the host of the running hook."""

    def __init__(self) -> None:
        self.hosts: list[LoopHost] = []
        self.before: tuple[Any, Any] = (None, None)
        """What context and bus were attached to before there was a test's loop."""

    @property
    def run(self) -> Any:
        """The run of the process's own controller; None where that does not run."""
        return getattr(self.before[0], "run", None)

    def _host(self) -> LoopHost:
        hosts = self.hosts if self.run is None else [*self.hosts, self.before[0]]
        unit = current_unit.get()
        for host in hosts:
            if unit is not None and host.owns(unit):
                return host
        if len(hosts) == 1:
            return hosts[0]
        raise NotAllowedHere(
            f"{len(hosts)} loops run here, and outside hooks nothing says which one is meant: "
            "use `emit` and `set` of its Harness"
        )

    @property
    def limits(self) -> Limits:
        return self._host().limits

    def owns(self, unit: Unit) -> bool:
        return self._host().owns(unit)

    def submit(self, name: str, action: Callable[[Unit], Any]) -> None:
        self._host().submit(name, action)

    def preview(self) -> Unit:
        return self._host().preview()

    def virtual(self, key: str) -> Any:
        return self._host().virtual(key)

    def history(self, key: str | None, limit: int) -> list[dict[str, Any]]:
        return self._host().history(key, limit)

    def recent_events(self, limit: int) -> list[Event]:
        return self._host().recent_events(limit)

    def event_count(self) -> int:
        return self._host().event_count()


_router = _Router()


@contextmanager
def routed(host: LoopHost) -> Iterator[None]:
    """Lead the process's context and bus to this loop too, for the length of a `with` block."""
    parts: tuple[Any, Any] = (get_state_context(), get_event_bus())
    if not _router.hosts:
        _router.before = (parts[0]._host, parts[1]._host)
        for part in parts:
            part._host = _router
    _router.hosts.append(host)
    try:
        yield
    finally:
        _router.hosts.remove(host)
        if not _router.hosts:
            for part, before in zip(parts, _router.before, strict=True):
                if part._host is _router:
                    part._host = before
            _router.before = (None, None)

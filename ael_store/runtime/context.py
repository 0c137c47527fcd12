"""The shared state as agents and other code see it.

A `StateContext` is one of three things, with the same methods:

- *bound*: the `context` that a hook gets; it belongs to one unit of work and closes with it;
- *attached*: the context of a loop (`get_state_context()`); inside a hook it belongs to the running unit, outside
  each call is a unit of its own, applied in order in the next iteration, and reads see the last commit;
- *lone*: a state of its own in memory, without database and history on disk.
"""

from __future__ import annotations

import os
import random
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, overload

from ael_store.clock import from_us, iso
from ael_store.errors import InvalidKey, InvalidTask, InvalidValue, InvalidValueType, NotAllowedHere
from ael_store.model.duration import due_us
from ael_store.model.event import Emission, Event
from ael_store.model.state import State
from ael_store.model.task import QUESTION, Submission, Task, check_task_text, new_record
from ael_store.model.unit import Unit
from ael_store.model.values import DEFAULT_LIMITS, Limits, check_key, decode, encode, same, shown, type_name
from ael_store.runtime.current import current_unit

if TYPE_CHECKING:
    from ael_store.runtime.metrics import Metrics

__all__ = ["VIRTUAL_KEYS", "ContextHost", "StateContext"]

D = TypeVar("D")
R = TypeVar("R")

VIRTUAL_KEYS = frozenset(("ael_status", "ael_start_time", "ael_iteration", "ael_last_tick"))
"""Keys that the loop answers itself; they can't be written and are in no history."""

HISTORY_OF_KEY = 100
HISTORY_OF_ALL = 1000


class ContextHost(Protocol):
    """What an attached context asks its loop for."""

    limits: Limits

    def owns(self, unit: Unit) -> bool:
        """True where the unit belongs to this loop."""
        ...

    def submit(self, name: str, action: Callable[[Unit], Any]) -> None:
        """Queue a unit of its own; it is applied in the next iteration, or when the loop starts."""
        ...

    def preview(self) -> Unit:
        """Return a throw-away unit on what outside readers see: the last commit."""
        ...

    def virtual(self, key: str) -> Any:
        """Return the value of a key that the loop answers itself."""
        ...

    def history(self, key: str | None, limit: int) -> list[dict[str, Any]]:
        """Return the newest changes, oldest first."""
        ...


class _Lone:
    """A state in memory that belongs to one context."""

    limits = DEFAULT_LIMITS

    def __init__(self) -> None:
        self.state = State()
        self.lock = threading.RLock()
        self.changes: deque[dict[str, Any]] = deque(maxlen=HISTORY_OF_ALL)
        self.by_key: dict[str, deque[dict[str, Any]]] = {}

    def unit(self) -> Unit:
        now_us = int(datetime.now(UTC).timestamp() * 1_000_000)
        return Unit("outside", "state", self.state, iteration=0, now_us=now_us, seed=random.getrandbits(31))

    def apply(self, unit: Unit) -> None:
        for change in self.state.apply(unit.writes, 0, 0):
            row = {
                "timestamp": iso(unit.now_us),
                "operation": "delete" if change.new is None else "set",
                "key": change.key,
                "old_value": None if change.old is None else change.old.text,
                "new_value": None if change.new is None else change.new.text,
                "agent": None,
                "iteration": None,
            }
            self.changes.append(row)
            self.by_key.setdefault(change.key, deque(maxlen=HISTORY_OF_KEY)).append(row)

    def history(self, key: str | None) -> list[dict[str, Any]]:
        """Return the changes, of one key or all, with values of their own."""
        with self.lock:
            rows = list(self.changes if key is None else self.by_key.get(key, ()))
        texts = ("old_value", "new_value")
        return [{**row, **{name: None if row[name] is None else decode(row[name]) for name in texts}} for row in rows]


class StateContext:
    """Shared values by key: `context.set("temperature", 21.5)`, `context.get("temperature")`.

    Values are JSON, checked by exact type and copied both ways: what `get` returns can be changed without
    changing the state. May be used from any thread.
    """

    __slots__ = ("_agent", "_host", "_lone", "_prefix", "_unit", "name")

    def __init__(self, name: str = "global") -> None:
        self.name = name
        self._unit: Unit | None = None
        self._host: ContextHost | None = None
        self._lone: _Lone | None = None
        self._prefix = ""
        self._agent: str | None = None

    @classmethod
    def _of_unit(
        cls, unit: Unit, host: ContextHost | None, name: str = "global", agent: str | None = None
    ) -> StateContext:
        """The context that a hook gets."""
        context = cls(name)
        context._unit = unit
        context._host = host
        context._agent = agent
        return context

    # -- where a call goes --

    def _running_unit(self) -> Unit | None:
        unit = self._unit
        if unit is not None:
            if unit.closed:
                unit.check_open("context")
            return unit
        if self._host is not None:
            unit = current_unit.get()
            if unit is not None and self._host.owns(unit):
                if unit.closed:
                    unit.check_open("context")
                return unit
        return None

    def _memory(self) -> _Lone:
        if self._lone is None:
            self._lone = _Lone()
        return self._lone

    def _view(self) -> Unit:
        """A unit to read from."""
        unit = self._running_unit()
        if unit is not None:
            return unit
        return self._host.preview() if self._host is not None else self._memory().unit()

    def _do(self, name: str, action: Callable[[Unit], R]) -> R:
        """Carry out a change: in the running unit, or as a unit of its own."""
        unit = self._running_unit()
        if unit is not None:
            return action(unit)
        if self._host is not None:
            result = action(self._host.preview())
            self._host.submit(name, action)
            return result
        memory = self._memory()
        with memory.lock:
            unit = memory.unit()
            result = action(unit)
            memory.apply(unit)
            return result

    def _inside(self, what: str) -> Unit:
        unit = self._running_unit()
        if unit is None:
            raise NotAllowedHere(f"`{what}` belongs to a unit of work: use it on the context that a hook gets")
        return unit

    @property
    def _limits(self) -> Limits:
        return self._unit.limits if self._unit is not None else self._host.limits if self._host else DEFAULT_LIMITS

    def _writable(self, key: str) -> str:
        limits = self._limits
        full = check_key(key, limits)
        if self._prefix:
            full = check_key(self._prefix + full, limits)
        if full in VIRTUAL_KEYS:
            raise InvalidKey(f"state key {full!r} is kept by the loop and can't be written; choose another name")
        return full

    # -- reading --

    @overload
    def get(self, key: str) -> Any: ...

    @overload
    def get(self, key: str, default: D) -> D: ...

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of a key, or `default` where there is none."""
        text = self._view().read(self._prefix + key)
        if text is None:
            if key in VIRTUAL_KEYS and self._host is not None and not self._prefix:
                value = self._host.virtual(key)
                return default if value is None else value
            return default
        return decode(text)

    def has(self, key: str) -> bool:
        """True where the key has a value."""
        if self._view().read(self._prefix + key) is not None:
            return True
        return (
            key in VIRTUAL_KEYS and self._host is not None and not self._prefix and self._host.virtual(key) is not None
        )

    def get_all(self) -> dict[str, Any]:
        """Return every key with its value, a copy, in order of the keys."""
        cut = len(self._prefix)
        return {key[cut:]: decode(text) for key, text in self._view().items(self._prefix)}

    def get_history(self, key: str | None = None) -> list[dict[str, Any]]:
        """Return changes, oldest first: the last 100 of a key, without a key the last 1000 of all.

        Each is a dictionary with `timestamp`, `operation`, `key`, `old_value`, `new_value`, `agent`, `iteration`.
        Of a loop's state these are committed changes and those of the iteration so far.
        """
        limit = HISTORY_OF_ALL if key is None else HISTORY_OF_KEY
        if self._host is not None:
            rows = self._host.history(None if key is None else self._prefix + key, limit)
            return [row for row in rows if row["key"].startswith(self._prefix)]
        return self._memory().history(key)

    # -- changing --

    def set(self, key: str, value: Any) -> None:
        """Give a key a value. An equal value changes nothing.

        Raises InvalidValueType or InvalidValue, naming key and path, where the value is not JSON; InvalidKey where
        the key can't be used; UnitClosed where the unit has ended.
        """
        full = self._writable(key)
        text = encode(value, f"state key {full!r}", self._limits)
        unit = self._unit
        if unit is not None:
            unit.write(full, text)
        else:
            self._do("state.set", lambda unit: unit.write(full, text))

    def delete(self, key: str) -> bool:
        """Remove a key; True if it existed."""
        full = self._writable(key)

        def action(unit: Unit) -> bool:
            existed = unit.read(full) is not None
            if existed:
                unit.write(full, None)
            return existed

        return self._do("state.delete", action)

    def update(self, values: Mapping[str, Any]) -> None:
        """Set several keys; none of them where one of the values is refused."""
        texts = {}
        for key, value in values.items():
            full = self._writable(key)
            texts[full] = encode(value, f"state key {full!r}", self._limits)

        def action(unit: Unit) -> None:
            for key, text in texts.items():
                unit.write(key, text)

        self._do("state.update", action)

    def clear(self) -> None:
        """Remove every key; one change per key, so that history keeps the old values."""
        prefix = self._prefix

        def action(unit: Unit) -> None:
            for key, _ in list(unit.items(prefix)):
                unit.write(key, None)

        self._do("state.clear", action)

    def setdefault(self, key: str, default: Any = None) -> Any:
        """Return the value of a key; where there is none, set `default` and return it."""
        full = self._writable(key)
        text = encode(default, f"state key {full!r}", self._limits)

        def action(unit: Unit) -> str:
            found = unit.read(full)
            if found is None:
                unit.write(full, text)
                return text
            return found

        return decode(self._do("state.setdefault", action))

    def compare_and_set(self, key: str, expected: Any, new: Any) -> bool:
        """Set a key to `new` if its value equals `expected` (None: if it has none or null); True if it did.

        Raises NotAllowedHere outside a unit of work: use `await controller.transact(fn)`.
        """
        self._refuse_outside("compare_and_set")
        full = self._writable(key)
        wanted = encode(expected, f"expected value of state key {full!r}", self._limits)
        text = encode(new, f"state key {full!r}", self._limits)

        def action(unit: Unit) -> bool:
            found = unit.read(full)
            if not same(found if found is not None else "null", wanted):
                return False
            unit.write(full, text)
            return True

        return self._do("state.compare_and_set", action)

    def increment(self, key: str, by: float = 1) -> Any:
        """Add to a number (a missing key counts as 0) and return the result.

        Increments of units that ran at the same time are merged, not lost. Raises InvalidValueType where the
        value is no number; NotAllowedHere outside a unit of work: use `await controller.transact(fn)`.
        """
        self._refuse_outside("increment")
        full = self._writable(key)
        if type(by) not in (int, float):
            raise InvalidValueType(
                f"state key {full!r}: increment by {shown(by)} ({type_name(by)}), wanted is int or float"
            )
        encode(by, f"increment of state key {full!r}", self._limits)

        def action(unit: Unit) -> Any:
            found = unit.read(full)
            value = 0 if found is None else decode(found)
            if type(value) not in (int, float):
                raise InvalidValueType(
                    f"state key {full!r} holds {type(value).__name__}, not a number; it can't be incremented"
                )
            result = value + by
            unit.add(full, by, encode(result, f"state key {full!r}", self._limits))
            return result

        return self._do("state.increment", action)

    def _refuse_outside(self, what: str) -> None:
        if self._host is not None and self._running_unit() is None:
            raise NotAllowedHere(
                f"`{what}` outside a hook can't see what the loop is doing: use `await controller.transact(fn)`, "
                "whose fn(context) runs as a unit of work"
            )

    # -- the unit --

    @property
    def own(self) -> StateContext:
        """The agent's private part of the state: the same methods, its keys are `agent/NAME/…`."""
        if self._agent is None and self._unit is None:
            unit = self._running_unit()
            agent = None if unit is None else unit.subject
        else:
            agent = self._agent
        if agent is None:
            raise NotAllowedHere("`own` belongs to an agent: use it on the context that a hook of an agent gets")
        private = StateContext(self.name)
        private._unit, private._host, private._agent = self._unit, self._host, agent
        private._prefix = f"agent/{agent}/"
        return private

    def emit(
        self,
        type: str,
        data: Any = None,
        metadata: Mapping[str, Any] | None = None,
        *,
        after: float | str | timedelta | datetime | None = None,
    ) -> Event:
        """Emit an event; it exists only if this unit succeeds. Returns it, its `id` None until then.

        `after` (seconds, `"30m"` or a time) makes it happen then, also after a restart.
        """
        if self._unit is None and self._host is None:
            raise NotAllowedHere("a lone StateContext has no event bus: use EventBus().emit(…)")
        unit = self._running_unit()
        source = self._agent or ("outside" if unit is None else unit.subject)
        view = self._view() if unit is None else unit  # outside hooks it has the loop's clock
        event = Event(type, source, data, from_us(view.now_us), metadata)
        due = None if after is None else due_us(after, view.now_us)
        emission = Emission.of(
            event,
            self._limits,
            now_us=None if unit is None else view.now_us,
            due_us=due,
            is_counted=not isinstance(after, datetime),
        )
        if unit is not None:
            unit.emit(emission)
        else:
            self._do("events.emit", lambda unit: unit.emit(emission))
        return event

    @property
    def metrics(self) -> Metrics:
        """Records metrics in the channel of the agent: `context.metrics.gauge("temperature", 21.5)`."""
        from ael_store.runtime.metrics import Metrics

        unit = self._running_unit()
        return Metrics(self, self._agent or (unit.subject if unit is not None else "outside"))

    # -- work outside the loop --

    def submit(
        self,
        function: Callable[..., Any] | str,
        *args: Any,
        key: str | None = None,
        after: float | str | timedelta | datetime | None = None,
        priority: int = 5,
        limit: str | None = None,
    ) -> Task:
        """Have a function run outside the loop once this unit is committed: `function(task, *args)`.

        It runs at least once, at every attempt with the same `key`; its result comes to `on_task` of the agent, or as
        the event `task_finished` where there is no such hook, and takes effect exactly once. A key that the database
        knows stands for the task that has it, and nothing is submitted. Without one the task gets a key of its own.

        The function is a method of an agent (which gets the result), one at the top of a module, or the name of one;
        `@task` says how it is run. It starts `after` seconds, `"30m"` or a time, among those that wait in order of
        `priority` (0 to 10, higher first), and counts against `limit`. Raises InvalidTask for what could not be found
        again after a restart; InvalidValue or InvalidValueType for arguments that are not JSON.
        """
        from ael_store.runtime.task_function import PLAIN, policy_of, reference_of

        name, owner = reference_of(function)
        policy = PLAIN if isinstance(function, str) else policy_of(function)
        text = encode(list(args), f"the arguments of task {name!r}", self._limits)
        return self._submit(name, text, owner, key, after, priority, limit or policy.limit)

    def _submit_for(self, agent: str | None, function: Callable[..., Any], *args: Any, priority: int) -> Task:
        """Submit a function whose result is another agent's than its own."""
        from ael_store.runtime.task_function import policy_of, reference_of

        name, _ = reference_of(function)
        text = encode(list(args), f"the arguments of task {name!r}", self._limits)
        return self._submit(name, text, agent, None, None, priority, policy_of(function).limit)

    def ask(
        self,
        question: str,
        data: Any = None,
        *,
        choices: Sequence[str] | None = None,
        timeout: float | str | timedelta | datetime | None = None,
        default: str | None = None,
        key: str | None = None,
    ) -> Task:
        """Ask a person; the answer comes to `on_task`, like the result of a task, with what was asked and shown.

        `ael tasks answer ID CHOICE --by NAME` answers it, once. `choices` are the answers that are accepted, None
        accepts any text. After `timeout` (seconds, `"24h"` or a time) `default` is the answer; without a default the
        task has failed then. Without a timeout it waits for ever.
        """
        if type(question) is not str or not question.strip():
            raise InvalidTask(f"the question is {shown(question)}, wanted is a text")
        offered = None if choices is None else _choices(choices)
        if default is not None and (type(default) is not str or (offered is not None and default not in offered)):
            raise InvalidTask(f"the default answer is {shown(default)}, wanted is one of {offered or 'any text'}")
        asked = {"question": question, "data": data, "choices": offered, "default": default}
        text = encode(asked, "a question", self._limits)
        return self._submit(QUESTION, text, None, key, timeout, 5, None, question)

    def _submit(
        self,
        name: str,
        args: str,
        owner: str | None,
        key: str | None,
        after: float | str | timedelta | datetime | None,
        priority: int,
        limit: str | None,
        question: str | None = None,
    ) -> Task:
        if self._unit is None and self._host is None:
            raise NotAllowedHere("a lone StateContext has no loop that could run a task: use that of a loop")
        if type(priority) is not int or not 0 <= priority <= 10:
            raise InvalidTask(f"priority is {shown(priority)}, wanted is a whole number from 0 to 10")
        unit = self._running_unit()
        agent = owner or self._agent or (unit.subject if unit is not None and unit.kind != "outside" else None)
        now_us = self._view().now_us
        if key is None and unit is not None:
            key = f"{unit.subject}/{unit.now_us:x}-{unit.seed:x}-{len(unit.submissions)}"
        elif key is None:
            key = f"outside/{os.urandom(16).hex()}"
        check_task_text(key, "the key of a task")
        if limit is not None:
            check_task_text(limit, "the limit of a task")
        record = new_record(
            name=name,
            key=key,
            args=args,
            priority=priority,
            limit_name=limit,
            due_us=None if after is None else due_us(after, now_us),
            kind="function" if question is None else "question",
            question=question,
            now_us=now_us,
        )
        submission = Submission(Task(record), agent, not isinstance(after, datetime))
        self._do("tasks.submit", lambda unit: unit.submit(submission))
        return submission.task

    @property
    def iteration(self) -> int:
        """The number of the iteration this unit belongs to."""
        return self._inside("iteration").iteration

    @property
    def now(self) -> datetime:
        """The time of this unit, in UTC: the same whenever it is asked for."""
        return from_us(self._inside("now").now_us)

    @property
    def random(self) -> random.Random:
        """A source of randomness with a recorded seed of its own for this unit."""
        return self._inside("random").random

    @property
    def resumed(self) -> bool:
        """True where the database had an earlier run."""
        return self._inside("resumed").resumed

    # -- files --

    def to_json(self, indent: int | None = 2) -> str:
        """Return every key with its value as one JSON object."""
        import json

        return json.dumps(self.get_all(), ensure_ascii=False, indent=indent)

    def from_json(self, text: str, *, merge: bool = False) -> None:
        """Take every key of a JSON object; keys that it does not name are removed unless `merge` is True.

        Nothing changes where the text is not an object of storable values.
        """
        import json

        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InvalidValue(f"this is no JSON: {error}") from None
        if not isinstance(values, dict):
            raise InvalidValueType(f"the JSON is {type(values).__name__}, wanted is an object with one entry per key")
        texts = {}
        for key, value in values.items():
            full = self._writable(key)
            texts[full] = encode(value, f"state key {full!r}", self._limits)
        prefix = self._prefix

        def action(unit: Unit) -> None:
            if not merge:
                for key, _ in list(unit.items(prefix)):
                    if key not in texts:
                        unit.write(key, None)
            for key, text in texts.items():
                unit.write(key, text)

        self._do("state.from_json", action)

    def save_to_file(self, path: str | os.PathLike[str]) -> None:
        """Write every key to a JSON file, whole or not at all (mode 0600)."""
        target = Path(path)
        descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(self.to_json())
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, target)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise

    def load_from_file(self, path: str | os.PathLike[str], *, merge: bool = False) -> None:
        """Take every key of a JSON file that `save_to_file` wrote."""
        self.from_json(Path(path).read_text(encoding="utf-8"), merge=merge)

    def get_stats(self) -> dict[str, Any]:
        """Return name and number of keys."""
        keys = sum(1 for _ in self._view().items(self._prefix))
        return {
            "name": self.name,
            "total_keys": keys,
            "history_size": None if self._host else len(self._memory().changes),
        }

    # -- as a mapping, for reading --

    def __contains__(self, key: str) -> bool:
        return self.has(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.get_all())

    def __repr__(self) -> str:
        kind = "of a unit" if self._unit is not None else "of a loop" if self._host is not None else "in memory"
        return f"<StateContext {self.name!r} {kind}>"


def _choices(choices: Sequence[str]) -> list[str]:
    """Return the answers that are offered; raises InvalidTask."""
    offered = [] if isinstance(choices, str) else list(choices)
    if not offered or len(set(offered)) < len(offered) or not all(type(c) is str and c.isprintable() for c in offered):
        raise InvalidTask(f"choices is {shown(choices)}, wanted are different texts, like ('yes', 'no')")
    return offered

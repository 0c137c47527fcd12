"""The state and the bus do what a dict and a list do: hypothesis compares them step by step."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, precondition, rule

from ael_store import EventBus, StateContext
from ael_store.errors import InvalidValueType
from ael_store.model.event import Event
from ael_store.model.records import Resumed
from ael_store.model.state import State
from ael_store.model.unit import Unit
from ael_store.model.values import decode, encode, same
from ael_store.runtime.journal import Journal

KEYS = st.sampled_from(["a", "b", "c", "agent/x/a"])
VALUES = st.sampled_from([None, 0, 1, 2, 1.0, True, "", "s", [], [1], {"k": [1, {"x": None}]}, {"b": 1, "a": 2}])
NUMBERS = st.sampled_from([1, -1, 5, 0.5, 0])
MISSING = object()


def equal(one: Any, other: Any) -> bool:
    return one is not MISSING and other is not MISSING and same(encode(one, "m"), encode(other, "m"))


class LoneContext(RuleBasedStateMachine):
    """A `StateContext` of its own against a dict and a list of changes."""

    def __init__(self) -> None:
        super().__init__()
        self.context = StateContext()
        self.model: dict[str, Any] = {}
        self.history: list[tuple[str, str, Any, Any]] = []

    def put(self, key: str, value: Any) -> None:
        old = self.model.get(key, MISSING)
        if not equal(old, value):
            self.history.append(("set", key, None if old is MISSING else old, value))
            self.model[key] = value

    def drop(self, key: str) -> bool:
        if key not in self.model:
            return False
        self.history.append(("delete", key, self.model.pop(key), None))
        return True

    @rule(key=KEYS, value=VALUES)
    def set(self, key: str, value: Any) -> None:
        self.context.set(key, value)
        self.put(key, value)

    @rule(key=KEYS)
    def delete(self, key: str) -> None:
        assert self.context.delete(key) is self.drop(key)

    @rule(values=st.dictionaries(KEYS, VALUES, max_size=3))
    def update(self, values: dict[str, Any]) -> None:
        self.context.update(values)
        for key, value in values.items():
            self.put(key, value)

    @rule(values=st.dictionaries(KEYS, VALUES, max_size=2))
    def refused_update_changes_nothing(self, values: dict[str, Any]) -> None:
        with pytest.raises(InvalidValueType):
            self.context.update({**values, "wrong": {1}})

    @rule()
    def clear(self) -> None:
        self.context.clear()
        for key in sorted(self.model):
            self.drop(key)

    @rule(key=KEYS, value=VALUES)
    def setdefault(self, key: str, value: Any) -> None:
        expected = self.model.get(key, value)
        assert equal(self.context.setdefault(key, value), expected)
        self.put(key, expected)

    @rule(key=KEYS, expected=VALUES, new=VALUES)
    def compare_and_set(self, key: str, expected: Any, new: Any) -> None:
        fits = equal(self.model.get(key), expected)
        assert self.context.compare_and_set(key, expected, new) is fits
        if fits:
            self.put(key, new)

    @rule(key=KEYS, by=NUMBERS)
    def increment(self, key: str, by: float) -> None:
        value = self.model.get(key, 0)
        if type(value) in (int, float):
            assert equal(self.context.increment(key, by), value + by)
            self.put(key, value + by)
        else:
            with pytest.raises(InvalidValueType, match=repr(key)):
                self.context.increment(key, by)

    @rule(values=st.dictionaries(KEYS, VALUES, max_size=3), merge=st.booleans())
    def from_json(self, values: dict[str, Any], merge: bool) -> None:
        self.context.from_json(json.dumps(values), merge=merge)
        for key in sorted(self.model):
            if not merge and key not in values:
                self.drop(key)
        for key, value in values.items():
            self.put(key, value)

    @rule(key=KEYS)
    def what_is_returned_belongs_to_the_caller(self, key: str) -> None:
        returned: list[Any] = [self.context.get(key), self.context.get_all().get(key), self.context.get_history()]
        for found in returned:
            if isinstance(found, list):
                found.append("mine")
            elif isinstance(found, dict):
                found["mine"] = 1
        for row in self.context.get_history(key):
            for value in (row["old_value"], row["new_value"]):
                if isinstance(value, list):
                    value.append("mine")
            row["key"] = "mine"

    @invariant()
    def agrees(self) -> None:
        context = self.context
        assert equal(context.get_all(), self.model)
        assert list(context.get_all()) == sorted(self.model) == list(context)
        assert equal(json.loads(context.to_json()), self.model)
        assert context.get_stats()["total_keys"] == len(self.model)
        for key in ("a", "agent/x/a", "never"):
            assert context.has(key) is (key in context) is (key in self.model)
            assert (
                context.get(key, MISSING) is MISSING
                if key not in self.model
                else equal(context.get(key), self.model[key])
            )
            assert self.rows(context.get_history(key)) == [row for row in self.history if row[1] == key][-100:]
        assert self.rows(context.get_history()) == self.history[-1000:]

    @staticmethod
    def rows(history: list[dict[str, Any]]) -> list[tuple[str, str, Any, Any]]:
        return [(row["operation"], row["key"], row["old_value"], row["new_value"]) for row in history]


def empty_journal() -> Journal:
    numbers: dict[str, Any] = dict.fromkeys(
        ("token", "iteration", "clock", "commit_id", "tick_id", "change_id", "event_id", "run_id", "agent_id"), 0
    )
    more: dict[str, Any] = dict.fromkeys(("subscription_id", "delayed_id", "dead_letter_id", "command_id"), 0)
    resumed = Resumed(
        cells={},
        agents={},
        stats={},
        subscriptions=[],
        requested=[],
        delayed=[],
        schedules={},
        positions={},
        last_run=None,
        last_started_us=None,
        **numbers,
        **more,
    )
    return Journal(resumed, State(resumed.cells), 1)


class Model:
    """What one unit does, on plain dicts."""

    def __init__(self, base: dict[str, Any]) -> None:
        self.base = base
        self.writes: dict[str, Any] = {}
        self.increments: dict[str, float] = {}
        self.changed_by_others: set[str] = set()

    def seen(self) -> dict[str, Any]:
        merged = {**self.base, **self.writes}
        return {key: value for key, value in merged.items() if value is not MISSING}

    def write(self, key: str, value: Any) -> None:
        self.writes[key] = value
        self.increments.pop(key, None)


class UnitsAndShadows(RuleBasedStateMachine):
    """Units that run one after another, units in the background that keep their moment, and outside readers who
    keep to the last commit, against copies of dicts."""

    units = Bundle("units")

    @initialize()
    def begin(self) -> None:
        self.journal = empty_journal()
        self.state = self.journal.state
        self.now: dict[str, Any] = {}
        self.committed: dict[str, Any] = {}
        self.open: list[tuple[Unit, Model]] = []
        self.number = 0

    def new_unit(self) -> tuple[Unit, StateContext]:
        self.number += 1
        unit = Unit("tick", f"u{self.number}", self.state, iteration=1, now_us=self.number, seed=self.number)
        return unit, StateContext._of_unit(unit, None)

    @rule(target=units)
    def begin_in_the_background(self) -> Any:
        unit, context = self.new_unit()
        unit.shadow = self.state.open_shadow()
        model = Model(dict(self.now))
        self.open.append((unit, model))
        return unit, context, model

    @rule(unit=units, key=KEYS, value=VALUES)
    def write(self, unit: Any, key: str, value: Any) -> None:
        _, context, model = unit
        context.set(key, value)
        model.write(key, value)

    @rule(unit=units, key=KEYS)
    def delete(self, unit: Any, key: str) -> None:
        _, context, model = unit
        existed = key in model.seen()
        assert context.delete(key) is existed
        if existed:
            model.write(key, MISSING)

    @rule(unit=units, key=KEYS, by=NUMBERS)
    def increment(self, unit: Any, key: str, by: float) -> None:
        _, context, model = unit
        value = model.seen().get(key, 0)
        if type(value) not in (int, float):
            with pytest.raises(InvalidValueType):
                context.increment(key, by)
            return
        assert equal(context.increment(key, by), value + by)
        if key in model.increments or key not in model.writes:
            model.increments[key] = model.increments.get(key, 0) + by
        model.writes[key] = value + by

    @rule(key=KEYS, value=VALUES, gone=st.booleans())
    def another_unit_runs(self, key: str, value: Any, gone: bool) -> None:
        unit, context = self.new_unit()
        if gone:
            context.delete(key)
        else:
            context.set(key, value)
        self.apply(unit, {key: MISSING if gone else value})

    @rule(unit=consumes(units))
    def end(self, unit: Any) -> None:
        ended, _, model = unit
        self.state.close_shadow(ended.shadow)
        self.open = [item for item in self.open if item[0] is not ended]
        clashing = {key for key in model.writes if key in model.changed_by_others and not self.merges(model, key)}

        found = ended.conflict()

        assert (found in clashing) if clashing else found is None
        if found is None:
            merged = {
                key: self.now.get(key, 0) + by for key, by in model.increments.items() if key in model.changed_by_others
            }
            self.apply(ended, {**model.writes, **merged})

    def merges(self, model: Model, key: str) -> bool:
        return key in model.increments and type(self.now.get(key, 0)) in (int, float)

    def apply(self, unit: Unit, writes: dict[str, Any]) -> None:
        unit.closed = True
        before = len(self.journal.commit.changes)
        self.journal.apply(unit, 0)
        changes = self.journal.commit.changes[before:]
        expected = {}
        for key, value in writes.items():
            old = self.now.get(key, MISSING)
            if value is MISSING if old is MISSING else value is not MISSING and equal(old, value):
                continue
            expected[key] = (old, value)
            if value is MISSING:
                del self.now[key]
            else:
                self.now[key] = value
            for _, model in self.open:
                model.changed_by_others.add(key)
        assert {change.key: self.ends(change) for change in changes} == expected
        assert [change.id for change in changes] == list(
            range(self.state.change_id - len(changes) + 1, self.state.change_id + 1)
        )

    @staticmethod
    def ends(change: Any) -> tuple[Any, Any]:
        return tuple(MISSING if cell is None else decode(cell.text) for cell in (change.old, change.new))  # type: ignore[return-value]

    @precondition(lambda self: self.journal.commit.changes)
    @rule()
    def commit(self) -> None:
        self.journal.take("iteration", 1)
        self.journal.done()
        self.committed = dict(self.now)

    @invariant()
    def everyone_sees_their_moment(self) -> None:
        assert equal({key: decode(text) for key, text in self.state.items()}, self.now)
        outside = Unit("outside", "outside", self.state, iteration=0, now_us=0, seed=0)
        outside.shadow = self.state.uncommitted
        assert equal(StateContext._of_unit(outside, None).get_all(), self.committed)
        for unit, model in self.open:
            context = StateContext._of_unit(unit, None)
            assert equal(context.get_all(), model.seen())
            for key in ("a", "b", "never"):
                assert context.has(key) is (key in model.seen())


def matches(pattern: str, text: str) -> bool:
    if not pattern:
        return not text
    if pattern[0] == "*":
        return any(matches(pattern[1:], text[skip:]) for skip in range(len(text) + 1))
    return bool(text) and pattern[0] == text[0] and matches(pattern[1:], text[1:])


class LoneBus(RuleBasedStateMachine):
    """An `EventBus` of its own against lists."""

    types = st.text("ab.[?", min_size=1, max_size=3)
    patterns = st.text("ab.[?*", min_size=1, max_size=4)
    names = st.sampled_from(["x", "y", "z"])

    def __init__(self) -> None:
        super().__init__()
        self.bus = EventBus()
        self.subscribed: dict[tuple[str, str], int] = {}
        self.log: list[tuple[str, str, Any]] = []
        self.called: list[tuple[int, str, Any]] = []
        self.expected: list[tuple[int, str, Any]] = []
        self.number = 0

    def callback(self, number: int, broken: bool) -> Callable[[Event], None]:
        def call(event: Event) -> None:
            self.called.append((number, event.type, event.data))
            if broken:
                raise ValueError("a broken callback")

        return call

    @rule(pattern=patterns, name=names, broken=st.booleans())
    def subscribe(self, pattern: str, name: str, broken: bool) -> None:
        self.number += 1
        self.bus.subscribe(pattern, name, self.callback(self.number, broken))
        self.subscribed[name, pattern] = self.number

    @rule(pattern=patterns, name=names)
    def unsubscribe(self, pattern: str, name: str) -> None:
        assert self.bus.unsubscribe(pattern, name) is (self.subscribed.pop((name, pattern), None) is not None)

    @rule(name=names)
    def unsubscribe_all(self, name: str) -> None:
        mine = [key for key in self.subscribed if key[0] == name]
        assert self.bus.unsubscribe_all(name) == len(mine)
        for key in mine:
            del self.subscribed[key]

    @rule(type=types, name=names, data=VALUES)
    def emit(self, type: str, name: str, data: Any) -> None:
        event = self.bus.emit(type, name, data)
        assert (event.type, event.source, event.data) == (type, name, data)
        self.log.append((type, name, data))
        wanted = [number for (_, pattern), number in self.subscribed.items() if matches(pattern, type)]
        self.expected += [(number, type, data) for number in wanted]

    @rule(type=types, name=names)
    def publish(self, type: str, name: str) -> None:
        self.bus.publish({"type": type, "source": name})
        self.log.append((type, name, None))
        wanted = [number for (_, pattern), number in self.subscribed.items() if matches(pattern, type)]
        self.expected += [(number, type, None) for number in wanted]

    @rule()
    def clear(self) -> None:
        self.bus.clear_history()
        self.log.clear()

    @rule(type=types, name=names)
    def look_back(self, type: str, name: str) -> None:
        history = self.bus.get_event_history
        assert [event.data for event in history(type)] == [row[2] for row in self.log if row[0] == type]
        assert [event.data for event in history(source=name)] == [row[2] for row in self.log if row[1] == name]
        assert [event.type for event in history(type, name)] == [row[0] for row in self.log if row[:2] == (type, name)]

    @invariant()
    def agrees(self) -> None:
        assert self.called == self.expected
        events = self.bus.get_event_history()
        assert [(event.type, event.source, event.data) for event in events] == self.log[-1000:]
        numbers = [event.id for event in events]
        assert numbers == sorted(numbers, key=lambda number: number or 0)
        assert self.bus.get_stats()["total_subscribers"] == len(self.subscribed)


for machine, examples in ((LoneContext, 40), (UnitsAndShadows, 80), (LoneBus, 40)):
    machine.TestCase.settings = settings(max_examples=examples, stateful_step_count=30, deadline=None)

TestLoneContext = LoneContext.TestCase
TestUnitsAndShadows = UnitsAndShadows.TestCase
TestLoneBus = LoneBus.TestCase


def test_history_of_a_key_is_its_last_hundred_and_of_all_the_last_thousand() -> None:
    context = StateContext()
    for number in range(1200):
        context.set("often", number)
        if number in (0, 1):
            context.set("rarely", number)

    assert [row["new_value"] for row in context.get_history("often")] == list(range(1100, 1200))
    assert [row["new_value"] for row in context.get_history("rarely")] == [0, 1]
    assert len(context.get_history()) == 1000


def test_history_of_a_bus_is_its_last_thousand() -> None:
    bus = EventBus()
    for number in range(1200):
        bus.emit("x", "test", number)

    assert [event.data for event in bus.get_event_history()] == list(range(200, 1200))
    assert bus.get_stats()["total_events"] == 1200


def test_file_is_whole_or_not_there_and_reads_back_the_same(tmp_path: Any) -> None:
    context, target = StateContext(), tmp_path / "state.json"
    context.update({"a": [1, 2.0, None, "č"], "b": {"c": True}})
    context.save_to_file(target)
    context.set("a", 0)
    other = StateContext()
    other.load_from_file(target)

    assert other.get_all() == {"a": [1, 2.0, None, "č"], "b": {"c": True}}
    assert target.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [target]
    with pytest.raises(OSError):
        context.save_to_file(tmp_path / "missing" / "state.json")


@pytest.mark.parametrize("text", ["", "[1]", "{", "5", '{"a": NaN}', '{"a": 1, "": 2}', "{'a': 1}", "[" * 100_000])
def test_import_of_what_is_no_object_of_values_changes_nothing(text: str) -> None:
    context = StateContext()
    context.set("kept", 1)

    with pytest.raises((TypeError, ValueError)):
        context.from_json(text)

    assert context.get_all() == {"kept": 1}


async def test_coroutine_callbacks_of_a_lone_bus_are_awaited() -> None:
    import asyncio

    heard: list[int] = []
    done = asyncio.Event()

    async def callback(event: Event) -> None:
        await asyncio.sleep(0)
        heard.append(event.data)
        done.set()

    bus = EventBus()
    bus.subscribe("x", "test", callback)
    bus.emit("x", "test", 1)
    await asyncio.wait_for(done.wait(), 10)

    assert heard == [1]


def test_coroutine_callbacks_of_a_lone_bus_are_run_without_an_event_loop_too() -> None:
    heard: list[int] = []

    async def callback(event: Event) -> None:
        heard.append(event.data)

    bus = EventBus()
    bus.subscribe("x", "test", callback)
    bus.emit("x", "test", 1)

    assert heard == [1]

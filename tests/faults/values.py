"""Malformed and hostile values, keys, events and commands, through every way into a running loop.

Each is either stored exactly, which is read back by the API and by SQL, or refused by an error that names the key,
the path inside the value and the type, with nothing of its unit applied. What can be stored is said here once more,
independently of the program. The loop must not notice any of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import json
import logging
import socket
import threading
from collections import OrderedDict, UserDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

from ael_store import AelError, StateContext, connect
from ael_store.model.values import Limits
from ael_store.runtime.context import VIRTUAL_KEYS
from ael_store.runtime.control import HEALTH
from ael_store.store.lock import current_holder
from ael_store.store.verify import verify
from tests.acceptance.database import ask
from tests.faults.invariants import tally
from tests.faults.trial import Report, Tell
from tests.loops import agent, controller_on

__all__ = ["run"]

USUAL = 2000
PATIENCE_S = 60.0
LIMITS = Limits(key_bytes=64, value_bytes=4096, event_bytes=2048, depth=20)
"""Small, so that the limits are met often."""

SETTINGS = {"key_bytes": 64, "value_bytes": 4096, "event_bytes": 2048, "value_depth": 20}


# -- what is hostile ---------------------------------------------------------------------------------


class Text(str):
    pass


class Number(int):
    pass


class Mapping(dict[str, int]):
    pass


class Colour(enum.IntEnum):
    RED = 1


class Liar:
    """Says that it is a text, equals everything, and can't be shown."""

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return str

    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        raise RuntimeError("no hash")

    def __repr__(self) -> str:
        raise RuntimeError("no repr")

    def __str__(self) -> str:
        raise RuntimeError("no str")

    def __iter__(self) -> Any:
        raise RuntimeError("no items")


@dataclass
class Record:
    a: int = 1


class Key:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


def loop_of_lists() -> Any:
    made: list[Any] = []
    made.append(made)
    return made


def loop_of_dicts() -> Any:
    made: dict[str, Any] = {}
    made["again"] = [made]
    return made


def deep(levels: int) -> Any:
    made: Any = 1
    for _ in range(levels):
        made = [made]
    return made


ODD: tuple[Callable[[], Any], ...] = (
    lambda: float("nan"),
    lambda: float("inf"),
    lambda: -0.0,
    lambda: 1e308,
    lambda: 5e-324,
    lambda: 2**63 - 1,
    lambda: 2**63,
    lambda: -(2**63),
    lambda: -(2**63) - 1,
    lambda: 10**5000,
    lambda: "\ud800",
    lambda: "\udfff\ud800",
    lambda: "a\0b",
    lambda: "\x01\x1b[2J\u2028\u202e\ufeff",
    lambda: "e\u0301",
    lambda: "é",
    lambda: "x" * 4094,
    lambda: "x" * 4095,
    lambda: "č" * 2047,
    lambda: deep(19),
    lambda: deep(20),
    lambda: deep(21),
    lambda: deep(100_000),
    loop_of_lists,
    loop_of_dicts,
    lambda: (1, 2),
    lambda: {1, 2},
    lambda: b"bytes",
    lambda: bytearray(b"bytes"),
    lambda: datetime(2026, 1, 1, tzinfo=UTC),
    lambda: Decimal("1.5"),
    lambda: UUID(int=1),
    lambda: Text("text"),
    lambda: Number(1),
    lambda: Mapping(a=1),
    lambda: OrderedDict(a=1),
    lambda: UserDict(a=1),
    lambda: Colour.RED,
    lambda: Record(),
    lambda: Liar(),
    lambda: {1: "a"},
    lambda: {None: "a"},
    lambda: {Text("a"): 1},
    lambda: {Key(): 1},
    lambda: {10**5000: 1},
    lambda: {"\ud800": 1},
    lambda: {"a\0": 1},
    lambda: {"é": 1, "e\u0301": 2},
    lambda: object,
    lambda: ...,
    lambda: 1j,
    lambda: range(3),
    lambda: iter([1]),
    lambda: memoryview(b"a"),
)

KEYS = (
    "../../etc/passwd",
    "/dev/null",
    "v_state",
    "state",
    "sqlite_schema",
    "x'; DROP TABLE state; --",
    'x" OR 1=1',
    "%",
    "_",
    "*",
    "[a-z]?",
    "a*b",
    "agent/other/secret",
    "ael_status",
    "e\u0301",
    "é",
    "日本語",
    "x" * 64,
    "x" * 65,
    "č" * 32,
    "č" * 33,
    "",
    " ",
    "\n",
    "a\x1b[2Jb",
    "\u202eevil",
    "\ud800",
    "a\0b",
    "{}",
    "$.a",
    "--",
    ":memory:",
    "?mode=rwc",
)
NO_KEYS: tuple[Callable[[], Any], ...] = (
    lambda: None,
    lambda: 5,
    lambda: b"key",
    lambda: ("a",),
    lambda: Text("key"),
    lambda: 10**5000,
    lambda: ["a"],
    Key,
)


def values() -> st.SearchStrategy[Any]:
    odd = st.sampled_from(ODD).map(lambda make: make())
    plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30)
    return st.recursive(
        odd | plain,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
        max_leaves=8,
    )


def keys() -> st.SearchStrategy[Any]:
    return st.sampled_from(KEYS) | st.text(min_size=1, max_size=20) | st.sampled_from(NO_KEYS).map(lambda make: make())


# -- what can be stored ------------------------------------------------------------------------------


def fault(value: Any, depth: int = 0) -> str | None:
    """Return the path to what can't be stored, None where all can be."""
    kind = type(value)
    if value is None or kind is bool:
        return None
    if kind is int:
        return None if -(2**63) <= value < 2**63 else ""
    if kind is float:
        return None if abs(value) <= 1.7976931348623157e308 else ""
    if kind is str:
        return "" if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value) else None
    if kind not in (list, dict) or depth >= LIMITS.depth:
        return ""
    for name, item in enumerate(value) if kind is list else value.items():
        if kind is dict and (type(name) is not str or fault(name) is not None):
            return ""
        inner = fault(item, depth + 1)
        if inner is not None:
            return f"[{name!r}]{inner}"
    return None


def fits(value: Any, limit: int) -> bool:
    return len(json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()) <= limit


def good_key(key: Any) -> bool:
    return (
        type(key) is str
        and key != ""
        and key.isprintable()
        and len(key.encode()) <= LIMITS.key_bytes
        and key not in VIRTUAL_KEYS
    )


def good_type(name: Any) -> bool:
    return type(name) is str and 0 < len(name) <= 200 and name.isprintable() and "*" not in name


def alike(one: Any, other: Any) -> bool:
    """True where two values are the same, types, signs and order of keys included."""
    if type(one) is not type(other):
        return False
    if type(one) is dict:
        return list(one) == list(other) and all(alike(one[key], other[key]) for key in one)
    if type(one) is list:
        return len(one) == len(other) and all(map(alike, one, other))
    return repr(one) == repr(other) if type(one) is float else bool(one == other)


# -- the loop and the ways into it -------------------------------------------------------------------


class Target:
    """A running loop, and every way to put something into it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: list[str] = []
        self.stored = self.refused = 0
        self._begun = threading.Event()
        self._loop = asyncio.new_event_loop()
        self.controller = controller_on(path, agent("bystander"), tick_rate=0.02, **SETTINGS)
        self.controller.observe(lambda _summary: self._begun.set())
        self._ended: Future[None] = Future()
        self._thread = threading.Thread(target=self._live)

    def __enter__(self) -> Target:
        logging.getLogger("ael_store").setLevel(logging.CRITICAL)  # it tells of each refusal
        self._thread.start()
        assert self._begun.wait(PATIENCE_S), "the loop does not begin"
        self.client = connect(self.path)
        holder = current_holder(self.path)
        assert holder is not None and holder.socket is not None
        self.socket = holder.socket
        return self

    def __exit__(self, *_error: object) -> None:
        self.client.close()
        if not self._ended.done():
            asyncio.run_coroutine_threadsafe(self.controller.stop(), self._loop)
        self._thread.join(PATIENCE_S)
        logging.getLogger("ael_store").setLevel(logging.NOTSET)
        self._ended.result(0)

    def _live(self) -> None:
        try:
            self._loop.run_until_complete(self.controller.start())
            self._loop.run_until_complete(asyncio.wait(asyncio.all_tasks(self._loop)))  # who has stopped it
            self._ended.set_result(None)
        except BaseException as error:
            self._ended.set_exception(error)
            self._begun.set()

    def transact(self, function: Callable[[StateContext], Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(self.controller.transact(function), self._loop).result(PATIENCE_S)

    # -- ways --

    def set(self, key: Any, value: Any) -> None:
        self.transact(lambda context: context.set(key, value))

    def update(self, key: Any, value: Any) -> None:
        self.transact(lambda context: context.update({"beside": 1, key: value}))

    def setdefault(self, key: Any, value: Any) -> None:
        def put(context: StateContext) -> None:
            if type(key) is str and key not in VIRTUAL_KEYS:
                context.delete(key)
            context.setdefault(key, value)

        self.transact(put)

    def compare_and_set(self, key: Any, value: Any) -> None:
        self.transact(lambda context: context.compare_and_set(key, context.get(key) if type(key) is str else 1, value))

    def from_outside(self, key: Any, value: Any) -> None:
        self.controller.state_context.set(key, value)
        self.transact(lambda context: None)

    def by_client(self, key: Any, value: Any) -> None:
        self.client.set(key, value)

    def by_json(self, key: Any, value: Any) -> None:
        text = json.dumps({key: value})
        self.transact(lambda context: context.from_json(text, merge=True))

    def by_socket(self, key: Any, value: Any) -> None:
        frame = json.dumps({"command": "state.set", "arguments": {"key": key, "value": value}})
        answer = self.send(frame.encode() + b"\n")
        if not answer["ok"]:
            kind = TypeError if answer["type"] == "InvalidValueType" else ValueError
            raise type("Refused", (AelError, kind), {})(answer["error"])

    def send(self, frame: bytes) -> Any:
        """Send raw bytes to the control socket; returns its answer, None where there is none."""
        if self._ended.done():
            self._ended.result()
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(PATIENCE_S)
            connection.connect(self.socket)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it is too long, and was told so
                connection.sendall(frame)
                connection.shutdown(socket.SHUT_WR)
            try:
                with connection.makefile("rb") as file:
                    line = file.readline()
            except ConnectionResetError:
                return None
        return json.loads(line) if line else None

    # -- one trial --

    def try_value(self, way: str, key: Any, value: Any) -> None:
        through_json = way in ("by_json", "by_socket")
        if through_json:
            try:  # what a stranger's program sends is what JSON makes of it
                key, value = json.loads(json.dumps([key, value]))
                json.dumps({key: value})
            except (TypeError, ValueError, RecursionError):
                return
            if way == "by_json" and type(key) is not str:
                return
        elif way == "update":
            try:
                hash(key)
            except Exception:
                return
        where = fault(value)
        wanted = good_key(key) and where is None and fits(value, LIMITS.value_bytes)
        before = self._row(key)
        beside = self._row("beside")
        try:
            getattr(self, way)(key, value)
        except Exception as error:
            self.refused += 1
            self._check_refusal(way, key, where, wanted, error)
            if self._row(key) != before or self._row("beside") != beside:
                self.found.append(f"silent: {way}: what was refused has left something in {key!r:.80}")
            return
        self.stored += 1
        if not wanted:
            self.found.append(f"silent: {way}: {key!r:.80} was accepted, fault at {where!r}")
            return
        self._check_stored(way, key, value)

    def _check_refusal(self, way: str, key: Any, where: str | None, wanted: bool, error: Exception) -> None:
        text = str(error)
        said = f"{way}: refused with {type(error).__name__}: {text[:200]!r}"
        if wanted:
            self.found.append(f"lost: {said}, could be stored")
        elif not (isinstance(error, AelError) and isinstance(error, TypeError | ValueError)):
            self.found.append(f"silent: {said}, which is no clear error")
        elif not text.isprintable():
            self.found.append(f"silent: {said}, which can't be printed")
        elif good_key(key) and where and len(where) < 60 and where.isprintable() and where not in text:
            self.found.append(f"silent: {said}, without the path {where}")
        elif "state key" not in text:
            self.found.append(f"silent: {said}, without the key")

    def _check_stored(self, way: str, key: str, value: Any) -> None:
        again = self.client.get(key)
        if not alike(again, value):
            self.found.append(f"silent: {way}: {value!r:.200} became {again!r:.200}")
        row = ask(self.path, "SELECT value, json_valid(value) FROM v_state WHERE key = ?", key)
        if len(row) != 1 or row[0][1] != 1 or not alike(json.loads(row[0][0]), value):
            self.found.append(f"silent: {way}: SQL says {row!r:.200}, it was {value!r:.200}")

    def try_event(self, way: str, name: Any, value: Any) -> None:
        more = {"note": value}  # one level deeper, and larger than the data
        wanted = good_type(name) and fault(more) is None and fits(more, LIMITS.event_bytes)
        last = ask(self.path, "SELECT max(id) FROM v_events")[0][0]
        try:
            if way == "emit":
                self.transact(lambda context: context.emit(name, value, more))
            else:
                self.client.emit(name, value, more)
        except Exception as error:
            self.refused += 1
            if wanted:
                self.found.append(f"lost: {way}: {name!r:.80} was refused: {error}")
            elif not isinstance(error, AelError) or not str(error).isprintable():
                self.found.append(f"silent: {way}: refused with {type(error).__name__}: {error}"[:300])
            return
        self.stored += 1
        rows = ask(self.path, "SELECT type, data, metadata FROM v_events WHERE id > ? AND type = ?", last, name)
        stored = [] if not wanted else [(name, value, more)]
        found = [(kind, None if data is None else json.loads(data), json.loads(about)) for kind, data, about in rows]
        if len(found) != len(stored) or not all(map(alike, map(list, found), map(list, stored))):
            self.found.append(f"silent: {way}: {stored!r:.200} became {found!r:.200}")

    def try_frame(self, frame: bytes) -> None:
        answer = self.send(frame)
        if answer is not None and answer.get("ok") and b"loop.health" not in frame:
            self.found.append(f"silent: the frame {frame[:80]!r} was carried out: {answer}")
        if not self.send(json.dumps({"command": HEALTH}).encode() + b"\n")["ok"]:
            self.found.append(f"silent: after the frame {frame[:80]!r} the loop does not answer")

    def _row(self, key: Any) -> Any:
        try:
            return ask(self.path, "SELECT value, version FROM v_state WHERE key = ?", key) if good_key(key) else None
        except UnicodeEncodeError:
            return None


WAYS = ("set", "update", "setdefault", "compare_and_set", "from_outside", "by_client", "by_json", "by_socket")

FRAMES = (
    b"",
    b"\n",
    b"\0\n",
    b"{",
    b"{}\n",
    b"[]\n",
    b"null\n",
    b'"state.set"\n',
    b"\xff\xfe\n",
    b"[" * 100_000 + b"\n",
    b'{"a":' * 50_000 + b"\n",
    b"x" * 300_000 + b"\n",
    b"x" * 300_000,
    b'{"command": "state.set", "arguments": {"key": "cut',
    b'{"command": 5}\n',
    b'{"command": "state.set", "arguments": []}\n',
    b'{"command": "state.set", "arguments": {"desk": 1, "key": "a", "value": 1}}\n',
    b'{"command": "state.set", "arguments": {"key": ["a"], "value": 1}}\n',
    b'{"command": "state.set", "arguments": {"key": "a", "value": 1e999}}\n',
    b'{"command": "state.set", "arguments": {"key": "a", "value": NaN}}\n',
    b'{"command": "state.set", "arguments": {"key": "a", "value": "\\ud800"}}\n',
    b'{"command": "state.set", "arguments": {"key": "a", "value": 18446744073709551616}}\n',
    b'{"command": "state.set", "arguments": {"\\ud800": 1}}\n',
    b'{"command": "\\ud800"}\n',
    b'{"command": "__class__"}\n',
    b'{"command": "agents.rename", "arguments": {"name": "bystander", "new_name": 5}}\n',
    b'{"command": "agents.enable", "arguments": {"name": ["bystander"]}}\n',
    b'{"command": "agents.forget", "arguments": {"name": {}}}\n',
    b'{"command": "loop.step", "arguments": {"iterations": 1e9}}\n',
    b'{"command": "events.redact", "arguments": {"id": true}}\n',
    b'{"command": "events.emit", "arguments": {"type": "a", "metadata": [1]}}\n',
    b'{"command": "events.emit", "arguments": {"type": "a", "metadata": 5}}\n',
    b'{"command": "events.redeliver", "arguments": {"all": true, "subscriber": ["a"]}}\n',
    b'{"command": "events.redeliver", "arguments": {"event_id": 99999999999999999999}}\n',
)


def run(*, count: int, seed: int, workers: int, tell: Tell, folder: Path) -> Report:
    """Try so many values, keys, events and frames on one loop."""
    path = folder / "ael.db"
    number = count or USUAL
    trials = 0
    with Target(path) as target:

        @seeded(seed)
        @settings(
            max_examples=number,
            deadline=None,
            database=None,
            phases=(Phase.generate,),
            suppress_health_check=list(HealthCheck),
        )
        @given(st.sampled_from((*WAYS, "emit", "client_emit")), keys(), values())
        def try_all(way: str, key: Any, value: Any) -> None:
            nonlocal trials
            trials += 1
            if trials % 1000 == 0:
                tell(f"{trials} values")
            if way in WAYS:
                target.try_value(way, key, value)
            else:
                target.try_event(way, key, value)

        for frame in FRAMES:
            target.try_frame(frame)
        for make in ODD:  # each at least once
            target.try_value("set", "odd", make())
            target.try_event("emit", "odd", make())
        try_all()
        before = target.controller.get_stats()["iteration"]
        target.transact(lambda context: None)
        if target.controller.get_stats()["iteration"] <= before:
            target.found.append("silent: the loop does not go round")
    problems = [f"silent: verify: {problem}" for problem in verify(path).problems]
    found = [*target.found, *problems]
    return Report(
        "malformed and hostile keys, values, events and commands",
        trials + len(FRAMES) + 2 * len(ODD),
        **tally(found),
        note=f"seed {seed}; {target.stored} stored exactly, {target.refused} refused",
        failures=tuple(found),
    )

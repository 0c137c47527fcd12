"""JSON values: checked by exact type, encoded once when they are set.

Accepted: None, bool, int within 64 bits, finite float, str without NUL or lone surrogates, list, and dict with
str keys. Everything else is refused with the path inside the value, because an encoder that helps (tuple to
list, enum to its value, NaN to null) gives back something other than what was stored. The text is compact JSON
in UTF-8 with the order of keys kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import orjson

from ael_store.errors import InvalidKey, InvalidValue, InvalidValueType

__all__ = ["DEFAULT_LIMITS", "Limits", "check_key", "decode", "encode", "same", "shown", "type_name"]

INT_MIN, INT_MAX = -(2**63), 2**63 - 1
_SCALARS = frozenset((bool, type(None)))
EXACTLY = orjson.OPT_PASSTHROUGH_DATACLASS | orjson.OPT_PASSTHROUGH_DATETIME | orjson.OPT_PASSTHROUGH_SUBCLASS
"""No help from the encoder, should another thread put something else in while the value is checked."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How large keys, values and events may be."""

    key_bytes: int = 512
    value_bytes: int = 1_048_576
    event_bytes: int = 262_144
    depth: int = 100


DEFAULT_LIMITS = Limits()


def encode(value: Any, what: str, limits: Limits = DEFAULT_LIMITS, max_bytes: int | None = None) -> str:
    """Return the JSON text of a value; `what` names it in the error ("state key 'a'").

    Raises InvalidValueType for anything that is not JSON by exact type, InvalidValue for NaN, infinities,
    too large integers, strings that can't be stored, and values too large or too deep.
    """
    kind = type(value)
    if kind is str:
        _check_str(value, what, "")
    elif kind is int:
        if not INT_MIN <= value <= INT_MAX:
            raise InvalidValue(f"{what}: the integer does not fit in 64 bits")
        return str(value)
    elif kind is float:
        if value - value != 0.0:
            raise InvalidValue(f"{what}: {value} is not a finite number; JSON has no such value")
    elif kind not in _SCALARS:
        _check(value, what, "", limits.depth)
    raw = orjson.dumps(value, option=EXACTLY)
    bound = limits.value_bytes if max_bytes is None else max_bytes
    if len(raw) > bound:
        raise InvalidValue(f"{what}: {len(raw)} bytes of JSON, the limit is {bound}; store a reference instead")
    return raw.decode()


def decode(text: str) -> Any:
    """Return a new value for a JSON text."""
    return orjson.loads(text)


def same(one: str, other: str) -> bool:
    """True where two JSON texts mean equal values; the order of keys does not count, int and float differ."""
    if one == other:
        return True
    if len(one) != len(other) or one[0] not in "{[" or one[0] != other[0] or _sum(one) != _sum(other):
        return False
    sort = orjson.OPT_SORT_KEYS
    return orjson.dumps(orjson.loads(one), option=sort) == orjson.dumps(orjson.loads(other), option=sort)


def _sum(text: str) -> int:
    """Return the sum of the bytes modulo 255: the same for texts that differ in their order, and quick."""
    return int.from_bytes(text.encode()) % 255


def check_key(key: Any, limits: Limits = DEFAULT_LIMITS) -> str:
    """Return the key if it can name a value; raises InvalidKey or InvalidValueType."""
    if type(key) is not str:
        raise InvalidValueType(f"state key {shown(key)} is {type_name(key)}, not str")
    if not key:
        raise InvalidKey("a state key can't be empty")
    if "\0" in key or not key.isprintable():
        raise InvalidKey(f"state key {shown(key)} holds characters that can't be printed")
    size = len(key) if key.isascii() else len(key.encode())
    if size > limits.key_bytes:
        raise InvalidKey(f"state key {key[:40]!r}…: {size} bytes, the limit is {limits.key_bytes}")
    return key


def _check(value: Any, what: str, path: str, depth: int) -> None:
    kind = type(value)
    if depth <= 0 and kind in (dict, list):
        raise InvalidValue(f"{what}: nested deeper than the limit at {path[:200]}")
    if kind is dict:
        for key, item in value.items():
            if type(key) is not str:
                raise InvalidValueType(
                    f"{what}: the key {shown(key)} at {path[:200] or 'the top'} is {type_name(key)}, not str"
                )
            if not key.isascii() or "\0" in key:
                _check_str(key, what, f"{path}[{shown(key)}]")
            inner = type(item)
            if inner is str:
                if not item.isascii() or "\0" in item:
                    _check_str(item, what, f"{path}[{shown(key)}]")
            elif inner is int:
                if not INT_MIN <= item <= INT_MAX:
                    raise InvalidValue(f"{what}: the integer at {path}[{shown(key)}] does not fit in 64 bits")
            elif inner is float:
                if item - item != 0.0:
                    raise InvalidValue(
                        f"{what}: {item} at {path}[{shown(key)}] is not a finite number; JSON has no such value"
                    )
            elif inner not in _SCALARS:
                _check(item, what, f"{path}[{shown(key)}]", depth - 1)
    elif kind is list:
        for index, item in enumerate(value):
            if type(item) not in _SCALARS:
                _check(item, what, f"{path}[{index}]", depth - 1)
    elif kind is str:
        _check_str(value, what, path)
    elif kind is int:
        if not INT_MIN <= value <= INT_MAX:
            raise InvalidValue(f"{what}: the integer at {path} does not fit in 64 bits")
    elif kind is float:
        if value - value != 0.0:
            raise InvalidValue(f"{what}: {value} at {path} is not a finite number; JSON has no such value")
    elif kind not in _SCALARS:
        raise InvalidValueType(
            f"{what}: the value{' at ' + path if path else ''} is {type_name(value)}; "
            f"accepted are None, bool, int, float, str, list and dict with str keys{_hint(value)}"
        )


def _check_str(value: str, what: str, path: str) -> None:
    where = f" at {path}" if path else ""
    if "\0" in value:
        raise InvalidValue(f"{what}: the string{where} holds a NUL character, which SQL tools cut off")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise InvalidValue(
                f"{what}: the string{where} holds a lone surrogate at index {error.start}; it is no valid text"
            ) from None


LONGEST_SHOWN = 120


def shown(value: Any) -> str:
    """Return what a message shows of anything: its `repr`, cut; whatever that does, this returns a text."""
    try:
        text = repr(value if type(value) is not str else value[: LONGEST_SHOWN + 1])
    except Exception as error:  # code of the value, or an integer of more digits than Python prints
        return f"(what can't be shown: {type(error).__name__})"
    if type(text) is not str:
        text = str.__str__(text)
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}…"


def type_name(value: Any) -> str:
    """Return the name of a value's type, with its module unless it is built in."""
    kind = type(value)
    name = type.__dict__["__qualname__"].__get__(kind)  # as it is, whatever the metaclass says
    module = type.__dict__["__module__"].__get__(kind)
    return str(name) if module == "builtins" else f"{module}.{name}"


def _hint(value: Any) -> str:
    hints = {
        "tuple": "list(value)",
        "set": "sorted(value)",
        "frozenset": "sorted(value)",
        "bytes": "value.hex() or base64",
        "datetime": "value.isoformat()",
        "date": "value.isoformat()",
        "Decimal": "str(value)",
        "UUID": "str(value)",
        "Secret": "nothing: secrets are not stored",
    }
    hint = hints.get(type.__dict__["__name__"].__get__(type(value)))
    return f"; use {hint}" if hint else ""

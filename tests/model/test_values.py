"""JSON values: what comes back is what was stored, with its type; everything else is refused by name and place."""

from __future__ import annotations

import enum
import math
import struct
from collections import OrderedDict
from dataclasses import dataclass
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ael_store.errors import InvalidKey, InvalidValue, InvalidValueType
from ael_store.model.secret import Secret
from ael_store.model.values import Limits, check_key, decode, encode, same

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT
)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=5) | st.dictionaries(TEXT, inner, max_size=5))


def alike(one: Any, other: Any) -> bool:
    """Equal in type and value all the way down; floats bit for bit, dicts in order."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(alike(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(alike, one, other))
    if isinstance(one, float):
        return struct.pack("d", one) == struct.pack("d", other)
    return bool(one == other)


@given(VALUES)
@example(-0.0)
@example(5e-324)
@example(1.7976931348623157e308)
@example(1e16)
@example(2**63 - 1)
@example(-(2**63))
@example("\ud7ff\ue000\U0010ffff\u2028\x7f\x01")
@settings(max_examples=100, deadline=None)
def test_value_comes_back_as_it_was_with_its_type(value: Any) -> None:
    assert alike(decode(encode(value, "v")), value)


@given(VALUES)
@settings(max_examples=100, deadline=None)
def test_text_is_canonical_for_a_value(value: Any) -> None:
    text = encode(value, "v")

    assert encode(decode(text), "v") == text
    assert same(text, encode(value, "v"))


@given(VALUES, VALUES)
@settings(max_examples=150, deadline=None)
def test_same_is_equality_with_types_but_for_the_order_of_keys(one: Any, other: Any) -> None:
    def ordered(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: ordered(value[key]) for key in sorted(value)}
        return [ordered(item) for item in value] if isinstance(value, list) else value

    assert same(encode(one, "v"), encode(other, "v")) == alike(ordered(one), ordered(other))


@given(st.dictionaries(TEXT, VALUES, max_size=6), st.randoms())
@settings(max_examples=100, deadline=None)
def test_order_of_keys_is_kept_and_does_not_count(value: dict[str, Any], random: Any) -> None:
    keys = list(value)
    random.shuffle(keys)
    shuffled = {key: value[key] for key in keys}

    assert same(encode(value, "v"), encode(shuffled, "v"))
    assert list(decode(encode(shuffled, "v"))) == keys


def test_numbers_of_different_types_are_not_the_same() -> None:
    values: list[Any] = [1, 1.0, True, "1", 0, 0.0, -0.0, False, None, [], {}, ""]
    texts = [encode(value, "v") for value in values]

    assert len(set(texts)) == len(texts)
    assert not any(same(one, other) for one in texts for other in texts if one is not other)


# -- refusals ----------------------------------------------------------------------------------------


class Colour(enum.Enum):
    RED = 1


class Level(enum.IntEnum):
    LOW = 1


class Name(str):
    __slots__ = ()


class Number(int):
    pass


class Items(list):
    pass


@dataclass
class Point:
    x: int = 1


WRONG_TYPES = [
    ((1, 2), "tuple"),
    ({1, 2}, "set"),
    (frozenset(), "frozenset"),
    (b"x", "bytes"),
    (bytearray(b"x"), "bytearray"),
    (1j, "complex"),
    (datetime(2026, 1, 1, tzinfo=UTC), "datetime.datetime"),
    (date(2026, 1, 1), "datetime.date"),
    (Decimal("1.5"), "decimal.Decimal"),
    (UUID(int=1), "uuid.UUID"),
    (OrderedDict(a=1), "collections.OrderedDict"),
    (Colour.RED, "Colour"),
    (Level.LOW, "Level"),
    (Name("x"), "Name"),
    (Number(1), "Number"),
    (Items(), "Items"),
    (Point(), "Point"),
    (object(), "object"),
    (print, "builtin_function_or_method"),
    (range(3), "range"),
    (..., "ellipsis"),
    (Secret("hunter2"), "Secret"),
]
WRONG_VALUES = [
    (math.nan, "nan"),
    (math.inf, "inf"),
    (-math.inf, "-inf"),
    (2**63, "64 bits"),
    (-(2**63) - 1, "64 bits"),
    (10**400, "64 bits"),
    ("a\0b", "NUL"),
    ("\ud800", "surrogate"),
    ("ok then \udfff", "surrogate"),
]
PLACES = [
    (lambda value: value, ""),
    (lambda value: [0, value], "[1]"),
    (lambda value: {"a": value}, "['a']"),
    (lambda value: {"a": [None, {"č": [value]}]}, "['a'][1]['č'][0]"),
]


@pytest.mark.parametrize(("place", "path"), PLACES, ids=[item[1] or "top" for item in PLACES])
@pytest.mark.parametrize(("wrong", "name"), WRONG_TYPES, ids=[item[1] for item in WRONG_TYPES])
def test_what_is_no_json_is_refused_with_key_place_and_type(wrong: Any, name: str, place: Any, path: str) -> None:
    with pytest.raises(InvalidValueType) as error:
        encode(place(wrong), "state key 'k'")

    text = str(error.value)
    assert isinstance(error.value, TypeError)
    assert "state key 'k'" in text
    assert name in text
    assert path in text
    assert "hunter2" not in text


@pytest.mark.parametrize(("place", "path"), PLACES, ids=[item[1] or "top" for item in PLACES])
@pytest.mark.parametrize(("wrong", "name"), WRONG_VALUES, ids=range(len(WRONG_VALUES)))
def test_value_that_no_json_can_hold_is_refused_with_key_and_place(
    wrong: Any, name: str, place: Any, path: str
) -> None:
    with pytest.raises(InvalidValue) as error:
        encode(place(wrong), "state key 'k'")

    text = str(error.value)
    assert isinstance(error.value, ValueError)
    assert "state key 'k'" in text
    assert name in text
    assert path in text


@pytest.mark.parametrize("key", [1, None, True, 1.5, (1, 2), b"k", Name("k")], ids=repr)
@pytest.mark.parametrize("place", [lambda value: value, lambda value: [{"a": value}]], ids=["top", "inside"])
def test_key_of_a_dict_that_is_no_str_is_refused(key: Any, place: Any) -> None:
    with pytest.raises(InvalidValueType, match=r"state key 'k'.*not str") as error:
        encode(place({"good": 1, key: 2}), "state key 'k'")

    assert repr(key) in str(error.value)
    assert type(key).__name__ in str(error.value)


@pytest.mark.parametrize("key", ["a\0", "\udc00"])
def test_key_of_a_dict_that_can_not_be_stored_is_refused(key: str) -> None:
    with pytest.raises(InvalidValue, match="state key 'k'"):
        encode({key: 1}, "state key 'k'")


@given(VALUES, st.sampled_from([item[0] for item in WRONG_TYPES]), st.randoms())
@settings(max_examples=150, deadline=None)
def test_one_wrong_leaf_anywhere_is_enough(value: Any, wrong: Any, random: Any) -> None:
    for _ in range(random.randrange(4)):
        value = [value, wrong] if random.random() < 0.5 else {"a": wrong, "b": value}
        wrong = value

    with pytest.raises(InvalidValueType):
        encode([value, (1,)], "v")


def nested(levels: int, leaf: Any, kind: type) -> Any:
    value = leaf
    for _ in range(levels):
        value = [value] if kind is list else {"k": value}
    return value


@pytest.mark.parametrize("kind", [list, dict])
@pytest.mark.parametrize("leaf", [1, 1.5, "s", None, True])
def test_depth_is_bounded_and_scalars_do_not_count(kind: type, leaf: Any) -> None:
    limits = Limits(depth=5)

    assert decode(encode(nested(5, leaf, kind), "v", limits)) == nested(5, leaf, kind)
    with pytest.raises(InvalidValue, match="v: nested deeper"):
        encode(nested(6, leaf, kind), "v", limits)


def test_value_that_holds_itself_is_refused() -> None:
    value: list[Any] = []
    value.append(value)

    with pytest.raises(InvalidValue, match="nested deeper"):
        encode(value, "v")


def test_size_is_bounded_in_bytes() -> None:
    limits = Limits(value_bytes=10)

    assert encode("12345678", "v", limits) == '"12345678"'
    for wrong in ("123456789", "čččččč", [1, 2, 3, 4, 5]):
        with pytest.raises(InvalidValue, match=r"v: 1\d bytes of JSON, the limit is 10"):
            encode(wrong, "v", limits)


# -- keys --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["a", "a b", "agent/x/y", "č", "日本", "a.b:c-d", "'", '"', "%", "*", "x" * 512])
def test_key_is_accepted(key: str) -> None:
    assert check_key(key) == key


@pytest.mark.parametrize("key", ["", "\n", "a\tb", "\0", "\ud800", "\u200b", "x" * 513, "č" * 257])
def test_key_that_can_not_be_read_by_people_is_refused(key: str) -> None:
    with pytest.raises(InvalidKey):
        check_key(key)


@pytest.mark.parametrize("key", [None, 1, b"k", ("a",), Name("k")], ids=repr)
def test_key_that_is_no_str_is_refused_with_its_type(key: Any) -> None:
    with pytest.raises(InvalidValueType, match=type(key).__name__):
        check_key(key)

"""The configuration of an agent is built from its dataclass `Config`, or refused with all that is wrong."""

from __future__ import annotations

import dataclasses
import enum
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from ael_store.errors import InvalidAgent
from ael_store.model.secret import Secret
from ael_store.runtime.agent_config import build_config


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


@dataclass
class Retry:
    times: int
    wait: float = 1.0


class Sensor:
    @dataclass
    class Limits:
        high: float
        low: float = 0.0

    @dataclass
    class Config:
        pin: int
        rate: float = 1.0
        label: str = "here"
        tags: list[str] = field(default_factory=list)
        offsets: dict[str, float] = field(default_factory=dict)
        mode: Literal["fast", "slow"] = "slow"
        note: str | None = None
        number: int | float = 0
        retry: Retry | None = None
        limits: Sensor.Limits | None = None
        near: Limits | None = None  # type: ignore[name-defined]  # noqa: F821
        token: Secret | None = None
        place: tuple[float, float] = (0.0, 0.0)
        names: frozenset[str] = frozenset()
        color: Color = Color.RED
        file: Path = Path("here")
        anything: Any = None
        unknown: NoSuchType = None  # type: ignore[name-defined]  # noqa: F821


class Plain:
    pass


def build(**values: Any) -> Any:
    return build_config(Sensor, {"pin": 4, **values}, "kitchen")


def refusal(config: Any, agent_class: type = Sensor) -> str:
    with pytest.raises(InvalidAgent) as caught:
        build_config(agent_class, config, "kitchen")
    return str(caught.value)


def test_mapping_becomes_an_instance_of_config_with_its_defaults():
    config = build(tags=["a"], offsets={"x": 1.5}, mode="fast", note="ok")

    assert type(config) is Sensor.Config
    assert (config.pin, config.rate, config.tags, config.offsets) == (4, 1.0, ["a"], {"x": 1.5})
    assert (config.mode, config.note) == ("fast", "ok")


def test_instance_of_config_passes_through():
    config = Sensor.Config(pin=1)

    assert build_config(Sensor, config, "kitchen") is config


def test_class_without_config_gets_a_dictionary_of_its_own():
    given = {"pin": 4}

    assert build_config(Plain, given, "kitchen") == given
    assert build_config(Plain, given, "kitchen") is not given
    assert build_config(Plain, None, "kitchen") == {}


def test_no_configuration_gives_the_defaults_where_all_keys_have_one():
    class Agent:
        @dataclass
        class Config:
            pin: int = 7

    assert build_config(Agent, None, "kitchen").pin == 7


def test_unknown_missing_and_wrong_keys_are_refused_together():
    message = refusal({"rat": 2, "label": 5, "tags": ["a", 1]})

    assert "agent 'kitchen'" in message
    assert "Sensor.Config" in message
    assert "unknown key rat (did you mean 'rate'?)" in message
    assert "missing key pin (int)" in message
    assert "label is int, wanted is str" in message
    assert "tags[1] is int, wanted is str" in message


def test_integers_are_accepted_as_numbers_and_booleans_are_not():
    assert type(build(rate=2).rate) is float
    assert "pin is bool, wanted is int" in refusal({"pin": True})
    assert "rate is bool, wanted is float" in refusal({"pin": 1, "rate": True})
    assert "pin is float, wanted is int" in refusal({"pin": 4.0})
    assert "rate is too large" in refusal({"pin": 4, "rate": 10**400})


def test_union_keeps_the_type_of_the_value():
    assert type(build(number=4).number) is int
    assert type(build(number=4.0).number) is float
    assert build(note=None).note is None
    assert "note is int, wanted is str | None" in refusal({"pin": 1, "note": 3})


def test_choice_is_refused_with_the_choices():
    assert "mode is 'quick', wanted is one of 'fast', 'slow'" in refusal({"pin": 1, "mode": "quick"})
    assert "color is 'green', wanted is one of 'red', 'blue'" in refusal({"pin": 1, "color": "green"})


def test_nested_dataclasses_are_built_and_refused_with_their_path():
    config = build(retry={"times": 3}, limits={"high": 5}, near={"high": 5})

    assert config.retry == Retry(3, 1.0)
    assert config.limits == config.near == Sensor.Limits(5.0)
    assert "unknown key retry.tims (did you mean 'times'?)" in refusal({"pin": 1, "retry": {"tims": 3}})
    assert "missing key retry.times (int)" in refusal({"pin": 1, "retry": {"tims": 3}})
    assert "retry is list, wanted is Retry | None" in refusal({"pin": 1, "retry": []})


def test_lists_become_the_collection_that_is_declared():
    config = build(place=[1, 2], names=["a", "b"], color="blue", file="there/x")

    assert config.place == (1.0, 2.0)
    assert config.names == frozenset("ab")
    assert config.color is Color.BLUE
    assert config.file == Path("there/x")
    assert "place has 3 items, wanted are 2" in refusal({"pin": 1, "place": [1, 2, 3]})


def test_text_is_no_list():
    assert "tags is str, wanted is list[str]" in refusal({"pin": 1, "tags": "abc"})


def test_keys_of_a_dictionary_are_checked_too():
    message = refusal({"pin": 1, "offsets": {1: 2.0, "x": "far"}})

    assert "key 1 of offsets is int, wanted is str" in message
    assert "offsets.x is str, wanted is float" in message


def test_secret_fits_where_text_is_declared_and_text_where_a_secret_is():
    secret = Secret("abc", "TOKEN")

    assert build(label=secret).label is secret
    assert build(token=secret).token is secret
    assert build(token="abc").token.reveal() == "abc"
    assert "abc" not in repr(build(token="abc"))


def test_secret_is_masked_in_messages():
    message = refusal({"pin": Secret("abc", "PIN"), "mode": Secret("abc", "MODE")})

    assert "pin is Secret, wanted is int" in message
    assert "mode is Secret('MODE', ******)" in message
    assert "abc" not in message


def test_types_that_are_not_known_are_not_checked():
    config = build(anything=object, unknown={"a": 1})

    assert config.anything is object
    assert config.unknown == {"a": 1}


def test_config_that_refuses_its_values_itself_is_reported():
    class Agent:
        @dataclass
        class Config:
            pin: int

            def __post_init__(self) -> None:
                raise ValueError("no such pin")

    assert "Config refused its values: ValueError: no such pin" in refusal({"pin": 1}, Agent)


@pytest.mark.parametrize("agent_class", [Sensor, Plain])
def test_config_that_is_no_mapping_is_refused(agent_class):
    assert "config is list, wanted is" in refusal(["pin"], agent_class)


def test_none_counts_as_an_empty_mapping():
    assert "missing key pin (int)" in refusal(None)


def test_fields_that_are_not_init_are_no_keys():
    class Agent:
        @dataclass
        class Config:
            pin: int = dataclasses.field(default=1, init=False)

    assert "unknown key pin" in refusal({"pin": 1}, Agent)

"""The configuration of an agent: checked against the dataclass `Config` that its class declares.

What comes from a file has names and simple types only; here it becomes an instance of `Config`, or a message
that names everything that does not fit at once. Values are shown only where a choice was wanted.
"""

from __future__ import annotations

import dataclasses
import enum
import sys
import types
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ael_store.errors import InvalidAgent
from ael_store.model.secret import Secret

__all__ = ["build_config"]


def build_config(agent_class: type, config: Mapping[str, Any] | object | None, agent_name: str) -> Any:
    """Return what the agent's `config` is to be: an instance of its class's `Config`, else a new dictionary.

    Without a configuration `Config` gets its defaults. An instance of `Config` is returned as it is. Raises
    InvalidAgent, which names the agent, every key concerned, and the types wanted and found. Accepted besides
    the types themselves: int for float, Secret for str, str for Secret and Path, a list for a tuple or a set,
    and the value of an Enum's member.
    """
    declared = getattr(agent_class, "Config", None)
    if isinstance(declared, type) and isinstance(config, declared):
        return config
    if config is not None and not isinstance(config, Mapping):
        wanted = f"{_name(declared)} or a mapping" if isinstance(declared, type) else "a mapping"
        raise InvalidAgent(f"agent {agent_name!r}: config is {_name(type(config))}, wanted is {wanted}")
    if not (isinstance(declared, type) and dataclasses.is_dataclass(declared)):
        return dict(config or {})
    reader = _Reader(agent_class)
    built = reader.build(declared, config or {}, "")
    if reader.problems:
        raise InvalidAgent(
            f"agent {agent_name!r}: config does not fit {declared.__qualname__}: {'; '.join(reader.problems)}"
        )
    return built


class _Reader:
    """Makes typed values out of simple ones and gathers what does not fit."""

    def __init__(self, agent_class: type) -> None:
        self.agent_class = agent_class
        self.problems: list[str] = []

    def build(self, cls: type, values: Mapping[Any, Any], path: str) -> Any:
        """Return an instance of a dataclass; None where there are problems."""
        before = len(self.problems)
        hints = _hints(cls, self.agent_class)
        known = {part.name: part for part in dataclasses.fields(cls) if part.init}
        arguments: dict[str, Any] = {}
        for key, value in values.items():
            if key in known:
                arguments[key] = self.read(value, hints.get(key, Any), f"{path}{key}")
                continue
            from difflib import get_close_matches

            near = get_close_matches(key, known, 1) if isinstance(key, str) else []
            self.problems.append(f"unknown key {path}{key}" + (f" (did you mean {near[0]!r}?)" if near else ""))
        for key, part in known.items():
            required = part.default is dataclasses.MISSING and part.default_factory is dataclasses.MISSING
            if required and key not in values:
                self.problems.append(f"missing key {path}{key} ({_name(hints.get(key, Any))})")
        if len(self.problems) > before:
            return None
        try:
            return cls(**arguments)
        except Exception as error:  # its __post_init__
            where = path.rstrip(".") or cls.__qualname__
            return self.refuse(f"{where} refused its values: {type(error).__name__}: {error}")

    def read(self, value: Any, wanted: Any, path: str) -> Any:
        """Return the value as the wanted type; None where there are problems."""
        while hasattr(wanted, "__supertype__"):  # a NewType
            wanted = wanted.__supertype__
        origin: Any = get_origin(wanted)
        if origin in (Union, types.UnionType):
            return self.read_union(value, wanted, path)
        if origin is Literal:
            return self.read_choice(value, get_args(wanted), path)
        cls: Any = type(None) if wanted is None else origin or wanted
        if cls is Any or not isinstance(cls, type):
            return value  # nothing to check, as with a TypeVar
        if _is_group(value, cls):
            return self.read_group(value, cls, get_args(wanted), path)
        if cls is float and type(value) is int:
            try:
                return float(value)
            except OverflowError:
                return self.refuse(f"{path} is too large for float")
        if cls is Secret and type(value) is str:
            return Secret(value, path)
        if cls is int and type(value) is bool:  # isinstance would let it through
            return self.refuse(f"{path} is bool, wanted is int")
        if _is_instance(value, cls):
            return value
        if dataclasses.is_dataclass(cls) and isinstance(value, Mapping):
            return self.build(cls, value, f"{path}.")
        if issubclass(cls, enum.Enum):
            self.read_choice(value, [member.value for member in cls], path)
            return None if self.problems else cls(value)
        if issubclass(cls, Path) and type(value) is str:
            return cls(value)
        return self.refuse(f"{path} is {_name(type(value))}, wanted is {_name(wanted)}")

    def read_union(self, value: Any, wanted: Any, path: str) -> Any:
        """Return the value as the first type that fits, its own before all others (4 stays an int)."""
        arms = sorted(get_args(wanted), key=lambda arm: arm is not type(value))
        for arm in arms:
            attempt = _Reader(self.agent_class)
            found = attempt.read(value, arm, path)
            if not attempt.problems:
                return found
            if dataclasses.is_dataclass(arm) and isinstance(value, Mapping):
                self.problems += attempt.problems  # they say more than "is dict"
                return None
        return self.refuse(f"{path} is {_name(type(value))}, wanted is {_name(wanted)}")

    def read_choice(self, value: Any, choices: Sequence[Any], path: str) -> Any:
        """Return the value if it is one of the choices, in type too."""
        if any(type(value) is type(choice) and value == choice for choice in choices):
            return value
        shown = repr(value)[:60] if isinstance(value, str | int | float) else _name(type(value))
        return self.refuse(f"{path} is {shown}, wanted is one of {', '.join(map(repr, choices))}")

    def read_group(self, value: Any, cls: type, arguments: Sequence[Any], path: str) -> Any:
        """Return a new dict, list, tuple or set with each item read."""
        if issubclass(cls, Mapping):
            of_key, of_item = arguments or (Any, Any)
            return {
                self.read(key, of_key, f"key {key!r} of {path}"): self.read(item, of_item, f"{path}.{key}")
                for key, item in value.items()
            }
        of_items = list(arguments[:1] or [Any]) * len(value)
        if issubclass(cls, tuple) and arguments and arguments[-1] is not Ellipsis:
            of_items = list(arguments)
            if len(of_items) != len(value):
                return self.refuse(f"{path} has {len(value)} items, wanted are {len(of_items)}")
        items = [
            self.read(item, of_item, f"{path}[{index}]")
            for index, (item, of_item) in enumerate(zip(value, of_items, strict=True))
        ]
        if issubclass(cls, tuple):
            return tuple(items)
        if not issubclass(cls, AbstractSet):
            return items
        try:
            return set(items) if issubclass(cls, set) else frozenset(items)
        except TypeError:
            return self.refuse(f"{path} holds items that can't be in a set")

    def refuse(self, problem: str) -> None:
        """Note a problem."""
        self.problems.append(problem)


def _is_instance(value: Any, cls: type) -> bool:
    try:
        return isinstance(value, cls)
    except TypeError:  # a Protocol that can't be checked
        return True


def _is_group(value: Any, cls: type) -> bool:
    """True where a value can be read item by item as a collection of this type."""
    if issubclass(cls, Mapping):
        return isinstance(value, Mapping)
    if issubclass(cls, Sequence | AbstractSet) and not issubclass(cls, str | bytes):
        return isinstance(value, list | tuple | set | frozenset)
    return False


def _hints(cls: type, agent_class: type) -> dict[str, Any]:
    """Return the types of a dataclass's fields; one that can't be resolved counts as Any."""
    # A class nested in another does not see its neighbours where annotations are texts: offer them.
    nearby = {**vars(agent_class), cls.__name__: cls}
    try:
        return get_type_hints(cls, localns=nearby)
    except Exception:
        pass
    hints: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        module = vars(sys.modules.get(base.__module__, types))
        for name, annotation in vars(base).get("__annotations__", {}).items():
            holder = type("", (), {"__annotations__": {name: annotation}})
            try:
                hints |= get_type_hints(holder, globalns=module, localns=nearby)
            except Exception:
                hints[name] = Any
    return hints


def _name(wanted: Any) -> str:
    """Return a type as a person would write it."""
    if wanted is None or wanted is type(None):
        return "None"
    if get_origin(wanted) in (Union, types.UnionType):
        return " | ".join(map(_name, get_args(wanted)))
    if isinstance(wanted, type) and get_origin(wanted) is None:
        return wanted.__name__
    return str(wanted).replace("typing.", "")

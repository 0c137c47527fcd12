"""The agents of a TARGET, as `ael run` is given it: a `.py` file, a module, or one of them with `:attribute`.

A file is imported under its stem, with its folder first on `sys.path`, as `python FILE` would have it, and
stays registered, so that dataclasses and pickling work. Where the stem belongs to another module (a second
`agents.py`, a file named like a module of Python's own), it gets a private name made of its path, the same in
each run.
What goes wrong in here is the user's to repair, so it becomes AgentNotLoadable with the line to look at.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
import sysconfig
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from ael_store.errors import AgentNotLoadable, InvalidAgent
from ael_store.runtime.agent import AgentBase, check_agent
from ael_store.settings import AgentTable

__all__ = ["load_agents"]


def load_agents(
    target: str, tables: Mapping[str, AgentTable] = {}, *, environ: Mapping[str, str] | None = None
) -> list[AgentBase]:
    """Return new agents: those of the attribute, else of `agents = [...]`, and of the `[agents.*]` tables.

    Where there is none of these, an instance of each subclass of AgentBase that the module defines and that
    has a name. The attribute may be an agent, a class, a list of them, or a function returning one of these.
    Secrets of the tables come from `environ`, the process's own unless given. Raises AgentNotLoadable where
    there are no agents to be had, InvalidSetting and InvalidAgent where an agent's values are wrong.
    """
    place, attribute = _split(target)
    module = _import(place)
    listed = _find(module, attribute, place) if attribute else getattr(module, "agents", None)
    if isinstance(listed, ModuleType) and not attribute:
        listed = None  # a package with a module of this name
    if listed is not None:
        agents = _agents_of(listed, f"{place}:{attribute or 'agents'}")
    elif tables:
        agents = []
    else:
        agents = [_make(cls, place) for cls in _classes_in(module) if cls.name]

    origins: dict[str, str] = {}
    for agent in agents:
        _take_name(check_agent(agent).name, place, origins)
    for table in tables.values():
        agents.append(check_agent(_agent_of(table, module, place, environ)))
        _take_name(table.name, table.origin, origins)
    if not agents:
        raise AgentNotLoadable(
            f"{place} holds no agents; needed is a subclass of AgentBase with a `name`, "
            "a list `agents = [...]`, or a table [agents.NAME] in ael.toml"
        )
    return agents


# -- what to import ---------------------------------------------------------------------------------


def _split(target: str) -> tuple[str, str]:
    """Return file or module, and the attribute or nothing."""
    place, colon, attribute = target.rpartition(":")
    if not colon or os.path.isfile(target):
        return target, ""
    if not place or not attribute:
        raise _no_target(target)
    return place, attribute


def _no_target(target: str) -> AgentNotLoadable:
    return AgentNotLoadable(f"target is {target!r}; wanted is a .py file, a module, or module:attribute")


def _import(place: str) -> ModuleType:
    if place.endswith(".py") or "/" in place or os.path.isfile(place):
        return _import_file(Path(place).absolute(), place)
    if not all(part.isidentifier() for part in place.split(".")):
        raise _no_target(place)
    return _import_module(place)


def _import_file(path: Path, place: str) -> ModuleType:
    if path.is_dir():
        raise AgentNotLoadable(f"{place} is a folder; name a .py file in it")
    if not path.exists():
        from difflib import get_close_matches

        near = get_close_matches(path.name, [file.name for file in path.parent.glob("*.py")], 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise AgentNotLoadable(f"there is no file {place} (looked at {path}){hint}")
    if path.suffix != ".py":
        raise AgentNotLoadable(f"{place} is no .py file")
    path = path.resolve()
    name = _module_name(path)
    if name in sys.modules:
        return sys.modules[name]

    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # the suffix is .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    _put_first(str(path.parent))
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        sys.modules.pop(name, None)
        if isinstance(error, Exception | SystemExit):
            raise _failed(f"{place} can't be imported", error) from error
        raise
    return sys.modules[name]


def _import_module(name: str) -> ModuleType:
    _put_first(os.getcwd())
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(name)
    except (Exception, SystemExit) as error:
        # A module that is there and imports one that is not has a line of its own to look at.
        missing = isinstance(error, ModuleNotFoundError) and not _line_of(error)
        if not missing:
            raise _failed(f"module {name} can't be imported", error) from error
        raise AgentNotLoadable(
            f"{error} (looked in {os.getcwd()} and where Python finds its packages); "
            f"a file is named with its ending: {name.rpartition('.')[2]}.py"
        ) from error
    if hasattr(module, "__path__") and getattr(module, "__file__", None) is None:
        raise AgentNotLoadable(f"{name} is a folder; name a .py file or a module in it, like {name}.agents")
    return module


def _module_name(path: Path) -> str:
    """Return the name under which a file is imported: its stem, or a private one where that is taken."""
    stem = path.stem
    known = sys.modules.get(stem)
    if known is None:
        taken = stem in sys.stdlib_module_names or not stem.isidentifier()
    else:
        file = getattr(known, "__file__", None)
        taken = file is None or Path(file).resolve() != path
    return f"ael_target_{hashlib.sha256(os.fsencode(path)).hexdigest()[:8]}_{stem}" if taken else stem


def _put_first(folder: str) -> None:
    if folder in sys.path:
        sys.path.remove(folder)
    sys.path.insert(0, folder)


# -- what is in it ----------------------------------------------------------------------------------


def _find(module: ModuleType, attribute: str, place: str) -> Any:
    """Return an attribute of a module, which may be dotted."""
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            names = [name for name in dir(found) if not name.startswith("_")]
            from difflib import get_close_matches

            near = get_close_matches(part, names, 3) or [cls.__name__ for cls in _classes_in(module)]
            hint = f"; there are: {', '.join(near)}" if near else ""
            raise AgentNotLoadable(f"{place} has no attribute {attribute!r}{hint}")
        found = getattr(found, part)
    return found


def _classes_in(module: ModuleType) -> list[type[AgentBase]]:
    """Return the agent classes that a module itself defines, in order, without abstract ones."""
    found: dict[type[AgentBase], None] = {}
    for cls in vars(module).values():
        if not (isinstance(cls, type) and issubclass(cls, AgentBase)) or inspect.isabstract(cls):
            continue
        if cls.__module__ == module.__name__:
            found[cls] = None
    return list(found)


def _agents_of(found: Any, where: str) -> list[AgentBase]:
    """Return the agents that an attribute stands for."""
    if inspect.iscoroutinefunction(found):
        raise AgentNotLoadable(f"{where} is an async function; wanted is a plain one that returns agents")
    if callable(found) and not isinstance(found, type | AgentBase):
        try:
            found = found()
        except (Exception, SystemExit) as error:
            raise _failed(f"{where}() failed", error) from error
        where = f"what {where}() returned"
    if not isinstance(found, list | tuple):
        return [_agent(found, where)]
    return [_agent(item, f"item {index} of {where}") for index, item in enumerate(found)]


def _agent(item: Any, where: str) -> AgentBase:
    if isinstance(item, type) and issubclass(item, AgentBase):
        return _make(item, where)
    if not isinstance(item, AgentBase):
        raise AgentNotLoadable(f"{where} is {_kind(item)}; wanted are agents: instances of AgentBase")
    return item


def _agent_of(table: AgentTable, module: ModuleType, place: str, environ: Mapping[str, str] | None) -> AgentBase:
    """Return the agent that an `[agents.NAME]` table describes."""
    name = table.agent_class
    if ":" in name:
        place, name = _split(name)
        module = _import(place)
    cls = _find(module, name, f"{table.origin}: {place}")
    if not (isinstance(cls, type) and issubclass(cls, AgentBase)):
        raise AgentNotLoadable(f"{table.origin}: class is {_kind(cls)}; wanted is a subclass of AgentBase")
    arguments = table.attributes()
    config = table.read_config(environ)
    if config is not None:
        arguments["config"] = config
    return _make(cls, table.origin, table.name, **arguments)


def _make(cls: type[AgentBase], where: str, /, *names: str, **arguments: Any) -> AgentBase:
    try:
        return cls(*names, **arguments)
    except InvalidAgent:
        raise  # says it all
    except Exception as error:
        raise _failed(f"{where}: no {cls.__qualname__} could be made", error) from error


def _take_name(name: str, origin: str, origins: dict[str, str]) -> None:
    if name in origins:
        places = f"in {origin}" if origins[name] == origin else f"in {origins[name]} and in {origin}"
        raise AgentNotLoadable(
            f"two agents are named {name!r} ({places}); remove one or give it a name of its own: Class('…')"
        )
    origins[name] = origin


def _kind(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


# -- what went wrong --------------------------------------------------------------------------------


def _failed(what: str, error: BaseException) -> AgentNotLoadable:
    """Return the error that tells what user code raised, and where."""
    message = error.msg if isinstance(error, SyntaxError) else str(error)
    line = _line_of(error)
    hint = ""
    if isinstance(error, ImportError) and "relative import" in message:
        hint = "; a module inside a package is named with dots: package.module"
    return AgentNotLoadable(
        f"{what}: {type(error).__name__}" + (f": {message}" if message else "") + (f" ({line})" if line else "") + hint
    )


def _line_of(error: BaseException) -> str:
    """Return `file:line` of the deepest frame in code of the user's; nothing where none took part."""
    if isinstance(error, SyntaxError) and error.filename and not error.filename.startswith("<"):
        return f"{error.filename}:{error.lineno}"
    lines = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    paths = sysconfig.get_paths()
    lines = _outside(lines, [str(Path(__file__).parents[1])])
    packages = [paths["purelib"], paths["platlib"]]
    own = _outside(lines, [paths["stdlib"], paths["platstdlib"], *packages])
    # A target that is an installed package has no others.
    installed = [line for line in lines if not _outside([line], packages)]
    return "{}:{}".format(*(own or installed)[-1]) if own or installed else ""


def _outside(lines: Sequence[tuple[str, int]], folders: Sequence[str]) -> list[tuple[str, int]]:
    """Return the lines of files that are in none of the folders."""
    inside = tuple(f"{folder}{os.sep}" for folder in folders)
    return [line for line in lines if not line[0].startswith(("<", *inside))]

"""The functions of tasks: how they are declared, and how they are found again after a restart.

A task outlives the process, so its function is stored by name, in one of three forms:

- `think`: a method of the agent that gets the result, or a function registered with `@task(name="think")`;
- `mailer:send`: a function at the top of a module.

A lambda, a function inside a function, or an object that can be called has no such name and is refused.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from types import ModuleType
from typing import Any, TypeVar, overload

from ael_store.errors import InvalidTask
from ael_store.model.values import shown
from ael_store.runtime.agent import AgentBase

__all__ = ["TaskFunction", "TaskPolicy", "find_function", "import_function", "policy_of", "reference_of", "task"]

F = TypeVar("F", bound=Callable[..., Any])

MARK = "__ael_task__"

_registered: dict[str, Callable[..., Any]] = {}


@dataclass(frozen=True, slots=True)
class TaskPolicy:
    """How a function is run as a task; None takes the setting."""

    name: str | None = None
    attempts: int | None = None
    timeout: float | None = None
    process: bool = False
    reconcile: Callable[..., Any] | None = None
    limit: str | None = None
    backoff: float = 1.0
    max_usd: Decimal | None = None


PLAIN = TaskPolicy()


@dataclass(frozen=True, slots=True)
class TaskFunction:
    """A function that was found: called with the attempt and the arguments."""

    call: Callable[..., Any]
    policy: TaskPolicy
    reconcile: Callable[..., Any] | None
    """Called with the key."""
    path: str | None
    """`module:function` for a process of its own; None where it has none."""


@overload
def task(function: F) -> F: ...


@overload
def task(
    *,
    name: str | None = None,
    attempts: int | None = None,
    timeout: float | None = None,
    process: bool = False,
    reconcile: Callable[..., Any] | None = None,
    limit: str | None = None,
    backoff: float = 1.0,
    max_usd: float | str | Decimal | None = None,
) -> Callable[[F], F]: ...


def task(
    function: Any = None,
    *,
    name: str | None = None,
    attempts: int | None = None,
    timeout: float | None = None,
    process: bool = False,
    reconcile: Callable[..., Any] | None = None,
    limit: str | None = None,
    backoff: float = 1.0,
    max_usd: float | str | Decimal | None = None,
) -> Any:
    """Say how a function is run as a task: a method of an agent, or a function at the top of a module.

    It is called with the attempt (`task`: `key`, `attempt`, `progress()`, `cost()`, `cancelled`) and the arguments of
    `submit`, after the commit of the unit that submitted it; what it returns must be JSON. Async functions run beside
    the loop, plain ones in a thread, with `process=True` in a process of their own.

    `attempts` and `timeout` (seconds, 0 for none) take the settings `task_attempts` and `task_timeout` unless given;
    attempts that a crash or a stop cut off do not count. Between attempts it waits `backoff` seconds, twice as long
    each time, at most 5 minutes, with jitter. `reconcile(key)` is asked before every attempt but the first: what it
    returns is the result, None and False mean that it has not happened. `limit` is the limit that it counts against
    unless `submit` says another; `max_usd` is what an attempt may cost, reserved before it starts. `name` is what it
    is stored under instead of where it stands, so that it can be moved. The function itself stays as it is.
    """

    def declare(function: F) -> F:
        policy = TaskPolicy(name, attempts, timeout, process, reconcile, limit, backoff, _amount(max_usd))
        _check(function, policy)
        setattr(function, MARK, policy)
        if name is not None and not _is_method(function):
            known = _registered.get(name)
            if known is not None and _place(known) != _place(function):
                raise InvalidTask(f"@task(name={name!r}) of {_place(function)}: {_place(known)} has that name already")
            _registered[name] = function
        return function

    return declare if function is None else declare(function)


def _check(function: Any, policy: TaskPolicy) -> None:
    if not inspect.isfunction(function):
        raise InvalidTask(f"@task stands before {shown(function)}, which is no function")
    where = f"@task of {_place(function)}"
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise InvalidTask(f"{where}: it has a `yield`, so calling it would run nothing; return the result instead")
    if policy.attempts is not None and (type(policy.attempts) is not int or policy.attempts < 1):
        raise InvalidTask(f"{where}: attempts is {policy.attempts!r}, wanted is a whole number from 1")
    for what, seconds in (("timeout", policy.timeout), ("backoff", policy.backoff)):
        if seconds is not None and (
            type(seconds) not in (int, float) or not math.isfinite(seconds) or not 0 <= seconds <= 1e9
        ):
            raise InvalidTask(f"{where}: {what} is {seconds!r}, wanted are seconds from 0")
    for what, text in (("name", policy.name), ("limit", policy.limit)):
        if text is not None and (type(text) is not str or not text or not text.isprintable() or ":" in text):
            raise InvalidTask(f"{where}: {what} is {text!r}, wanted is a printable text without a colon")
    if policy.reconcile is not None and not callable(policy.reconcile):
        raise InvalidTask(f"{where}: reconcile is {policy.reconcile!r}, wanted is a function of the key")
    if policy.process and (_is_method(function) or inspect.iscoroutinefunction(function)):
        kind = "a method" if _is_method(function) else "an async function"
        raise InvalidTask(f"{where}: it is {kind}; process=True needs a plain function at the top of a module")


def _amount(usd: float | str | Decimal | None) -> Decimal | None:
    if usd is None:
        return None
    try:
        amount = Decimal(str(usd))
    except ArithmeticError:
        amount = Decimal(-1)
    if isinstance(usd, bool) or not amount.is_finite() or amount < 0:
        raise InvalidTask(f"max_usd is {usd!r}, wanted is an amount from 0")
    return amount


def _is_method(function: Callable[..., Any]) -> bool:
    """True where the function was defined in the body of a class."""
    before = function.__qualname__.rpartition(".")[0]
    return bool(before) and not before.endswith("<locals>")


def _place(function: Any) -> str:
    return f"{getattr(function, '__module__', '?')}:{getattr(function, '__qualname__', shown(function))}"


def policy_of(function: Any) -> TaskPolicy:
    """Return how a function was declared with `@task`; the defaults where it was not."""
    found = getattr(function, MARK, PLAIN)
    return found if isinstance(found, TaskPolicy) else PLAIN


# -- naming a function ------------------------------------------------------------------------------


def reference_of(function: Any) -> tuple[str, str | None]:
    """Return the name by which a function is found again, and the agent whose method it is.

    A text is taken as such a name. Raises InvalidTask, with the reason, for what could not be found.
    """
    if isinstance(function, str):
        return _checked_name(function), None
    if isinstance(function, functools.partial):
        raise _refused(function, "it is a partial, which has no name; submit the function with its arguments")
    if inspect.ismethod(function):
        return _reference_of_method(function)
    if not inspect.isfunction(function):
        raise _refused(function, "it is no function")
    if function.__name__ == "<lambda>":
        raise _refused(function, "it is a lambda, which has no name by which a restart could find it")
    if "<locals>" in function.__qualname__:
        raise _refused(function, "it is defined inside a function, so a restart could not find it")
    if _is_method(function):
        raise _refused(function, f"it is a method without its agent; submit `self.{function.__name__}`")
    policy = policy_of(function)
    if policy.name is not None:
        return policy.name, None
    if getattr(sys.modules.get(function.__module__), function.__name__, None) is not function:
        raise _refused(function, f"{_place(function)} is something else; is it wrapped by another decorator?")
    return _place(function), None


def _reference_of_method(method: Any) -> tuple[str, str]:
    owner = method.__self__
    if not isinstance(owner, AgentBase):
        raise _refused(method, f"it is a method of {type(owner).__name__}; only agents are there after a restart")
    if getattr(type(owner), method.__name__, None) is not method.__func__:
        raise _refused(method, f"{type(owner).__name__} has no method {method.__name__!r} that is this one")
    _refuse_hook(method.__name__)
    return policy_of(method).name or method.__name__, owner.name


def _refused(function: Any, why: str) -> InvalidTask:
    place = _place(function) if inspect.isroutine(function) else shown(function)
    return InvalidTask(
        f"{place} can't be a task: {why}. A task is a method of an agent, or a function at the top of a module"
    )


def _refuse_hook(name: str) -> None:
    if hasattr(AgentBase, name):
        raise InvalidTask(f"{name!r} belongs to every agent and can't be a task; write a method of its own for it")


def _checked_name(name: str) -> str:
    if not name or not name.isprintable() or len(name) > 200:
        raise InvalidTask(f"the function is {shown(name)}, wanted is a name of 1 to 200 printable characters")
    return name


# -- finding it again -------------------------------------------------------------------------------


def find_function(name: str, agent: AgentBase | None) -> TaskFunction:
    """Return the function of a name; raises InvalidTask where there is none, which time may change."""
    if ":" in name:
        function = import_function(name)
        return _found(function, None, name)
    if agent is not None:
        method = _method_of(agent, name)
        if method is not None:
            return _found(method, agent, None)
    registered = _registered.get(name)
    if registered is not None:
        return _found(registered, None, _place(registered))
    whose = f"agent {agent.name!r} has no method {name!r}, and " if agent is not None else ""
    known = ", ".join(sorted(_registered)) or "none"
    raise InvalidTask(f"{whose}no function is registered as {name!r} (registered are: {known})")


def _method_of(agent: AgentBase, name: str) -> Callable[..., Any] | None:
    cls = type(agent)
    if hasattr(AgentBase, name):  # a hook is no task, whoever asks for it
        return None
    if not inspect.isfunction(getattr(cls, name, None)):
        renamed = [known for known in dir(cls) if policy_of(getattr(cls, known, None)).name == name]
        if not renamed:
            return None
        name = renamed[0]
    return getattr(agent, name)  # type: ignore[no-any-return]


def import_function(path: str, file: str | None = None) -> Callable[..., Any]:
    """Return the function `module:function`, importing the module; `file` is where that stands if it has no name."""
    module_name, _, function_name = path.partition(":")
    try:
        module = sys.modules.get(module_name) or _import(module_name, file)
    except Exception as error:
        raise InvalidTask(f"module {module_name!r} can't be imported: {type(error).__name__}: {error}") from error
    function = getattr(module, function_name, None)
    if not inspect.isfunction(function):
        raise InvalidTask(f"module {module_name!r} has no function {function_name!r}")
    return function


def _import(name: str, file: str | None) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        if file is None:
            raise
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _found(function: Callable[..., Any], agent: AgentBase | None, path: str | None) -> TaskFunction:
    policy = policy_of(function)
    reconcile = policy.reconcile
    if reconcile is not None and agent is not None:
        name = getattr(reconcile, "__name__", "")
        if inspect.isfunction(reconcile) and getattr(type(agent), name, None) is reconcile:
            reconcile = getattr(agent, name)  # it was written in the class: its first parameter is the agent
    return TaskFunction(function, policy, reconcile, path)

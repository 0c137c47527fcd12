"""Writes the parts of `docs/reference/` that come from the code: `./dev python -m tests.docs.generate`.

A generated part stands between two comments in its page and ends up there word for word; what is around it is
written by hand. `test_reference_generated.py` fails where a page is behind the code.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
import textwrap
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

from sqlalchemy import Table, UniqueConstraint

import ael_store
from ael_store import errors
from ael_store.schema.tables import metadata

REFERENCE = Path(__file__).parents[2] / "docs/reference"
COMMAND = "./dev python -m tests.docs.generate"

# -- the pages --------------------------------------------------------------------------------------


def begin(part: str) -> str:
    return f"<!-- {part}: generated, refresh with {COMMAND} -->"


def end(part: str) -> str:
    return f"<!-- end of {part} -->"


def refreshed(page: str, part: str, text: str) -> str:
    """Return the page with its generated part replaced."""
    pattern = re.compile(f"{re.escape(begin(part))}\n.*?{re.escape(end(part))}", re.DOTALL)
    if len(pattern.findall(page)) != 1:
        raise SystemExit(f"the page must hold {begin(part)!r} and {end(part)!r} once")
    return pattern.sub(lambda _: f"{begin(part)}\n\n{text.strip()}\n\n{end(part)}", page)


def parts() -> dict[str, tuple[Path, str]]:
    """Return page and text of each generated part."""
    return {
        "tables": (REFERENCE / "schema.md", "\n\n".join(map(describe_table, metadata.tables.values()))),
        "errors": (REFERENCE / "errors.md", describe_errors()),
        "names": (REFERENCE / "api.md", "\n\n".join(describe_modules())),
    }


def main() -> None:
    for part, (page, text) in parts().items():
        before = page.read_text("utf-8")
        after = refreshed(before, part, text)
        if after != before:
            page.write_text(after, "utf-8")
        print(f"{page.relative_to(REFERENCE.parents[1])}: {'refreshed' if after != before else 'is up to date'}")


# -- tables -----------------------------------------------------------------------------------------


def describe_table(table: Table) -> str:
    """Return the section of a table: its comment, its columns with type and meaning, its indexes."""
    assert table.comment is not None
    lines = [f"## {table.name}", "", table.comment, "", "| Column | Type | Meaning |", "|---|---|---|"]
    single = {
        next(iter(constraint.columns)).name
        for constraint in table.constraints
        if isinstance(constraint, UniqueConstraint) and len(constraint.columns) == 1
    }
    for column in table.columns:
        assert column.comment is not None, column
        kind = ["text" if str(column.type) == "TEXT" else "integer"]
        if column.primary_key:
            kind.append("primary key")
        elif column.nullable:
            kind.append("may be NULL")
        if column.name in single:
            kind.append("unique")
        elif any(list(index.columns) == [column] for index in table.indexes):
            kind.append("indexed")
        kind += [f"→ `{key.target_fullname}`" for key in column.foreign_keys]
        lines.append(f"| `{column.name}` | {', '.join(kind)} | {_cell(column.comment)} |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    """Return a text as it can stand in a cell, as a sentence."""
    text = text.replace("|", "\\|")
    return text[0].upper() + text[1:] + ("" if text.endswith((".", "…")) else ".")


# -- errors -----------------------------------------------------------------------------------------


def error_classes() -> list[type[errors.AelError]]:
    """Return the public error classes in the order of their definition."""
    return [vars(errors)[name] for name in vars(errors) if name in errors.__all__]


def describe_errors() -> str:
    lines = ["| Error | Is also | Exit code | When |", "|---|---|---|---|"]
    for cls in error_classes():
        bases = ", ".join(f"`{base.__name__}`" for base in cls.__bases__)
        lines.append(f"| `{cls.__name__}` | {bases} | {cls.exit_code} | {_first_line(cls)} |")
    return "\n".join(lines)


# -- names of the package ---------------------------------------------------------------------------

GROUPS = {
    "Agents": ("AgentBase", "AgentManager", "StateContext", "Secret"),
    "Events": ("Event", "EventBus"),
    "Metrics": ("push_metrics",),
    "Tasks": ("task", "Task", "RetryAfter", "Fatal", "TaskLimit"),
    "The loop": ("AELController", "Scheduler", "Settings", "Store"),
    "From other processes": ("connect",),
    "One per process": (
        "get_agent_manager",
        "get_event_bus",
        "get_state_context",
        "get_ael_controller",
        "run_ael_loop",
    ),
    "New ones": (
        "create_agent_manager",
        "create_event_bus",
        "create_scheduler",
        "create_state_context",
        "create_ael_controller",
    ),
    "Errors": ("AelError", "UnitClosed"),
    "Version": ("__version__",),
}
FOR_THE_LOOP = frozenset(
    (
        "Event.from_record",
        "Scheduler.forget",
        "Scheduler.restore",
        "Scheduler.take_position",
        "Store.checkpoint",
        "Store.commit",
    )
)
"""Members that other parts of the program call and users have no use for."""


def describe_modules() -> Iterator[str]:
    """Yield the sections of `ael_store`, then those of the public modules beside it."""
    missing = set(ael_store.__all__) - {name for names in GROUPS.values() for name in names}
    if missing:
        raise SystemExit(f"say in GROUPS where these belong: {sorted(missing)}")
    yield "## ael_store"
    for title, names in GROUPS.items():
        yield f"### {title}"
        for name in names:
            yield from describe_name(ael_store, name)
            if name == "Task":
                yield from describe_name(importlib.import_module("ael_store.runtime.attempt"), "Attempt")
            if name == "push_metrics":
                yield from describe_name(importlib.import_module("ael_store.runtime.metrics"), "Metrics")
            if name == "Store":
                yield from describe_name(importlib.import_module("ael_store.store.past_state"), "PastState")
            if name == "connect":
                for client in ("Client", "AsyncClient"):
                    yield from describe_name(importlib.import_module("ael_store.client"), client)
    yield "## ael_store.errors"
    yield "Every class with its exit code stands in [errors](errors.md)."
    if importlib.util.find_spec("ael_store.testing") is not None:
        testing = importlib.import_module("ael_store.testing")
        yield "## ael_store.testing"
        yield _sentences(_first_line(testing))
        for name in testing.__all__:
            yield from describe_name(testing, name)


def describe_name(module: ModuleType, name: str) -> Iterator[str]:
    thing = getattr(module, name)
    if inspect.isclass(thing):
        yield f"#### {name}"
        yield describe_class(thing)
    elif callable(thing):
        yield f"#### {name}"
        yield _code([_signed(thing, name)])
        yield _sentences(_first_line(thing))
    else:
        yield f"`{name}`: the version, as text."


def describe_class(cls: type) -> str:
    if issubclass(cls, BaseException):
        return _sentences(_first_line(cls))
    if cls.__name__ == "Settings":
        return f"{_sentences(_first_line(cls))}\nThe fields are the settings of [settings](settings.md), keyword-only."
    blocks: list[str] = []
    maker = cls.__new__ if cls.__init__ is object.__init__ else cls.__init__
    if maker is not object.__new__ and "Protocol" not in [base.__name__ for base in cls.__mro__]:
        blocks.append(_code([_signed(maker, cls.__name__, drop_self=True, returns=False)]))
    blocks.append(_sentences(_first_line(cls)))
    rows = [f"| `{_escaped(name)}` | {_cell(meaning)} |" for name, meaning in _attributes(cls)]
    rows += [
        f"| `{name}` | {_cell(_first_line(value.fget))} |"
        for name, value in vars(cls).items()
        if isinstance(value, property) and not name.startswith("_")
    ]
    if rows:
        blocks.append("\n".join(["| Attribute | Meaning |", "|---|---|", *rows]))
    rows = []
    for name, value in vars(cls).items():
        function = value.__func__ if isinstance(value, classmethod | staticmethod) else value
        if not inspect.isfunction(function) or name.startswith("_"):
            continue
        if f"{cls.__name__}.{name}" in FOR_THE_LOOP:
            continue
        drop_self = not isinstance(value, staticmethod)
        rows.append(f"| `{_escaped(_signed(function, name, drop_self=drop_self))}` | {_cell(_first_line(function))} |")
    if rows:
        blocks.append("\n".join(["| Method | What it does |", "|---|---|", *rows]))
    return "\n\n".join(blocks)


def _attributes(cls: type) -> Iterator[tuple[str, str]]:
    """Yield the attributes that the class describes with a text below them."""
    try:
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    except (OSError, TypeError):
        return
    assert isinstance(body, ast.ClassDef)
    for node, after in zip(body.body, body.body[1:], strict=False):
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str):
            default = f" = {ast.unparse(node.value)}" if node.value is not None else ""
            yield f"{node.target.id}: {ast.unparse(node.annotation)}{default}", after.value.value.strip()


def _signed(function: Any, name: str, *, drop_self: bool = False, returns: bool = True) -> str:
    """Return a signature as it stands in the code."""
    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())[1 if drop_self else 0 :]
    shown: list[str] = []
    kinds = inspect.Parameter
    starred = False
    for parameter in parameters:
        text = parameter.name
        if parameter.kind is kinds.VAR_POSITIONAL:
            text, starred = f"*{text}", True
        elif parameter.kind is kinds.VAR_KEYWORD:
            text = f"**{text}"
        elif parameter.kind is kinds.KEYWORD_ONLY and not starred:
            shown.append("*")
            starred = True
        if parameter.annotation is not kinds.empty:
            text += f": {_annotation(parameter.annotation)}"
        if parameter.default is not kinds.empty:
            equals = " = " if parameter.annotation is not kinds.empty else "="
            text += f"{equals}{_default(parameter.default)}"
        shown.append(text)
    result = ""
    if returns and signature.return_annotation is not inspect.Signature.empty:
        result = f" -> {_annotation(signature.return_annotation)}"
    word = "async " if inspect.iscoroutinefunction(function) else ""
    return f"{word}{name}({', '.join(shown)}){result}"


def _default(value: Any) -> str:
    """Return a default as a person would write it."""
    if isinstance(value, datetime):
        return repr(value.isoformat())
    if isinstance(value, MappingProxyType):
        return repr(dict(value))
    return "…" if type(value) is object or repr(value).startswith("<") else repr(value)


def _annotation(annotation: Any) -> str:
    text = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))
    return text.replace("'", "").replace('"', "")


def _code(lines: list[str]) -> str:
    """Return a block that is not meant to be run."""
    wrapped: list[str] = []
    for line in lines:
        if len(line) <= 100:
            wrapped.append(line)
            continue
        head, _, rest = line.partition("(")
        inside, _, tail = rest.rpartition(")")
        wrapped += [f"{head}(", *(f"    {part}," for part in _split(inside)), f"){tail}"]
    return "\n".join(["```text", *wrapped, "```"])


def _split(arguments: str) -> list[str]:
    """Split arguments at the commas that stand in no bracket."""
    found, depth = [""], 0
    for character in arguments:
        depth += character in "([{"
        depth -= character in ")]}"
        if character == "," and depth == 0:
            found.append("")
        else:
            found[-1] += character
    return [part.strip() for part in found if part.strip()]


def _sentences(text: str) -> str:
    """Return prose with one sentence a line."""
    return re.sub(r"(?<=[.!?]) (?=[A-Z`])", "\n", text)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def _first_line(thing: Any) -> str:
    """Return the first line of a docstring, with the next ones where its sentence goes on there."""
    text = inspect.getdoc(thing)
    if not text:
        raise SystemExit(f"{getattr(thing, '__qualname__', thing)} has no docstring")
    lines: list[str] = []
    for line in text.split("\n\n")[0].split("\n"):
        lines.append(line.strip())
        if line.endswith((".", ":")):
            break
    return " ".join(lines)


if __name__ == "__main__":
    main()

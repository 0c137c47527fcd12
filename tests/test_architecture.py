"""The floors of the house: who may import whom, and where a library may appear.

Read from the source with `ast`, so that imports inside functions and those for typing only count too.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "ael_store"

FLOORS: tuple[tuple[str, ...], ...] = (
    ("_version", "errors", "clock", "settings", "telemetry", "model"),
    ("schema",),
    ("store",),
    ("runtime",),
    ("cli", "web", "contrib", "compat", "testing", "client", "__main__"),
)
"""From the ground up; each imports its own floor and those below."""

FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}

LIBRARY_HOMES: dict[str, tuple[str, ...]] = {
    "sqlalchemy": ("ael_store/schema/", "ael_store/store/", "migrations/"),
    "alembic": ("ael_store/store/", "migrations/"),
    "aiosqlite": ("ael_store/store/",),
    "sqlite3": ("ael_store/store/", "migrations/"),
    "apscheduler": ("ael_store/runtime/trigger.py",),
    "typer": ("ael_store/cli/",),
    "click": ("ael_store/cli/",),
    "rich": ("ael_store/cli/",),
    "prometheus_client": ("ael_store/web/metrics.py",),
    "starlette": ("ael_store/web/",),
    "uvicorn": ("ael_store/web/",),
    "jinja2": ("ael_store/web/",),
    "sse_starlette": ("ael_store/web/",),
    "psutil": (),
    "pytest": ("ael_store/testing/pytest_plugin.py",),
}
"""Where a library may be imported, in the package and its migrations; an empty tuple is nowhere."""

NEVER_IMPORTED = frozenset(("pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "yaml", "jsonpickle"))
NEVER_CALLED = frozenset(("eval", "exec", "compile", "__import__"))
FROM_APSCHEDULER = frozenset(
    ("apscheduler.schedulers.asyncio", "apscheduler.triggers.base", "apscheduler.triggers.cron")
)
"""Not its job stores: they pickle."""

RUNS_SQL = frozenset(("execute", "executemany", "executescript", "exec_driver_sql"))
NAMES_WITHOUT_A_NOUN = frozenset(("utils", "util", "common", "helpers", "helper", "misc", "core", "base", "manager2"))


@dataclass(frozen=True)
class Import:
    """One import statement: `file` says `module`, dotted."""

    file: str
    line: int
    module: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.module}"


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"), str(path))


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def name_of(path: Path) -> str:
    """Return the dotted name of a module of this repository."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path) for path in sources(PACKAGE)}


def imports(path: Path) -> Iterator[Import]:
    """Yield what a file imports, wherever in it; `from ael_store import errors` counts as ael_store.errors."""
    file = str(path.relative_to(ROOT))
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(file, node.lineno, alias.name)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                parts = name_of(path).split(".")
                is_package = path.name == "__init__.py"
                base = parts[: len(parts) - node.level + is_package]
                module = ".".join([*base, module] if module else base)
            for alias in node.names:
                inner = f"{module}.{alias.name}"
                yield Import(file, node.lineno, inner if inner in MODULES else module)


def floor_of(module: str) -> int | None:
    """Return the floor that a module of the package stands on, None for the package itself."""
    parts = module.split(".")
    return FLOOR_OF[parts[1]] if len(parts) > 1 else None


# The package itself names everything, lazily.
@pytest.mark.parametrize("path", [path for path in sources(PACKAGE) if name_of(path) != PACKAGE], ids=name_of)
def test_module_imports_only_its_own_floor_and_those_below(path: Path) -> None:
    floor = floor_of(name_of(path))
    assert floor is not None

    upward = [
        found
        for found in imports(path)
        if found.module.split(".")[0] == PACKAGE
        # the package itself is above everything: importing a name from it hides what is imported
        and ((above := floor_of(found.module)) is None or above > floor)
    ]

    assert not upward, "\n".join(map(str, upward))


def test_every_module_stands_on_a_floor() -> None:
    unknown = {name.split(".")[1] for name in MODULES if "." in name} - set(FLOOR_OF)

    assert not unknown, f"say in FLOORS where these stand: {sorted(unknown)}"


@pytest.mark.parametrize("library", LIBRARY_HOMES)
def test_library_is_imported_only_at_home(library: str) -> None:
    homes = LIBRARY_HOMES[library]

    abroad = [
        found
        for path in sources(PACKAGE, "migrations")
        for found in imports(path)
        if found.module.split(".")[0] == library and not found.file.startswith(homes or ("nowhere/",))
    ]

    assert not abroad, "\n".join(map(str, abroad))


def test_nothing_is_imported_that_runs_code_from_data() -> None:
    found = [
        one
        for path in sources(PACKAGE, "migrations")
        for one in imports(path)
        if one.module.split(".")[0] in NEVER_IMPORTED
    ]

    assert not found, "\n".join(map(str, found))


def test_nothing_calls_eval_or_exec() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno} calls {node.func.id}"
        for path in sources(PACKAGE, "migrations")
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in NEVER_CALLED
    ]

    assert not found, "\n".join(found)


def test_apscheduler_brings_no_job_store() -> None:
    found = [
        one
        for path in sources(PACKAGE, "migrations")
        for one in imports(path)
        if one.module.split(".")[0] == "apscheduler" and one.module not in FROM_APSCHEDULER
    ]

    assert not found, "\n".join(map(str, found))


def test_no_sql_is_run_outside_the_store() -> None:
    """So that keys, payloads and arguments can reach SQL only as parameters of what the store says."""
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno} calls {node.func.attr}"
        for path in sources(PACKAGE)
        if not str(path.relative_to(ROOT)).startswith("ael_store/store/")
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in RUNS_SQL
    ]

    assert not found, "\n".join(found)


def test_no_module_is_a_drawer_for_everything() -> None:
    found = [name for name in MODULES if NAMES_WITHOUT_A_NOUN & set(name.split("."))]

    assert not found


def test_importing_the_package_loads_nothing_heavy() -> None:
    """Only what stands at the top of `ael_store/__init__.py` runs at import; the rest waits for its first use."""
    package = tree(ROOT / PACKAGE / "__init__.py")

    loaded = [
        (node.module or "") if isinstance(node, ast.ImportFrom) else node.names[0].name
        for node in package.body
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]

    assert set(loaded) <= {"__future__", "typing", "ael_store._version"}


def test_revisions_import_only_alembic_and_sqlalchemy() -> None:
    """A revision is frozen: it must not follow the program that it was written for."""
    found = [
        one
        for path in sources("migrations/versions")
        for one in imports(path)
        if one.module.split(".")[0] not in ("__future__", "alembic", "json", "sqlalchemy")
    ]

    assert not found, "\n".join(map(str, found))

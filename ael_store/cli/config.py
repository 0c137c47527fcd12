"""`ael config`: which settings hold here, and where each comes from."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict
from typing import Annotated, Any

import typer

from ael_store.cli.arguments import nearest
from ael_store.cli.call import Call
from ael_store.cli.command import command, group
from ael_store.cli.output import Column, json_cell, print_json, print_table
from ael_store.errors import UsageError
from ael_store.settings import RULES, AgentTable, LoadedSettings, secret_origin

__all__ = ["add_to"]

MASK = "******"

Row = tuple[str, Any, str]
"""Name, value, origin."""


def add_to(app: typer.Typer) -> None:
    """Add the commands of this noun."""
    config = group(app, "config", "Look at the settings that hold here.")
    command(config, "show")(show)


def show(
    call: Call,
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Only this setting.")] = None,
    origin: Annotated[bool, typer.Option("--origin", help="Tell where each value comes from.")] = False,
) -> None:
    """Show every setting with its value; secrets are masked."""
    rows = list(_rows(call.loaded))
    if name is not None:
        rows = [row for row in rows if row[0] == name or row[0].startswith(f"{name}.")]
        if not rows:
            raise UsageError(f"there is no setting {name!r}{nearest(name, RULES)}")
    if call.json:
        found = {key: {"value": value, "origin": place} if origin else value for key, value, place in rows}
        print_json(found if name is None or name not in found else found[name])
        return
    columns = [Column("setting"), Column("value", shrinks=True)]
    if origin:
        columns.append(Column("origin", shrinks=True))
    print_table(columns, ((key, _text(value), place)[: len(columns)] for key, value, place in rows))


def _rows(loaded: LoadedSettings) -> Iterator[Row]:
    settings = loaded.settings
    for name in RULES:
        yield name, getattr(settings, name), loaded.origins[name]
    file = "default" if loaded.file is None else loaded.file.name
    for limit, bounds in settings.limits.items():
        for key, value in asdict(bounds).items():
            if value is not None:
                yield f"limits.{limit}.{key}", value, file
    for table in loaded.agents.values():
        yield from _agent(table, file)


def _agent(table: AgentTable, file: str) -> Iterator[Row]:
    yield f"agents.{table.name}.class", table.agent_class, file
    for key, value in table.attributes().items():
        yield f"agents.{table.name}.{key}", value, file
    for key, value in (table.config or {}).items():
        yield from _masked(f"agents.{table.name}.config.{key}", value, file)


def _masked(name: str, value: Any, file: str) -> Iterator[Row]:
    """Yield a value of a configuration, each secret in it by itself and masked."""
    if isinstance(value, dict) and list(value) == ["secret"]:
        yield name, MASK, secret_origin(value["secret"], os.environ) or f"missing: secret {value['secret']!r}"
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _masked(f"{name}.{key}", item, file)
    elif isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        for index, item in enumerate(value):
            yield from _masked(f"{name}[{index}]", item, file)
    else:
        yield name, value, file


def _text(value: Any) -> str:
    """Return a value as a settings file has it."""
    import orjson

    if value is None:
        return "none"
    return json_cell(orjson.dumps(value, default=str).decode())

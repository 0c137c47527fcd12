"""Each setting stands in the reference with its variable, range and default, and nothing else does."""

from __future__ import annotations

import json
import re
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

import pytest

from ael_store.settings import AT_START, AgentTable, Rule, Settings, TaskLimit

REFERENCE = (Path(__file__).parents[2] / "docs/reference/settings.md").read_text("utf-8")
SETTINGS_PART, LIMITS_PART, AGENTS_PART = re.split(r"\n## (?:Limits of tasks|Agents)\n", REFERENCE)
SETTINGS = {setting.name: setting for setting in fields(Settings) if setting.name != "limits"}


def rows(text: str) -> dict[str, list[str]]:
    """Return the rows of the tables: name to the other cells."""
    lines = re.findall(r"^\| `(\w+)` \| (.*) \|$", text, re.MULTILINE)
    return {name: cells.split(" | ") for name, cells in lines}


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_setting_is_documented(setting: Field[Any]) -> None:
    rule: Rule = setting.metadata["rule"]

    variable, accepted, default, meaning = rows(SETTINGS_PART)[setting.name]

    assert variable == f"`AEL_{setting.name.upper()}`"
    assert default == ("none" if setting.default is None else f"`{json.dumps(setting.default)}`")
    assert accepted.endswith(", ".join(f"`{choice}`" for choice in rule.choices) or rule.range)
    assert rule.unit in accepted
    assert meaning.endswith(".")


def test_settings_that_wait_for_the_next_start_are_documented() -> None:
    found = re.search(
        r"^These are taken up by the next start only.*: (.*), the tables `\[limits", REFERENCE, re.MULTILINE
    )

    assert found is not None
    assert re.findall(r"`(\w+)`", found[1]) == sorted(AT_START)


def test_nothing_else_is_documented() -> None:
    assert set(rows(SETTINGS_PART)) == set(SETTINGS)


def test_each_key_of_a_limit_is_documented() -> None:
    assert set(rows(LIMITS_PART)) == {part.name for part in fields(TaskLimit)}


def test_each_key_of_an_agent_table_is_documented() -> None:
    keys = {part.name for part in fields(AgentTable)} - {"name", "agent_class", "origin"}

    assert set(rows(AGENTS_PART)) == keys | {"class"}

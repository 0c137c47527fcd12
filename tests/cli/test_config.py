"""`ael config show`: values, where they come from, and no secret."""

from __future__ import annotations

from pathlib import Path

import pytest

from ael_store.settings import RULES
from tests.cli.conftest import Ael

FILE = """
tick_rate = 2
[limits.llm]
per_minute = 60
[agents.kitchen]
class = "Sensor"
priority = 8
config = { pin = 4, token = { secret = "KITCHEN_TOKEN" }, doors = [{ secret = "DOOR" }] }
"""


def test_each_setting_is_shown(ael: Ael) -> None:
    shown = ael("config", "show", "--json").json

    assert list(shown) == list(RULES)
    assert (shown["tick_rate"], shown["max_agents"]) == (1.0, None)


def test_origin_of_each_value(ael: Ael, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ael.toml").write_text(FILE)
    (tmp_path / "door").write_text("open sesame")
    monkeypatch.setenv("AEL_GRACE", "3")
    monkeypatch.setenv("KITCHEN_TOKEN", "very-secret")
    monkeypatch.setenv("DOOR_FILE", str(tmp_path / "door"))

    done = ael("config", "show", "--origin", "--json")

    assert done.json["tick_rate"] == {"value": 2.0, "origin": "ael.toml"}
    assert done.json["grace"] == {"value": 3.0, "origin": "environment AEL_GRACE"}
    assert done.json["slow_after"] == {"value": 1.0, "origin": "default"}
    assert done.json["limits.llm.per_minute"] == {"value": 60, "origin": "ael.toml"}
    assert done.json["agents.kitchen.config.pin"] == {"value": 4, "origin": "ael.toml"}
    assert done.json["agents.kitchen.config.token"] == {"value": "******", "origin": "environment KITCHEN_TOKEN"}
    assert done.json["agents.kitchen.config.doors[0]"]["origin"] == f"file {tmp_path}/door (environment DOOR_FILE)"
    for secret in ("very-secret", "sesame"):
        assert secret not in done.out + ael("config", "show", "--origin").out + ael("config", "show").out


def test_secret_of_the_service_manager_and_a_missing_one(
    ael: Ael, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ael.toml").write_text(FILE)
    (tmp_path / "KITCHEN_TOKEN").write_text("x")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))

    shown = ael("config", "show", "agents.kitchen", "--origin", "--json").json

    assert shown["agents.kitchen.config.token"]["origin"] == "credential KITCHEN_TOKEN of the service manager"
    assert shown["agents.kitchen.config.doors[0]"]["origin"] == "missing: secret 'DOOR'"


def test_one_setting(ael: Ael) -> None:
    assert ael("config", "show", "tick_rate", "--json").json == 1.0
    assert ael("config", "show", "tick_rate").out == "setting\tvalue\ntick_rate\t1.0\n"
    done = ael("config", "show", "tickrate")
    assert (done.code, "did you mean tick_rate" in done.err) == (2, True)


def test_unknown_variable_is_warned_of_and_unknown_key_refused(
    ael: Ael, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AEL_TICKRATE", "2")
    assert "did you mean 'AEL_TICK_RATE'?" in ael("config", "show").err

    (tmp_path / "ael.toml").write_text("tickrate = 2\n")
    done = ael("config", "show")
    assert (done.code, "did you mean 'tick_rate'?" in done.err) == (2, True)

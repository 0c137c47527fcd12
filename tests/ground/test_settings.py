"""Settings come from flags, variables, files and defaults, and what is wrong is named with its origin."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Any

import pytest

from ael_store import settings
from ael_store.errors import InvalidSetting
from ael_store.model.secret import Secret
from ael_store.settings import LoadedSettings, Settings, load_settings


class Folder:
    """A folder with settings files, loaded with an environment of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, text: str | bytes, name: str = "ael.toml") -> Folder:
        (self.path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return self

    def load(self, flags: Mapping[str, object] = {}, **environ: str) -> LoadedSettings:
        return load_settings(flags, environ=environ, folder=self.path)

    def refusal(self, flags: Mapping[str, object] = {}, **environ: str) -> str:
        with pytest.raises(InvalidSetting) as caught:
            self.load(flags, **environ)
        return str(caught.value)

    def config(self, text: str, **environ: str) -> Any:
        """Return the configuration of an agent whose table holds the text."""
        self.write(f"[agents.kitchen]\nclass = 'Sensor'\n{text}\n")
        return self.load().agents["kitchen"].read_config(environ)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


# -- precedence -------------------------------------------------------------------------------------


def test_defaults_hold_where_nothing_is_said(folder):
    loaded = folder.load()

    assert loaded.settings == Settings()
    assert set(loaded.origins.values()) == {"default"}
    assert (loaded.agents, loaded.warnings, loaded.file) == ({}, [], None)


def test_flags_go_before_variables_before_files(folder):
    folder.write("tick_rate = 1.5\nmax_agents = 3\nstrategy = 'round_robin'\n")

    loaded = folder.load({"tick_rate": 3.5}, AEL_TICK_RATE="2.5", AEL_MAX_AGENTS="4")

    assert (loaded.settings.tick_rate, loaded.settings.max_agents) == (3.5, 4)
    assert loaded.settings.strategy == "round_robin"
    assert loaded.origins["tick_rate"] == "flag --tick-rate"
    assert loaded.origins["max_agents"] == "environment AEL_MAX_AGENTS"
    assert loaded.origins["strategy"] == "ael.toml"
    assert loaded.origins["db"] == "default"


def test_ael_toml_goes_before_pyproject(folder):
    folder.write("[tool.ael]\ntick_rate = 2\n[tool.other]\nx = 1\n", "pyproject.toml")

    loaded = folder.load()
    assert (loaded.settings.tick_rate, loaded.file) == (2.0, folder.path / "pyproject.toml")
    assert loaded.origins["tick_rate"] == "pyproject.toml [tool.ael]"

    folder.write("tick_rate = 3")
    assert folder.load().settings.tick_rate == 3.0


def test_pyproject_without_a_section_is_not_used(folder):
    assert folder.write("[project]\nname = 'x'\n", "pyproject.toml").load().file is None


def test_flag_that_was_not_given_and_empty_variable_do_not_count(folder):
    loaded = folder.load({"tick_rate": None}, AEL_TICK_RATE=" ", AEL_DB="")

    assert loaded.settings == Settings()


def test_named_file_is_read_instead_of_the_folder(folder):
    folder.write("tick_rate = 2").write("tick_rate = 3", "other.toml")

    loaded = load_settings(environ={}, folder=folder.path, file=folder.path / "other.toml")

    assert loaded.settings.tick_rate == 3.0
    assert loaded.origins["tick_rate"] == "other.toml"
    with pytest.raises(InvalidSetting, match="there is no such settings file"):
        load_settings(environ={}, file=folder.path / "missing.toml")


def test_process_environment_and_working_directory_are_the_default(folder, monkeypatch):
    monkeypatch.chdir(folder.write("max_agents = 2").path)
    monkeypatch.setenv("AEL_TICK_RATE", "5")

    loaded = load_settings().settings

    assert (loaded.tick_rate, loaded.max_agents) == (5.0, 2)


# -- the database -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("db", "expected"),
    [
        ("data/home.db", "{folder}/data/home.db"),
        ("/var/home.db", "/var/home.db"),
        ("sqlite:///data/home.db?x=1", "sqlite:///{folder}/data/home.db?x=1"),
        ("sqlite+aiosqlite:////var/home.db", "sqlite+aiosqlite:////var/home.db"),
        ("postgresql://host/home", "postgresql://host/home"),
        ("sqlite:///:memory:", "sqlite:///:memory:"),
        (":memory:", ":memory:"),
    ],
)
def test_database_of_a_file_is_relative_to_the_file(folder, db, expected):
    loaded = folder.write(f"db = '{db}'").load()

    assert loaded.settings.db == expected.format(folder=folder.path)


def test_database_of_a_flag_or_a_variable_stays_as_it_is(folder):
    assert folder.load({"db": "a.db"}).settings.db == "a.db"
    assert folder.load(AEL_DB="a.db").settings.db == "a.db"


# -- types and ranges -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("tick_rate", "0", 0.0),
        ("tick_rate", "2e-1", 0.2),
        ("max_agents", "7", 7),
        ("max_agents", "none", None),
        ("backup", "no", False),
        ("backup", "TRUE", True),
        ("log_level", "debug", "DEBUG"),
        ("timezone", "Europe/Berlin", "Europe/Berlin"),
    ],
)
def test_texts_of_variables_and_flags_are_read_by_type(folder, name, text, value):
    for loaded in (folder.load(**{f"AEL_{name.upper()}": text}), folder.load({name: text})):
        assert getattr(loaded.settings, name) == value
        assert type(getattr(loaded.settings, name)) is type(value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tick_rate", "fast"),
        ("tick_rate", "-1"),
        ("tick_rate", "nan"),
        ("tick_rate", "inf"),
        ("tick_rate", "1e300"),
        ("max_agents", "0"),
        ("max_agents", "1.5"),
        ("slow_after", "0"),
        ("idle_commit", "10.1"),
        ("backlog_days", "0"),
        ("value_depth", "201"),
        ("backup", "maybe"),
        ("strategy", "fifo"),
        ("timezone", "Mars/Olympus"),
        ("timezone", "/etc/localtime"),
        ("timezone", "Europe"),
        ("db", "a\0b"),
    ],
)
def test_wrong_value_is_refused_with_name_value_and_origin(folder, name, text):
    message = folder.refusal(**{f"AEL_{name.upper()}": text})

    assert message.startswith(f"setting {name} is ")
    assert f"(environment AEL_{name.upper()}); wanted is " in message


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("max_agents = true", "a whole number, 1 or more"),
        ("max_agents = 2.0", "a whole number, 1 or more"),
        ("tick_rate = false", "a number, 0 to 1000000000 (s)"),
        ("tick_rate = '1'", "a number, 0 to 1000000000 (s)"),
        (f"tick_rate = 1{'0' * 400}", "a number, 0 to 1000000000 (s)"),
        ("slow_after = 0", "a number, above 0, at most 1000000000 (s)"),
        ("backup = 1", "true or false"),
        ("db = 3", "a text"),
        ("db = ''", "a text"),
        ("strategy = 'fifo'", "one of 'priority', 'round_robin', 'load_aware'"),
    ],
)
def test_wrong_type_in_a_file_is_refused_with_what_is_wanted(folder, line, wanted):
    message = folder.write(line).refusal()

    assert f"({folder.path / 'ael.toml'}); wanted is {wanted}" in message


def test_wrong_value_is_refused_also_where_a_flag_would_win(folder):
    assert "setting tick_rate is 'x'" in folder.write("tick_rate = 'x'").refusal({"tick_rate": 1.0})


def test_nearest_time_zone_is_named(folder):
    assert "did you mean 'Europe/Berlin'?" in folder.refusal(AEL_TIMEZONE="Europe/Berlim")


def test_settings_made_by_hand_are_checked_too():
    assert type(Settings(tick_rate=2).tick_rate) is float
    with pytest.raises(InvalidSetting, match=r"setting tick_rate is -1 \(argument\)"):
        Settings(tick_rate=-1)
    with pytest.raises(FrozenInstanceError):
        Settings().tick_rate = 2.0  # type: ignore[misc]


def test_each_setting_has_a_help_text_with_unit_and_range():
    for setting in fields(Settings):
        if setting.name == "limits":  # a table of tables, with types of its own
            continue
        rule = setting.metadata["rule"]
        assert setting.metadata["help"].endswith(f"{rule.range})" if rule.range else "")
        assert rule.unit in setting.metadata["help"]


# -- unknown names ----------------------------------------------------------------------------------


def test_unknown_key_in_a_file_is_refused_with_the_nearest(folder):
    message = folder.write("tick-rate = 1\nbackups = true\n").refusal()

    assert message.startswith(f"{folder.path / 'ael.toml'}: unknown setting 'tick-rate'; did you mean 'tick_rate'?")
    assert "unknown setting 'backups'; did you mean 'backup'?" in message


def test_unknown_key_unlike_any_other_is_refused_with_all_names(folder):
    message = folder.write("[tool.ael]\nzzz = 1\n", "pyproject.toml").refusal()

    assert "pyproject.toml [tool.ael]: unknown setting 'zzz'; known are db, tick_rate" in message


def test_unknown_flag_is_refused(folder):
    assert "flags: unknown setting 'tickrate'" in folder.refusal({"tickrate": 1})


def test_unknown_variable_is_warned_of_with_the_nearest(folder):
    loaded = folder.load(AEL_TIKC_RATE="1", AEL_PYTHON="python3", AEL_TEST_PG="x", OTHER="1")

    assert len(loaded.warnings) == 1
    assert "AEL_TIKC_RATE" in loaded.warnings[0]
    assert "did you mean 'AEL_TICK_RATE'?" in loaded.warnings[0]


def test_variable_that_holds_a_secret_is_not_warned_of(folder):
    folder.write("[agents.a]\nclass = 'A'\nconfig = {x = [{secret = 'AEL_TOKEN'}]}\n")

    assert folder.load(AEL_TOKEN="abc", AEL_TOKEN_FILE="x").warnings == []


# -- broken files -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("a = 1\nb = = 2\n", "line 2, column 5: not valid TOML"),
        ("a = 1\nb = 'x", "line 2, column 7: not valid TOML"),
        ("a = 1\na = 2\n", "line 2, column 6: not valid TOML"),
        (b"a = 1\n# \xff\n", "line 2, column 3: not UTF-8 text"),
        (f"a = 1{'0' * 5000}", "not valid TOML"),
    ],
)
def test_broken_file_is_refused_with_line_and_column(folder, text, where):
    message = folder.write(text).refusal()

    assert message.startswith(f"{folder.path / 'ael.toml'}, line ")
    assert where in message


def test_file_that_can_not_be_read_is_refused(folder):
    (folder.path / "ael.toml").mkdir()

    assert "ael.toml can't be read: Is a directory" in folder.refusal()


def test_section_that_is_no_table_is_refused(folder):
    assert "tool.ael is int" in folder.write("[tool]\nael = 1\n", "pyproject.toml").refusal()
    assert "agents is list" in folder.write("agents = []").refusal()
    assert "[agents.a] is int" in folder.write("[agents]\na = 1").refusal()


def test_byte_order_mark_is_skipped(folder):
    assert folder.write(b"\xef\xbb\xbftick_rate = 2").load().settings.tick_rate == 2.0


# -- agents -----------------------------------------------------------------------------------------


def test_table_of_an_agent_is_read(folder):
    folder.write(
        """
[agents.kitchen]
class = "devices:Sensor"
priority = 8
enabled = false
tick_timeout = 0
subscriptions = ["a.*"]
config = { pin = 4 }
"""
    )

    table = folder.load().agents["kitchen"]

    assert (table.name, table.agent_class) == ("kitchen", "devices:Sensor")
    assert table.attributes() == {
        "priority": 8,
        "enabled": False,
        "tick_timeout": 0,
        "subscriptions": ["a.*"],
    }
    assert table.read_config() == {"pin": 4}


def test_table_of_an_agent_in_pyproject_is_read(folder):
    folder.write("[tool.ael.agents.kitchen]\nclass = 'Sensor'\n", "pyproject.toml")

    table = folder.load().agents["kitchen"]

    assert table.origin == f"{folder.path / 'pyproject.toml'} [tool.ael.agents.kitchen]"
    assert table.read_config() is None


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("priority = 3", "has no class"),
        ("class = 3", "class is 3; wanted is"),
        ("class = 'A'\nprio = 3", "unknown key 'prio'; did you mean 'priority'?"),
        ("class = 'A'\npriority = true", "priority is True (bool); wanted is a whole number"),
        ("class = 'A'\nsubscriptions = 'a'", "subscriptions is 'a' (str); wanted is a list of event types"),
        ("class = 'A'\naliases = [1]", "aliases is [1] (list); wanted is a list of names"),
        ("class = 'A'\nconfig = 1", "config is 1 (int); wanted is a table"),
    ],
)
def test_wrong_table_of_an_agent_is_refused_with_its_name(folder, text, problem):
    message = folder.write(f"[agents.kitchen]\n{text}\n").refusal()

    assert f"{folder.path / 'ael.toml'} [agents.kitchen]" in message
    assert problem in message


# -- secrets ----------------------------------------------------------------------------------------


def test_secret_is_taken_from_a_variable_at_any_depth(folder):
    config = folder.config("config = {a = [{b = {secret = 'TOKEN'}}]}", TOKEN="abc")

    secret = config["a"][0]["b"]
    assert type(secret) is Secret
    assert (secret.reveal(), secret.name) == ("abc", "TOKEN")


def test_secret_is_taken_from_a_file(folder):
    folder.write("from a file\n", "token")

    config = folder.config("config = {a = {secret = 'TOKEN'}}", TOKEN_FILE=str(folder.path / "token"))

    assert config["a"].reveal() == "from a file"


def test_secret_is_taken_from_the_service_managers_credentials(folder):
    folder.write("from the manager\n", "TOKEN")

    config = folder.config("config = {a = {secret = 'TOKEN'}}", CREDENTIALS_DIRECTORY=str(folder.path))

    assert config["a"].reveal() == "from the manager"


def test_missing_secret_is_refused_with_the_three_places(folder):
    with pytest.raises(InvalidSetting) as caught:
        folder.config("config = {a = {secret = 'TOKEN'}}", TOKEN="")

    message = str(caught.value)
    assert "[agents.kitchen] config.a: secret 'TOKEN' is missing or empty" in message
    assert "variable TOKEN," in message
    assert "TOKEN_FILE" in message
    assert "$CREDENTIALS_DIRECTORY/TOKEN" in message


def test_settings_load_without_their_secrets(folder):
    folder.write("[agents.kitchen]\nclass = 'Sensor'\nconfig = {a = {secret = 'TOKEN'}}\n")

    assert list(folder.load().agents["kitchen"].secret_names()) == ["TOKEN"]


@pytest.mark.parametrize(
    ("content", "problem"),
    [(None, "there is no such file"), (b"\xff", "is not UTF-8 text"), (b"\n", "is missing or empty")],
)
def test_secret_file_that_can_not_be_used_is_refused(folder, content, problem):
    path = folder.path / "token"
    if content is not None:
        path.write_bytes(content)

    with pytest.raises(InvalidSetting, match=problem):
        folder.config("config = {a = {secret = 'TOKEN'}}", TOKEN_FILE=str(path))


@pytest.mark.parametrize("name", ["'../../etc/passwd'", "''", "3", "'a/b'", "'.x'"])
def test_name_of_a_secret_leads_nowhere_else(folder, name):
    with pytest.raises(InvalidSetting, match="the secret's name is"):
        folder.config(f"config = {{a = {{secret = {name}}}}}", CREDENTIALS_DIRECTORY="/")


def test_key_named_secret_beside_others_is_a_key_like_any_other(folder):
    assert folder.config("config = {secret = 'x'}") == {"secret": "x"}
    assert folder.config("config = {a = {secret = 'x', n = 1}}") == {"a": {"secret": "x", "n": 1}}


# -- import -----------------------------------------------------------------------------------------


def test_import_of_settings_is_light():
    # The package itself is left out: what it imports is its own affair.
    package = Path(settings.__file__).parent
    code = f"""
import sys, types
sys.modules["ael_store"] = types.ModuleType("ael_store")
sys.modules["ael_store"].__path__ = [{str(package)!r}]
import ael_store.settings
heavy = "tomllib zoneinfo difflib sqlalchemy orjson asyncio typer structlog"
print([name for name in heavy.split() if name in sys.modules])
"""

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout == "[]\n"

"""The agents of a file, a module or an attribute are found, or it is said what is missing and where."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from ael_store.errors import AgentNotLoadable, InvalidAgent, InvalidSetting
from ael_store.runtime.target import load_agents
from ael_store.settings import AgentTable

IMPORT = "from ael_store.runtime.agent import AgentBase\n"
SENSOR = f"""{IMPORT}
class Sensor(AgentBase):
    name = "sensor"
"""


@pytest.fixture(autouse=True)
def fresh_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run in an empty folder and forget afterwards what was imported from it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def write(text: str, name: str = "home.py") -> str:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return name


def table(name: str, agent_class: str, **values: object) -> dict[str, AgentTable]:
    return {name: AgentTable(name, agent_class, f"ael.toml [agents.{name}]", **values)}  # type: ignore[arg-type]


def names(target: str, tables: Mapping[str, AgentTable] = {}) -> list[str]:
    return [agent.name for agent in load_agents(target, tables)]


def refusal(target: str, tables: Mapping[str, AgentTable] = {}) -> str:
    with pytest.raises(AgentNotLoadable) as caught:
        load_agents(target, tables)
    return str(caught.value)


# -- which agents -----------------------------------------------------------------------------------


def test_file_gives_an_instance_of_each_named_class_that_it_defines():
    write(f"{IMPORT}\nclass Imported(AgentBase):\n    name = 'imported'\n", "other.py")
    target = write(
        f"""{IMPORT}from other import Imported
class Base(AgentBase):
    pass
class Second(Base):
    name = "second"
class First(Base):
    name = "first"
"""
    )

    assert names(target) == ["second", "first"]


def test_list_goes_before_classes():
    target = write(f"{SENSOR}\nagents = [Sensor('kitchen'), Sensor('cellar')]\n")

    assert names(target) == ["kitchen", "cellar"]


def test_tables_go_before_classes_and_join_a_list():
    target = write(SENSOR)
    listed = write(f"{SENSOR}\nagents = [Sensor('kitchen')]\n", "listed.py")

    assert names(target, table("attic", "Sensor")) == ["attic"]
    assert names(listed, table("attic", "Sensor")) == ["kitchen", "attic"]


@pytest.mark.parametrize("attribute", ["one", "Sensor", "several", "make", "holder.several"])
def test_attribute_may_be_an_agent_a_class_a_list_or_a_function(attribute):
    target = write(
        f"""{SENSOR}
one = Sensor()
several = (one,)
def make():
    return [Sensor]
class holder:
    several = [one]
"""
    )

    assert names(f"{target}:{attribute}") == ["sensor"]


def test_module_is_found_in_the_working_directory():
    write("", "house/__init__.py")
    write(f"{SENSOR}\nattic = Sensor('attic')\n", "house/rooms.py")

    assert names("house.rooms") == ["sensor"]
    assert names("house.rooms:attic") == ["attic"]


def test_module_named_agents_is_no_list_of_agents():
    write(f"{SENSOR}\nfrom . import agents\n", "house/__init__.py")
    write("", "house/agents.py")

    assert names("house") == ["sensor"]


# -- how a file is imported -------------------------------------------------------------------------


def test_file_can_import_its_neighbours_and_be_pickled():
    write("ROOM = 'kitchen'\n", "deep/rooms.py")
    target = write(f"{SENSOR}\nfrom rooms import ROOM\nagents = [Sensor(ROOM)]\n", "deep/home.py")

    [agent] = load_agents(target)

    assert type(agent).__module__ == "home"
    assert sys.path[0] == str(Path("deep").absolute())
    assert pickle.loads(pickle.dumps(type(agent))) is type(agent)


def test_two_files_of_the_same_stem_do_not_mix():
    first = load_agents(write(SENSOR, "one/home.py"))
    second = load_agents(write(SENSOR.replace('"sensor"', '"other"'), "two/home.py"))

    assert [agent.name for agent in first + second] == ["sensor", "other"]
    assert type(first[0]).__module__ == "home"
    assert type(second[0]).__module__.startswith("ael_target_")


def test_file_named_like_a_module_of_python_does_not_replace_it():
    for name in ("json.py", "antigravity.py", "two words.py"):
        [agent] = load_agents(write(SENSOR, name))

        assert type(agent).__module__.startswith("ael_target_")
    assert "antigravity" not in sys.modules


def test_same_file_is_imported_once():
    target = write(SENSOR)

    assert type(load_agents(target)[0]) is type(load_agents(os.path.abspath(target))[0])


# -- tables -----------------------------------------------------------------------------------------


def test_table_sets_configuration_and_attributes():
    target = write(
        f"""{IMPORT}from dataclasses import dataclass
class Sensor(AgentBase):
    @dataclass
    class Config:
        pin: int
        token: str
"""
    )
    tables = table("kitchen", "Sensor", priority=8, trigger="every 1s", config={"pin": 4, "token": {"secret": "TOKEN"}})

    [agent] = load_agents(target, tables, environ={"TOKEN": "abc"})

    assert (agent.name, agent.priority, agent.trigger) == ("kitchen", 8, "every 1s")
    assert (agent.config.pin, agent.config.token.reveal()) == (4, "abc")


def test_table_may_name_a_class_of_another_module():
    target = write("")
    write(SENSOR, "devices.py")

    assert names(target, table("kitchen", "devices:Sensor")) == ["kitchen"]
    assert names(target, table("kitchen", "devices.py:Sensor")) == ["kitchen"]


def test_table_of_an_agent_that_the_file_makes_too_is_refused():
    target = write(f"{SENSOR}\nagents = [Sensor('kitchen')]\n")

    message = refusal(target, table("kitchen", "Sensor"))

    assert "two agents are named 'kitchen'" in message
    assert "home.py" in message and "ael.toml [agents.kitchen]" in message


def test_table_with_an_unknown_or_wrong_class_is_refused():
    target = write(f"{SENSOR}\nnothing = 1\n")

    assert "has no attribute 'Senser'; there are: Sensor" in refusal(target, table("a", "Senser"))
    assert "class is int; wanted is a subclass of AgentBase" in refusal(target, table("a", "nothing"))
    assert "ael.toml [agents.a]" in refusal(target, table("a", "Senser"))


def test_table_that_does_not_fit_keeps_its_own_error():
    target = write(SENSOR)

    with pytest.raises(InvalidAgent, match="priority is 99"):
        load_agents(target, table("kitchen", "Sensor", priority=99))
    with pytest.raises(InvalidSetting, match="secret 'TOKEN' is missing"):
        load_agents(target, table("kitchen", "Sensor", config={"t": {"secret": "TOKEN"}}), environ={})


# -- what can't be loaded ---------------------------------------------------------------------------


def test_missing_file_is_refused_with_the_nearest():
    write(SENSOR)

    assert "there is no file hone.py" in refusal("hone.py")
    assert "did you mean home.py?" in refusal("hone.py")


def test_missing_module_is_told_from_a_module_that_misses_one():
    write("import no_such_module\n")

    assert "No module named 'no_home'" in refusal("no_home")
    assert "looked in" in refusal("no_home")
    assert "module home can't be imported: ModuleNotFoundError" in refusal("home")
    assert f"{Path('home.py').absolute()}:1" in refusal("home")


@pytest.mark.parametrize("target", ["", ":", "home:", ":agents", "two words", ".home"])
def test_target_that_names_nothing_is_refused(target):
    assert "wanted is a .py file, a module, or module:attribute" in refusal(target)


def test_folder_and_other_files_are_refused():
    write("", "house/notes.txt")

    assert "is a folder" in refusal("house")
    assert "is a folder" in refusal("./house")
    assert "is no .py file" in refusal("house/notes.txt")


def test_error_on_import_names_the_deepest_line_of_the_users_code():
    write("import json\ndef load():\n    return json.loads('{')\n", "helper.py")
    target = write(f"{IMPORT}import helper\nhelper.load()\n")

    message = refusal(target)

    assert "home.py can't be imported: JSONDecodeError" in message
    assert f"{Path('helper.py').absolute()}:3)" in message
    assert "home" not in sys.modules


def test_syntax_error_names_its_line():
    message = refusal(write("x = 1\ny = (\n"))

    assert "SyntaxError: '(' was never closed" in message
    assert "home.py:2)" in message


def test_file_that_exits_on_import_is_refused():
    assert "SystemExit: 3" in refusal(write("import sys\nsys.exit(3)\n"))


def test_relative_import_in_a_file_is_refused_with_the_way_that_works():
    assert "package.module" in refusal(write("from . import other\n"))


def test_file_without_agents_is_refused_with_what_is_needed():
    message = refusal(write(f"{IMPORT}class Nameless(AgentBase):\n    pass\n"))

    assert "home.py holds no agents" in message
    assert "agents = [...]" in message


def test_missing_attribute_is_refused_with_the_nearest():
    target = write(f"{SENSOR}\nsensors = [Sensor()]\n")

    assert "has no attribute 'sensor'; there are: sensors" in refusal(f"{target}:sensor")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("agents = {}", "home.py:agents is dict"),
        ("agents = [1]", "item 0 of home.py:agents is int"),
        ("def agents():\n    return None", "what home.py:agents() returned is NoneType"),
        ("def agents():\n    1 / 0", "home.py:agents() failed: ZeroDivisionError"),
        ("async def agents():\n    pass", "is an async function"),
        ("agents = [Sensor(), Sensor()]", "two agents are named 'sensor' (in home.py)"),
    ],
)
def test_list_that_holds_no_agents_is_refused(text, problem):
    assert problem in refusal(write(f"{SENSOR}\n{text}\n"))


def test_class_that_can_not_be_made_is_refused_with_its_line():
    target = write(f"{SENSOR}    def __init__(self, pin):\n        super().__init__()\n")

    assert "no Sensor could be made: TypeError" in refusal(target)

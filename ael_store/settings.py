"""Settings: one typed field each, checked wherever they come from.

`load_settings()` takes flags, then `AEL_*` variables, then `ael.toml` (else `[tool.ael]` of `pyproject.toml`)
in the folder, then the defaults, all under the same names, and tells where each value came from. Wrong values
and unknown keys in a file are refused, unknown variables are warned of. An empty variable counts as not set.

A `db` in a file is relative to the folder of that file; in a flag or a variable it is relative to the working
directory. Secrets in `[agents.*]` tables are looked up when the agents are made (`AgentTable.read_config`),
so that `ael status` needs none of them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

from ael_store.errors import InvalidSetting
from ael_store.model.secret import Secret

__all__ = [
    "AT_START",
    "AgentTable",
    "LoadedSettings",
    "Rule",
    "Settings",
    "TaskLimit",
    "load_settings",
    "secret_origin",
]

_YES, _NO = ("1", "true", "yes", "on"), ("0", "false", "no", "off")
_NOUNS = {"bool": "true or false", "int": "a whole number", "float": "a number", "str": "a text"}
_LONGEST_S = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Rule:
    """What a setting accepts. `low` and `high` belong to the range, except `low` where `above` is true."""

    kind: Literal["bool", "int", "float", "str"]
    unit: str = ""
    low: int | None = None
    high: int | None = None
    above: bool = False
    choices: tuple[str, ...] = ()
    optional: bool = False
    zone: bool = False

    @property
    def range(self) -> str:
        """The values accepted, in words; empty where the type says it all."""
        if self.choices:
            return " | ".join(self.choices)
        if self.above:
            return f"above {self.low}, at most {self.high}"
        if self.high is not None:
            return f"{self.low} to {self.high}"
        return "" if self.low is None else f"{self.low} or more"

    @property
    def wanted(self) -> str:
        """What to say when something else was found."""
        if self.choices:
            return "one of " + ", ".join(map(repr, self.choices))
        if self.zone:
            return "an IANA time zone like 'Europe/Berlin'"
        wanted = f"{_NOUNS[self.kind]}, {self.range}" if self.range else _NOUNS[self.kind]
        return f"{wanted} ({self.unit})" if self.unit else wanted

    def parse(self, text: str) -> object:
        """Return the value that a variable or flag spells; raises ValueError."""
        text = text.strip()
        if self.optional and text.lower() == "none":
            return None
        match self.kind:
            case "bool":
                if text.lower() not in _YES + _NO:
                    raise ValueError(text)
                return text.lower() in _YES
            case "int":
                return int(text)
            case "float":
                return float(text)
            case "str":
                return text

    def check(self, value: object) -> object:
        """Return the value in its own type; raises ValueError, its message an addition to `wanted`."""
        if value is None and self.optional:
            return None
        match self.kind:
            case "bool":
                good = type(value) is bool
            case "str":
                value, good = self._check_text(value)
            case "int":
                good = type(value) is int and self._fits(value)
            case "float":
                good = type(value) in (int, float) and self._fits(value)  # type: ignore[arg-type]
                if good:
                    value = float(value)  # type: ignore[arg-type]
        if not good:
            raise ValueError("")
        return value

    def _check_text(self, value: object) -> tuple[object, bool]:
        if not isinstance(value, str) or not value or "\0" in value:
            return value, False
        if self.choices:
            known = {choice.lower(): choice for choice in self.choices}
            return known.get(value.lower()), value.lower() in known
        if self.zone and value != "UTC":
            _check_zone(value)
        return value, True

    def _fits(self, number: float) -> bool:
        # Written so that NaN fits nowhere.
        if self.low is not None and not (number > self.low if self.above else number >= self.low):
            return False
        return self.high is None or number <= self.high


def _setting(default: Any, help: str, rule: Rule) -> Any:
    """Return a dataclass field whose metadata hold its help, with unit and range, and its rule."""
    noun = ", ".join(part for part in (rule.unit, rule.range) if part)
    return field(default=default, metadata={"help": f"{help} ({noun})" if noun else help, "rule": rule})


def _switch(default: bool, help: str) -> Any:
    return _setting(default, help, Rule("bool"))


def _count(default: int, help: str, *, unit: str = "", high: int | None = None) -> Any:
    return _setting(default, help, Rule("int", unit=unit, low=1, high=high))


def _length(default: float, help: str, *, high: int = _LONGEST_S, above: bool = False) -> Any:
    return _setting(default, help, Rule("float", unit="s", low=0, high=high, above=above))


def _choice(default: str, help: str, *choices: str) -> Any:
    return _setting(default, help, Rule("str", choices=choices))


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskLimit:
    """A limit of tasks, as a table `[limits.NAME]` has it; None stands for no bound."""

    concurrency: int | None = None
    """Most attempts running at once."""
    per_minute: int | None = None
    """Most attempts begun within any 60 s."""
    per_day: int | None = None
    """Most attempts begun in a day (UTC)."""
    usd_per_day: str | None = None
    """Most money in a day (UTC), a decimal number as text; numbers are accepted."""
    breaker: int = 3
    """How many different tasks in a row may fail before none is started for a while; 0 means any number."""

    def __post_init__(self) -> None:
        for name, low in (("concurrency", 1), ("per_minute", 1), ("per_day", 0), ("breaker", 0)):
            value = getattr(self, name)
            if (value is not None or name == "breaker") and (type(value) is not int or not low <= value <= 10**9):
                raise InvalidSetting(f"{name} is {value!r}; wanted is a whole number, {low} or more")
        if self.usd_per_day is not None:
            object.__setattr__(self, "usd_per_day", read_amount("usd_per_day", self.usd_per_day))

    def bounds(self) -> dict[str, int | str]:
        """Return the bounds that there are."""
        found = {name: getattr(self, name) for name in ("concurrency", "per_minute", "per_day", "usd_per_day")}
        return {name: value for name, value in found.items() if value is not None}


def read_amount(name: str, value: object) -> str:
    """Return an amount of money as a plain decimal number; raises InvalidSetting."""
    try:
        amount = Decimal(str(value))
    except ArithmeticError:
        amount = Decimal(-1)
    if isinstance(value, bool) or not amount.is_finite() or not 0 <= amount <= 10**12:
        raise InvalidSetting(f"{name} is {value!r}; wanted is an amount of USD, 0 or more")
    return f"{amount:f}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Every setting with its default. A wrong value raises InvalidSetting, however it comes in."""

    db: str = _setting("ael.db", "The database: a path or a database URL", Rule("str"))
    tick_rate: float = _length(1.0, "Period of the clock; 0 means back to back")
    strategy: Literal["priority", "round_robin", "load_aware"] = _choice(
        "priority", "How agents are chosen for an iteration", "priority", "round_robin", "load_aware"
    )
    max_agents: int | None = _setting(
        None, "Most agents in an iteration; none means no limit", Rule("int", low=1, optional=True)
    )
    durability: Literal["full", "normal"] = _choice(
        "full", "What a committed iteration survives: a power cut, or only a killed process", "full", "normal"
    )
    full_limit: float = _length(300.0, "How long to wait for room when the disk is full; 0 means end at once")
    allow_shared_folder: bool = _switch(False, "Whether the database may lie in a folder that everybody may write")
    tick_timeout: float = _length(60.0, "How long a hook may run; 0 means no limit")
    slow_after: float = _length(1.0, "After how long a hook goes on in the background", above=True)
    grace: float = _length(10.0, "How long running units may take to finish when the loop stops")
    tick_log: Literal["changed", "all"] = _choice(
        "changed", "Which ticks get a row: those with an effect or a problem, or all", "changed", "all"
    )
    idle_commit: float = _length(10.0, "How long iterations in which nothing changed may wait", high=10)
    backlog_days: float = _setting(
        7.0,
        "How long events are kept for a subscriber that is away",
        Rule("float", unit="days", low=0, high=36_500, above=True),
    )
    delivery_attempts: int = _count(5, "Attempts before a delivery goes to the dead letters")
    hop_limit: int = _setting(
        64,
        "Most handlers of events that lead to an event, one after another, before it goes to the dead letters; "
        "0 means no limit",
        Rule("int", low=0),
    )
    deliveries_per_iteration: int = _count(1000, "Most deliveries in an iteration; the rest waits")
    timezone: str = _setting(
        "UTC", "Time zone of cron lines without one of their own (IANA name)", Rule("str", zone=True)
    )
    upgrade: Literal["auto", "never"] = _choice(
        "auto", "Whether `ael run` upgrades an old schema or refuses it", "auto", "never"
    )
    backup: bool = _switch(True, "Whether a backup file is made before an upgrade")
    key_bytes: int = _count(512, "Longest key of the state", unit="bytes", high=65_536)
    value_bytes: int = _count(1_048_576, "Largest value of the state", unit="bytes of JSON", high=500_000_000)
    event_bytes: int = _count(262_144, "Largest data of an event", unit="bytes of JSON", high=500_000_000)
    value_depth: int = _count(100, "How deep lists and dicts may be nested", unit="levels", high=200)
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = _choice(
        "INFO", "Least level that is logged", "DEBUG", "INFO", "WARNING", "ERROR"
    )
    log_format: Literal["auto", "console", "json"] = _choice(
        "auto",
        "How log lines look; auto is console on a terminal and in the journal, else json",
        "auto",
        "console",
        "json",
    )
    quarantine_after: int = _count(20, "Errors in a row after which an agent is quarantined")
    backoff_after: int = _count(5, "Errors in a row after which an agent backs off")
    quarantine_after_deaths: int = _setting(
        3,
        "Times in a row that the process died while a hook of an agent ran, after which it is quarantined; "
        "0 means never",
        Rule("int", low=0),
    )
    unclean_starts: int = _setting(
        5,
        "Runs begun within a minute and ended without a clean stop, after which the loop starts paused; 0 means never",
        Rule("int", low=0, high=100),
    )
    stall_warn: float = _length(5.0, "After how long a standstill of the event loop is reported; 0 means never")
    stall_limit: float = _length(
        120.0, "After how long a standstill of the event loop ends the process (exit code 70); 0 means never"
    )
    history_days: float = _setting(
        90.0,
        "How long changes, units and iterations are kept",
        Rule("float", unit="days", low=0, high=36_500, above=True),
    )
    event_days: float = _setting(
        30.0,
        "How long events are kept, and no longer than the rest of the history",
        Rule("float", unit="days", low=0, high=36_500, above=True),
    )
    history_rows: int = _setting(0, "Most changes, units and events together; 0 means any number", Rule("int", low=0))
    history_bytes: int = _setting(
        1_500_000_000,
        "Size of the file from which the oldest history is removed; 0 means any size",
        Rule("int", unit="bytes", low=0),
    )
    metric_days: float = _setting(
        7.0,
        "How long samples of metrics are kept; what they were by the hour is kept for ever",
        Rule("float", unit="days", low=0, high=36_500, above=True),
    )
    task_attempts: int = _count(5, "Attempts at a task before it has failed")
    task_timeout: float = _length(300.0, "How long an attempt at a task may take; 0 means no limit")
    tasks_at_once: int = _count(100, "Most tasks running at once", high=10_000)
    task_days: float = _setting(
        90.0,
        "How long tasks are kept after their result was taken up; their keys are known as long",
        Rule("float", unit="days", low=0, high=36_500, above=True),
    )
    web: str | None = _setting(
        None,
        "Where `ael run` serves the dashboard, HOST:PORT or a port; none means nowhere",
        Rule("str", optional=True),
    )
    web_read_only: bool = _switch(False, "Whether the dashboard only shows, and changes nothing")
    web_hosts: str | None = _setting(
        None,
        "Names by which the dashboard is asked for besides its own address, with commas between; none means none",
        Rule("str", optional=True),
    )
    limits: Mapping[str, TaskLimit] = field(default_factory=dict, hash=False)
    """Limits of tasks by name: tables `[limits.NAME]`, here also as mappings."""

    def __post_init__(self) -> None:
        for name in RULES:
            object.__setattr__(self, name, _checked(name, getattr(self, name), "argument"))
        object.__setattr__(self, "limits", _read_limits(self.limits, "limits"))


AT_START = frozenset(
    (
        "allow_shared_folder",
        "backup",
        "db",
        "durability",
        "event_bytes",
        "key_bytes",
        "stall_limit",
        "stall_warn",
        "strategy",
        "timezone",
        "unclean_starts",
        "upgrade",
        "value_bytes",
        "value_depth",
        "web",
        "web_hosts",
        "web_read_only",
    )
)
"""What only a start takes up; the other settings of a running loop can change (`[limits.*]` and `[agents.*]` can't)."""

RULES: dict[str, Rule] = {
    setting.name: setting.metadata["rule"] for setting in fields(Settings) if "rule" in setting.metadata
}


@dataclass(frozen=True, slots=True)
class AgentTable:
    """An `[agents.NAME]` table: an instance to be made. None stands for what the table does not say."""

    name: str
    agent_class: str
    origin: str
    config: Mapping[str, Any] | None = None
    priority: int | None = None
    enabled: bool | None = None
    trigger: str | None = None
    tick_timeout: float | None = None
    background: bool | None = None
    subscriptions: list[str] | None = None
    aliases: list[str] | None = None

    def attributes(self) -> dict[str, Any]:
        """Return the attributes that the table sets, as arguments for the agent's class."""
        values = {name: getattr(self, name) for name in _ATTRIBUTES if name != "config"}
        return {name: value for name, value in values.items() if value is not None}

    def read_config(self, environ: Mapping[str, str] | None = None) -> dict[str, Any] | None:
        """Return the configuration with its secrets looked up; None where the table has none.

        `{secret = "NAME"}` becomes a Secret with the text of the variable NAME, of the file that NAME_FILE
        names, or of `$CREDENTIALS_DIRECTORY/NAME` (line ends at the end are dropped; an empty text counts as
        missing). Raises InvalidSetting where there is none.
        """
        if self.config is None:
            return None
        environ = os.environ if environ is None else environ
        where = f"{self.origin} config"
        # The table itself is no value: in it, `secret` is a key like any other.
        return {key: _reveal(value, f"{where}.{key}", environ) for key, value in self.config.items()}

    def secret_names(self) -> Iterator[str]:
        """Yield the names of the secrets that the configuration asks for."""
        for value in (self.config or {}).values():
            yield from _secrets_in(value)


_ATTRIBUTES: dict[str, tuple[tuple[type, ...], str]] = {
    "config": ((dict,), "a table"),
    "priority": ((int,), "a whole number"),
    "enabled": ((bool,), "true or false"),
    "trigger": ((str,), "a text like 'every 30s' or a cron line"),
    "tick_timeout": ((int, float), "a number of seconds"),
    "background": ((bool,), "true or false"),
    "subscriptions": ((list,), "a list of event types"),
    "aliases": ((list,), "a list of names"),
}


@dataclass(frozen=True, slots=True)
class LoadedSettings:
    """Settings with the origin of each (`flag --tick-rate`, `ael.toml`, `default` …) and what came with them.

    `file` is the file that was read, None where there was none. `warnings` are sentences for the log.
    """

    settings: Settings
    origins: dict[str, str]
    agents: dict[str, AgentTable]
    warnings: list[str]
    file: Path | None = None


def load_settings(
    flags: Mapping[str, object] = {},
    *,
    environ: Mapping[str, str] | None = None,
    folder: Path | None = None,
    file: Path | None = None,
) -> LoadedSettings:
    """Return the settings of flags, variables, file and defaults, in this order of precedence.

    Flags that are None count as not given; texts in them are read as those of variables are. `environ` is the
    process's own unless given, `folder` the working directory. `file` is read instead of the folder's files;
    it must exist. Raises InvalidSetting, which names what was found, where, and what is wanted.
    """
    environ = os.environ if environ is None else environ
    path, table = _read_file(Path.cwd() if folder is None else folder, file)
    values: dict[str, Any] = {}
    origins = dict.fromkeys(RULES, "default")
    agents: dict[str, AgentTable] = {}

    if path is not None:
        section = " [tool.ael]" if path.name == "pyproject.toml" else ""
        _refuse_unknown(table, [*RULES, "agents", "limits"], f"{path}{section}", "setting")
        agents = _read_agents(table.pop("agents", {}), path)
        prefix = "tool.ael.limits" if section else "limits"
        values["limits"] = _read_limits(table.pop("limits", {}), f"{path} [{prefix}]")
        for name, value in table.items():
            values[name] = _checked(name, value, f"{path}{section}")
            origins[name] = f"{path.name}{section}"
        if "db" in values:
            values["db"] = _placed(values["db"], path.parent)

    for name in RULES:
        variable = _variable(name)
        text = environ.get(variable, "").strip()
        if text:
            values[name] = _parsed(name, text, f"environment {variable}")
            origins[name] = f"environment {variable}"

    _refuse_unknown(flags, RULES, "flags", "setting")
    for name, value in flags.items():
        if value is not None:
            origins[name] = f"flag --{name.replace('_', '-')}"
            if isinstance(value, str):
                values[name] = _parsed(name, value, origins[name])
            else:
                values[name] = _checked(name, value, origins[name])

    return LoadedSettings(Settings(**values), origins, agents, _warnings(environ, agents), path)


# -- values -----------------------------------------------------------------------------------------


def _checked(name: str, value: object, origin: str) -> object:
    try:
        return RULES[name].check(value)
    except ValueError as error:
        raise _wrong(name, value, origin, str(error)) from None


def _parsed(name: str, text: str, origin: str) -> object:
    try:
        value = RULES[name].parse(text)
    except ValueError:
        raise _wrong(name, text, origin) from None
    return _checked(name, value, origin)


def _wrong(name: str, value: object, origin: str, note: str = "") -> InvalidSetting:
    note = f"; {note}" if note else ""
    found = repr(value)
    if len(found) > 100:
        found = f"{found[:100]}…"
    return InvalidSetting(f"setting {name} is {found} ({origin}); wanted is {RULES[name].wanted}{note}")


def _check_zone(name: str) -> None:
    from zoneinfo import ZoneInfo, ZoneInfoNotFoundError, available_timezones

    try:
        ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        zones = available_timezones()
        if not zones:
            raise ValueError("this system has no time zone data: install tzdata") from None
        raise ValueError(_nearest(name, zones)) from None


def _placed(db: str, folder: Path) -> str:
    """Return a database of a file with its path made absolute; other URLs stay as they are."""
    folder = folder.absolute()
    url = re.match(r"(sqlite(?:\+\w+)?:///)(?!/|:memory:|file:)([^?]+)(.*)", db)
    if url:
        return f"{url[1]}{folder / url[2]}{url[3]}"
    if db == ":memory:" or re.match(r"[a-z][\w+.-]*:", db):
        return db
    return str(folder / db)


def _variable(name: str) -> str:
    return f"AEL_{name.upper()}"


def _warnings(environ: Mapping[str, str], agents: Mapping[str, AgentTable]) -> list[str]:
    known = [_variable(name) for name in RULES]
    exempt = {*known, "AEL_PYTHON"}
    for table in agents.values():
        for name in table.secret_names():
            exempt |= {name, f"{name}_FILE"}
    candidates = sorted(environ.keys() - exempt)
    return [
        f"environment variable {name} is no setting and has no effect{_near(name, known)}"
        for name in candidates
        if name.startswith("AEL_") and not name.startswith("AEL_TEST_")
    ]


def _nearest(name: str, names: Iterable[str]) -> str:
    from difflib import get_close_matches

    names = {known.lower(): known for known in names}
    found = get_close_matches(name.lower(), names, 1)
    return f"did you mean {names[found[0]]!r}?" if found else ""


def _near(name: str, names: Iterable[str]) -> str:
    nearest = _nearest(name, names)
    return f"; {nearest}" if nearest else ""


# -- files ------------------------------------------------------------------------------------------


def _read_file(folder: Path, file: Path | None) -> tuple[Path | None, dict[str, Any]]:
    """Return the file that holds settings and its table; ael.toml goes before pyproject.toml."""
    for path in [folder / "ael.toml", folder / "pyproject.toml"] if file is None else [file]:
        try:
            table = _parse(path)
        except FileNotFoundError:
            if file is not None:
                raise InvalidSetting(f"{path}: there is no such settings file") from None
            continue
        except OSError as error:
            raise InvalidSetting(f"{path} can't be read: {error.strerror}") from None
        if path.name != "pyproject.toml":
            return path, table
        tool = table.get("tool", {})
        section = tool.get("ael") if isinstance(tool, dict) else None
        if section is None:
            continue
        if not isinstance(section, dict):
            raise InvalidSetting(f"{path}: tool.ael is {_kind(section)}; wanted is a table [tool.ael]")
        return path, section
    return None, {}


def _parse(path: Path) -> dict[str, Any]:
    raw = path.read_bytes()
    import tomllib

    try:
        return tomllib.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        before = raw[: error.start]
        line, column = before.count(b"\n") + 1, error.start - (before.rfind(b"\n") + 1) + 1
        raise InvalidSetting(f"{path}, line {line}, column {column}: not UTF-8 text") from None
    except ValueError as error:  # TOMLDecodeError, or an integer with thousands of digits
        problem, line, column = _toml_problem(str(error), raw.decode("utf-8-sig"))
        raise InvalidSetting(f"{path}, line {line}, column {column}: not valid TOML: {problem}") from None


def _toml_problem(message: str, text: str) -> tuple[str, int, int]:
    """Return what tomllib complains about, its line and its column."""
    found = re.fullmatch(r"(.*) \(at (?:line (\d+), column (\d+)|end of document)\)", message, re.DOTALL)
    if found and found[2]:
        return found[1], int(found[2]), int(found[3])
    lines = text.split("\n")
    return (found[1] if found else message), len(lines), len(lines[-1]) + 1


def _refuse_unknown(table: Mapping[str, object], known: Iterable[str], where: str, noun: str) -> None:
    known = list(known)
    unknown = [f"unknown {noun} {key!r}{_near(key, known)}" for key in table if key not in known]
    if unknown:
        hint = "" if "did you mean" in unknown[0] else f"; known are {', '.join(known)}"
        raise InvalidSetting(f"{where}: {'; '.join(unknown)}{hint}")


# -- [limits.*] -------------------------------------------------------------------------------------


def _read_limits(tables: object, origin: str) -> dict[str, TaskLimit]:
    if not isinstance(tables, Mapping):
        raise InvalidSetting(f"{origin} is {_kind(tables)}; wanted are tables [limits.NAME]")
    limits: dict[str, TaskLimit] = {}
    for name, table in tables.items():
        where = f"{origin.removesuffix(']')}.{name}" + ("]" if origin.endswith("]") else "")
        if not isinstance(name, str) or not name or not name.isprintable() or ":" in name:
            raise InvalidSetting(f"{where}: the name of a limit is a printable text without a colon")
        if isinstance(table, TaskLimit):
            limits[name] = table
            continue
        if not isinstance(table, Mapping):
            raise InvalidSetting(f"{where} is {_kind(table)}; wanted is a table with bounds like per_minute = 60")
        _refuse_unknown(table, TaskLimit.__dataclass_fields__, where, "key")
        try:
            limits[name] = TaskLimit(**table)
        except InvalidSetting as error:
            raise InvalidSetting(f"{where}: {error}") from None
    return limits


# -- [agents.*] -------------------------------------------------------------------------------------


def _read_agents(tables: object, path: Path) -> dict[str, AgentTable]:
    if not isinstance(tables, dict):
        raise InvalidSetting(f"{path}: agents is {_kind(tables)}; wanted are tables [agents.NAME]")
    prefix = "tool.ael.agents" if path.name == "pyproject.toml" else "agents"
    return {name: _read_agent(name, table, f"{path} [{prefix}.{name}]") for name, table in tables.items()}


def _read_agent(name: str, table: object, origin: str) -> AgentTable:
    if not isinstance(table, dict):
        raise InvalidSetting(f"{origin} is {_kind(table)}; wanted is a table with a class")
    _refuse_unknown(table, ["class", *_ATTRIBUTES], origin, "key")
    if "class" not in table:
        raise InvalidSetting(f"{origin} has no class; wanted is 'module:Class' or a class of the target")
    agent_class = table["class"]
    if not isinstance(agent_class, str) or not agent_class:
        raise InvalidSetting(f"{origin} class is {agent_class!r}; wanted is a text like 'module:Class'")
    values = {key: value for key, value in table.items() if key != "class"}
    for key, value in values.items():
        kinds, wanted = _ATTRIBUTES[key]
        good = type(value) in kinds and (kinds != (list,) or all(type(item) is str for item in value))
        if not good:
            raise InvalidSetting(f"{origin} {key} is {value!r} ({_kind(value)}); wanted is {wanted}")
    return AgentTable(name, agent_class, origin, **values)


def _kind(value: object) -> str:
    return type(value).__name__


# -- secrets ----------------------------------------------------------------------------------------


def _is_secret(value: object) -> bool:
    return isinstance(value, dict) and list(value) == ["secret"]


def _secrets_in(value: Any) -> Iterator[str]:
    if _is_secret(value):
        yield str(value["secret"])
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _secrets_in(item)


def _reveal(value: Any, where: str, environ: Mapping[str, str]) -> Any:
    """Return a copy of a value in which each `{secret = "NAME"}` is replaced by its Secret."""
    if _is_secret(value):
        return _find_secret(value["secret"], where, environ)
    if isinstance(value, dict):
        return {key: _reveal(item, f"{where}.{key}", environ) for key, item in value.items()}
    if isinstance(value, list):
        return [_reveal(item, f"{where}[{index}]", environ) for index, item in enumerate(value)]
    return value


def _find_secret(name: object, where: str, environ: Mapping[str, str]) -> Secret:
    # It becomes part of a path, so it must not lead anywhere else.
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name):
        raise InvalidSetting(f"{where}: the secret's name is {name!r}; wanted are letters, digits and _ . -")
    text = environ.get(name) or _read_secret(environ.get(f"{name}_FILE"), where, name)
    if not text:
        credentials = environ.get("CREDENTIALS_DIRECTORY")
        text = _read_secret(credentials and os.path.join(credentials, name), where, name, must_exist=False)
        if not text:
            raise InvalidSetting(
                f"{where}: secret {name!r} is missing or empty: looked at the environment variable {name}, "
                f"the file named by {name}_FILE, and $CREDENTIALS_DIRECTORY/{name}"
            )
    return Secret(text, name)


def secret_origin(name: str, environ: Mapping[str, str]) -> str | None:
    """Return where the secret of a name comes from; None where there is none."""
    if environ.get(name):
        return f"environment {name}"
    if environ.get(f"{name}_FILE"):
        return f"file {environ[f'{name}_FILE']} (environment {name}_FILE)"
    credentials = environ.get("CREDENTIALS_DIRECTORY")
    if credentials and os.path.exists(os.path.join(credentials, name)):
        return f"credential {name} of the service manager"
    return None


def _read_secret(path: str | None, where: str, name: str, *, must_exist: bool = True) -> str:
    if not path:
        return ""
    try:
        return Path(path).read_text("utf-8").rstrip("\r\n")
    except FileNotFoundError:
        if not must_exist:
            return ""
        problem = f"there is no such file (from {name}_FILE)"
    except OSError as error:
        problem = f"can't be read: {error.strerror}"
    except UnicodeDecodeError:
        problem = "is not UTF-8 text"
    raise InvalidSetting(f"{where}: secret {name!r}: {path}: {problem}")

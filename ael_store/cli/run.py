"""`ael run`: load agents and run them.

Each setting is a flag of the same name, so the options are made from `Settings` and their texts are read as
variables are; nothing of a loop starts before everything given is known to be right.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from ael_store.cli.call import Call
from ael_store.cli.output import ReaderGone, print_json_line
from ael_store.cli.process import run_to_end
from ael_store.errors import StorageFailed, UsageError
from ael_store.settings import RULES, Settings

if TYPE_CHECKING:
    import typer

    from ael_store.cli.live import Digest, LiveLine
    from ael_store.runtime.controller import AELController
    from ael_store.runtime.manager import AgentManager
    from ael_store.runtime.measure import IterationSummary
    from ael_store.settings import AgentTable, LoadedSettings

__all__ = ["add_to", "read_plain_arguments", "run", "with_address"]

log = logging.getLogger("ael_store.run")

FLAGS = tuple(name for name in RULES if name != "db")
"""Settings that are flags here; `--db` is one of all commands."""

SWITCHES = ("verbose", "quiet", "take_over", "reload")

GLOBAL = ("--db", "--json", "--debug")
"""Options that may stand before `run`."""


def run(call: Call, target: str, **options: Any) -> None:
    """Run agents until Ctrl-C; what was committed before goes on."""
    iterations, folder = _iterations(options.get("iterations")), os.getcwd()
    if options.get("reload"):
        if iterations is not None:
            raise UsageError("--reload and --iterations don't go together: a new start would count anew")
        sys.dont_write_bytecode = True  # it is told from its source by the second, and edits can be quicker
    flags = {name: options.get(name) for name in FLAGS}
    beside = _folder_of(target)
    loaded = call.load(flags, beside=beside)

    # The largest import comes first: the others then fit into memory that it leaves free.
    from ael_store.compat import get_event_bus, get_state_context
    from ael_store.runtime.controller import AELController
    from ael_store.runtime.service_manager import ServiceManager

    progress = _start_logging(call, settings := loaded.settings, options)
    with nullcontext() if progress is None else progress.shown(), _dashboard(settings):
        controller = AELController(
            _manager(target, loaded.agents),
            get_event_bus(),  # the process's: what hooks get by this name belongs to the loop
            state_context=get_state_context(),
            tick_rate=settings.tick_rate,
            strategy=settings.strategy,
            store=settings.db,
            durability=settings.durability,
            max_agents=settings.max_agents,
            settings=settings,
            take_over=bool(options.get("take_over")),
            service=ServiceManager.from_environment(),
            reread=partial(_reread, call, flags, beside, loaded),
        )
        if call.json:
            controller.observe(_printer(controller))
        elif progress is not None:
            controller.observe(progress.show)
        if options.get("reload"):
            rehearsal = {"target": target, "flags": {"db": call.db, **flags}, "beside": beside and str(beside)}
            begins_anew = _run_reloading(controller, rehearsal, loaded.file)
        else:
            begins_anew = False
            run_to_end(controller.start() if iterations is None else controller.run(iterations))
    if begins_anew:
        from ael_store.cli.code_watch import begin_anew

        begin_anew(folder)


def _run_reloading(controller: AELController, rehearsal: Mapping[str, object], settings_file: Path | None) -> bool:
    """Run until the end; says whether that has come because the code has changed."""
    from ael_store.cli.code_watch import CodeWatch

    watch: CodeWatch | None = None

    async def start() -> None:
        nonlocal watch
        loop = asyncio.get_running_loop()

        def stop() -> None:
            controller.service.reloading()
            asyncio.run_coroutine_threadsafe(controller.stop(), loop)

        watch = CodeWatch(rehearsal, settings_file, stop)
        watch.start()
        try:
            await controller.start()
        finally:
            watch.stop()

    run_to_end(start())
    return watch is not None and watch.has_new_code and not controller.was_interrupted


def _reread(
    call: Call, flags: Mapping[str, object], beside: Path | None, before: LoadedSettings
) -> tuple[Settings, list[str]]:
    """Return the settings as they are now, and what else has changed; raises InvalidSetting."""
    from ael_store.telemetry import configure_logging

    loaded = call.load(flags, beside=beside)
    settings = loaded.settings
    configure_logging(settings.log_level, _log_format(call, flags, settings))
    return settings, ["agents"] if loaded.agents != before.agents else []


def _dashboard(settings: Settings) -> AbstractContextManager[None]:
    """Return what serves the dashboard beside the loop, where that is wanted; raises what keeps it from starting."""
    if settings.web is None:
        return nullcontext()
    if settings.db == ":memory:":
        raise UsageError("':memory:' is the private database of this loop, which no dashboard can read: name a file")
    from ael_store.store.sqlite import database_path
    from ael_store.web.beside import Beside

    beside = Beside(database_path(settings.db), settings)
    token = beside.launch.token
    where = "" if token is None else f"; the token for changes is in {token.path}"
    log.info("dashboard at %s%s", beside.launch.address.url, where)
    return beside.serving()


def _start_logging(call: Call, settings: Settings, options: Mapping[str, Any]) -> Digest | LiveLine | None:
    """Set up log lines, and return what shows progress between them."""
    from ael_store.cli.live import Digest, LiveLine, has_live_line
    from ael_store.telemetry import configure_logging

    configure_logging(settings.log_level, _log_format(call, options, settings))
    if call.json or options.get("quiet"):
        return None
    return LiveLine() if has_live_line() else Digest(verbose=bool(options.get("verbose")))


def _log_format(call: Call, options: Mapping[str, Any], settings: Settings) -> str:
    return "json" if call.json and options.get("log_format") is None else settings.log_format


def _manager(target: str, tables: Mapping[str, AgentTable]) -> AgentManager:
    """Return the agents of the target."""
    from ael_store.runtime.manager import AgentManager
    from ael_store.runtime.target import load_agents

    manager = AgentManager()
    for agent in load_agents(target, tables):
        manager.register(agent)
    return manager


def _iterations(text: str | None) -> int | None:
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and int(text[:18]) > 0 and len(text) <= 18):
        raise UsageError(f"--iterations is {text!r}; wanted is a whole number from 1")
    return int(text)


def _folder_of(target: str) -> Path | None:
    """Return the folder of a target that is a file: settings may lie there."""
    for place in (target, target.rpartition(":")[0]):
        if place.endswith(".py") and os.path.isfile(place):
            return Path(place).absolute().parent
    return None


def _printer(controller: AELController) -> Callable[[IterationSummary], None]:
    """Return what prints each iteration as a line of JSON.

    A reader that has seen enough stops the loop, gracefully; output that fails otherwise is given up.
    """
    failed = False
    stopping: list[asyncio.Task[None]] = []

    def show(summary: IterationSummary) -> None:
        nonlocal failed
        if failed:
            return
        try:
            print_json_line(_figures_of(summary))
        except ReaderGone:
            failed = True
            stopping.append(asyncio.ensure_future(controller.stop()))
        except StorageFailed as error:
            failed = True
            log.warning("%s; the loop goes on without it", error)

    return show


def _figures_of(summary: IterationSummary) -> dict[str, Any]:
    return {
        "iteration": summary.iteration,
        "ticks": summary.ticks,
        "changes": summary.changes,
        "events": summary.events,
        "deliveries": summary.deliveries,
        "errors": summary.errors,
        "failed": list(summary.failed),
        "missed": summary.missed,
        "run_ms": round(1000 * summary.run_s, 3),
        "commit_ms": round(1000 * summary.commit_s, 3),
        "pending": summary.pending,
        "background": summary.background,
    }


# -- the options, for typer and without it ----------------------------------------------------------


def add_to(app: typer.Typer) -> None:
    """Add this command."""
    import typer

    from ael_store.cli.command import command

    def parameter(name: str, kind: Any, default: Any, info: Any) -> inspect.Parameter:
        return inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info]
        )

    text, flag = str | None, bool
    settings = Settings.__dataclass_fields__
    target = typer.Argument(metavar="TARGET", help="A .py file, a module, or one of them with :attribute.")
    options = [
        parameter("target", str, inspect.Parameter.empty, target),
        parameter("iterations", text, None, typer.Option("--iterations", metavar="N", help="So many, then stop.")),
    ]
    for name in FLAGS:
        spelt = name.replace("_", "-")
        help = settings[name].metadata["help"].removesuffix(f" ({RULES[name].range})")
        if RULES[name].kind == "bool":
            options.append(parameter(name, bool | None, None, typer.Option(f"--{spelt}/--no-{spelt}", help=help)))
        else:
            options.append(parameter(name, text, None, typer.Option(f"--{spelt}", metavar=_metavar(name), help=help)))
    options += [
        parameter("quiet", flag, False, typer.Option("--quiet", help="No line of progress.")),
        parameter("reload", flag, False, typer.Option("--reload", help="Begin anew when the code has changed.")),
        parameter("take_over", flag, False, typer.Option("--take-over", help="Take over from a loop that hangs.")),
        parameter("verbose", flag, False, typer.Option("--verbose", help="Tell of idle iterations too.")),
    ]

    def run_target(call: Call, **options: Any) -> None:
        run(call, **options)

    run_target.__doc__ = run.__doc__
    command(app, "run", more=options)(run_target)


def _metavar(name: str) -> str:
    rule = RULES[name]
    if name == "web":
        return "[HOST:PORT]"
    return "|".join(rule.choices) or {"int": "N", "float": "NUMBER"}.get(rule.kind, "TEXT")


def with_address(arguments: list[str]) -> list[str]:
    """Return the arguments with the address that `--web` alone stands for; a target that follows it is none."""
    if "run" not in arguments or "--web" not in arguments:
        return arguments
    from ael_store.web.address import DEFAULT, is_address

    place = arguments.index("--web")
    if place + 1 < len(arguments) and is_address(arguments[place + 1]):
        return arguments
    return [*arguments[:place], f"--web={DEFAULT}", *arguments[place + 1 :]]


def read_plain_arguments(arguments: list[str]) -> tuple[Call, str, dict[str, Any]] | None:
    """Return what `run` is called with, None where typer should read it: another command, or something odd."""
    if "run" not in arguments:
        return None
    texts: dict[str, str] = {}
    flags: dict[str, tuple[str, bool]] = {
        f"--{name.replace('_', '-')}": (name, True) for name in ("json", "debug", *SWITCHES)
    }
    for name in ("iterations", "db", *FLAGS):
        spelt = name.replace("_", "-")
        if name in RULES and RULES[name].kind == "bool":
            flags |= {f"--{spelt}": (name, True), f"--no-{spelt}": (name, False)}
        else:
            texts[f"--{spelt}"] = name
    found: dict[str, Any] = {}
    words: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if not words and argument.startswith("-") and name not in GLOBAL:
            return None
        if name in texts:
            given = value if equals else next(rest, None)
            if given is None:
                return None
            found[texts[name]] = given
        elif argument in flags:
            name, on = flags[argument]
            found[name] = on
        elif argument.startswith("-"):
            return None
        else:
            words.append(argument)
    if len(words) != 2 or words[0] != "run":
        return None
    call = Call(found.pop("db", None), found.pop("json", False), found.pop("debug", False))
    return call, words[1], found

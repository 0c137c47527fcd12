"""Inject the faults that a machine can produce, by the thousand, and count what they broke: `./dev torture`.

Each trial is a module of this folder with a function `run` (see `trial.py`); its short form, a few of the same
faults, is part of `./dev test`. Exit code 1 where anything was lost, done twice or wrong without a word.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import random
import shutil
import sqlite3
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ael_store import __version__
from tests.faults.trial import Report

__all__ = ["PLANS", "Outcome", "Plan", "main", "run_plan"]

SHOWN = 5
"""How many violations of a trial are printed; the JSON file has all."""


@dataclass(frozen=True)
class Plan:
    """A trial by name: what it does, and how many faults are a short and a full series."""

    name: str
    about: str
    option: str | None = None
    """The option that sets the count; None where the trial has no count but its own list of faults."""
    usual: int = 0
    full: int = 0
    """The count behind the published figures."""

    @property
    def module(self) -> str:
        return f"tests.faults.{self.name}"


PLANS = {
    plan.name: plan
    for plan in (
        Plan("kills", "SIGKILL at random moments under load", "kills", 500, 10_000),
        Plan("points", "SIGKILL at each named point between the first unit and the end of the commit", "points"),
        Plan("tasks", "SIGKILL of a service whose tasks call a server", "kills", 60, 300),
        Plan("broken_store", "a store broken on purpose, which the other trials must notice"),
        Plan("calls", "each write, fsync, truncate, open and unlink failed, torn or killed", "calls"),
        Plan("powercuts", "power cuts: what was not synced is dropped, reordered, torn", "powercuts", 1_000, 10_000),
        Plan("flips", "single bits flipped in the database", "flips", 200, 1_000),
        Plan("values", "malformed and hostile keys, values and events", "values", 2_000, 10_000),
        Plan("clocks", "wall clocks that jump, and suspended machines"),
        Plan("takeover", "owners that stand still and are overtaken"),
        Plan("simulation", "a whole system on a virtual clock against a model, from a seed", "seeds", 500, 10_000),
        Plan("backups", "backup, restore, upgrade and recovery killed midway"),
        Plan("upgrade", "a start on a database of each earlier revision, killed or failed at each call", "calls", 600),
        Plan("soak", "many iterations: memory, file handles and threads stay flat", "iterations", 50_000, 1_000_000),
    )
}


@dataclass(frozen=True)
class Outcome:
    """A trial that was run: its report, or the error that ended it."""

    plan: Plan
    command: str
    seconds: float
    report: Report
    error: str | None = None

    @property
    def good(self) -> bool:
        return self.error is None and self.report.good

    def to_dict(self) -> dict[str, Any]:
        """Return everything of it as JSON has it."""
        return {
            "trial": self.plan.name,
            "command": self.command,
            "seconds": round(self.seconds, 1),
            "good": self.good,
            "error": self.error,
            **asdict(self.report),
        }


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    options = _parser().parse_args(arguments)
    seed = random.randrange(1_000_000) if options.seed is None else options.seed
    outcomes = []
    for name in options.names or PLANS:
        plan = PLANS[name]
        count = 0
        if plan.option is not None:
            given = getattr(options, plan.option)
            count = given if given is not None else plan.full if options.full else plan.usual
        outcomes.append(run_plan(plan, count, seed, options.workers, options.folder))
        if options.json is not None:  # after each, so that an interrupted evening is not for nothing
            _write_json(options.json, seed, outcomes)
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(_table(outcomes))
    for outcome in outcomes:
        if not outcome.good:
            _explain(outcome)
    return 0 if all(outcome.good for outcome in outcomes) else 1


def run_plan(plan: Plan, count: int, seed: int, workers: int, folder: Path | None) -> Outcome:
    """Run a trial in a folder of its own, which stays where it found something."""
    command = f"./dev torture {plan.name}{f' --{plan.option} {count}' if plan.option else ''} --seed {seed}"
    place = Path(tempfile.mkdtemp(prefix=f"ael-{plan.name}-", dir=folder))
    began = time.monotonic()
    _tell(plan, f"{plan.about} ({command})")
    report, error = Report(plan.about, 0), None
    try:
        trial: Any = importlib.import_module(plan.module)
        report = trial.run(count=count, seed=seed, workers=workers, tell=lambda line: _tell(plan, line), folder=place)
        if not report.trials:
            error = "no fault was injected"
    except ModuleNotFoundError as missing:
        error = f"{missing}: the trial {plan.name} needs it"
    except Exception:  # a trial that fails is reported, and the others still run
        error = traceback.format_exc()
    outcome = Outcome(plan, command, time.monotonic() - began, report, error)
    if outcome.good or not any(place.iterdir()):
        shutil.rmtree(place, ignore_errors=True)
    else:
        _tell(plan, f"what it left is in {place}")
    return outcome


def _table(outcomes: Iterable[Outcome]) -> Table:
    table = Table("Trial", "Faults", "Lost", "Twice", "Silent", "Seconds", "Note")
    for column in table.columns[1:6]:
        column.justify = "right"
    for outcome in outcomes:
        report = outcome.report
        table.add_row(
            report.name if outcome.error is None else f"{report.name}: FAILED",
            f"{report.trials:,}",
            *(str(number) for number in (report.lost, report.duplicated, report.silent)),
            f"{outcome.seconds:.0f}",
            report.note,
            style=None if outcome.good else "bold red",
        )
    return table


def _explain(outcome: Outcome) -> None:
    print(f"\n{outcome.plan.name}: repeat it with {outcome.command}")
    if outcome.error is not None:
        print(outcome.error.rstrip())
    for failure in outcome.report.failures[:SHOWN]:
        print(f"  {failure}")
    left = len(outcome.report.failures) - SHOWN
    if left > 0:
        print(f"  and {left} more (--json FILE writes all)")


def _write_json(path: Path, seed: int, outcomes: list[Outcome]) -> None:
    machine = {
        "version": __version__,
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cores": os.cpu_count(),
    }
    found = {"machine": machine, "seed": seed, "trials": [outcome.to_dict() for outcome in outcomes]}
    path.write_text(json.dumps(found, indent=2) + "\n")


def _tell(plan: Plan, line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {plan.name}: {line}", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    listing = "\n".join(f"  {plan.name:<13} {plan.about}" for plan in PLANS.values())
    parser = argparse.ArgumentParser(
        prog="./dev torture",
        description=f"{(__doc__ or '').split(chr(10))[0]}\n\ntrials:\n{listing}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", type=_name, help="trials to run; all by default")
    shared: dict[str, list[str]] = {}
    for plan in PLANS.values():
        if plan.option is not None:
            what = f"{plan.usual:,}, full {plan.full:,}" if plan.usual else "0, which is all"
            shared.setdefault(plan.option, []).append(f"{plan.name} ({what})")
    for option, plans in shared.items():
        parser.add_argument(f"--{option}", type=_count, metavar="N", help=f"faults of {' and of '.join(plans)}")
    parser.add_argument("--full", action="store_true", help="as many as the published figures say; takes hours")
    parser.add_argument("--workers", type=_number, default=2, metavar="N", help="processes at a time (2)")
    parser.add_argument("--seed", type=int, metavar="S", help="which faults; random by default, and printed")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="where the databases are made: the disk to torture")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the reports to a file")
    return parser


def _name(text: str) -> str:
    if text not in PLANS:
        raise argparse.ArgumentTypeError(f"there is no trial {text!r}, there are {', '.join(PLANS)}")
    return text


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is not 0 or more")
    return number


def _number(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return number


if __name__ == "__main__":
    sys.exit(main())

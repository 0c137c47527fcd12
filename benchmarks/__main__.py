"""`python -m benchmarks`: measure, print, and with `--json` keep the figures."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.environment import install_peers
from benchmarks.history import measure_history, report_history
from benchmarks.machine import describe, is_in_memory
from benchmarks.peers import PeerOptions, measure_peers, report_peers
from benchmarks.process import measure_process, report_process
from benchmarks.resume import measure_resume, report_resume
from benchmarks.scale import ScaleOptions, measure_scale, report_scale
from benchmarks.tasks import TaskOptions, measure_tasks, report_tasks
from benchmarks.trigger import TriggerOptions, measure_trigger, report_trigger
from benchmarks.write import WriteOptions, measure_writing, report_writing


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    options = _parser().parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="ael-benchmark-", dir=options.folder) as name:
        folder = Path(name)
        machine = describe(folder)
        print(f"{machine}\n")
        if is_in_memory(machine) and not options.allow_tmpfs:
            _say(
                f"{folder.parent} lies in memory, where a commit costs nothing: name another --folder, or --allow-tmpfs"
            )
            return 2
        if options.install:
            install_peers()
        report, figures = MEASUREMENTS[options.what](options, folder)
        print(report)
        found: dict[str, object] = {"machine": machine.to_dict(), options.what: figures}
    found["load_after"] = os.getloadavg()[0]
    print(f"\nLoad afterwards: {os.getloadavg()[0]:.2f}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0


Result = tuple[str, dict[str, Any]]
"""The figures as text, and as they go into the JSON."""


def _write(options: argparse.Namespace, folder: Path) -> Result:
    levels, agents = tuple(options.durability), tuple(options.agents)
    writing = measure_writing(WriteOptions(folder, agents, levels, options.rounds, options.iterations), _say)
    return report_writing(writing), writing.to_dict()


def _tasks(options: argparse.Namespace, folder: Path) -> Result:
    wanted = TaskOptions(folder, options.rounds, ticks=options.ticks, finished=options.finished)
    tasks = measure_tasks(wanted, _say)
    return report_tasks(tasks), tasks.to_dict()


def _history(options: argparse.Namespace, folder: Path) -> Result:
    history = measure_history(folder, options.rounds, options.rows, _say)
    return report_history(history), history.to_dict()


def _process(options: argparse.Namespace, folder: Path) -> Result:
    process = measure_process(folder, options.rounds, _say)
    return report_process(process), process.to_dict()


def _peers(options: argparse.Namespace, folder: Path) -> Result:
    peers = measure_peers(PeerOptions(folder, tuple(options.durability), options.rounds), _say)
    return report_peers(peers), peers.to_dict()


def _resume(options: argparse.Namespace, folder: Path) -> Result:
    resume = measure_resume(folder, options.rounds, options.keys, _say)
    return report_resume(resume), resume.to_dict()


def _scale(options: argparse.Namespace, folder: Path) -> Result:
    figures = measure_scale(ScaleOptions(folder, options.rounds, options.age), _say)
    return report_scale(figures), {figure.what: figure.to_dict() for figure in figures}


def _trigger(options: argparse.Namespace, folder: Path) -> Result:
    trigger = measure_trigger(TriggerOptions(folder, options.seconds), _say)
    return report_trigger(trigger), trigger.to_dict()


MEASUREMENTS: dict[str, Callable[[argparse.Namespace, Path], Result]] = {
    "write": _write,
    "process": _process,
    "tasks": _tasks,
    "history": _history,
    "peers": _peers,
    "resume": _resume,
    "scale": _scale,
    "trigger": _trigger,
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "what",
        nargs="?",
        choices=tuple(MEASUREMENTS),
        default="write",
        help="write: iterations beside plain sqlite3 (the default); process: memory, start, bytes of an idle day; "
        "tasks: lateness beside a hundred, a submit beside a million, the way to on_task; "
        "history: looking back in a million rows; "
        "peers: a durable step beside DBOS, langgraph, eventsourcing, huey, APScheduler and the ancestor; "
        "resume: beginning anew, and with a million keys beside a plain SELECT; "
        "scale: memory, calls, selection, many agents, long days, an old database; "
        "trigger: slots kept, stops, events from outside, one agent among many",
    )
    parser.add_argument("--agents", type=_numbers, default=[1, 10, 100], help="numbers of agents: 1,10,100")
    parser.add_argument("--durability", type=_levels, default=["full", "normal"], help="full, normal or both")
    parser.add_argument("--rounds", type=_number, default=5)
    parser.add_argument("--iterations", type=_number, help="measured in each round; fewer with more agents by default")
    parser.add_argument("--ticks", type=_number, default=100, help="of tasks: ticks of 1 s whose lateness is measured")
    parser.add_argument("--finished", type=_number, default=1_000_000, help="of tasks: ended ones in the long table")
    parser.add_argument("--rows", type=_number, default=1_000_000, help="of history: changes, events and units each")
    parser.add_argument("--keys", type=_number, default=1_000_000, help="of resume: keys of the state")
    parser.add_argument("--age", type=_number, default=1_000_000, help="of scale: iterations of the old database")
    parser.add_argument("--seconds", type=float, default=60.0, help="of trigger: how long the clock is watched")
    parser.add_argument("--install", action="store_true", help="of peers: install them into .venv/peers first")
    parser.add_argument("--folder", type=Path, default=Path.cwd(), help="where the files are made: the disk to measure")
    parser.add_argument("--allow-tmpfs", action="store_true", help="measure in memory too, for what it is worth")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to a file")
    return parser


def _number(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return number


def _numbers(text: str) -> list[int]:
    return [_number(part) for part in text.split(",")]


def _levels(text: str) -> list[str]:
    levels = text.split(",")
    for level in levels:
        if level not in ("full", "normal"):
            raise argparse.ArgumentTypeError(f"{level!r} is no durability; there are full and normal")
    return levels


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())

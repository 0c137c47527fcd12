"""A start of a new version on a database of each earlier revision: killed, or failed, at each call that changes a file.

`ael run` backs up, upgrades and goes on. That is done once to count its calls, and again for each call and each way
in which it can go wrong, in a fresh copy of the same folder; then once more without a fault. One in so many is a
process of its own that is killed at a random moment. What must hold:

- the database is the old one or the new one, whole, and so is each backup beside it;
- the next start finishes: state, cursors, statistics, delayed events and numbers go on where the old version was;
- a downgrade keeps all that the older schema can hold, and the start after it upgrades again.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.faults.calls import NAMES, WAYS, copy_folder, judge_end
from tests.faults.invariants import tally
from tests.faults.shim import Call, Mode, Op
from tests.faults.trial import Report, Tell
from tests.faults.workers import Crew, Ended, Worker
from tests.migrations.conftest import REVISIONS
from tests.migrations.fill import AGENTS, ask, common, digests, fill, layout

__all__ = ["OLD", "handle", "run"]

ROOT = Path(__file__).parents[2]
OLD = REVISIONS[:-1]
"""The revisions that a database comes from."""

ITERATIONS = 20
"""In the life of the old database."""

RUN = ("run", str(Path(__file__).with_name("upgrade_agents.py")), "--tick-rate", "0", "--quiet", "--iterations")

WHOLE_EVERY = 20
"""One in so many is a process of its own, killed at a random moment."""

HISTORY = ("iterations", "ticks", "tick_errors", "state_changes", "events", "keys", "event_types", "event_sources")
"""Tables whose rows stay as they are."""

BACK_EVERY = 4
"""One in so many is downgraded in the end, and started again; so is each that had no fault."""


@dataclass
class _Old:
    """A database of an earlier revision, and what is in it."""

    revision: str
    folder: Path
    layout: dict[str, list[str]] = field(default_factory=dict)
    rows: dict[str, tuple[int, str]] = field(default_factory=dict)
    history: dict[str, list[Any]] = field(default_factory=dict)
    ticks: dict[str, int] = field(default_factory=dict)
    """Those that each agent has counted."""


_olds: dict[str, _Old] = {}


def _old(worker: Worker, revision: str) -> _Old:
    """Return the database of a revision; made once."""
    if revision not in _olds:
        from ael_store.store.upgrade import upgrade

        folder = worker.folder / "olds" / revision
        folder.mkdir(parents=True)
        path = folder / "ael.db"
        path.touch(0o600)
        upgrade(path, revision=revision, backup=False)
        fill(path, revision, iterations=ITERATIONS)
        old = _olds[revision] = _Old(revision, folder, layout(path))
        old.rows = digests(path, old.layout)
        old.history = {table: _history(path, table, old.layout[table]) for table in HISTORY}
        old.ticks = dict(ask(path, "SELECT name, tick_count FROM v_agents"))
    return _olds[revision]


def _history(path: Path, table: str, columns: list[str], until: int = 2**62) -> list[Any]:
    return ask(path, f"SELECT {', '.join(columns)} FROM {table} WHERE rowid <= ? ORDER BY rowid", until)


# -- what must hold -----------------------------------------------------------------------------------


def _check(path: Path, old: _Old) -> list[str]:
    """What must hold at any moment."""
    from ael_store.store.upgrade import HEAD, current_revision

    found = []
    revision = current_revision(path)
    backups = list(path.parent.glob(f"ael.db.bak-{old.revision}-*"))
    if revision not in (old.revision, HEAD):
        found.append(f"wrong: it is at revision {revision}")
    if revision == HEAD and not backups:
        found.append("lost: it is upgraded, and there is no backup")
    if ask(path, "PRAGMA integrity_check") != [("ok",)]:
        return [*found, "wrong: it is damaged"]
    if ask(path, "SELECT max(id) FROM runs") == [(2,)]:
        now = digests(path, old.layout)
        changed = {table for table in now if now[table] != old.rows[table]}
        if revision == HEAD:  # an upgrade notes there what the older schema did not have
            changed.discard("meta")
        if changed:
            found.append(f"lost: no run has begun, and it has other rows than before in {', '.join(sorted(changed))}")
    for table, rows in old.history.items():
        (last,) = ask(path, f"SELECT rowid FROM {table} ORDER BY rowid LIMIT 1 OFFSET {len(rows) - 1}") or [(0,)]
        if _history(path, table, old.layout[table], last[0]) != rows:
            found.append(f"lost: table {table} has other rows than before")
    for backup in backups:
        if ask(backup, "PRAGMA integrity_check") != [("ok",)]:
            found.append(f"wrong: {backup.name} is damaged")
        elif digests(backup, old.layout) != old.rows and ask(backup, "SELECT max(id) FROM runs") == [(2,)]:
            found.append(f"lost: {backup.name} has other rows than the database had")
    return found


def _finished(path: Path, old: _Old) -> list[str]:
    """What must hold once a loop has run and stopped: it has gone on where the old one was."""
    from ael_store.store.upgrade import HEAD, check
    from ael_store.store.verify import verify

    found = [f"wrong: {problem}" for problem in check(path).problems + verify(path).problems]
    if check(path).revision != HEAD:
        found.append("wrong: it is not upgraded")
    numbers = [number for (number,) in ask(path, "SELECT iteration FROM v_iterations ORDER BY 1")]
    if numbers != list(range(1, len(numbers) + 1)) or len(numbers) <= ITERATIONS:
        found.append(f"lost: the iterations are {numbers}")
    state = dict(ask(path, "SELECT key, value FROM v_state"))
    wanted = [number for (number,) in ask(path, "SELECT id FROM v_events WHERE type LIKE '%.read' ORDER BY id")]
    for place, name in enumerate(AGENTS, 1):
        ticks, handled = ask(path, "SELECT tick_count, event_count FROM v_agents WHERE name = ?", name)[0]
        if ticks != old.ticks[name] + int(state.get(f"ticks/{name}", 0)):
            found.append(f"lost: {name} counts {ticks} ticks, it had {old.ticks[name]}")
        if state.get(f"place/{name}") != str(place):
            found.append(f"lost: the metadata of {name} say {state.get(f'place/{name}')}")
        is_new = old.revision >= "0007" and name == "collector"  # that one is of version 3 already
        if state.get(f"upgraded/{name}") != (None if is_new else "0"):
            found.append(f"wrong: {name} says that it came from version {state.get(f'upgraded/{name}')}")
        rows = ask(path, "SELECT new_value FROM v_state_history WHERE key = ? ORDER BY id", f"handled/{name}")
        entered = [int(value) for (value,) in rows]
        waiting = ask(path, "SELECT event_id FROM v_pending WHERE subscriber = ? ORDER BY 1", name)
        if len(set(entered)) < len(entered):
            found.append(f"twice: {name} handled {entered}")
        if entered + [number for (number,) in waiting] != [number for number in wanted if number > ITERATIONS]:
            found.append(f"lost: {name} handled {entered}")
        if handled != len(entered) + int(state.get(f"again/{name}", 0)):
            found.append(f"wrong: {name} counts {handled} events")
    if ask(path, "SELECT count(*) FROM v_events WHERE type = 'task_finished'") != [(0,)]:
        found.append("twice: results of tasks were taken up again")
    if old.revision >= "0002" and ask(path, "SELECT count(*) FROM v_events WHERE type = 'report.due'") != [(2,)]:
        found.append("lost: delayed events did not happen, or not once")
    return found


def _go_back(worker: Worker, folder: Path, old: _Old) -> list[str]:
    """Downgrade, compare, and start again."""
    from ael_store.store.upgrade import check

    path = folder / "ael.db"
    shared = common(layout(path), old.layout)
    for table in ("meta", "row_digests"):  # what the older schema has no place for is kept in the one
        shared.pop(table, None)
    for table, columns in shared.items():  # digests of what the older schema can't hold whole are taken away
        shared[table] = [column for column in columns if column not in ("seal", "digest")]
    rows = digests(path, shared)
    ended = worker.fork(folder, ["--db", str(path), "db", "downgrade", old.revision, "--yes"])
    if ended.status != 0:
        return [f"wrong: the downgrade ended with {ended.status}: {ended.stderr[-500:]}"]
    found = [f"wrong: after the downgrade: {problem}" for problem in check(path).problems]
    after = digests(path, shared)
    found += [f"lost: the downgrade has changed table {table}" for table in rows if rows[table] != after[table]]
    again = worker.fork(folder, ["--db", str(path), *RUN, "1"])
    if again.status != 0:
        return [*found, f"wrong: the start after the downgrade ended with {again.status}: {again.stderr[-500:]}"]
    return [*found, *_finished(path, old)]


# -- inside a worker ----------------------------------------------------------------------------------


def handle(worker: Worker, task: dict[str, Any]) -> dict[str, Any]:
    """Start the new version with a fault, or, where none is given, without one to count its calls."""
    began = time.monotonic()
    old, folder = _old(worker, task["revision"]), worker.folder / "trial"
    shutil.rmtree(folder, ignore_errors=True)
    copy_folder(old.folder, folder)
    path = folder / "ael.db"
    if task.get("after_s") is not None:
        ended, struck, calls = _kill_process(folder, task["after_s"])
        found = [] if ended.status in (0, -signal.SIGKILL) else [f"wrong: ended with {ended.status}: {ended.stderr}"]
    else:
        way = WAYS.get(task.get("way", ""))
        worker.shim.watch(folder)
        if way is not None:
            worker.shim.fail(task["at"], way.mode, way.error, kinds=way.kinds)
        ended = worker.fork(folder, ["--db", str(path), *RUN, "2"])
        struck, calls = worker.shim.struck, worker.shim.calls()
        worker.shim.unwatch()
        found = [] if way is None or not struck else judge_end(ended, way, calls[task["at"] - 1], folder)
        if not struck and ended.status != 0:
            found.append(f"wrong: ended with {ended.status} without a fault: {ended.stderr[-500:]}")
    try:
        found += _check(path, old)
        if ended.status == 0:
            found += _finished(path, old)
        again = worker.fork(folder, ["--db", str(path), *RUN, "2"])
        if again.status != 0:
            found.append(f"wrong: the start after it ended with {again.status}: {again.stderr[-500:]}")
        else:
            found += _check(path, old) + _finished(path, old)
            if task.get("at", 0) % BACK_EVERY == 0:
                found += _go_back(worker, folder, old)
    except Exception as error:
        found.append(f"wrong: what it left can't be read: {type(error).__name__}: {error}")
    if not found:
        left = sorted(item.name for item in folder.iterdir() if not NAMES.fullmatch(item.name))
        cant_remove = struck and calls and calls[task.get("at", 1) - 1].op == Op.UNLINK
        found += [f"wrong: left behind: {', '.join(left)}"] if left and not cant_remove else []
    return {
        **task,
        "struck": struck,
        "status": ended.status,
        "seconds": time.monotonic() - began,
        "calls": [[call.op, call.name, call.length, call.phase] for call in calls] if "way" not in task else [],
        "found": found,
        "stderr": ended.stderr[-2000:] if found else "",
    }


def _kill_process(folder: Path, after_s: float) -> tuple[Ended, int, list[Call]]:
    """Start a whole process, and kill it so long after its first line."""
    environment = {name: value for name, value in os.environ.items() if name not in ("LD_PRELOAD", "FAULTS_CONTROL")}
    arguments = [sys.executable, "-m", "ael_store", "--db", str(folder / "ael.db"), *RUN, "2"]
    with subprocess.Popen(
        arguments, cwd=folder, env={**environment, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        first = process.stderr.readline()
        time.sleep(after_s)
        process.kill()
        said = first + process.stderr.read()
    return Ended(process.returncode, "", said, 0, 0, 0, 0), int(process.returncode != 0), []


# -- the sweep ----------------------------------------------------------------------------------------


def _tasks(calls: dict[str, list[Call]], count: int, moments: random.Random) -> list[dict[str, Any]]:
    """Return all trials, or `count` of them, evenly spread over revisions, calls and ways."""
    every = [
        {"revision": revision, "way": way.name, "at": at}
        for revision, made in calls.items()
        for at, call in enumerate(made, 1)
        for way in WAYS.values()
        if ((call.op == Op.WRITE and call.length > 1) or way.mode not in (Mode.TORN_KILL, Mode.TORN_ERROR))
        and at % (way.every if way.kills else 3 * way.every) == 0
    ]
    if 0 < count < len(every):
        step, begin = len(every) / count, moments.random()
        every = [every[int((number + begin) * step)] for number in range(count)]
    for number, task in enumerate(every):
        if number % WHOLE_EVERY == WHOLE_EVERY // 2:
            every[number] = {"revision": task["revision"], "way": "killed", "after_s": moments.uniform(0, 0.4)}
    return every


def run(*, count: int, seed: int, workers: int, tell: Tell, folder: Path) -> Report:
    """Fail `count` calls, or all; see the module."""
    failures: list[str] = []
    found: list[str] = []
    statuses: Counter[str] = Counter()
    struck = 0
    with Crew(__name__, workers=workers, folder=folder) as crew:
        calls: dict[str, list[Call]] = {}
        for answer in crew.map([{"revision": revision} for revision in OLD]):
            calls[answer["revision"]] = [
                Call(Op(op), name, 0, length, phase) for op, name, length, phase in answer["calls"]
            ]
            found += answer["found"]
            failures += [_describe(answer)] if answer["found"] else []
        tasks = _tasks(calls, count, random.Random(seed))
        tell(f"{len(tasks)} trials; calls: " + ", ".join(f"{len(made)} from {old}" for old, made in calls.items()))
        for number, answer in enumerate(crew.map(tasks), 1):
            struck += answer["struck"] > 0
            statuses[str(answer["status"])] += 1
            if answer["found"]:
                found += answer["found"]
                failures.append(_describe(answer))
            if number % 200 == 0:
                tell(f"{number} trials, {len(failures)} with violations")
    ends = ", ".join(f"{number} with {status}" for status, number in sorted(statuses.items()))
    note = f"from {len(OLD)} revisions, {sum(map(len, calls.values()))} calls, ended {ends}"
    return Report(
        "a start that upgrades is killed or fails", struck, **tally(found), note=note, failures=tuple(failures)
    )


def _describe(answer: dict[str, Any]) -> str:
    where = f"call {answer['at']}" if "at" in answer else f"after {answer.get('after_s', 0):.3f} s"
    return (
        f"from {answer['revision']}, {where} {answer.get('way', 'no fault')}, exit {answer['status']}: "
        f"{'; '.join(answer['found'])}\n{answer['stderr']}"
    )

"""Every call that changes a file, failed one by one: killed before and after, torn, disk full, I/O error.

A job (a first start, a start after a crash, an upgrade, a backup …) is done once to count its calls. Then it is done
again for each call and each way in which that can go wrong, in a fresh copy of the same folder; afterwards once more
without a fault. What must hold:

- it ends, with an exit code of the contract and one message, or it is killed as it was told;
- what it had reported as committed is there, whole, in order and once;
- the next start succeeds, and leaves no unfinished file behind;
- a disk that is full for a moment in a commit costs nothing: the same commit is made again, and the job is done;
- after an I/O error in a commit the job ends, and nothing is committed from memory any more.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import re
import shutil
import signal
import sqlite3
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tests.faults.invariants import Ledger, tally
from tests.faults.shim import Call, Mode, Op
from tests.faults.trial import Report, Tell
from tests.faults.workers import AGENTS, COMMITTING, Crew, Ended, Worker, often_move_the_log

__all__ = ["JOBS", "NAMES", "WAYS", "Start", "copy_folder", "handle", "judge_end", "run", "start_of"]

NAMES = re.compile(
    r"(ael|copy|second)\.db(-wal|-shm)?|ael\.db\.(lock|unit)"
    r"|ael\.db\.(bak-[0-9]{4}|before-restore)-[0-9]{8}T[0-9]{6}Z(-[0-9]+)?"
)
"""What may stand in a folder when all is done."""

FULL = frozenset({Op.CREATE, Op.WRITE, Op.ALLOCATE, Op.LINK, Op.RENAME})
"""What goes on failing on a full disk."""

OUT_OF_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

DONE, STORAGE = 0, 74


@dataclass(frozen=True)
class Way:
    """A way in which a call goes wrong."""

    name: str
    mode: Mode
    error: int = 0
    every: int = 1
    """One call of so many goes wrong like this in a full sweep."""

    @property
    def tears(self) -> bool:
        return self.mode in (Mode.TORN_KILL, Mode.TORN_ERROR)

    @property
    def kills(self) -> bool:
        return self.mode in (Mode.KILL_BEFORE, Mode.KILL_AFTER, Mode.TORN_KILL)

    @property
    def kinds(self) -> frozenset[Op]:
        return FULL if self.error in OUT_OF_ROOM else frozenset(Op)


WAYS = {
    way.name: way
    for way in (
        Way("killed before", Mode.KILL_BEFORE),
        Way("killed after", Mode.KILL_AFTER, every=5),  # the same as before the next one
        Way("torn and killed", Mode.TORN_KILL),
        Way("disk full once", Mode.ERROR_ONCE, errno.ENOSPC),
        Way("disk full for ever", Mode.ERROR_FOR_EVER, errno.ENOSPC),
        Way("torn by a full disk", Mode.TORN_ERROR, errno.ENOSPC),
        Way("I/O error once", Mode.ERROR_ONCE, errno.EIO),
        Way("I/O error for ever", Mode.ERROR_FOR_EVER, errno.EIO),
        Way("quota used up once", Mode.ERROR_ONCE, errno.EDQUOT, every=7),
        Way("file too large once", Mode.ERROR_ONCE, errno.EFBIG, every=7),
    )
}


# -- the jobs ---------------------------------------------------------------------------------------


@dataclass
class Start:
    """The folder that a job begins with, and what is in its database."""

    folder: Path
    ledger: Ledger
    """Of databases that the crash agents have written."""
    layout: dict[str, list[str]] = field(default_factory=dict)
    rows: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Of others: their columns, and a digest of each table."""


@dataclass(frozen=True)
class Job:
    """Something that `ael` does."""

    arguments: tuple[str, ...]
    again: tuple[str, ...]
    """What is done afterwards, without a fault."""
    prepare: Callable[[Worker, Path], None]
    """Makes the folder that it begins with."""
    check: Callable[[Path, Start], list[str]]
    """What must hold at any moment."""
    finished: Callable[[Path, Start], list[str]]
    """What must hold once it is done."""
    meddle: Callable[[], None] | None = None
    """Is called in the process first."""
    every: int = 1
    """One call of so many fails in a full sweep."""
    between: Callable[[Path], None] | None = None
    """Is called with the folder before it is done again."""


RUN = ("run", str(AGENTS), "--tick-rate", "0", "--quiet", "--iterations")


def _prepare_nothing(worker: Worker, folder: Path) -> None:
    pass


def _prepare_crash(worker: Worker, folder: Path) -> None:
    """A run that was killed in a commit, with a log that is not in the database yet."""
    arguments = ["--db", str(folder / "ael.db"), *RUN, "6"]
    worker.shim.watch(folder)
    ended = worker.fork(folder, arguments)
    assert ended.status == 0, ended.stderr
    syncs = [n for n, call in enumerate(worker.shim.calls(), 1) if call.phase == COMMITTING and call.op == Op.FSYNC]
    shutil.rmtree(folder)
    folder.mkdir()
    worker.shim.watch(folder)
    worker.shim.fail(syncs[-1] - 12, Mode.KILL_BEFORE)
    ended = worker.fork(folder, arguments)
    assert ended.status == -signal.SIGKILL, ended.stderr


def _prepare_earlier_copy(worker: Worker, folder: Path) -> None:
    """A run that ended, and a copy that was made before its last iterations."""
    ael = ["--db", str(folder / "ael.db")]
    for arguments in ([*RUN, "3"], ["db", "backup", "copy.db"], [*RUN, "3"]):
        ended = worker.fork(folder, [*ael, *arguments])
        assert ended.status == 0, ended.stderr


def _prepare_old(worker: Worker, folder: Path) -> None:
    """A filled database of the first schema."""
    from ael_store.store.upgrade import upgrade
    from tests.migrations.fill import fill

    path = folder / "ael.db"
    path.touch(0o600)
    upgrade(path, revision="0001", backup=False)
    fill(path, "0001", iterations=20)


def _check_loop(path: Path, start: Start) -> list[str]:
    return start.ledger.look() + start.ledger.check() if path.exists() else []


def _loop_finished(path: Path, start: Start) -> list[str]:
    from tests.migrations.fill import ask

    status = ask(path, "SELECT status FROM v_runs ORDER BY run_id DESC LIMIT 1")
    return [] if status == [("stopped",)] else [f"wrong: it ended with 0, its run is {status}"]


def _check_copy(path: Path, start: Start) -> list[str]:
    """The database is as it was; a copy is whole if it is there."""
    found = _check_loop(path, start)
    for file in (path.with_name("copy.db"), path.with_name("second.db")):
        if file.exists():
            ledger = Ledger(file)
            found += [f"{text} (in {file.name})" for text in ledger.look() + ledger.check()]
            if ledger.rows != start.ledger.rows:
                found.append(f"lost: {file.name} has {ledger.iteration} of {start.ledger.iteration} iterations")
    return found


def _put_aside(folder: Path) -> None:
    """Make room for another copy."""
    for end in ("-wal", "-shm"):
        (folder / f"copy.db{end}").unlink(missing_ok=True)  # of whoever has looked at it
    if (folder / "copy.db").exists():
        (folder / "copy.db").rename(folder / "second.db")


def _copy_finished(path: Path, start: Start) -> list[str]:
    return [] if path.with_name("copy.db").exists() else ["lost: there is no copy"]


def _check_restored(path: Path, start: Start) -> list[str]:
    """Under the name of the database is the old or the restored one; the old one is kept."""
    from ael_store.store.revision import current_revision

    current_revision(path)  # must work at any moment; it rolls back what only we may
    copy, ledger = Ledger(path.with_name("copy.db")), Ledger(path)
    found = copy.look() + ledger.look() + ledger.check()
    if ledger.rows not in (start.ledger.rows, copy.rows):
        found.append(f"lost: the database has {ledger.iteration} iterations")
    if ledger.rows != start.ledger.rows:
        kept = [Ledger(file) for file in path.parent.glob("ael.db.before-restore-*Z")]
        found += [text for old in kept for text in old.look()]
        if not any(old.rows == start.ledger.rows for old in kept):
            found.append("lost: the database as it was is not kept")
    return found


def _restore_finished(path: Path, start: Start) -> list[str]:
    copy, ledger = Ledger(path.with_name("copy.db")), Ledger(path)
    found = copy.look() + ledger.look()
    return found if ledger.rows == copy.rows else [*found, "wrong: it is not restored"]


def _check_rows(path: Path, start: Start) -> list[str]:
    from ael_store.store.upgrade import HEAD, current_revision
    from tests.migrations.fill import ask, digests

    found = []
    if current_revision(path) not in ("0001", HEAD):
        found.append(f"wrong: it is at revision {current_revision(path)}")
    for file in (path, *path.parent.glob("ael.db.bak-*")):
        if ask(file, "PRAGMA integrity_check") != [("ok",)]:
            found.append(f"wrong: {file.name} is damaged")
        elif digests(file, start.layout) != start.rows:
            found.append(f"lost: {file.name} has other rows than before")
    return found


def _upgrade_finished(path: Path, start: Start) -> list[str]:
    from ael_store.store.upgrade import HEAD, check

    report = check(path)
    if report.revision == HEAD and not report.problems:
        return []
    return [f"wrong: after the upgrade it is at {report.revision}: {report.problems}"]


JOBS = {
    "first start": Job((*RUN, "2"), (*RUN, "1"), _prepare_nothing, _check_loop, _loop_finished),
    "start after a crash": Job(
        (*RUN, "2"), (*RUN, "1"), _prepare_crash, _check_loop, _loop_finished, often_move_the_log
    ),
    "upgrade": Job(("db", "upgrade"), ("db", "upgrade"), _prepare_old, _check_rows, _upgrade_finished),
    "backup": Job(
        ("db", "backup", "copy.db"), ("db", "backup", "copy.db", "--force"), _prepare_crash, _check_copy, _copy_finished
    ),
    "restore": Job(
        ("db", "restore", "copy.db"),
        ("db", "restore", "copy.db"),
        _prepare_earlier_copy,
        _check_restored,
        _restore_finished,
        every=2,
    ),
    "recover": Job(
        ("db", "recover", "ael.db", "--to", "copy.db"),
        ("db", "recover", "ael.db", "--to", "copy.db"),
        _prepare_crash,
        _check_copy,
        _copy_finished,
        every=4,
        between=_put_aside,
    ),
}


def _hide_errors() -> None:
    """Break the store on purpose: a commit that fails is reported as made."""
    from ael_store.store.writer import Writer

    real: Any = Writer.write

    def write(writer: Writer, *arguments: Any) -> Any:
        with contextlib.suppress(sqlite3.Error):
            return real(writer, *arguments)
        return None

    setattr(Writer, "write", write)  # noqa: B010


PROOF = "a store that hides errors"
BROKEN = {PROOF: replace(JOBS["first start"], meddle=_hide_errors)}
"""Must be caught: else the proof proves nothing."""


# -- inside a worker --------------------------------------------------------------------------------

_starts: dict[str, Start] = {}


def start_of(worker: Worker, name: str) -> Start:
    """Return what a job begins with; made once."""
    if name not in _starts:
        from tests.migrations.fill import digests, layout

        job, folder = (JOBS | BROKEN)[name], worker.folder / "starts" / name.replace(" ", "-")
        folder.mkdir(parents=True)
        job.prepare(worker, folder)
        worker.shim.unwatch()
        seen = folder.with_name(folder.name + "-seen")  # looking at a database makes files beside it
        copy_folder(folder, seen)
        path = seen / "ael.db"
        start = Start(folder, Ledger(path))
        if job.prepare is _prepare_old:
            start.layout = layout(path)
            start.rows = digests(path, start.layout)
        else:
            found = start.ledger.look()
            assert not found, found
        _starts[name] = start
    return _starts[name]


def copy_folder(folder: Path, target: Path) -> None:
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.sock"))  # a socket can't be copied


def handle(worker: Worker, task: dict[str, Any]) -> dict[str, Any]:
    """Do a job with a fault, or, where none is given, without one to count its calls."""
    began = time.monotonic()
    job, folder = (JOBS | BROKEN)[task["job"]], worker.folder / "trial"
    start = copy.deepcopy(start_of(worker, task["job"]))
    shutil.rmtree(folder, ignore_errors=True)
    copy_folder(start.folder, folder)
    path = start.ledger.path = folder / "ael.db"
    way, at = WAYS.get(task.get("way", "")), task.get("at", 0)
    worker.shim.watch(folder)
    if way is not None:
        worker.shim.fail(at, way.mode, way.error, kinds=way.kinds)
    ended = worker.fork(folder, ["--db", str(path), *job.arguments], meddle=job.meddle)
    struck, calls = worker.shim.struck, worker.shim.calls()
    worker.shim.unwatch()
    if way is None:
        assert ended.status == 0, ended.stderr
        return {"calls": [[call.op, call.name, call.length, call.phase] for call in calls]}

    found = [] if not struck else judge_end(ended, way, calls[at - 1], folder)
    if not struck and ended.status != DONE:
        found.append(f"wrong: ended with {ended.status} without a fault")
    cant_remove = struck > 0 and not way.kills and calls[at - 1].op == Op.UNLINK
    found += _judge_files(worker, folder, job, start, ended, cant_remove=cant_remove)
    answer = {
        "job": task["job"],
        "way": task["way"],
        "at": at,
        "struck": struck,
        "status": ended.status,
        "seconds": time.monotonic() - began,
        "found": found,
    }
    if found:
        call = calls[min(at, len(calls)) - 1]
        answer["call"] = f"{call.op.name} of {call.name}" + (" in a commit" if call.phase == COMMITTING else "")
        answer["stderr"] = ended.stderr[-2000:]
    return answer


def judge_end(ended: Ended, way: Way, call: Call, folder: Path) -> list[str]:
    """How may a job end at which this call went wrong?"""
    found = []
    if ended.status is None:
        return ["wrong: it hangs"]
    if way.kills:
        return [] if ended.status == -signal.SIGKILL else [f"wrong: ended with {ended.status}, was to be killed"]
    if ended.status not in (DONE, STORAGE):
        found.append(f"wrong: ended with {ended.status}")
    if "Traceback" in ended.stderr + ended.stdout:
        found.append("wrong: a raw traceback")
    messages = [line for line in ended.stderr.splitlines() if line.startswith("ael: ")]
    if len(messages) != (ended.status != DONE):
        found.append(f"wrong: {len(messages)} messages with exit code {ended.status}")
    if ended.again:
        found.append(f"wrong: {ended.again} commits after one had failed")
    if call.phase == COMMITTING and call.name == "ael.db-wal" and call.op in (Op.WRITE, Op.FSYNC):
        passes = way.error == errno.ENOSPC and call.op == Op.WRITE and way.mode != Mode.ERROR_FOR_EVER
        wanted = DONE if passes else STORAGE
        # what the loop finds when it looks why a write failed is room again: both answers are true
        if ended.status != wanted and way.error not in (errno.EDQUOT, errno.EFBIG):
            found.append(f"wrong: ended with {ended.status}, wanted is {wanted}")
    return found


def _judge_files(
    worker: Worker, folder: Path, job: Job, start: Start, ended: Ended, *, cant_remove: bool = False
) -> list[str]:
    """Is everything there, now and after a start without a fault?

    With `cant_remove` the fault was that a file could not be removed: the next one of its kind will remove it.
    """
    path = start.ledger.path
    try:
        found = job.check(path, start)
        if start.ledger.commit_id < ended.commit_id:
            found.append(f"lost: commit {ended.commit_id} was reported, the last one is {start.ledger.commit_id}")
        if ended.status == DONE:
            found += job.finished(path, start)
        if job.between is not None:
            job.between(folder)
        again = worker.fork(folder, ["--db", str(path), *job.again])
        if again.status != DONE:
            return [*found, f"wrong: the start after it ended with {again.status}: {again.stderr[-500:]}"]
        found += job.check(path, start) + job.finished(path, start)
    except Exception as error:
        return [f"wrong: what it left can't be read: {type(error).__name__}: {error}"]
    left = sorted(item.name for item in folder.iterdir() if not NAMES.fullmatch(item.name))
    if left and not cant_remove:
        found.append(f"wrong: left behind: {', '.join(left)}")
    return found


# -- the sweep --------------------------------------------------------------------------------------


def _tasks(calls: dict[str, list[Call]], count: int, seed: int) -> list[dict[str, Any]]:
    """Return all trials, or `count` of them, evenly spread over calls and ways."""
    every = [
        {"job": job, "way": way.name, "at": at}
        for job, made in calls.items()
        for at, call in enumerate(made, 1)
        for way in WAYS.values()
        if ((call.op == Op.WRITE and call.length > 1) or not way.tears) and at % (way.every * JOBS[job].every) == 0
    ]
    if not 0 < count < len(every):
        return every
    step = len(every) / count
    return [every[int((number + seed % 1009 / 1009) * step)] for number in range(count)]


def run(*, count: int, seed: int, workers: int, tell: Tell, folder: Path) -> Report:
    """Fail `count` calls, or all; see the module."""
    failures: list[str] = []
    found: list[str] = []
    statuses: Counter[str] = Counter()
    struck = 0
    with Crew(__name__, workers=workers, folder=folder) as crew:
        calls = {
            job: [Call(Op(op), name, 0, length, phase) for op, name, length, phase in answer["calls"]]
            for job in JOBS
            for answer in crew.map([{"job": job}])
        }
        tasks = _tasks(calls, count, seed)
        tell(f"{len(tasks)} trials; calls: " + ", ".join(f"{len(made)} of {job}" for job, made in calls.items()))
        for number, answer in enumerate(crew.map(tasks), 1):
            struck += answer["struck"] > 0
            statuses[str(answer["status"])] += 1
            if answer["found"]:
                found += answer["found"]
                failures.append(_describe(answer))
            if number % 500 == 0:
                tell(f"{number} trials, {len(failures)} with violations")
        proof = [answer for answer in crew.map(_proof(calls["first start"])) if answer["struck"]]
        caught = sum(bool(answer["found"]) for answer in proof)
    total = sum(map(len, calls.values()))
    ends = ", ".join(f"{number} with {status}" for status, number in sorted(statuses.items()))
    counts = tally(found)
    if not caught:
        failures.append(f"{PROOF} was not caught in {len(proof)} trials: this trial proves nothing")
        counts["silent"] += 1
    note = f"{total} calls of {len(JOBS)} jobs, ended {ends}; {PROOF} was caught {caught} of {len(proof)} times"
    return Report("each call that changes a file fails", struck, **counts, note=note, failures=tuple(failures))


def _proof(calls: list[Call]) -> list[dict[str, Any]]:
    """Return some trials of the broken store, in the middle of its commits."""
    places = [n for n, call in enumerate(calls, 1) if call.phase == COMMITTING and call.op == Op.WRITE]
    middle = len(places) // 2
    return [{"job": PROOF, "way": "I/O error once", "at": at} for at in places[middle : middle + 4]]


def _describe(answer: dict[str, Any]) -> str:
    return (
        f"{answer['job']}, call {answer['at']} ({answer['call']}) {answer['way']}, exit {answer['status']}: "
        f"{'; '.join(answer['found'])}\n{answer['stderr']}"
    )

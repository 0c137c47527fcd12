"""Power cuts: everything that was not synced is dropped, reordered or torn, at any moment of a loaded run.

A life of a database is recorded once by the shim: every write, fsync, truncate, create, link, rename and unlink in
order, and in between what the loop had reported as committed. Then the disk that a power cut at a random moment may
leave is made again and again (see `disk.py`), opened by SQLite and by the product, and compared with the whole life:

- with durability `full`, everything that had been reported is there;
- with `normal`, whole commits at the end may be missing;
- an upgrade is there or not, and a backup under its final name is whole;
- what is there is sound, without a gap, and as it was.

A life with syncing switched off by force must be caught losing commits: else the proof proves nothing.
"""

from __future__ import annotations

import copy
import os
import random
import shutil
import signal
import sqlite3
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.faults.calls import JOBS, Job, Start, start_of
from tests.faults.disk import Disk
from tests.faults.invariants import GROWING, tally, violations
from tests.faults.shim import Mode, Op, Record, read_log
from tests.faults.trial import Report, Tell
from tests.faults.workers import AGENTS, REPORTS, Crew, Worker, often_move_the_log

__all__ = ["LIVES", "handle", "run"]

BATCH = 25
"""Images made of one pass over a recorded life."""

STARTED = 25
"""One image of so many is not only read, but started."""

PROOF = "sync off"
"""The life that must be caught."""

LIVES = {"full": 10, "normal": 5, "upgrade": 3, "backup": 1, "restore": 3, PROOF: 1}
"""How many images of each kind there are, as weights."""


@dataclass
class Life:
    """What a database went through."""

    disk: Disk
    """As it was before."""
    records: list[Record]
    reports: list[tuple[int, str]]
    """What was reported, and after how many records."""
    rows: dict[str, list[tuple[Any, ...]]] = field(default_factory=dict)
    """Everything that was ever committed."""
    start: Start | None = None
    """What a job of `calls.py` begins with; None in the life of a loop."""


def _run(number: int) -> list[str]:
    return ["run", str(AGENTS), "--tick-rate", "0", "--quiet", "--iterations", str(number)]


def _never_sync() -> None:
    from ael_store.store import sqlite

    often_move_the_log()
    sqlite.DURABILITY["full"] = "OFF"


def _record_life(worker: Worker, kind: str) -> Life:
    """Live once."""
    folder, log = worker.folder / kind.replace(" ", "-"), worker.folder / f"{kind}.log"
    folder.mkdir()
    path = folder / "ael.db"
    arguments = ["--db", str(path)]
    meddle: Callable[[], None] = _never_sync if kind == PROOF else often_move_the_log
    life = Life(Disk(folder), [], [])

    def live(arguments: list[str], wanted: int, killed_at: int = 0) -> None:
        worker.shim.watch(folder)
        worker.shim.fail(killed_at, Mode.KILL_BEFORE)
        worker.shim.record(log)
        ended = worker.fork(folder, arguments, reports=True, meddle=meddle)
        worker.shim.record(None)
        worker.shim.unwatch()
        assert ended.status == wanted, f"{kind}: ended with {ended.status}: {ended.stderr}"

    if kind in JOBS:
        life.start = start_of(worker, kind)
        shutil.copytree(life.start.folder, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.sock"))
        life.disk = Disk(folder)
        live([*arguments, *JOBS[kind].arguments], 0)
    else:
        durability = ["--durability", "normal" if kind == "normal" else "full"]
        live([*arguments, *_run(20), *durability], 0)
        live([*arguments, *_run(99), *durability], -signal.SIGKILL, killed_at=1000)
        live([*arguments, *_run(20), *durability], 0)
        with closing(sqlite3.connect(path)) as connection:
            for view, key in GROWING.items():
                life.rows[view] = connection.execute(f"SELECT * FROM {view} ORDER BY {key}").fetchall()
    for record in read_log(log):
        if os.path.basename(record.path) != REPORTS:
            life.records.append(record)
        elif record.op == Op.WRITE:
            life.reports += [(len(life.records), line) for line in record.data.decode().split()]
    log.unlink()
    return life


# -- inside a worker --------------------------------------------------------------------------------

_lives: dict[str, Life] = {}


def handle(worker: Worker, task: dict[str, Any]) -> dict[str, Any]:
    """Make some images of a life, and return what is wrong with them."""
    kind, source = task["life"], random.Random(task["seed"])
    if kind not in _lives:
        _lives[kind] = _record_life(worker, kind)
    life = _lives[kind]
    # the disk is made anew from the records up to each cut, all in one pass
    disk = copy.deepcopy(life.disk)
    moments = sorted(source.randrange(len(life.records) + 1) for _ in range(task["images"]))
    found: list[str] = []
    failures: list[str] = []
    behind = done = 0
    folder = worker.folder / "image"
    for place, moment in enumerate(moments):
        for record in life.records[done:moment]:
            disk.apply(record)
        done = moment
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name, content in disk.cut(source).items():
            if not name.endswith("-shm"):  # rebuilt at the next opening, whatever it holds
                (folder / name).write_bytes(content)
        reported = [line for after, line in life.reports if after <= moment]
        started = (task["seed"] + place) % STARTED == 0
        try:
            wrong, missing = _check(worker, folder, kind, life, reported, started)
        except Exception as error:
            wrong, missing = [f"wrong: it can't be read: {type(error).__name__}: {error}"], 0
        behind += missing > 0
        if wrong:
            found += wrong
            last = life.records[moment - 1] if moment else None
            where = f"after call {moment} of {len(life.records)}" + (
                f" ({last.op.name} of {last.path})" if last else ""
            )
            failures.append(f"{kind}, {where}, seed {task['seed']}, image {place}: {'; '.join(wrong)[:2000]}")
            if len(failures) == 1 and kind != PROOF:
                shutil.copytree(folder, Path(task["keep"]) / f"{kind}-{task['seed']}-{place}", dirs_exist_ok=True)
    return {"life": kind, "images": len(moments), "found": found, "failures": failures, "behind": behind}


def _check(
    worker: Worker, folder: Path, kind: str, life: Life, reported: list[str], started: bool
) -> tuple[list[str], int]:
    """Return what is wrong with an image, and how many commits are missing that were reported."""
    path = folder / "ael.db"
    if life.start is not None:
        return _check_job(worker, path, JOBS[kind], copy.deepcopy(life.start), "done" in reported, started), 0
    wanted = max((int(line) for line in reported if line.isdigit()), default=0)
    if not path.exists():
        return (["lost: there is no database"] if wanted and kind != "normal" else []), int(wanted > 0)
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("BEGIN")
        now = {
            view: connection.execute(f"SELECT * FROM {view} ORDER BY {key}").fetchall() for view, key in GROWING.items()
        }
        last = connection.execute(
            "SELECT coalesce(max(id), 0) FROM (SELECT id FROM commits UNION ALL SELECT commit_id FROM iterations)"
        ).fetchone()[0]
    found = []
    for view, rows in now.items():
        if rows != life.rows[view][: len(rows)]:
            found.append(f"wrong: {view} is not what was committed")
    found += violations(path)
    missing = max(0, wanted - last)
    if missing and kind != "normal":
        found.append(f"lost: commit {wanted} was reported, the last one is {last}")
    _resume(path)
    if started:
        ended = worker.fork(folder, ["--db", str(path), *_run(1)])
        if ended.status != 0:
            found.append(f"wrong: the start after it ended with {ended.status}: {ended.stderr[-500:]}")
        else:
            found += violations(path)
    return found, missing


def _resume(path: Path) -> None:
    """Read it as a starting loop does."""
    from ael_store.store.reader import Reader

    reader = Reader(path)
    try:
        reader.resume(None)
    finally:
        reader.close()


def _check_job(worker: Worker, path: Path, job: Job, start: Start, done: bool, started: bool) -> list[str]:
    start.ledger.path = path
    found = job.check(path, start)
    if done:
        found += job.finished(path, start)
    if started and not found:
        if job.between is not None:
            job.between(path.parent)
        ended = worker.fork(path.parent, ["--db", str(path), *job.again])
        if ended.status != 0:
            return [f"wrong: the same after it ended with {ended.status}: {ended.stderr[-500:]}"]
        found += job.check(path, start) + job.finished(path, start)
    return found


# -- the trial --------------------------------------------------------------------------------------


def run(*, count: int, seed: int, workers: int, tell: Tell, folder: Path) -> Report:
    """Open what `count` power cuts leave; see the module."""
    source = random.Random(seed)
    tasks = []
    for kind, weight in LIVES.items():
        number = max(1, count * weight // sum(LIVES.values()))
        if kind == PROOF:
            number = min(max(number, BATCH), 4 * BATCH)
        for begin in range(0, number, BATCH):
            some = min(BATCH, number - begin)
            tasks.append({"life": kind, "seed": source.randrange(2**31), "images": some, "keep": str(folder)})
    found: list[str] = []
    failures: list[str] = []
    images: Counter[str] = Counter()
    behind: Counter[str] = Counter()
    with Crew(__name__, workers=workers, folder=folder) as crew:
        for answer in crew.map(tasks):
            images[answer["life"]] += answer["images"]
            behind[answer["life"]] += answer["behind"]
            if answer["life"] != PROOF:
                found += answer["found"]
                failures += answer["failures"]
            if images.total() % 1000 < BATCH:
                tell(f"{images.total()} images, {len(failures)} with violations")
    counts = tally(found)
    if not behind[PROOF]:
        failures.append(f"{images[PROOF]} images without any sync lost nothing: this trial proves nothing")
        counts["silent"] += 1
    note = (
        f"{images['full']} at full, {images['normal']} at normal ({behind['normal']} without the last commits), "
        f"{sum(images[job] for job in JOBS)} of upgrades, backups and restores; "
        f"without sync {behind[PROOF]} of {images[PROOF]} lost commits; seed {seed}"
    )
    trials = images.total() - images[PROOF]
    return Report("power cuts", trials, **counts, note=note, failures=tuple(failures))

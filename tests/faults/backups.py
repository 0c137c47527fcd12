"""Backup, restore, upgrade and recovery, killed midway: nothing half done has a final name, and nothing is lost.

Each of them runs in a process of its own that is killed before and after each call that changes names or makes
something durable (link, rename, unlink, fsync), and at random moments, while SQLite copies. Then the folder is
looked at, the work is repeated without a kill, and it must come out as if nothing had been.

python -m tests.faults.backups SCENARIO FOLDER [STEP before|after]: does it once, and kills itself at that step.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ael_store.errors import AelError, DatabaseDamaged
from ael_store.store.backup import make_backup
from ael_store.store.recover import recover
from ael_store.store.restore import restore
from ael_store.store.revision import HEAD, current_revision, restore_marker
from ael_store.store.upgrade import check, downgrade, upgrade
from ael_store.store.verify import verify
from tests.faults.trial import Report, Tell

__all__ = ["SCENARIOS", "run"]

ROOT = Path(__file__).parents[2]
CALLS = ("link", "replace", "rename", "unlink", "fsync")
RANDOM_KILLS = 20
"""At random moments, for each scenario, where all is asked for."""
FEWEST_CALLS = 7
PATIENCE_S = 60.0

FINAL = re.compile(r"(ael|out|old)\.db|ael\.db\.(bak|before-restore)-[^.]*[A-Z0-9]")
"""Names that only whole files may have."""


def _quiet(_line: str) -> None:
    pass


# -- what is done, and what must be there afterwards --------------------------------------------------


def _backup(folder: Path) -> None:
    make_backup(folder / "ael.db", folder / "out.db", _quiet)


def _replace(folder: Path) -> None:
    make_backup(folder / "ael.db", folder / "old.db", _quiet, force=True)


def _restore(folder: Path) -> None:
    restore(folder / "ael.db", folder / "old.db", _quiet)


def _upgrade(folder: Path) -> None:
    upgrade(folder / "ael.db")


def _recover(folder: Path) -> None:
    recover(folder / "ael.db", folder / "out.db", _quiet)


@dataclass(frozen=True)
class Scenario:
    """One piece of work that can be killed."""

    name: str
    work: Callable[[Path], None]
    damaged: bool = False
    """Whether the database is made unreadable for SQLite before."""
    older: bool = False
    """Whether it has an older schema before."""


SCENARIOS = {
    one.name: one
    for one in (
        Scenario("backup", _backup),
        Scenario("replace", _replace),
        Scenario("restore", _restore),
        Scenario("restore-damaged", _restore, damaged=True),
        Scenario("upgrade", _upgrade, older=True),
        Scenario("recover", _recover, damaged=True),
    )
}


@dataclass(frozen=True)
class Sample:
    """A folder to begin with, and what it holds."""

    folder: Path
    database: str
    """Digest of the content of the database."""
    backup: str
    """Digest of the content of `old.db`."""
    files: dict[str, str]
    """Digests of the files of a damaged database."""


def content(path: Path) -> str:
    """Return a digest of what a database says to its users; fails where it is not sound."""
    found = hashlib.sha256()
    with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)], f"{path} is damaged"
        for table in ("state", "state_changes", "events", "ticks", "iterations", "runs"):
            newer = (
                "digest",
                "seal",
                "hops",
                "target_id",
                "cause_task_id",
                "recent",
            )  # an older schema does not have these
            rows = connection.execute(f"PRAGMA table_info({table})")
            columns = [row[1] for row in rows if row[1] not in newer]
            found.update(
                repr(connection.execute(f"SELECT {', '.join(columns)} FROM {table} ORDER BY 1").fetchall()).encode()
            )
    return found.hexdigest()


def _bytes(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def make_samples(folder: Path) -> dict[str, Sample]:
    """Return for each scenario a folder with a database whose log is not moved into it, and an older backup."""
    folder.mkdir(parents=True, exist_ok=True)
    base = folder / "base"
    base.mkdir()
    _fill(base / "ael.db", 20)
    make_backup(base / "ael.db", base / "old.db", _quiet)
    _fill(base / "ael.db", 20, keep_log=True)
    samples = {}
    for scenario in SCENARIOS.values():
        place = folder / scenario.name
        shutil.copytree(base, place, ignore=shutil.ignore_patterns("*.sock"))
        database = place / "ael.db"
        if scenario.damaged:
            _leave_log(database)
        whole = content(database)
        if scenario.older:
            downgrade(database, "0003", backup=False)
            whole = content(database)
        if scenario.damaged:
            database.with_name("ael.db-shm").unlink(missing_ok=True)
            raw = bytearray(database.read_bytes())
            raw[:100] = bytes(100)
            database.write_bytes(raw)
        samples[scenario.name] = Sample(
            place,
            whole,
            content(place / "old.db"),
            {file.name: _bytes(file) for file in place.glob("ael.db*") if not file.name.endswith("-shm")},
        )
    return samples


def _leave_log(path: Path) -> None:
    """Move the log into a database, and begin a new one without the first page, which could mend the file's own."""
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    subprocess.run([sys.executable, "-m", "tests.faults.backups", "touch", str(path)], cwd=ROOT, check=False)
    assert path.with_name("ael.db-wal").stat().st_size


def _touch_here(path: str) -> None:
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("UPDATE iterations SET duration_us = 4711 WHERE id = 1")
    os.kill(os.getpid(), signal.SIGKILL)


def _fill(path: Path, iterations: int, *, keep_log: bool = False) -> None:
    """Let agents work on a database; with `keep_log` everything stays as a killed process leaves it."""
    subprocess.run(
        [sys.executable, "-m", "tests.faults.backups", "fill", str(path), str(iterations), str(int(keep_log))],
        cwd=ROOT,
        check=not keep_log,
        timeout=PATIENCE_S,
    )


def _fill_here(path: str, iterations: int, keep_log: bool) -> None:
    import asyncio

    from ael_store import AELController, AgentBase, AgentManager, StateContext

    class Writer(AgentBase):
        name = "writer"
        priority = 10

        async def on_tick(self, context: StateContext) -> None:
            for number in range(5):
                context.set(f"key/{context.iteration % 7}/{number}", "x" * (context.iteration * 40))
            context.emit("wrote", {"iteration": context.iteration, "what": "y" * 3000})

        async def on_shutdown(self, context: StateContext) -> None:
            if keep_log:
                os.kill(os.getpid(), signal.SIGKILL)

    manager = AgentManager()
    manager.register(Writer())
    asyncio.run(AELController(manager, store=path, tick_rate=0).run(iterations))


# -- killing ------------------------------------------------------------------------------------------


def _count_calls(kill_at: int, when: str) -> list[int]:
    """Wrap the calls that matter; the process kills itself at the one of that number."""
    made = [0]

    def wrapped(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            made[0] += 1
            mine = made[0] == kill_at
            if mine and when == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(*arguments, **options)
            if mine:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    for name in CALLS:
        setattr(os, name, wrapped(getattr(os, name)))
    return made


@dataclass(frozen=True)
class Kill:
    """Where to kill: at a step, or after so many seconds."""

    scenario: str
    step: int = 0
    when: str = "before"
    after_s: float = 0.0

    def __str__(self) -> str:
        where = f"{self.when} call {self.step}" if self.step else f"after {self.after_s:.4f} s"
        return f"{self.scenario}, killed {where}"

    def arguments(self, folder: Path) -> list[str]:
        return [sys.executable, "-m", "tests.faults.backups", self.scenario, str(folder), str(self.step), self.when]


def _run_killed(kill: Kill, folder: Path) -> bool:
    """Do the work in a process and kill it; False where it was over before."""
    with subprocess.Popen(kill.arguments(folder), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            ready = process.stdout.readline()
            if not kill.step:
                assert ready == b"ready\n", process.stderr and process.stderr.read()
                time.sleep(kill.after_s)
                process.kill()
            _, errors = process.communicate(timeout=PATIENCE_S)
        finally:
            process.kill()
    assert process.returncode in (0, -signal.SIGKILL), errors.decode()
    return process.returncode != 0


def _measure(sample: Sample, scenario: str, folder: Path) -> tuple[int, float]:
    """Return how many calls the work makes, and how long it takes."""
    shutil.copytree(sample.folder, folder)
    found = subprocess.run(
        Kill(scenario).arguments(folder), cwd=ROOT, capture_output=True, check=True, timeout=PATIENCE_S
    )
    _ready, calls, seconds = found.stdout.split()
    shutil.rmtree(folder)
    return int(calls), float(seconds)


# -- checking -----------------------------------------------------------------------------------------


def check_folder(kill: Kill, sample: Sample, folder: Path) -> Iterator[str]:
    """Yield what must not be after the kill."""
    scenario = SCENARIOS[kill.scenario]
    database = folder / "ael.db"
    half = restore_marker(database).exists()
    for file in sorted(folder.iterdir()):
        if not FINAL.fullmatch(file.name):
            continue
        if scenario.damaged and (file.name == "ael.db" or "before-restore" in file.name):
            continue  # looked at below
        try:
            if content(file) not in (sample.database, sample.backup):
                yield f"{file.name} holds something else"
        except (AssertionError, sqlite3.Error) as error:
            yield f"{file.name} has a final name and is not whole: {error}"
    if half:
        try:
            current_revision(database)
        except DatabaseDamaged as error:
            if "Repeat it: `ael db restore" not in str(error):
                yield f"the message does not say how to go on: {error}"
        else:
            yield "a half restored database can be opened"
        return
    if not database.exists():
        yield "there is no database, and a start would make an empty one"
    elif scenario.damaged and (scenario.work is _recover or _bytes(database) == sample.files["ael.db"]):
        yield from _same_bytes(sample, folder, "ael.db")
    elif scenario.damaged:
        if database.with_name("ael.db-wal").exists() or content(database) != sample.backup:
            yield "the new database has the log of the old one"
        yield from _kept(sample, folder)


def _same_bytes(sample: Sample, folder: Path, name: str) -> Iterator[str]:
    for file, digest in sample.files.items():
        found = folder / file.replace("ael.db", name, 1)
        if file in ("ael.db", "ael.db-wal") and (not found.exists() or _bytes(found) != digest):
            yield f"{found.name} is not what it was"


def _kept(sample: Sample, folder: Path) -> Iterator[str]:
    """The old files are there under some name, all of them under the same."""
    names = {file.name for file in folder.glob("ael.db.before-restore-*") if not file.name.endswith(("-wal", "-shm"))}
    if not any(not list(_same_bytes(sample, folder, name)) for name in names):
        yield "the damaged file and its log are not kept together"


def check_repeated(kill: Kill, sample: Sample, folder: Path) -> Iterator[str]:
    """Yield what is wrong after the work was done again, without a kill."""
    scenario = SCENARIOS[kill.scenario]
    database = folder / "ael.db"
    out = folder / {"backup": "out.db", "replace": "old.db", "recover": "out.db"}.get(kill.scenario, "ael.db")
    if out.name == "out.db":
        for end in ("", "-wal", "-shm"):  # reading it has made these
            out.with_name(f"{out.name}{end}").unlink(missing_ok=True)
    try:
        scenario.work(folder)
    except AelError as error:
        yield f"it can't be repeated: {error}"
        return
    wanted = sample.backup if scenario.work is _restore else sample.database
    if content(out) != wanted:
        yield f"repeated, {out.name} does not hold what it should"
    if current_revision(out) == HEAD and (problems := verify(out).problems):
        yield f"repeated, {out.name} can't be verified: {problems[0]}"
    if check(out).problems:
        yield f"repeated, {out.name} has problems: {check(out).problems[0]}"
    if restore_marker(database).exists():
        yield "repeated, the marker is still there"
    if left := [file.name for file in folder.iterdir() if file.name.startswith(".")]:
        yield f"repeated, unfinished files are left: {left}"
    if scenario.work is _restore and scenario.damaged:
        yield from _kept(sample, folder)
    elif scenario.work is _restore:
        kept = [content(file) for file in folder.glob("ael.db.before-restore-*") if file.name[-1].isalnum()]
        if sample.database not in kept:
            yield "repeated, the old database is not kept"
    if scenario.work is _recover:
        yield from _same_bytes(sample, folder, "ael.db")


# -- the trial ----------------------------------------------------------------------------------------


def _all(samples: dict[str, Sample], moments: random.Random, folder: Path, tell: Tell) -> list[Kill]:
    kills: list[Kill] = []
    for name in SCENARIOS:
        calls, seconds = _measure(samples[name], name, folder / "measured")
        kills += [Kill(name, step, when) for step in range(1, calls + 1) for when in ("before", "after")]
        kills += [Kill(name, after_s=moments.uniform(0, seconds)) for _ in range(RANDOM_KILLS)]
        tell(f"{name}: {calls} calls, {seconds:.2f} s")
    return kills


def _some(count: int, moments: random.Random) -> list[Kill]:
    """Return a few, of each scenario in turn; each makes at least as many calls as this."""
    names = list(SCENARIOS)
    kills = []
    for number in range(count):
        name = names[number % len(names)]
        step = moments.randint(1, FEWEST_CALLS)
        kills.append(
            Kill(name, step, moments.choice(("before", "after")))
            if moments.random() < 0.8
            else Kill(name, after_s=moments.uniform(0, 0.2))
        )
    return kills


def run(*, count: int, seed: int, workers: int, tell: Tell, folder: Path) -> Report:
    """Kill each of them at every call (`count=0`), or some of them at some calls and moments."""
    moments = random.Random(seed)
    samples = make_samples(folder / "samples")
    kills = _some(count, moments) if count else _all(samples, moments, folder, tell)
    failures: list[str] = []
    killed = 0
    checking = threading.Lock()  # Alembic's environment is one for all threads

    def one(number: int, kill: Kill) -> tuple[bool, list[str]]:
        place = folder / f"trial-{number}"
        shutil.copytree(samples[kill.scenario].folder, place)
        was_killed = _run_killed(kill, place)
        with checking:
            found = [*check_folder(kill, samples[kill.scenario], place)]
            found += check_repeated(kill, samples[kill.scenario], place)
        if not found:
            shutil.rmtree(place)
        return was_killed, [f"{kill}: {text} (in {place})" for text in found]

    with ThreadPoolExecutor(workers) as pool:
        for number, (was_killed, found) in enumerate(pool.map(one, range(len(kills)), kills)):
            killed += was_killed
            failures += found
            if number % 50 == 49:
                tell(f"{number + 1} of {len(kills)}, {len(failures)} violations")
    return Report(
        "backup, restore, upgrade and recovery killed midway",
        killed,
        lost=sum("kept" in text or "no database" in text for text in failures),
        silent=sum("kept" not in text and "no database" not in text for text in failures),
        note=f"{len(SCENARIOS)} kinds of work, {killed} kills, seed {seed}",
        failures=tuple(failures),
    )


def main() -> None:
    if sys.argv[1] == "fill":
        _fill_here(sys.argv[2], int(sys.argv[3]), sys.argv[4] == "1")
        return
    if sys.argv[1] == "touch":
        _touch_here(sys.argv[2])
    scenario, folder, step, when = SCENARIOS[sys.argv[1]], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    from alembic import command  # noqa: F401  so that a random moment is one of the work and not of an import

    made = _count_calls(step, when)
    print("ready", flush=True)
    began = time.monotonic()
    scenario.work(folder)
    print(made[0], time.monotonic() - began)


if __name__ == "__main__":
    main()

"""SIGKILL at random moments, again and again: what was committed stays, and nothing is there by halves.

A series is one database and up to a hundred lives on it, killed one after another: while they start, go round,
commit, run a unit or shut down. Most are forked (`life.py`); one in fifty is a whole `ael run` or `python file.py`.
Beside some of them a reader looks on, and whatever it or a caller of `transact` saw must still be there after.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tests.faults.agents import crash_settings
from tests.faults.invariants import Ledger, tally
from tests.faults.life import HANG_S, Life, Notes, live, note_steps, shorten_log
from tests.faults.trial import Report, Tell

__all__ = ["run"]

NAME = "SIGKILL at random moments"
ROOT = Path(__file__).parents[2]
SERIES = 100
"""Kills on one database."""
WHOLE_EVERY = 50
"""One in so many lives is a process of its own, from `exec` on."""
AEL = Path(sys.executable).with_name("ael")
AGENTS = Path(__file__).with_name("agents.py")


@dataclass
class Series:
    """What one series did and found."""

    kills: int = 0
    iterations: int = 0
    stops: int = 0
    """Lives that had ended cleanly before the signal came."""
    looks: int = 0
    """Looks of a reader beside a running loop."""
    where: Counter[str] = field(default_factory=Counter)
    """What the lives were doing when they were killed."""
    found: list[str] = field(default_factory=list)

    def add(self, other: Series) -> None:
        self.kills += other.kills
        self.iterations += other.iterations
        self.stops += other.stops
        self.looks += other.looks
        self.where += other.where
        self.found += other.found


def run(*, count: int, seed: int, workers: int, tell: Tell, folder: Path) -> Report:
    """Kill `count` lives, in series of a hundred, `workers` series at a time."""
    size = max(1, min(SERIES, -(-count // workers)))
    sizes = [min(size, count - done) for done in range(0, count, size)]
    total, began = Series(), time.monotonic()

    def one(number: int) -> Series:
        place = folder / f"series-{number}"
        place.mkdir()
        series = _in_a_process(place, sizes[number], seed + number)
        total.add(series)
        pace = 60 * total.kills / (time.monotonic() - began)
        tell(f"{total.kills:,} of {count:,} kills, {pace:.0f} a minute, {len(total.found)} violations")
        if not series.found:
            for file in place.iterdir():
                file.unlink()
            place.rmdir()
        return series

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(one, range(len(sizes))))
    where = ", ".join(f"{number:,} {what}" for what, number in total.where.most_common())
    return Report(
        NAME,
        total.kills,
        **tally(total.found),
        note=f"{where}; {total.iterations:,} iterations committed, {total.looks:,} looks beside a running loop; "
        f"{60 * total.kills / (time.monotonic() - began):.0f} kills a minute; seed {seed}",
        failures=tuple(total.found),
    )


def _in_a_process(place: Path, kills: int, seed: int) -> Series:
    """Run a series in a fresh process, which may fork because it has no threads."""
    command = [sys.executable, "-m", "tests.faults.kills", str(place), str(kills), str(seed)]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("AEL_")}
    with subprocess.Popen(command, cwd=ROOT, env=clean, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            output, errors = process.communicate(timeout=3 * HANG_S + 10 * kills)
        except BaseException:
            process.kill()
            raise
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{errors.decode()}")
    values = json.loads(output)
    return Series(**{**values, "where": Counter(values["where"])})


# -- one series, in its own process --------------------------------------------------------------------


class Killer:
    """Kills lives on one database, and looks at what they left."""

    def __init__(self, place: Path, seed: int, target: Path = AGENTS) -> None:
        self.path, self.log = place / "ael.db", place / "log"
        self.target = target
        self.seed = seed
        self.random = random.Random(seed)
        self.ledger = Ledger(self.path)
        self.notes = Notes()
        self.series = Series()
        self.start_s, self.iteration_s, self.end_s = 0.15, 0.01, 0.03
        """About how long things take here; kills that come too late shorten the first and the last."""

    def kill(self, number: int) -> None:
        """Begin a life and kill it; what is wrong after it goes to `series.found`."""
        if number % WHOLE_EVERY == WHOLE_EVERY // 2:
            self.kill_whole(number)
            return
        self.notes.clear()
        if self.random.random() < 0.12:
            self._kill_ending()
        else:
            self._kill_running()
        self._look(number)

    def finish(self) -> None:
        """Let one life run undisturbed and look at everything."""
        self.notes.clear()
        task = partial(live, self.path, self.notes, iterations=20)
        with Life(task, self.log) as last:
            self._note(last.wait_for(lambda: False, "clean end"))
            if last.status != 0:
                self._note(f"wrong: the last life ended with status {last.status}, see {self.log}")
        self._look_at_all()

    def finish_whole(self) -> None:
        """The same in a process of its own."""
        with self._whole("--iterations", "20") as process:
            status = process.wait(HANG_S)
        if status != 0:
            self._note(f"wrong: the last life ended with status {status}, see {self.log}")
        self._look_at_all()

    def _kill_running(self) -> None:
        """Kill a life while it starts, or some iterations later."""
        target = self.random.randrange(12)
        with self._life(None) as life:
            if self.random.random() < 0.25:
                time.sleep(self.random.uniform(0, self.start_s))
                self.start_s *= 0.9 if self.notes.iterations else 1.03
            else:
                self._note(life.wait_for(lambda: self.notes.iterations > target, f"iteration {target + 1}"))
                if self.random.random() < 0.3:
                    self.series.looks += 1
                    self.series.found += self.ledger.look()
                time.sleep(self.random.uniform(0, 3 * self.iteration_s))
            self._end(life)

    def _kill_ending(self) -> None:
        """Kill a life while it shuts down."""
        with self._life(self.random.randint(1, 4)) as life:
            self._note(life.wait_for(lambda: self.notes.step >= 4, "shutdown"))
            time.sleep(self.random.uniform(0, self.end_s))
            self.end_s *= 0.9 if life.is_over() else 1.03
            self._end(life)

    def kill_whole(self, number: int) -> None:
        """The same with a process that a user would start."""
        before, target = self.ledger.iteration, self.random.choice((None, 0, 2, 5))
        process = self._whole()
        try:
            if target is None:
                time.sleep(self.random.uniform(0, 1.0))
            else:
                give_up = time.monotonic() + HANG_S
                while self.ledger.iteration <= before + target and process.poll() is None:
                    if time.monotonic() > give_up:
                        self._note(f"wrong: no iteration of {process.args!r} in {HANG_S:.0f} s")
                        break
                    self.series.looks += 1
                    self.series.found += self.ledger.look()
                    time.sleep(0.002)
                time.sleep(self.random.uniform(0, 0.05))
        finally:
            process.kill()
            status = process.wait()
        if status != -signal.SIGKILL:
            self._note(f"wrong: {process.args!r} ended by itself with {status}, see {self.log}")
        self.series.kills += 1
        self.series.where["a whole process"] += 1
        self._look(number)

    def _whole(self, *more: str) -> subprocess.Popen[bytes]:
        """Start a process of its own."""
        command = [str(AEL), "run", str(self.target), "--db", str(self.path), *more]
        if self.target == AGENTS and not more and self.random.random() < 0.5:
            command = [sys.executable, str(self.target), str(self.path)]
        settings = {f"AEL_{name.upper()}": str(value) for name, value in crash_settings().items()}
        with self.log.open("ab") as output:
            return subprocess.Popen(
                command,
                cwd=self.path.parent,
                env={**os.environ, "PYTHONPATH": str(ROOT), **settings},
                stdout=output,
                stderr=output,
            )

    def _life(self, iterations: int | None) -> Life:
        # a short log brings checkpoints into each series
        pages = self.random.choice((2000, 2000, 20, 100))
        durability = self.random.choice(("full", "normal"))

        def task() -> None:
            shorten_log(pages)
            note_steps(self.notes)
            live(self.path, self.notes, iterations=iterations, durability=durability)

        return Life(task, self.log)

    def _end(self, life: Life) -> None:
        life.kill()
        if life.was_killed:
            self.series.kills += 1
            self.series.where[self.notes.where] += 1
        elif life.status == 0 and self.notes.step == 5:
            self.series.stops += 1
        else:
            self.series.found.append(f"wrong: a life ended by itself with status {life.status}, see {self.log}")

    def _look(self, number: int) -> None:
        """Whatever holds always, and what this life had been told by the loop."""
        found = self.ledger.look()
        self.series.iterations = self.ledger.iteration
        if self.ledger.commit_id < self.notes.commit_id:
            found.append(f"lost: commit {self.notes.commit_id} was durable, the last one is {self.ledger.commit_id}")
        orders = int(self.ledger.value("orders") or 0)
        if orders < self.notes.orders:
            found.append(f"lost: transact returned {self.notes.orders}, the state says {orders}")
        self.series.found += [f"{text} (kill {number} with seed {self.seed} on {self.path})" for text in found]

    def _look_at_all(self) -> None:
        """The end of a series: everything from the beginning, also as `ael db verify` sees it."""
        self._look(self.series.kills)
        self.series.found += self.ledger.check()
        command = [str(AEL), "db", "verify", "--db", str(self.path)]
        verified = subprocess.run(command, cwd=self.path.parent, capture_output=True, timeout=HANG_S, check=False)
        if verified.returncode != 0:
            said = verified.stdout.decode() + verified.stderr.decode()
            self._note(f"wrong: {command} ended with {verified.returncode}: {said.strip()}")

    def _note(self, text: str | None) -> None:
        if text is not None:
            self.series.found.append(text)


def main(place: str, kills: str, seed: str) -> None:
    """Run one series and print it as JSON."""
    killer = Killer(Path(place), int(seed))
    attempts = 0
    while killer.series.kills < int(kills) and not killer.series.found:
        killer.kill(attempts)
        attempts += 1
    killer.finish()
    found: dict[str, Any] = {**killer.series.__dict__}
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Owners that stand still: stopped by SIGSTOP under load, overtaken by `ael run --take-over`, and continued.

Each trial is three real processes on one database. The owner is stopped at a random moment; a second start without
`--take-over` must be refused; the one with it must go on, or name the process that holds SQLite's write lock, which is
killed then as the message says. Continued, the old owner must end with 75 and write no row. The new owner is the old
one of the next trial.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tests.acceptance.database import ask
from tests.faults.agents import crash_settings
from tests.faults.invariants import Ledger, tally
from tests.faults.trial import Report, Tell

__all__ = ["run"]

ROOT = Path(__file__).parents[2]
AGENTS = Path(__file__).with_name("agents.py")
USUAL = 30
"""Trials where no count is given."""

HANG_S = 60.0
OWNED = 75


def run(*, count: int, seed: int, workers: int, tell: Tell, folder: Path) -> Report:
    """Overtake so many owners in turn."""
    series = _Series(folder, random.Random(seed))
    try:
        series.begin()
        for number in range(count or USUAL):
            series.overtake(number)
            if number % 10 == 9:
                tell(f"{number + 1} owners overtaken")
        series.end()
    finally:
        series.kill_all()
    return Report(
        "owners stopped by SIGSTOP and overtaken",
        series.trials,
        **tally(series.found),
        note=f"seed {seed}; " + ", ".join(f"{times} {what}" for what, times in sorted(series.happened.items())),
        failures=tuple(series.found),
    )


class _Series:
    def __init__(self, folder: Path, source: random.Random) -> None:
        self.path = folder / "ael.db"
        self.random = source
        self.trials = 0
        self.found: list[str] = []
        self.happened: Counter[str] = Counter()
        self.ledger = Ledger(self.path)
        self._processes: list[subprocess.Popen[str]] = []
        self._owner: subprocess.Popen[str] | None = None

    def begin(self) -> None:
        self._owner = self._start()
        self._wait_for_iterations(self._owner)

    def overtake(self, number: int) -> None:
        """Stop the owner, put another one in its place, and let it go on."""
        old = self._owner
        assert old is not None
        time.sleep(self.random.uniform(0, 0.3))
        old.send_signal(signal.SIGSTOP)
        self.trials += 1

        second = self._start("--iterations", "1")
        self._ended(second, number, "a second start", f"is owned by pid {old.pid} ", because="")

        new = self._start("--take-over")
        if not self._wait_for_iterations(new):
            self._ended(new, number, "the take-over", f"`kill -9 {old.pid}`", because="")
            self.happened["held the write lock and were killed"] += 1
            old.kill()
            old.wait()
            new = self._start()
            if not self._wait_for_iterations(new):
                raise AssertionError(f"trial {number}: no owner after the old one was killed: {_output(new)}")
        else:
            before = self._rows_of(old.pid)
            old.send_signal(signal.SIGCONT)
            self._ended(old, number, "the old owner", "over", because="it was overtaken")
            if self._rows_of(old.pid) != before:
                self.found.append(f"wrong: trial {number}: the old owner wrote: {before} -> {self._rows_of(old.pid)}")
            self.happened["ended by themselves when continued"] += 1
        status = ask(self.path, "SELECT status FROM v_runs WHERE pid = ?", old.pid)
        if status != [("crashed",)]:
            self.found.append(f"wrong: trial {number}: the run of the old owner is marked {status}")
        self._processes.remove(old)
        self._owner = new
        if not self._wait_for_iterations(new):
            raise AssertionError(f"trial {number}: the new owner ended: {_output(new)}")
        self.found += self.ledger.look()

    def end(self) -> None:
        """Stop the last owner as one should, and check everything."""
        assert self._owner is not None
        self._owner.send_signal(signal.SIGTERM)
        if self._owner.wait(HANG_S) != 0:
            self.found.append(f"silent: the last owner ended with {self._owner.returncode}: {_output(self._owner)}")
        self.found += self.ledger.look() + self.ledger.check()

    def kill_all(self) -> None:
        for process in self._processes:
            with suppress(OSError):
                process.kill()
            process.communicate()

    # -- processes --

    def _start(self, *more: str) -> subprocess.Popen[str]:
        settings = {f"AEL_{name.upper()}": str(value) for name, value in crash_settings().items()}
        clean = {name: value for name, value in os.environ.items() if not name.startswith("AEL_")}
        # one that goes round without a pause is mostly inside a transaction, one with pauses mostly is not
        pace = ("--tick-rate", self.random.choice(("0", "0.02", "0.02")))
        process = subprocess.Popen(
            [sys.executable, "-m", "ael_store", "run", str(AGENTS), "--db", str(self.path), "--quiet", *pace, *more],
            cwd=self.path.parent,
            env={**clean, **settings, "PYTHONPATH": str(ROOT), "AEL_LOG_LEVEL": "ERROR"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._processes.append(process)
        return process

    def _ended(self, process: subprocess.Popen[str], number: int, who: str, words: str, *, because: str) -> None:
        """Note unless a process ends with 75 and one clear message."""
        try:
            code = process.wait(HANG_S)
        except subprocess.TimeoutExpired:
            self.found.append(f"silent: trial {number}: {who} does not end")
            process.kill()
            process.wait()
            return
        text = _output(process)
        clear = words in text and "Traceback" not in text
        if code != OWNED or not clear:
            self.found.append(f"silent: trial {number}: {who} ended with {code} {because}: {text!r}")
        if process is not self._owner:
            self._processes.remove(process)

    def _wait_for_iterations(self, process: subprocess.Popen[str]) -> bool:
        """Wait until a process has committed some; False where it has ended before."""
        return _until(lambda: self._iterations_of(process.pid) >= 3, process)

    def _iterations_of(self, pid: int) -> int:
        if not self.path.exists():
            return 0
        query = "SELECT count(*) FROM v_iterations JOIN v_runs USING (run_id) WHERE pid = ?"
        return int(ask(self.path, query, pid)[0][0])

    def _rows_of(self, pid: int) -> tuple[int, ...]:
        """Count what a process has written."""
        rows = ask(
            self.path,
            "SELECT (SELECT count(*) FROM v_iterations i WHERE i.run_id = r.run_id), "
            "(SELECT count(*) FROM v_iterations i JOIN v_ticks t USING (iteration) WHERE i.run_id = r.run_id), "
            "(SELECT count(*) FROM commits c WHERE c.run_id = r.run_id) FROM v_runs r WHERE pid = ?",
            pid,
        )
        return tuple(int(value) for row in rows for value in row)


def _output(process: subprocess.Popen[str]) -> str:
    return "" if process.stderr is None or process.poll() is None else process.stderr.read()


def _until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> bool:
    give_up = time.monotonic() + HANG_S
    while not condition():
        if process.poll() is not None:
            return False
        if time.monotonic() > give_up:
            raise AssertionError(f"pid {process.pid} does not get on")
        time.sleep(0.01)
    return True

"""Wall clocks that jump under a loop at work, and machines that are suspended.

A real process runs under the shim, which shifts its clocks while it runs: by seconds or hours, to 1969, over the
ends of 31 and 32 bits, back again; or lets hours of suspension pass at once. After each jump the loop must go round
as before, each slot of its clock must be run or counted as missed, timers must ring, and a daily schedule must fire
once a day. Now and then the process is killed, and its clock is set while it is down.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.acceptance.database import ask
from tests.faults.agents import crash_settings
from tests.faults.clock_agents import FIRES_AT_H
from tests.faults.invariants import tally, violations
from tests.faults.shim import Shim
from tests.faults.trial import Report, Tell

__all__ = ["HOUR", "Clocked", "run"]

ROOT = Path(__file__).parents[2]
AGENTS = Path(__file__).with_name("clock_agents.py")
USUAL = 100
"""Jumps where no count is given."""

PERIOD_S = 0.05
HANG_S = 60.0
BEHIND_S = 5.0
"""How far what is committed may be behind the clock on a machine that has much else to do."""

HOUR, DAY = 3600, 86_400
BASE = datetime(2026, 3, 28, FIRES_AT_H - 1, 30, tzinfo=UTC).timestamp()
"""Where the wall clock begins: half an hour before the daily schedule."""

FAR = tuple(
    datetime.fromisoformat(text).timestamp()
    for text in (
        "1969-12-31T22:00:00+00:00",
        "1970-01-01T00:00:01+00:00",
        "2038-01-19T03:14:06+00:00",
        "2106-02-07T06:28:14+00:00",
    )
)


def run(*, count: int, seed: int, workers: int, tell: Tell, folder: Path) -> Report:
    """Make so many jumps."""
    source = random.Random(seed)
    clocked = Clocked(folder)
    try:
        clocked.start()
        for number in range(count or USUAL):
            if source.random() < 0.1:
                clocked.restart(by_s=source.choice((0, source.uniform(0, 2 * HOUR))))
            clocked.jump_somehow(source)
            if number % 10 == 9:
                tell(f"{number + 1} jumps")
        clocked.stop()
    finally:
        clocked.kill()
    return clocked.report(f"seed {seed}")


class Clocked:
    """A process whose clocks are set, and what it must have done since."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "ael.db"
        self.folder = folder
        self.shim = Shim(folder / "control")
        self.jumps = 0
        self.found: list[str] = []
        self._process: subprocess.Popen[str] | None = None
        self._ahead_s = BASE - time.time()
        self._slept_s = 0.0
        self._fires = 0
        self._days: set[int] = set()
        """Days on which the schedule fired, since the clock was last put right."""
        self._done_until = BASE
        """Fire times up to here are none of the future any more."""

    # -- the process --

    def start(self) -> None:
        self.shim.set_clock(self._ahead_s)
        settings = {f"AEL_{name.upper()}": str(value) for name, value in crash_settings().items()}
        clean = {name: value for name, value in os.environ.items() if not name.startswith("AEL_")}
        with (self.folder / "log").open("a") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "ael_store", "run", str(AGENTS), "--db", str(self.path), "--quiet"],
                cwd=self.folder,
                env={
                    **clean,
                    **settings,
                    **self.shim.environment(),
                    "AEL_TICK_RATE": str(PERIOD_S),
                    "AEL_DURABILITY": "normal",
                    "AEL_LOG_LEVEL": "ERROR",
                    "PYTHONPATH": str(ROOT),
                },
                stdout=log,
                stderr=log,
                text=True,
            )
        pid = self._process.pid
        self._wait(lambda: self._iterations(pid) >= 3, "it starts")
        self._at, self._slots = time.monotonic(), self._count_slots()

    def stop(self) -> None:
        """Stop it as one should, and check everything."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        if self._process.wait(HANG_S) != 0:
            self.found.append(f"silent: it ended with {self._process.returncode}, see {self.folder / 'log'}")
        self.found += violations(self.path)
        late_s = self._value("ring/latest") or 0.0
        if late_s > HANG_S:
            self.found.append(f"wrong: a timer was {late_s:.1f} s late")

    def restart(self, *, by_s: float) -> None:
        """Kill it, set the clock while it is down, and start it again."""
        self.kill()
        self._ahead_s += by_s
        self.start()
        self._check_daily()

    def kill(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def report(self, note: str) -> Report:
        slots = self._count_slots()
        return Report(
            "wall clocks that jump, and suspended machines",
            self.jumps,
            **tally(self.found),
            note=f"{note}; {slots} slots of {PERIOD_S} s run or counted, {self._fires} daily fires",
            failures=tuple(self.found),
        )

    # -- jumps --

    def jump_somehow(self, source: random.Random) -> None:
        kind = source.random()
        if abs(self._ahead_s + time.time() - BASE) > 30 * DAY or kind < 0.1:
            self.set_to(BASE + source.uniform(0, 3 * DAY))
        elif kind < 0.25:
            self.set_to(source.choice(FAR))
        elif kind < 0.45:
            self.suspend(source.choice((1.0, 30.0, 8 * HOUR)))
        else:
            self.set_by(source.choice((-1, 1)) * source.choice((0.5, 2.0, 90.0, HOUR, 2 * HOUR)))

    def set_by(self, seconds: float) -> None:
        self._jump(seconds, 0.0)

    def set_to(self, wall_s: float) -> None:
        self._jump(wall_s - self.wall_s, 0.0)

    def suspend(self, seconds: float) -> None:
        self._jump(seconds, seconds)

    @property
    def wall_s(self) -> float:
        return time.time() + self._ahead_s

    def _jump(self, seconds: float, slept_s: float) -> None:
        what = f"jump {self.jumps} by {seconds:+.1f} s{' asleep' if slept_s else ''} at {self.wall_s:.0f}"
        before = self._signs_of_life()
        if seconds < -DAY:  # put right: what the wrong time has fired does not count
            self._days.clear()
            self._done_until = self.wall_s + seconds
        self._ahead_s += seconds
        if slept_s:
            self._slept_s += slept_s
            self.shim.set_boottime(self._slept_s)
        self.shim.set_clock(self._ahead_s)
        self.jumps += 1

        def goes_on() -> bool:
            now = self._signs_of_life()
            return now[0] >= before[0] + 8 and all(new >= old + 2 for old, new in zip(before[1:], now[1:], strict=True))

        if not self._wait(goes_on, what):
            self.found.append(f"silent: {what}: the loop does not go on: {before} -> {self._signs_of_life()}")
            raise AssertionError(self.found[-1])
        self._check_slots(what, slept_s)
        self._check_daily(what)

    # -- what must hold --

    def _signs_of_life(self) -> tuple[int, int, int]:
        """Return how many iterations, ticks of `every` and timers there were."""
        iterations = ask(self.path, "SELECT coalesce(max(iteration), 0) FROM v_iterations")[0][0]
        return int(iterations), self._value("beat/ticks") or 0, self._value("ring/rung") or 0

    def _check_slots(self, what: str, slept_s: float) -> None:
        """Each slot of the clock was run or counted as missed, once."""
        slots, now = self._count_slots(), time.monotonic()
        wanted = (now - self._at + slept_s) / PERIOD_S
        found = slots - self._slots
        if not wanted - BEHIND_S / PERIOD_S <= found <= wanted + BEHIND_S / PERIOD_S:
            self.found.append(f"wrong: {what}: {found} slots were run or counted, {wanted:.0f} have passed")
        self._at, self._slots = now, slots

    def _check_daily(self, what: str = "restart") -> None:
        """The schedule has fired once on each day whose hour has come, and never twice on one."""
        last = (self.wall_s - FIRES_AT_H * HOUR) // DAY * DAY + FIRES_AT_H * HOUR
        is_due = last > self._done_until
        if is_due and not self._wait(lambda: len(self._value("daily/fires") or []) > self._fires, what):
            self.found.append(f"lost: {what}: the daily schedule did not fire")
        fires = self._value("daily/fires") or []
        for at in fires[self._fires :]:
            day = int(at // DAY)
            if day in self._days:
                self.found.append(f"twice: {what}: the daily schedule fired again on day {day}")
            self._days.add(day)
        self._fires = len(fires)
        self._done_until = max(self._done_until, last)

    # -- looking --

    def _value(self, key: str) -> Any:
        rows = ask(self.path, "SELECT value FROM v_state WHERE key = ?", key)
        return json.loads(rows[0][0]) if rows else None

    def _count_slots(self) -> int:
        return int(ask(self.path, "SELECT coalesce(max(clock), 0) + coalesce(sum(missed), 0) FROM iterations")[0][0])

    def _iterations(self, pid: int) -> int:
        if not self.path.exists():
            return 0
        query = "SELECT count(*) FROM v_iterations JOIN v_runs USING (run_id) WHERE pid = ? AND status = 'running'"
        return int(ask(self.path, query, pid)[0][0])

    def _wait(self, condition: Callable[[], bool], what: str) -> bool:
        give_up = time.monotonic() + HANG_S
        while not condition():
            if self._process is None or self._process.poll() is not None:
                raise AssertionError(f"{what}: it has ended: {(self.folder / 'log').read_text()}")
            if time.monotonic() > give_up:
                return False
            time.sleep(0.02)
        return True

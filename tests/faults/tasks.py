"""SIGKILL of a service whose tasks call a server: each key reaches it, each result counts once, no limit is exceeded.

The server lives here and survives the kills; it notes every request with its key and the number of the attempt, and
how many are open, as it sees them itself: one whose client has died is over. A series is one database on which up to
150 lives of `task_agents.py` are killed one after another; then one undisturbed life, whose limits per minute
and day are raised so that it need not take that long, drains what is left, and everything is compared: the keys that
the state says were submitted, the rows of tasks and attempts, the effects in the state, and what the server saw.

What a server can see of a limit per minute is late by the time between the commit that reserves an attempt and its
request, which differs from attempt to attempt. So the 60 s are checked exactly by the times of the reservations, each
request is matched with its reservation, and by the clock of the server the window is 60 s less the largest delay.

With BREAKAGES the child breaks what the trial is to prove, to show that it would be noticed.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from decimal import Decimal
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from ael_store.errors import LoopNotRunning
from ael_store.runtime.limits import Limit
from ael_store.runtime.tasks import NO_USE, TaskBoard
from ael_store.store.reader import Reader
from ael_store.store.writer import Writer
from tests.acceptance.database import reading
from tests.faults import task_agents
from tests.faults.agents import crash_settings
from tests.faults.invariants import tally
from tests.faults.life import HANG_S, Life, Notes, note_steps, shorten_log
from tests.faults.task_agents import KINDS, PORT, controller_on, ends_well, order_mail
from tests.faults.trial import Report, Tell

__all__ = ["BREAKAGES", "Series", "Server", "run", "run_broken", "run_series"]

NAME = "SIGKILL of a service whose tasks call a server"
ROOT = Path(__file__).parents[2]
SERIES = 150
"""Kills on one database: enough for several minutes, so that the limit per minute is reached again and again."""
WHOLE_EVERY = 25
"""One in so many lives is an `ael run`."""
PROOF_FROM = 50
"""From so many kills on the trial shows, too, that it notices what is broken on purpose."""
PROOF_KILLS, PROOF_SERIES = 8, 8
"""Kills of a series with something broken, and most series until that is noticed; mostly it is the first."""
AEL = Path(sys.executable).with_name("ael")
AGENTS = Path(task_agents.__file__)

ATTEMPT = ("id", "key", "number", "limit", "outcome", "start", "end", "reserved", "cost", "run")
MINUTE_US, DAY_US = 60_000_000, 86_400_000_000
STRICT_VIEWS = True
"""True to have `v_limits` and the rows of attempts, too, never show more than a limit allows. The code of an attempt
makes room when it ends, and its row says so one commit later, so for this moment `running` is more than there are;
and `started_last_minute` looks back up to 61 s, as the clock of the views counts whole seconds."""
CLOCK_US = 5_000
"""By how much the clocks of the loop and of the server may differ."""


def limits_for(kills: int) -> dict[str, dict[str, Any]]:
    """Return limits of which those per minute, day and money are reached before the last of so many kills."""
    return {
        "bank": {"concurrency": 4, "breaker": 0},
        "desk": {"concurrency": 3, "breaker": 0},
        "minute": {"concurrency": 5, "per_minute": min(60, 6 + 2 * kills), "breaker": 0},
        "day": {"concurrency": 2, "per_day": 6 + 2 * kills, "breaker": 0},
        "budget": {"concurrency": 3, "usd_per_day": f"{Decimal('0.06') + Decimal('0.02') * kills}", "breaker": 0},
    }


def raised(limits: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the same with nothing to wait for."""
    more = {"per_minute": 100_000, "per_day": 100_000, "usd_per_day": "1000"}
    return {name: {key: more.get(key, value) for key, value in table.items()} for name, table in limits.items()}


# -- the server -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arrival:
    """A request as the server saw it."""

    at_us: int
    kind: str
    key: str
    attempt: int
    micros: int
    """What it was charged."""
    draining: bool
    """It came after the last kill."""


class Server:
    """A server on 127.0.0.1 in a thread of its own; what it answers follows from its seed."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.port = 0
        self.arrivals: list[Arrival] = []
        self.open: Counter[str] = Counter()
        self.most_open: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        """How often each mail has gone out."""
        self.draining = False
        self._loop = asyncio.new_event_loop()
        self._refused: Counter[str] = Counter()
        self._hung: set[str] = set()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> Server:
        self._thread.start()
        self._ready.wait(HANG_S)
        return self

    def __exit__(self, *error: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(HANG_S)

    def _serve(self) -> None:
        async def listen() -> asyncio.Server:
            return await self._loop.create_server(lambda: _Connection(self), "127.0.0.1", 0, backlog=1000)

        server = self._loop.run_until_complete(listen())
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        try:
            self._loop.run_forever()
        finally:
            server.close()
            self._loop.close()

    def arrived(self, kind: str, key: str, attempt: int, number: int) -> tuple[float | None, int, dict[str, Any]]:
        """Take a request; returns after how many seconds it is answered (None for never), and how."""
        source = random.Random(f"{self.seed}/{key}/{len(self.arrivals)}")
        dice, pause_s = source.random(), source.uniform(0.001, 0.05)
        micros, status = source.randrange(2_000, 10_000), 200
        answer: dict[str, Any] = {"number": number}
        seconds: float | None = pause_s
        if number % 29 == 0:
            status, micros = 400, 500
        elif not ends_well(kind, number) or (dice < 0.1 and self._refused[key] < 2):
            self._refused[key] += 1
            status, micros = 500, 1_000
        elif dice < 0.15:
            status, micros = 429, 0
            answer["after"] = 0.03
        elif dice < 0.155 and key not in self._hung:
            self._hung.add(key)
            seconds = None
        if micros:
            answer["usd"] = f"0.{micros:06d}"
        if kind == "mail" and status == 200:
            self.sent[key] += 1
        self.arrivals.append(Arrival(time.time_ns() // 1000, kind, key, attempt, micros, self.draining))
        self.open[kind] += 1
        self.most_open[kind] = max(self.most_open[kind], self.open[kind])
        return seconds, status, answer


class _Connection(asyncio.Protocol):
    """One request, and one answer unless its client is gone before."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.data = b""
        self.kind: str | None = None
        """Counted as open under this name."""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.data += data
        if not self.data.endswith(b"\r\n\r\n"):
            return
        first, *lines = self.data.decode().split("\r\n")
        method, path, _ = first.split(" ")
        headers = dict(line.split(": ", 1) for line in lines if line)
        if path == "/drain":
            self.server.draining = True
            self._answer(200, {})
        elif method == "GET":
            key = headers["Idempotency-Key"]
            sent = self.server.sent[key] > 0
            self._answer(200 if sent else 404, {"number": int(key.partition(":")[2])} if sent else {})
        else:
            kind = path[1:]
            seconds, status, answer = self.server.arrived(
                kind, headers["Idempotency-Key"], int(headers["X-Attempt"]), int(headers["X-Number"])
            )
            self.kind = kind
            if seconds is not None:
                asyncio.get_running_loop().call_later(seconds, self._answer, status, answer)

    def _answer(self, status: int, answer: dict[str, Any]) -> None:
        self._over()
        if self.transport.is_closing():
            return
        body = json.dumps(answer).encode()
        head = f"HTTP/1.1 {status} As Such\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        self.transport.write(head.encode() + body)
        self.transport.close()

    def eof_received(self) -> None:
        self._over()

    def connection_lost(self, error: Exception | None) -> None:
        self._over()

    def _over(self) -> None:
        if self.kind is not None:
            self.server.open[self.kind] -= 1
            self.kind = None


# -- the trial --------------------------------------------------------------------------------------


@dataclass
class Series:
    """What one series did and found."""

    kills: int = 0
    iterations: int = 0
    stops: int = 0
    """Lives that had ended cleanly before the signal came."""
    running: int = 0
    """Kills that attempts died with."""
    unapplied: int = 0
    """Kills between a result and its `on_task`."""
    over: int = 0
    """Looks at which v_limits showed more than a limit allows (see STRICT_VIEWS)."""
    where: Counter[str] = field(default_factory=Counter)
    full: Counter[str] = field(default_factory=Counter)
    """Looks at which tasks waited because of a limit, by what it says."""
    found: list[str] = field(default_factory=list)
    # what the server and the database say at the end
    requests: int = 0
    keys: int = 0
    tasks: int = 0
    conflicts: int = 0
    slid: int = 0
    """Attempts that could begin because others had left the window of the limit per minute."""
    latest_us: int = 0
    """Most time between a reservation and its request."""
    outcomes: Counter[str] = field(default_factory=Counter)
    """Of attempts."""

    def add(self, other: Series) -> None:
        names = "kills iterations stops running unapplied over requests keys tasks conflicts slid"
        for name in names.split():
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.latest_us = max(self.latest_us, other.latest_us)
        self.where += other.where
        self.full += other.full
        self.outcomes += other.outcomes
        self.found += other.found


def run(*, count: int, seed: int, workers: int, tell: Tell, folder: Path) -> Report:
    """Kill `count` lives, `workers` series at a time; long trials also show that they notice what is broken."""
    size = max(1, min(SERIES, -(-count // workers)))
    sizes = [min(size, count - done) for done in range(0, count, size)]
    total, began = Series(), time.monotonic()

    def one(number: int) -> None:
        place = folder / f"series-{number}"
        place.mkdir()
        series = run_series(place, sizes[number], seed + number)
        total.add(series)
        tell(f"{total.kills:,} of {count:,} kills, {total.requests:,} requests, {len(total.found)} violations")
        if not series.found:
            _remove(place)

    def broken(breakage: str) -> None:
        series = run_broken(folder, seed, breakage)
        if series.found:
            tell(f"broken on purpose: {breakage}: noticed: {series.found[0]}")
        else:
            total.found.append(f"wrong: {breakage} was not noticed by {PROOF_SERIES} series with seed {seed}")

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(one, range(len(sizes))))
        seconds = time.monotonic() - began
        if count >= PROOF_FROM:
            list(pool.map(broken, BREAKAGES))
    outcomes = ", ".join(f"{number:,} {what}" for what, number in total.outcomes.most_common())
    where = ", ".join(f"{number:,} {what}" for what, number in total.where.most_common())
    full = ", ".join(f"{number:,} {what}" for what, number in total.full.most_common())
    return Report(
        NAME,
        total.kills,
        **tally(total.found),
        note=f"{where}; {total.running:,} with attempts running, {total.unapplied:,} between a result and on_task; "
        f"{total.tasks:,} tasks, {total.requests:,} requests, attempts: {outcomes}; {total.conflicts:,} conflicts of "
        f"on_task; looks at which a limit was reached: {full}; {total.slid:,} attempts began as the minute slid on; "
        f"v_limits showed more than a limit allows at {total.over:,} looks; "
        f"a request at most {total.latest_us / 1000:.0f} ms after its reservation; "
        f"{60 * total.kills / seconds:.0f} kills a minute"
        + (f"; {len(BREAKAGES)} breakages noticed" if count >= PROOF_FROM and not total.found else "")
        + f"; seed {seed}",
        failures=tuple(total.found),
    )


def run_broken(folder: Path, seed: int, breakage: str) -> Series:
    """Run short series with something broken on purpose until one has found something; returns the last."""
    series = Series()
    for number in range(PROOF_SERIES):
        place = folder / f"{breakage.replace(' ', '-')}-{number}"
        place.mkdir()
        series = run_series(place, PROOF_KILLS, seed + number, breakage)
        _remove(place)
        if series.found:
            break
    return series


def _remove(place: Path) -> None:
    for file in place.iterdir():
        file.unlink()
    place.rmdir()


def run_series(place: Path, kills: int, seed: int, breakage: str = "") -> Series:
    """Run a server, beside it a series in a fresh process, which may fork because it has no threads; check all."""
    with Server(seed) as server:
        command = [sys.executable, "-m", "tests.faults.tasks", str(place), str(kills), str(seed), breakage]
        clean = {name: value for name, value in os.environ.items() if not name.startswith("AEL_")}
        clean[PORT] = str(server.port)
        with subprocess.Popen(command, cwd=ROOT, env=clean, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            try:
                output, errors = process.communicate(timeout=4 * HANG_S + 10 * kills)
            except BaseException:
                process.kill()
                raise
        if process.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{errors.decode()}")
        told = json.loads(output)
        series = Series(
            **{**told, "outcomes": Counter(), "where": Counter(told["where"]), "full": Counter(told["full"])}
        )
        found: list[str] = []
        try:
            with reading(place / "ael.db") as connection:
                found = _Check(connection, server, limits_for(kills), series).everything()
        except sqlite3.Error as error:
            found = [f"wrong: the database can't be read: {error}"]
        series.found += [f"{text} (seed {seed} on {place / 'ael.db'})" for text in found]
    return series


# -- one series, in its own process -----------------------------------------------------------------


class Killer:
    """Kills lives on one database, and looks at what they left."""

    def __init__(self, place: Path, kills: int, seed: int, *, is_broken: bool) -> None:
        self.place, self.path, self.log = place, place / "ael.db", place / "log"
        self.limits = limits_for(kills)
        self.seed = seed
        self.is_broken = is_broken
        self.random = random.Random(seed)
        self.notes = Notes()
        self.series = Series()
        self.start_s, self.end_s = 0.2, 0.05
        self._over: dict[int, tuple[Any, ...]] = {}
        """The tasks that were ever seen done or failed; they stay as they are."""
        (place / "ael.toml").write_text(_toml(self.limits))

    def kill(self, number: int) -> None:
        """Begin a life and kill it; what is wrong after it goes to `series.found`."""
        self.notes.clear()
        if not self.is_broken and number % WHOLE_EVERY == WHOLE_EVERY // 2:
            self._kill_whole()
        elif self.random.random() < 0.12:
            self._kill_ending()
        else:
            self._kill_running()
        found = self._look()
        self.series.found += [f"{text} (kill {number} with seed {self.seed} on {self.path})" for text in found]

    def drain(self) -> None:
        """Let one life run undisturbed until nothing is left to do."""
        _ask_server("/drain")
        self.notes.clear()
        with Life(partial(live, self.path, self.notes, raised(self.limits), drain=True), self.log) as life:
            quiet = 0
            give_up = time.monotonic() + 2 * HANG_S
            while quiet < 3 and not life.is_over() and time.monotonic() < give_up:
                time.sleep(0.05)
                quiet = quiet + 1 if self._is_drained() else 0
            if quiet < 3:
                self._note(f"lost: not all was done at the end, see {self.log}")
            self.notes.crossings = 1
            self._note(life.wait_for(lambda: False, "clean end"))
            if life.status != 0:
                self._note(f"wrong: the last life ended with status {life.status}, see {self.log}")
        self.series.found += self._look()
        command = [str(AEL), "db", "verify", "--db", str(self.path)]
        verified = subprocess.run(command, cwd=self.place, capture_output=True, timeout=HANG_S, check=False)
        if verified.returncode != 0:
            said = verified.stdout.decode() + verified.stderr.decode()
            self._note(f"wrong: {command} ended with {verified.returncode}: {said.strip()}")

    def _kill_running(self) -> None:
        """Kill a life while it starts, or some iterations later."""
        target = self.random.choice((0, 1, 2, 5, 10, 20, 40, 80, 150, 300))
        with self._life(None) as life:
            if self.random.random() < 0.25:
                time.sleep(self.random.uniform(0, self.start_s))
                self.start_s *= 0.9 if self.notes.iterations else 1.03
            else:
                self._note(life.wait_for(lambda: self.notes.iterations > target, f"iteration {target + 1}"))
                time.sleep(self.random.choice((self.random.uniform(0, 0.02), self.random.uniform(0, 0.8))))
            self._end(life)

    def _kill_ending(self) -> None:
        """Kill a life while it shuts down."""
        with self._life(self.random.randint(1, 20)) as life:
            self._note(life.wait_for(lambda: self.notes.step >= 4, "shutdown"))
            time.sleep(self.random.uniform(0, self.end_s))
            self.end_s *= 0.9 if life.is_over() else 1.03
            self._end(life)

    def _kill_whole(self) -> None:
        """Kill a process that a user would start."""
        command = [str(AEL), "run", f"{AGENTS}:task_agents", "--db", str(self.path), "--quiet"]
        settings = {f"AEL_{name.upper()}": str(value) for name, value in crash_settings().items()}
        with self.log.open("ab") as output:
            process = subprocess.Popen(
                command,
                cwd=self.place,
                env={**os.environ, "PYTHONPATH": str(ROOT), "AEL_LOG_LEVEL": "ERROR", **settings},
                stdout=output,
                stderr=output,
            )
        try:
            time.sleep(self.random.uniform(0.3, 1.5))
        finally:
            process.kill()
            status = process.wait()
        if status != -signal.SIGKILL:
            self._note(f"wrong: {command} ended by itself with {status}, see {self.log}")
        self.series.kills += 1
        self.series.where["a whole process"] += 1

    def _life(self, iterations: int | None) -> Life:
        pages = self.random.choice((2000, 2000, 20, 100))
        settings: dict[str, Any] = {
            "durability": self.random.choice(("full", "normal")),
            "tick_rate": self.random.choice((0.0, 0.0, 0.01)),
        }

        def begin() -> None:
            shorten_log(pages)
            note_steps(self.notes)
            live(self.path, self.notes, self.limits, iterations=iterations, **settings)

        return Life(begin, self.log)

    def _end(self, life: Life) -> None:
        life.kill()
        if life.was_killed:
            self.series.kills += 1
            self.series.where[self.notes.where] += 1
        elif life.status == 0 and self.notes.step == 5:
            self.series.stops += 1
        else:
            self._note(f"wrong: a life ended by itself with status {life.status}, see {self.log}")

    # -- looking --

    def _look(self) -> list[str]:
        """Return what is wrong with what must hold at any moment."""
        if not self.path.exists():
            return ["lost: the database is gone"] if self._over or self.notes.commit_id else []
        try:
            with reading(self.path) as connection:
                return self._look_at(connection)
        except sqlite3.Error as error:
            return [f"wrong: the database can't be read: {error}"]

    def _look_at(self, connection: sqlite3.Connection) -> list[str]:
        found = []
        ((commit_id,),) = connection.execute(
            "SELECT max((SELECT coalesce(max(id), 0) FROM commits), "
            "(SELECT coalesce(max(commit_id), 0) FROM iterations))"
        )
        if commit_id < self.notes.commit_id:
            found.append(f"lost: commit {self.notes.commit_id} was durable, the last one is {commit_id}")
        ((iterations,),) = connection.execute("SELECT count(*) FROM v_iterations")
        self.series.iterations = iterations
        state = {key: json.loads(value) for key, value in connection.execute("SELECT key, value FROM v_state")}
        if state.get("mail/submitted", 0) < self.notes.orders:
            found.append(f"lost: transact returned {self.notes.orders}, the state says {state.get('mail/submitted')}")
        found += [f"twice: {key} is {value}" for key, value in state.items() if "/effect/" in key and value != 1]
        now: dict[int, tuple[Any, ...]] = {}
        for number, *row in connection.execute(
            "SELECT id, key, status, result, cost_usd, ended_us FROM tasks WHERE status IN ('done', 'failed')"
        ):
            now[number] = tuple(row)
        for number, row in self._over.items():
            if now.get(number) != row:
                found.append(f"lost: task {number} was {row} and is {now.get(number)}")
        self._over = now
        ((running, unapplied),) = connection.execute(
            "SELECT (SELECT count(*) FROM task_attempts WHERE ended_us IS NULL), (SELECT count(*) FROM tasks "
            "WHERE applied_us IS NULL AND status IN ('done', 'failed'))"
        )
        self.series.running += running > 0
        self.series.unapplied += unapplied > 0
        ((over,),) = connection.execute(
            "SELECT count(*) FROM v_limits WHERE running > concurrency OR started_last_minute > per_minute"
        )
        self.series.over += over > 0
        self.series.full.update(
            f"{name} ({' '.join(reason.split()[1:])})"
            for name, reason in connection.execute("SELECT name, reason FROM v_limits WHERE status = 'full'")
        )
        return found + _exceeded(connection)

    def _is_drained(self) -> bool:
        with reading(self.path) as connection:
            ((left,),) = connection.execute(
                "SELECT (SELECT count(*) FROM tasks WHERE applied_us IS NULL) + (SELECT count(*) FROM v_pending)"
            )
        return bool(left == 0)

    def _note(self, text: str | None) -> None:
        if text is not None:
            self.series.found.append(text)


def _exceeded(connection: sqlite3.Connection) -> list[str]:
    """Return the limits that are exceeded, as v_limits shows them."""
    found = []
    for used, most in (
        ("running", "concurrency"),
        ("started_last_minute", "per_minute"),
        ("started_today", "per_day"),
        ("usd_today", "usd_per_day"),
    ):
        if used in ("running", "started_last_minute") and not STRICT_VIEWS:
            continue
        query = f"SELECT name, {used}, {most} FROM v_limits WHERE {used} > {most} + 1e-9"
        found += [f"wrong: limit {row[0]}: {used} is {row[1]}, {most} is {row[2]}" for row in connection.execute(query)]
    return found


def _ask_server(path: str) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", int(os.environ[PORT]), timeout=HANG_S)
    connection.request("GET", path)
    connection.getresponse().read()
    connection.close()


def _toml(limits: dict[str, dict[str, Any]]) -> str:
    return "".join(
        f"[limits.{name}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in table.items())
        for name, table in limits.items()
    )


def live(
    path: Path,
    notes: Notes,
    limits: dict[str, dict[str, Any]],
    *,
    iterations: int | None = None,
    drain: bool = False,
    **settings: Any,
) -> None:
    """Run the agents, with a customer who orders mails by `transact`, for so many iterations or for ever.

    To drain, nothing new is submitted, and it ends when `notes.crossings` is set.
    """
    if drain:
        task_agents.rest()
    asyncio.run(_live(path, notes, limits, iterations, drain, settings))


async def _live(
    path: Path,
    notes: Notes,
    limits: dict[str, dict[str, Any]],
    iterations: int | None,
    drain: bool,
    settings: dict[str, Any],
) -> None:
    controller = controller_on(path, limits, **settings)
    beside: list[asyncio.Task[None]] = []

    async def order() -> None:
        try:
            while controller.running:
                notes.orders = await controller.transact(order_mail)
                await asyncio.sleep(0.01)
        except LoopNotRunning:
            pass

    def observe(_summary: object) -> None:
        notes.iterations += 1
        if not beside and not drain:
            beside.append(asyncio.create_task(order()))
        elif not beside and notes.crossings:
            beside.append(asyncio.create_task(controller.stop()))

    controller.observe(observe)
    if iterations is None:
        await controller.start()
    else:
        await controller.run(iterations)
    for one in beside:
        await one


# -- what must hold in the end ----------------------------------------------------------------------


class _Check:
    """Compares state, tasks, attempts and what the server saw."""

    def __init__(
        self, connection: sqlite3.Connection, server: Server, limits: dict[str, dict[str, Any]], series: Series
    ) -> None:
        self.connection, self.server, self.limits, self.series = connection, server, limits, series
        self.found: list[str] = []
        self.state: dict[str, Any] = {
            key: json.loads(value) for key, value in connection.execute("SELECT key, value FROM v_state")
        }
        self.tasks = {
            key: {"id": number, "status": status, "attempts": attempts, "cost": cost, "result": result}
            for number, key, status, attempts, cost, result in connection.execute(
                "SELECT id, key, status, attempts, cost_usd, result FROM v_tasks"
            )
        }
        for key, number, status, attempts, cost, result in connection.execute(
            "SELECT key, id, status, attempts, cost_usd, result FROM tasks WHERE agent_id = 0"
        ):  # those of nobody
            self.tasks.setdefault(
                key, {"id": number, "status": status, "attempts": attempts, "cost": float(cost or 0), "result": result}
            )
        self.attempts = [
            dict(zip(ATTEMPT, row, strict=True))
            for row in connection.execute(
                "SELECT a.id, t.key, a.number, a.limit_name, a.outcome, a.started_us, a.ended_us, a.reserved_usd, "
                "a.cost_usd, a.run_id FROM task_attempts a LEFT JOIN tasks t ON t.id = a.task_id "
                "ORDER BY a.started_us, a.id"
            )
        ]

        ((runs,),) = connection.execute("SELECT coalesce(max(id), 0) FROM runs")
        self.last_run: int = runs if server.draining else runs + 1
        """The one that drained; limits were raised for it."""

    def everything(self) -> list[str]:
        self._keys()
        self._effects()
        self._attempts()
        self._requests()
        self._limits()
        self._costs()
        server = self.server
        self.series.requests, self.series.keys = len(server.arrivals), len({one.key for one in server.arrivals})
        self.series.tasks = len(self.tasks)
        self.series.outcomes = Counter(attempt["outcome"] for attempt in self.attempts)
        ((self.series.conflicts,),) = self.connection.execute(
            "SELECT count(*) FROM v_ticks WHERE kind = 'task' AND outcome = 'conflict'"
        )
        return self.found

    def _say(self, kind: str, text: str) -> None:
        self.found.append(f"{kind}: {text}")

    def _keys(self) -> None:
        """What the state says was submitted is there, and nothing else."""
        wanted = {f"{kind}:{n}" for kind in KINDS for n in range(1, self.state.get(f"{kind}/submitted", 0) + 1)}
        if self.state.get("ordered", 0) != self.state.get("desk/submitted", 0):
            self._say("lost", f"{self.state.get('ordered')} ordered, {self.state.get('desk/submitted')} submitted")
        reached = {one.key for one in self.server.arrivals}
        self._differ("the table has no task", "lost", wanted - set(self.tasks))
        self._differ("the table has a task that no unit submitted", "wrong", set(self.tasks) - wanted)
        self._differ("the server never saw", "lost", wanted - reached)
        self._differ("the server saw what no unit submitted", "wrong", reached - wanted)

    def _differ(self, what: str, kind: str, keys: Iterable[str]) -> None:
        keys = sorted(keys)
        if keys:
            self._say(kind, f"{what}: {', '.join(keys[:5])}{f' and {len(keys) - 5} more' if len(keys) > 5 else ''}")

    def _effects(self) -> None:
        """Each task has ended as it must, and its result is in the state exactly once."""
        for key, task in self.tasks.items():
            kind, _, text = key.partition(":")
            wanted = "done" if ends_well(kind, int(text)) else "failed"
            if task["status"] != wanted:
                lost = "lost" if task["status"] in ("waiting", "held", "running") else "wrong"
                self._say(lost, f"task {key} is {task['status']} after {task['attempts']} attempts, not {wanted}")
            effect = self.state.get(f"{kind}/effect/{text}", 0)
            if effect != 1:
                self._say("lost" if effect == 0 else "twice", f"the result of {key} is {effect} times in the state")
        for kind in KINDS:
            mine = [task for key, task in self.tasks.items() if key.startswith(f"{kind}:")]
            failed = sum(task["status"] == "failed" for task in mine)
            for what, wanted_count in (("applied", len(mine)), ("failed", failed), ("wrong", 0), ("cancelled", 0)):
                if self.state.get(f"{kind}/{what}", 0) != wanted_count:
                    self._say("wrong", f"{kind}/{what} is {self.state.get(f'{kind}/{what}')}, wanted is {wanted_count}")
        with_hook = sum(self.state.get(f"{kind}/applied", 0) for kind in KINDS if kind != "mail")
        if self.state.get("total", 0) != with_hook:
            self._say("lost", f"total is {self.state.get('total')}, applied were {with_hook}")

    def _attempts(self) -> None:
        """The rows of attempts say what happened to each task."""
        of: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for attempt in self.attempts:
            of[attempt["key"]].append(attempt)
            if attempt["end"] is None or attempt["outcome"] == "running":
                self._say("lost", f"attempt {attempt['id']} of {attempt['key']} has no end")
        for key, task in self.tasks.items():
            mine = of.get(key, [])
            if [attempt["number"] for attempt in mine] != list(range(1, task["attempts"] + 1)):
                self._say("wrong", f"{key} has {task['attempts']} attempts: {[a['number'] for a in mine]}")
                continue
            outcomes = [attempt["outcome"] for attempt in mine]
            if not mine or outcomes.count("done") != (task["status"] == "done") or "done" in outcomes[:-1]:
                self._say("twice", f"{key} is {task['status']}, its attempts are {outcomes}")
            for before, after in pairwise(mine):
                if (before["end"] or after["start"]) > after["start"]:
                    self._say("twice", f"attempt {after['number']} of {key} began before the one before had ended")
            cost = sum((Decimal(attempt["cost"] or 0) for attempt in mine), Decimal(0))
            if abs(float(cost) - (task["cost"] or 0)) > 1e-9:
                self._say("wrong", f"{key} cost {task['cost']}, its attempts {cost}")

    def _requests(self) -> None:
        """Each request belongs to an attempt that was committed before, and to one only."""
        starts = {(attempt["key"], attempt["number"]): attempt for attempt in self.attempts}
        seen: set[tuple[str, int]] = set()
        for one in self.server.arrivals:
            attempt = starts.get((one.key, one.attempt))
            if attempt is None:
                self._say("wrong", f"the server saw attempt {one.attempt} of {one.key}, of which no commit knows")
            elif (one.key, one.attempt) in seen:
                self._say("twice", f"attempt {one.attempt} of {one.key} reached the server twice")
            else:
                self.series.latest_us = max(self.series.latest_us, one.at_us - attempt["start"])
                if one.at_us < attempt["start"] - CLOCK_US:
                    self._say("wrong", f"attempt {one.attempt} of {one.key} began before it was reserved")
            seen.add((one.key, one.attempt))
        for key, times in self.server.sent.items():
            if times != 1:
                self._say("twice", f"{key} went out {times} times, although `reconcile` could have told")

    def _limits(self) -> None:
        """No limit was exceeded: by the server's own count, and by the rows of attempts."""
        self.found += _exceeded(self.connection)
        for name, table in self.limits.items():
            most = table["concurrency"]
            if self.server.most_open[name] > most:
                self._say("wrong", f"limit {name}: {self.server.most_open[name]} at once at the server, {most} allowed")
            mine = [attempt for attempt in self.attempts if attempt["limit"] == name]
            at_once = _most_at_once([(attempt["start"], attempt["end"] or attempt["start"]) for attempt in mine])
            if at_once > most and STRICT_VIEWS:
                self._say("wrong", f"limit {name}: {at_once} attempts at once by their rows, {most} allowed")
            arrived = [one for one in self.server.arrivals if one.kind == name]
            loaded = [attempt for attempt in mine if attempt["run"] < self.last_run]
            under_load = [attempt["start"] for attempt in loaded]
            if "per_minute" in table:
                most = table["per_minute"]
                self._window(f"limit {name}: reservations", under_load, most, MINUTE_US)
                self.series.slid += max(0, len(under_load) - most)
                times = [one.at_us for one in arrived if not one.draining]
                self._window(f"limit {name}: requests", times, most, MINUTE_US - self.series.latest_us - CLOCK_US)
            if "per_day" in table:
                for day, number in Counter(start // DAY_US for start in under_load).items():
                    if number > table["per_day"]:
                        self._say("wrong", f"limit {name}: {number} on day {day}, {table['per_day']} allowed")
            if "usd_per_day" in table:
                self._money(name, Decimal(table["usd_per_day"]), loaded)

    def _window(self, what: str, times_us: Sequence[int], most: int, length_us: int) -> None:
        times_us = sorted(times_us)
        for first, last in zip(times_us, times_us[most:], strict=False):
            if last - first < length_us:
                self._say("wrong", f"{what}: {most + 1} within {(last - first) / 1e6:.3f} s, {most} a minute allowed")
                return

    def _money(self, name: str, most: Decimal, mine: list[dict[str, Any]]) -> None:
        """Neither what the server charged nor what was reserved and spent is more than a day may cost."""
        start_of = {(attempt["key"], attempt["number"]): attempt["start"] for attempt in mine}
        charged: Counter[int] = Counter()
        for one in self.server.arrivals:
            if one.kind == name and not one.draining:
                charged[start_of.get((one.key, one.attempt), one.at_us) // DAY_US] += one.micros
        spent: dict[int, Decimal] = defaultdict(Decimal)
        for attempt in mine:
            spent[attempt["start"] // DAY_US] += Decimal(attempt["cost"] or attempt["reserved"] or 0)
            if attempt["reserved"] is None:
                self._say("wrong", f"limit {name}: attempt {attempt['id']} has reserved nothing")
        for day, micros in charged.items():
            if micros > most * 1_000_000:
                self._say("wrong", f"limit {name}: the server charged {micros / 1e6} on day {day}, allowed is {most}")
        for day, amount in spent.items():
            if amount > most:
                self._say("wrong", f"limit {name}: {amount} spent on day {day}, allowed is {most}")

    def _costs(self) -> None:
        """The state has what the tasks cost, and that is what the server charged, or less."""
        for kind in KINDS:
            cost = sum(
                round((task["cost"] or 0) * 1e6) for key, task in self.tasks.items() if key.startswith(f"{kind}:")
            )
            charged = sum(one.micros for one in self.server.arrivals if one.kind == kind)
            if self.state.get(f"{kind}/micros", 0) != cost:
                self._say("wrong", f"{kind} cost {cost} by v_tasks, {self.state.get(f'{kind}/micros')} by the state")
            if cost > charged:
                self._say("wrong", f"{kind} cost {cost} by v_tasks, the server charged {charged}")


def _most_at_once(spans: Iterable[tuple[int, int]]) -> int:
    """Return how many of these overlap at most; one that ends when another begins does not."""
    moments = sorted([(start, 1) for start, _ in spans] + [(end, -1) for _, end in spans])
    now = most = 0
    for _, by in moments:
        now += by
        most = max(most, now)
    return most


# -- broken on purpose ------------------------------------------------------------------------------


def _mark_forgotten() -> None:
    """That a result was taken up is not written, so the next start hands it out again."""

    def applied(self: TaskBoard, task: Any, tick_id: int, now_us: int) -> None:
        self.forget(task)

    TaskBoard.applied = applied  # type: ignore[method-assign]


def _start_before_commit() -> None:
    """Attempts begin when they are reserved, and a commit takes its time."""
    reserve, write = TaskBoard.reserve, Writer.write

    def reserve_and_start(self: TaskBoard, now_us: int) -> None:
        reserve(self, now_us)
        starting, self._to_start = self._to_start, []
        for running in starting:
            self.attempts.start(running)

    def write_slowly(self: Writer, *arguments: Any) -> None:
        time.sleep(0.03)
        write(self, *arguments)

    TaskBoard.reserve = reserve_and_start  # type: ignore[method-assign]
    Writer.write = write_slowly  # type: ignore[assignment]


def _results_dropped() -> None:
    """Every tenth result is marked as taken up and shown to nobody."""
    committed: Callable[..., None] = TaskBoard.committed

    def drop(self: TaskBoard, known_keys: dict[int, int]) -> None:
        for number in [number for number in self._fresh if number % 10 == 0]:
            self._fresh.remove(number)
            if number in self.live and number not in known_keys:
                self.applied(self.live[number], 0, self.clock.now_us())
        committed(self, known_keys)

    TaskBoard.committed = drop  # type: ignore[method-assign]


def _use_forgotten() -> None:
    """What was used of a limit is forgotten at each start."""

    def limit_uses(self: Reader, names: Sequence[str], now_us: int) -> dict[str, Any]:
        return dict.fromkeys(names, NO_USE)

    Reader.limit_uses = limit_uses  # type: ignore[method-assign]


def _interrupted_for_free() -> None:
    """At a start, what was reserved by attempts whose cost nobody knows is not counted as spent."""
    limit_uses = Reader.limit_uses

    def limit_uses_cheaply(self: Reader, names: Sequence[str], now_us: int) -> dict[str, Any]:
        uses: dict[str, Any] = limit_uses(self, names, now_us)
        for name, use in uses.items():
            costs = self.rows("SELECT cost_usd FROM task_attempts WHERE limit_name = :name", name=name)
            spent = sum((Decimal(row["cost_usd"] or 0) for row in costs), Decimal(0))
            uses[name] = replace(use, usd_today=str(spent))
        return uses

    Reader.limit_uses = limit_uses_cheaply  # type: ignore[method-assign]


def _freed_twice() -> None:
    """An attempt that ends makes room for two."""
    free = Limit.free

    def free_twice(self: Limit) -> None:
        free(self)
        free(self)

    Limit.free = free_twice  # type: ignore[method-assign]


BREAKAGES: dict[str, Callable[[], None]] = {
    "results handed out again": _mark_forgotten,
    "attempts begun before the commit": _start_before_commit,
    "results dropped": _results_dropped,
    "use of limits forgotten at a start": _use_forgotten,
    "room made twice": _freed_twice,
    "interrupted attempts for free": _interrupted_for_free,
}


def main(place: str, kills: str, seed: str, breakage: str) -> None:
    """Run one series and print it as JSON."""
    if breakage:
        BREAKAGES[breakage]()
    killer = Killer(Path(place), int(kills), int(seed), is_broken=bool(breakage))
    attempts = 0
    while killer.series.kills < int(kills) and not killer.series.found:
        killer.kill(attempts)
        attempts += 1
    if not (breakage and killer.series.found):
        killer.drain()
    print(json.dumps(killer.series.__dict__))


if __name__ == "__main__":
    main(*sys.argv[1:])

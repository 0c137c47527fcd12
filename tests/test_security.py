"""Whoever can write into the database, an event or an argument gets no code to run, no file and no secret."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from ael_store.cli.main import main
from ael_store.runtime.control import ControlServer
from tests.loops import agent, controller_on

ROOT = Path(__file__).parents[1]
PATIENCE_S = 60.0

AGENTS = """
from ael_store import AgentBase

class Writer(AgentBase):
    name = "writer"
    priority = 10

    def on_tick(self, context):
        context.set("number", context.iteration)
        context.emit("written", {"number": context.iteration})
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("AEL_")]:
        monkeypatch.delenv(name)
    (tmp_path / "agents.py").write_text(AGENTS)
    return tmp_path


@pytest.fixture(scope="session")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("security")
    (folder / "agents.py").write_text(AGENTS)
    done = ael("run", "agents.py", "--iterations", "20", "--tick-rate", "0", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "ael.db"


@pytest.fixture
def database(filled: Path, folder: Path) -> Path:
    return Path(shutil.copy(filled, folder / "ael.db"))


def ael(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `ael` as a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "ael_store", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        check=False,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )


def change(path: Path, script: str) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(script)


# -- no code from data -------------------------------------------------------------------------------


def test_running_loop_loads_no_job_store_that_pickles(folder: Path) -> None:
    code = (
        "import sys; from ael_store.cli.main import main; "
        "code = main(['run', 'agents.py', '--iterations', '2', '--tick-rate', '0.05', '--quiet']); "
        "print(code, [m for m in sys.modules if m.startswith('apscheduler.jobstores.')], 'yaml' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_S,
    )

    assert done.stdout == "0 ['apscheduler.jobstores.base', 'apscheduler.jobstores.memory'] False\n", done.stderr


HOSTILE = {
    "trigger on a table": "CREATE TRIGGER spy AFTER UPDATE ON state BEGIN UPDATE state SET value = '0'; END",
    "trigger on a table, in other letters": "CREATE TRIGGER spy BEFORE INSERT ON EVENTS BEGIN SELECT 1; END",
    "trigger on a view": "CREATE TRIGGER spy INSTEAD OF INSERT ON v_state BEGIN SELECT 1; END",
    "trigger on a table that follows ours": """
        CREATE TABLE mine (key_id INTEGER REFERENCES keys (id) ON DELETE CASCADE);
        CREATE TRIGGER spy AFTER DELETE ON mine BEGIN DELETE FROM state; END""",
    "view that lies": "DROP VIEW v_state; CREATE VIEW v_state AS SELECT 'number' AS key, '666' AS value",
    "view that never ends": """
        DROP VIEW v_runs; CREATE VIEW v_runs AS
        WITH RECURSIVE c(run_id) AS (SELECT 1 UNION ALL SELECT run_id + 1 FROM c) SELECT * FROM c""",
    "view that calls": "DROP VIEW v_agents; CREATE VIEW v_agents AS SELECT load_extension('evil') AS name",
    "view that is missing": "DROP VIEW v_events",
    "view instead of a table": "ALTER TABLE positions RENAME TO p; CREATE VIEW positions AS SELECT * FROM p",
    "virtual table": "DROP TABLE positions; CREATE VIRTUAL TABLE positions USING fts5(name, value)",
}


@pytest.mark.parametrize("script", HOSTILE.values(), ids=HOSTILE)
def test_database_with_foreign_code_is_refused_before_anything_is_written(
    database: Path, capsys: pytest.CaptureFixture[str], script: str
) -> None:
    change(database, script)
    before = database.read_bytes()

    codes = [
        main(["run", "agents.py", "--iterations", "1", "--quiet"]),
        main(["state", "set", "number", "1"]),
    ]

    printed = capsys.readouterr()
    assert codes == [65, 65]
    assert "nothing was changed" in printed.err
    assert "Traceback" not in printed.err
    assert database.read_bytes() == before
    assert main(["db", "check"]) != 0


@pytest.mark.parametrize("name", ["view that lies", "view that never ends", "view that calls"])
def test_commands_that_read_believe_no_foreign_view(
    database: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    change(database, HOSTILE[name])

    codes = [main(["status"]), main(["state", "list"]), main(["agents", "list"])]

    assert codes == [65, 65, 65]
    assert "not the one that ael_store made" in capsys.readouterr().err


def test_tables_views_and_triggers_of_the_user_are_nobody_elses_business(database: Path) -> None:
    change(
        database,
        """
        CREATE TABLE mine (a, b);
        CREATE VIEW of_mine AS SELECT key, value FROM v_state;
        CREATE TRIGGER keep AFTER INSERT ON mine BEGIN UPDATE mine SET b = 1; END;
        """,
    )

    assert main(["run", "agents.py", "--iterations", "1", "--quiet"]) == 0


@pytest.mark.parametrize(
    "script",
    [
        "CREATE INDEX spy ON state (load_extension(value))",
        "CREATE INDEX spy ON state (writefile('pwned', value))",
        "CREATE TABLE mine (a, b AS (readfile('/etc/passwd')))",
        "CREATE TABLE mine (a CHECK (edit(a)))",
        "CREATE VIEW mine AS SELECT fts3_tokenizer('simple', x'00')",
    ],
)
def test_functions_that_reach_outside_the_file_can_not_be_left_in_it(database: Path, folder: Path, script: str) -> None:
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("PRAGMA writable_schema = ON")
        kind, name = script.split()[1].lower(), script.split()[2]
        table = "state" if kind == "index" else name
        connection.execute("INSERT INTO sqlite_schema VALUES (?, ?, ?, 0, ?)", (kind, name, table, script))
        connection.commit()

    for arguments in (["run", "agents.py", "--iterations", "1", "--quiet"], ["status"], ["sql", "SELECT * FROM mine"]):
        assert main(arguments) in (0, 1, 65, 74)

    assert not (folder / "pwned").exists()


MUTATIONS = 12


def test_mutated_pages_end_in_an_answer_or_a_clear_error(database: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seed = random.randrange(1_000_000)
    source = random.Random(seed)
    whole = database.read_bytes()
    for number in range(MUTATIONS):
        raw = bytearray(whole)
        for _ in range(source.choice((1, 4, 64))):
            place = source.choice((source.randrange(len(raw)), source.randrange(4096), 100 + source.randrange(12)))
            length = source.choice((1, 2, 8, 200))
            raw[place : place + length] = source.randbytes(len(raw[place : place + length]))
        database.write_bytes(raw)
        for name in ("ael.db-wal", "ael.db-shm"):
            Path(name).unlink(missing_ok=True)
        began = time.monotonic()

        for arguments in (["status"], ["sql", "SELECT * FROM v_events"], ["state", "set", "a", "1"]):
            capsys.readouterr()
            code = main(arguments)
            printed = capsys.readouterr()
            where = f"seed {seed}, file {number}, {arguments}: {code} {printed.err}"
            assert code in (0, 1, 65, 74, 75, 78), where
            assert "Traceback" not in printed.err and "internal error" not in printed.err, where
        assert time.monotonic() - began < PATIENCE_S


# -- `ael sql` ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT zeroblob(900000000)",
        "SELECT length(randomblob(900000000))",
        "SELECT hex(zeroblob(60000000))",
        "SELECT group_concat(hex(zeroblob(8000000))) FROM v_ticks",
        "SELECT replace(printf('%.*c', 50000, 'x'), 'x', printf('%.*c', 50000, 'y'))",
    ],
)
def test_value_that_would_fill_the_memory_is_refused(
    database: Path, capsys: pytest.CaptureFixture[str], statement: str
) -> None:
    assert main(["sql", statement]) == 1
    assert "too big" in capsys.readouterr().err


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT count(*) FROM v_events a, v_events b, v_events c, v_events d, v_events e, v_events f, v_events g",
        "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT max(x) FROM c",
        "SELECT printf('%.*c', 2000000000, 'x')",  # one instruction, which SQLite can't interrupt
    ],
)
def test_statement_can_not_run_longer_than_its_limit(database: Path, statement: str) -> None:
    done = ael("sql", statement, "--timeout", "0.2")

    assert done.returncode == 1
    assert done.stderr == "ael: the statement took longer than 0.2 s and was ended; --timeout allows more\n"


# -- files -------------------------------------------------------------------------------------------


def test_every_file_beside_the_database_is_private_whatever_the_umask(folder: Path) -> None:
    place = folder / "private"
    place.mkdir(mode=0o755)
    process = subprocess.Popen(
        [sys.executable, "-m", "ael_store", "run", "../agents.py", "--tick-rate", "0.01", "--quiet"],
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        umask=0,
    )
    try:
        give_up = time.monotonic() + PATIENCE_S
        while not (place / "ael.db.sock").exists():
            assert time.monotonic() < give_up and process.poll() is None
            time.sleep(0.01)
        before = os.umask(0)
        try:
            assert main(["db", "backup", str(place / "backup.db"), "--db", str(place / "ael.db")]) == 0
        finally:
            os.umask(before)
        modes = {file.name: stat.S_IMODE(file.lstat().st_mode) for file in place.iterdir() if file.is_file()}
        modes["ael.db.sock"] = stat.S_IMODE((place / "ael.db.sock").lstat().st_mode)
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 0

    assert {"ael.db", "ael.db-wal", "ael.db-shm", "ael.db.lock", "ael.db.sock", "backup.db"} <= set(modes)
    assert {name: oct(mode) for name, mode in modes.items() if mode & 0o077} == {}


def test_key_never_becomes_a_path(database: Path, folder: Path) -> None:
    before = set(folder.rglob("*"))

    for key in ("../../evil", "/tmp/../evil", "file:evil?mode=rwc", "evil.db"):
        assert main(["state", "set", key, "1"]) == 0
        assert main(["state", "get", key]) == 0

    assert {path.name for path in set(folder.rglob("*")) - before} <= {"ael.db-wal", "ael.db-shm", "ael.db.lock"}


# -- secrets and the log -----------------------------------------------------------------------------

CANARY = "canary-7f3a91"

LEAKY = """
from dataclasses import dataclass
from ael_store import AgentBase
import logging

class Leaky(AgentBase):
    priority = 10

    @dataclass
    class Config:
        token: str

    def on_tick(self, context):
        logging.getLogger("mine").warning("token %s in %r", self.config.token, self.config)
        try:
            context.set("token", self.config.token)
        except TypeError as error:
            logging.getLogger("mine").warning("%s", error)
        raise ValueError(f"bad token {self.config.token} of {self.config}")
"""


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_secret_appears_nowhere(
    folder: Path, log_format: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "leaky.py").write_text(LEAKY)
    (folder / "ael.toml").write_text(
        '[agents.leaky]\nclass = "leaky:Leaky"\nconfig = { token = { secret = "API_TOKEN" } }\n'
    )
    environment = {"API_TOKEN": CANARY, "AEL_LOG_LEVEL": "DEBUG", "AEL_LOG_FORMAT": log_format}

    done = ael("--debug", "run", "leaky.py", "--iterations", "3", "--tick-rate", "0", cwd=folder, **environment)
    assert done.returncode == 0, done.stderr
    printed = [done.stdout + done.stderr]
    monkeypatch.setenv("API_TOKEN", CANARY)
    for arguments in (
        ["status", "--json"],
        ["agents", "show", "leaky"],
        ["agents", "list", "--json"],
        ["events", "list", "--json"],
        ["state", "list", "--json"],
        ["sql", "SELECT * FROM tick_errors", "--json"],
    ):
        assert main(["--debug", *arguments]) == 0
        printed.append("".join(capsys.readouterr()))

    assert "bad token Secret('API_TOKEN', ******)" in printed[-1]
    assert not [text for text in printed if CANARY in text]
    assert not [file for file in folder.glob("ael.db*") if CANARY.encode() in file.read_bytes()]


FORGER = """
from ael_store import AgentBase

EVIL = "x\\n2026-01-01T00:00:00Z [error    ] forged\\r\\x1b[2J\\u2028\\u202e\\x85{\\"event\\": \\"forged\\"}"

class Forger(AgentBase):
    name = "forger"
    priority = 10
    subscriptions = ["work"]

    def on_tick(self, context):
        context.emit("work", EVIL.replace("\\0", ""))
        context.set("text", EVIL)
        for key, value in ((EVIL, 1), ("a", {EVIL: object()}), ("a", "b\\ud800")):
            try:
                context.set(key, value)
            except (TypeError, ValueError) as error:
                self.seen = str(error)
        raise type("Evil\\nError", (Exception,), {})(EVIL)

    def on_event(self, event, context):
        raise ValueError(event.data)
"""


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_payload_forges_no_line_of_the_log(folder: Path, log_format: str) -> None:
    (folder / "forger.py").write_text(FORGER)

    done = ael(
        "run",
        "forger.py",
        "--iterations",
        "2",
        "--tick-rate",
        "0",
        cwd=folder,
        AEL_LOG_FORMAT=log_format,
        AEL_LOG_LEVEL="DEBUG",
    )

    assert done.returncode == 0, done.stderr
    lines = done.stderr.split("\n")
    assert any("forged" in line for line in lines)
    assert all(line.isprintable() for line in lines)
    if log_format == "json":
        records = [json.loads(line) for line in lines if line]
        assert all(record["event"] != "forged" for record in records)
    else:
        assert not [line for line in lines if line.startswith("2026-01-01")]


async def test_loops_that_start_together_leave_the_umask_of_the_process_alone(tmp_path: Path) -> None:
    host = controller_on(tmp_path / "ael.db", agent("a"))._host
    servers = [ControlServer(tmp_path / f"{number}.db", host) for number in range(3)]
    before = os.umask(0o022)
    try:
        await asyncio.gather(*(server.start() for server in servers))
    finally:
        left = os.umask(before)

    modes = {stat.S_IMODE(path.lstat().st_mode) for path in tmp_path.glob("*.sock")}
    for server in servers:
        await server.stop()
    assert oct(left) == oct(0o022)
    assert modes == {0o600}

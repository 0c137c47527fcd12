"""`ael run` as real processes: begin, be killed, go on; and everything that is wrong before it begins."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ael_store.cli import run as run_module
from ael_store.cli.app import make_app
from ael_store.cli.run import FLAGS, read_plain_arguments
from ael_store.settings import RULES
from ael_store.store.upgrade import downgrade
from tests.cli.conftest import PATIENCE_S, ROOT, Ael, Start, until
from tests.loops import rows


def test_run_that_is_killed_goes_on_where_it_was(ael: Ael, counter: str, start: Start, tmp_path: Path) -> None:
    first = start("run", counter, "--tick-rate", "0.01")
    first.wait_for("ael.db, new")
    until(lambda: (tmp_path / "ael.db").exists() and ael("state", "get", "count").code == 0)
    assert first.stop(signal.SIGKILL) == -signal.SIGKILL

    status = ael("status", "--json").json
    assert (status["status"], status["running"], status["pid"]) == ("crashed", False, None)
    reached = status["iteration"]
    assert f"pid {first.process.pid}" in ael("status").out

    second = start("run", counter, "--tick-rate", "0.01", "--iterations", "3")
    second.wait_for(f"resumed at iteration {reached} after a crash")
    assert second.wait() == 0

    assert rows("ael.db", "SELECT iteration FROM v_iterations ORDER BY 1") == list(range(1, reached + 4))
    assert rows("ael.db", "SELECT status FROM v_runs ORDER BY run_id") == ["crashed", "stopped"]
    assert ael("state", "get", "count").out == f"{reached + 3}\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_stops_gracefully(counter: str, start: Start, number: signal.Signals) -> None:
    run = start("run", counter, "--tick-rate", "60")
    run.wait_for("iteration 1 ")

    assert run.stop(number) == 0
    assert f"{number.name}: stopping" in run.text
    assert "stopped at iteration" in run.text
    assert rows("ael.db", "SELECT status FROM v_runs") == ["stopped"]


def test_second_loop_is_refused_at_once_and_named(counter: str, start: Start) -> None:
    first = start("run", counter)
    first.wait_for("iteration 1 ")

    second = start("run", counter)
    second.wait_for(f"is owned by pid {first.process.pid} on ")
    assert second.wait() == 75
    assert not [line for line in second.lines if "Traceback" in line]


def test_output_that_is_no_terminal_is_json_lines_that_tell_what_happened(counter: str, start: Start) -> None:
    run = start("run", counter, "--tick-rate", "0", "--iterations", "500")
    assert run.wait() == 0

    records = [json.loads(line) for line in run.lines]
    assert {"timestamp", "level", "logger", "event"} <= set(records[0])
    progress = [record for record in records if record["logger"] == "ael_store.progress"]
    assert progress[0]["event"].startswith("iteration 1 · 1 tick · 1 change")
    assert sum(record["iterations"] for record in progress) == 500
    assert len(progress) < 20


@pytest.mark.parametrize(("option", "lines"), [("--quiet", 0), ("--verbose", 1)])
def test_progress_can_be_less_and_more(run_here: Ael, tmp_path: Path, option: str, lines: int) -> None:
    (tmp_path / "idle.py").write_text("from ael_store import AgentBase\nclass Idle(AgentBase):\n    name = 'idle'\n")

    done = run_here("idle.py", "--iterations", "1", option)

    assert done.code == 0
    assert done.err.count("iteration 1 · ") == lines


def test_json_prints_a_line_for_each_iteration_on_stdout(run_here: Ael, counter: str) -> None:
    done = run_here(counter, "--iterations", "2", "--tick-rate", "0", "--json")

    lines = [json.loads(line) for line in done.out.splitlines()]
    assert [(line["iteration"], line["ticks"], line["changes"]) for line in lines] == [(1, 1, 1), (2, 1, 1)]


def test_reader_that_has_seen_enough_stops_the_loop(counter: str) -> None:
    command = f"set -o pipefail; {sys.executable} -m ael_store run {counter} --tick-rate 0.01 --json | head -2"

    done = subprocess.run(
        ["bash", "-c", command],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_S,
    )

    assert (done.returncode, done.stdout.count("\n")) == (0, 2)
    assert "Traceback" not in done.stderr
    assert rows("ael.db", "SELECT status FROM v_runs") == ["stopped"]


def test_tables_of_the_settings_file_make_agents(run_here: Ael, ael: Ael, counter: str, tmp_path: Path) -> None:
    (tmp_path / "ael.toml").write_text('tick_rate = 0\n[agents.upstairs]\nclass = "Counter"\n')

    assert run_here(counter, "--iterations", "1").code == 0

    assert [row["name"] for row in ael("agents", "list", "--json").json] == ["upstairs"]


def test_module_and_attribute_are_targets_too(run_here: Ael, ael: Ael, counter: str) -> None:
    assert run_here("agents:Counter", "--iterations", "1").code == 0

    assert [row["name"] for row in ael("agents", "list", "--json").json] == ["counter"]


def test_context_and_bus_of_the_process_belong_to_the_hook_that_runs(run_here: Ael, ael: Ael, tmp_path: Path) -> None:
    (tmp_path / "agents.py").write_text(
        "from ael_store import AgentBase, get_event_bus, get_state_context\n"
        "class Caller(AgentBase):\n"
        "    name = 'caller'\n"
        "    priority = 10\n"
        "    async def on_start(self, context):\n"
        "        get_event_bus().subscribe('called', self.name, self.answer)\n"
        "    async def on_tick(self, context):\n"
        "        get_state_context().set('asked', context.iteration)\n"
        "        get_event_bus().emit('called', self.name)\n"
        "    def answer(self, event):\n"
        "        get_state_context().set('answered', event.type)\n"
    )

    assert run_here("agents.py", "--iterations", "2", "--tick-rate", "0").code == 0

    assert ael("state", "list", "--json").json == {"asked": 2, "answered": "called"}


def test_private_database_leaves_nothing(run_here: Ael, counter: str, tmp_path: Path) -> None:
    done = run_here(counter, "--iterations", "1", "--db", ":memory:")

    assert done.code == 0
    assert "a private temporary file" in done.err
    assert not list(tmp_path.glob("*.db*"))


@pytest.mark.parametrize("options", [["--upgrade", "auto"], ["--upgrade", "never"]], ids=" ".join)
def test_old_schema_is_upgraded_unless_that_is_forbidden(
    run_here: Ael, counter: str, database: Path, tmp_path: Path, options: list[str]
) -> None:
    downgrade(database, "0001", backup=False)

    done = run_here(counter, "--iterations", "1", *options)

    forbidden = "never" in options
    assert done.code == (78 if forbidden else 0)
    assert ("run `ael db upgrade`" in done.err) == forbidden
    assert rows(database, "SELECT version_num FROM alembic_version") == ["0001" if forbidden else "0008"]
    assert len(list(tmp_path.glob("*.bak-0001-*"))) == (0 if forbidden else 1)


@pytest.mark.parametrize("upgrade", ["auto", "never"])
def test_newer_schema_is_refused(run_here: Ael, counter: str, database: Path, upgrade: str) -> None:
    with sqlite3.connect(database) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.close()

    done = run_here(counter, "--upgrade", upgrade)

    assert done.code == 78
    assert "was written by a newer ael_store" in done.err


# -- on a terminal ----------------------------------------------------------------------------------


def run_on_terminal(*arguments: str) -> tuple[int, str]:
    """Run `ael` on a terminal of its own and return its exit code and all that it wrote there."""
    ours, theirs = pty.openpty()
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "80"}
    environ.pop("NO_COLOR", None)
    command = [sys.executable, "-m", "ael_store", *arguments]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environ) as process:
        os.close(theirs)
        written = b""
        while True:
            try:
                more = os.read(ours, 65536)
            except OSError:  # Linux says so when the other end is closed
                break
            if not more:
                break
            written += more
    os.close(ours)
    return process.returncode, written.decode()


def screen(written: str) -> list[str]:
    """Return the lines that are left on a screen: what was erased is gone."""
    lines = [line.rsplit("\r\x1b[2K", 1)[-1] for line in written.replace("\r\n", "\n").split("\n")]
    return [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in lines]


def test_terminal_has_a_live_line_that_leaves_what_agents_print(tmp_path: Path) -> None:
    (tmp_path / "talk.py").write_text(
        "import logging, sys\n"
        "from ael_store import AgentBase\n"
        "class Talker(AgentBase):\n"
        "    name = 'talker'\n"
        "    priority = 10\n"
        "    def on_tick(self, context):\n"
        "        context.set('n', context.iteration)\n"
        "        print('said', end=' ')\n"
        "        print(context.iteration)\n"
        "        logging.getLogger('mine').warning('logged %d', context.iteration)\n"
    )

    code, written = run_on_terminal("run", "talk.py", "--iterations", "3", "--tick-rate", "0.01")

    assert code == 0
    assert "iteration 2 · 1 tick · 1 change · " in written
    left = screen(written)
    assert [line for line in left if line.startswith("said")] == ["said 1", "said 2", "said 3"]
    assert len([line for line in left if "logged" in line]) == 3
    assert not [line for line in left if line.startswith("iteration")]
    assert "{" not in written


# -- wrong before it begins -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nofile.py"], "there is no file nofile.py"),
        (["no_module"], "No module named 'no_module'"),
        (["broken.py"], "broken.py can't be imported: ZeroDivisionError: division by zero"),
        (["exits.py"], "exits.py can't be imported: SystemExit: 3"),
        (["empty.py"], "empty.py holds no agents"),
        (["agents.py:nothing"], "has no attribute 'nothing'"),
        (["agents.py", "--iterations", "0"], "--iterations is '0'; wanted is a whole number from 1"),
        (["agents.py", "--iterations", "many"], "--iterations is 'many'"),
        (["agents.py", "--tick-rate", "-1"], "setting tick_rate is -1.0 (flag --tick-rate); wanted is a number, 0 to"),
        (["agents.py", "--tick-rate", "nan"], "setting tick_rate is nan"),
        (["agents.py", "--tick-rate", "fast"], "setting tick_rate is 'fast'"),
        (["agents.py", "--strategy", "fastest"], "'priority', 'round_robin', 'load_aware'"),
        (["agents.py", "--max-agents", "0"], "setting max_agents is 0"),
        (["agents.py", "--durability", "none"], "wanted is one of 'full', 'normal'"),
        (["agents.py", "--timezone", "Mars/Base"], "IANA time zone"),
        (["agents.py", "--db", "postgresql://x/y"], "names postgresql; this version stores in SQLite"),
        (["twice.py"], "two agents are named 'same'"),
        (["priority.py"], "priority"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_what_is_wrong_is_said_and_nothing_is_made(
    run_here: Ael, counter: str, tmp_path: Path, arguments: list[str], message: str
) -> None:
    header = "from ael_store import AgentBase\n"
    for name, text in {
        "broken.py": "1 / 0",
        "exits.py": "import sys; sys.exit(3)",
        "empty.py": "x = 1",
        "twice.py": f"{header}class A(AgentBase):\n    name = 'same'\nagents = [A(), A()]",
        "priority.py": f"{header}class A(AgentBase):\n    name = 'a'\n    priority = 11",
    }.items():
        (tmp_path / name).write_text(text)

    done = run_here(*arguments)

    assert done.code == 2, done.err
    assert done.err.startswith("ael: ")
    assert message in done.err
    assert "Traceback" not in done.err
    assert not list(tmp_path.glob("*.db*"))


@pytest.mark.parametrize(
    ("db", "code", "message"),
    [
        ("none/ael.db", 74, "none is no folder"),
        (".", 74, "is a folder"),
        ("agents.py", 65, "is not a SQLite database"),
    ],
)
def test_database_that_can_not_be_used_is_said(run_here: Ael, counter: str, db: str, code: int, message: str) -> None:
    done = run_here(counter, "--db", db)

    assert done.code == code, done.err
    assert message in done.err


def test_folder_that_can_not_be_written_is_said(run_here: Ael, counter: str, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    folder = closed if os.geteuid() != 0 else Path("/sys")  # where even root may make no file

    done = run_here(counter, "--db", str(folder / "ael.db"))

    assert done.code == 74
    assert f"{folder}/ael.db.lock can't be created" in done.err


# -- the two ways of reading arguments --------------------------------------------------------------


TEXTS = [name for name in FLAGS if RULES[name].kind != "bool"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "a.py"],
        ["run", "a.py", "--iterations", "3", "--tick-rate=0.5", "--db", "x.db"],
        ["run", "--tick-rate", "-1", "a.py", "--json", "--debug", "--quiet", "--verbose"],
        ["run", "a.py", "--no-backup"],
        ["run", "a.py", "--backup", "--no-backup", "--backup"],
        ["run", "a.py", "--db=", "--log-level", "debug", "--log-level", "ERROR"],
        ["run", "run"],
        ["--db", "run", "--json", "run", "a.py"],
        ["--db", "x.db", "run", "a.py", "--db", "y.db"],
        ["run", "a.py", *(word for name in TEXTS for word in (f"--{name.replace('_', '-')}", "1"))],
    ],
    ids=lambda arguments: " ".join(arguments)[:40],
)
def test_plain_arguments_mean_what_typer_reads(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, dict[str, Any]]] = []
    monkeypatch.setattr(run_module, "run", lambda call, **options: calls.append((call, options)))
    from typer.main import get_command

    plain = read_plain_arguments(arguments)
    get_command(make_app()).main(arguments, prog_name="ael", standalone_mode=False)

    assert plain is not None
    [(call, options)] = calls
    assert plain[0] == call
    given = {"target": plain[1], **plain[2]}
    assert {name: given.get(name, False if options[name] is False else None) for name in options} == options


@pytest.mark.parametrize(
    "arguments",
    [
        ["run"],
        ["run", "--help"],
        ["run", "a.py", "b.py"],
        ["run", "a.py", "--tick-rate"],
        ["run", "a.py", "--nonsense"],
        ["run", "a.py", "--json=1"],
        ["run", "-x"],
        ["--tick-rate", "1", "run", "a.py"],
        ["a.py", "run"],
        ["state", "get", "run"],
        ["status"],
        [],
    ],
    ids=" ".join,
)
def test_odd_arguments_are_left_to_typer(arguments: list[str]) -> None:
    assert read_plain_arguments(arguments) is None


def test_each_setting_is_a_flag(ael: Ael) -> None:
    done = ael("run", "--help")

    assert done.code == 0
    assert not [name for name in FLAGS if f"--{name.replace('_', '-')}" not in done.out]


# -- what it costs ----------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_running_loop_with_ten_agents_stays_below_60_mb(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ten.py").write_text(
        "import re, sys\n"
        "from ael_store import AgentBase\n"
        "class Busy(AgentBase):\n"
        "    priority = 10\n"
        "    def on_tick(self, context):\n"
        "        context.set(self.name, context.iteration)\n"
        "        context.emit('done', {'by': self.name})\n"
        "    def on_shutdown(self, context):\n"
        "        context.set('rss', int(re.search(r'VmRSS:\\s+(\\d+)', open('/proc/self/status').read())[1]))\n"
        "        context.set('heavy', [m for m in ('typer', 'rich', 'pydantic', 'alembic') if m in sys.modules])\n"
        "agents = [Busy(f'busy{n}') for n in range(10)]\n"
    )

    # As installed, whatever the environment of the tests: with the bytecode that the first start leaves.
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    monkeypatch.setenv("PYTHONPYCACHEPREFIX", str(tmp_path / "bytecode"))
    assert start("run", "ten.py", "--db", "first.db", "--iterations", "1").wait() == 0
    assert start("run", "ten.py", "--tick-rate", "0", "--iterations", "200").wait() == 0

    assert rows("ael.db", "SELECT value FROM v_state WHERE key = 'heavy'") == ["[]"]
    [resident_kb] = rows("ael.db", "SELECT value FROM v_state WHERE key = 'rss'")
    assert int(resident_kb) * 1024 < 60_000_000

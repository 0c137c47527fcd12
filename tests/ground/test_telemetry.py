"""Log lines: one a record, never forged, in the form that was asked for; and nothing before it is asked for."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import structlog

from ael_store import telemetry
from ael_store.telemetry import configure_logging, printable, printable_json

log = logging.getLogger("ael_store.test")


class Stream(io.StringIO):
    """A stderr that is a terminal or not."""

    terminal = False

    def isatty(self) -> bool:
        return self.terminal


Stderr = Callable[..., Stream]


@pytest.fixture
def stderr(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stderr]:
    """Give stderr another stream from the moment this is called: pytest puts its own there before each test."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level

    def replace(*, terminal: bool = False) -> Stream:
        stream = Stream()
        stream.terminal = terminal
        monkeypatch.setattr(sys, "stderr", stream)
        return stream

    yield replace
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


def records(stream: Stream) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_json_lines_where_there_is_no_terminal(stderr: Stderr) -> None:
    stream = stderr()
    configure_logging()

    log.info("resumed at %d", 413, extra={"iteration": 413})
    log.debug("too small")

    [record] = records(stream)
    assert list(record) == ["timestamp", "level", "logger", "event", "iteration"]
    assert str(record.pop("timestamp")).endswith("Z")
    assert record == {"level": "info", "logger": "ael_store.test", "event": "resumed at 413", "iteration": 413}


def test_console_on_a_terminal(stderr: Stderr) -> None:
    stream = stderr(terminal=True)
    configure_logging("DEBUG")

    log.debug("small")

    assert "small" in stream.getvalue()
    assert "\x1b[" in stream.getvalue()


def test_console_without_colours(stderr: Stderr, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = stderr()
    monkeypatch.setenv("NO_COLOR", "1")
    stream = stderr(terminal=True)
    configure_logging()

    log.info("plain", extra={"n": 1})

    assert stream.getvalue().endswith("Z [info     ] plain [ael_store.test] n=1\n")


@pytest.mark.parametrize("form", ["console", "json"])
def test_no_message_forges_a_line_or_reaches_the_terminal(stderr: Stderr, form: str) -> None:
    stream = stderr()
    configure_logging(format=form)
    hostile = "x\n2026-01-01T00:00:00Z [info] forged \x1b[2J\x9b2J\u2028\x85"

    log.warning("agent %s failed", hostile, extra={"more": hostile, "odd": object()})

    assert stream.getvalue().count("\n") == 1
    assert stream.getvalue().rstrip("\n").isprintable()


def test_lines_of_a_traceback_are_indented(stderr: Stderr) -> None:
    stream = stderr()
    configure_logging(format="console")

    try:
        raise ValueError("x\n2026-01-01T00:00:00Z [info] forged")
    except ValueError:
        log.exception("failed")

    first, *rest = stream.getvalue().splitlines()
    assert "failed" in first
    assert rest
    assert all(line.startswith("    ") for line in rest)


def test_what_json_has_no_word_for_is_still_logged() -> None:
    line = telemetry._to_json({"event": "lone \ud800", "large": 2**70, "set": {1}})

    assert json.loads(line) == {"event": "lone \ud800", "large": 2**70, "set": "{1}"}


def test_structlog_of_an_agent_looks_the_same(stderr: Stderr) -> None:
    stream = stderr()
    configure_logging(format="json")

    structlog.get_logger("mine").info("moved", metres=3)

    [record] = records(stream)
    assert {**record, "timestamp": ""} == {
        "timestamp": "",
        "level": "info",
        "logger": "mine",
        "event": "moved",
        "metres": 3,
    }


def test_configuration_of_a_user_is_left_alone(stderr: Stderr) -> None:
    stream = stderr()
    mine = logging.StreamHandler(io.StringIO())
    logging.getLogger().addHandler(mine)
    structlog.configure(processors=[])

    configure_logging(format="json")
    configure_logging(format="json")

    log.info("once")
    assert mine.stream.getvalue() == "once\n"
    assert len(records(stream)) == 1
    assert structlog.get_config()["processors"] == []


def test_libraries_tell_only_what_matters(stderr: Stderr) -> None:
    stream = stderr()
    configure_logging("DEBUG", "json")

    logging.getLogger("apscheduler.scheduler").info("added job")
    logging.getLogger("aiosqlite").debug("executing")

    assert records(stream) == []


def test_importing_configures_nothing_and_loads_no_structlog() -> None:
    code = (
        "import sys, logging, ael_store.telemetry, ael_store.runtime.controller; "
        "print('structlog' in sys.modules, logging.getLogger().handlers)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout == "False []\n"


def test_configuring_loads_no_rich() -> None:
    code = (
        "import sys; from ael_store.telemetry import configure_logging; configure_logging(); "
        "print('rich' in sys.modules); import rich; print(rich is not None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout == "False\nTrue\n"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ü 😀 text", "plain ü 😀 text"),
        ("a\x1b[31m\n\t\x7f", "a\\x1b[31m\\n\\t\\x7f"),
        ("\x9b\u202e\ud800\xa0", "\\x9b\\u202e\\ud800\\xa0"),
    ],
)
def test_printable(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert json.loads(printable_json(json.dumps(text, ensure_ascii=False))) == text


# -- the journal ------------------------------------------------------------------------------------

IN_JOURNAL = """
import logging, os, sys
status = os.fstat(2)
os.environ["JOURNAL_STREAM"] = f"{status.st_dev}:{status.st_ino + int(sys.argv[2])}"
from ael_store.telemetry import configure_logging
configure_logging("DEBUG", sys.argv[1])
log = logging.getLogger("ael_store.test")
log.info("one\\nline")
log.debug("quiet")
try:
    1 / 0
except ZeroDivisionError:
    log.exception("failed")
"""


def journal_lines(form: str, other: int = 0) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", IN_JOURNAL, form, str(other)], capture_output=True, text=True, check=True
    )
    return done.stderr.splitlines()


def test_journal_gets_priorities_and_neither_time_nor_level() -> None:
    lines = journal_lines("auto")

    assert lines[0].rstrip() == "<6>one\\nline [ael_store.test]"
    assert lines[1].startswith("<7>quiet")
    assert lines[2].startswith("<3>failed")
    assert all(line.startswith("<3>") for line in lines[2:])
    assert lines[-1] == "<3>    ZeroDivisionError: division by zero"


def test_json_in_the_journal_has_a_priority_before_it() -> None:
    first = journal_lines("json")[0]

    assert first.startswith("<6>")
    assert json.loads(first[3:]) == {"level": "info", "logger": "ael_store.test", "event": "one\nline"}


def test_stderr_that_is_not_the_journal_is_as_everywhere() -> None:
    """A child of a service whose output goes somewhere else has the variable too."""
    assert set(json.loads(journal_lines("auto", other=1)[0])) == {"timestamp", "level", "logger", "event"}

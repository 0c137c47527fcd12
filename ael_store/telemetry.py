"""Log lines: structlog as the formatter of the standard `logging`, set up by `ael run` and by nobody else.

The library itself only calls `logging.getLogger("ael_store.…")`, so whoever embeds a loop gets its records in
handlers of their own and nothing is configured on import. `configure_logging` adds one handler to the root
logger; handlers that are there already stay. Agents may log with `logging` or with structlog, it looks the same.

Whatever a message holds, it can't look like another log line or reach the terminal as a control sequence.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Iterator, MutableMapping
from typing import Any, TextIO

__all__ = ["configure_logging", "printable", "printable_json"]

QUIETER = {
    "aiosqlite": logging.WARNING,
    "alembic": logging.WARNING,
    "apscheduler": logging.WARNING,
    "sqlalchemy": logging.WARNING,
    "asyncio": logging.INFO,
}
"""Libraries whose lower levels tell only how they work inside."""

OWN_NAME = "ael-stderr"


def printable(text: str, keep: str = "") -> str:
    """Return a text with everything that a terminal would act on escaped as in Python (`\\x1b`, `\\n`).

    Characters in `keep` stay as they are.
    """
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() or character in keep else character.encode("unicode_escape").decode()
        for character in text
    )


def printable_json(text: str, keep: str = "") -> str:
    """Return JSON text that means the same, with everything that a terminal would act on escaped as in JSON."""
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() or character in keep else json.dumps(character)[1:-1] for character in text
    )


def configure_logging(level: str = "INFO", format: str = "auto") -> None:
    """Write log records of `level` and above to stderr, one line each; a second call replaces the first.

    `format` is `console`, `json`, or `auto`: console where stderr is a terminal or the journal of systemd, else json.
    The journal has the time of each line itself, and gets its level as the prefix that it understands (`<4>`).
    """
    with _hidden("rich"):
        import structlog
    from structlog.stdlib import ExtraAdder, ProcessorFormatter

    terminal, journal = sys.stderr.isatty(), _is_journal(sys.stderr)
    as_json = format == "json" or (format == "auto" and not (terminal or journal))
    first: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        *([] if journal else [structlog.processors.TimeStamper(fmt="iso", utc=True)]),
        structlog.processors.StackInfoRenderer(),
    ]
    last: list[Any] = [ProcessorFormatter.remove_processors_meta, structlog.processors.format_exc_info]
    if as_json:
        last += [_in_order, structlog.processors.JSONRenderer(serializer=_to_json)]
    else:
        colors = terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        last += [
            *([_without_level] if journal else []),
            _escaped,
            structlog.dev.ConsoleRenderer(
                colors=colors, pad_event_to=0, exception_formatter=structlog.dev.plain_traceback
            ),
        ]
    handler = _JournalHandler() if journal else _StderrHandler()
    handler.set_name(OWN_NAME)
    handler.setFormatter(ProcessorFormatter(processors=last, foreign_pre_chain=[*first, ExtraAdder(), _without_traces]))

    root = logging.getLogger()
    for other in list(root.handlers):
        if other.get_name() == OWN_NAME:
            root.removeHandler(other)
    root.addHandler(handler)
    root.setLevel(level)
    for name, least in QUIETER.items():
        logging.getLogger(name).setLevel(max(least, root.level))
    if not structlog.is_configured():
        structlog.configure(
            processors=[
                structlog.stdlib.filter_by_level,
                *first,
                structlog.stdlib.PositionalArgumentsFormatter(),
                ProcessorFormatter.wrap_for_formatter,
            ],
            logger_factory=structlog.stdlib.LoggerFactory(),
            wrapper_class=structlog.stdlib.BoundLogger,
            cache_logger_on_first_use=True,
        )


@contextlib.contextmanager
def _hidden(module: str) -> Iterator[None]:
    """Let a library that could use a module believe that there is none; here it would cost 2.5 MB for nothing."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[module]


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to what `sys.stderr` is at the moment: the live line of `ael run` puts itself there."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


def _is_journal(stream: TextIO) -> bool:
    """Say whether a stream leads to the journal of systemd, which names it by device and inode."""
    named = os.environ.get("JOURNAL_STREAM", "")
    if not named:
        return False
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError, AttributeError):
        return False
    return named == f"{status.st_dev}:{status.st_ino}"


PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))
"""Levels and what syslog calls them; what is below is 7."""


class _JournalHandler(_StderrHandler):
    """Begins each line with its priority: the journal takes the lines of a traceback as entries of their own."""

    def format(self, record: logging.LogRecord) -> str:
        priority = next((number for level, number in PRIORITIES if record.levelno >= level), 7)
        return "\n".join(f"<{priority}>{line}" for line in super().format(record).split("\n"))


# -- processors of structlog ------------------------------------------------------------------------

EventDict = MutableMapping[str, Any]


def _without_traces(_logger: Any, _method: str, fields: EventDict) -> EventDict:
    """Drop what the formatters of other handlers leave in a record; an `extra` can't have these names."""
    fields.pop("message", None)
    fields.pop("asctime", None)
    return fields


def _without_level(_logger: Any, _method: str, fields: EventDict) -> EventDict:
    """Drop what the priority of the line says."""
    fields.pop("level", None)
    return fields


FIRST_KEYS = ("timestamp", "level", "logger", "event")


def _in_order(_logger: Any, _method: str, fields: EventDict) -> EventDict:
    """Put what every line has first."""
    return {**{key: fields[key] for key in FIRST_KEYS if key in fields}, **fields}


def _to_json(fields: Any, **_options: Any) -> str:
    """Return JSON text in one line; what JSON has no word for becomes its `repr`."""
    import orjson

    try:
        return printable_json(orjson.dumps(fields, default=repr, option=orjson.OPT_NON_STR_KEYS).decode())
    except (TypeError, ValueError):  # lone surrogates, integers beyond 64 bits
        return json.dumps(fields, default=repr)


def _escaped(_logger: Any, _method: str, fields: EventDict) -> EventDict:
    """Escape every text; a traceback keeps its lines, indented, so that none looks like a line of the log."""
    for key, value in list(fields.items()):
        if key in ("exception", "stack"):
            fields[key] = "\n".join(f"    {printable(line)}" for line in str(value).splitlines())
        elif not isinstance(value, bool | int | float | None):
            fields[key] = printable(value if isinstance(value, str) else repr(value))
        if not key.isprintable():
            fields[printable(key)] = fields.pop(key)
    return fields

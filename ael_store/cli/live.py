"""What a person sees of a running loop: one line that is always the last iteration, or now and then a line.

On a terminal `LiveLine` keeps a line at the bottom; log lines and what agents print go above it. Elsewhere
`Digest` logs what happened, a line a second at most. Neither uses rich: it would stay in memory for months.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TextIO, cast
from unicodedata import east_asian_width

from ael_store.telemetry import printable

if TYPE_CHECKING:
    from ael_store.runtime.measure import IterationSummary

__all__ = ["Digest", "LiveLine", "has_live_line"]

log = logging.getLogger("ael_store.progress")

REDRAW_S = 0.1
LOG_S = 1.0


def describe(summaries: list[IterationSummary], *, always_ticks: bool) -> str:
    """Return iterations in words: what they did, and only what there is to say."""
    first, last = summaries[0], summaries[-1]
    errors = sum(summary.errors for summary in summaries)
    failed = sorted({name for summary in summaries for name in summary.failed})
    ticks = sum(summary.ticks for summary in summaries)
    run_ms = 1000 * max(summary.run_s for summary in summaries)
    commit_ms = 1000 * max(summary.commit_s for summary in summaries)
    parts = [
        f"iteration {last.iteration}" if first is last else f"iterations {first.iteration} to {last.iteration}",
        _count(ticks, "tick") if ticks or always_ticks else "",
        _count(sum(summary.changes for summary in summaries), "change"),
        _count(sum(summary.events for summary in summaries), "event"),
        _count(sum(summary.deliveries for summary in summaries), "delivery", "deliveries"),
        f"{'' if first is last else 'up to '}{run_ms:.1f} ms" + (f" + {commit_ms:.1f} ms commit" if commit_ms else ""),
        _count(errors, "error") + (f" ({', '.join(map(printable, failed[:3]))})" if failed else ""),
        _count(sum(summary.missed for summary in summaries), "slot") + " lost"
        if any(s.missed for s in summaries)
        else "",
        f"{last.background} in background" if last.background else "",
        f"{last.pending} pending" if last.pending else "",
    ]
    return " · ".join(part for part in parts if part)


def _count(count: int, noun: str, plural: str = "") -> str:
    return "" if not count else f"1 {noun}" if count == 1 else f"{count} {plural or noun + 's'}"


def _happened(summary: IterationSummary) -> bool:
    return bool(summary.changes or summary.events or summary.deliveries or summary.errors or summary.missed)


# -- elsewhere: now and then a line -----------------------------------------------------------------


class Digest:
    """Logs iterations in which something happened (with `verbose` all), a line a second at most."""

    def __init__(self, *, verbose: bool = False) -> None:
        self._verbose = verbose
        self._waiting: list[IterationSummary] = []
        self._logged_at = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def show(self, summary: IterationSummary) -> None:
        """Take an iteration up; on the loop's thread."""
        if not self._verbose and not _happened(summary):
            return
        self._waiting.append(summary)
        wait_s = self._logged_at + LOG_S - time.monotonic()
        if wait_s <= 0:
            self.flush()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(wait_s, self.flush)

    def flush(self) -> None:
        """Log what was taken up."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        waiting, self._waiting = self._waiting, []
        if waiting:
            self._logged_at = time.monotonic()
            log.info("%s", describe(waiting, always_ticks=False), extra=_figures(waiting))

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Show iterations for the length of a `with` block."""
        try:
            yield
        finally:
            self.flush()


def _figures(summaries: list[IterationSummary]) -> dict[str, Any]:
    """Return the same as fields of a log record."""
    return {
        "iteration": summaries[-1].iteration,
        "iterations": len(summaries),
        "ticks": sum(summary.ticks for summary in summaries),
        "changes": sum(summary.changes for summary in summaries),
        "events": sum(summary.events for summary in summaries),
        "deliveries": sum(summary.deliveries for summary in summaries),
        "errors": sum(summary.errors for summary in summaries),
        "missed": sum(summary.missed for summary in summaries),
        "run_ms": round(1000 * max(summary.run_s for summary in summaries), 3),
        "commit_ms": round(1000 * max(summary.commit_s for summary in summaries), 3),
    }


# -- on a terminal: one line ------------------------------------------------------------------------


class LiveLine:
    """The last iteration, in place, below everything else that is printed. Any thread may print meanwhile."""

    def __init__(self) -> None:
        self._terminal = sys.stderr
        self._lock = threading.RLock()
        self._text = ""
        self._drawn = False
        self._drawn_at = 0.0
        self._in_line = False
        """Somebody has printed half a line: it must not be overwritten."""

    def show(self, summary: IterationSummary) -> None:
        """Take an iteration up; on the loop's thread."""
        self._text = describe([summary], always_ticks=True)
        now = time.monotonic()
        if now - self._drawn_at >= REDRAW_S or _happened(summary):
            self._drawn_at = now
            with self._lock:
                self._erase()
                self._draw()

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Show iterations for the length of a `with` block; what is printed in it goes above the line."""
        before = sys.stdout, sys.stderr
        streams = [_Above(stream, self) if stream.isatty() else stream for stream in before]
        sys.stdout, sys.stderr = cast(TextIO, streams[0]), cast(TextIO, streams[1])
        try:
            yield
        finally:
            sys.stdout, sys.stderr = before
            with self._lock:
                self._erase()
                self._text = ""

    def write_above(self, stream: TextIO, text: str) -> int:
        """Print a text of somebody else's."""
        with self._lock:
            self._erase()
            written = stream.write(text)
            if text:
                self._in_line = not text.endswith("\n")
            if not self._in_line:
                stream.flush()
                self._draw()
            return written

    def _erase(self) -> None:
        if self._drawn:
            self._drawn = False
            self._put("\r\x1b[2K")

    def _draw(self) -> None:
        if self._text and not self._in_line:
            self._drawn = True
            self._put(_cut(self._text, shutil.get_terminal_size().columns - 1))

    def _put(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # the terminal is gone
            self._terminal.write(text)
            self._terminal.flush()


class _Above:
    """A stream whose lines appear above the live line; in all else the stream itself."""

    def __init__(self, stream: TextIO, line: LiveLine) -> None:
        self._stream = stream
        self._line = line

    def write(self, text: str) -> int:
        return self._line.write_above(self._stream, text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _cut(text: str, width: int) -> str:
    """Return as much of a text as fits into so many columns of a terminal."""
    if len(text) <= width and text.isascii():
        return text
    used = 0
    for index, character in enumerate(text):
        used += 2 if east_asian_width(character) in "WF" else 1
        if used > width:
            return text[:index]
    return text


def has_live_line() -> bool:
    """True where stderr is a terminal that can redraw a line."""
    return sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb"

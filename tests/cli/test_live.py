"""What is seen of a running loop: a line in place, or a line now and then."""

from __future__ import annotations

import asyncio
import io
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

from ael_store.cli import live
from ael_store.cli.live import Digest, LiveLine, describe
from ael_store.runtime.measure import IterationSummary


def summary(iteration: int, **figures: Any) -> IterationSummary:
    counts = dict.fromkeys(("ticks", "deliveries", "errors", "events", "changes", "missed"), 0)
    times: dict[str, Any] = {"late_s": 0.0, "run_s": 0.001, "commit_s": 0.0, "pending": 0, "background": 0}
    return IterationSummary(iteration, **{**counts, **times, **figures})


def test_words_for_one_and_for_many() -> None:
    busy = {"ticks": 2, "changes": 1, "events": 3, "deliveries": 1, "errors": 1, "missed": 1, "failed": ("fan",)}
    one = summary(7, **busy, commit_s=0.002, background=1, pending=4)

    assert describe([one], always_ticks=False) == (
        "iteration 7 · 2 ticks · 1 change · 3 events · 1 delivery · 1.0 ms + 2.0 ms commit"
        " · 1 error (fan) · 1 slot lost · 1 in background · 4 pending"
    )
    assert describe([summary(7, ticks=1), summary(8, ticks=1, run_s=0.003)], always_ticks=False) == (
        "iterations 7 to 8 · 2 ticks · up to 3.0 ms"
    )


# -- Digest -----------------------------------------------------------------------------------------


async def test_digest_logs_at_once_then_at_most_a_line_a_period(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(live, "LOG_S", 0.05)
    digest = Digest()

    with digest.shown():
        for iteration in range(1, 6):
            digest.show(summary(iteration, changes=1))
        assert len(caplog.records) == 1
        while len(caplog.records) < 2:  # the rest comes by itself, though nothing more happens
            await asyncio.sleep(0.001)
        digest.show(summary(6, changes=1))

    assert [record.getMessage() for record in caplog.records] == [
        "iteration 1 · 1 change · 1.0 ms",
        "iterations 2 to 5 · 4 changes · up to 1.0 ms",
        "iteration 6 · 1 change · 1.0 ms",
    ]


async def test_digest_leaves_idle_iterations_out(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")

    with Digest().shown() as _, (digest := Digest()).shown():
        digest.show(summary(1, ticks=3))
    assert caplog.records == []

    with (digest := Digest(verbose=True)).shown():
        digest.show(summary(1, ticks=3))
    assert caplog.records[0].getMessage() == "iteration 1 · 3 ticks · 1.0 ms"


# -- LiveLine ---------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def new_terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Terminal]:
    """Return a function that makes both streams a terminal: pytest puts its own there before each test."""

    def replace() -> Terminal:
        stream = Terminal()
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setenv("COLUMNS", "40")
        return stream

    return replace


ERASE = "\r\x1b[2K"


def test_line_is_drawn_in_place_and_gone_in_the_end(new_terminal: Callable[[], Terminal]) -> None:
    terminal = new_terminal()
    line = LiveLine()

    with line.shown():
        line.show(summary(1, changes=1))
        line.show(summary(2, changes=1))

    first, second = "iteration 1 · 1 change · 1.0 ms", "iteration 2 · 1 change · 1.0 ms"
    assert terminal.getvalue() == f"{first}{ERASE}{second}{ERASE}"
    assert sys.stdout is terminal


def test_what_is_printed_goes_above(new_terminal: Callable[[], Terminal]) -> None:
    terminal = new_terminal()
    line = LiveLine()

    with line.shown():
        line.show(summary(1, changes=1))
        print("said")

    drawn = "iteration 1 · 1 change · 1.0 ms"
    assert terminal.getvalue() == f"{drawn}{ERASE}said\n{drawn}{ERASE}"


def test_half_a_line_is_not_overwritten(new_terminal: Callable[[], Terminal]) -> None:
    terminal = new_terminal()
    line = LiveLine()

    with line.shown():
        line.show(summary(1, changes=1))
        print("half", end="")
        line.show(summary(2, changes=1))
        print(" whole")

    assert f"{ERASE}half whole\niteration 2" in terminal.getvalue()


def test_line_fits_the_terminal_also_with_wide_characters(new_terminal: Callable[[], Terminal]) -> None:
    terminal = new_terminal()
    line = LiveLine()

    with line.shown():
        line.show(summary(1, errors=1, failed=("温度計" * 20, "b\x1b[2J")))

    drawn = terminal.getvalue().split(ERASE)[0]
    assert len(drawn) < 40
    assert live._cut("温度計", 5) == "温度"
    assert "\x1b" not in drawn


def test_other_uses_of_the_stream_still_work(new_terminal: Callable[[], Terminal]) -> None:
    terminal = new_terminal()
    with LiveLine().shown():
        sys.stdout.writelines(["a\n", "b\n"])
        assert sys.stdout.isatty()
        sys.stdout.flush()

    assert terminal.getvalue() == "a\nb\n"


def test_threads_may_print_at_once(new_terminal: Callable[[], Terminal]) -> None:
    terminal = new_terminal()
    line = LiveLine()

    with line.shown():
        threads = [threading.Thread(target=lambda n=n: print(f"thread {n}\n", end="")) for n in range(20)]
        for thread in threads:
            thread.start()
        for iteration in range(20):
            line.show(summary(iteration, changes=1))
        for thread in threads:
            thread.join()

    left = [text.rsplit(ERASE, 1)[-1] for text in terminal.getvalue().split("\n")]
    assert sorted(text for text in left if text) == sorted(f"thread {n}" for n in range(20))


def test_terminal_that_is_gone_does_not_stop_the_loop(new_terminal: Callable[[], Terminal]) -> None:
    terminal = new_terminal()
    line = LiveLine()
    with line.shown():
        terminal.close()
        line.show(summary(1, changes=1))

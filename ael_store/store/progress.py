"""Signs of life of work that takes long."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["Tell", "telling"]

Tell = Callable[[str], None]
"""Takes a line of progress, from any thread."""

SILENCE_S, LONGEST_SILENCE_S = 2.0, 30.0
"""How long work may take before it is told of, and the longest time from one line to the next."""


@contextmanager
def telling(tell: Tell, line: Callable[[int], str]) -> Iterator[None]:
    """Tell now and then how it goes: `line(seconds)` says that, in a thread of its own; quick work is not told of."""
    done = threading.Event()
    began = time.monotonic()

    def watch() -> None:
        silence_s = SILENCE_S
        while not done.wait(silence_s):
            tell(line(round(time.monotonic() - began)))
            silence_s = min(2 * silence_s, LONGEST_SILENCE_S)

    thread = threading.Thread(target=watch, name="ael-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()

"""The end of a process that ran agents: nothing that an agent left running keeps it from ending.

`asyncio.run` and the interpreter wait for every thread of `asyncio.to_thread`, also for those whose hook was given
up long ago. The process of `ael run` is ours: when the loop has ended, it ends.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
import time
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

__all__ = ["leave", "run_to_end"]

PATIENCE_S = 1.0
"""How long threads may take to end when everything else has."""

log = logging.getLogger("ael_store.run")


def run_to_end(main: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine as `asyncio.run` does, but do not wait for what is left in threads."""
    asyncio.run(_with_own_threads(main))


async def _with_own_threads(main: Coroutine[Any, Any, None]) -> None:
    loop = asyncio.get_running_loop()
    threads = ThreadPoolExecutor(thread_name_prefix="asyncio")
    loop.set_default_executor(threads)
    try:
        await main
    finally:
        loop.set_default_executor(ThreadPoolExecutor(max_workers=1))  # asyncio waits for this one, which is idle
        threads.shutdown(wait=False, cancel_futures=True)


def leave(code: int) -> int:
    """Return the exit code, for `sys.exit`; end the process at once where threads would keep it."""
    give_up = time.monotonic() + PATIENCE_S
    for thread in _others():
        thread.join(max(0.0, give_up - time.monotonic()))
    left = _others()
    if not left:
        return code
    names = ", ".join(thread.name for thread in left[:5])
    log.warning("%d threads of agents still run (%s): the process ends without them", len(left), names)
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            continue
    os._exit(code)


def _others() -> list[threading.Thread]:
    """Return the threads that the interpreter would wait for."""
    main = threading.main_thread()
    return [thread for thread in threading.enumerate() if thread is not main and not thread.daemon]

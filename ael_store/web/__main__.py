"""The server as a process: `python -m ael_store.web WHAT`, where WHAT is `launch.Launch` as JSON.

`ael web` becomes it, and `ael run --web` starts it as a child, which ends when its input does: then the loop has ended,
however it ended. Neither brings what only a command line or a loop needs, so that it stays small.
"""

from __future__ import annotations

import asyncio
import signal
import sys

from ael_store.cli.failure import finish
from ael_store.telemetry import configure_logging
from ael_store.web.launch import Launch
from ael_store.web.server import serve


async def _serve(launch: Launch) -> None:
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, ended.set)
    if launch.is_child:
        await loop.connect_read_pipe(lambda: _Until(ended), sys.stdin)
    else:
        loop.add_signal_handler(signal.SIGINT, ended.set)
    await serve(launch, ended)


class _Until(asyncio.Protocol):
    """Sets an event when the input has ended."""

    def __init__(self, ended: asyncio.Event) -> None:
        self.ended = ended

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended.set()


def main() -> int:
    launch = Launch.from_json(sys.argv[1])
    configure_logging(launch.log_level, launch.log_format)
    if launch.is_child:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    asyncio.run(_serve(launch))
    return 0


if __name__ == "__main__":
    sys.exit(finish(main, debug=False))

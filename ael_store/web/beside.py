"""The loop's end of `ael run --web`: the port, and the process that serves there.

The port is opened before anything runs, so that a taken one is an error at once, and stays open in the loop's process:
a server that died is started again on the same one, and who was connected finds it there. Nothing of the web
framework is imported here.
"""

from __future__ import annotations

import contextlib
import logging
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from ael_store.settings import Settings
from ael_store.web.address import listen, read_address
from ael_store.web.launch import environment, launch_of, refuse_without_extra

__all__ = ["Beside"]

FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0
STEADY_S = 60.0
"""A server that has lived so long was no failed start."""

GOODBYE_S = 3.0

log = logging.getLogger("ael_store.web")


class Beside:
    """A dashboard that lives as long as a `with` block, in a process of its own."""

    def __init__(self, path: Path, settings: Settings) -> None:
        refuse_without_extra()
        address = read_address(str(settings.web))
        self._listening = listen(address)
        self.launch = launch_of(path, settings, address, self._listening, is_child=True)
        self._ending = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._keeper = threading.Thread(target=self._keep, name="ael-web-keeper", daemon=True)

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        """Serve for the length of a `with` block; a server that ends is started again."""
        self._keeper.start()
        try:
            yield
        finally:
            self._ending.set()
            self._close(self._process.stdin if self._process is not None else None)
            self._keeper.join(GOODBYE_S)
            if self._process is not None and self._process.poll() is None:
                self._process.kill()
            self._listening.close()

    def _keep(self) -> None:
        pause_s = FIRST_PAUSE_S
        while not self._ending.is_set():
            began = time.monotonic()
            try:
                process = self._process = self._start()
            except OSError as error:
                log.warning("the dashboard can't be started: %s", error)
            else:
                if self._ending.is_set():
                    self._close(process.stdin)
                code = process.wait()
                self._close(process.stdin)
                if self._ending.is_set():
                    return
                log.warning("the dashboard has ended (code %d), and is started again", code)
            if time.monotonic() - began > STEADY_S:
                pause_s = FIRST_PAUSE_S
            self._ending.wait(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self.launch.command,
            env=environment(),
            stdin=subprocess.PIPE,  # its end is how the server learns that this process has ended
            stdout=subprocess.DEVNULL,
            pass_fds=[self.launch.descriptor],
            start_new_session=True,  # Ctrl-C is the loop's
        )

    @staticmethod
    def _close(pipe: IO[bytes] | None) -> None:
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()

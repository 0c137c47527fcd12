"""`ael run --reload`: begins anew when the code has changed, and keeps the old code while the new is broken.

A thread looks at time and size of the project's files, twice a second: the modules that are loaded and come neither
with Python nor from an installed package, and the settings file. When they have changed and then stayed as they are,
another process imports the target and makes its agents (`rehearsal.py`). Only when that works the loop is stopped,
as by SIGTERM, and the process begins anew in its place: same pid, same arguments, the state resumed.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

__all__ = ["CodeWatch", "begin_anew"]

PERIOD_S = 0.5
SETTLE_S = 0.2
"""For so long nothing may change any more: editors write several files, and some of them in steps."""
REHEARSAL_S = 60.0
"""How long importing the target may take."""

Stamp = tuple[int, int]
Stamps = dict[str, Stamp | None]

log = logging.getLogger("ael_store.reload")


class CodeWatch:
    """Watches the files of a running project, from a daemon thread, until they have changed for good."""

    def __init__(self, rehearsal: Mapping[str, object], settings_file: Path | None, stop: Callable[[], object]) -> None:
        self.has_new_code = False
        """True once the loop was told to stop because the process is to begin anew."""
        self._rehearsal = json.dumps(rehearsal)
        self._settings_file = settings_file
        self._stop = stop
        self._folder = os.getcwd()
        self._over = threading.Event()
        self._refused = False
        self._seen = self._look()
        self._thread = threading.Thread(target=self._main, name="ael-reload", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        log.info("watching %d files of the project for changes", len(self._seen))
        self._thread.start()

    def stop(self) -> None:
        """End the watch; returns at once."""
        self._over.set()

    def _main(self) -> None:
        while not self._over.wait(PERIOD_S):
            now = self._look()
            changed = self._changed(now)
            if not changed:
                self._seen |= now  # with what was imported since
                continue
            if self._over.wait(SETTLE_S) or self._look() != now:
                continue
            self._seen = now
            problem = self._rehearse()
            if self._over.is_set():
                return
            names = ", ".join(sorted(os.path.relpath(file, self._folder) for file in changed)[:3])
            if problem is None:
                log.info("%s changed: the loop stops and begins anew", names)
                self.has_new_code = True
                self._stop()
                return
            self._refused = True
            self._seen = self._look()
            log.error("%s changed, and the loop goes on with the old code: %s", names, problem)

    def _changed(self, now: Stamps) -> list[str]:
        """Return what has changed; what is looked at for the first time has not, unless something was missing."""
        return [file for file, stamp in now.items() if stamp != self._seen.get(file, None if self._refused else stamp)]

    def _look(self) -> Stamps:
        """Return time and size of each file; None for one that is not there."""
        files = set(_files_of_modules())
        if self._settings_file is not None:
            files.add(str(self._settings_file))
        if self._refused:  # what is missing may be a file that is still to be written
            for folder in {os.path.dirname(file) for file in files}:
                files.update(str(file) for file in Path(folder).glob("*.py"))
        return {file: _stamp(file) for file in files}

    def _rehearse(self) -> str | None:
        """Return what is wrong with the code as it is now; None where nothing is."""
        try:
            done = subprocess.run(
                [sys.executable, "-B", "-m", "ael_store.cli.rehearsal", self._rehearsal],
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                timeout=REHEARSAL_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"importing it takes longer than {REHEARSAL_S:.0f} s"
        except OSError as error:
            return str(error)
        if done.returncode == 0:
            return None
        said = [line.removeprefix("ael: ") for line in done.stderr.splitlines() if line.startswith("ael: ")]
        return said[-1] if said else f"importing it ended with exit code {done.returncode}"


def begin_anew(folder: str) -> None:
    """Put a new process of the same command line into the place of this one; does not return."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os.chdir(folder)
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _stamp(file: str) -> Stamp | None:
    try:
        status = os.stat(file)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size


def _files_of_modules() -> Iterable[str]:
    """Yield the files of the project that are loaded."""
    paths = sysconfig.get_paths()
    package = str(Path(__file__).resolve().parents[1])
    others = tuple(
        f"{os.path.realpath(folder)}{os.sep}"
        for folder in (*(paths[kind] for kind in ("stdlib", "platstdlib", "purelib", "platlib", "scripts")), package)
    )
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if isinstance(file, str) and not os.path.realpath(file).startswith(others):
            yield os.path.abspath(file)

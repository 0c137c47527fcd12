"""The systemd unit of a project: its name, its text, the place where it goes.

The name comes from the folder and from a digest of the target's whole path, so that projects on one machine need not
know of each other, whatever their folders are called. What the unit allows is what a loop needs: the folders of the
project and of its database can be written, everything else can only be read.
"""

from __future__ import annotations

import hashlib
import math
import os
import pwd
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from ael_store.errors import UsageError
from ael_store.settings import LoadedSettings

__all__ = ["MARK", "UnitFile"]

MARK = "# Written by `ael service install`"
"""How the first line of a unit of ours begins."""

LONGEST_SOCKET = 100
"""As `ael_store.runtime.control` has it: with a longer path the socket for commands goes into a temporary folder."""

LEAST_WATCHDOG_S, MORE_THAN_STALL_S = 180, 60
"""The loop's own watchdog comes first, because it names who is to blame; the service manager's is for the rest."""
MORE_THAN_GRACE_S = 30


@dataclass(frozen=True, slots=True)
class UnitFile:
    """The unit that runs one target."""

    target: str
    """As `ael run` takes it, seen from `folder`."""
    folder: Path
    """Where it runs: the folder of the target's file, or the working directory for a module."""
    database: Path
    loaded: LoadedSettings
    given_db: str | None
    """What `--db` said, for the command line of the unit."""
    for_system: bool

    @property
    def name(self) -> str:
        """The name of the unit, with its ending."""
        whole = f"{self.folder}\0{self.target}"
        word = re.sub(r"[^a-z0-9]+", "-", self.folder.name.lower()).strip("-")[:40] or "project"
        return f"ael-{word}-{hashlib.sha256(os.fsencode(whole)).hexdigest()[:8]}.service"

    @property
    def path(self) -> Path:
        """Where the unit is looked for."""
        if self.for_system:
            return Path("/etc/systemd/system") / self.name
        config = os.environ.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
        return Path(config) / "systemd" / "user" / self.name

    @property
    def user(self) -> str:
        """Whom a unit of the system runs as: who called sudo, else the owner of the folder."""
        return os.environ.get("SUDO_USER") or pwd.getpwuid(self.folder.stat().st_uid).pw_name

    def text(self) -> str:
        """Return the whole file."""
        settings = self.loaded.settings
        stall_s = math.ceil(settings.stall_limit)
        watchdog_s = max(LEAST_WATCHDOG_S, stall_s + MORE_THAN_STALL_S) if stall_s else LEAST_WATCHDOG_S
        command = [sys.executable, "-m", "ael_store", "run", self.target]
        if self.given_db is not None:
            command += ["--db", str(self.database)]
        writable = sorted({self.folder, self.database.parent})
        shared_tmp = len(os.fsencode(self.database)) + len(".sock") > LONGEST_SOCKET or any(
            folder.is_relative_to(place) for folder in writable for place in ("/tmp", "/var/tmp")
        )
        lines = [
            f"{MARK} for {_line(str(self.folder))}; written anew by the same command.",
            "",
            "[Unit]",
            f"Description=ael: {_escaped(self.folder.name)}/{_escaped(self.target)}",
            "StartLimitIntervalSec=300",
            "StartLimitBurst=5",
            "",
            "[Service]",
            "Type=notify",
            "ExecStart=" + " ".join(map(_word, command)),
            "ExecReload=/bin/kill -HUP $MAINPID",
            f"WorkingDirectory={_escaped(str(self.folder))}",
            "Environment=PYTHONUNBUFFERED=1",
            *([f"User={self.user}"] if self.for_system else []),
            "UMask=0077",
            "",
            "# 2: wrong usage, 65: damaged, 78: newer than the program. Another start would end the same way.",
            "Restart=on-failure",
            "RestartSec=2",
            "RestartPreventExitStatus=2 65 78",
            f"WatchdogSec={watchdog_s}",
            f"TimeoutStopSec={math.ceil(settings.grace) + MORE_THAN_GRACE_S}",
            "",
            "# More places to write to belong into a drop-in: `systemctl edit`.",
            "NoNewPrivileges=yes",
            "ProtectSystem=strict",
            "ReadWritePaths=" + " ".join(_word(str(folder)) for folder in writable),
            # A /tmp of its own would hide a project in /tmp, and the socket for commands of one whose path is too long.
            "ReadWritePaths=/tmp /var/tmp" if shared_tmp else "PrivateTmp=yes",
            "LockPersonality=yes",
            "RestrictRealtime=yes",
            "RestrictSUIDSGID=yes",
            "SystemCallArchitectures=native",
            *(
                [
                    "CapabilityBoundingSet=",
                    "ProtectControlGroups=yes",
                    "ProtectKernelModules=yes",
                    "ProtectKernelTunables=yes",
                ]
                if self.for_system
                else []
            ),
            "",
            "[Install]",
            f"WantedBy={'multi-user' if self.for_system else 'default'}.target",
            "",
        ]
        return "\n".join(lines)


def _line(text: str) -> str:
    if any(not character.isprintable() for character in text):
        raise UsageError(f"{text!r} can't stand in a unit of systemd: rename it")
    return text


def _escaped(text: str) -> str:
    """Return a text for the rest of a line."""
    return _line(text).replace("%", "%%")


def _word(text: str) -> str:
    """Return a text that is one word of several on a line."""
    text = _escaped(text).replace("\\", "\\\\").replace('"', '\\"').replace("$", "$$")
    return f'"{text}"' if re.search(r"[^\w@%+=:,./$-]", text) or not text else text

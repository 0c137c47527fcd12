"""The environment of the peers: they are no dependencies of the project, and are measured where they are installed.

`./dev bench peers --install` makes `.venv/peers` from `benchmarks/peers.txt`; AEL_PEERS names the Python of another.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

__all__ = ["PACKAGES", "find_packages", "install_peers", "peers_python"]

ROOT = Path(__file__).resolve().parent.parent
PINNED = Path(__file__).with_name("peers.txt")
PACKAGES = {
    "dbos": "dbos",
    "langgraph": "langgraph-checkpoint-sqlite",
    "eventsourcing": "eventsourcing",
    "huey": "huey",
    "apscheduler": "apscheduler",
}
"""The distribution of each peer."""

QUESTION = """
import importlib.metadata as metadata, json, sys
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
        pass
print(json.dumps(found))
"""


def peers_python() -> Path:
    """Return the Python of the peers' environment, whether or not it is there."""
    named = os.environ.get("AEL_PEERS")
    return Path(named) if named else ROOT / ".venv" / "peers" / "bin" / "python"


def install_peers() -> None:
    """Make the environment, or bring it up to date; raises CalledProcessError where pip fails."""
    folder = ROOT / ".venv" / "peers"
    venv.create(folder, with_pip=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "-r", str(PINNED)], check=True, stdout=sys.stderr)


def find_packages() -> dict[str, str]:
    """Return the versions of those peers that are installed, by name of the peer."""
    python = peers_python()
    if not python.exists():
        return {}
    asked = subprocess.run(
        [str(python), "-c", QUESTION, *PACKAGES.values()], check=True, capture_output=True, text=True
    )
    versions = json.loads(asked.stdout)
    return {peer: versions[package] for peer, package in PACKAGES.items() if package in versions}

"""What `ael run --reload` has another process do first: read the settings, import the target, make its agents.

Nothing of a loop begins and no database is opened. It ends with 0, or says what is wrong as `ael run` would.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from ael_store.cli.failure import finish
from ael_store.runtime.target import load_agents
from ael_store.settings import load_settings

__all__ = ["rehearse"]


def rehearse(target: str, flags: dict[str, object], beside: str | None) -> int:
    """Return 0 where agents can be made of the target; raises what is wrong."""
    loaded = load_settings(flags)
    if loaded.file is None and beside is not None:
        loaded = load_settings(flags, folder=Path(beside))
    load_agents(target, loaded.agents)
    return 0


if __name__ == "__main__":
    sys.exit(finish(lambda: rehearse(**json.loads(sys.argv[1])), debug=False))

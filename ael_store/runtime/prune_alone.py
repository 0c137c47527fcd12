"""Removing history without a loop, for `ael db prune`: the same steps, one after another, under the lock."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ael_store.clock import SystemClock
from ael_store.model.state import State
from ael_store.runtime.journal import Journal
from ael_store.runtime.pruner import Pruner
from ael_store.settings import Settings
from ael_store.store.prune import PRUNING, Pruning
from ael_store.store.store import Store

__all__ = ["prune_alone"]

BATCH_S = 0.2
"""How long a batch should take where nobody waits for it."""


class _Alone:
    """What a pruner asks of a run."""

    def __init__(self, store: Store, journal: Journal, settings: Settings, token: int) -> None:
        self.store = store
        self.journal = journal
        self.settings = settings
        self.clock = SystemClock()
        self.started_us = self.clock.now_us()
        self._token: int | None = token

    async def commit(self, kind: str) -> None:
        commit = self.journal.take(kind, self.clock.now_us())
        commit.run_id = None
        await self.store.commit(commit, take_from=self._token, holder=f"pid {os.getpid()}: ael db prune")
        self._token = None  # the lease is this one's now
        self.journal.done()


async def prune_alone(path: Path, settings: Settings, tell: Callable[[str], None]) -> int:
    """Remove everything that the settings do not keep, and return how many rows that were.

    May be interrupted at any moment: what is under way goes on with the next loop, or the next call. Raises what
    opening the store raises, OwnedElsewhere where a loop runs.
    """
    store = Store(path, allow_shared_folder=settings.allow_shared_folder)
    resumed = await store.open("ael db prune", upgrade_schema=False, create=False, keys=[], tasks=False, metrics=False)
    try:
        journal = Journal(resumed, State({}, resumed.change_id), resumed.run_id)
        alone: Any = _Alone(store, journal, settings, resumed.token)
        text = resumed.positions.get(PRUNING)
        pruner = Pruner(alone, None if text is None else Pruning.from_json(text), BATCH_S, trusts_clock=True)
        while pruner.busy:
            await pruner.step()
            tell(f"removed {pruner.removed} rows")
        return pruner.removed
    finally:
        await store.close()

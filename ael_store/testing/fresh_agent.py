"""New instances of an agent, one for each unit: what an instance remembers of earlier ticks is not recorded."""

from __future__ import annotations

import copy
from collections.abc import Callable

from ael_store.runtime.agent import AgentBase

__all__ = ["FreshAgents"]


class FreshAgents:
    """Copies of an agent as it was made.

    One that can't be copied whole (it holds a lock, a connection) is made anew where `make` gives another object.
    Else what can be copied of it is copied, and `shared` names the attributes that all units share.
    """

    def __init__(self, agent: AgentBase, make: Callable[[], AgentBase]) -> None:
        self.agent = agent
        """As it was made; no hook runs on it."""
        self.shared: list[str] = []
        self.is_made_anew = False
        """True where `next` runs code of the user's that makes agents."""
        self.next: Callable[[], AgentBase] = lambda: copy.deepcopy(agent)
        """Returns an agent that no hook has run on."""
        if not _can_copy(agent):
            self.is_made_anew = make() is not make()
            self.next = make if self.is_made_anew else self._copy_parts
        if self.next == self._copy_parts:
            self.shared = sorted(name for name, value in vars(agent).items() if not _can_copy(value))

    def _copy_parts(self) -> AgentBase:
        agent = copy.copy(self.agent)
        memo = {id(self.agent): agent}
        for name, value in vars(self.agent).items():
            if name not in self.shared:
                object.__setattr__(agent, name, copy.deepcopy(value, memo))
        return agent


def _can_copy(value: object) -> bool:
    try:
        copy.deepcopy(value)
    except Exception:  # whatever it raises: this may be code of the user's
        return False
    return True

"""The state as it was at a past moment: read-only, with the methods for reading that a `StateContext` has.

    with Store("ael.db").at(412) as past:
        past.get("temperature")

It reads the file through connections of its own, whether or not a loop runs, and holds no transaction between two
calls: what it answers stays the same, until retention has removed it, which is an error from then on.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar, overload

from ael_store.clock import from_us
from ael_store.model.values import decode
from ael_store.store.reader import Reader, history_entry

__all__ = ["PastState"]

D = TypeVar("D")

HISTORY_OF_KEY = 100
HISTORY_OF_ALL = 1000


class PastState:
    """The state at the end of an iteration, to be read: what `Store.at()` and `connect().at()` return.

    Raises HistoryGone, at once or in a later call, where retention has removed that moment. May be used from any
    thread; close it when done, or use it in a `with` block.
    """

    def __init__(self, path: Path, at: int | str | datetime) -> None:
        self._reader = Reader(path)
        try:
            self._moment = self._reader.moment(at)
        except BaseException:
            self._reader.close()
            raise

    @property
    def iteration(self) -> int:
        """The iteration after which it was so; 0 before the first."""
        return self._moment.iteration

    @property
    def at(self) -> datetime | None:
        """When that iteration began, in UTC; None before the first."""
        return None if self._moment.started_us is None else from_us(self._moment.started_us)

    @overload
    def get(self, key: str) -> Any: ...

    @overload
    def get(self, key: str, default: D) -> D: ...

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value that a key had, or `default` where it had none."""
        text = self._reader.value_at(self._moment, key)
        return default if text is None else decode(text)

    def has(self, key: str) -> bool:
        """True where the key had a value."""
        return self._reader.value_at(self._moment, key) is not None

    def get_all(self, prefix: str = "") -> dict[str, Any]:
        """Return every key that begins with `prefix`, with its value, in order of the keys."""
        return {row["key"]: decode(row["value"]) for row in self._reader.state_at(self._moment, prefix)}

    def get_history(self, key: str | None = None) -> list[dict[str, Any]]:
        """Return the changes up to then, oldest first: the last 100 of a key, without a key the last 1000 of all.

        They have the shape that `StateContext.get_history()` gives them.
        """
        limit = HISTORY_OF_ALL if key is None else HISTORY_OF_KEY
        return [history_entry(row) for row in reversed(self._reader.history(key, limit, self._moment))]

    def close(self) -> None:
        """Close the connections."""
        self._reader.close()

    def __enter__(self) -> PastState:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __contains__(self, key: str) -> bool:
        return self.has(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.get_all())

    def __repr__(self) -> str:
        return f"<PastState of {self._reader.path} after iteration {self.iteration}>"

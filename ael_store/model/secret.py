"""Secrets: text from outside that must not be seen.

A `Secret` is a `str` that holds the real text, so that it fits where a configuration declares `str`, and
shows only its name wherever it is printed, formatted or logged. State and events refuse it, because they take
`str` by exact type; pickling is refused too.

Use it with `reveal()`, at the last moment: `auth = f"Bearer {self.config.token.reveal()}"` (declare the field
as `Secret`, then type checkers know the method). What is made from a secret by other means (`secret + "x"`,
`secret[:4]`, `json.dumps(secret)`) is plain text again: Python offers no way to forbid that. Whoever writes
JSON of values that others handed over passes them through `masked()` first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn, Self

__all__ = ["Secret", "masked"]


class Secret(str):
    """A text that shows itself only as `Secret('NAME', ******)`; `reveal()` returns it."""

    __slots__ = ("_name",)
    _name: str

    def __new__(cls, value: str, name: str = "") -> Self:
        secret = super().__new__(cls, str.__str__(value))
        secret._name = name
        return secret

    @property
    def name(self) -> str:
        """The name under which it was looked up."""
        return self._name

    def reveal(self) -> str:
        """Return the real text, as a plain str that nothing masks any more."""
        return str.__str__(self)

    def __repr__(self) -> str:
        return f"Secret({self._name!r}, ******)"

    def __str__(self) -> str:
        return repr(self)

    def __format__(self, spec: str) -> str:
        return format(repr(self), spec)

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: object) -> Self:
        return self

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(f"{self!r} can't be pickled; pass its name and look it up where it is needed")


def masked(value: Any) -> Any:
    """Return a JSON-like value with every secret inside replaced by its masked text."""
    if isinstance(value, Secret):
        return repr(value)
    if isinstance(value, Mapping):
        return {masked(key): masked(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [masked(item) for item in value]
    return value

"""What every command works with: the global options and what follows from them.

`Call` finds the settings and the database, opens it for reading, and carries out changes. Nothing here creates
a database: that is for `ael run` alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ael_store.cli.output import note
from ael_store.errors import DatabaseNotUsable, UsageError
from ael_store.settings import LoadedSettings, load_settings

if TYPE_CHECKING:
    from ael_store.model.values import Limits
    from ael_store.store.reader import Reader

__all__ = ["Call"]


@dataclass(frozen=True)
class Call:
    """One call of `ael`: the options that all commands have."""

    db: str | None = None
    json: bool = False
    debug: bool = False

    def over(self, other: Call | None) -> Call:
        """Return these options completed by those that stood before the command."""
        if other is None:
            return self
        return Call(self.db if self.db is not None else other.db, self.json or other.json, self.debug or other.debug)

    # -- settings --

    @cached_property
    def loaded(self) -> LoadedSettings:
        """The settings for the working directory; what is odd about them is said on stderr."""
        return self.load({})

    def load(self, flags: Mapping[str, object], beside: Path | None = None) -> LoadedSettings:
        """Return the settings with these flags; without a file in the working directory those `beside`."""
        flags = {"db": self.db, **flags}
        loaded = load_settings(flags)
        if loaded.file is None and beside is not None:
            loaded = load_settings(flags, folder=beside)
        for warning in loaded.warnings:
            note(f"ael: warning: {warning}")
        return loaded

    @property
    def limits(self) -> Limits:
        """How large values and events may be."""
        from ael_store.model.values import Limits

        settings = self.loaded.settings
        return Limits(settings.key_bytes, settings.value_bytes, settings.event_bytes, settings.value_depth)

    # -- the database --

    @cached_property
    def path(self) -> Path:
        """The database's file, whether it exists or not."""
        from ael_store.store.sqlite import database_path

        address = self.loaded.settings.db
        if address == ":memory:":
            raise UsageError(
                "':memory:' is the private database of one loop and ends with it: "
                "name a file with --db or AEL_DB, and start the loop with the same"
            )
        return database_path(address)

    @contextmanager
    def reader(self, path: Path | None = None) -> Iterator[Reader]:
        """Open the database, or another one, for reading; it must exist and have this program's schema."""
        from ael_store.store.reader import Reader

        self.check_revision(path)
        reader = Reader(self.path if path is None else path)
        try:
            yield reader
        finally:
            reader.close()

    def change(self, command: str, **arguments: Any) -> Any:
        """Carry out a command, through the loop where one runs; returns its result once it is committed."""
        from ael_store.client import change

        self.check_revision()
        shared = self.loaded.settings.allow_shared_folder
        return change(self.path, command, arguments, self.limits, allow_shared_folder=shared)

    def check_revision(self, path: Path | None = None) -> None:
        """Raise SchemaTooOld, SchemaTooNew, NotADatabase or DatabaseNotUsable unless the schema is this program's."""
        from ael_store.store.revision import refuse_other

        if path is None:
            self.check_exists()
            path = self.path
        refuse_other(path)

    def check_exists(self) -> None:
        """Raise DatabaseNotUsable where there is no file of that name; names one that may be meant."""
        if self.path.exists():
            return
        near = ""
        if self.loaded.origins["db"] == "default":
            found = sorted(path.relative_to(self.path.parent) for path in self.path.parent.glob(f"*/{self.path.name}"))
            near = f"; did you mean --db {found[0]}?" if found else ""
        raise DatabaseNotUsable(f"{self.path} does not exist; `ael run` creates it, --db or AEL_DB names another{near}")

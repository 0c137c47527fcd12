"""The secret that lets somebody change things: a file of mode 0600 beside the database, made at the first start."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import secrets
import stat
from pathlib import Path

from ael_store.errors import AelError

__all__ = ["Token", "TokenNotUsable", "token_path"]

COOKIE = "ael_session"
SHORTEST = 20


class TokenNotUsable(AelError):
    """The token file can't be read or made, or others may read it; the message says what to do."""


def token_path(database: Path) -> Path:
    """Return the token file of a database."""
    return database.with_name(database.name + ".token")


class Token:
    """The token of a database. The file is read again when it changes, so a new token shuts out who had the old one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read_at: tuple[int, int, int] | None = None
        self._text = b""

    def make(self) -> None:
        """Make the file where there is none; raises TokenNotUsable where it can't be used."""
        if not os.path.lexists(self.path):
            temporary = self.path.with_name(f"{self.path.name}.{secrets.token_hex(8)}")
            try:
                descriptor = os.open(
                    temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
                )
                try:
                    os.fchmod(descriptor, 0o600)
                    os.write(descriptor, secrets.token_urlsafe(32).encode() + b"\n")
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
                with contextlib.suppress(FileExistsError):  # two starts at once: the first one's stands
                    os.link(temporary, self.path)
            except OSError as error:
                raise TokenNotUsable(
                    f"{self.path} can't be made ({error.strerror}): let this user write the folder, "
                    "or start with --read-only"
                ) from None
            finally:
                with contextlib.suppress(OSError):
                    temporary.unlink()
        self.text()

    def text(self) -> bytes:
        """Return the token. Raises TokenNotUsable."""
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise TokenNotUsable(f"{self.path} can't be read ({error.strerror}): remove it and start again") from None
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_uid not in (0, os.geteuid()):
                raise TokenNotUsable(f"{self.path} is no file of this user: remove it and start again")
            if status.st_mode & 0o077:
                raise TokenNotUsable(
                    f"{self.path} can be read by others (mode {stat.S_IMODE(status.st_mode):04o}): remove it, "
                    "and the next start makes a new one"
                )
            seen = status.st_ino, status.st_mtime_ns, status.st_size
            if seen != self._read_at:
                text = os.read(descriptor, 4096).strip()
                if len(text) < SHORTEST:
                    raise TokenNotUsable(f"{self.path} holds no token: remove it, and the next start makes one")
                self._text, self._read_at = text, seen
        finally:
            os.close(descriptor)
        return self._text

    def fits(self, given: str) -> bool:
        """Say whether this is the token."""
        return hmac.compare_digest(given.strip().encode("utf-8", "replace"), self.text())

    @property
    def session(self) -> str:
        """What the cookie of a browser holds: made from the token, which can't be told from it."""
        return hmac.new(self.text(), b"ael dashboard session", hashlib.sha256).hexdigest()

    def fits_session(self, given: str) -> bool:
        """Say whether this is the content of a cookie that was given for this token."""
        return hmac.compare_digest(given.encode("utf-8", "replace"), self.session.encode())

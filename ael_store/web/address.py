"""Where the dashboard listens: reading `HOST:PORT`, opening the port, and which names mean this machine."""

from __future__ import annotations

import errno
import ipaddress
import os
import re
import socket
from dataclasses import dataclass

from ael_store.errors import AelError, UsageError

__all__ = ["DEFAULT", "Address", "AddressNotUsable", "is_address", "is_loopback", "listen", "read_address"]

DEFAULT = "127.0.0.1:8123"


class AddressNotUsable(AelError, OSError):
    """The dashboard can't listen at its address; name another one."""


@dataclass(frozen=True, slots=True)
class Address:
    """A host, without brackets, and a port; 0 is any free one."""

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        return is_loopback(self.host)

    @property
    def url(self) -> str:
        """What to open in a browser on this machine."""
        everywhere = self.host in ("0.0.0.0", "::")
        return f"http://{Address('127.0.0.1' if everywhere else self.host, self.port)}/"


def is_address(text: str) -> bool:
    """Say whether a word is an address, or rather the next argument: `8123`, `:8123`, `0.0.0.0:80`, `[::1]:80`."""
    return re.fullmatch(r"(?:(?:\[[0-9a-fA-F:.]+\]|[\w.-]*):)?\d{1,5}", text, re.ASCII) is not None


def read_address(text: str) -> Address:
    """Return the address that a text means; without a host the loopback address. Raises UsageError."""
    if not is_address(text):
        raise UsageError(f"{text!r} is no address; write HOST:PORT, like {DEFAULT}, or a port")
    host, _, port = text.rpartition(":")
    if int(port) > 65_535:
        raise UsageError(f"port {port} of {text!r} is too large; ports end at 65535")
    return Address(host.strip("[]") or "127.0.0.1", int(port))


def is_loopback(host: str) -> bool:
    """Say whether a host is this machine, and reached from nowhere else."""
    if host.lower().rstrip(".") == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen(address: Address) -> socket.socket:
    """Return a listening socket; raises AddressNotUsable where the address is taken or not this machine's."""
    try:
        family, _, _, _, where = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:
        raise AddressNotUsable(
            f"the dashboard can't listen at {address}: {address.host!r} is no host ({error})"
        ) from None
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(where)
        listening.listen(128)
    except OSError as error:
        listening.close()
        next_step = {
            errno.EADDRINUSE: "another program listens there; name another port, or end that program",
            errno.EACCES: "ports below 1024 need rights that this user lacks; name a higher one",
            errno.EADDRNOTAVAIL: "this machine has no such address; name one of its own",
        }.get(error.errno or 0, os.strerror(error.errno or 0))
        raise AddressNotUsable(f"the dashboard can't listen at {address}: {next_step}") from None
    return listening

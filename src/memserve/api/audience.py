"""The addresses of a server: it refuses requests that are signed for any other address."""

from __future__ import annotations

import socket
from functools import lru_cache
from urllib.parse import urlsplit

from memserve.errors import ConfigError
from memserve.hosts import advertised

_REMEMBERED = 256  # of the addresses that were looked up


class Audience:
    """A server's addresses, as host:port. Filled before the server takes requests."""

    def __init__(self, *, any_name: bool = False) -> None:
        """`any_name`: accept every host name, as a load balancer's, with a port of ours."""
        self._any_name = any_name
        self._ports: set[int] = set()
        self._known: set[str] = set()

    def add_socket(self, sock: socket.socket) -> None:
        """Add all addresses of this machine with a listening socket's port."""
        self._ports.add(sock.getsockname()[1])

    def add_url(self, url: str) -> None:
        """Add the address of a URL that leads to this server."""
        self._known.add(_authority(url))

    def __contains__(self, authority: object) -> bool:
        if not isinstance(authority, str):
            return False
        if authority in self._known:
            return True
        host, _, port = authority.rpartition(":")
        if not port.isascii() or not port.isdigit() or int(port) not in self._ports:
            return False
        return _is_here(host) or (self._any_name and not _is_address(host))


def check_url(url: str) -> None:
    """Raise ConfigError unless `url` is http://host:port or https://host:port."""
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        good = False
    if not good or parts.path not in ("", "/"):
        raise ConfigError(f"'{url}' is no http://host:port")


def origin_of(url: str) -> str:
    """Return scheme://host:port of a URL, with the scheme's default port if it has none. Raises
    ValueError."""
    return f"{urlsplit(url).scheme}://{_authority(url)}"


def _authority(url: str) -> str:
    parts = urlsplit(url)
    host = parts.hostname or ""
    port = parts.port or (443 if parts.scheme == "https" else 80)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _is_address(host: str) -> bool:
    bare = host.removeprefix("[").removesuffix("]").partition("%")[0]
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(family, bare)
        except OSError:
            continue
        return True
    return False


@lru_cache(maxsize=_REMEMBERED)
def _is_here(host: str) -> bool:
    """Return whether a host is this machine: one of its names, or an address that it can bind."""
    if not _is_address(host):
        # `advertised` may ask a name server, so it comes after the usual names.
        known = host in ("localhost", socket.gethostname().lower())
        return known or host == advertised("0.0.0.0").lower()
    bare = host.removeprefix("[").removesuffix("]")
    family = socket.AF_INET6 if ":" in bare else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((bare, 0))
        except OSError:
            return False
    return True

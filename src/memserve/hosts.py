"""Hosts to listen on: IPv4 and IPv6 addresses, host names, and wildcards.

Names are resolved here for TCP sockets and for ZeroMQ, which does not resolve a name to listen
on. If a name has both kinds of address, the IPv4 address is used, since clients try it too.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import random
import socket
from contextlib import suppress
from urllib.parse import urlsplit

WILDCARDS = ("0.0.0.0", "::")
_FREE_PORTS = range(20_000, 32_000)

# An address as `getaddrinfo` returns it: (host, port), for IPv6 also flow label and scope id.
SocketAddress = tuple[str, int] | tuple[str, int, int, int]


def resolve(host: str, port: int) -> tuple[socket.AddressFamily, SocketAddress]:
    """Return the address family and address to listen on. Raises OSError for a name without an
    address."""
    kind = socket.SOCK_STREAM
    try:
        found = socket.getaddrinfo(host, port, type=kind, flags=socket.AI_PASSIVE)
    except UnicodeError as error:  # an empty label, or one that is too long
        raise socket.gaierror(socket.EAI_NONAME, f"not a host's name: {error}") from error
    known = [
        (family, address)
        for family, _, _, _, address in found
        if family in (socket.AF_INET, socket.AF_INET6)
    ]
    if not known:
        raise socket.gaierror(socket.EAI_NONAME, "no address of IPv4 or IPv6")
    family, address = min(known, key=lambda one: one[0] != socket.AF_INET)
    return family, _as_address(address)


async def addresses_of(host: str) -> list[str]:
    """Return all IP addresses of a host, each once; an address is its own. Raises OSError for a
    name without an address."""
    try:
        return [str(ipaddress.ip_address(host))]
    except ValueError:
        pass
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except UnicodeError as error:  # an empty label, or one that is too long
        raise socket.gaierror(socket.EAI_NONAME, f"not a host's name: {error}") from error
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def open_socket(host: str, port: int) -> tuple[socket.socket, SocketAddress]:
    """Return a TCP socket and the address to bind it to. `::` accepts IPv4 too, independent of
    the system's default. Raises OSError."""
    family, address = resolve(host, port)
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    if family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, address[0] != "::")
    return sock, address


def bracketed(host: str) -> str:
    """Return the host as URLs and endpoints write it: an IPv6 address in brackets."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def advertised(host: str) -> str:
    """Return the host that peers connect to: this machine's name for a wildcard, else `host`."""
    return socket.getfqdn() if host in WILDCARDS else host


def port_of(url: str) -> int:
    """Return the port of an http:// or https:// URL. Raises ValueError for one that is no port."""
    parts = urlsplit(url)
    return parts.port or (443 if parts.scheme == "https" else 80)


def split_endpoint(endpoint: str) -> tuple[str, str]:
    """Return the host, without brackets, and the port of `tcp://host:port`."""
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    return host.removeprefix("[").removesuffix("]"), port


def numeric_endpoint(endpoint: str) -> str:
    """Return a ZeroMQ endpoint to listen on, with the host's name replaced by its address. A host
    that does not resolve (an interface's name, `*`) is kept."""
    if not endpoint.startswith("tcp://"):
        return endpoint
    host, port = split_endpoint(endpoint)
    try:
        _, address = resolve(host, 0)
    except OSError:
        return endpoint
    return f"tcp://{bracketed(address[0])}:{port}"


def reachable_endpoint(endpoint: str) -> str:
    """Return the endpoint that peers connect to: a wildcard becomes this machine's name."""
    host, port = split_endpoint(endpoint)
    return f"tcp://{bracketed(advertised(host))}:{port}" if host in WILDCARDS else endpoint


def is_loopback(host: str) -> bool:
    """Return whether a host is `localhost` or a loopback address, with or without brackets."""
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return address.is_loopback


def _as_address(address: tuple[object, ...]) -> SocketAddress:
    match address:
        case (str(host), int(port)):
            return host, port
        case (str(host), int(port), int(flow), int(scope)):
            return host, port, flow, scope
    raise OSError(f"{address} is no address of TCP")  # pragma: no cover


def free_port(host: str = "127.0.0.1") -> int:
    """Return a port that nobody listens on, for a program that takes no port 0.

    It is below those that Linux gives to connections, so none takes it before the program listens.
    Raises OSError.
    """
    for port in random.SystemRandom().sample(_FREE_PORTS, 100):
        family, address = resolve(host, port)
        with socket.socket(family) as sock, suppress(OSError):
            sock.bind(address)
            return port
    raise OSError(errno.EADDRINUSE, f"no free port at {host}")

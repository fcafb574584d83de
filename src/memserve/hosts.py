"""Hosts to listen on: addresses of IPv4 and IPv6, names that have either, and wildcards.

A name is resolved here for sockets of the kernel and of ZeroMQ alike (ZeroMQ resolves none to
listen on). Where it has both kinds of address, it is IPv4's, as clients try that one, too.
"""

from __future__ import annotations

import ipaddress
import socket

WILDCARDS = ("0.0.0.0", "::")

# What `getaddrinfo` says of an address, and sockets take: host and port, and for IPv6 more.
SocketAddress = tuple[str, int] | tuple[str, int, int, int]


def resolve(host: str, port: int) -> tuple[socket.AddressFamily, SocketAddress]:
    """Where to listen. Raises OSError for a name that has no address."""
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


def open_socket(host: str, port: int) -> tuple[socket.socket, SocketAddress]:
    """A socket of TCP and the address to bind it to. `::` is for IPv4, too, whatever the system's
    default is. Raises OSError."""
    family, address = resolve(host, port)
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    if family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, address[0] != "::")
    return sock, address


def bracketed(host: str) -> str:
    """The host as URLs and endpoints have it."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def advertised(host: str) -> str:
    """The host that others are told; this machine's name for a wildcard."""
    return socket.getfqdn() if host in WILDCARDS else host


def split_endpoint(endpoint: str) -> tuple[str, str]:
    """Host, without brackets, and port of `tcp://host:port`."""
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    return host.removeprefix("[").removesuffix("]"), port


def numeric_endpoint(endpoint: str) -> str:
    """An endpoint of ZeroMQ to listen on, with an address in place of a host's name. What is no
    such name (an interface's, `*`) stays."""
    if not endpoint.startswith("tcp://"):
        return endpoint
    host, port = split_endpoint(endpoint)
    try:
        _, address = resolve(host, 0)
    except OSError:
        return endpoint
    return f"tcp://{bracketed(address[0])}:{port}"


def reachable_endpoint(endpoint: str) -> str:
    """An endpoint as peers are told it: a wildcard is no place to connect to."""
    host, port = split_endpoint(endpoint)
    return f"tcp://{bracketed(advertised(host))}:{port}" if host in WILDCARDS else endpoint


def is_loopback(host: str) -> bool:
    """Whether an address, in brackets or not, or `localhost`, can be reached from this machine
    alone."""
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

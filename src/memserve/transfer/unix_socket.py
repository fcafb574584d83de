"""`UnixSocket`: datagrams between the pools of one host.

ZeroMQ passes every message through a thread of its own on both sides: four more thread switches for
each request and reply. A datagram goes from the sending thread to the receiving one. The kernel
neither loses nor reorders them; messages that do not fit go through ZeroMQ.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path

from memserve.pool.segment import SHM_DIRECTORY, is_segment_name, new_name

# Within a socket's default buffer; room for a prompt of 25,000 tokens.
DATAGRAM_BYTES = 128 * 1024


@dataclass(frozen=True, slots=True)
class UnixAddress:
    """Path of a pool's Unix socket on this host."""

    address: str


class UnixSocket:
    """One pool's socket, in the directory and with the permissions of its segments."""

    def __init__(self) -> None:
        self.address = ""
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.setblocking(False)
        os.fchmod(self.socket.fileno(), 0o600)  # the name that `bind` makes inherits it
        path = str(SHM_DIRECTORY / new_name())
        try:
            self.socket.bind(path)
        except OSError:  # no such directory, or no permission: TCP remains
            return
        self.address = path

    def fileno(self) -> int:
        return self.socket.fileno()

    def send(self, to: UnixAddress, frames: list[bytes]) -> bool:
        """Send a message; return False if it is too large, or the receiver has gone or is full."""
        if sum(map(len, frames)) > DATAGRAM_BYTES:
            return False
        try:
            self.socket.sendmsg(frames, (), 0, to.address)
        except OSError:
            return False
        return True

    def receive(self) -> tuple[bytes, UnixAddress] | None:
        """Return the next message and its sender's address, which the kernel reports; None if there
        is no message. The address is empty if it is not a pool's."""
        try:
            data, _, _, sender = self.socket.recvmsg(DATAGRAM_BYTES)
        except OSError:
            return None
        known = isinstance(sender, str) and is_unix_socket(sender)
        return data, UnixAddress(sender if known else "")

    def close(self) -> None:
        self.socket.close()
        if self.address:
            Path(self.address).unlink(missing_ok=True)


def is_unix_socket(address: str) -> bool:
    """Return whether a path from a peer names a pool's Unix socket, and no other file."""
    directory, _, name = address.rpartition("/")
    return directory == str(SHM_DIRECTORY) and is_segment_name(name)

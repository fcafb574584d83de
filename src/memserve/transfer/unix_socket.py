"""Datagrams between the pools of one host.

ZeroMQ hands every message to a thread of its own, on both sides: four thread switches more for
each question and answer. A datagram goes from the thread that says it to the one that hears it.
The kernel neither loses nor reorders them; where one does not fit, another way is taken.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path

from memserve.pool.segment import SHM_DIRECTORY, is_segment_name, new_name

# What fits into a socket's buffer of the usual size: a prompt of 25,000 tokens.
DATAGRAM_BYTES = 128 * 1024


@dataclass(frozen=True, slots=True)
class UnixAddress:
    """The socket of a pool of this host."""

    address: str


class UnixSocket:
    """One pool's socket. It lies beside the segments, and who may open those may write to it."""

    def __init__(self) -> None:
        self.address = ""
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.setblocking(False)
        os.fchmod(self.socket.fileno(), 0o600)  # the name that `bind` makes inherits it
        path = str(SHM_DIRECTORY / new_name())
        try:
            self.socket.bind(path)
        except OSError:  # no such directory, or no right to it: there is TCP
            return
        self.address = path

    def fileno(self) -> int:
        return self.socket.fileno()

    def send(self, to: UnixAddress, frames: list[bytes]) -> bool:
        """Whether it will arrive: False where it is too large, or the other is not there, or
        does not listen at present."""
        if sum(map(len, frames)) > DATAGRAM_BYTES:
            return False
        try:
            self.socket.sendmsg(frames, (), 0, to.address)
        except OSError:
            return False
        return True

    def receive(self) -> tuple[bytes, UnixAddress] | None:
        """The next message; None if there is none now. The kernel says whose socket it came
        from; of one that is no pool's, the address is empty."""
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
    """Whether it looks like one; it came over a wire and must not lead anywhere else."""
    directory, _, name = address.rpartition("/")
    return directory == str(SHM_DIRECTORY) and is_segment_name(name)

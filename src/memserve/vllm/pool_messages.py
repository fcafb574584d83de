"""Messages between an instance and the pool inside its vLLM server, on a Unix socket.

A frame is the length of its body, 4 bytes, big-endian, and a `Call` or a `Reply` as msgpack. The
pool answers each call once, in any order; `Cancel` has no answer. Namespaces in calls are salts.
"""

from __future__ import annotations

import os
import socket
import struct
from typing import TypeVar

import msgspec
from msgspec.structs import force_setattr

from memserve.api import msgpack
from memserve.api.handoff import PoolPeer
from memserve.api.status import PoolTotals
from memserve.config import Caching, TransferMode
from memserve.errors import TransferError
from memserve.tokens import WireTokens, token_field
from memserve.types import Namespace

HEAD_BYTES = 4
_CREDENTIALS = struct.Struct("3i")  # of SO_PEERCRED: process, user, group
MAX_FRAME_BYTES = 64 * 1024 * 1024  # most of a large frame are the tokens of a prompt

# The key under which a request at the vLLM server names an order in its `kv_transfer_params`.
PARAMETERS = "memserve"


class Serve(msgspec.Struct, frozen=True, tag=True):
    """Make the pool reachable for peers on `host`. `secret`: the cluster's, as in MEMSERVE_SECRET;
    None: this user's on this machine. Answered by `Served`."""

    host: str
    secret: str | None
    caching: Caching
    mode: TransferMode


class Count(msgspec.Struct, frozen=True, eq=False, tag=True):
    """Count the leading tokens that have KV in the pool. Answered by `Counted`."""

    tokens: WireTokens
    namespace: Namespace

    def __post_init__(self) -> None:
        force_setattr(self, "tokens", token_field(self.tokens))


class Meet(msgspec.Struct, frozen=True, tag=True):
    """Connect to a peer. Answered by `Done`."""

    peer: PoolPeer


class Reach(msgspec.Struct, frozen=True, tag=True):
    """Find the transport to a peer, with a round trip to it. Answered by `Reached`."""

    peer: PoolPeer


class Watch(msgspec.Struct, frozen=True, tag=True):
    """Wait until nothing may be waited for from a peer any more. Answered by `Lost`, then."""

    peer: PoolPeer


class Push(msgspec.Struct, frozen=True, eq=False, tag=True):
    """Send a peer the KV of these tokens that it lacks. Ends `order` (0: none), whose blocks
    `PushDone`, the answer, includes."""

    peer: PoolPeer
    tokens: WireTokens
    source: Namespace
    target: Namespace
    order: int = 0

    def __post_init__(self) -> None:
        force_setattr(self, "tokens", token_field(self.tokens))


class Order(msgspec.Struct, frozen=True, eq=False, tag=True):
    """From now on, send a peer the KV of these tokens as a request that names this order computes
    it. Answered by `Done`, as soon as the peer is connected."""

    order: int
    peer: PoolPeer
    tokens: WireTokens
    source: Namespace
    target: Namespace

    def __post_init__(self) -> None:
        force_setattr(self, "tokens", token_field(self.tokens))


class Withdraw(msgspec.Struct, frozen=True, tag=True):
    """End an order, and cancel its push. Answered by `Done`."""

    order: int


class Forget(msgspec.Struct, frozen=True, tag=True):
    """Drop all KV of a namespace. Answered by `Done`."""

    namespace: Namespace


class ReadTotals(msgspec.Struct, frozen=True, tag=True):
    """Count the pool's blocks. Answered by `Totals`."""


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """Cancel the call `number`. Has no answer, and the cancelled call gets none."""

    number: int


Said = Serve | Count | Meet | Reach | Watch | Push | Order | Withdraw | Forget | ReadTotals | Cancel


class Call(msgspec.Struct, frozen=True):
    number: int
    said: Said


class Served(msgspec.Struct, frozen=True, tag=True):
    """The pool's instance, its address for peers, and its layout."""

    instance: str
    address: str
    kv: str  # `KVLink.kv`
    block_bytes: int
    block_tokens: int


class Counted(msgspec.Struct, frozen=True, tag=True):
    tokens: int


class Reached(msgspec.Struct, frozen=True, tag=True):
    """`transport`: name of the transport to the peer."""

    transport: str


class Lost(msgspec.Struct, frozen=True, tag=True):
    """Why a peer can no longer be waited for."""

    why: str


class PushDone(msgspec.Struct, frozen=True, tag=True):
    """Whole blocks that were sent, and that the peer had already."""

    sent: int
    already_present: int


class Totals(msgspec.Struct, frozen=True, tag=True):
    totals: PoolTotals


class Done(msgspec.Struct, frozen=True, tag=True):
    pass


class Failed(msgspec.Struct, frozen=True, tag=True):
    """A failed call. `of_pool`: by a PoolError; otherwise by a TransferError."""

    text: str
    of_pool: bool


Heard = Served | Counted | Reached | Lost | PushDone | Totals | Done | Failed


class Reply(msgspec.Struct, frozen=True):
    number: int
    heard: Heard


decode_call = msgspec.msgpack.Decoder(Call).decode
decode_reply = msgspec.msgpack.Decoder(Reply).decode

_Heard = TypeVar("_Heard", Served, Counted, Reached, Lost, PushDone, Totals, Done)


def frame(message: Call | Reply) -> bytes:
    """Return a message as a frame. Raises TransferError if it is too large."""
    body = msgpack.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise TransferError(f"a message of {len(body)} bytes to the pool of a vLLM server")
    return len(body).to_bytes(HEAD_BYTES) + body


def require_own(connection: socket.socket) -> None:
    """Raise TransferError if another user's process is on the other end."""
    data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, user, _ = _CREDENTIALS.unpack(data)
    if user != os.getuid():
        raise TransferError(f"user {user} has no business here")


def body_bytes(head: bytes) -> int:
    """Return the size of a frame's body from its head. Raises TransferError if it is too large."""
    size = int.from_bytes(head)
    if size > MAX_FRAME_BYTES:
        raise TransferError(f"a message of {size} bytes at the pool of a vLLM server")
    return size

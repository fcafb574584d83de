"""What an instance says to the pool inside its vLLM server, and what it hears: frames on a Unix
socket that this user alone can reach.

A frame is the length of what follows, 4 bytes, and a `Call` or a `Reply` as msgpack. Calls are
answered in any order, each once.
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
MAX_FRAME_BYTES = 64 * 1024 * 1024  # the tokens of a prompt are by far the most of one

# The key under which a request at the vLLM server names an order in its `kv_transfer_params`.
PARAMETERS = "memserve"


class Serve(msgspec.Struct, frozen=True, tag=True):
    """Become reachable for peers on `host`. `secret`: the cluster's, as MEMSERVE_SECRET has it;
    None: this user's on this machine. Answered by `Served`."""

    host: str
    secret: str | None
    caching: Caching
    mode: TransferMode


class Count(msgspec.Struct, frozen=True, eq=False, tag=True):
    """How many leading tokens have KV? Answered by `Counted`. Namespaces are salts here."""

    tokens: WireTokens
    namespace: Namespace

    def __post_init__(self) -> None:
        force_setattr(self, "tokens", token_field(self.tokens))


class Meet(msgspec.Struct, frozen=True, tag=True):
    """Connect to a peer. Answered by `Done`."""

    peer: PoolPeer


class Reach(msgspec.Struct, frozen=True, tag=True):
    """Find out what KV would go to a peer by. Answered by `Reached`, after a round trip there."""

    peer: PoolPeer


class Push(msgspec.Struct, frozen=True, eq=False, tag=True):
    """Give a peer what it lacks of these tokens. Answered by `PushDone`, with what the order, if
    one is named, has sent before, and which ends with this."""

    peer: PoolPeer
    tokens: WireTokens
    source: Namespace
    target: Namespace
    order: int = 0

    def __post_init__(self) -> None:
        force_setattr(self, "tokens", token_field(self.tokens))


class Order(msgspec.Struct, frozen=True, eq=False, tag=True):
    """From now on, what a request that names this order computes of these tokens goes to a peer at
    once. Answered by `Done`, as soon as the peer is met."""

    order: int
    peer: PoolPeer
    tokens: WireTokens
    source: Namespace
    target: Namespace

    def __post_init__(self) -> None:
        force_setattr(self, "tokens", token_field(self.tokens))


class Withdraw(msgspec.Struct, frozen=True, tag=True):
    """An order is not wanted any more. Answered by `Done`."""

    order: int


class Forget(msgspec.Struct, frozen=True, tag=True):
    """Drop all KV of a namespace. Answered by `Done`."""

    namespace: Namespace


class ReadTotals(msgspec.Struct, frozen=True, tag=True):
    """Answered by `Totals`."""


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """The answer to a call is not wanted any more; neither of the two is answered."""

    number: int


Said = Serve | Count | Meet | Reach | Push | Order | Withdraw | Forget | ReadTotals | Cancel


class Call(msgspec.Struct, frozen=True):
    number: int
    said: Said


class Served(msgspec.Struct, frozen=True, tag=True):
    """Whose pool it is, where it is reachable, and what it holds."""

    instance: str
    address: str
    kv: str  # `KVLink.kv`
    block_bytes: int
    block_tokens: int


class Counted(msgspec.Struct, frozen=True, tag=True):
    tokens: int


class Reached(msgspec.Struct, frozen=True, tag=True):
    """`transport`: its name."""

    transport: str


class PushDone(msgspec.Struct, frozen=True, tag=True):
    """Whole blocks."""

    sent: int
    already_present: int


class Totals(msgspec.Struct, frozen=True, tag=True):
    totals: PoolTotals


class Done(msgspec.Struct, frozen=True, tag=True):
    pass


class Failed(msgspec.Struct, frozen=True, tag=True):
    """`of_pool`: a PoolError; otherwise a TransferError."""

    text: str
    of_pool: bool


Heard = Served | Counted | Reached | PushDone | Totals | Done | Failed


class Reply(msgspec.Struct, frozen=True):
    number: int
    heard: Heard


decode_call = msgspec.msgpack.Decoder(Call).decode
decode_reply = msgspec.msgpack.Decoder(Reply).decode

_Heard = TypeVar("_Heard", Served, Counted, Reached, PushDone, Totals, Done)


def frame(message: Call | Reply) -> bytes:
    """Raises TransferError for one that is too large."""
    body = msgpack.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise TransferError(f"a message of {len(body)} bytes to the pool of a vLLM server")
    return len(body).to_bytes(HEAD_BYTES) + body


def require_own(connection: socket.socket) -> None:
    """Raises TransferError where another user's process is on the other end."""
    data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, user, _ = _CREDENTIALS.unpack(data)
    if user != os.getuid():
        raise TransferError(f"user {user} has no business here")


def body_bytes(head: bytes) -> int:
    """How much follows a frame's head. Raises TransferError for more than is ever sent."""
    size = int.from_bytes(head)
    if size > MAX_FRAME_BYTES:
        raise TransferError(f"a message of {size} bytes at the pool of a vLLM server")
    return size

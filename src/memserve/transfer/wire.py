"""Frames between pools: a fixed header that is checked before anything is decoded.

A message is two frames. The header holds magic, protocol version, kind, and two fingerprints: of
the sender's layout, and of the layout without placement (`conversion.meaning`). Its format is the
same in every version, so that any two pools can report why they exchange no KV. The body is a
msgpack envelope.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from enum import IntEnum
from typing import Annotated

import msgspec
from msgspec import Meta

from memserve.errors import MemserveError, TransferError
from memserve.pool.layout import KVLayout
from memserve.pool.segment import MAX_NAME, is_segment_name
from memserve.transfer.base import Natural, PoolRegions
from memserve.transfer.conversion import meaning
from memserve.transfer.host import ProcessTag
from memserve.transfer.messages import MAX_TEXT, Failure, SessionMessage
from memserve.transfer.unix_socket import is_unix_socket
from memserve.types import MAX_BLOCKS, Epoch, InstanceId, Medium, Owner

PROTOCOL_VERSION = 2
# The largest messages carry a prompt: a million tokens and their references take 4.5 MiB.
MAX_MESSAGE_BYTES = 8 * 1024 * 1024
# Bytes of a transport's description: some 200 for each segment with NIXL.
MAX_DESCRIPTION = 4 * 1024 * 1024
# Maximum of characters of a `Malformed` error's text.
_MAX_COMPLAINT = 256

_HEADER = struct.Struct("!4sHH32s32s")
HEADER_BYTES = _HEADER.size
_MAGIC = b"MSKV"


class Kind(IntEnum):
    MESSAGE = 0
    REFUSAL = 1  # with an empty body: the header tells version and layout of the sender


class Offer(msgspec.Struct, frozen=True, array_like=True):
    """A transport of the sender, and the description that `add_peer` takes."""

    transport: Annotated[str, Meta(max_length=32)]
    description: Annotated[bytes, Meta(max_length=MAX_DESCRIPTION)]


class Hello(msgspec.Struct, frozen=True, array_like=True, tag=32):
    """Introduction of a life: its process, memory and transports. Sent again when these change."""

    answer: bool  # whether a Hello is wanted in return
    process: ProcessTag
    memory: PoolRegions
    offers: Annotated[tuple[Offer, ...], Meta(max_length=8)]
    # Path of its Unix socket, for peers of the same host; empty: it has none.
    unix_socket: Annotated[str, Meta(max_length=MAX_NAME + len("/dev/shm/"))] = ""
    edition: Natural = 0  # grows with every Hello whose contents changed


class Beat(msgspec.Struct, frozen=True, array_like=True, tag=33):
    """The sender lives. `answer`: whether a Beat is wanted in return."""

    answer: bool
    stalled: bool = False  # the process that owns the pool serves no calls at present


class Bye(msgspec.Struct, frozen=True, array_like=True, tag=34):
    """The sender's life ends, and all of its writes have drained."""


class FreeBlocks(msgspec.Struct, frozen=True, array_like=True, tag=35):
    """Free blocks of the receiver. Repeated until answered; `call` identifies copies."""

    call: Natural
    wire_refs: bytes


class FreedBlocks(msgspec.Struct, frozen=True, array_like=True, tag=36):
    call: Natural
    failure: Failure | None = None


class NotWelcome(msgspec.Struct, frozen=True, array_like=True, tag=37):
    """Refusal of a Hello, with the reason."""

    reason: Failure


Message = SessionMessage | Hello | Beat | Bye | FreeBlocks | FreedBlocks | NotWelcome


class Envelope(msgspec.Struct, frozen=True, array_like=True):
    """`receiver`: epoch of the addressed life; 0 in a Hello to any life."""

    instance: Annotated[str, Meta(min_length=1, max_length=256)]
    epoch: Natural
    receiver: Natural
    message: Message

    @property
    def sender(self) -> Owner:
        return Owner(InstanceId(self.instance), Epoch(self.epoch))


class Malformed(Exception):
    """Frames that are no message of a pool."""


class Mismatch(Exception):
    """Frames of another protocol version, or of a pool with another model or KV format."""

    def __init__(self, version: int, fingerprint: bytes, kind: Kind) -> None:
        super().__init__(version, fingerprint)
        self.version = version
        self.fingerprint = fingerprint
        self.kind = kind


# Errors of decoding: msgspec's own, and those for text that is not UTF-8, unlimited nesting,
# numbers beyond int64, and layouts that KVLayout refuses.
_UNDECODABLE = (
    msgspec.MsgspecError,
    ValueError,
    RecursionError,
    OverflowError,
    MemoryError,
    MemserveError,
)

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Envelope)


def require_sendable(namespace: str, token_bytes: int) -> None:
    """Raise TransferError for a namespace or tokens that fit into no message."""
    try:
        size = len(namespace.encode())
    except UnicodeEncodeError as error:
        raise TransferError(f"UTF-8 cannot encode the namespace: {error.reason}") from error
    if size > MAX_TEXT:
        raise TransferError(f"the namespace has {size} bytes; at most {MAX_TEXT} can be sent")
    if token_bytes > MAX_MESSAGE_BYTES // 2:  # the rest is for references
        raise TransferError(f"{token_bytes // 4} tokens do not fit into one message")


def header(layout: KVLayout, kind: Kind = Kind.MESSAGE) -> bytes:
    """Return the header frame of a pool with this layout."""
    fingerprints = bytes.fromhex(layout.fingerprint), meaning(layout)
    return _HEADER.pack(_MAGIC, PROTOCOL_VERSION, kind, *fingerprints)


def encode(sender: Owner, receiver: Epoch, message: Message) -> bytes:
    return _encoder.encode(Envelope(sender.instance, sender.epoch, receiver, message))


def decode(frames: Sequence[bytes], wanted: bytes) -> Envelope:
    """Return the envelope in two frames. `wanted`: the sender's layout must have this
    `conversion.meaning`. Raises Malformed; Mismatch, before the body is decoded."""
    if len(frames) != 2 or len(frames[0]) != _HEADER.size:
        raise Malformed(f"{len(frames)} frames of {[len(frame) for frame in frames]} bytes")
    magic, version, kind, fingerprint, theirs = _HEADER.unpack(frames[0])
    if magic != _MAGIC or kind not in (Kind.MESSAGE, Kind.REFUSAL):
        raise Malformed(f"header {frames[0].hex()}")
    if version != PROTOCOL_VERSION or theirs != wanted or kind == Kind.REFUSAL:
        raise Mismatch(version, fingerprint, Kind(kind))
    try:
        envelope = _decoder.decode(frames[1])
        if isinstance(envelope.message, Hello):
            _require_possible(envelope.message, wanted)
    except _UNDECODABLE as error:
        raise Malformed(str(error)[:_MAX_COMPLAINT]) from error
    return envelope


def _require_possible(hello: Hello, wanted: bytes) -> None:
    """Raise ValueError for a Hello of valid types and impossible values."""
    layout, regions = hello.memory.layout, hello.memory.regions
    if meaning(layout) != wanted:
        raise ValueError("the layout does not match the header")
    if hello.unix_socket and not is_unix_socket(hello.unix_socket):
        raise ValueError("the Unix socket's path is not a pool's")
    ends = dict.fromkeys(Medium, 0)
    for region in sorted(regions, key=lambda each: each.first_block):
        if region.first_block < ends[region.medium] or region.end > MAX_BLOCKS:
            raise ValueError(
                f"blocks {region.first_block} to {region.end} overlap, or are too many"
            )
        ends[region.medium] = region.end
        if region.nbytes != region.blocks * layout.block_bytes:
            raise ValueError(f"{region.nbytes} bytes for {region.blocks} blocks")
        if region.address + region.nbytes >= 2**63:
            raise ValueError("a region ends beyond 2^63")
        if region.segment is not None and not is_segment_name(region.segment):
            raise ValueError("invalid name of a segment")

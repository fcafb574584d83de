"""Frames between pools: a fixed header that is checked before anything is decoded.

A message is two frames. The header is magic, protocol version, kind, and the fingerprints of
the sender's layout and of what its bytes mean wherever they lie; it stays as it is in every
version, so that any two can tell each other why they do not talk. The body is a msgpack
envelope.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from enum import IntEnum
from typing import Annotated

import msgspec
from msgspec import Meta

from memserve.pool.layout import KVLayout
from memserve.transfer.base import PoolRegions
from memserve.transfer.conversion import meaning
from memserve.transfer.messages import Failure, SessionMessage
from memserve.transfer.process import ProcessTag
from memserve.types import Epoch, InstanceId, Owner

PROTOCOL_VERSION = 2
# The largest messages carry a prompt: a million tokens and their references take 4.5 MiB.
MAX_MESSAGE_BYTES = 16 * 1024 * 1024

_HEADER = struct.Struct("!4sHH32s32s")
HEADER_BYTES = _HEADER.size
_MAGIC = b"MSKV"


class Kind(IntEnum):
    MESSAGE = 0
    REFUSAL = 1  # an empty body: the header says what the sender is


class Offer(msgspec.Struct, frozen=True, array_like=True):
    """A transport that the sender has, and what its `add_peer` wants to know."""

    transport: str
    description: bytes


class Hello(msgspec.Struct, frozen=True, array_like=True, tag=32):
    """Who the sender is and where its memory is; again whenever that changes."""

    answer: bool  # whether one is wanted
    process: ProcessTag
    memory: PoolRegions
    offers: tuple[Offer, ...]
    shortcut: str = ""  # where peers of the same host may send to, too
    edition: int = 0  # grows with every change of what a life says of itself


class Beat(msgspec.Struct, frozen=True, array_like=True, tag=33):
    """The sender lives."""

    answer: bool


class Bye(msgspec.Struct, frozen=True, array_like=True, tag=34):
    """The sender's life ends, and nothing that it wrote is on its way any more."""


class FreeBlocks(msgspec.Struct, frozen=True, array_like=True, tag=35):
    """Free blocks of the receiver. Repeated until answered; `call` tells copies apart."""

    call: Annotated[int, Meta(ge=0)]
    words: bytes


class FreedBlocks(msgspec.Struct, frozen=True, array_like=True, tag=36):
    call: int
    failure: Failure | None = None


Message = SessionMessage | Hello | Beat | Bye | FreeBlocks | FreedBlocks


class Envelope(msgspec.Struct, frozen=True, array_like=True):
    """`receiver`: the life that is meant; 0 in a Hello to whoever is there."""

    instance: Annotated[str, Meta(min_length=1, max_length=256)]
    epoch: Annotated[int, Meta(ge=0)]
    receiver: int
    message: Message

    @property
    def sender(self) -> Owner:
        return Owner(InstanceId(self.instance), Epoch(self.epoch))


class Malformed(Exception):
    """Frames that no pool sends."""


class Mismatch(Exception):
    """Frames of another protocol version, or of KV that means something else."""

    def __init__(self, version: int, fingerprint: bytes, kind: Kind) -> None:
        super().__init__(version, fingerprint)
        self.version = version
        self.fingerprint = fingerprint
        self.kind = kind


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Envelope)


def header(layout: KVLayout, kind: Kind = Kind.MESSAGE) -> bytes:
    """`layout`: of the sender's pool."""
    fingerprints = bytes.fromhex(layout.fingerprint), meaning(layout)
    return _HEADER.pack(_MAGIC, PROTOCOL_VERSION, kind, *fingerprints)


def encode(sender: Owner, receiver: Epoch, message: Message) -> bytes:
    return _encoder.encode(Envelope(sender.instance, sender.epoch, receiver, message))


def decode(frames: Sequence[bytes], wanted: bytes) -> Envelope:
    """`wanted`: what the sender's bytes must mean. Raises Malformed; Mismatch, before it has
    looked at the body."""
    if len(frames) != 2 or len(frames[0]) != _HEADER.size:
        raise Malformed(f"{len(frames)} frames of {[len(frame) for frame in frames]} bytes")
    magic, version, kind, fingerprint, theirs = _HEADER.unpack(frames[0])
    if magic != _MAGIC or kind not in (Kind.MESSAGE, Kind.REFUSAL):
        raise Malformed(f"header {frames[0].hex()}")
    if version != PROTOCOL_VERSION or theirs != wanted or kind == Kind.REFUSAL:
        raise Mismatch(version, fingerprint, Kind(kind))
    try:
        return _decoder.decode(frames[1])
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise Malformed(str(error)) from error

"""KV events on the wire: what an instance's cache holds, as it changes.

Batches, events and the sockets' frames are vLLM's (0.32): `[topic, sequence as 8 bytes
big-endian, msgpack]` on a PUB socket; on the replay socket a request is `[b"", first sequence]`
and the answers `[b"", topic, sequence, msgpack]`, the last with sequence -1. A snapshot, which
vLLM has not, is ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import msgspec
import numpy as np
from msgspec import Meta

from memserve.api.namespaces import salt_of, salted
from memserve.tokens import from_wire
from memserve.types import Epoch, InstanceId, Namespace, TokenArray

SNAPSHOT_PATH = "/kv/snapshot"
SEQUENCE_BYTES = 8
END_OF_REPLAY = (-1).to_bytes(SEQUENCE_BYTES, "big", signed=True)
# An idle publisher says so this often, with an empty batch: a subscriber that has missed the
# last ones before finds out.
BEAT_SECONDS = 1.0
# What sockets take. A batch is cut at MAX_BATCH_ITEMS tokens and hashes, of up to 9 bytes each,
# or at the first run above it: a prompt of millions of tokens. A larger message ends the
# connection before it is in memory. Subscriptions and requests for replay are a topic and a
# number; a CURVE handshake's messages are less than 500 bytes.
MAX_BATCH_ITEMS = 1_000_000
MAX_BATCH_BYTES = 64 * 1024 * 1024
MAX_REQUEST_BYTES = 1024
MAX_SEQUENCE = (1 << 63) - 1
# A topic is an id, an epoch and what joins them. libzmq crashes on one of a megabyte.
MAX_TOPIC = 320
MAX_NAMESPACE = 4096  # of blocks: a salt (1 KiB at most in requests), or what others have

BlockHash = int | bytes
# A salt or the name of an adapter (str), or what stands for an image (its identifier and offset)
# or for embeddings (bytes): msgspec knows no union of str and bytes.
ExtraKey = Any

_NAMESPACE = "namespace"  # an extra key of ours, for namespaces that are no salts


class KVEvent(msgspec.Struct, omit_defaults=True, tag=True):
    """A map with its type in `type`."""


class BlockStored(KVEvent):
    """Consecutive blocks of one prompt. Our instances' hashes are ints that name a block's
    life within the life of the instance."""

    block_hashes: list[BlockHash]
    parent_block_hash: BlockHash | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None  # always sent, as the next two: vLLM's own type has no defaults for them
    medium: str | None
    lora_name: str | None
    extra_keys: list[tuple[ExtraKey, ...] | None] | None = None  # of each block
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    kv_cache_spec_sliding_window: int | None = None
    locality: str | None = None
    ownership: str | None = None
    session_id: str | None = None


class BlockRemoved(KVEvent):
    block_hashes: list[BlockHash]
    medium: str | None
    group_idx: int | None = None
    locality: str | None = None
    ownership: str | None = None


class AllBlocksCleared(KVEvent):
    """Nothing is held any more."""


class EventBatch(msgspec.Struct, array_like=True, omit_defaults=True):
    """`ts`: wall-clock seconds when it was made."""

    ts: float
    events: list[BlockStored | BlockRemoved | AllBlocksCleared]
    data_parallel_rank: int | None = None


# tcp, a host or what stands for all of a machine's addresses, a port: nothing else is connected
# to, as no file (ipc) and nothing of this process's own (inproc).
TcpEndpoint = Annotated[
    str, Meta(pattern=r"^tcp://(\*|[A-Za-z0-9._-]{1,253}|\[[0-9A-Za-z:.%]{2,64}\]):[0-9]{1,5}\Z")
]
Topic = Annotated[str, Meta(pattern=rf"^[!-~]{{0,{MAX_TOPIC}}}\Z")]  # ASCII: bytes are characters
BlockTokens = Annotated[int, Meta(ge=1, le=1 << 20)]


class KVEventsInfo(msgspec.Struct, frozen=True):
    """Where an instance's events come from; part of `GET /info`."""

    endpoint: TcpEndpoint  # of the PUB socket
    replay_endpoint: TcpEndpoint  # of the ROUTER socket
    topic: Topic
    block_tokens: BlockTokens
    secured: bool = False  # CURVE, with the cluster's secret
    snapshot: bool = True  # `GET /kv/snapshot` has all that is held; else a replay must do


class StoredBlocks(msgspec.Struct, array_like=True, frozen=True):
    """Consecutive blocks of one prompt in a snapshot; a hundredth of the work of lists."""

    namespace: Namespace
    parent: int | None
    blocks: bytes  # little-endian int64 [n]
    tokens: bytes  # little-endian int32 [n * block_tokens]

    @property
    def hashes(self) -> list[BlockHash]:
        found: list[BlockHash] = np.frombuffer(self.blocks, "<i8").tolist()
        return found

    @property
    def token_array(self) -> TokenArray:
        return from_wire(self.tokens)


class KVSnapshot(msgspec.Struct, frozen=True):
    """`GET /kv/snapshot`: all that was held after the batch of this sequence, parents first."""

    instance: InstanceId
    epoch: Epoch
    sequence: Annotated[int, Meta(ge=-1, le=MAX_SEQUENCE)]
    block_tokens: BlockTokens
    blocks: list[StoredBlocks]


_batches = msgspec.msgpack.Decoder(EventBatch)


class MalformedEvents(ValueError):
    """What came is no batch of events."""


class Batch(NamedTuple):
    """A batch as it came: its place in the order, and what it says."""

    topic: bytes
    sequence: int
    events: EventBatch


def decode_frames(frames: Sequence[bytes]) -> Batch:
    """The one reading of what comes from a publisher, live or as a replay. Raises
    MalformedEvents, whatever it is."""
    if not 2 <= len(frames) <= 4 or len(frames[-2]) != SEQUENCE_BYTES:
        raise MalformedEvents(f"{len(frames)} frames")
    sequence = int.from_bytes(frames[-2], "big")
    if sequence > MAX_SEQUENCE:
        raise MalformedEvents(f"a sequence number of {sequence}")
    return Batch(frames[-3] if len(frames) > 2 else b"", sequence, decode_batch(frames[-1]))


def decode_batch(payload: bytes) -> EventBatch:
    """Raises MalformedEvents."""
    try:
        batch = _batches.decode(payload)
    # Wrong UTF-8 is a ValueError, nesting a RecursionError: extra keys may be anything.
    except (msgspec.MsgspecError, ValueError, RecursionError, OverflowError) as error:
        raise MalformedEvents(str(error)) from error
    if not math.isfinite(batch.ts):
        raise MalformedEvents("made at no time")
    return batch


def topic_of(instance: InstanceId, epoch: Epoch) -> str:
    """Of one life: what another one says, from the same port, is never mistaken for it."""
    return f"kv@{instance}@{epoch}"


def extra_keys(namespace: Namespace, blocks: int) -> list[tuple[ExtraKey, ...] | None] | None:
    """Of the first blocks of a prompt, as vLLM has them of a `cache_salt`."""
    if not namespace:
        return None
    salt = salt_of(namespace)
    key: ExtraKey = salt or (_NAMESPACE, namespace)
    return [(key,), *[None] * (blocks - 1)]


def namespace_of(event: BlockStored) -> Namespace:
    """Of blocks that begin a prompt."""
    keys = (event.extra_keys[0] if event.extra_keys else None) or ()
    salt: Namespace | None = None
    for key in keys:
        if _is_namespace(key):
            salt = Namespace(str(key[1]))
        elif isinstance(key, str) and key != event.lora_name:
            salt = salted(key)
    if event.lora_name is None:
        return salted(None) if salt is None else salt
    return Namespace(f"lora:{event.lora_name}:{salt or ''}")


def text_blocks(event: BlockStored) -> int:
    """How many of the blocks are known by their tokens alone: up to the first with an image."""
    for at, keys in enumerate(event.extra_keys or ()):
        if any(_is_media(key) for key in keys or ()):
            return at
    return len(event.block_hashes)


def _is_media(key: ExtraKey) -> bool:
    """Neither a salt nor the name of an adapter: tokens stand for something else."""
    return not isinstance(key, str) and not _is_namespace(key)


def _is_namespace(key: ExtraKey) -> bool:
    pair = isinstance(key, list | tuple) and len(key) == 2
    return pair and key[0] == _NAMESPACE and isinstance(key[1], str)

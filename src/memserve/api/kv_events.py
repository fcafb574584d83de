"""KV events on the wire: changes of an instance's cached blocks.

Batches, events and the sockets' frames are vLLM's (0.32): `[topic, sequence as 8 bytes
big-endian, msgpack]` on a PUB socket; on the replay socket a request is `[b"", first sequence]`
and the answers `[b"", topic, sequence, msgpack]`, the last with sequence -1. The snapshot is an
extension that vLLM does not have.
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
# Between the empty batches of an idle publisher: a subscriber that has missed the last batch sees
# a gap in the sequence numbers.
BEAT_SECONDS = 1.0
# Message limits of the sockets. A batch is cut at MAX_BATCH_ITEMS tokens and hashes, of up to 9
# bytes each, or at the first run above it: a prompt of millions of tokens. A larger message ends
# the connection before it is in memory. Subscriptions and requests for replay are a topic and a
# number; a CURVE handshake's messages are less than 500 bytes.
MAX_BATCH_ITEMS = 1_000_000
MAX_BATCH_BYTES = 64 * 1024 * 1024
MAX_REQUEST_BYTES = 1024
MAX_SEQUENCE = (1 << 63) - 1
# Bytes of a topic (`topic_of`): an id, an epoch and separators. libzmq crashes on one of 1 MB.
MAX_TOPIC = 320
MAX_NAMESPACE = 4096  # of blocks: a salt (1 KiB at most in requests), or another server's keys

BlockHash = int | bytes
# A salt or an adapter's name (str), an image's identifier and offset (pair), or a digest of
# embeddings (bytes). Any, since msgspec has no union of str and bytes.
ExtraKey = Any

_NAMESPACE = "namespace"  # begins our extra key for a namespace without a salt


class KVEvent(msgspec.Struct, omit_defaults=True, tag=True):
    """Base of events: a msgpack map with the event's class name in `type`."""


class BlockStored(KVEvent):
    """Consecutive blocks of one prompt were cached. Hashes of memserve's own instances are ints,
    each unique for one use of a block within one life of the instance."""

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
    """The cache is empty."""


class EventBatch(msgspec.Struct, array_like=True, omit_defaults=True):
    """Events in their order. `ts`: wall-clock seconds at which the batch was made."""

    ts: float
    events: list[BlockStored | BlockRemoved | AllBlocksCleared]
    data_parallel_rank: int | None = None


# tcp, with a host or wildcard, and a port: no file (ipc), and nothing in this process (inproc).
TcpEndpoint = Annotated[
    str, Meta(pattern=r"^tcp://(\*|[A-Za-z0-9._-]{1,253}|\[[0-9A-Za-z:.%]{2,64}\]):[0-9]{1,5}\Z")
]
Topic = Annotated[str, Meta(pattern=rf"^[!-~]{{0,{MAX_TOPIC}}}\Z")]  # ASCII: bytes are characters
BlockTokens = Annotated[int, Meta(ge=1, le=1 << 20)]


class KVEventsInfo(msgspec.Struct, frozen=True):
    """Sockets and topic of an instance's KV events; part of `GET /info`."""

    endpoint: TcpEndpoint  # of the PUB socket
    replay_endpoint: TcpEndpoint  # of the ROUTER socket
    topic: Topic
    block_tokens: BlockTokens
    secured: bool = False  # CURVE, with the cluster's secret
    # `GET /kv/snapshot` has packed references, which events name blocks by; else only a replay.
    snapshot: bool = True
    # The same path has the blocks of a vLLM server, which events name by hashes.
    server_snapshot: bool = False


class StoredBlocks(msgspec.Struct, array_like=True, frozen=True):
    """Consecutive blocks of one prompt in a snapshot. Arrays take a hundredth of lists' work."""

    namespace: Namespace
    parent: int | None
    blocks: bytes  # little-endian int64 [n]
    tokens: bytes  # little-endian int32 [n * block_tokens]

    @property
    def place(self) -> None:
        """None: a packed reference tells its medium."""

    @property
    def hashes(self) -> list[BlockHash]:
        found: list[BlockHash] = np.frombuffer(self.blocks, "<i8").tolist()
        return found

    @property
    def token_array(self) -> TokenArray:
        return from_wire(self.tokens)


class ServerBlocks(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Consecutive blocks of one prompt in a vLLM server's cache. `namespace`: read only if `parent`
    is None, as they begin a prompt then."""

    namespace: Namespace
    parent: BlockHash | None
    hashes: list[BlockHash]  # [n]
    tokens: bytes  # little-endian int32 [n * block_tokens]
    place: str | None  # `place_of` their events

    @property
    def token_array(self) -> TokenArray:
        return from_wire(self.tokens)


class KVSnapshot(msgspec.Struct, frozen=True):
    """`GET /kv/snapshot`: all cached blocks after batch `sequence`, parents first.

    A memserve instance's own are in `blocks`; those of a vLLM server in `server_blocks`.
    """

    instance: InstanceId
    epoch: Epoch
    sequence: Annotated[int, Meta(ge=-1, le=MAX_SEQUENCE)]
    block_tokens: BlockTokens
    blocks: list[StoredBlocks]
    server_blocks: list[ServerBlocks] = []


_batches = msgspec.msgpack.Decoder(EventBatch)


class MalformedEvents(ValueError):
    """The bytes are not a batch of KV events."""


class Batch(NamedTuple):
    """A received batch with its topic and sequence number."""

    topic: bytes
    sequence: int
    events: EventBatch


def decode_frames(frames: Sequence[bytes]) -> Batch:
    """Return the batch of a publisher's message, live or replayed. Raises only MalformedEvents."""
    if not 2 <= len(frames) <= 4 or len(frames[-2]) != SEQUENCE_BYTES:
        raise MalformedEvents(f"{len(frames)} frames")
    sequence = int.from_bytes(frames[-2], "big")
    if sequence > MAX_SEQUENCE:
        raise MalformedEvents(f"a sequence number of {sequence}")
    return Batch(frames[-3] if len(frames) > 2 else b"", sequence, decode_batch(frames[-1]))


def decode_batch(payload: bytes) -> EventBatch:
    """Return the batch of a msgpack payload. Raises MalformedEvents."""
    try:
        batch = _batches.decode(payload)
    # Wrong UTF-8 is a ValueError, nesting a RecursionError: extra keys may be anything.
    except (msgspec.MsgspecError, ValueError, RecursionError, OverflowError) as error:
        raise MalformedEvents(str(error)) from error
    if not math.isfinite(batch.ts):
        raise MalformedEvents("made at no time")
    return batch


def topic_of(instance: InstanceId, epoch: Epoch) -> str:
    """Return the topic of one life of an instance: messages of another life have another."""
    return f"kv@{instance}@{epoch}"


def extra_keys(namespace: Namespace, blocks: int) -> list[tuple[ExtraKey, ...] | None] | None:
    """Return the extra keys of a prompt's first `blocks` blocks, with the namespace in the first,
    as vLLM does with `cache_salt`; None for the shared namespace."""
    if not namespace:
        return None
    salt = salt_of(namespace)
    key: ExtraKey = salt or (_NAMESPACE, namespace)
    return [(key,), *[None] * (blocks - 1)]


def namespace_of(event: BlockStored) -> Namespace:
    """Return the namespace of an event's blocks, which begin a prompt."""
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


# Parts of the kinds of vLLM's cache groups whose blocks are no prefixes, but a window or a state.
_NO_PREFIXES = ("sliding", "chunked", "mamba", "linear", "conv")


def holds_prefix(event: BlockStored) -> bool:
    """Return whether an event's blocks are in the instance and hold whole prefixes."""
    kind = event.kv_cache_spec_kind or ""
    if event.locality == "REMOTE" or any(part in kind for part in _NO_PREFIXES):
        return False
    return event.kv_cache_spec_sliding_window is None


def place_of(event: BlockStored | BlockRemoved) -> str | None:
    """Return the key that separates copies of one hash: medium, and cache group if it is not 0."""
    if not event.group_idx:
        return event.medium
    return f"{event.medium}/{event.group_idx}"


def text_blocks(event: BlockStored) -> int:
    """Return how many blocks, up to the first with media, are identified by tokens alone."""
    for at, keys in enumerate(event.extra_keys or ()):
        if any(_is_media(key) for key in keys or ()):
            return at
    return len(event.block_hashes)


def _is_media(key: ExtraKey) -> bool:
    """Return whether a key is of an image or embeddings, for which tokens are placeholders."""
    return not isinstance(key, str) and not _is_namespace(key)


def _is_namespace(key: ExtraKey) -> bool:
    pair = isinstance(key, list | tuple) and len(key) == 2
    return pair and key[0] == _NAMESPACE and isinstance(key[1], str)

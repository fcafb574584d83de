"""What an instance says about itself: `GET /info` and `GET /stats`."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Annotated
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

from memserve.api.handoff import PoolPeer
from memserve.api.histogram import Histogram
from memserve.api.kv_events import BlockTokens, KVEventsInfo
from memserve.api.limits import DEFAULT_MAX_WAITING
from memserve.errors import ConfigError
from memserve.logs import shown
from memserve.types import Epoch, InstanceId, Role

# Of a process of the cluster; nothing behind the port.
PeerUrl = Annotated[str, Meta(pattern=r"^https?://[A-Za-z0-9._:%\[\]-]{1,255}\Z")]


# What people and programs can write down: in a path, a label, a topic, a log line. An URL is an
# address, which a member that has not said its id goes by.
ID_PATTERN = r"\A(?!https?://)[A-Za-z0-9._:@/-]{1,256}\Z"
Id = Annotated[InstanceId, Meta(pattern=ID_PATTERN)]
LifeEpoch = Annotated[Epoch, Meta(ge=0, le=(1 << 63) - 1)]
ModelName = Annotated[str, Meta(max_length=1024)]
Name = Annotated[str, Meta(max_length=64)]  # of a dtype, a device
# Of tokens, blocks, sequences: anything above is a mistake, and would be one in what is computed
# with it. Counters have as much room as a signed number on a wire.
Size = Annotated[int, Meta(ge=1, le=1 << 40)]
Count = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
Seconds = Annotated[float, Meta(ge=0, lt=1e15)]


def check_id(text: str) -> InstanceId:
    """An id from a command line or a file. Raises ConfigError."""
    if re.search(ID_PATTERN, text) is None:
        raise ConfigError(
            f"{shown(text)!r} is no id of an instance: 1 to 256 letters, digits and . _ : @ / -"
        )
    return InstanceId(text)


class InstanceState(StrEnum):
    """`starting` -> `ready` -> `draining`; `dead` from any of them."""

    STARTING = "starting"  # loading the model; takes no requests yet
    READY = "ready"
    DRAINING = "draining"  # finishes what runs, takes nothing new
    DEAD = "dead"  # its engine has stopped, or it has not answered for too long


class MemberKind(StrEnum):
    """What computes at an instance."""

    MEMSERVE = "memserve"  # the built-in engine
    VLLM = "vllm"


class Limits(msgspec.Struct, frozen=True):
    """What requests are checked against, and what the engine runs on."""

    vocab_size: Size
    max_model_len: Size  # prompt + output tokens of the model
    pool_tokens: Size  # tokens of one sequence that HBM can hold
    max_tokens: Size  # prompt + output tokens that one sequence may have
    block_tokens: BlockTokens
    dtype: Name
    device: Name
    threads: Size
    max_running: Size = 64  # sequences per step
    mixed_batch_tokens: Size = 256  # prefilled in a step that also decodes
    max_waiting: Count = DEFAULT_MAX_WAITING  # sequences that may wait for the engine


class InstanceInfo(msgspec.Struct, frozen=True):
    id: Id
    epoch: LifeEpoch
    role: Role
    state: InstanceState
    pid: Count
    model: ModelName
    limits: Limits | None = None  # None until the model is loaded
    kv_events: KVEventsInfo | None = None  # likewise, and where there are none
    kind: MemberKind = MemberKind.MEMSERVE
    pool: bool = False  # its KV can go to other instances, and theirs to it; once it is loaded
    # What the bytes of its blocks mean, as hex: KV moves only between instances that agree.
    kv: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")] | None = None
    pool_peer: PoolPeer | None = None  # where its pool talks to others'; once it is loaded
    version: Name = ""  # of memserve; "": one that does not say it yet


class EngineTotals(msgspec.Struct, frozen=True):
    """The engine's counters since start, and what it is doing now."""

    running: Count
    waiting: Count
    steps: Count
    computed_prompt_tokens: Count
    cached_prompt_tokens: Count
    generated_tokens: Count
    preemptions: Count
    finished: Count
    cancelled: Count
    busy_seconds: Seconds


class MediumTotals(msgspec.Struct, frozen=True):
    """The blocks of one medium: total = free + active + cached + detached."""

    total: Count = 0
    free: Count = 0
    active: Count = 0  # held by running sequences
    cached: Count = 0  # held by the index
    pinned: Count = 0  # of the cached ones: being read
    detached: Count = 0  # gone from the index, still being read


class PoolTotals(msgspec.Struct, frozen=True):
    """The pool's blocks and index, and its counters since start."""

    hbm: MediumTotals = MediumTotals()
    dram: MediumTotals = MediumTotals()
    namespaces: Count = 0
    nodes: Count = 0  # of the index
    matches: Count = 0  # not released
    evictions: Count = 0  # historical blocks dropped
    swapped_out: Count = 0  # blocks, HBM to DRAM
    swapped_in: Count = 0


class Latencies(msgspec.Struct, frozen=True):
    """Of sequences, as the instance sees them: from the call's arrival."""

    first_token: Histogram = msgspec.field(default_factory=Histogram)
    inter_token: Histogram = msgspec.field(default_factory=Histogram)
    whole: Histogram = msgspec.field(default_factory=Histogram)
    # The parts of `whole`, of sequences that came to their end. Where the prompt was computed
    # elsewhere, queue and prefill are those there; transfer and fetch are counted where any were.
    queue: Histogram = msgspec.field(default_factory=Histogram)
    fetch: Histogram = msgspec.field(default_factory=Histogram)
    prefill: Histogram = msgspec.field(default_factory=Histogram)
    transfer: Histogram = msgspec.field(default_factory=Histogram)
    decode: Histogram = msgspec.field(default_factory=Histogram)


class HandoffTotals(msgspec.Struct):
    """A decode instance's dealings with prefill instances since start. Blocks are whole ones."""

    asked: Count = 0  # prefills asked for
    failed: Count = 0  # of these: not done; another was asked, or the prompt computed here
    blocks_received: Count = 0
    blocks_already_present: Count = 0  # of prompts, that were here already
    blocks_returned: Count = 0
    returns: Count = 0  # sequences whose KV went back
    returns_dropped: Count = 0  # because of pressure or failure
    prompt_tokens: Count = 0  # of prefills that were done
    cached_tokens_prefill: Count = 0  # of these, found where they were computed
    cached_tokens_decode: Count = 0  # of these, in whole blocks that were here
    queue_seconds: Seconds = 0.0
    prefill_seconds: Seconds = 0.0  # queue included
    transfer_seconds: Seconds = 0.0
    block_bytes: Count = 0  # of one block


class FetchTotals(msgspec.Struct):
    """Prefixes that third instances were asked for, and those given to others, since start."""

    asked: Count = 0
    failed: Count = 0  # of these: refused, lost, or not done in time
    blocks_received: Count = 0
    seconds: Seconds = 0.0  # waited, failures included
    pushes: Count = 0  # done for others
    pushes_failed: Count = 0
    blocks_pushed: Count = 0
    block_bytes: Count = 0  # of one block


class InstanceStats(msgspec.Struct, frozen=True):
    engine: EngineTotals
    pool: PoolTotals
    latencies: Latencies
    handoff: HandoffTotals = msgspec.field(default_factory=HandoffTotals)
    fetch: FetchTotals = msgspec.field(default_factory=FetchTotals)


class JoinRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`POST /cluster/members` on a gateway: the URL of an instance that joins, or has news.

    An instance that joins by itself also says who it is, so that it can be told if another
    one goes by its name.
    """

    address: PeerUrl
    id: Id | None = None
    epoch: LifeEpoch | None = None

    def __post_init__(self) -> None:
        check_peer_url(self.address)


def check_peer_url(address: str) -> None:
    """Raise ValueError for what looks like a `PeerUrl` and cannot be connected to."""
    parts = urlsplit(address)
    if not parts.hostname or parts.port == 0:
        raise ValueError(f"{address} names no host and port")

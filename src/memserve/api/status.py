"""What an instance says about itself: `GET /info` and `GET /stats`."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import msgspec
from msgspec import Meta

from memserve.api.histogram import Histogram
from memserve.api.kv_events import KVEventsInfo
from memserve.api.limits import DEFAULT_MAX_WAITING
from memserve.types import Epoch, InstanceId, Role

# Of a process of the cluster; nothing behind the port.
PeerUrl = Annotated[str, Meta(pattern=r"^https?://[A-Za-z0-9._:%\[\]-]{1,255}\Z")]


class InstanceState(StrEnum):
    """`starting` -> `ready` -> `draining`; `dead` from any of them."""

    STARTING = "starting"  # loading the model; takes no requests yet
    READY = "ready"
    DRAINING = "draining"  # finishes what runs, takes nothing new
    DEAD = "dead"  # its engine has stopped, or it has not answered for too long


class Limits(msgspec.Struct, frozen=True):
    """What requests are checked against, and what the engine runs on."""

    vocab_size: int
    max_model_len: int  # prompt + output tokens of the model
    pool_tokens: int  # tokens of one sequence that HBM can hold
    max_tokens: int  # prompt + output tokens that one sequence may have
    block_tokens: int
    dtype: str
    device: str
    threads: int
    max_running: int = 64  # sequences per step
    mixed_batch_tokens: int = 256  # prefilled in a step that also decodes
    max_waiting: int = DEFAULT_MAX_WAITING  # sequences that may wait for the engine


class InstanceInfo(msgspec.Struct, frozen=True):
    id: InstanceId
    epoch: Epoch
    role: Role
    state: InstanceState
    pid: int
    model: str
    limits: Limits | None = None  # None until the model is loaded
    kv_events: KVEventsInfo | None = None  # likewise, and where there are none


class EngineTotals(msgspec.Struct, frozen=True):
    """The engine's counters since start, and what it is doing now."""

    running: int
    waiting: int
    steps: int
    computed_prompt_tokens: int
    cached_prompt_tokens: int
    generated_tokens: int
    preemptions: int
    finished: int
    cancelled: int
    busy_seconds: float


class MediumTotals(msgspec.Struct, frozen=True):
    """The blocks of one medium: total = free + active + cached + orphan."""

    total: int = 0
    free: int = 0
    active: int = 0  # held by running sequences
    cached: int = 0  # held by the index
    pinned: int = 0  # of the cached ones: being read
    orphan: int = 0  # gone from the index, still being read


class PoolTotals(msgspec.Struct, frozen=True):
    """The pool's blocks and index, and its counters since start."""

    hbm: MediumTotals = MediumTotals()
    dram: MediumTotals = MediumTotals()
    namespaces: int = 0
    nodes: int = 0  # of the index
    matches: int = 0  # not released
    evictions: int = 0  # historical blocks dropped
    swapped_out: int = 0  # blocks, HBM to DRAM
    swapped_in: int = 0


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

    asked: int = 0  # prefills asked for
    failed: int = 0  # of these: not done; another was asked, or the prompt computed here
    blocks_received: int = 0
    blocks_spared: int = 0  # of prompts, that were here already
    blocks_returned: int = 0
    returns: int = 0  # sequences whose KV went back
    returns_dropped: int = 0  # because of pressure or failure
    prompt_tokens: int = 0  # of prefills that were done
    cached_tokens_prefill: int = 0  # of these, found where they were computed
    cached_tokens_decode: int = 0  # of these, in whole blocks that were here
    queue_seconds: float = 0.0
    prefill_seconds: float = 0.0  # queue included
    transfer_seconds: float = 0.0
    block_bytes: int = 0  # of one block


class FetchTotals(msgspec.Struct):
    """Prefixes that third instances were asked for, and those given to others, since start."""

    asked: int = 0
    failed: int = 0  # of these: refused, lost, or not done in time
    blocks_received: int = 0
    seconds: float = 0.0  # waited, failures included
    pushes: int = 0  # done for others
    pushes_failed: int = 0
    blocks_pushed: int = 0
    block_bytes: int = 0  # of one block


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
    id: InstanceId | None = None
    epoch: Epoch | None = None

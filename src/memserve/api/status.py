"""An instance's description and statistics: `GET /info` and `GET /stats`, or both in one."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Annotated
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

from memserve.api.generate import FinishReason
from memserve.api.handoff import PoolPeer
from memserve.api.histogram import Histogram, TokenHistogram
from memserve.api.kv_events import BlockTokens, KVEventsInfo
from memserve.api.limits import DEFAULT_MAX_WAITING
from memserve.errors import ConfigError
from memserve.logs import shown
from memserve.types import Epoch, InstanceId, Role

# URL of a process of the cluster: scheme, host and port, without a path.
PeerUrl = Annotated[str, Meta(pattern=r"^https?://[A-Za-z0-9._:%\[\]-]{1,255}\Z")]


# Instance ids are safe in a path, a metrics label, a topic and a log line. A URL is no id: it
# names a member that has not reported its id yet.
ID_PATTERN = r"\A(?!https?://)[A-Za-z0-9._:@/-]{1,256}\Z"
Id = Annotated[InstanceId, Meta(pattern=ID_PATTERN)]
LifeEpoch = Annotated[Epoch, Meta(ge=0, le=(1 << 63) - 1)]
# Instances that an instance counts moved KV by.
MAX_MOVE_PEERS = 256
MAX_LINKS = 8  # transports of a pool
ModelName = Annotated[str, Meta(max_length=1024)]
Name = Annotated[str, Meta(max_length=64)]  # of a dtype, a device, a version
# Tokens, blocks or sequences. The limit refuses absurd values before anything is computed with
# them. Counters may have any value of an int64.
Size = Annotated[int, Meta(ge=1, le=1 << 40)]
Count = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
Seconds = Annotated[float, Meta(ge=0, lt=1e15)]


def check_id(text: str) -> InstanceId:
    """Return an id from a command line or a file. Raises ConfigError."""
    if re.search(ID_PATTERN, text) is None:
        raise ConfigError(
            f"{shown(text)!r} is no id of an instance: 1 to 256 letters, digits and . _ : @ / -"
        )
    return InstanceId(text)


class InstanceState(StrEnum):
    """`starting` -> `ready` -> `draining`; `dead` from any of them."""

    STARTING = "starting"  # loading the model; takes no requests yet
    READY = "ready"
    DRAINING = "draining"  # finishes running requests, takes no others
    DEAD = "dead"  # the engine has stopped, or the instance has not answered for too long


class MemberKind(StrEnum):
    """The engine of an instance."""

    MEMSERVE = "memserve"  # the built-in engine
    VLLM = "vllm"


class Limits(msgspec.Struct, frozen=True):
    """Limits that requests are checked against, and the engine's hardware and batch sizes."""

    vocab_size: Size
    max_model_len: Size  # prompt + output tokens of the model
    pool_tokens: Size  # tokens of one sequence that HBM can hold
    max_tokens: Size  # prompt + output tokens that one sequence may have
    block_tokens: BlockTokens
    dtype: Name
    device: Name
    threads: Size
    max_running: Size = 64  # sequences per step
    mixed_batch_tokens: Size = 256  # prompt tokens in a step that also decodes
    max_waiting: Count = DEFAULT_MAX_WAITING  # sequences that may wait for the engine


class InstanceInfo(msgspec.Struct, frozen=True):
    id: Id
    epoch: LifeEpoch
    role: Role
    state: InstanceState
    pid: Count
    model: ModelName
    limits: Limits | None = None  # None until the model is loaded
    kv_events: KVEventsInfo | None = None  # None until then, or if it publishes no KV events
    kind: MemberKind = MemberKind.MEMSERVE
    pool: bool = False  # KV can move to and from other instances; False until loaded
    # KV fingerprint, hex: KV moves only between instances with equal ones.
    kv: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")] | None = None
    pool_peer: PoolPeer | None = None  # its pool's control address; None until loaded
    version: Name = ""  # of memserve; "": not reported


class EngineTotals(msgspec.Struct, frozen=True):
    """The engine's counters since start, and the sequences that it has now.

    A prompt token counts once: as computed, as found in the cache, or as received from another
    instance for its request."""

    running: Count = 0  # sequences now
    waiting: Count = 0  # sequences now
    steps: Count = 0
    computed_prompt_tokens: Count = 0
    cached_prompt_tokens: Count = 0
    generated_tokens: Count = 0
    preemptions: Count = 0
    finished: Count = 0
    cancelled: Count = 0
    busy_seconds: Seconds = 0.0
    received_prompt_tokens: Count = 0
    # Of steps that computed no prompt; of a vLLM server, as far as polls can tell them.
    decode_steps: Count = 0
    decode_tokens: Count = 0
    decode_context_tokens: Count = 0  # of the sequences of each step, summed
    decode_seconds: Seconds = 0.0  # each from the end of the step before it, if there was no pause


class MediumTotals(msgspec.Struct, frozen=True):
    """The blocks of one medium: total = free + active + cached + detached."""

    total: Count = 0
    free: Count = 0
    active: Count = 0  # held by running sequences
    cached: Count = 0  # held by the index
    pinned: Count = 0  # of the cached ones: being read
    detached: Count = 0  # gone from the index, still being read


class LinkTotals(msgspec.Struct, frozen=True):
    """Writes of a pool into other pools by one transport, since start."""

    transfers: Count = 0  # ended ones, however they ended
    bytes: Count = 0
    pieces: Count = 0  # contiguous runs of bytes
    seconds: Seconds = 0.0  # during which writes were in flight


class PoolTotals(msgspec.Struct, frozen=True):
    """The pool's blocks and index, and its counters since start."""

    hbm: MediumTotals = MediumTotals()
    dram: MediumTotals = MediumTotals()
    namespaces: Count = 0
    nodes: Count = 0  # of the index
    matches: Count = 0  # held now
    evictions: Count = 0  # cached blocks dropped
    swapped_out: Count = 0  # blocks, HBM to DRAM
    swapped_in: Count = 0
    quarantined: Count = 0  # blocks that a lost peer may still write to, and nobody may have
    # By the transport's name.
    links: Annotated[dict[Name, LinkTotals], Meta(max_length=MAX_LINKS)] = msgspec.field(
        default_factory=dict
    )


class EndedTotals(msgspec.Struct):
    """Sequences that have ended since start: by reason, and the lengths of those that finished."""

    stop: Count = 0
    length: Count = 0
    abort: Count = 0  # given up by the client or the gateway, or by an instance that ended
    error: Count = 0
    prompt_tokens: TokenHistogram = msgspec.field(default_factory=TokenHistogram)
    generated_tokens: TokenHistogram = msgspec.field(default_factory=TokenHistogram)

    def finish(self, reason: FinishReason | None, prompt: int, generated: int) -> None:
        """Count a sequence that finished; `prompt`, `generated`: tokens."""
        if reason is FinishReason.LENGTH:
            self.length += 1
        else:
            self.stop += 1
        self.prompt_tokens.observe(prompt)
        self.generated_tokens.observe(generated)

    def fail(self, reason: FinishReason) -> None:
        """Count a sequence without an end: CANCELLED or ERROR."""
        if reason is FinishReason.CANCELLED:
            self.abort += 1
        else:
            self.error += 1


class Latencies(msgspec.Struct, frozen=True):
    """Latencies of sequences at the instance, in seconds, and how they ended; `first_token` and
    `whole` from the call's arrival."""

    first_token: Histogram = msgspec.field(default_factory=Histogram)
    inter_token: Histogram = msgspec.field(default_factory=Histogram)
    per_token: Histogram = msgspec.field(default_factory=Histogram)  # TPOT: means of sequences
    whole: Histogram = msgspec.field(default_factory=Histogram)
    # Parts of `whole`, of finished sequences. If another instance computed the prompt, `queue` and
    # `prefill` are that instance's. `transfer` and `fetch` count only sequences that had one.
    queue: Histogram = msgspec.field(default_factory=Histogram)
    fetch: Histogram = msgspec.field(default_factory=Histogram)
    prefill: Histogram = msgspec.field(default_factory=Histogram)
    transfer: Histogram = msgspec.field(default_factory=Histogram)
    decode: Histogram = msgspec.field(default_factory=Histogram)
    ended: EndedTotals = msgspec.field(default_factory=EndedTotals)


class HandoffTotals(msgspec.Struct):
    """Hand-overs and returns of a decode instance since start. Blocks are whole ones."""

    asked: Count = 0  # prefills asked for
    failed: Count = 0  # of `asked`; another instance was asked, or the prompt computed here
    blocks_received: Count = 0
    blocks_already_present: Count = 0  # of prompts, in the index here before
    blocks_returned: Count = 0
    returns: Count = 0  # sequences whose KV went back
    returns_dropped: Count = 0  # because of pressure or failure
    prompt_tokens: Count = 0  # of successful prefills
    cached_tokens_prefill: Count = 0  # of `prompt_tokens`, in the prefill instance's index
    cached_tokens_decode: Count = 0  # of `prompt_tokens`, in whole blocks of the index here
    queue_seconds: Seconds = 0.0
    prefill_seconds: Seconds = 0.0  # queue included
    transfer_seconds: Seconds = 0.0
    block_bytes: Count = 0  # of one block


class FetchTotals(msgspec.Struct):
    """Prefixes fetched from third instances, and pushed to other instances, since start."""

    asked: Count = 0
    failed: Count = 0  # of `asked`: refused, lost, or not done in time
    blocks_received: Count = 0
    seconds: Seconds = 0.0  # waited for fetches, failures included
    pushes: Count = 0  # done for other instances
    pushes_failed: Count = 0
    blocks_pushed: Count = 0
    block_bytes: Count = 0  # of one block


class PeerMoves(msgspec.Struct):
    """Bytes of KV between an instance and one other since start, counted where they were asked for
    or, of returns, given back."""

    received: Count = 0  # handed over or fetched from there
    returned: Count = 0  # given back to there


class InstanceStats(msgspec.Struct, frozen=True):
    engine: EngineTotals
    pool: PoolTotals
    latencies: Latencies
    handoff: HandoffTotals = msgspec.field(default_factory=HandoffTotals)
    fetch: FetchTotals = msgspec.field(default_factory=FetchTotals)
    # By the other instance; those beyond MAX_MOVE_PEERS are counted in the totals alone.
    moves: Annotated[dict[Id, PeerMoves], Meta(max_length=MAX_MOVE_PEERS)] = msgspec.field(
        default_factory=dict
    )


class InstanceReport(InstanceInfo, frozen=True):
    """`GET /info?stats=1`: both at once, for gateways' polls. A member that does not know the
    question answers without `stats`."""

    stats: InstanceStats | None = None  # None: not ready, or not known


REPORT_PATH = "/info?stats=1"


class JoinRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """`POST /cluster/members` on a gateway: the URL of an instance that joins or has changed.

    An instance that joins by itself adds id and epoch: the gateway refuses it if another living
    instance has that id. `repeated`: this gateway has accepted the same before, and nothing has
    changed since: it need not ask the instance at once.
    """

    address: PeerUrl
    id: Id | None = None
    epoch: LifeEpoch | None = None
    repeated: bool = False

    def __post_init__(self) -> None:
        check_peer_url(self.address)


def check_peer_url(address: str) -> None:
    """Raise ValueError for a `PeerUrl` without a host, or with port 0."""
    parts = urlsplit(address)
    if not parts.hostname or parts.port == 0:
        raise ValueError(f"{address} names no host and port")

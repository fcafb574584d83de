"""What a decode instance asks of a prefill instance, and what it gets.

The decode instance D posts a `PrefillCall` to the prefill instance P. P computes what its own
index lacks of the prompt, pushes the KV that D's index lacks into D's pool, and answers with
the first token. KV is in D's index before D reads the answer; should it be evicted before D
uses it, D computes it again: nothing but time depends on it.

Whoever computes a prompt may first ask a third instance for the prefix that it has (a
`PushCall`). That costs time if it fails, and nothing else.

Calls and results are msgpack (`api/msgpack.py`), errors are JSON as everywhere.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta
from msgspec.structs import force_setattr

from memserve.api.generate import Int32, PrefillPeer, SamplingParams
from memserve.api.limits import MAX_ID_CHARACTERS, MAX_NAME_CHARACTERS
from memserve.tokens import NO_TOKENS, WireTokens, token_field
from memserve.types import InstanceId, Namespace, RequestId

PREFILL_PATH = "/v1/prefill"
PUSH_PATH = "/v1/kv/push"
MEET_PATH = "/v1/kv/meet"

# A prefix of ours, and a client's salt or an id of ours.
_Namespace = Annotated[Namespace, Meta(max_length=MAX_NAME_CHARACTERS + 2 * MAX_ID_CHARACTERS)]


class PoolPeer(msgspec.Struct, frozen=True):
    """Where an instance's pool talks to others."""

    id: Annotated[InstanceId, Meta(max_length=MAX_ID_CHARACTERS)]
    # Never one of ZeroMQ's other transports, which lead to this process or this machine.
    address: Annotated[str, Meta(max_length=MAX_ID_CHARACTERS, pattern=r"^tcp://[!-~]+$")]


class PrefillCall(msgspec.Struct, frozen=True, eq=False, forbid_unknown_fields=True):
    """`POST /v1/prefill`. One sequence."""

    id: Annotated[RequestId, Meta(min_length=1, max_length=2 * MAX_ID_CHARACTERS)]
    prompt: WireTokens
    sampling: SamplingParams
    namespace: _Namespace  # of the KV at P
    ephemeral: bool  # P forgets the KV once D has it
    target: PoolPeer  # D's pool
    target_namespace: _Namespace  # of the KV at D
    priority: Int32 = 0
    output: WireTokens = NO_TOKENS  # generated already, by an instance that was lost
    fetch: PrefillPeer | None = None  # whose longer prefix P pulls first

    def __post_init__(self) -> None:
        force_setattr(self, "prompt", token_field(self.prompt))
        force_setattr(self, "output", token_field(self.output))


class TokenScores(msgspec.Struct, frozen=True):
    """`TokenLogprobs` on the wire."""

    chosen: float
    rank: int
    top: tuple[tuple[int, float], ...]


class PrefillResult(msgspec.Struct, frozen=True):
    """The first token, and what it took. Seconds are P's."""

    token: int
    pool: PoolPeer | None  # P's, for KV that is made later; None: P keeps none
    cached_tokens: int  # of the prompt, found in P's index
    stop_token: int | None  # the first token, if it ends the sequence
    logprobs: TokenScores | None
    blocks_sent: int
    blocks_already_present: int  # whole blocks of the prompt that D had already
    prefill_seconds: float  # queue included, fetch not
    transfer_seconds: float
    queue_seconds: float = 0.0  # from submission to the first step
    fetch_seconds: float = 0.0
    blocks_fetched: int = 0


class PushCall(msgspec.Struct, frozen=True, eq=False, forbid_unknown_fields=True):
    """`POST /v1/kv/push`: give `target` what the receiver's index has of `tokens` and the
    target's index lacks. The answer comes when it is in the target's index.
    """

    tokens: WireTokens
    namespace: _Namespace  # of the KV at the receiver
    target: PoolPeer
    target_namespace: _Namespace

    def __post_init__(self) -> None:
        force_setattr(self, "tokens", token_field(self.tokens))


class PushResult(msgspec.Struct, frozen=True):
    """Whole blocks. Both 0: the receiver has none of these tokens."""

    blocks_sent: int
    blocks_already_present: int  # that the target had already


class MeetCall(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`POST /v1/kv/meet`: find out whether KV could go to another instance, without sending any.

    The receiver asks the peer where its pool is, as whoever hands over does, and has its own pool
    make a round trip there.
    """

    peer: PrefillPeer


class MeetResult(msgspec.Struct, frozen=True):
    """`transport`: what blocks would be written by (shm, nixl). Seconds of the pools' round trip,
    with what connecting took where they had not met before."""

    transport: str
    seconds: float

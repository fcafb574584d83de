"""Types that the parts of the scheduler exchange: frozen values, times in seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray

from memserve.types import SHARED, InstanceId, Namespace, RequestId, Role, TokenArray

# Transports of KV between instances: "shm" within a host, "nixl" between hosts.
Link = Literal["shm", "nixl"]
# The same, and "host": from an instance's host memory into its HBM.
TransferPath = Link | Literal["host"]
Seconds = NDArray[np.float64]


class Costs(Protocol):
    """Predicted times of one instance. Arguments broadcast; results are arrays of seconds."""

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of K and V of one token, all layers."""

    def prefill_seconds(self, prompt_tokens: ArrayLike, cached_tokens: ArrayLike) -> Seconds:
        """Return exec(x, y): the prefill of a prompt of x tokens, y * x of them cached."""

    def decode_step_seconds(self, sequences: ArrayLike, context_tokens: ArrayLike) -> Seconds:
        """Return a decode step of a batch of `sequences`; `context_tokens`: sum over the batch."""

    def transfer_seconds(
        self, num_bytes: ArrayLike, pieces: ArrayLike, path: TransferPath
    ) -> Seconds:
        """Return the transfer of `num_bytes` of KV in `pieces` contiguous runs: to another
        instance, or by "host" from the instance's own host memory."""


@dataclass(frozen=True, slots=True)
class InstanceSpec:
    """An instance as the scheduler knows it. Another spec with the same id replaces it."""

    id: InstanceId
    role: Role
    costs: Costs
    block_tokens: int
    host: str  # instances with equal `host` move KV over shared memory
    max_running: int = 64  # sequences per step
    chunk_tokens: int = 512  # prompt tokens in a step that also decodes
    kv_tokens: int | None = None  # KV capacity of HBM in tokens; None: not known, no limit
    short_share: float = 0.5  # share of a chunk for the shortest prompt; 0: FCFS, as vLLM
    kv: str | None = ""  # KV fingerprint: KV moves only between equal ones; None: never moves


class PromptRequest(msgspec.Struct, frozen=True, eq=False):
    """The fields of a request that a decision needs."""

    id: RequestId
    tokens: TokenArray  # [prompt tokens] int32
    namespace: Namespace = SHARED
    output_tokens: int = 128  # upper bound; predictions use the mean of recent answers if less
    session: str | None = None  # the `session` policy keeps requests of one session together
    priority: int = 0  # lower runs first


class Terms(msgspec.Struct, frozen=True):
    """Predicted seconds of a plan, by cause."""

    queue: float = 0.0  # waiting before the prefill (also for KV in host memory), and for room
    fetch: float = 0.0  # pulling a longer prefix from a third instance
    prefill: float = 0.0  # exec(x, y)
    transfer: float = 0.0  # hand-over of KV from prefill to decode instance
    decode: float = 0.0  # decoding, slowdown of the batch's other answers, stalls by the prefill
    delays: float = 0.0  # delay of other queued prompts by this prefill, summed

    @property
    def first_token(self) -> float:
        return self.queue + self.fetch + self.prefill + self.transfer


class Plan(msgspec.Struct, frozen=True):
    """Where a request runs. `instance` decodes, and computes the prompt unless `prefill` does."""

    instance: InstanceId
    prefill: InstanceId | None = None
    fetch: InstanceId | None = None  # source of a longer prefix, pulled before the prefill
    prompt_tokens: int = 0
    cached_tokens: int = 0  # on the instance that computes the prompt, before the fetch
    fetched_tokens: int = 0
    terms: Terms = Terms()

    @property
    def computes(self) -> InstanceId:
        """The instance that computes the prompt."""
        return self.instance if self.prefill is None else self.prefill


class PrefixMatches(Protocol):
    """The part of `PromptTree` that the scheduler uses."""

    def match(self, namespace: Namespace, tokens: TokenArray) -> Mapping[InstanceId, int]:
        """Return the length in tokens of the longest known prefix, by instance, in whole blocks of
        that instance. Instances without a match are absent."""

    def in_host(
        self, namespace: Namespace, tokens: TokenArray, matches: Mapping[InstanceId, int]
    ) -> Mapping[InstanceId, int]:
        """Return the tokens of these `matches` that are only in host memory, by instance."""

    def expect(
        self, instance: InstanceId, namespace: Namespace, tokens: TokenArray, now: float
    ) -> None:
        """Count a prompt just routed to `instance` as held, until KV events confirm it or a TTL
        ends."""

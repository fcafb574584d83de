"""What the parts of the scheduler say to each other. Frozen values, times in seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray

from memserve.types import SHARED, InstanceId, Namespace, RequestId, Role, TokenArray

Path = Literal["shm", "nixl"]  # how KV moves: on one host, between hosts
Seconds = NDArray[np.float64]


class Costs(Protocol):
    """Predicted times of one instance. Arguments broadcast; results are arrays of seconds."""

    @property
    def kv_bytes_per_token(self) -> int:
        """KV of all layers, K and V, of one token."""

    def prefill_seconds(self, prompt_tokens: ArrayLike, cached_tokens: ArrayLike) -> Seconds:
        """exec(x, y): a prompt of x tokens, of which `cached_tokens` (y * x) have KV already."""

    def decode_step_seconds(self, sequences: ArrayLike, context_tokens: ArrayLike) -> Seconds:
        """One step of a batch whose sequences hold `context_tokens` in all."""

    def transfer_seconds(self, num_bytes: ArrayLike, pieces: ArrayLike, path: Path) -> Seconds:
        """Moving KV to another instance in so many contiguous pieces."""


@dataclass(frozen=True, slots=True)
class InstanceSpec:
    """An instance as the scheduler knows it. A new value replaces the last one of this id."""

    id: InstanceId
    role: Role
    costs: Costs
    block_tokens: int
    host: str  # instances of one host move KV over shared memory
    max_running: int = 64  # sequences per step
    chunk_tokens: int = 512  # of prompts, in a step that also decodes
    kv_tokens: int | None = None  # that HBM holds; None: not known, no limit
    short_share: float = 0.5  # of a chunk, for the shortest prompt; 0: all in order, as vLLM
    kv: str | None = ""  # KV moves between instances in which it is the same; None: to nobody


class PromptRequest(msgspec.Struct, frozen=True, eq=False):
    """What a decision needs to know of a request."""

    id: RequestId
    tokens: TokenArray  # [prompt tokens] int32
    namespace: Namespace = SHARED
    output_tokens: int = 128  # at most; a scheduler expects what answers took lately, if less
    session: str | None = None  # what the `session` policy keeps together
    priority: int = 0  # lower runs first


class Terms(msgspec.Struct, frozen=True):
    """Why a plan takes as long as it does: its predicted seconds."""

    queue: float = 0.0  # until its prefill starts
    fetch: float = 0.0  # pulling a longer prefix from a third instance
    prefill: float = 0.0  # exec(x, y)
    transfer: float = 0.0  # KV from P to D
    decode: float = 0.0  # all output tokens, with what they and the others cost each other
    delays: float = 0.0  # that its prefill makes for other prompts there, together

    @property
    def first_token(self) -> float:
        return self.queue + self.fetch + self.prefill + self.transfer


class Plan(msgspec.Struct, frozen=True):
    """Where a request runs. `instance` answers; `prefill`, if any, computes its prompt."""

    instance: InstanceId
    prefill: InstanceId | None = None
    fetch: InstanceId | None = None  # whose longer prefix the prefilling instance pulls first
    prompt_tokens: int = 0
    cached_tokens: int = 0  # found where the prompt is computed, before the fetch
    fetched_tokens: int = 0
    terms: Terms = Terms()

    @property
    def computes(self) -> InstanceId:
        """Where the prompt is computed."""
        return self.instance if self.prefill is None else self.prefill


class PrefixMatches(Protocol):
    """The prompt trees, as policies use them."""

    def match(self, namespace: Namespace, tokens: TokenArray) -> Mapping[InstanceId, int]:
        """Longest known prefix in tokens (whole blocks of that instance), by instance that has
        any."""

    def expect(
        self, instance: InstanceId, namespace: Namespace, tokens: TokenArray, now: float
    ) -> None:
        """This prompt was routed there: count it as held until events say so, or a TTL ends."""

"""The engine's contract: what goes in, what comes out. Frozen, and free of torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from memserve.api.generate import FinishReason, SamplingParams, validate_sampling
from memserve.api.limits import DEFAULT_MAX_WAITING
from memserve.engine.observer import PrefillObserver
from memserve.errors import RequestError
from memserve.tokens import NO_TOKENS
from memserve.types import SHARED, Namespace, RequestId, TokenArray


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One sequence to generate (a call with n > 1 or several prompts is several of these)."""

    id: RequestId
    prompt: TokenArray  # [tokens] int32, not empty
    sampling: SamplingParams
    namespace: Namespace = SHARED
    # Nobody else uses the namespace: what it holds is forgotten when the sequence ends.
    ephemeral: bool = False
    priority: int = 0  # lower runs first; arrival order breaks ties
    # Generated already, by a run that another one takes over (here or on another instance).
    # They count against `max_tokens` and are not emitted again; with a seed, or greedily, the
    # tokens that follow are those that the first run would have produced.
    output: TokenArray = field(default_factory=lambda: NO_TOKENS)  # [tokens] int32
    # End after one token, whatever `max_tokens` says: another instance goes on from there.
    prefill_only: bool = False
    # Another sample of the same prompt: wait until that one's prefill has put its blocks
    # into the index, then share them instead of computing them again.
    follows: RequestId | None = None
    # Is told of the KV of `tokens`, block by block, while it is computed.
    observer: PrefillObserver | None = None

    @property
    def tokens(self) -> TokenArray:
        """Prompt and `output`, [tokens] int32."""
        return np.concatenate((self.prompt, self.output)) if len(self.output) else self.prompt


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities (of the raw distribution) at one position, most probable first."""

    chosen: float
    rank: int  # 1: the most probable token
    top: tuple[tuple[int, float], ...]  # (token id, logprob), as many as were asked for


@dataclass(frozen=True, slots=True)
class Usage:
    """What a finished (or just started) sequence has cost."""

    prompt_tokens: int
    # Prompt tokens whose KV was not computed for this request; None: that is told later, with
    # the sequence's last output at the latest.
    cached_tokens: int | None
    preemptions: int
    queue_seconds: float = 0.0  # from `submit` to its first step


@dataclass(frozen=True, slots=True)
class TokenOutput:
    """What one step produced for one sequence.

    `token_ids` includes an end or stop token that ended the sequence. After an output with
    `finish_reason` nothing more comes for this id. `error` is set with `FinishReason.ERROR`.
    """

    id: RequestId
    token_ids: tuple[int, ...]
    usage: Usage
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    stop_token: int | None = None  # which end or stop token ended it
    error: str | None = None


# Called from the engine's thread once per step with everything the step produced; it must
# not block. A server hands the batch to its event loop with `call_soon_threadsafe`.
OutputSink = Callable[[Sequence[TokenOutput]], None]


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """Limits that requests are checked against."""

    model: str
    vocab_size: int
    max_model_len: int  # prompt + output tokens, from the model and the settings
    pool_tokens: int  # tokens of one sequence that HBM can hold
    block_tokens: int
    dtype: str
    device: str
    threads: int
    eos_token_ids: tuple[int, ...] = ()  # the model's own end tokens
    max_running: int = 64  # sequences per step
    mixed_batch_tokens: int = 256  # prefilled in a step that also decodes
    max_waiting: int = DEFAULT_MAX_WAITING  # sequences

    @property
    def max_tokens(self) -> int:
        """Prompt plus output tokens that one sequence may have."""
        return min(self.max_model_len, self.pool_tokens)


def validate_requests(requests: Sequence[EngineRequest], info: EngineInfo) -> None:
    """Raise RequestError for the first sequence of a call that an engine with these limits can
    never run."""
    passed: SamplingParams | None = None
    for request in requests:
        validate_sampling(request.sampling, info.vocab_size, passed)
        passed = request.sampling
        _validate_tokens(request, info)


def _validate_tokens(request: EngineRequest, info: EngineInfo) -> None:
    if not len(request.prompt):
        raise RequestError("the prompt is empty", "prompt")
    tokens = request.tokens
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= info.vocab_size:
        bad = low if low < 0 else high
        raise RequestError(
            f"token id {bad} is outside the vocabulary of {info.vocab_size}", "prompt"
        )
    if len(tokens) >= info.max_tokens:
        raise RequestError(
            f"the prompt has {len(tokens)} tokens; with at least one to generate, "
            f"at most {info.max_tokens} are possible "
            f"(context {info.max_model_len}, KV memory {info.pool_tokens})",
            "prompt",
        )
    if len(request.output) >= request.sampling.max_tokens:
        raise RequestError(
            f"{len(request.output)} of at most {request.sampling.max_tokens} tokens exist already",
            "max_tokens",
        )


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Totals since start, and the present state. Counters only grow."""

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


class EngineProtocol(Protocol):
    """What an instance needs of its engine. Every call returns at once, from any thread."""

    @property
    def info(self) -> EngineInfo: ...

    def start(self, sink: OutputSink) -> None:
        """Start the engine's thread; outputs go to `sink`, called from that thread."""

    def submit(self, requests: Sequence[EngineRequest]) -> None:
        """Queue the sequences of one call, all or none.

        Raises RequestError for one that can never run (too long for the context or the pool,
        token ids out of range, sampling values out of range), QueueFull, EngineStopped.
        """

    def check(self, requests: Sequence[EngineRequest]) -> None:
        """Raise what `submit` would raise now, and queue nothing."""

    def cancel(self, ids: Sequence[RequestId]) -> None:
        """Stop sequences within one step and free what they hold. Unknown ids are ignored.

        No further output comes for them, not even a last one.
        """

    def stats(self) -> EngineStats: ...

    def stop(self) -> None:
        """End the thread after its present step; what still runs gets a CANCELLED output."""

"""Contract of an engine: requests, outputs, limits, protocol. Frozen types, no torch import."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from memserve.api.generate import FinishReason, SamplingParams, validate_sampling
from memserve.api.limits import DEFAULT_MAX_WAITING
from memserve.api.status import EngineTotals
from memserve.api.timeline import Chunk
from memserve.engine.constraint import CompiledGrammar
from memserve.engine.observer import PrefillObserver
from memserve.errors import RequestError
from memserve.tokens import NO_TOKENS
from memserve.tracing.span import Span
from memserve.types import SHARED, Namespace, RequestId, TokenArray


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One sequence to generate. A call with n > 1 or several prompts makes several requests."""

    id: RequestId
    prompt: TokenArray  # [tokens] int32, not empty
    sampling: SamplingParams
    namespace: Namespace = SHARED
    # The namespace belongs to this sequence alone; its KV is dropped when the sequence ends.
    ephemeral: bool = False
    priority: int = 0  # lower runs first; arrival order breaks ties
    # Tokens that an earlier run generated (here or on another instance). They count against
    # `max_tokens` and are not emitted again. With a seed or greedy sampling, the tokens that
    # follow are those of an uninterrupted run.
    output: TokenArray = field(default_factory=lambda: NO_TOKENS)  # [tokens] int32
    # End after one generated token regardless of `max_tokens`; another instance continues.
    prefill_only: bool = False
    # Id of the first sample of the same prompt: wait until that sample's prefill has put its
    # blocks into the index, then share the blocks instead of computing them again.
    follows: RequestId | None = None
    # Receives a call for each block of `tokens` whose KV is computed.
    observer: PrefillObserver | None = None
    grammar: CompiledGrammar | None = None  # `sampling.grammar`, compiled for the model
    # Prompt tokens whose KV other instances have sent for this request: no hits of this cache.
    received_tokens: int = 0
    # Of the call in its trace; None: it is not traced. Engines only pass its context on.
    span: Span | None = None

    @property
    def tokens(self) -> TokenArray:
        """Prompt and `output`, [tokens] int32."""
        return np.concatenate((self.prompt, self.output)) if len(self.output) else self.prompt


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural log-probabilities of the raw distribution (before penalties and temperature)
    at one position."""

    chosen: float  # of the sampled token
    rank: int  # 1: the most probable token
    top: tuple[tuple[int, float], ...]  # (token id, logprob), most probable first


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts and queue time of one sequence so far."""

    prompt_tokens: int
    # Prompt tokens whose KV was cached. None: not known yet; the sequence's last output at the
    # latest has the number.
    cached_tokens: int | None
    preemptions: int
    queue_seconds: float = 0.0  # from `submit` to the sequence's first step
    chunks: Sequence[Chunk] = ()  # of the prompt that were computed here, MAX_CHUNKS at most


@dataclass(frozen=True, slots=True)
class TokenOutput:
    """Output of one step for one sequence.

    `token_ids` includes the end or stop token that ended the sequence. An output with
    `finish_reason` is the last one of its id. `error` is set with `FinishReason.ERROR`.
    """

    id: RequestId
    token_ids: tuple[int, ...]
    usage: Usage
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    stop_token: int | None = None  # the end or stop token that ended the sequence
    error: str | None = None
    at_fault: bool = False  # with `error`: the request is to blame, not the engine
    # Of the prompt's tokens but the first, if asked for; in the sequence's first output only.
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


# Callback for all outputs of one step, called from the engine's thread; it must not block. A
# server hands the outputs to its event loop with `call_soon_threadsafe`.
OutputSink = Callable[[Sequence[TokenOutput]], None]


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """Limits and description of an engine; `validate_requests` checks requests against it."""

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
    mixed_batch_tokens: int = 256  # prefill tokens in a step that also decodes
    max_waiting: int = DEFAULT_MAX_WAITING  # sequences

    @property
    def max_tokens(self) -> int:
        """Maximum of prompt plus output tokens of one sequence."""
        return min(self.max_model_len, self.pool_tokens)


def validate_requests(requests: Sequence[EngineRequest], info: EngineInfo) -> None:
    """Raise RequestError for the first of `requests` that exceeds the limits in `info`."""
    passed: SamplingParams | None = None
    for request in requests:
        validate_sampling(request.sampling, info.vocab_size, passed)
        passed = request.sampling
        if request.sampling.grammar is not None and request.grammar is None:
            raise RequestError("this engine takes no grammar", request.sampling.grammar.param)
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


class EngineProtocol(Protocol):
    """Interface between an instance and its engine. Calls may come from any thread; all but
    `stop` return at once."""

    @property
    def info(self) -> EngineInfo: ...

    def start(self, sink: OutputSink) -> None:
        """Start the engine's thread and wait until it can compute, which may take seconds; outputs
        go to `sink`, called from that thread."""

    def submit(self, requests: Sequence[EngineRequest]) -> None:
        """Queue the sequences of one call, all or none.

        Raises RequestError for a sequence that can never run (too long for the context or the
        pool, token ids or sampling values out of range), QueueFull, EngineStopped.
        """

    def check(self, requests: Sequence[EngineRequest]) -> None:
        """Raise the errors that `submit` would raise now, without queueing."""

    def cancel(self, ids: Sequence[RequestId]) -> None:
        """Stop sequences within one step and free their blocks. Unknown ids are ignored.

        A cancelled sequence gets no output with a `finish_reason`.
        """

    def stats(self) -> EngineTotals: ...

    def stop(self) -> None:
        """End the thread after its current step; unfinished sequences get a CANCELLED output."""

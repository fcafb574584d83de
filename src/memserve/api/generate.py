"""The call that a gateway makes to an instance, and what sampling is asked for.

`POST /v1/generate` takes one `GenerateCall` as JSON: token ids in. The answer is already in
OpenAI's shape (a JSON body, or an SSE stream of chunks that carry token ids), so that a
gateway relays bytes and copies nothing.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec


class FinishReason(StrEnum):
    """Why a choice ended. The first two are OpenAI's; clients never see `CANCELLED`."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


class SamplingParams(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """How the next token is chosen. Names and neutral values are vLLM's.

    Source of the filters' order: penalties and `logit_bias` on logits, then temperature, then
    top-k, top-p and min-p on probabilities (vLLM's v1 sampler).
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # 0 (or -1): all
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # over prompt and output
    presence_penalty: float = 0.0  # over output
    frequency_penalty: float = 0.0  # over output
    logit_bias: dict[int, float] = {}
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()  # beside the model's own end tokens
    ignore_eos: bool = False
    logprobs: int | None = None  # alternatives to report besides the chosen token; None: none


class CallKind(StrEnum):
    """Which of OpenAI's endpoints the answer is for."""

    CHAT = "chat"
    COMPLETION = "completion"


class GenerateCall(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """One client request, tokenised. Choice `p * n + j` answers prompt p, sample j."""

    id: str  # unique; also the OpenAI response id
    kind: CallKind
    model: str  # echoed
    created: int  # Unix seconds, echoed
    prompts: tuple[tuple[int, ...], ...]  # token ids; chat has exactly one
    sampling: SamplingParams = SamplingParams()
    n: int = 1
    stop: tuple[str, ...] = ()  # stop strings
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    stream: bool = False
    include_usage: bool = False  # a last chunk with usage
    echo: bool = False  # completions: the prompt's text before the answer's
    return_token_ids: bool = False  # the client asked for `choices[].token_ids`
    cache_salt: str = ""  # namespace of the KV cache
    priority: int = 0  # lower runs first

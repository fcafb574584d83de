"""The call that a gateway makes to an instance, and what sampling is asked for.

`POST /v1/generate` takes one `GenerateCall` as JSON: token ids in. The answer is already in
OpenAI's shape (a JSON body, or an SSE stream whose comments carry token ids: `chunks.py`), so
that a gateway relays bytes and copies nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import StrEnum

import msgspec

from memserve.api.token_ids import TokenIds
from memserve.errors import RequestError
from memserve.types import InstanceId

GENERATE_PATH = "/v1/generate"
MAX_LOGPROBS = 20  # OpenAI's limit of top_logprobs


class FinishReason(StrEnum):
    """Why a choice ended. The first two are OpenAI's; clients never see `CANCELLED`."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


class SamplingParams(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """How the next token is chosen. Names and neutral values are vLLM's.

    Source of the filters' order, vLLM's v1 sampler: `min_tokens`, `logit_bias` and penalties
    on logits, then temperature, then min-p, top-k and top-p on probabilities.
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


def validate_sampling(params: SamplingParams, vocab_size: int) -> None:
    """Raise RequestError, with the allowed range, for the first value out of range.

    NaN and infinity always are. Types are the decoder's business.
    """
    p = params
    if p.max_tokens < 1:
        raise _refused("max_tokens", p.max_tokens, "at least 1")
    if not 0 <= p.min_tokens <= p.max_tokens:
        raise _refused("min_tokens", p.min_tokens, f"from 0 to max_tokens ({p.max_tokens})")
    if not 0 <= p.temperature < math.inf:
        raise _refused("temperature", p.temperature, "0 or more, and finite")
    if p.top_k < -1:
        raise _refused("top_k", p.top_k, "1 or more, or 0 or -1 for all tokens")
    if not 0 < p.top_p <= 1:
        raise _refused("top_p", p.top_p, "above 0 and at most 1")
    if not 0 <= p.min_p <= 1:
        raise _refused("min_p", p.min_p, "from 0 to 1")
    if not 0 < p.repetition_penalty < math.inf:
        raise _refused("repetition_penalty", p.repetition_penalty, "above 0, and finite")
    if not -2 <= p.presence_penalty <= 2:
        raise _refused("presence_penalty", p.presence_penalty, "from -2 to 2")
    if not -2 <= p.frequency_penalty <= 2:
        raise _refused("frequency_penalty", p.frequency_penalty, "from -2 to 2")
    if p.logprobs is not None and not 0 <= p.logprobs <= MAX_LOGPROBS:
        raise _refused("logprobs", p.logprobs, f"from 0 to {MAX_LOGPROBS}")
    if p.seed is not None and not -(2**63) <= p.seed < 2**63:
        raise _refused("seed", p.seed, "a signed 64-bit integer")
    for token in p.stop_token_ids:
        if not 0 <= token < vocab_size:
            raise _refused("stop_token_ids", token, f"a token id (0 to {vocab_size - 1})")
    for token, bias in p.logit_bias.items():
        if not 0 <= token < vocab_size:
            raise _refused("logit_bias", token, f"a token id (0 to {vocab_size - 1})")
        if not -100 <= bias <= 100:
            raise _refused("logit_bias", bias, "from -100 to 100")


def _refused(param: str, value: float, allowed: str) -> RequestError:
    return RequestError(f"{param}: {value} is not {allowed}", param)


class CallKind(StrEnum):
    """Which of OpenAI's endpoints the answer is for."""

    CHAT = "chat"
    COMPLETION = "completion"


class PrefillPeer(msgspec.Struct, frozen=True):
    """A prefill instance that a decode instance may ask."""

    id: InstanceId
    address: str  # http://host:port


class GenerateCall(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """One client request, tokenised. Choice `p * n + j` answers prompt p, sample j."""

    id: str  # unique; also the OpenAI response id
    kind: CallKind
    model: str  # echoed
    created: int  # Unix seconds, echoed
    prompts: tuple[Sequence[int], ...]  # token ids; chat has exactly one
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
    session: str | None = None  # what the `session` policy keeps together
    prefill: tuple[PrefillPeer, ...] = ()  # who computes the prompt, best first; (): the receiver
    # Whose longer prefix the computing instance pulls before it computes the rest.
    fetch: PrefillPeer | None = None
    # By choice: the token ids of the events that the client has already, from an instance that
    # was lost. The stream goes on exactly behind them; a choice that they end (by an end token,
    # a stop string, or max_tokens) says no more, and a stream of such choices is its usage and
    # [DONE]. (): a fresh call. Streams only.
    resumed: tuple[tuple[int, ...], ...] = ()


def _encodable(value: object) -> msgspec.Raw:
    if isinstance(value, TokenIds):
        return value.json
    raise NotImplementedError(f"{type(value)} is no part of a call")


encode_call = msgspec.json.Encoder(enc_hook=_encodable).encode

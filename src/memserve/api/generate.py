"""The call that a gateway makes to an instance, with its sampling parameters.

`POST /v1/generate` takes one `GenerateCall` as msgpack, with prompts as token ids. The answer has
OpenAI's shape already (a JSON body, or an SSE stream whose comments carry token ids: `chunks.py`),
so that a gateway relays its bytes.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from enum import StrEnum
from operator import attrgetter
from typing import Annotated

import msgspec
from msgspec import Meta
from msgspec.structs import force_setattr

from memserve.api.answer.format import AnswerFormat
from memserve.api.forward import Forward
from memserve.api.grammar import Grammar
from memserve.api.limits import (
    MAX_ALLOWED_TOKEN_IDS,
    MAX_BAD_WORD_TOKENS,
    MAX_BAD_WORDS,
    MAX_ID_CHARACTERS,
    MAX_INT32,
    MAX_LOGIT_BIASES,
    MAX_LOGPROBS,
    MAX_NAME_CHARACTERS,
    MAX_PEERS,
    MAX_SAMPLES,
    MAX_SEQUENCES,
    MAX_STOP_CHARACTERS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
)
from memserve.errors import RequestError
from memserve.tokens import WireTokens, token_field
from memserve.types import InstanceId

GENERATE_PATH = "/v1/generate"

# Decoders check these limits; code of this process that makes a message keeps to them unchecked.
Count = Annotated[int, Meta(ge=0, le=MAX_INT32)]
Int32 = Annotated[int, Meta(ge=-MAX_INT32 - 1, le=MAX_INT32)]
Int64 = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Name = Annotated[str, Meta(max_length=MAX_NAME_CHARACTERS)]
Address = Annotated[str, Meta(max_length=MAX_ID_CHARACTERS)]
# A pool's control address. tcp only: ZeroMQ's other transports lead into this process or machine.
PoolAddress = Annotated[str, Meta(max_length=MAX_ID_CHARACTERS, pattern=r"^tcp://[!-~]+$")]


TokenId = Annotated[int, Meta(ge=0, le=MAX_INT32)]
_BadWord = Annotated[tuple[TokenId, ...], Meta(min_length=1, max_length=MAX_BAD_WORD_TOKENS)]


class FinishReason(StrEnum):
    """Why a choice ended. The first three are OpenAI's; clients never see `CANCELLED`. Engines do
    not know of `TOOL_CALLS`."""

    STOP = "stop"
    LENGTH = "length"
    TOOL_CALLS = "tool_calls"
    CANCELLED = "cancelled"
    ERROR = "error"


class SamplingParams(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """Sampling parameters of a sequence. Names and neutral values are vLLM's.

    Source of the filters' order, vLLM's v1 sampler: grammar, `allowed_token_ids`, `bad_words`,
    `min_tokens`, `logit_bias` and penalties on logits, then temperature, then min-p, top-k and
    top-p on probabilities.
    """

    max_tokens: Count = 16
    min_tokens: Count = 0
    temperature: float = 1.0  # 0: greedy
    top_k: Int32 = 0  # 0 (or -1): all
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # over prompt and output
    presence_penalty: float = 0.0  # over output
    frequency_penalty: float = 0.0  # over output
    logit_bias: Annotated[dict[int, float], Meta(max_length=MAX_LOGIT_BIASES)] = {}
    seed: Int64 | None = None
    # In addition to the model's end tokens.
    stop_token_ids: Annotated[tuple[int, ...], Meta(max_length=MAX_STOP_TOKEN_IDS)] = ()
    ignore_eos: bool = False
    # All others are left out, the model's end tokens included; (): none is.
    allowed_token_ids: Annotated[tuple[TokenId, ...], Meta(max_length=MAX_ALLOWED_TOKEN_IDS)] = ()
    # Tokens that the answer must not have one behind the other.
    bad_words: Annotated[tuple[_BadWord, ...], Meta(max_length=2 * MAX_BAD_WORDS)] = ()
    logprobs: Count | None = None  # alternatives to report besides the chosen token; None: none
    grammar: Grammar | None = None  # that the whole output obeys
    # Alternatives to report for each token of the prompt but the first; None: no scores of the
    # prompt, which is otherwise computed whole, without cached KV.
    prompt_logprobs: Count | None = None


def validate_sampling(
    params: SamplingParams, vocab_size: int, like: SamplingParams | None = None
) -> None:
    """Raise RequestError, with the allowed range, for the first value out of range.

    NaN and infinity are always out of range. The decoder has checked types. `like` has passed
    already: if `params` shares its lists of tokens, as the samples of one call do, these are not
    checked again.
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
    if p.prompt_logprobs is not None and not 0 <= p.prompt_logprobs <= MAX_LOGPROBS:
        raise _refused("prompt_logprobs", p.prompt_logprobs, f"from 0 to {MAX_LOGPROBS}")
    if p.seed is not None and not -(2**63) <= p.seed < 2**63:
        raise _refused("seed", p.seed, "a signed 64-bit integer")
    if like is not None and same_lists(p, like):
        return
    _check_token_ids("stop_token_ids", p.stop_token_ids, vocab_size)
    _check_token_ids("logit_bias", p.logit_bias, vocab_size)
    _check_token_ids("allowed_token_ids", p.allowed_token_ids, vocab_size)
    if (count := sum(map(len, p.bad_words))) > MAX_BAD_WORD_TOKENS:
        raise _refused("bad_words", count, f"at most {MAX_BAD_WORD_TOKENS} tokens together")
    for word in p.bad_words:
        _check_token_ids("bad_words", word, vocab_size)
    for bias in p.logit_bias.values():
        if not -100 <= bias <= 100:
            raise _refused("logit_bias", bias, "from -100 to 100")


_lists = attrgetter("stop_token_ids", "logit_bias", "allowed_token_ids", "bad_words")


def same_lists(a: SamplingParams, b: SamplingParams) -> bool:
    """Whether two parameters share their lists of tokens; False for equal ones of another call."""
    return all(mine is others for mine, others in zip(_lists(a), _lists(b), strict=True))


def _check_token_ids(param: str, ids: Collection[int], vocab_size: int) -> None:
    if not ids:
        return
    low, high = min(ids), max(ids)
    if low < 0 or high >= vocab_size:
        bad = low if low < 0 else high
        raise _refused(param, bad, f"a token id (0 to {vocab_size - 1})")


def _refused(param: str, value: float, allowed: str) -> RequestError:
    return RequestError(f"{param}: {str(value)[:32]} is not {allowed}", param)


class CallKind(StrEnum):
    """The OpenAI endpoint that the answer is for."""

    CHAT = "chat"
    COMPLETION = "completion"


class PrefillPeer(msgspec.Struct, frozen=True):
    """An instance that another one may ask: for a prefill, or for a prefix to fetch."""

    id: Annotated[InstanceId, Meta(max_length=MAX_ID_CHARACTERS)]
    address: Address  # http://host:port
    pool: PoolAddress | None = None  # of its pool; a prefill instance has one


StopString = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_CHARACTERS)]


class GenerateCall(
    msgspec.Struct, frozen=True, eq=False, omit_defaults=True, forbid_unknown_fields=True
):
    """One client request, tokenised. Choice `p * n + j` answers prompt p, sample j."""

    # Unique; also the OpenAI response id.
    id: Annotated[str, Meta(min_length=1, max_length=MAX_ID_CHARACTERS)]
    kind: CallKind
    model: Name  # served name, echoed
    created: Annotated[int, Meta(ge=0, le=2**53)]  # Unix seconds, echoed
    # Chat has exactly one.
    prompts: Annotated[tuple[WireTokens, ...], Meta(min_length=1, max_length=MAX_SEQUENCES)]
    sampling: SamplingParams = SamplingParams()
    n: Annotated[int, Meta(ge=1, le=MAX_SAMPLES)] = 1
    stop: Annotated[tuple[StopString, ...], Meta(max_length=MAX_STOP_STRINGS)] = ()
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    stream: bool = False
    include_usage: bool = False  # a last chunk with usage
    continuous_usage: bool = False  # the usage so far in every other chunk, too
    # Completions: the text to put before the answers of each prompt; None: the text of its token
    # ids. (): no echo.
    echo: Annotated[tuple[str | None, ...], Meta(max_length=MAX_SEQUENCES)] = ()
    # The answer has no tokens (`max_tokens` 0): the one that each sequence generates is dropped.
    prompt_only: bool = False
    # Alternatives to report for each prompt token in vLLM's form, at most `sampling`'s; not for
    # streams. With `echo` and `sampling.logprobs`, OpenAI's form has the prompt's scores, too.
    prompt_logprobs: Count | None = None
    return_token_ids: bool = False  # the client asked for `token_ids`, `prompt_token_ids`
    # Log-probabilities name their tokens `token_id:<id>`, as vLLM's do.
    return_tokens_as_token_ids: bool = False
    cache_salt: Name = ""  # namespace of the KV cache
    priority: Int32 = 0  # lower runs first
    session: Name | None = None  # the `session` policy keeps its requests on one instance
    # Instances to compute the prompt, best first; (): the receiver.
    prefill: Annotated[tuple[PrefillPeer, ...], Meta(max_length=MAX_PEERS)] = ()
    # Instance with a longer cached prefix, which the computing instance pulls first.
    fetch: PrefillPeer | None = None
    # Streams only. By choice: the tokens of the events that the client has received from a lost
    # instance. The stream continues exactly behind them. A choice that these tokens end (by an end
    # token, a stop string, or max_tokens) adds no event; if all choices have ended, the stream is
    # usage and [DONE]. (): a fresh call.
    resumed: Annotated[tuple[WireTokens, ...], Meta(max_length=MAX_SEQUENCES)] = ()
    # The request for a vLLM server, sent to it instead of token ids. The server's answer is
    # relayed and cannot be resumed; prompt and sampling only serve the choice of an instance.
    forward: Forward | None = None
    # Chats: what to find in the text. None: it is all content.
    answer: AnswerFormat | None = None
    # The request has tools, tool calls or variables of the chat template: vLLM servers get it as
    # it is.
    extended: bool = False

    @property
    def own_engine(self) -> bool:
        """Whether only the built-in engine can answer this call. For vLLM servers, the gateway
        forwards the client's request instead."""
        asked = self.sampling
        special = asked.grammar is not None or asked.prompt_logprobs is not None or self.extended
        return bool(special or asked.bad_words) and self.forward is None

    def __post_init__(self) -> None:
        force_setattr(self, "prompts", tuple(map(token_field, self.prompts)))
        if len(self.echo) not in (0, len(self.prompts)):
            raise ValueError(f"{len(self.prompts)} prompts, and {len(self.echo)} to echo")
        if self.resumed:
            force_setattr(self, "resumed", tuple(map(token_field, self.resumed)))

"""The request for one sequence at a vLLM server, and the parser of its streamed answer. Pure.

Sequences go to `/v1/completions` as token ids and come back as token ids; the instance itself does
detokenization, stop strings and OpenAI's formats. Formats are those of vLLM 0.32
(`CompletionRequest`, `CompletionStreamResponse`), which has `return_token_ids` and
`return_tokens_as_token_ids`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from memserve.api.generate import FinishReason
from memserve.api.namespaces import cache_salt_of
from memserve.engine.request import EngineRequest, TokenLogprobs, TokenOutput, Usage
from memserve.errors import MemserveError, RequestError
from memserve.vllm.pool_messages import PARAMETERS
from memserve.vllm.remote_link import PushOrder

COMPLETIONS_PATH = "/v1/completions"
MAX_EVENT_BYTES = 16 * 1024 * 1024  # an event has one step's tokens and their scores
_END = b"\n\n"
_DATA = b"data: "
_DONE = b"[DONE]"
_TOKEN = re.compile(r"token_id:([0-9]{1,10})")
_FINISHES = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH}


class MalformedAnswer(MemserveError):
    """The server's answer is not a valid stream of a completion."""


_TokenId = Annotated[int, Meta(ge=0, lt=1 << 31)]


class _Scores(msgspec.Struct, frozen=True):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]


class _Choice(msgspec.Struct, frozen=True):
    token_ids: list[_TokenId] | None = None
    logprobs: _Scores | None = None
    finish_reason: str | None = None


class _Details(msgspec.Struct, frozen=True):
    cached_tokens: Annotated[int, Meta(ge=0)] | None = None


class _Usage(msgspec.Struct, frozen=True):
    prompt_tokens_details: _Details | None = None


class _Error(msgspec.Struct, frozen=True):
    message: str = "it does not say why"


class _Event(msgspec.Struct, frozen=True):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: _Error | None = None


_event = msgspec.json.Decoder(_Event)
_encode = msgspec.json.Encoder().encode


def completion_body(request: EngineRequest, model: str) -> bytes:
    """Return the JSON body for one sequence. Raises RequestError as `require_exact`."""
    require_exact(request)
    sampling, done = request.sampling, len(request.output)
    most = 1 if request.prefill_only else sampling.max_tokens - done
    body: dict[str, Any] = {
        "model": model,
        "prompt": request.tokens.tolist(),
        "max_tokens": most,
        "min_tokens": min(most, max(0, sampling.min_tokens - done)),
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "ignore_eos": sampling.ignore_eos,
        "stop_token_ids": sampling.stop_token_ids,
        "skip_special_tokens": False,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
        "add_special_tokens": False,
    }
    if sampling.allowed_token_ids:
        body["allowed_token_ids"] = sampling.allowed_token_ids
    if sampling.logit_bias:
        body["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias.items()}
    if sampling.seed is not None:
        body["seed"] = sampling.seed
    if sampling.logprobs is not None:
        body |= {"logprobs": sampling.logprobs, "return_tokens_as_token_ids": True}
    if (salt := cache_salt_of(request.namespace)) is not None:
        body["cache_salt"] = salt
    if request.priority:
        body["priority"] = request.priority
    if isinstance(request.observer, PushOrder):
        body["kv_transfer_params"] = {PARAMETERS: {"order": request.observer.number}}
    return _encode(body)


def require_exact(request: EngineRequest) -> None:
    """Raise RequestError if the server cannot continue a begun sequence exactly: vLLM counts the
    generated tokens as prompt, so a seed's random state, and presence and frequency penalties,
    would differ."""
    sampling = request.sampling
    random = sampling.temperature > 0 and sampling.seed is not None
    if len(request.output) and (random or sampling.presence_penalty or sampling.frequency_penalty):
        raise RequestError("vLLM cannot go on with a seed or with penalties", "seed")


class AnswerReader:
    """Parses the bytes of one sequence's answer into its outputs."""

    def __init__(self, request: EngineRequest) -> None:
        self.ended = False  # its last output has been read
        self._id = request.id
        self._logprobs = request.sampling.logprobs
        self._prompt_tokens = len(request.tokens)
        self._cached: int | None = None
        self._rest = b""
        self._last: TokenOutput | None = None  # until the usage behind it has come

    def feed(self, data: bytes) -> list[TokenOutput]:
        """Return the outputs of the events that are complete with `data`. Raises
        MalformedAnswer."""
        *events, self._rest = (self._rest + data).split(_END)
        if len(self._rest) > MAX_EVENT_BYTES:
            raise MalformedAnswer(f"an event of more than {MAX_EVENT_BYTES} bytes")
        return [output for event in events for output in self._read(event)]

    def failed(self, why: str) -> TokenOutput:
        """Return the last output of a sequence that failed at the server, with the reason."""
        self.ended = True
        return TokenOutput(
            self._id, (), self._final_usage, finish_reason=FinishReason.ERROR, error=why
        )

    def cancelled(self) -> TokenOutput:
        """Return the last output of a sequence that this engine has cancelled."""
        self.ended = True
        return TokenOutput(self._id, (), self._final_usage, finish_reason=FinishReason.CANCELLED)

    @property
    def _final_usage(self) -> Usage:
        """Return the usage with cached tokens; 0 if the server has not reported them."""
        return Usage(self._prompt_tokens, self._cached or 0, 0)

    def _read(self, event: bytes) -> Iterator[TokenOutput]:
        if not event.startswith(_DATA) or self.ended:  # a comment keeps the connection alive
            return
        text = event[len(_DATA) :]
        if text == _DONE:
            if self._last is None:
                raise MalformedAnswer("it ended without a reason")
            self.ended = True
            yield replace(self._last, usage=self._final_usage)
            return
        try:
            said = _event.decode(text)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise MalformedAnswer(str(error)) from error
        if said.error is not None:
            yield self.failed(said.error.message)
            return
        if said.usage is not None and (details := said.usage.prompt_tokens_details) is not None:
            self._cached = min(details.cached_tokens or 0, self._prompt_tokens)
        for choice in said.choices[:1]:
            yield from self._chosen(choice)

    def _chosen(self, choice: _Choice) -> Iterator[TokenOutput]:
        tokens = tuple(choice.token_ids or ())
        usage = Usage(self._prompt_tokens, self._cached, 0)
        scores: tuple[TokenLogprobs, ...] = ()
        if self._logprobs is not None and choice.logprobs is not None:
            scores = tuple(_scores(choice.logprobs, self._logprobs))
            if len(scores) != len(tokens):
                raise MalformedAnswer(f"{len(tokens)} tokens with {len(scores)} scores")
        if choice.finish_reason is None:
            if tokens:
                yield TokenOutput(self._id, tokens, usage, scores)
            return
        finish = _FINISHES.get(choice.finish_reason)
        if finish is None:
            yield self.failed(f"vLLM ended it: {choice.finish_reason[:64]}")
            return
        stop = tokens[-1] if finish is FinishReason.STOP and tokens else None
        self._last = TokenOutput(self._id, tokens, usage, scores, finish, stop)


def _scores(said: _Scores, wanted: int) -> Iterator[TokenLogprobs]:
    """Yield the log-probabilities of each token, with the `wanted` best alternatives. vLLM adds the
    chosen token to the list if it is not among the best, without a rank; it is then ranked behind
    all of them."""
    for name, chosen, top in zip(said.tokens, said.token_logprobs, said.top_logprobs, strict=False):
        if chosen is None:
            raise MalformedAnswer("a token without its score")
        others = sorted((top or {name: chosen}).items(), key=lambda item: -item[1])
        rank = 1 + sum(score > chosen for _, score in others)
        yield TokenLogprobs(
            chosen, rank, tuple((_token(token), score) for token, score in others[:wanted])
        )


def _token(name: str) -> int:
    match = _TOKEN.fullmatch(name)
    if match is None:
        raise MalformedAnswer(f"{name[:64]!r} is no token id")
    return int(match[1])

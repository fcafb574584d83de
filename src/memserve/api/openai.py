"""What clients may send: OpenAI's requests with vLLM's extensions.

A field that would change the answer and is not supported is refused by name, never ignored;
its neutral values (null, [], {}, the default) are accepted, because clients send them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from operator import attrgetter
from typing import Annotated, Final, Literal, TypeVar

import msgspec
from msgspec import Meta

from memserve.api.errors import ApiError, invalid
from memserve.api.generate import MAX_LOGPROBS, SamplingParams
from memserve.api.token_ids import TokenIds

MAX_STOP_STRINGS = 16  # OpenAI: 4
MAX_STOP_LENGTH = 4096  # characters; text this long may be held back while streaming
MAX_SAMPLES = 128  # `n`; OpenAI's limit

TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
_Positive = Annotated[int, Meta(ge=1, le=2**31 - 1)]
_StopString = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_LENGTH)]
_Stops = Annotated[tuple[_StopString, ...], Meta(max_length=MAX_STOP_STRINGS)]


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # padding against traffic analysis: none is added


class _Unsupported(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Fields that clients know and this server can only take in their neutral values."""

    allowed_token_ids: object = None
    audio: object = None
    bad_words: object = None
    chat_template: object = None
    chat_template_kwargs: object = None
    continue_final_message: object = None
    documents: object = None
    function_call: object = None
    functions: object = None
    guided_choice: object = None
    guided_grammar: object = None
    guided_json: object = None
    guided_regex: object = None
    kv_transfer_params: object = None
    length_penalty: object = None
    logits_processors: object = None
    modalities: object = None
    prediction: object = None
    prompt_logprobs: object = None
    reasoning_effort: object = None
    response_format: object = None
    return_tokens_as_token_ids: object = None
    service_tier: object = None
    spaces_between_special_tokens: object = None
    store: object = None
    structured_outputs: object = None
    suffix: object = None
    tool_choice: object = None
    tools: object = None
    truncate_prompt_tokens: object = None
    use_beam_search: object = None
    verbosity: object = None
    web_search_options: object = None


# Neutral values besides null, [] and {}.
_NEUTRAL: Final[dict[str, tuple[object, ...]]] = {
    "continue_final_message": (False,),
    "function_call": ("none", "auto"),
    "length_penalty": (1,),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
    "return_tokens_as_token_ids": (False,),
    "service_tier": ("auto", "default"),
    "spaces_between_special_tokens": (True,),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
}
_UNSUPPORTED = _Unsupported.__struct_fields__
_unsupported_values = attrgetter(*_UNSUPPORTED)
_ALL_ABSENT = (None,) * len(_UNSUPPORTED)


class _Request(_Unsupported, frozen=True, kw_only=True):
    """Fields that both endpoints share. None is "not given".

    Ranges that depend on the model, and those of sampling, are checked by `validate_sampling`.
    """

    model: str | None = None
    max_tokens: _Positive | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_SAMPLES)] | None = None
    stop: _StopString | _Stops | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    user: str | None = None  # requests of one are kept together by the policy `session`
    metadata: dict[str, object] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    parallel_tool_calls: bool | None = None
    # vLLM's extensions
    best_of: int | None = None
    top_k: Annotated[int, Meta(le=2**31 - 1)] | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    stop_token_ids: tuple[int, ...] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    cache_salt: Annotated[str, Meta(min_length=1)] | None = None
    priority: Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)] | None = None

    @property
    def samples(self) -> int:
        return self.n or 1

    @property
    def stop_strings(self) -> tuple[str, ...]:
        if isinstance(self.stop, str):
            return (self.stop,)
        return self.stop or ()

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


# A prompt's text, its token ids, or several of either.
Prompts = str | tuple[str | TokenId | tuple[TokenId, ...], ...]


class CompletionFields(_Request, frozen=True, kw_only=True):
    """All of a completion but its prompt."""

    echo: bool | None = None
    logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None


class CompletionRequest(CompletionFields, frozen=True, kw_only=True):
    """`POST /v1/completions`."""

    prompt: Prompts


class _AnyPrompt(CompletionFields, frozen=True, kw_only=True):
    prompt: msgspec.Raw


class TextPart(
    msgspec.Struct, frozen=True, tag_field="type", tag="text", forbid_unknown_fields=True
):
    text: str


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One turn. What an assistant's answer carries besides text is accepted when empty."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | tuple[TextPart, ...] | None = None
    name: str | None = None
    refusal: None = None
    annotations: Annotated[tuple[object, ...], Meta(max_length=0)] | None = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[tuple[object, ...], Meta(max_length=0)] | None = None

    @property
    def text(self) -> str:
        """The content; several parts are lines of it, as in vLLM."""
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        return "\n".join(part.text for part in self.content)


class ChatRequest(_Request, frozen=True, kw_only=True):
    """`POST /v1/chat/completions`."""

    messages: Annotated[tuple[Message, ...], Meta(min_length=1)]
    max_completion_tokens: _Positive | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    add_generation_prompt: bool | None = None
    echo: bool | None = None


T = TypeVar("T")
RequestT = TypeVar("RequestT", CompletionRequest, ChatRequest)

_NO_SAMPLING = SamplingParams()
_completion = msgspec.json.Decoder(CompletionRequest)
_any_prompt = msgspec.json.Decoder(_AnyPrompt)
_chat = msgspec.json.Decoder(ChatRequest)


def parse_completion(body: bytes) -> CompletionRequest:
    """Raises ApiError (400) that names the field at fault."""
    request = _decode(_completion, body)
    _check_completion(request)
    return request


def parse_token_completion(
    body: bytes, plain: Callable[[msgspec.Raw], TokenIds | None]
) -> tuple[CompletionFields, TokenIds] | None:
    """The same for one prompt of token ids, without an object for each; `plain` makes them of
    JSON that it recognises. None: `parse_completion` has to look at this body. Raises ApiError."""
    try:
        request = _any_prompt.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    ids = plain(request.prompt)
    if ids is None:
        return None
    _check_completion(request)
    return request, ids


def parse_chat(body: bytes) -> ChatRequest:
    """Raises ApiError (400) that names the field at fault."""
    request = _decode(_chat, body)
    _check_common(request)
    if request.echo:
        raise invalid("'echo' is not supported here.", "echo")
    if request.top_logprobs and not request.logprobs:
        raise invalid("'top_logprobs' needs 'logprobs': true.", "top_logprobs")
    if None not in (request.max_tokens, request.max_completion_tokens) and (
        request.max_tokens != request.max_completion_tokens
    ):
        raise invalid("'max_tokens' and 'max_completion_tokens' differ.", "max_tokens")
    return request


def sampling_params(
    request: CompletionFields | ChatRequest, max_tokens: int, logprobs: int | None
) -> SamplingParams:
    """What the engine is asked for; fields that were not given take their neutral values."""
    neutral = _NO_SAMPLING
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=_or(request.min_tokens, neutral.min_tokens),
        temperature=_or(request.temperature, neutral.temperature),
        top_k=_or(request.top_k, neutral.top_k),
        top_p=_or(request.top_p, neutral.top_p),
        min_p=_or(request.min_p, neutral.min_p),
        repetition_penalty=_or(request.repetition_penalty, neutral.repetition_penalty),
        presence_penalty=_or(request.presence_penalty, neutral.presence_penalty),
        frequency_penalty=_or(request.frequency_penalty, neutral.frequency_penalty),
        logit_bias=_or(request.logit_bias, neutral.logit_bias),
        seed=request.seed,
        stop_token_ids=_or(request.stop_token_ids, neutral.stop_token_ids),
        ignore_eos=_or(request.ignore_eos, neutral.ignore_eos),
        logprobs=logprobs,
    )


def _or(value: T | None, default: T) -> T:
    return default if value is None else value


def chat_logprobs(request: ChatRequest) -> int | None:
    return (request.top_logprobs or 0) if request.logprobs else None


def _decode(decoder: msgspec.json.Decoder[RequestT], body: bytes) -> RequestT:
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _refusal(str(error)) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise invalid(
            f"The request body is not valid JSON: {error}", code="invalid_json"
        ) from error
    except RecursionError as error:
        raise invalid("The request body is nested too deeply.", code="invalid_json") from error


_FIELD_OF_PATH = re.compile(r"`\$\.(\w+)")
_FIELD_OF_MESSAGE = re.compile(r"field `([^`]*)`")


def _refusal(message: str) -> ApiError:
    field = _FIELD_OF_PATH.search(message) or _FIELD_OF_MESSAGE.search(message)
    if message.startswith("Invalid value") and "].content[" in message:
        message += "; only text content is supported"
    return invalid(message, field.group(1) if field else None)


def _check_completion(request: CompletionFields) -> None:
    _check_common(request)
    if request.echo and request.logprobs is not None:
        raise invalid("'echo' cannot be combined with 'logprobs' here.", "echo")


def _check_common(request: CompletionFields | ChatRequest) -> None:
    values = _unsupported_values(request)
    if values != _ALL_ABSENT:
        for name, value in zip(_UNSUPPORTED, values, strict=True):
            if value not in (None, [], {}) and value not in _NEUTRAL.get(name, ()):
                raise invalid(f"'{name}' is not supported.", name, "unsupported_parameter")
    if request.best_of not in (None, request.samples):
        raise invalid("'best_of' other than 'n' is not supported.", "best_of")
    if request.stream_options is not None and not request.stream:
        raise invalid("'stream_options' needs 'stream': true.", "stream_options")

"""Clients' requests: OpenAI's, with vLLM's extensions.

A field that would change the answer and is not supported is refused by name, never ignored;
its neutral values (null, [], {}, the default) are accepted, because clients send them.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from memserve.api.errors import NotUnderstood as NotUnderstood
from memserve.api.errors import invalid
from memserve.api.generate import SamplingParams
from memserve.api.json_body import decode_json
from memserve.api.limits import (
    MAX_ALLOWED_TOKEN_IDS,
    MAX_BAD_WORDS,
    MAX_INT32,
    MAX_LOGIT_BIASES,
    MAX_LOGPROBS,
    MAX_MESSAGES,
    MAX_METADATA_ENTRIES,
    MAX_NAME_CHARACTERS,
    MAX_PARTS,
    MAX_SAMPLES,
    MAX_STOP_CHARACTERS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    MAX_TOOLS,
)
from memserve.api.neutral import IGNORED, is_neutral_json, unsupported
from memserve.api.openai_tools import Tool, ToolCalls, ToolChoice
from memserve.api.structured import FIELDS as STRUCTURED_FIELDS
from memserve.api.structured import grammar_of

TokenId = Annotated[int, Meta(ge=0, le=MAX_INT32)]
_Positive = Annotated[int, Meta(ge=1, le=MAX_INT32)]
_Name = Annotated[str, Meta(max_length=MAX_NAME_CHARACTERS)]
_StopString = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_CHARACTERS)]
_Stops = Annotated[tuple[_StopString, ...], Meta(max_length=MAX_STOP_STRINGS)]

# A field that is not parsed: no object is made of it, however large and deep it is.
_Json = msgspec.Raw | UnsetType


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # padding against traffic analysis: none is added
    continuous_usage_stats: bool | None = None  # vLLM's: with `include_usage`, in every chunk


class SharedFields(msgspec.Struct, frozen=True, kw_only=True):
    """Fields that a vLLM server knows, too. None: not given.

    Ranges that depend on the model, and those of sampling, are checked by `validate_sampling`.
    """

    model: _Name | None = None
    max_tokens: _Positive | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_SAMPLES)] | None = None
    stop: _StopString | _Stops | None = None
    stream: bool | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Annotated[dict[int, float], Meta(max_length=MAX_LOGIT_BIASES)] | None = None
    seed: int | None = None
    user: _Name | None = None  # the session of the `session` policy
    metadata: Annotated[dict[_Name, _Name], Meta(max_length=MAX_METADATA_ENTRIES)] | None = None
    safety_identifier: _Name | None = None
    prompt_cache_key: _Name | None = None
    parallel_tool_calls: bool | None = None
    # vLLM's extensions
    best_of: int | None = None
    top_k: Annotated[int, Meta(le=2**31 - 1)] | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    stop_token_ids: Annotated[tuple[int, ...], Meta(max_length=MAX_STOP_TOKEN_IDS)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    cache_salt: Annotated[str, Meta(min_length=1, max_length=MAX_NAME_CHARACTERS)] | None = None
    priority: Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)] | None = None

    @property
    def samples(self) -> int:
        return self.n or 1


class _Request(SharedFields, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Fields that both endpoints share."""

    stream_options: StreamOptions | None = None
    # Constraints of the answer: `structured.grammar_of`.
    response_format: _Json = UNSET
    structured_outputs: _Json = UNSET
    guided_json: _Json = UNSET
    guided_regex: _Json = UNSET
    guided_choice: _Json = UNSET
    guided_grammar: _Json = UNSET
    prompt_logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    allowed_token_ids: (
        Annotated[tuple[TokenId, ...], Meta(min_length=1, max_length=MAX_ALLOWED_TOKEN_IDS)] | None
    ) = None
    bad_words: Annotated[tuple[_StopString, ...], Meta(max_length=MAX_BAD_WORDS)] | None = None
    # The prompt's tokens that are kept; -1: as many as the model takes.
    truncate_prompt_tokens: Annotated[int, Meta(ge=-1, le=MAX_INT32)] | None = None
    truncation_side: Literal["left", "right"] | None = None
    # Fields that are accepted with neutral values only.
    audio: _Json = UNSET
    chat_template: _Json = UNSET
    ec_transfer_params: _Json = UNSET
    function_call: _Json = UNSET
    functions: _Json = UNSET
    kv_transfer_params: _Json = UNSET
    logits_processors: _Json = UNSET
    logprob_token_ids: _Json = UNSET
    modalities: _Json = UNSET
    moderation: _Json = UNSET
    prediction: _Json = UNSET
    prompt_embeds: _Json = UNSET
    repetition_detection: _Json = UNSET
    return_mm_kwargs: _Json = UNSET
    return_prompt_text: _Json = UNSET
    return_token_offsets: _Json = UNSET
    routed_experts_prompt_start: _Json = UNSET
    spaces_between_special_tokens: _Json = UNSET
    suffix: _Json = UNSET
    thinking_token_budget: _Json = UNSET
    use_beam_search: _Json = UNSET
    verbosity: _Json = UNSET
    vllm_xargs: _Json = UNSET
    watermarking: _Json = UNSET
    web_search_options: _Json = UNSET
    # IGNORED
    length_penalty: _Json = UNSET
    media_io_kwargs: _Json = UNSET
    mm_payload: _Json = UNSET
    mm_processor_kwargs: _Json = UNSET
    prompt_cache_options: _Json = UNSET
    prompt_cache_retention: _Json = UNSET
    request_id: _Json = UNSET
    service_tier: _Json = UNSET
    session_id: _Json = UNSET
    store: _Json = UNSET
    stream_interval: _Json = UNSET

    @property
    def stop_strings(self) -> tuple[str, ...]:
        if isinstance(self.stop, str):
            return (self.stop,)
        return self.stop or ()

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        options = self.stream_options
        return bool(options and options.include_usage and options.continuous_usage_stats)


# A prompt's text, its token ids, or several of either.
Prompts = str | tuple[str | TokenId | tuple[TokenId, ...], ...]


class CompletionRequest(_Request, frozen=True, kw_only=True):
    """`POST /v1/completions`."""

    # Not parsed: `gateway.prompts` counts the prompts first.
    prompt: Annotated[msgspec.Raw, Meta(extra_json_schema=msgspec.json.schema(Prompts))]
    max_tokens: Annotated[int, Meta(ge=0, le=MAX_INT32)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    # Of chats; accepted with neutral values only.
    chat_template_kwargs: _Json = UNSET
    continue_final_message: _Json = UNSET
    documents: _Json = UNSET
    include_reasoning: _Json = UNSET
    reasoning_effort: _Json = UNSET
    tool_choice: _Json = UNSET
    tools: _Json = UNSET


class TextPart(
    msgspec.Struct, frozen=True, tag_field="type", tag="text", forbid_unknown_fields=True
):
    text: str
    # Where a provider's cache should begin: here every prefix is cached.
    cache_control: _Json = UNSET
    prompt_cache_breakpoint: _Json = UNSET


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One turn. Fields of an assistant's answer that are not supported are accepted when empty."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[tuple[TextPart, ...], Meta(max_length=MAX_PARTS)] | None = None
    name: _Name | None = None
    refusal: None = None
    annotations: Annotated[tuple[msgspec.Raw, ...], Meta(max_length=0)] | None = None
    audio: None = None
    function_call: None = None
    tool_calls: ToolCalls | None = None  # of an assistant
    tool_call_id: _Name | None = None  # of a tool
    reasoning: str | None = None  # of an assistant; vLLM's name
    reasoning_content: str | None = None  # the same; DeepSeek's name

    @property
    def text(self) -> str:
        """The content; several parts are lines of it, as in vLLM."""
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        return "\n".join(part.text for part in self.content)


ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class ChatRequest(_Request, frozen=True, kw_only=True):
    """`POST /v1/chat/completions`."""

    messages: Annotated[tuple[Message, ...], Meta(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: _Positive | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    add_generation_prompt: bool | None = None
    echo: bool | None = None
    tools: Annotated[tuple[Tool, ...], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    chat_template_kwargs: dict[_Name, Any] | None = None
    documents: tuple[dict[_Name, Any], ...] | None = None  # for the template
    continue_final_message: bool | None = None
    reasoning_effort: ReasoningEffort | None = None
    include_reasoning: bool | None = None


class _Unsupported:
    """The fields of a request that are accepted with neutral values only."""

    def __init__(self, kind: type[_Request]) -> None:
        self.names = tuple(
            field.name
            for field in msgspec.structs.fields(kind)
            if field.default is UNSET and field.name not in IGNORED.union(STRUCTURED_FIELDS)
        )
        self.values = attrgetter(*self.names)
        self.absent = (UNSET,) * len(self.names)


_UNSUPPORTED = {kind: _Unsupported(kind) for kind in (CompletionRequest, ChatRequest)}
_NO_SAMPLING = SamplingParams()
_constraints = attrgetter(*STRUCTURED_FIELDS)
_completion = msgspec.json.Decoder(CompletionRequest)
_chat = msgspec.json.Decoder(ChatRequest)


def parse_completion(body: bytes) -> CompletionRequest:
    """Decode a request, but not its prompt. `body`: not nested deeper than MAX_DEPTH. Raises
    ApiError (400) that names the field at fault."""
    request = decode_json(_completion.decode, body)
    _check_common(request)
    return request


def parse_chat(body: bytes) -> ChatRequest:
    """Decode a request. `body`: not nested deeper than MAX_DEPTH. Raises ApiError (400) that names
    the field at fault."""
    request = decode_json(_chat.decode, body)
    _check_common(request)
    if request.echo:
        raise NotUnderstood("'echo' is not supported here.", "echo")
    if request.top_logprobs and not request.logprobs:
        raise invalid("'top_logprobs' needs 'logprobs': true.", "top_logprobs")
    if not request.tools and request.tool_choice not in (None, "none", "auto"):
        raise invalid("'tool_choice' needs 'tools'.", "tool_choice")
    if None not in (request.max_tokens, request.max_completion_tokens) and (
        request.max_tokens != request.max_completion_tokens
    ):
        raise invalid("'max_tokens' and 'max_completion_tokens' differ.", "max_tokens")
    return request


def sampling_params(
    request: CompletionRequest | ChatRequest,
    max_tokens: int,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
    bad_words: tuple[tuple[int, ...], ...] = (),
) -> SamplingParams:
    """Return the engine's parameters; fields that were not given have neutral values. `bad_words`:
    the request's, as tokens."""
    none, asked = _NO_SAMPLING, request
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=none.min_tokens if asked.min_tokens is None else asked.min_tokens,
        temperature=none.temperature if asked.temperature is None else asked.temperature,
        top_k=none.top_k if asked.top_k is None else asked.top_k,
        top_p=none.top_p if asked.top_p is None else asked.top_p,
        min_p=none.min_p if asked.min_p is None else asked.min_p,
        repetition_penalty=none.repetition_penalty
        if asked.repetition_penalty is None
        else asked.repetition_penalty,
        presence_penalty=none.presence_penalty
        if asked.presence_penalty is None
        else asked.presence_penalty,
        frequency_penalty=none.frequency_penalty
        if asked.frequency_penalty is None
        else asked.frequency_penalty,
        logit_bias=none.logit_bias if asked.logit_bias is None else asked.logit_bias,
        seed=asked.seed,
        stop_token_ids=asked.stop_token_ids or (),
        ignore_eos=bool(asked.ignore_eos),
        allowed_token_ids=asked.allowed_token_ids or (),
        bad_words=bad_words,
        logprobs=logprobs,
        grammar=grammar_of(request),
        prompt_logprobs=prompt_logprobs,
    )


def check_best_of(request: SharedFields) -> None:
    """Raise ApiError (400) if `best_of` is given and not `n`."""
    if request.best_of not in (None, request.samples):
        raise invalid("'best_of' other than 'n' is not supported.", "best_of")


def unconstrained(request: ChatRequest) -> bool:
    """Return whether no field of a request constrains the answer by a grammar."""
    return all(value is UNSET for value in _constraints(request))


def chat_logprobs(request: ChatRequest) -> int | None:
    return (request.top_logprobs or 0) if request.logprobs else None


def _check_common(request: CompletionRequest | ChatRequest) -> None:
    unsupporting = _UNSUPPORTED[type(request)]
    values = unsupporting.values(request)
    if values != unsupporting.absent:
        for name, value in zip(unsupporting.names, values, strict=True):
            if value is not UNSET and not is_neutral_json(name, value):
                raise unsupported(name)
    grammar_of(request)  # raises before anything is tokenised
    check_best_of(request)
    if request.stream and request.prompt_logprobs is not None:
        raise invalid("'prompt_logprobs' is not available with 'stream'.", "prompt_logprobs")
    if request.return_tokens_as_token_ids and request.prompt_logprobs is not None:
        raise NotUnderstood(
            "'return_tokens_as_token_ids' cannot be combined with 'prompt_logprobs' here.",
            "return_tokens_as_token_ids",
        )
    if request.truncate_prompt_tokens == 0:
        raise invalid("'truncate_prompt_tokens' is 1 or more, or -1.", "truncate_prompt_tokens")
    if request.stream_options is not None and not request.stream:
        raise invalid("'stream_options' needs 'stream': true.", "stream_options")

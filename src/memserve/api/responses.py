"""OpenAI's Responses: requests, items and answers of `/v1/responses`.

A request is translated into a chat (`gateway/responses_request.py`) and its answer back
(`gateway/responses_reply.py`). Fields that a chat has too are not parsed here: the chat's decoder
checks them. Names are those of OpenAI's API, with vLLM's extensions.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from memserve.api.limits import (
    MAX_INT32,
    MAX_LOGPROBS,
    MAX_NAME_CHARACTERS,
    MAX_PARTS,
    MAX_TOOLS,
)

Name = Annotated[str, Meta(max_length=MAX_NAME_CHARACTERS)]
_Json = msgspec.Raw | UnsetType

# Fields that go to the chat as they are.
SHARED_WITH_CHAT: Final = (
    "cache_salt",
    "chat_template_kwargs",
    "frequency_penalty",
    "ignore_eos",
    "include_reasoning",
    "include_stop_str_in_output",
    "logit_bias",
    "metadata",
    "min_p",
    "min_tokens",
    "model",
    "parallel_tool_calls",
    "presence_penalty",
    "priority",
    "prompt_cache_key",
    "repetition_penalty",
    "safety_identifier",
    "seed",
    "skip_special_tokens",
    "stop",
    "stop_token_ids",
    "structured_outputs",
    "temperature",
    "top_k",
    "top_p",
    "user",
)
# Fields on which no answer depends here: any value is accepted.
IGNORED: Final = frozenset(
    {
        "max_tool_calls",  # of tools that the server runs; there are none
        "media_io_kwargs",  # of media, which are refused themselves
        "mm_payload",
        "mm_processor_kwargs",
        "prompt_cache_options",
        "prompt_cache_retention",
        "request_id",
        "service_tier",
        "session_id",
        "stream_options",  # padding and its like
    }
)
# Fields that are accepted with neutral values only, and these besides null, [] and {}.
NEUTRAL: Final[dict[str, tuple[object, ...]]] = {
    "access_programs": (),
    "background": (False,),
    "background_options": (),
    "context_management": (),
    "conversation": (),
    "ec_transfer_params": (),
    "enable_response_messages": (False,),
    "image": (),
    "kv_transfer_params": (),
    "moderation": (),
    "previous_input_messages": (),
    "prompt": (),
    "return_mm_kwargs": (False,),
    "truncation": ("disabled",),
    "vllm_xargs": (),
    "watermarking": (),
}


class Reasoning(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`summary`: of `auto` and null no summary is made, and no other value is accepted."""

    effort: Annotated[str, Meta(max_length=32)] | None = None
    summary: Literal["auto"] | None = None
    generate_summary: Literal["auto"] | None = None
    context: Literal["auto"] | None = None
    mode: Literal["standard"] | None = None


class TextSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    format: _Json = UNSET
    verbosity: _Json = UNSET


# The value of `include` with an effect. All others name the output of tools that a server runs, or
# what is encrypted for another server, and there is none.
WITH_LOGPROBS: Final = "message.output_text.logprobs"


class ResponsesRequest(msgspec.Struct, frozen=True, kw_only=True):
    """`POST /v1/responses`, without the fields named above. `input`: a text, or items."""

    input: msgspec.Raw
    instructions: str | None = None
    max_output_tokens: Annotated[int, Meta(ge=1, le=MAX_INT32)] | None = None
    stream: bool | None = None
    text: TextSettings | None = None
    tools: Annotated[tuple[dict[str, Any], ...], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    reasoning: Reasoning | None = None
    include: Annotated[tuple[Name, ...], Meta(max_length=32)] | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    previous_response_id: Name | None = None
    store: bool | None = None


OWN: Final = frozenset(ResponsesRequest.__struct_fields__)


# --- items of a request: more forms are accepted than are sent


class Part(msgspec.Struct, frozen=True):
    """A content part. Unknown fields (annotations, log-probabilities) carry nothing to a model."""

    type: Name
    text: str | None = None
    refusal: str | None = None


Content = str | Annotated[tuple[Part, ...], Meta(max_length=MAX_PARTS)]


class InputItem(msgspec.Struct, frozen=True):
    """An item of `input`: a message, a function's call, or its output."""

    type: Name = "message"
    id: Name | None = None
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: Content | None = None
    call_id: Name | None = None
    name: Name | None = None
    arguments: str | None = None
    output: Content | None = None


# --- items as they are sent, and kept


class TextPart(msgspec.Struct, frozen=True):
    text: str
    type: str = "input_text"


class OutputText(msgspec.Struct, frozen=True):
    text: str
    logprobs: Annotated[msgspec.Raw, Meta(extra_json_schema={})] = msgspec.Raw(b"[]")
    type: str = "output_text"
    annotations: tuple[()] = ()


class ReasoningText(msgspec.Struct, frozen=True):
    text: str
    type: str = "reasoning_text"


class MessageItem(msgspec.Struct, frozen=True):
    """A message; an assistant's has `OutputText`."""

    id: str
    role: str
    content: tuple[TextPart | OutputText, ...] | list[Any]
    status: str = "completed"
    type: str = "message"


class FunctionCallItem(msgspec.Struct, frozen=True):
    id: str
    call_id: str
    name: str
    arguments: str
    status: str = "completed"
    type: str = "function_call"


class FunctionOutputItem(msgspec.Struct, frozen=True):
    id: str
    call_id: str
    output: str
    status: str = "completed"
    type: str = "function_call_output"


class ReasoningItem(msgspec.Struct, frozen=True):
    id: str
    content: tuple[ReasoningText, ...]
    status: str = "completed"
    summary: tuple[()] = ()
    type: str = "reasoning"


OutputItem = MessageItem | FunctionCallItem | ReasoningItem


# --- the answer


class InputTokensDetails(msgspec.Struct, frozen=True):
    cached_tokens: int
    cache_write_tokens: int = 0  # that are billed apart; nothing is


class OutputTokensDetails(msgspec.Struct, frozen=True):
    reasoning_tokens: int


class ResponseUsage(msgspec.Struct, frozen=True):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseError(msgspec.Struct, frozen=True):
    code: str
    message: str


class IncompleteDetails(msgspec.Struct, frozen=True):
    reason: str


class Response(msgspec.Struct, frozen=True, kw_only=True):
    """The body that answers `POST /v1/responses`, and what a stream's events have of it."""

    id: str
    object: str = "response"
    created_at: int
    status: str = "in_progress"
    background: bool = False
    completed_at: int | None = None
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    max_tool_calls: int | None = None
    metadata: Any = {}
    model: str
    output: list[Any] = []
    parallel_tool_calls: Any = True
    previous_response_id: str | None = None
    prompt_cache_key: Any = None
    reasoning: Any = None
    safety_identifier: Any = None
    service_tier: str = "default"
    store: bool
    temperature: Any = None
    text: Any = None
    tool_choice: Any = "auto"
    tools: Any = ()
    top_logprobs: int = 0
    top_p: Any = None
    truncation: str = "disabled"
    usage: ResponseUsage | None = None
    user: Any = None

"""Fields of clients' requests, from the openai package and vLLM's protocol, and what the gateway
does with each: it is asked, so that docs/api.md follows the code.

    python -m tests.api_fields    # writes docs/api.md's tables anew: `make api-docs`
"""

from __future__ import annotations

import asyncio
import json
import re
import tempfile
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, get_type_hints

from openai.types import completion_create_params
from openai.types.chat import (
    ChatCompletionAssistantMessageParam,
    ChatCompletionContentPartTextParam,
    ChatCompletionStreamOptionsParam,
    ChatCompletionUserMessageParam,
)
from openai.types.chat import (
    completion_create_params as chat_create_params,
)
from openai.types.responses import response_create_params

from memserve.api import neutral, openai, responses
from memserve.api.errors import ApiError
from memserve.api.status import Limits
from memserve.gateway.call_builder import CallBuilder
from memserve.gateway.responses_request import chat_body, of_this_request, read_input, read_request
from memserve.gateway.tokenization import Tokenization
from tests.fakes import MODEL, tiny_tokenizer

PAGE = Path(__file__).parent.parent / "docs/api.md"
BEGIN, END = "<!-- begin: make api-docs -->\n", "<!-- end -->\n"
VLLM: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parent / "data/vllm-0.32-fields.json").read_text(encoding="utf-8")
)
LIMITS = Limits(
    vocab_size=320,
    max_model_len=256,
    pool_tokens=1024,
    max_tokens=256,
    block_tokens=16,
    dtype="float32",
    device="cpu",
    threads=1,
)
_TALK = {"messages": [{"role": "user", "content": "hi"}]}
_TOOL = {"name": "f", "parameters": {"type": "object", "properties": {}}}
_FUNCTION = {"type": "function", "function": _TOOL}


class Treatment(StrEnum):
    SUPPORTED = "yes"
    IGNORED = "accepted, without effect"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class With:
    """A value that only means something beside other fields."""

    value: Any
    more: Mapping[str, Any]


# A value of each field that would change the answer, or how it comes.
EFFECTS: dict[str, Any] = {
    "access_programs": {"cyber": "standard"},
    "add_generation_prompt": False,
    "add_special_tokens": False,
    "allowed_token_ids": [5],
    "audio": {"voice": "alloy", "format": "wav"},
    "background": True,
    "background_options": {"completion_window": "2h"},
    "bad_words": ["a"],
    "best_of": 2,
    "cache_control": {"type": "ephemeral"},
    "cache_salt": "s",
    "chat_template": "{{ messages }}",
    "chat_template_kwargs": {"enable_thinking": True},
    "content": "hi",
    "context_management": [{"type": "compaction"}],
    "continue_final_message": With(True, {"add_generation_prompt": False}),
    "continuous_usage_stats": True,
    "conversation": "conv_1",
    "documents": [{"text": "a"}],
    "ec_transfer_params": {"x": 1},
    "echo": True,
    "enable_response_messages": True,
    "frequency_penalty": 0.5,
    "function_call": {"name": "f"},
    "functions": [_TOOL],
    "guided_choice": ["a", "b"],
    "guided_grammar": 'root ::= "a"',
    "guided_json": {"type": "object"},
    "guided_regex": "a+",
    "ignore_eos": True,
    "image": {"x": 1},
    "include": ["message.output_text.logprobs"],
    "include_obfuscation": True,
    "include_reasoning": False,
    "include_stop_str_in_output": True,
    "include_usage": True,
    "input": "hi",
    "instructions": "Be brief.",
    "kv_transfer_params": {"x": 1},
    "length_penalty": 2.0,
    "logit_bias": {"5": 1},
    "logits_processors": ["x"],
    "logprob_token_ids": [5],
    "logprobs": 2,
    "max_completion_tokens": 3,
    "max_output_tokens": 3,
    "max_tokens": 3,
    "max_tool_calls": 1,
    "media_io_kwargs": {"image": {"x": 1}},
    "messages": _TALK["messages"],
    "metadata": {"a": "b"},
    "min_p": 0.1,
    "min_tokens": 1,
    "mm_payload": "uris",
    "mm_processor_kwargs": {"x": 1},
    "modalities": ["text", "audio"],
    "model": MODEL,
    "moderation": {"model": "m"},
    "n": 2,
    "name": "alice",
    "parallel_tool_calls": False,
    "prediction": {"type": "content", "content": "x"},
    "presence_penalty": 0.5,
    "previous_input_messages": [{"role": "user", "content": "x"}],
    "previous_response_id": "resp_1",
    "priority": 1,
    "prompt": "hi",
    "prompt_cache_breakpoint": {"mode": "explicit"},
    "prompt_cache_key": "k",
    "prompt_cache_options": {"mode": "explicit"},
    "prompt_cache_retention": "24h",
    "prompt_embeds": "eA==",
    "prompt_logprobs": 1,
    "reasoning": {"effort": "low"},
    "reasoning_effort": "low",
    "refusal": "no",
    "repetition_detection": {"max_pattern_size": 4, "min_count": 3},
    "repetition_penalty": 1.2,
    "request_id": "mine",
    "response_format": {"type": "json_object"},
    "return_mm_kwargs": True,
    "return_prompt_text": True,
    "return_token_ids": True,
    "return_token_offsets": True,
    "return_token_strs": True,
    "return_tokens_as_token_ids": True,
    "role": "user",
    "routed_experts_prompt_start": 1,
    "safety_identifier": "s",
    "seed": 1,
    "service_tier": "flex",
    "session_id": "mine",
    "skip_special_tokens": False,
    "spaces_between_special_tokens": False,
    "stop": ["a"],
    "stop_token_ids": [5],
    "store": True,
    "stream": True,
    "stream_interval": 4,
    "stream_options": With({"include_usage": True}, {"stream": True}),
    "structured_outputs": {"regex": "a+"},
    "suffix": "x",
    "temperature": 0.5,
    "text": {"format": {"type": "json_object"}},
    "thinking_token_budget": 5,
    "tokens": [5],
    "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
    "tool_choice": With("required", {"tools": [_FUNCTION]}),
    "tools": [_FUNCTION],
    "top_k": 5,
    "top_logprobs": With(2, {"logprobs": True}),
    "top_p": 0.9,
    "truncate_prompt_tokens": 5,
    "truncation": "auto",
    "truncation_side": "left",
    "type": "text",
    "use_beam_search": True,
    "user": "u",
    "verbosity": "low",
    "vllm_xargs": {"x": 1},
    "watermarking": True,
    "web_search_options": {},
}
_CHAT_EFFECTS = {
    "logprobs": True,
    "return_tokens_as_token_ids": With(True, {"logprobs": True, "top_logprobs": 1}),
}
_MESSAGE_EFFECTS = {
    "annotations": [{"type": "url_citation"}],
    "reasoning": "Hm.",
    "reasoning_content": "Hm.",
    "tool_call_id": With("c", {"role": "tool"}),
    "audio": {"id": "a"},
    "function_call": {"name": "f", "arguments": "{}"},
    "content": [{"type": "text", "text": "a"}],
}
_RESPONSES_EFFECTS = {
    "stream_options": With({"include_obfuscation": False}, {"stream": True}),
    "tools": [{"type": "function", **_TOOL}],
    "tool_choice": With("required", {"tools": [{"type": "function", **_TOOL}]}),
    "top_logprobs": With(2, {"include": ["message.output_text.logprobs"]}),
}


@dataclass(frozen=True, slots=True)
class Place:
    """Where fields stand: a request, or a part of one. `ask` raises ApiError for refused fields."""

    title: str
    ask: Callable[[dict[str, Any]], Awaitable[object]]
    openai: frozenset[str]  # names in the openai package
    vllm: dict[str, Any]  # defaults in vLLM's protocol
    own: frozenset[str] = frozenset()  # further names
    required: frozenset[str] = frozenset()
    effects: Mapping[str, Any] = field(default_factory=dict)  # besides EFFECTS
    ignored: frozenset[str] = frozenset()

    @property
    def names(self) -> list[str]:
        return sorted(self.openai | self.vllm.keys() | self.own)

    def effect(self, name: str) -> dict[str, Any]:
        """The field with a value that matters, and what must stand beside it."""
        found = self.effects.get(name, EFFECTS.get(name))
        assert found is not None, f"EFFECTS needs a value of '{name}'"
        if isinstance(found, With):
            return {**found.more, name: found.value}
        return {name: found}

    async def refusal(self, fields: dict[str, Any]) -> ApiError | None:
        try:
            await self.ask(fields)
        except ApiError as error:
            return error
        return None

    async def treatment(self, name: str) -> Treatment:
        if await self.refusal(self.effect(name)) is not None:
            return Treatment.REFUSED
        return Treatment.IGNORED if name in self.ignored else Treatment.SUPPORTED


def _encoded(fields: Mapping[str, Any]) -> bytes:
    return json.dumps(fields).encode()


def _names(*kinds: Any) -> frozenset[str]:
    return frozenset(name for kind in kinds for name in get_type_hints(kind))


def places(calls: CallBuilder, tokenization: Tokenization) -> list[Place]:
    """All of them, as this gateway's parser treats them."""

    def chat(fields: dict[str, Any]) -> Awaitable[object]:
        return calls.chat(_encoded({**_TALK, **fields}), LIMITS)

    def completion(fields: dict[str, Any]) -> Awaitable[object]:
        return calls.completion(_encoded({"prompt": "hi", **fields}), LIMITS)

    async def respond(fields: dict[str, Any]) -> object:
        try:
            asked = read_request(_encoded({"input": "hi", **fields}))
            return await calls.chat(chat_body(asked, read_input(asked)), LIMITS)
        except ApiError as error:
            raise of_this_request(error) from error

    def options(fields: dict[str, Any]) -> Awaitable[object]:
        return chat({"stream": True, "stream_options": {"include_usage": True, **fields}})

    def message(fields: dict[str, Any]) -> Awaitable[object]:
        turn = {"role": "assistant", "content": "hi", **fields}
        return chat({"messages": [*_TALK["messages"], turn]})

    def part(fields: dict[str, Any]) -> Awaitable[object]:
        content = [{"type": "text", "text": "hi", **fields}]
        return chat({"messages": [{"role": "user", "content": content}]})

    def tokens(fields: dict[str, Any]) -> Awaitable[object]:
        base = {} if "prompt" in fields else _TALK
        return tokenization.tokenize(_encoded({**base, **fields}), LIMITS)

    def text(fields: dict[str, Any]) -> Awaitable[object]:
        return tokenization.detokenize(_encoded({"tokens": [5], **fields}), LIMITS)

    ignored = neutral.IGNORED | neutral.IGNORED_BUT_CHECKED
    return [
        Place(
            "`POST /v1/chat/completions`",
            chat,
            _names(chat_create_params.CompletionCreateParamsStreaming),
            VLLM["chat"],
            frozenset(openai.ChatRequest.__struct_fields__),
            frozenset({"messages"}),
            _CHAT_EFFECTS,
            ignored,
        ),
        Place(
            "`POST /v1/completions`",
            completion,
            _names(completion_create_params.CompletionCreateParamsStreaming),
            VLLM["completions"],
            frozenset(openai.CompletionRequest.__struct_fields__),
            frozenset({"prompt"}),
            {
                "return_tokens_as_token_ids": With(True, {"logprobs": 1}),
                "echo": With(True, {"max_tokens": 1}),
            },
            ignored,
        ),
        Place(
            "`stream_options`",
            options,
            _names(ChatCompletionStreamOptionsParam),
            VLLM["stream_options"],
            ignored=frozenset({"include_obfuscation"}),
        ),
        Place(
            "A chat's message",
            message,
            _names(ChatCompletionUserMessageParam, ChatCompletionAssistantMessageParam),
            {},
            frozenset(openai.Message.__struct_fields__),
            frozenset({"role"}),
            _MESSAGE_EFFECTS,
        ),
        Place(
            "A message's content part",
            part,
            _names(ChatCompletionContentPartTextParam),
            {},
            frozenset(openai.TextPart.__struct_fields__),
            frozenset({"type", "text"}),
            {"text": "hi"},
            frozenset({"cache_control", "prompt_cache_breakpoint"}),
        ),
        Place(
            "`POST /v1/responses`",
            respond,
            _names(response_create_params.ResponseCreateParamsStreaming),
            VLLM["responses"],
            responses.OWN | responses.IGNORED | {*responses.SHARED_WITH_CHAT, *responses.NEUTRAL},
            frozenset({"input"}),
            _RESPONSES_EFFECTS,
            responses.IGNORED | neutral.IGNORED_BUT_CHECKED,
        ),
        Place(
            "`POST /tokenize`",
            tokens,
            frozenset(),
            VLLM["tokenize"],
            required=frozenset({"messages", "prompt"}),
            ignored=neutral.IGNORED,
        ),
        Place(
            "`POST /detokenize`",
            text,
            frozenset(),
            VLLM["detokenize"],
            required=frozenset({"tokens"}),
        ),
    ]


def all_places(directory: Path) -> list[Place]:
    """`directory`: for a tokenizer."""
    tokenizer = tiny_tokenizer(directory)
    calls = CallBuilder(tokenizer, MODEL, 1)
    return places(calls, Tokenization(calls, tokenizer))


async def tables(found: list[Place]) -> str:
    """The tables of docs/api.md."""
    parts = []
    for place in found:
        rows: dict[Treatment, list[str]] = {treatment: [] for treatment in Treatment}
        for name in place.names:
            rows[await place.treatment(name)].append(name)
        parts.append(f"### {place.title}\n\n| | fields |\n| --- | --- |\n")
        words = {
            Treatment.SUPPORTED: "supported",
            Treatment.IGNORED: "accepted with any value, which changes nothing here",
            Treatment.REFUSED: "accepted with a value that changes nothing, else refused by name",
        }
        for treatment, names in rows.items():
            if names:
                shown = ", ".join(f"`{name}`{_origin(place, name)}" for name in names)
                parts.append(f"| {words[treatment]} | {shown} |\n")
        parts.append("\n")
    return "".join(parts)


def _origin(place: Place, name: str) -> str:
    """A mark for what only vLLM has, and what neither has (any more)."""
    if name in place.openai or not place.openai:
        return ""
    return " (v)" if name in place.vllm else " (m)"


def page_with(page: str, generated: str) -> str:
    """The page with these tables for its own."""
    block = re.compile(re.escape(BEGIN) + ".*" + re.escape(END), re.DOTALL)
    assert block.search(page) is not None
    return block.sub(lambda _: f"{BEGIN}\n{generated}{END}", page)


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        generated = asyncio.run(tables(all_places(Path(directory))))
    PAGE.write_text(page_with(PAGE.read_text(encoding="utf-8"), generated), encoding="utf-8")


if __name__ == "__main__":
    main()

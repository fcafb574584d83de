"""Requests that a vLLM server gets as its client has written them: where they go, what is in them.

A gateway understands the requests of `openai.py` by itself. What it does not understand (tools,
grammars, images, embeddings ...), a vLLM server may: its instance is sent the body, and posts it to
the server. The names below are those of vLLM 0.32's requests. A field that is not among them is
refused by name: vLLM would ignore it without a word, or do what no client may ask for (see
`docs/vllm.md`).
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Final

import msgspec


class ForwardPath(StrEnum):
    """The endpoints of a vLLM server that clients of a cluster reach."""

    CHAT = "/v1/chat/completions"
    COMPLETIONS = "/v1/completions"
    RESPONSES = "/v1/responses"
    MESSAGES = "/v1/messages"
    COUNT_TOKENS = "/v1/messages/count_tokens"
    EMBEDDINGS = "/v1/embeddings"
    V1_RERANK = "/v1/rerank"
    RERANK = "/rerank"
    V1_SCORE = "/v1/score"
    SCORE = "/score"
    POOLING = "/pooling"
    CLASSIFY = "/classify"
    TOKENIZE = "/tokenize"
    DETOKENIZE = "/detokenize"


# Those of which a gateway itself serves what it understands.
OWN_PATHS: Final = frozenset({ForwardPath.CHAT, ForwardPath.COMPLETIONS})
# Those that a gateway has only where there is a vLLM server.
WHOLE_PATHS: Final = frozenset(ForwardPath) - OWN_PATHS
# Those whose answers are generated, and may be streams.
GENERATING_PATHS: Final = OWN_PATHS | {ForwardPath.RESPONSES, ForwardPath.MESSAGES}
# Those that use no KV cache.
_WITHOUT_CACHE: Final = frozenset(
    {ForwardPath.COUNT_TOKENS, ForwardPath.TOKENIZE, ForwardPath.DETOKENIZE}
)


class Forward(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A request for a vLLM server. `body`: a JSON object, with none of `GIVEN_FIELDS`, as the
    server gets it.

    `renders`: the call's prompt is what the server will compute, as far as the gateway can tell, so
    that its KV may be brought there before.
    """

    path: ForwardPath
    body: bytes
    renders: bool = False

    @property
    def salted(self) -> bool:
        """Whether the server's cache is used, and so a salt keeps tenants apart."""
        return self.path not in _WITHOUT_CACHE

    @property
    def prioritised(self) -> bool:
        """Whether the server knows priorities of such requests."""
        return self.salted and self.path is not ForwardPath.MESSAGES


# What the call says, and not the body: whoever posts it writes them.
GIVEN_FIELDS: Final = frozenset({"model", "cache_salt", "priority"})

_COMMON = {*GIVEN_FIELDS, "user"}
_SAMPLING = {
    "frequency_penalty",
    "ignore_eos",
    "include_stop_str_in_output",
    "logit_bias",
    "min_p",
    "presence_penalty",
    "repetition_penalty",
    "seed",
    "skip_special_tokens",
    "stop",
    "stop_token_ids",
    "stream",
    "structured_outputs",
    "temperature",
    "top_k",
    "top_p",
}
_GENERATION = {
    *_COMMON,
    *_SAMPLING,
    "add_special_tokens",
    "allowed_token_ids",
    "bad_words",
    "echo",
    "length_penalty",
    "logprob_token_ids",
    "logprobs",
    "max_tokens",
    "min_tokens",
    "n",
    "prompt_logprobs",
    "repetition_detection",
    "response_format",
    "return_token_ids",
    "return_tokens_as_token_ids",
    "spaces_between_special_tokens",
    "stream_interval",
    "stream_options",
    "thinking_token_budget",
    "truncate_prompt_tokens",
    "truncation_side",
    "use_beam_search",
}
_TEMPLATE = {"add_generation_prompt", "chat_template_kwargs", "continue_final_message"}
_POOLING = {*_COMMON, "padding", "truncate_prompt_tokens", "truncation_side", "use_activation"}
_POOLED_PROMPT = {*_POOLING, *_TEMPLATE, "add_special_tokens", "input", "messages"}
_ENCODING = {"dimensions", "embed_dtype", "encoding_format", "endianness"}
_RANKING = {
    *_POOLING,
    "chat_template_kwargs",
    "documents",
    "instruction",
    "max_tokens_per_doc",
    "max_tokens_per_query",
}
_RERANK = {*_RANKING, "query", "top_n"}
_SCORE = {*_RANKING, "data_1", "data_2", "items", "queries", "text_1", "text_2"}
_MESSAGES = {
    *GIVEN_FIELDS,
    "chat_template_kwargs",
    "messages",
    "output_config",
    "system",
    "thinking",
    "tool_choice",
    "tools",
}

FIELDS: Final[Mapping[ForwardPath, frozenset[str]]] = {
    path: frozenset(names)
    for path, names in {
        ForwardPath.CHAT: {
            *_GENERATION,
            *_TEMPLATE,
            "documents",
            "include_reasoning",
            "max_completion_tokens",
            "messages",
            "parallel_tool_calls",
            "reasoning_effort",
            "return_prompt_text",
            "tool_choice",
            "tools",
            "top_logprobs",
        },
        ForwardPath.COMPLETIONS: {*_GENERATION, "prompt", "suffix"},
        ForwardPath.RESPONSES: {
            *_COMMON,
            *_SAMPLING,
            "chat_template_kwargs",
            "include",
            "include_reasoning",
            "input",
            "instructions",
            "max_output_tokens",
            "max_tool_calls",
            "metadata",
            "parallel_tool_calls",
            "prompt_cache_key",
            "reasoning",
            "service_tier",
            "store",
            "text",
            "tool_choice",
            "tools",
            "top_logprobs",
            "truncation",
        },
        ForwardPath.MESSAGES: {
            *_MESSAGES,
            "max_tokens",
            "metadata",
            "stop_sequences",
            "stream",
            "temperature",
            "top_k",
            "top_p",
        },
        ForwardPath.COUNT_TOKENS: _MESSAGES,
        ForwardPath.EMBEDDINGS: {*_POOLED_PROMPT, *_ENCODING},
        ForwardPath.V1_RERANK: _RERANK,
        ForwardPath.RERANK: _RERANK,
        ForwardPath.V1_SCORE: _SCORE,
        ForwardPath.SCORE: _SCORE,
        ForwardPath.POOLING: {*_POOLED_PROMPT, *_ENCODING, "task"},
        ForwardPath.CLASSIFY: _POOLED_PROMPT,
        ForwardPath.TOKENIZE: {
            *_TEMPLATE,
            "add_special_tokens",
            "messages",
            "model",
            "prompt",
            "return_token_strs",
            "tools",
        },
        ForwardPath.DETOKENIZE: {"model", "tokens"},
    }.items()
}
# What clients send and no answer depends on (`best_of`: where it is `n`, as it must be); vLLM
# does not know it everywhere.
IGNORED_FIELDS: Final = frozenset(
    {
        "best_of",
        "metadata",
        "parallel_tool_calls",
        "prompt_cache_key",
        "safety_identifier",
        "user",
    }
)

"""Requests that are forwarded to a vLLM server: their paths and fields.

A gateway understands the requests of `openai.py` itself. Others (tools, grammars, images,
embeddings ...) go to a vLLM member: the instance gets the body and posts it to its server. The
field names below are those of vLLM 0.32. A gateway refuses any other field by name: vLLM would
ignore it silently, or do something that no client may ask for (see `docs/vllm.md`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import StrEnum
from typing import Final

import msgspec


class ForwardPath(StrEnum):
    """Endpoints of a vLLM server that a cluster's clients can use."""

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


# Paths whose requests the gateway serves itself if it understands them.
OWN_PATHS: Final = frozenset({ForwardPath.CHAT, ForwardPath.COMPLETIONS})
# Paths that exist only while the cluster has a vLLM server.
WHOLE_PATHS: Final = frozenset(ForwardPath) - OWN_PATHS
# Paths whose answers are generated, and may be streams.
GENERATING_PATHS: Final = OWN_PATHS | {ForwardPath.RESPONSES, ForwardPath.MESSAGES}
# Paths that use no KV cache.
_WITHOUT_CACHE: Final = frozenset(
    {ForwardPath.COUNT_TOKENS, ForwardPath.TOKENIZE, ForwardPath.DETOKENIZE}
)

# An event of a /v1/responses stream, but for those that vLLM sends at once.
_RESPONSES_OUTPUT = re.compile(
    rb"^event: (?!response\.(?:created|in_progress)\n)\S+\n", re.MULTILINE
)


class Forward(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A request for a vLLM server. `body`: a JSON object without GIVEN_FIELDS, which the instance
    adds.

    `renders`: the call's prompt is, as far as the gateway can tell, the one that the server will
    compute, so that its KV can be moved there before.
    """

    path: ForwardPath
    body: bytes
    renders: bool = False

    @property
    def salted(self) -> bool:
        """Whether the server uses its KV cache, so that a salt must keep tenants apart."""
        return self.path not in _WITHOUT_CACHE

    @property
    def prioritised(self) -> bool:
        """Whether the server accepts a priority on this path."""
        return self.salted and self.path is not ForwardPath.MESSAGES

    def tells_token(self, data: bytes) -> bool:
        """Whether bytes at the start of a stream show that a token has been generated. vLLM's
        streams begin with their first token, but for those of `/v1/responses`."""
        return self.path is not ForwardPath.RESPONSES or bool(_RESPONSES_OUTPUT.search(data))


# Fields that come from the call, not from the body: the instance writes them.
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
# Fields on which no answer depends (`best_of` must equal `n`): dropped on paths where vLLM does
# not know them.
IGNORED_FIELDS: Final = frozenset(
    {
        "best_of",
        "metadata",
        "parallel_tool_calls",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "request_id",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)

"""Chunks of a chat's stream, from built-in instances or vLLM, as a Response's reply reads them."""

from __future__ import annotations

import msgspec

from memserve.api.errors import ErrorDetail
from memserve.api.responses import InputTokensDetails, OutputTokensDetails, ResponseUsage


class Function(msgspec.Struct, frozen=True):
    name: str | None = None
    arguments: str | None = None


class ToolCall(msgspec.Struct, frozen=True):
    index: int = 0
    id: str | None = None
    function: Function | None = None


class Delta(msgspec.Struct, frozen=True):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: tuple[ToolCall, ...] | None = None


class Logprobs(msgspec.Struct, frozen=True):
    content: tuple[msgspec.Raw, ...] | None = None


class Choice(msgspec.Struct, frozen=True):
    delta: Delta = Delta()
    logprobs: Logprobs | None = None
    finish_reason: str | None = None


class CachedTokens(msgspec.Struct, frozen=True):
    cached_tokens: int | None = None


class ReasoningTokens(msgspec.Struct, frozen=True):
    reasoning_tokens: int | None = None


class Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int = 0
    prompt_tokens_details: CachedTokens | None = None
    completion_tokens_details: ReasoningTokens | None = None


class Chunk(msgspec.Struct, frozen=True):
    """Fields that are read of a chat's chunk, or of an error event."""

    choices: tuple[Choice, ...] = ()
    usage: Usage | None = None
    error: ErrorDetail | None = None


decode_chunk = msgspec.json.Decoder(Chunk).decode


def response_usage(used: Usage | None) -> ResponseUsage | None:
    """Return a chat's usage as a Response has it."""
    if used is None:
        return None
    cached = used.prompt_tokens_details
    reasoning = used.completion_tokens_details
    return ResponseUsage(
        used.prompt_tokens,
        InputTokensDetails(cached.cached_tokens or 0 if cached is not None else 0),
        used.completion_tokens,
        OutputTokensDetails(reasoning.reasoning_tokens or 0 if reasoning is not None else 0),
        used.prompt_tokens + used.completion_tokens,
    )

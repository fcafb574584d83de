"""Traces in Mooncake's format: arrival times, lengths and shared prefixes of requests.

A line has `timestamp` (ms), `input_length`, `output_length` (tokens) and `hash_ids`, one id for
each 512 tokens of the prompt; equal leading ids mean equal prefixes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta

from memserve.errors import ConfigError
from memserve.types import TokenArray
from memserve.workloads.lines import read_lines
from memserve.workloads.session import TokenRequest

BLOCK_TOKENS = 512
MAX_TIMESTAMP = 10**12  # milliseconds; thirty years
MAX_LENGTH = 2**24  # tokens; above any model's context
MAX_HASH_ID = 2**40  # an id divided by a vocabulary of more than 512 tokens fits int32
MAX_TRACE_LINE_BYTES = 1024 * 1024  # room for the ids of the longest prompt


class TraceLine(msgspec.Struct, frozen=True):
    """One request of a trace."""

    timestamp: Annotated[int, Meta(ge=0, le=MAX_TIMESTAMP)]  # milliseconds
    input_length: Annotated[int, Meta(ge=1, le=MAX_LENGTH)]
    output_length: Annotated[int, Meta(ge=0, le=MAX_LENGTH)]
    hash_ids: Annotated[
        tuple[Annotated[int, Meta(ge=0, le=MAX_HASH_ID)], ...],
        Meta(min_length=1, max_length=MAX_LENGTH // BLOCK_TOKENS),
    ]


@dataclass(frozen=True, slots=True)
class TraceScale:
    """How to scale a trace down for smaller machines; the prefixes stay shared."""

    block_tokens: int = BLOCK_TOKENS  # tokens that one hash id stands for; at least 2
    time: float = 1.0  # factor of arrival times; 2 halves the request rate
    max_output_tokens: int | None = None
    vocabulary: int = 32_000


def read_trace(path: Path, limit: int | None = None) -> Iterator[TraceLine]:
    """Yield the first `limit` requests of a trace in order of arrival. Raises ConfigError."""
    before = 0
    for number, line in read_lines(path, TraceLine, limit, MAX_TRACE_LINE_BYTES):
        if line.timestamp < before:
            raise ConfigError(
                f"{path}:{number}: timestamp {line.timestamp} is before the last one, {before}"
            )
        before = line.timestamp
        if len(line.hash_ids) * BLOCK_TOKENS < line.input_length:
            raise ConfigError(
                f"{path}:{number}: {len(line.hash_ids)} hash ids for {line.input_length} tokens, "
                f"each of {BLOCK_TOKENS}"
            )
        yield line


def token_requests(lines: Iterator[TraceLine], scale: TraceScale) -> Iterator[TokenRequest]:
    """Yield the trace's requests, scaled, with token ids that share the trace's prefixes."""
    for number, line in enumerate(lines):
        output = max(1, line.output_length * scale.block_tokens // BLOCK_TOKENS)
        if scale.max_output_tokens is not None:
            output = min(output, scale.max_output_tokens)
        yield TokenRequest(
            id=f"trace-{number}",
            arrival=line.timestamp / 1000 * scale.time,
            prompt=tuple(prompt_tokens(line, scale).tolist()),
            output_tokens=output,
        )


def prompt_tokens(line: TraceLine, scale: TraceScale) -> TokenArray:
    """Return a prompt's token ids [tokens], int32, which depend only on its hash ids."""
    ids = np.array(line.hash_ids, dtype=np.int64)[:, None]
    offsets = np.arange(scale.block_tokens)[None, :]
    blocks = (ids + offsets * 40503) % scale.vocabulary
    # Tokens 0 and 1 are the id in base `vocabulary`: different ids give different blocks.
    blocks[:, 1:2] = ids // scale.vocabulary
    length = max(1, line.input_length * scale.block_tokens // BLOCK_TOKENS)
    tokens: TokenArray = blocks.reshape(-1).astype(np.int32)[:length]
    return tokens

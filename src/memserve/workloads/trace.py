"""Traces in Mooncake's format: when requests came, how long they were, what they shared.

A line has `timestamp` (ms), `input_length`, `output_length` (tokens) and `hash_ids`, one id for
each 512 tokens of the prompt; equal leading ids are equal prefixes.
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
MAX_TIMESTAMP = 10**12  # thirty years
MAX_LENGTH = 2**24  # tokens; above any model's context
MAX_HASH_ID = 2**40  # the quotient by a vocabulary is still a token id
MAX_TRACE_LINE_BYTES = 1024 * 1024  # the ids of the longest prompt


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
    """How a trace is made fit for smaller machines: its shape stays, its size shrinks."""

    block_tokens: int = BLOCK_TOKENS  # that one hash id stands for; at least 2
    time: float = 1.0  # 2: everything comes half as fast
    max_output_tokens: int | None = None
    vocabulary: int = 32_000


def read_trace(path: Path, limit: int | None = None) -> Iterator[TraceLine]:
    """The requests of a trace in order of arrival. Raises ConfigError."""
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
    """Prompts of token ids that share exactly what the trace's prompts share."""
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
    """A prompt [tokens] int32 that follows from the hash ids alone."""
    ids = np.array(line.hash_ids, dtype=np.int64)[:, None]
    offsets = np.arange(scale.block_tokens)[None, :]
    blocks = (ids + offsets * 40503) % scale.vocabulary
    # The id itself, in two digits: different ids never give the same block.
    blocks[:, 1:2] = ids // scale.vocabulary
    length = max(1, line.input_length * scale.block_tokens // BLOCK_TOKENS)
    tokens: TokenArray = blocks.reshape(-1).astype(np.int32)[:length]
    return tokens

"""Traces in Mooncake's format: when requests came, how long they were, what they shared.

A line has `timestamp` (ms), `input_length`, `output_length` (tokens) and `hash_ids`, one id for
each 512 tokens of the prompt; equal leading ids are equal prefixes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from memserve.errors import ConfigError
from memserve.types import TokenArray
from memserve.workloads.session import TokenRequest, open_data

BLOCK_TOKENS = 512


class TraceLine(msgspec.Struct, frozen=True):
    """One request of a trace."""

    timestamp: int  # milliseconds
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TraceScale:
    """How a trace is made fit for smaller machines: its shape stays, its size shrinks."""

    block_tokens: int = BLOCK_TOKENS  # that one hash id stands for; at least 2
    time: float = 1.0  # 2: everything comes half as fast
    max_output_tokens: int | None = None
    vocabulary: int = 32_000


def read_trace(path: Path, limit: int | None = None) -> Iterator[TraceLine]:
    """The requests of a trace in order of arrival. Raises ConfigError."""
    decoder = msgspec.json.Decoder(TraceLine)
    with open_data(path) as lines:
        for number, line in enumerate(lines, 1):
            if limit is not None and number > limit:
                return
            try:
                yield decoder.decode(line)
            except msgspec.DecodeError as error:
                raise ConfigError(f"{path}:{number}: {error}") from error


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

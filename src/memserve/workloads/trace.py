"""Traces of requests in Mooncake's or Bailian's format: arrival times, lengths, shared prefixes.

Both are JSON lines with `timestamp`, `input_length`, `output_length` (tokens) and `hash_ids`, one
id for each block of the prompt; equal leading ids mean equal prefixes.

| format | `timestamp` | block | more fields |
| --- | --- | --- | --- |
| Mooncake | milliseconds | 512 tokens | |
| Bailian | seconds | 16 tokens | `chat_id`, `parent_chat_id` (-1: none), `turn`, `type` |

Sources: kvcache-ai/Mooncake (FAST25-release) and alibaba-edu/qwen-bailian-usagetraces-anon.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import numpy as np
from msgspec import Meta

from memserve.errors import ConfigError
from memserve.types import TokenArray
from memserve.workloads.lines import read_lines
from memserve.workloads.session import TokenRequest

BLOCK_TOKENS = 512  # of Mooncake's traces
BAILIAN_BLOCK_TOKENS = 16
MAX_TIMESTAMP = 10**12  # milliseconds; thirty years
MAX_LENGTH = 2**24  # tokens; above any model's context
MAX_HASH_ID = 2**63 - 1
MAX_TRACE_LINE_BYTES = 1024 * 1024  # room for the ids of the longest prompt
_MAX_BAILIAN_LINE_BYTES = 32 * MAX_TRACE_LINE_BYTES  # blocks are 32 times smaller
# Different blocks that a trace may have are told apart by their first tokens.
_DIFFERENT_BLOCKS = 2**32
_NO_PARENT = -1

TraceFormatName = Literal["auto", "mooncake", "bailian"]
_HashId = Annotated[int, Meta(ge=0, le=MAX_HASH_ID)]
_Length = Annotated[int, Meta(ge=0, le=MAX_LENGTH)]
_ChatId = Annotated[int, Meta(ge=_NO_PARENT, le=MAX_HASH_ID)]


class TraceLine(msgspec.Struct, frozen=True):
    """One request of a trace."""

    timestamp: Annotated[float, Meta(ge=0, le=MAX_TIMESTAMP)]  # milliseconds
    input_length: Annotated[int, Meta(ge=1, le=MAX_LENGTH)]
    output_length: _Length
    hash_ids: Annotated[
        tuple[_HashId, ...], Meta(min_length=1, max_length=MAX_LENGTH // BLOCK_TOKENS)
    ]


class BailianLine(msgspec.Struct, frozen=True):
    """One request of a trace in Bailian's format, which names its conversation."""

    timestamp: Annotated[float, Meta(ge=0, le=MAX_TIMESTAMP / 1000)]  # seconds
    input_length: Annotated[int, Meta(ge=1, le=MAX_LENGTH)]
    output_length: _Length
    hash_ids: Annotated[tuple[_HashId, ...], Meta(max_length=MAX_LENGTH // BAILIAN_BLOCK_TOKENS)]
    chat_id: _ChatId
    parent_chat_id: _ChatId = _NO_PARENT


class TracedChat(TraceLine, frozen=True):
    """A request that names itself and the one that it goes on from."""

    chat_id: int = _NO_PARENT
    parent_chat_id: int = _NO_PARENT


@dataclass(frozen=True, slots=True)
class TraceFormat:
    """A format of traces. `block_tokens`: tokens that one hash id stands for."""

    name: TraceFormatName
    block_tokens: int


MOONCAKE = TraceFormat("mooncake", BLOCK_TOKENS)
BAILIAN = TraceFormat("bailian", BAILIAN_BLOCK_TOKENS)


@dataclass(frozen=True, slots=True)
class TraceScale:
    """How to scale a trace down for smaller machines; the prefixes stay shared."""

    block_tokens: int = BLOCK_TOKENS  # tokens that one hash id stands for; at least 2
    time: float = 1.0  # factor of arrival times; 2 halves the request rate
    max_output_tokens: int | None = None
    vocabulary: int = 32_000
    trace_block_tokens: int = BLOCK_TOKENS  # that one id stands for in the trace

    def scaled(self, tokens: int) -> int:
        """Return a length of the trace in this scale, at least 1."""
        return max(1, tokens * self.block_tokens // self.trace_block_tokens)


class _Fields(msgspec.Struct, frozen=True):
    """The fields by which formats differ."""

    chat_id: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


def trace_format(path: Path, wanted: TraceFormatName = "auto") -> TraceFormat:
    """Return the format of a trace: the wanted one, else Bailian's if the first line has a
    `chat_id`, else Mooncake's. Raises ConfigError."""
    if wanted != "auto":
        return BAILIAN if wanted == "bailian" else MOONCAKE
    for _, first in read_lines(path, _Fields, 1, _MAX_BAILIAN_LINE_BYTES):
        return MOONCAKE if first.chat_id is msgspec.UNSET else BAILIAN
    return MOONCAKE


def read_trace(
    path: Path, limit: int | None = None, form: TraceFormat = MOONCAKE
) -> Iterator[TraceLine]:
    """Yield the first `limit` requests of a trace in order of arrival; `TracedChat` if the format
    names conversations. Raises ConfigError, also for lengths that hash ids do not fit."""
    before = 0.0
    for number, line in _lines(path, limit, form):
        if line.timestamp < before:
            raise ConfigError(
                f"{path}:{number}: timestamp {line.timestamp:g} ms is before the last one, "
                f"{before:g} ms"
            )
        before = line.timestamp
        if not _fit(line, form):
            raise ConfigError(
                f"{path}:{number}: {len(line.hash_ids)} hash ids for {line.input_length} tokens, "
                f"each of {form.block_tokens}: {-(-line.input_length // form.block_tokens)} fit"
            )
        yield line


def _lines(path: Path, limit: int | None, form: TraceFormat) -> Iterator[tuple[int, TraceLine]]:
    if form is MOONCAKE:
        yield from read_lines(path, TraceLine, limit, MAX_TRACE_LINE_BYTES)
        return
    for number, line in read_lines(path, BailianLine, limit, _MAX_BAILIAN_LINE_BYTES):
        yield (
            number,
            TracedChat(
                line.timestamp * 1000,
                line.input_length,
                line.output_length,
                line.hash_ids,
                line.chat_id,
                line.parent_chat_id,
            ),
        )


def _fit(line: TraceLine, form: TraceFormat) -> bool:
    """Return whether a prompt has as many ids as blocks. In Bailian's format the last block, which
    is not full, may have none, and a full one may be followed by that of the answer's begin."""
    ids, full = len(line.hash_ids), line.input_length // form.block_tokens
    if form is BAILIAN:
        return full <= ids <= full + 1
    return ids == -(-line.input_length // form.block_tokens)


def conversations(lines: Iterable[TraceLine]) -> Iterator[tuple[str, TraceLine]]:
    """Yield each request with the name of its conversation: that of the request that it names as
    its parent; in traces without names, that of the earlier request with which it shares the
    longest prefix, by the hash ids. Without such a request, its own."""
    owner: dict[int, str] = {}  # conversation by hash id, or by chat id
    for number, line in enumerate(lines):
        own = f"trace-{number}"
        if isinstance(line, TracedChat):
            name = owner.get(line.parent_chat_id, own) if line.parent_chat_id >= 0 else own
            owner[line.chat_id] = name
        else:
            name = next((owner[h] for h in reversed(line.hash_ids) if h in owner), own)
            # The first id is mostly a shared system prompt, which identifies no conversation.
            owner.update((h, name) for h in line.hash_ids[1:])
        yield name, line


def token_requests(lines: Iterable[TraceLine], scale: TraceScale) -> Iterator[TokenRequest]:
    """Yield the trace's requests, scaled, with token ids that share the trace's prefixes. Raises
    ConfigError, as `TracePrompts.of`."""
    prompts = TracePrompts(scale)
    for number, line in enumerate(lines):
        output = scale.scaled(line.output_length)
        if scale.max_output_tokens is not None:
            output = min(output, scale.max_output_tokens)
        yield TokenRequest(
            id=f"trace-{number}",
            arrival=line.timestamp / 1000 * scale.time,
            prompt=tuple(prompts.of(line).tolist()),
            output_tokens=output,
        )


class TracePrompts:
    """Prompts of one trace: equal hash ids give equal blocks of tokens, different ones different
    blocks, within any vocabulary."""

    def __init__(self, scale: TraceScale) -> None:
        self._scale = scale
        self._numbers: dict[int, int] = {}  # of hash ids, in order of appearance
        self._count = 0  # of different blocks
        self._digits = 1
        while scale.vocabulary**self._digits < _DIFFERENT_BLOCKS:
            self._digits += 1
        self._digits = min(self._digits, scale.block_tokens)

    def of(self, line: TraceLine) -> TokenArray:
        """Return a prompt's token ids [tokens], int32. Tokens behind the last hash id are the
        prompt's own. Raises ConfigError if the trace has more different blocks than the scale's
        vocabulary and blocks can tell apart."""
        scale = self._scale
        length = scale.scaled(line.input_length)
        numbers = [self._number(hash_id) for hash_id in line.hash_ids]
        while len(numbers) * scale.block_tokens < length:
            numbers.append(self._new())
        ids = np.array(numbers, dtype=np.int64)[:, None]
        offsets = np.arange(scale.block_tokens)[None, :]
        blocks = (ids + offsets * 40503) % scale.vocabulary
        # The first tokens are the number in base `vocabulary`, so that all numbers differ in them.
        rest = ids[:, 0]
        for digit in range(self._digits):
            blocks[:, digit] = rest % scale.vocabulary
            rest = rest // scale.vocabulary
        if rest.any():
            raise ConfigError(
                f"blocks of {scale.block_tokens} of {scale.vocabulary} tokens cannot tell "
                f"{self._count} blocks of the trace apart"
            )
        tokens: TokenArray = blocks.reshape(-1)[:length].astype(np.int32)
        return tokens

    def _number(self, hash_id: int) -> int:
        number = self._numbers.get(hash_id)
        if number is None:
            number = self._numbers[hash_id] = self._new()
        return number

    def _new(self) -> int:
        self._count += 1
        return self._count - 1

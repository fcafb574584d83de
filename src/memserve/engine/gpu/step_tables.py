"""The integers that a step's attention kernels read, made from spans (`attention_kernels.py` has
their meaning)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memserve.engine.attention import Span

ALIGNED = 4  # integers; Triton compiles kernels anew for addresses that are no multiples of 16
TILE_INTS = 4  # first row, queries, position of the first, first block


@dataclass(frozen=True, slots=True)
class StepTables:
    """Tables of one step, on a device; int32."""

    places: Tensor  # [tokens]
    decodes: Tensor  # [decoding sequences, TILE_INTS], tiles of one query
    prefills: Tensor  # [tiles, TILE_INTS]
    blocks: Tensor  # [blocks]


def tables_of(
    spans: Sequence[Span], decodes: int, block_tokens: int, queries: int, device: torch.device
) -> StepTables:
    """Return the tables of a step, moved to `device` by one copy. The first `decodes` spans have
    length 1 and are the first rows; tiles of other spans have at most `queries` queries."""
    starts = np.cumsum([0, *(len(span.blocks) for span in spans)])
    places = np.concatenate([_places_of(span, block_tokens) for span in spans])
    decoding = decode_tiles(spans[:decodes], starts)
    prefilling = [
        (span.start + at, min(queries, span.length - at), span.context + at, start)
        for span, start in zip(spans[decodes:], starts[decodes:-1], strict=True)
        for at in range(0, span.length, queries)
    ]
    parts = [
        places,
        decoding.astype(np.int32),
        np.array(prefilling, np.int32).reshape(-1, TILE_INTS),
        np.concatenate([span.blocks for span in spans]).astype(np.int32),
    ]
    return StepTables(*_on_device(parts, device))


def _on_device(parts: Sequence[NDArray[np.int32]], device: torch.device) -> Iterator[Tensor]:
    """Yield `parts` as tensors, moved by one copy."""
    starts = np.cumsum([0, *(-(-part.size // ALIGNED) * ALIGNED for part in parts)])
    packed = np.zeros(starts[-1], np.int32)
    for part, start in zip(parts, starts, strict=False):
        packed[start : start + part.size] = part.reshape(-1)
    moved = torch.from_numpy(packed).to(device)
    for part, start in zip(parts, starts, strict=False):
        yield moved[start : start + part.size].view(part.shape)


def _places_of(span: Span, block_tokens: int) -> NDArray[np.int32]:
    """Return the places [length] of a span's tokens."""
    positions = np.arange(span.context, span.total)
    places = span.blocks[positions // block_tokens] * block_tokens + positions % block_tokens
    return places.astype(np.int32)


def decode_tiles(spans: Sequence[Span], starts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the tiles [spans, TILE_INTS] of decoding sequences; `starts`: where the blocks of each
    begin."""
    count = len(spans)
    tiles = np.ones((count, TILE_INTS), np.int64)
    tiles[:, 0] = [span.start for span in spans]
    tiles[:, 2] = [span.context for span in spans]
    tiles[:, 3] = starts[:count]
    return tiles


def padding_tiles(rows: range) -> NDArray[np.int64]:
    """Return tiles [rows, TILE_INTS] that see nothing and write zeros to these rows of a batch."""
    tiles = np.zeros((len(rows), TILE_INTS), np.int64)
    tiles[:, 0] = rows
    tiles[:, 1] = 1
    tiles[:, 2] = -1
    return tiles

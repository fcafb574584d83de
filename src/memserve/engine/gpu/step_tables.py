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
_NO_KEYS = (1, -1, 0)  # of a tile that pads a batch: it sees nothing and writes a row of zeros


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
    places = np.concatenate([places_of(span, block_tokens) for span in spans])
    decoding = [decode_tile(span, starts[i]) for i, span in enumerate(spans[:decodes])]
    prefilling = [
        (span.start + at, min(queries, span.length - at), span.context + at, start)
        for span, start in zip(spans[decodes:], starts[decodes:-1], strict=True)
        for at in range(0, span.length, queries)
    ]
    parts = [
        places,
        np.array(decoding, np.int32).reshape(-1, TILE_INTS),
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


def places_of(span: Span, block_tokens: int) -> NDArray[np.int32]:
    """Return the places [length] of a span's tokens."""
    positions = np.arange(span.context, span.total)
    places = span.blocks[positions // block_tokens] * block_tokens + positions % block_tokens
    return places.astype(np.int32)


def decode_tile(span: Span, first_block: int) -> tuple[int, int, int, int]:
    """Return the tile of a decoding sequence whose blocks begin at `first_block`."""
    return (span.start, 1, span.context, first_block)


def padding_tile(row: int) -> tuple[int, int, int, int]:
    """Return a tile that writes zeros to a row."""
    return (row, *_NO_KEYS)

"""Index tensors and masks of one step's packed batch, made from block tables for `TorchAttention`.

All layers with the same sliding window share them; each is made once per step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memserve.engine.attention import Span

# Maximum bytes of a decode group's gathered context per layer; more does not fit a CPU's caches.
GROUP_BYTES = 4 * 1024 * 1024
# Minimum context of a sequence in a decode group, as a share of the longest one: limits padding.
GROUP_FILL = 0.5


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Decoding sequences of similar length that share one kernel call."""

    rows: Tensor  # [n] int64, rows of the packed batch
    table: Tensor  # [n * blocks] int64, blocks of each sequence, padded to the longest
    seen: slice  # of a sequence's gathered tokens: the range that any of the sequences sees
    mask: Tensor | None  # [n, 1, 1, seen] additive; None: every sequence sees all of `seen`


@dataclass(frozen=True, slots=True)
class Tile:
    """Consecutive queries of one prefill span, with the range of keys that they see."""

    query: slice  # rows of the packed batch
    keys: slice  # relative to the span's key range
    mask: Tensor | None  # [queries, keys] additive
    causal: bool  # a causal mask applies, and `mask` is None


@dataclass(frozen=True, slots=True)
class Prefill:
    """Tiles and keys of one prefill span under one sliding window."""

    tiles: tuple[Tile, ...]
    packed: slice | None  # rows of the packed batch that are the keys, if the pool has no context
    table: Tensor | None  # [blocks] int64, else: the blocks to gather keys from
    tokens: slice  # the gathered tokens that are the span's key range


@dataclass(slots=True)
class PagedBatch:
    """One step's batch."""

    view: Tensor  # of any layer in the pool: [blocks, 2, block_tokens, kv_heads, head_dim]
    spans: Sequence[Span]
    decodes: int  # the first `decodes` spans have length 1 and are the first rows
    dtype: torch.dtype
    write_block: Tensor = field(init=False)  # [tokens] int64, HBM block index
    write_slot: Tensor = field(init=False)  # [tokens] int64, position in the block
    _groups: dict[int | None, tuple[DecodeGroup, ...]] = field(default_factory=dict)
    _prefills: dict[int | None, tuple[Prefill, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        block_tokens = self.block_tokens
        positions = np.concatenate(
            [np.arange(s.context, s.total, dtype=np.int64) for s in self.spans]
        )
        lengths = [s.length for s in self.spans]
        tables = [s.blocks[np.arange(s.context, s.total) // block_tokens] for s in self.spans]
        assert sum(lengths) == len(positions)
        self.write_block = self._on_device(np.concatenate(tables))
        self.write_slot = self._on_device(positions % block_tokens)

    @property
    def block_tokens(self) -> int:
        return int(self.view.shape[2])

    @property
    def device(self) -> torch.device:
        return self.view.device

    def _on_device(self, values: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(values).to(self.device, non_blocking=True)

    def groups(self, window: int | None) -> tuple[DecodeGroup, ...]:
        """Return the groups of decoding sequences under a sliding window [tokens]."""
        cached = self._groups.get(window)
        if cached is None:
            cached = self._groups[window] = tuple(self._make_groups(window))
        return cached

    def prefills(self, window: int | None) -> tuple[Prefill, ...]:
        """Return the prefill spans under a sliding window [tokens]."""
        cached = self._prefills.get(window)
        if cached is None:
            cached = self._prefills[window] = tuple(
                self._make_prefill(span, window) for span in self.spans[self.decodes :]
            )
        return cached

    def _make_groups(self, window: int | None) -> list[DecodeGroup]:
        block_tokens = self.block_tokens
        block_bytes = self.view[0].numel() * self.view.element_size()
        cap = max(1, GROUP_BYTES // block_bytes)
        reach = []  # (first block, blocks, row): the blocks that each sequence sees
        for row, span in enumerate(self.spans[: self.decodes]):
            first = 0 if window is None else max(0, span.total - window) // block_tokens
            reach.append((first, -(-span.total // block_tokens) - first, row))
        reach.sort(key=lambda r: (-r[1], r[2]))
        groups: list[DecodeGroup] = []
        begin = 0
        while begin < len(reach):
            longest = reach[begin][1]
            end = begin + 1
            while (
                end < len(reach)
                and (end + 1 - begin) * longest <= cap
                and reach[end][1] >= GROUP_FILL * longest
            ):
                end += 1
            groups.append(self._make_group(reach[begin:end], window))
            begin = end
        return groups

    def _make_group(self, reach: Sequence[tuple[int, int, int]], window: int | None) -> DecodeGroup:
        block_tokens = self.block_tokens
        longest = reach[0][1]
        table = np.zeros((len(reach), longest), dtype=np.int64)
        low = np.empty(len(reach), dtype=np.int64)
        high = np.empty(len(reach), dtype=np.int64)
        for i, (first, blocks, row) in enumerate(reach):
            span = self.spans[row]
            table[i, :blocks] = span.blocks[first : first + blocks]
            start = 0 if window is None else max(0, span.total - window)
            low[i] = start - first * block_tokens
            high[i] = span.total - first * block_tokens
        skip, stop = int(low.min()), int(high.max())
        mask = None
        if low.max() != skip or high.min() != stop:
            at = np.arange(skip, stop)
            hidden = (at < low[:, None]) | (at >= high[:, None])
            mask = self._additive(hidden)[:, None, None, :]
        rows = np.array([row for _, _, row in reach], dtype=np.int64)
        return DecodeGroup(
            rows=self._on_device(rows),
            table=self._on_device(table.reshape(-1)),
            seen=slice(skip, stop),
            mask=mask,
        )

    def _make_prefill(self, span: Span, window: int | None) -> Prefill:
        block_tokens = self.block_tokens
        # Position of the first key that any query of the span sees.
        base = 0 if window is None else max(0, span.context + 1 - window)
        if span.context == 0:
            packed = slice(span.start, span.start + span.length)
            table, tokens = None, slice(0, span.length)
        else:
            packed = None
            first = base // block_tokens
            last = -(-span.total // block_tokens)
            table = self._on_device(np.ascontiguousarray(span.blocks[first:last]))
            tokens = slice(base - first * block_tokens, span.total - first * block_tokens)
        step = span.length if window is None else max(window, block_tokens)
        tiles = []
        for offset in range(0, span.length, step):
            count = min(step, span.length - offset)
            begin = span.context + offset  # position of the first query
            low = 0 if window is None else max(0, begin + 1 - window)
            tiles.append(self._make_tile(span.start + offset, count, begin, low, window, base))
        return Prefill(tuple(tiles), packed, table, tokens)

    def _make_tile(
        self, row: int, count: int, begin: int, low: int, window: int | None, base: int
    ) -> Tile:
        end = begin + count
        keys = slice(low - base, end - base)
        causal = low == begin and (window is None or count <= window)
        mask = None
        if not causal and count > 1:
            query = np.arange(begin, end)[:, None]
            key = np.arange(low, end)
            hidden = key > query
            if window is not None:
                hidden |= key <= query - window
            mask = self._additive(hidden)
        return Tile(slice(row, row + count), keys, mask, causal)

    def _additive(self, hidden: NDArray[np.bool_]) -> Tensor:
        mask = torch.zeros(hidden.shape, dtype=self.dtype)
        mask.masked_fill_(torch.from_numpy(hidden), -torch.inf)
        return mask.to(self.device, non_blocking=True)


class Workspace:
    """Buffers for gathered context, kept between steps: touching new pages costs more than the
    copy."""

    def __init__(self) -> None:
        self._buffers: dict[int, Tensor] = {}

    def gather(self, view: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        """Copy the blocks `table` [n] of a layer view. Returns K and V, each [n * block_tokens,
        kv_heads, head_dim], valid until the next call.
        """
        return self._gather(0, view[:, 0], table), self._gather(1, view[:, 1], table)

    def _gather(self, which: int, source: Tensor, table: Tensor) -> Tensor:
        shape = (table.shape[0], *source.shape[1:])
        size = table.shape[0] * source[0].numel()
        buffer = self._buffers.get(which)
        if buffer is None or buffer.numel() < size:
            room = 1 << (size - 1).bit_length()
            buffer = torch.empty(room, dtype=source.dtype, device=source.device)
            self._buffers[which] = buffer
        out = buffer[:size].view(shape)
        return torch.index_select(source, 0, table, out=out).flatten(0, 1)

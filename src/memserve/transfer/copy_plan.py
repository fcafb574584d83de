"""Copy plans: lists of blocks on both sides become runs of bytes in regions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from memserve.errors import LayoutMismatch, TransferError, UnknownBlock
from memserve.pool.layout import KVLayout
from memserve.transfer.base import BlockList, Region, WriteList
from memserve.transfer.conversion import common_heads
from memserve.types import IndexArray


class RegionTable:
    """The regions of one pool, for look-ups of blocks."""

    def __init__(self, layout: KVLayout, regions: Sequence[Region]) -> None:
        """Raises LayoutMismatch for a region whose size the layout contradicts."""
        for region in regions:
            if region.blocks < 1 or region.nbytes != region.blocks * layout.block_bytes:
                raise LayoutMismatch(
                    f"a region of {region.nbytes} bytes for {region.blocks} blocks of "
                    f"{layout.block_bytes} bytes"
                )
        self.layout = layout
        self.regions = sorted(regions, key=lambda region: (region.medium, region.first_block))
        # One ascending key for both media, so that a single search finds a block's region.
        self._first = _keys(
            np.array([region.medium for region in self.regions], dtype=np.int64),
            np.array([region.first_block for region in self.regions], dtype=np.int64),
        )
        self._blocks = np.array([region.blocks for region in self.regions], dtype=np.int64)

    def locate(self, blocks: BlockList) -> tuple[IndexArray, IndexArray]:
        """Return region numbers [n] and indices within the regions [n]. Raises UnknownBlock."""
        keys = _keys(blocks.medium, blocks.index)
        number = np.searchsorted(self._first, keys, side="right") - 1
        within = keys - self._first[number] if len(self._first) else keys
        bad = (number < 0) | (within < 0)
        if len(self._first):
            bad |= within >= self._blocks[number]
        if bad.any():
            at = int(bad.argmax())
            raise UnknownBlock(
                f"block {int(blocks.index[at])} of medium {int(blocks.medium[at])} "
                f"(position {at}) is in none of {len(self.regions)} regions"
            )
        return number, within


def _keys(medium: IndexArray, index: IndexArray) -> IndexArray:
    return (medium << 32) | index


class Axis(NamedTuple):
    """A dimension of a block's bytes that is not contiguous on both sides."""

    steps: int
    source_stride: int
    target_stride: int


class Shape(NamedTuple):
    """Layout of a block's bytes on both sides: `axes`, outermost first, of runs of `nbytes`."""

    axes: tuple[Axis, ...]
    nbytes: int
    source_offset: int  # of the first byte to copy, within block 0 of the region
    target_offset: int
    source_stride: int  # from block to block
    target_stride: int

    @property
    def dense(self) -> bool:
        """Whether neighbouring blocks are neighbouring bytes on both sides."""
        return self.nbytes == self.source_stride == self.target_stride

    @property
    def block_bytes(self) -> int:
        """Bytes to copy for one block."""
        return self.nbytes * math.prod(axis.steps for axis in self.axes)


@dataclass(frozen=True, slots=True, eq=False)
class RegionCopy:
    """Runs of neighbouring blocks from one region into another."""

    source: Region
    target: Region
    shape: Shape
    source_start: IndexArray  # [runs], indices within the region
    target_start: IndexArray
    count: IndexArray  # blocks in each run

    @property
    def nbytes(self) -> int:
        return int(self.count.sum()) * self.shape.block_bytes

    def chunks(self, limit: int) -> Iterator[RegionCopy]:
        """Yield the copy in parts of at most `limit` bytes, but at least one block."""
        step = max(1, limit // self.shape.block_bytes)
        ends = np.cumsum(self.count)
        starts = ends - self.count  # of each run, counted in blocks over the whole copy
        for first in range(0, int(ends[-1]), step):
            last = min(first + step, int(ends[-1]))
            runs = slice(
                int(np.searchsorted(ends, first, side="right")),
                int(np.searchsorted(starts, last, side="left")),
            )
            skip = np.maximum(first - starts[runs], 0)
            yield RegionCopy(
                self.source,
                self.target,
                self.shape,
                self.source_start[runs] + skip,
                self.target_start[runs] + skip,
                np.minimum(ends[runs], last) - starts[runs] - skip,
            )

    def pieces(self) -> tuple[IndexArray, IndexArray, IndexArray]:
        """Return contiguous runs of bytes: source and target offsets in the regions, and sizes."""
        shape = self.shape
        source, target, count = self.source_start, self.target_start, self.count
        if not shape.dense:
            within = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
            source, target = np.repeat(source, count) + within, np.repeat(target, count) + within
            count = np.ones(len(source), dtype=np.int64)
        source = source * shape.source_stride + shape.source_offset
        target = target * shape.target_stride + shape.target_offset
        for axis in shape.axes:
            steps = np.arange(axis.steps)
            source = (source[:, None] + steps * axis.source_stride).ravel()
            target = (target[:, None] + steps * axis.target_stride).ravel()
            count = np.repeat(count, axis.steps)
        return source, target, count * shape.nbytes


def plan_copies(source: RegionTable, target: RegionTable, writes: WriteList) -> list[RegionCopy]:
    """Return the copies of `writes`: cut by region, with neighbouring blocks merged.

    Raises UnknownBlock; TransferError for layers or heads that are not in both.
    """
    from_region, from_index = source.locate(writes.source)
    to_region, to_index = target.locate(writes.target)
    pair = from_region * len(target.regions) + to_region
    copies = []
    for key, where in _groups(pair):
        ours = source.regions[key // len(target.regions)]
        theirs = target.regions[key % len(target.regions)]
        sides = (source.layout, ours.blocks), (target.layout, theirs.blocks)
        shape = _shape(*sides, writes.layers, writes.heads)
        runs = _runs(from_index[where], to_index[where])
        copies.append(RegionCopy(ours, theirs, shape, *runs))
    return copies


def _groups(keys: IndexArray) -> list[tuple[int, NDArray[np.bool_] | slice]]:
    """Return the different keys and their positions; most often there is one."""
    if len(keys) and (keys == keys[0]).all():
        return [(int(keys[0]), slice(None))]
    return [(key, keys == key) for key in np.unique(keys).tolist()]


def split_pieces(copy: RegionCopy, limit: int) -> Iterator[tuple[int, int, int]]:
    """Yield the pieces of `copy` (offsets and size), each of at most `limit` bytes."""
    for source, target, size in zip(*(array.tolist() for array in copy.pieces()), strict=True):
        for done in range(0, size, limit):
            yield source + done, target + done, min(limit, size - done)


def _runs(source: IndexArray, target: IndexArray) -> tuple[IndexArray, IndexArray, IndexArray]:
    """Return the starts on both sides, and the lengths, of runs that ascend by one on both."""
    breaks: NDArray[np.bool_] = np.ones(len(source), dtype=np.bool_)
    breaks[1:] = (source[1:] - source[:-1] != 1) | (target[1:] - target[:-1] != 1)
    first = np.flatnonzero(breaks)
    count = np.empty_like(first)
    count[:-1] = first[1:] - first[:-1]
    count[-1:] = len(source) - first[-1:]
    return source[first], target[first], count


@lru_cache(maxsize=1024)
def _shape(
    ours: tuple[KVLayout, int],
    theirs: tuple[KVLayout, int],
    some_layers: range | None,
    some_heads: range | None,
) -> Shape:
    """Return the shape of copies between regions, each given as layout and number of blocks."""
    source, target = ours[0], theirs[0]
    layers = range(source.layers) if some_layers is None else some_layers
    common = common_heads(source, target)
    heads = common if some_heads is None else some_heads
    _require_within("layers", layers, range(source.layers))
    _require_within("KV heads", heads, common)
    from_block, *from_inner = _strides(*ours)
    to_block, *to_inner = _strides(*theirs)
    head_bytes = source.head_dim * source.torch_dtype.itemsize
    counts = (len(layers), 2, source.block_tokens, len(heads))
    axes = list(map(Axis, counts, from_inner, to_inner))
    nbytes = head_bytes
    while axes and (
        axes[-1].steps == 1 or nbytes == axes[-1].source_stride == axes[-1].target_stride
    ):
        nbytes *= axes.pop().steps
    return Shape(
        axes=tuple(axis for axis in axes if axis.steps > 1),
        nbytes=nbytes,
        source_offset=layers.start * from_inner[0]
        + (heads.start - source.head_start) * from_inner[3],
        target_offset=layers.start * to_inner[0] + (heads.start - target.head_start) * to_inner[3],
        source_stride=from_block,
        target_stride=to_block,
    )


def _require_within(what: str, asked: range, there: range) -> None:
    inside = there.start <= asked.start < asked.stop <= there.stop
    if asked.step != 1 or not inside:
        raise TransferError(f"{what} {asked}; both sides have {there}")


def _strides(layout: KVLayout, blocks: int) -> tuple[int, ...]:
    """Return the bytes from one block, layer, K or V, token and head to the next."""
    memory = torch.empty(blocks * layout.block_bytes, dtype=torch.uint8, device="meta")
    size = layout.torch_dtype.itemsize
    return tuple(stride * size for stride in layout.views(memory, blocks).stride()[:5])

"""Proof that a peer has written what it says it has written.

Before a peer is told where its KV goes, the destination puts random bytes into every piece that
the peer must overwrite; a commit while some of them are left is refused. So only who can write to
this pool's memory gets anything published: who may open its segments, or holds its keys for RDMA.
Without it, whoever can say three messages could have what lay in those blocks before published as
the KV of any prompt. It also catches a source that has left out blocks or layers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from memserve.pool.layout import KVLayout
from memserve.pool.storage import Extent
from memserve.types import IndexArray, Medium, RefArray, ref_index, ref_medium

# Of each piece, one layer of a block. KV that happens to have the same bytes, one chance in 2^128,
# would be refused and computed again. Pieces shorter than that, of toy models, have fewer.
CANARY_BYTES = 16

Pieces = NDArray[np.void]

_MEDIA = tuple(Medium)  # walking through the enumeration takes longer


class CanaryPool(Protocol):
    """A pool, as far as its memory goes."""

    layout: KVLayout

    def extents(self, medium: Medium) -> tuple[Extent, ...]: ...


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the canary is in a block: the last bytes that belong to `heads`, of the values of each
    layer; of several tokens where one has too few."""

    tokens: int
    nbytes: int  # of each token

    @classmethod
    def of(cls, layout: KVLayout, heads: range) -> _Place:
        nbytes = min(CANARY_BYTES, len(heads) * layout.head_dim * layout.torch_dtype.itemsize)
        return cls(min(layout.block_tokens, -(-CANARY_BYTES // nbytes)), nbytes)

    def offset(self, layout: KVLayout, heads: range, strides: tuple[int, ...]) -> int:
        """Bytes from the beginning of a region to the canary of its first block and layer."""
        _, _, value, token, head, _ = strides
        first = layout.block_tokens - self.tokens
        return value + first * token + (heads.stop - layout.head_start) * head - self.nbytes


class Canary:
    """Random bytes in blocks that are about to be written. Belongs to one transfer; touches
    nothing but blocks that are allocated for it, so without the pool's lock."""

    def __init__(self, pool: CanaryPool, refs: RefArray, heads: range) -> None:
        """`refs`: the pool's own, allocated. `heads`: that the peer writes, at least one, numbered
        over the whole model."""
        self._place = _Place.of(pool.layout, heads)
        self._bytes = os.urandom(self._place.tokens * self._place.nbytes)
        self._layout = pool.layout
        self._heads = heads
        self._parts = list(_by_extent(pool, refs))
        self._host = [
            None if extent.memory.is_cuda else self._pieces(extent) for extent, _ in self._parts
        ]

    def plant(self) -> None:
        """Returns when the bytes are in memory: what is written later is not overwritten."""
        for (extent, index), pieces in zip(self._parts, self._host, strict=True):
            if pieces is None:
                self._plant_on_gpu(extent, index)
            else:
                pieces[index] = np.frombuffer(self._bytes, dtype=pieces.dtype)

    def left(self) -> int:
        """How many pieces have not been overwritten."""
        left = 0
        for (extent, index), pieces in zip(self._parts, self._host, strict=True):
            if pieces is None:
                left += self._count(self._read_from_gpu(extent, index))
            else:
                left += self._count(pieces[index].view(np.uint8))
        return left

    def _count(self, found: NDArray[np.uint8]) -> int:
        """How many of the pieces [...] are the canary."""
        rows = found.reshape(-1, len(self._bytes))
        if len(self._bytes) == CANARY_BYTES:  # two numbers are compared sooner than 16 bytes
            numbers, mine = rows.view(np.uint64), np.frombuffer(self._bytes, dtype=np.uint64)
            same = (numbers[:, 0] == mine[0]) & (numbers[:, 1] == mine[1])
        else:
            same = (rows == np.frombuffer(self._bytes, dtype=np.uint8)).all(axis=1)
        return int(np.count_nonzero(same))

    def _pieces(self, extent: Extent) -> Pieces:
        """The canaries' places in host memory, [blocks, layers, tokens]."""
        strides = self._strides(extent)
        pieces: Pieces = np.ndarray(
            (extent.blocks, self._layout.layers, self._place.tokens),
            np.dtype(f"V{self._place.nbytes}"),
            extent.memory.numpy(),
            self._place.offset(self._layout, self._heads, strides),
            (strides[0], strides[1], strides[3]),
        )
        return pieces

    def _on_gpu(self, extent: Extent) -> torch.Tensor:
        """The same in device memory, [blocks, layers, tokens, bytes]."""
        strides = self._strides(extent)
        shape = (extent.blocks, self._layout.layers, self._place.tokens, self._place.nbytes)
        return extent.memory.as_strided(
            shape,
            (strides[0], strides[1], strides[3], 1),
            self._place.offset(self._layout, self._heads, strides),
        )

    def _plant_on_gpu(self, extent: Extent, index: IndexArray) -> None:
        device = extent.memory.device
        # A stream of its own: on the engine's it would come behind a whole step.
        with torch.cuda.stream(torch.cuda.Stream(device)):  # type: ignore[no-untyped-call]
            mine = torch.frombuffer(bytearray(self._bytes), dtype=torch.uint8).to(device)
            pieces = self._on_gpu(extent)
            pieces[torch.from_numpy(index).to(device)] = mine.view(pieces.shape[2:])
            torch.cuda.current_stream(device).synchronize()

    def _read_from_gpu(self, extent: Extent, index: IndexArray) -> NDArray[np.uint8]:
        device = extent.memory.device
        with torch.cuda.stream(torch.cuda.Stream(device)):  # type: ignore[no-untyped-call]
            found = self._on_gpu(extent)[torch.from_numpy(index).to(device)]
            return np.asarray(found.cpu().contiguous().numpy(), dtype=np.uint8)

    def _strides(self, extent: Extent) -> tuple[int, ...]:
        """Bytes from one block, layer, K or V, token, head and element to the next."""
        size = self._layout.torch_dtype.itemsize
        return tuple(stride * size for stride in extent.view.stride())


def _by_extent(pool: CanaryPool, refs: RefArray) -> Iterator[tuple[Extent, IndexArray]]:
    """Blocks as indices within the piece of memory that they are in."""
    media = ref_medium(refs)
    for medium in _MEDIA:
        where = media == medium
        if not where.any():
            continue
        index = ref_index(refs[where])
        extents = pool.extents(medium)
        if len(extents) == 1:  # mostly
            yield extents[0], index
            continue
        for extent in extents:
            inside = index[(index >= extent.start) & (index < extent.end)]
            if len(inside):
                yield extent, inside - extent.start

"""`Canaries`: proof that a peer has written the blocks that it commits.

Before a peer learns its target blocks, the destination puts random bytes into every piece that the
peer must overwrite, and refuses a commit while some of them are left. So only a process that can
write to this pool's memory (through its segments, or with its keys for RDMA) can publish. Without
canaries, three messages would publish the former contents of those blocks as the KV of any prompt.
Canaries also catch a source that leaves out blocks or layers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from memserve.pool.layout import KVLayout
from memserve.pool.pool import BlockPool
from memserve.pool.storage import Extent
from memserve.types import IndexArray, Medium, RefArray, ref_index, ref_medium

# Canary bytes in a piece (one layer of a block); fewer in a piece that is shorter. KV that equals
# the canary by chance (probability 2^-128) is refused and computed again.
CANARY_BYTES = 16

_MEDIA = tuple(Medium)  # faster to iterate over than the enumeration


class Canaries:
    """Writes canaries into target blocks. Takes no lock of the pool: these blocks are allocated for
    the transfer."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        # Canary positions in HBM, by heads: computing them takes as long as writing the canaries.
        # DRAM positions are not cached: they would keep released segments mapped.
        self._hbm: dict[range, tuple[tuple[Extent, ...], list[_Place]]] = {}

    def plant(self, refs: RefArray, heads: range) -> Canary:
        """Write a canary into the allocated blocks `refs`. `heads`: the KV heads that the peer
        writes, at least one, numbered over the whole model. Returns when the bytes are in memory,
        so that the peer's writes come after them."""
        parts = list(self._parts(refs, heads))
        mark = os.urandom(parts[0][0].mark_bytes if parts else 0)
        for place, index in parts:
            place.put(index, mark)
        return Canary(mark, parts)

    def _parts(self, refs: RefArray, heads: range) -> Iterator[tuple[_Place, IndexArray]]:
        """Yield the blocks of each extent, as indices within it."""
        media = ref_medium(refs)
        for medium in _MEDIA:
            where = media == medium
            if not where.any():
                continue
            index = ref_index(refs[where])
            extents, places = self._of(medium, heads)
            if len(extents) == 1:  # the usual case
                yield places[0], index
                continue
            for extent, place in zip(extents, places, strict=True):
                inside = index[(index >= extent.start) & (index < extent.end)]
                if len(inside):
                    yield place, inside - extent.start

    def _of(self, medium: Medium, heads: range) -> tuple[tuple[Extent, ...], list[_Place]]:
        known = self._hbm.get(heads) if medium is Medium.HBM else None
        if known is None:
            extents = self._pool.extents(medium)
            known = extents, [_Place(self._pool.layout, extent, heads) for extent in extents]
            if medium is Medium.HBM:
                self._hbm[heads] = known
        return known


class Canary:
    """The random bytes in the blocks of one transfer."""

    def __init__(self, mark: bytes, parts: list[tuple[_Place, IndexArray]]) -> None:
        self._mark = mark
        self._parts = parts

    def left(self) -> int:
        """Return the number of pieces that are not overwritten."""
        return sum(self._count(place.get(index)) for place, index in self._parts)

    def _count(self, found: NDArray[np.uint8]) -> int:
        rows = found.reshape(-1, len(self._mark))
        if len(self._mark) == CANARY_BYTES:  # two uint64 compare faster than 16 bytes
            numbers, mine = rows.view(np.uint64), np.frombuffer(self._mark, dtype=np.uint64)
            same = (numbers[:, 0] == mine[0]) & (numbers[:, 1] == mine[1])
        else:
            same = (rows == np.frombuffer(self._mark, dtype=np.uint8)).all(axis=1)
        return int(np.count_nonzero(same))


class _Place:
    """Position of the canary in the blocks of an extent: the last bytes of `heads` in the values of
    each layer. The canary spans several tokens if one token has too few bytes."""

    def __init__(self, layout: KVLayout, extent: Extent, heads: range) -> None:
        size = layout.torch_dtype.itemsize
        nbytes = min(CANARY_BYTES, len(heads) * layout.head_dim * size)
        tokens = min(layout.block_tokens, -(-CANARY_BYTES // nbytes))
        block, layer, value, token, head, _ = (stride * size for stride in extent.view.stride())
        offset = (
            value
            + (layout.block_tokens - tokens) * token
            + (heads.stop - layout.head_start) * head
            - nbytes
        )
        self.mark_bytes = tokens * nbytes
        self._on_gpu: torch.Tensor | None = None  # [blocks, layers, tokens, bytes]
        if extent.memory.is_cuda:
            self._on_gpu = extent.memory.as_strided(
                (extent.blocks, layout.layers, tokens, nbytes), (block, layer, token, 1), offset
            )
            return
        self._pieces: NDArray[np.void] = np.ndarray(
            (extent.blocks, layout.layers, tokens),
            np.dtype(f"V{nbytes}"),
            extent.memory.numpy(),
            offset,
            (block, layer, token),
        )

    def put(self, index: IndexArray, mark: bytes) -> None:
        if self._on_gpu is None:
            self._pieces[index] = np.frombuffer(mark, dtype=self._pieces.dtype)
            return
        device = self._on_gpu.device
        # On a separate stream, because the engine's stream may have a whole step queued.
        with torch.cuda.stream(torch.cuda.Stream(device)):  # type: ignore[no-untyped-call]
            value = torch.frombuffer(bytearray(mark), dtype=torch.uint8).to(device)
            self._on_gpu[torch.from_numpy(index).to(device)] = value.view(self._on_gpu.shape[2:])
            torch.cuda.current_stream(device).synchronize()

    def get(self, index: IndexArray) -> NDArray[np.uint8]:
        """Return the bytes at the canary's position, contiguous."""
        if self._on_gpu is None:
            return self._pieces[index].view(np.uint8)
        device = self._on_gpu.device
        with torch.cuda.stream(torch.cuda.Stream(device)):  # type: ignore[no-untyped-call]
            found = self._on_gpu[torch.from_numpy(index).to(device)]
            return np.asarray(found.cpu().contiguous().numpy(), dtype=np.uint8)

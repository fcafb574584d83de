"""The bytes of one medium's blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from memserve.errors import PoolError
from memserve.pool.layout import KVLayout
from memserve.pool.segment import SharedSegment
from memserve.types import IndexArray


@dataclass(frozen=True, slots=True)
class Extent:
    """Consecutive blocks in one piece of memory."""

    start: int  # index of the first block
    blocks: int
    memory: torch.Tensor  # uint8 [blocks * block_bytes]
    view: torch.Tensor  # the same, [blocks, layers, 2, block_tokens, kv_heads, head_dim]
    segment: SharedSegment | None  # None: device memory

    @property
    def end(self) -> int:
        return self.start + self.blocks


class BlockStore:
    """Memory that grows and shrinks by whole extents. Owns it; knows nothing of who uses it."""

    def __init__(self, layout: KVLayout, device: torch.device, pinned: bool) -> None:
        """`pinned`: lock host memory, for direct copies from and to a GPU."""
        self.layout = layout
        self.device = device
        self.extents: list[Extent] = []
        self._pinned = pinned

    @property
    def blocks(self) -> int:
        return self.extents[-1].end if self.extents else 0

    def grow(self, blocks: int) -> None:
        """Add one extent, or none for no blocks. Raises SharedMemoryFull."""
        if not blocks:
            return
        size = blocks * self.layout.block_bytes
        segment = None
        if self.device.type == "cpu":
            segment = SharedSegment(size)
            memory = torch.frombuffer(segment.buffer, dtype=torch.uint8)
            if self._pinned:
                lock_pages(memory)
        else:
            memory = torch.zeros(size, dtype=torch.uint8, device=self.device)
        view = self.layout.views(memory, blocks)
        self.extents.append(Extent(self.blocks, blocks, memory, view, segment))

    def shrink(self) -> None:
        """Give the last extent back; nobody may use its blocks any more."""
        self._free(self.extents.pop())

    def close(self) -> None:
        while self.extents:
            self.shrink()

    def _free(self, extent: Extent) -> None:
        if extent.segment is None:
            return
        if self._pinned:
            unlock_pages(extent.memory)
        extent.segment.close()

    def gather(self, index: IndexArray) -> torch.Tensor:
        """Copies of blocks `index` [n], on this store's device."""
        if len(self.extents) == 1:
            return self.extents[0].view.index_select(0, torch.from_numpy(index).to(self.device))
        shape = (len(index), *self.layout.block_shape)
        out = torch.empty(shape, dtype=self.layout.torch_dtype, device=self.device)
        for extent, where in self._by_extent(index):
            local = torch.from_numpy(index[where] - extent.start).to(self.device)
            out[torch.from_numpy(where)] = extent.view.index_select(0, local)
        return out

    def scatter(self, index: IndexArray, kv: torch.Tensor) -> None:
        """Write `kv` [n, ...] into blocks `index` [n]."""
        for extent, where in self._by_extent(index):
            local = torch.from_numpy(index[where] - extent.start).to(self.device)
            part = kv if len(self.extents) == 1 else kv[torch.from_numpy(where)]
            extent.view[local] = part.to(self.device)

    def block(self, index: int) -> torch.Tensor:
        """One block in place."""
        for extent in self.extents:
            if index < extent.end:
                return extent.view[index - extent.start]
        raise IndexError(index)

    def _by_extent(self, index: IndexArray) -> Iterator[tuple[Extent, NDArray[np.bool_]]]:
        for extent in self.extents:
            where = (index >= extent.start) & (index < extent.end)
            if where.any():
                yield extent, where


def copy_blocks(
    source: BlockStore, source_index: IndexArray, target: BlockStore, target_index: IndexArray
) -> None:
    """Copy blocks between stores; returns when the bytes are there."""
    if source.device.type == "cpu" and target.device.type == "cpu":
        target.scatter(target_index, source.gather(source_index))
        return
    # Host memory is page-locked, so each copy is one DMA; blocks are large enough for that.
    for at, to in zip(source_index.tolist(), target_index.tolist(), strict=True):
        target.block(to).copy_(source.block(at), non_blocking=True)
    torch.cuda.synchronize()


def lock_pages(memory: torch.Tensor) -> None:
    """Let the GPU copy from and to host memory directly. Raises PoolError."""
    cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    status = cudart.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)
    if int(status) != 0:
        raise PoolError(f"cannot page-lock {memory.nbytes} bytes for the GPU: {status}")


def unlock_pages(memory: torch.Tensor) -> None:
    cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    cudart.cudaHostUnregister(memory.data_ptr())

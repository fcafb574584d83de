"""The bytes of one medium's blocks."""

from __future__ import annotations

from bisect import bisect_right
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
    runs: NDArray[np.uint8] | None  # host memory as runs of bytes, [blocks, runs, bytes]

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
        segment = runs = None
        if self.device.type == "cpu":
            segment = SharedSegment(size)
            memory = torch.frombuffer(segment.buffer, dtype=torch.uint8)
            if self._pinned:
                lock_pages(memory)
            runs = self.layout.runs(memory.numpy(), blocks)
        else:
            memory = torch.zeros(size, dtype=torch.uint8, device=self.device)
        view = self.layout.views(memory, blocks)
        self.extents.append(Extent(self.blocks, blocks, memory, view, segment, runs))

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
        shape = (len(index), *self.layout.block_shape)
        out = torch.empty(shape, dtype=self.layout.torch_dtype, device=self.device)
        if self.device.type != "cpu":
            for slab in self.extents:
                torch.index_select(slab.view, 0, self._on_device(index), out=out)
            return out
        for row, source in zip(self._rows(out), self._host_blocks(index), strict=True):
            row[...] = source
        return out

    def scatter(self, index: IndexArray, kv: torch.Tensor) -> None:
        """Write `kv` [n, ...] into blocks `index` [n]."""
        if self.device.type != "cpu":
            for slab in self.extents:
                slab.view[self._on_device(index)] = kv.to(self.device)
            return
        rows = self._rows(kv.cpu().contiguous())
        for row, target in zip(rows, self._host_blocks(index), strict=True):
            target[...] = row

    def copy_from(self, source: BlockStore, source_index: IndexArray, index: IndexArray) -> None:
        """Copy blocks of another store into blocks `index`; returns when the bytes are there."""
        if self.device.type == "cpu" and source.device.type == "cpu":
            sources = source._host_blocks(source_index)
            for block, target in zip(sources, self._host_blocks(index), strict=True):
                target[...] = block
            return
        # Host memory is page-locked, so each copy is one DMA; blocks are large enough for that.
        for at, to in zip(source_index.tolist(), index.tolist(), strict=True):
            self._block(to).copy_(source._block(at), non_blocking=True)
        torch.cuda.synchronize()

    def _rows(self, kv: torch.Tensor) -> NDArray[np.uint8]:
        """Contiguous KV of n blocks on the host as `[n, runs, bytes]`."""
        flat = kv.view(-1).view(torch.uint8).numpy()
        runs = 1 if self.layout.aggregated else 2 * self.layout.layers
        return flat.reshape(len(kv), runs, self.layout.block_bytes // runs)

    def _host_blocks(self, index: IndexArray) -> Iterator[NDArray[np.uint8]]:
        """Blocks in place, each `[runs, bytes]`.

        One at a time: a copy per block runs at the speed of memory, where a gather of all
        first fills fresh pages.
        """
        starts = [extent.start for extent in self.extents]
        for at in index.tolist():
            extent = self.extents[bisect_right(starts, at) - 1]
            assert extent.runs is not None
            yield extent.runs[at - extent.start]

    def _block(self, index: int) -> torch.Tensor:
        extent = next(extent for extent in self.extents if index < extent.end)
        return extent.view[index - extent.start]

    def _on_device(self, index: IndexArray) -> torch.Tensor:
        return torch.from_numpy(index).to(self.device)


def lock_pages(memory: torch.Tensor) -> None:
    """Let the GPU copy from and to host memory directly. Raises PoolError."""
    cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    status = cudart.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)
    if int(status) != 0:
        raise PoolError(f"cannot page-lock {memory.nbytes} bytes for the GPU: {status}")


def unlock_pages(memory: torch.Tensor) -> None:
    cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    cudart.cudaHostUnregister(memory.data_ptr())

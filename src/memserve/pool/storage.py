"""The memory that holds the bytes of one medium's blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from memserve.errors import PoolError
from memserve.pool.device_queue import copy_stream_of, kernels_of, wait_for
from memserve.pool.layout import KVLayout
from memserve.pool.segment import SharedSegment
from memserve.types import IndexArray


@dataclass(frozen=True, slots=True)
class Extent:
    """Consecutive blocks in one piece of memory: a shared segment or device memory."""

    start: int  # index of the first block
    blocks: int
    memory: torch.Tensor  # uint8 [blocks * block_bytes]
    view: torch.Tensor  # view of it: [blocks, layers, 2, block_tokens, kv_heads, head_dim]
    planes: tuple[torch.Tensor, ...]  # views of it, contiguous: each [blocks, bytes of a run]
    segment: SharedSegment | None  # None: device memory
    runs: NDArray[np.uint8] | None  # view of host memory: [blocks, runs, bytes]; else None

    @property
    def end(self) -> int:
        return self.start + self.blocks


class BlockStore:
    """Owns one medium's memory, which grows and shrinks by whole extents. Does not know which
    blocks are in use.

    Reads, writes and copies return when the bytes have arrived, also on a GPU: the caller may then
    give the blocks to another thread, process or transport, or free them.
    """

    def __init__(self, layout: KVLayout, device: torch.device, pinned: bool) -> None:
        """`pinned`: page-lock host memory, for direct copies from and to a GPU."""
        self.layout = layout
        self.device = device
        self.extents: list[Extent] = []
        self._pinned = pinned
        self._kernels = kernels_of(device)
        self._copy_stream = copy_stream_of(device)

    @property
    def blocks(self) -> int:
        return self.extents[-1].end if self.extents else 0

    def grow(self, blocks: int) -> None:
        """Add one extent of `blocks` blocks; 0 adds none. Raises SharedMemoryFull."""
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
            wait_for(self._kernels)  # so that zeros are not written after a copy on another stream
        view = self.layout.views(memory, blocks)
        planes = self.layout.planes(memory, blocks)
        self.extents.append(Extent(self.blocks, blocks, memory, view, planes, segment, runs))

    def shrink(self) -> None:
        """Release the last extent; its blocks must not be in use."""
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
        """Return copies [n, ...] of blocks `index` [n], on this store's device."""
        shape = (len(index), *self.layout.block_shape)
        out = torch.empty(shape, dtype=self.layout.torch_dtype, device=self.device)
        if self.device.type != "cpu":
            for slab in self.extents:
                torch.index_select(slab.view, 0, self._on_device(index), out=out)
            wait_for(self._kernels)
            return out
        for row, source in zip(self._rows(out), self._host_blocks(index), strict=True):
            row[...] = source
        return out

    def scatter(self, index: IndexArray, kv: torch.Tensor) -> None:
        """Write `kv` [n, ...] into blocks `index` [n]."""
        if self.device.type != "cpu":
            for slab in self.extents:
                slab.view[self._on_device(index)] = kv.to(self.device)
            wait_for(self._kernels)
            return
        rows = self._rows(kv.cpu().contiguous())
        for row, target in zip(rows, self._host_blocks(index), strict=True):
            target[...] = row

    def copy_from(self, source: BlockStore, source_index: IndexArray, index: IndexArray) -> None:
        """Copy blocks `source_index` [n] of `source` to blocks `index` [n]; blocks until done."""
        if self.device.type == "cpu" and source.device.type == "cpu":
            sources = source._host_blocks(source_index)
            for block, target in zip(sources, self._host_blocks(index), strict=True):
                target[...] = block
            return
        # Earlier kernels and copies of these blocks have run: a thread waits for them before it
        # frees or publishes a block.
        gpu = source if self.device.type == "cpu" else self
        with gpu._copy_stream():
            self._queue_copies(source, source_index, index)
            wait_for(gpu._kernels)

    def _queue_copies(
        self, source: BlockStore, source_index: IndexArray, index: IndexArray
    ) -> None:
        """Queue copies of contiguous bytes, each a DMA from or to page-locked host memory: blocks
        that follow each other in both stores go together. PyTorch would gather other shapes in
        pageable memory first."""
        if not len(index):
            return
        to_extent, at_extent = self._extents_of(index), source._extents_of(source_index)
        breaks = (np.diff(index) != 1) | (np.diff(source_index) != 1)
        breaks |= (np.diff(to_extent) != 0) | (np.diff(at_extent) != 0)
        begins = [0, *(np.flatnonzero(breaks) + 1).tolist()]
        for begin, end in zip(begins, [*begins[1:], len(index)], strict=True):
            targets, sources = self.extents[to_extent[begin]], source.extents[at_extent[begin]]
            to, at = int(index[begin]) - targets.start, int(source_index[begin]) - sources.start
            count = end - begin
            for target, run in zip(targets.planes, sources.planes, strict=True):
                target[to : to + count].copy_(run[at : at + count], non_blocking=True)

    def _extents_of(self, index: IndexArray) -> NDArray[np.int64]:
        """Return the position in `extents` of each block's extent."""
        starts = [extent.start for extent in self.extents]
        return np.searchsorted(starts, index, side="right") - 1

    def _rows(self, kv: torch.Tensor) -> NDArray[np.uint8]:
        """Return a view of n blocks' contiguous KV on the host as `[n, runs, bytes]`."""
        flat = kv.view(-1).view(torch.uint8).numpy()
        runs = 1 if self.layout.aggregated else 2 * self.layout.layers
        return flat.reshape(len(kv), runs, self.layout.block_bytes // runs)

    def _host_blocks(self, index: IndexArray) -> Iterator[NDArray[np.uint8]]:
        """Yield a view `[runs, bytes]` of each block.

        A copy per block reaches the memory's bandwidth; a gather of all blocks would first touch
        new pages.
        """
        for at, number in zip(index.tolist(), self._extents_of(index).tolist(), strict=True):
            extent = self.extents[number]
            assert extent.runs is not None
            yield extent.runs[at - extent.start]

    def _on_device(self, index: IndexArray) -> torch.Tensor:
        return torch.from_numpy(index).to(self.device)


def lock_pages(memory: torch.Tensor) -> None:
    """Page-lock host memory, so that the GPU copies from and to it directly. Raises PoolError."""
    cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    status = cudart.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)
    if int(status) != 0:
        raise PoolError(f"cannot page-lock {memory.nbytes} bytes for the GPU: {status}")


def unlock_pages(memory: torch.Tensor) -> None:
    cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    cudart.cudaHostUnregister(memory.data_ptr())

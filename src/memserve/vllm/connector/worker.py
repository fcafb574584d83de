"""The workers' side: begins the loads and saves of each step, and reports those that have ended.

Loads begin before the forward pass, saves after it. A load is reported to vLLM, and a save to the
scheduler, when all of its copies have run, even if one failed: only then may the blocks be reused.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Mapping as MappingOf

import numpy as np
import torch

from memserve.errors import ConfigError, SegmentGone
from memserve.pool.segment import SHM_DIRECTORY
from memserve.transfer.mapping import Mapping
from memserve.vllm.connector.copies import Bytes, Copies, HostCopies, Pages, Pending, copies_of
from memserve.vllm.connector.metadata import CopiesDone, Copy, Indices, PoolMemory, StepCopies

log = logging.getLogger(__name__)


class Worker:
    """Loads and saves of one tensor-parallel rank, called by vLLM's worker."""

    def __init__(self, groups: Sequence[Sequence[str]], rank: int, ranks: int, blocks: int) -> None:
        """`groups`: names of layers, by KV cache group. `blocks`: number of vLLM's KV blocks."""
        self._groups = groups
        self._rank = rank
        self._ranks = ranks
        self._blocks = blocks
        self._layers: list[list[torch.Tensor]] = []  # by group: uint8 [blocks, page bytes]
        self._page = 0  # bytes
        self._page_locked = False  # lock the pool's memory, for copies from and to a GPU
        self._copies: Copies = HostCopies()
        # The mapping keeps the memory page-locked; the array is [blocks, layers, ranks, page].
        self._segments: list[tuple[PoolMemory, Mapping, Bytes]] = []
        self._loading: list[tuple[Copy, Pending]] = []
        self._saving: list[tuple[Copy, Pending]] = []
        self._invalid: set[int] = set()

    def register(self, kv_caches: MappingOf[str, torch.Tensor]) -> None:
        """Keep vLLM's KV tensors `[blocks, ...]`, by name of layer. Raises ConfigError if a block
        is not one run of bytes, or page sizes differ."""
        self._layers = [
            [self._pages(name, kv_caches.get(name)) for name in names] for names in self._groups
        ]
        every = [pages for layers in self._layers for pages in layers]
        sizes = {pages.shape[1] for pages in every}
        if len(sizes) != 1:
            raise ConfigError(f"the layers' KV pages differ in size: {sorted(sizes)} bytes")
        (self._page,) = sizes
        device = every[0].device
        self._page_locked = device.type == "cuda"
        self._copies = copies_of(device)

    def _pages(self, name: str, tensor: torch.Tensor | None) -> torch.Tensor:
        """Return a view of a layer's KV as uint8 [blocks, page bytes]. Raises ConfigError."""
        if tensor is None or len(tensor) != self._blocks or not tensor[0].is_contiguous():
            raise ConfigError(
                f"{name}: a block of this layer is not one run of bytes; another attention "
                "backend, or vLLM from 0.30 on, may have it so"
            )
        shape, strides = (len(tensor), tensor[0].numel()), (tensor.stride(0), 1)
        pages = torch.as_strided(tensor, shape, strides, tensor.storage_offset())
        return pages.view(torch.uint8)

    def load(self, copies: StepCopies) -> None:
        """Begin to copy the pool's blocks into vLLM's, after mapping segments that have changed."""
        self._map(copies.memory)
        for copy in copies.loads:
            self._loading.append((copy, self._begin(copy, self._copies.load, "loaded")))

    def save(self, copies: StepCopies) -> None:
        """Begin to copy blocks that the forward pass has written into the pool."""
        for copy in copies.saves:
            self._saving.append((copy, self._begin(copy, self._copies.save, "saved")))

    def take_loaded(self) -> tuple[set[str], set[str]]:
        """Return the requests whose loads have ended since the last call, and those that failed."""
        ended, self._loading = _ended(self._loading)
        failed = [copy for copy, pending in ended if pending.failed]
        for copy in failed:
            self._invalid.update(int(block) for own in copy.own for block in own if block)
        return {copy.request for copy, _ in ended}, {copy.request for copy in failed}

    def take_invalid(self) -> set[int]:
        """Return vLLM's ids of blocks whose loads failed, of the loads that `take_loaded` has
        returned since the last call."""
        told, self._invalid = self._invalid, set()
        return told

    def take_saved(self) -> CopiesDone | None:
        """Return the saves that have ended since the last call; None if there are none."""
        ended, self._saving = _ended(self._saving)
        if not ended:
            return None
        failed = {copy.job for copy, pending in ended if pending.failed}
        return CopiesDone({copy.job: 1 for copy, _ in ended}, failed)

    def _begin(self, copy: Copy, one: Callable[[Pages, Pending], None], done: str) -> Pending:
        pending = Pending()
        try:
            for mapping, memory, at, places in self._split(copy.pool):
                pending.held.append(mapping)
                for pages in self._by_group(copy, memory, at, places):
                    one(pages, pending)
        except SegmentGone as error:
            log.warning("%s: KV was not %s: %s", copy.request, done, error)
            pending.failed = True
        self._copies.close(pending)
        return pending

    def _by_group(self, copy: Copy, memory: Bytes, at: Indices, places: Indices) -> Iterator[Pages]:
        first = 0
        for layers, own in zip(self._layers, copy.own, strict=True):
            ids = own[at]
            there = ids != 0  # 0, the null block: tokens outside a sliding window
            host = memory[:, first : first + len(layers), self._rank]
            first += len(layers)
            if there.any():
                yield Pages(layers, ids[there], host, places[there])

    def _split(self, pool: Indices) -> list[tuple[Mapping, Bytes, Indices, Indices]]:
        """Return for each segment with blocks of `pool`: the mapping, its memory, the positions of
        these blocks in `pool`, and in the segment. Raises SegmentGone if a block is in none."""
        found = []
        for segment, mapping, memory in self._segments:
            end = segment.first + segment.blocks
            at = np.flatnonzero((pool >= segment.first) & (pool < end))
            if len(at):
                found.append((mapping, memory, at, pool[at] - segment.first))
        missing = len(pool) - sum(len(at) for _, _, at, _ in found)
        if missing:
            raise SegmentGone(f"{missing} blocks of the pool are not mapped here")
        return found

    def _map(self, memory: tuple[PoolMemory, ...] | None) -> None:
        if memory is None:
            return
        kept = {segment: mapping for segment, mapping, _ in self._segments}
        self._segments = []
        layers = sum(len(group) for group in self._layers)
        for segment in memory:
            mapping = kept.get(segment)
            try:
                path = SHM_DIRECTORY / segment.name
                mapping = mapping or Mapping(path, segment.nbytes, self._page_locked)
            except SegmentGone as error:
                log.error("the pool's memory cannot be used: %s", error)
                continue
            shape = (segment.blocks, layers, self._ranks, self._page)
            self._segments.append((segment, mapping, mapping.bytes.reshape(shape)))


_Begun = list[tuple[Copy, Pending]]


def _ended(begun: _Begun) -> tuple[_Begun, _Begun]:
    """Split copies into those that have ended, and the others."""
    ended: _Begun = []
    others: _Begun = []
    for copy, pending in begun:
        (ended if pending.ended else others).append((copy, pending))
    return ended, others

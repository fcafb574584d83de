"""The workers' side: copies between vLLM's KV tensors and the pool's host memory.

Copies are made where vLLM calls, loads before the forward pass and saves after it, so that a block
is not given to another request meanwhile. On a GPU they wait for what was launched before them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping as MappingOf
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from memserve.errors import ConfigError, SegmentGone
from memserve.pool.segment import SHM_DIRECTORY
from memserve.transfer.mapping import Mapping
from memserve.vllm.connector.metadata import CopiesDone, Copy, Indices, PoolMemory, StepCopies

log = logging.getLogger(__name__)

Bytes = NDArray[np.uint8]


class Worker:
    """One rank's."""

    def __init__(self, groups: Sequence[Sequence[str]], rank: int, ranks: int, blocks: int) -> None:
        """`groups`: the layers' names, by KV cache group. `blocks`: of vLLM."""
        self._names = [(name, group) for group, names in enumerate(groups) for name in names]
        self._rank = rank
        self._ranks = ranks
        self._blocks = blocks
        self._layers: list[tuple[int, torch.Tensor]] = []  # group; uint8 [blocks, page]
        self._page = 0
        self._page_locked = False  # the memory is, for copies from and to a GPU
        self._segments: list[tuple[PoolMemory, Bytes]] = []  # [blocks, layers, ranks, page]
        self._loaded: set[str] = set()
        self._failed: set[str] = set()
        self._invalid: set[int] = set()
        self._done = CopiesDone({}, set())

    def register(self, kv_caches: MappingOf[str, torch.Tensor]) -> None:
        """vLLM's KV tensors by layer, `[blocks, ...]`. Raises ConfigError where a block is not one
        run of bytes."""
        self._layers = []
        for name, group in self._names:
            tensor = kv_caches.get(name)
            whole = tensor is not None and len(tensor) == self._blocks
            if tensor is None or not whole or not tensor[0].is_contiguous():
                raise ConfigError(
                    f"{name}: a block of this layer is not one run of bytes; another attention "
                    "backend, or vLLM from 0.30 on, may have it so"
                )
            size = tensor[0].numel()
            pages = torch.as_strided(
                tensor, (len(tensor), size), (tensor.stride(0), 1), tensor.storage_offset()
            )
            self._layers.append((group, pages.view(torch.uint8)))
        sizes = {pages.shape[1] for _, pages in self._layers}
        if len(sizes) != 1:
            raise ConfigError(f"the layers' KV pages differ in size: {sorted(sizes)} bytes")
        (self._page,) = sizes
        self._page_locked = any(pages.is_cuda for _, pages in self._layers)

    def load(self, copies: StepCopies) -> None:
        """Fill blocks of requests that wait for them."""
        self._map(copies.memory)
        for copy in copies.loads:
            try:
                self._copy(copy, into_pool=False)
            except SegmentGone as error:
                log.warning("%s: KV was not loaded: %s", copy.request, error)
                self._failed.add(copy.request)
                self._invalid.update(int(block) for own in copy.own for block in own if block)
            self._loaded.add(copy.request)  # vLLM wants to hear of failed ones in both ways

    def save(self, copies: StepCopies) -> None:
        """Copy what the forward pass has computed."""
        for copy in copies.saves:
            try:
                self._copy(copy, into_pool=True)
            except SegmentGone as error:
                log.warning("%s: KV was not saved: %s", copy.request, error)
                self._done.failed.add(copy.job)
            self._done.saves[copy.job] = 1

    def take_loaded(self) -> tuple[set[str], set[str]]:
        """Requests whose loads have ended since the last call, and those of them that failed."""
        told = self._loaded, self._failed
        self._loaded, self._failed = set(), set()
        return told

    def take_invalid(self) -> set[int]:
        """vLLM's blocks whose loads have failed since the last call."""
        told, self._invalid = self._invalid, set()
        return told

    def take_saved(self) -> CopiesDone | None:
        """Saves that have ended since the last call."""
        if not self._done.saves:
            return None
        done, self._done = self._done, CopiesDone({}, set())
        return done

    def _copy(self, copy: Copy, into_pool: bool) -> None:
        for memory, at, places in self._split(copy.pool):
            for number, (group, pages) in enumerate(self._layers):
                own = copy.own[group][at]
                there = own != 0  # the null block: behind a window
                place, ids = places[there], torch.from_numpy(own[there]).to(pages.device)
                if into_pool:
                    memory[place, number, self._rank] = pages.index_select(0, ids).cpu().numpy()
                else:
                    whole = torch.from_numpy(memory[place, number, self._rank])
                    pages.index_copy_(0, ids, whole.to(pages.device))

    def _split(self, pool: Indices) -> list[tuple[Bytes, Indices, Indices]]:
        """By segment: its memory, which of `pool` are in it, and their places there. Raises
        SegmentGone where one is not mapped."""
        found = []
        for segment, memory in self._segments:
            end = segment.first + segment.blocks
            at = np.flatnonzero((pool >= segment.first) & (pool < end))
            if len(at):
                found.append((memory, at, pool[at] - segment.first))
        missing = len(pool) - sum(len(at) for _, at, _ in found)
        if missing:
            raise SegmentGone(f"{missing} blocks of the pool are not mapped here")
        return found

    def _map(self, memory: tuple[PoolMemory, ...] | None) -> None:
        if memory is None:
            return
        kept = dict(self._segments)
        self._segments = []
        for segment in memory:
            mapped = kept.get(segment)
            if mapped is None:
                try:
                    path = SHM_DIRECTORY / segment.name
                    raw = Mapping(path, segment.nbytes, self._page_locked).bytes
                except SegmentGone as error:
                    log.error("the pool's memory cannot be used: %s", error)
                    continue
                shape = (segment.blocks, len(self._layers), self._ranks, self._page)
                mapped = raw.reshape(shape)
            self._segments.append((segment, mapped))

"""Decode steps as CUDA graphs: a step's kernels are queued by one call.

At small batches a GPU computes a layer faster than Python queues its kernels. A graph has fixed
shapes and addresses, so there is one for each of a few batch sizes, and a step takes the next
larger one. Its integers go to the device by one copy, into a buffer that all graphs read.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memserve.engine.attention import Span
from memserve.engine.gpu.attention import TritonAttention
from memserve.engine.gpu.step_tables import (
    ALIGNED,
    TILE_INTS,
    StepTables,
    decode_tiles,
    padding_tiles,
)
from memserve.engine.model import Model
from memserve.types import TokenArray

log = logging.getLogger(__name__)

Ints = TypeVar("Ints", Tensor, NDArray[np.int32])

MAX_ROWS = 64  # of the largest graph; with more rows, the kernels take longer than Python
_ROW_INTS = 3 + TILE_INTS  # token, position, place, tile


class Captured(Protocol):
    """Recorded work on a device."""

    def replay(self) -> None:
        """Queue the work again."""
        ...


class _Graph(NamedTuple):
    rows: int
    captured: Captured
    logits: Tensor  # [rows, vocab], overwritten by each replay of any graph


class DecodeGraphs:
    """CUDA graphs of one model's decode steps. Owned by the engine's thread."""

    def __init__(self, model: Model, attention: TritonAttention, max_rows: int) -> None:
        """Capture a graph for each power of 2 up to `max_rows`, at most MAX_ROWS.

        Raises RuntimeError for a model whose forward pass waits for the device.
        """
        self._block_tokens = attention.block_tokens
        device = model.device
        blocks = min(-(-model.shape.max_position // self._block_tokens), attention.blocks)
        sizes = _sizes(min(max_rows, MAX_ROWS))
        length = _head(sizes[-1]) + sizes[-1] * blocks
        self._host = torch.zeros(length, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._ints = self._host.numpy()
        self._device = torch.zeros(length, dtype=torch.int32, device=device)
        self._keep = torch.arange(sizes[-1], device=device)  # graphs read it: it stays alive
        capture = CudaCapture(device)
        started = time.monotonic()
        # The largest first: the others' tensors fit into its memory.
        with _no_collection():
            graphs = [self._capture(model, attention, n, capture) for n in reversed(sizes)]
        self._graphs = graphs[::-1]
        seconds = time.monotonic() - started
        log.info("CUDA graphs of up to %d sequences captured in %.1f s", sizes[-1], seconds)

    def takes(self, spans: Sequence[Span], keep: Sequence[int]) -> bool:
        """Whether `run` computes a step that keeps the logits of the rows `keep`."""
        rows = len(spans)
        return (
            rows <= self._graphs[-1].rows
            and all(span.length == 1 for span in spans)
            and keep == list(range(rows))
        )

    def run(self, spans: Sequence[Span], tokens: TokenArray) -> Tensor:
        """Run a step that `takes` is true for, with the sequences' last tokens [n]. Returns logits
        [n, vocab], valid until the next call."""
        graph = next(g for g in self._graphs if g.rows >= len(spans))
        used = self._fill(graph.rows, spans, tokens)
        self._device[:used].copy_(self._host[:used], non_blocking=True)
        graph.captured.replay()
        return graph.logits[: len(spans)]

    def _capture(
        self, model: Model, attention: TritonAttention, rows: int, capture: CudaCapture
    ) -> _Graph:
        used = self._fill(rows, (), np.empty(0, np.int32))
        self._device[:used].copy_(self._host[:used])
        tokens, positions, places, tiles = _parts(self._device, rows)
        keep = self._keep[:rows]
        tables = StepTables(
            places=places,
            decodes=tiles.view(rows, TILE_INTS),
            prefills=tiles[:0].view(0, TILE_INTS),
            blocks=self._device[_head(rows) :],
        )

        def step() -> Tensor:
            attention.use(tables)
            return model.forward(tokens, positions, keep, attention)

        return _Graph(rows, *capture(step))

    def _fill(self, rows: int, spans: Sequence[Span], tokens: TokenArray) -> int:
        """Write a step of `rows` rows, the last ones padding, to the host's buffer. Returns the
        integers that it takes."""
        count = len(spans)
        ids, positions, places, tiles = _parts(self._ints, rows)
        tiles = tiles.reshape(rows, TILE_INTS)
        ids[:count], ids[count:] = tokens, 0
        positions[count:] = 0
        places[count:] = -1
        tiles[count:] = padding_tiles(range(count, rows))
        begin = _head(rows)
        if not count:
            return begin
        # Arrays of all sequences: a call for each takes longer than the GPU for a small model.
        size = self._block_tokens
        contexts = np.array([span.context for span in spans])
        current = np.array([span.blocks[span.context // size] for span in spans])
        starts = np.cumsum([0, *(len(span.blocks) for span in spans)])
        positions[:count] = contexts
        places[:count] = current * size + contexts % size
        tiles[:count] = decode_tiles(spans, starts)
        end = begin + int(starts[-1])
        np.concatenate([s.blocks for s in spans], out=self._ints[begin:end], casting="same_kind")
        return end


def _parts(ints: Ints, rows: int) -> tuple[Ints, Ints, Ints, Ints]:
    """Return a step's tokens, positions, places [rows] and tiles [rows * TILE_INTS] as views."""
    space = _head(rows) // _ROW_INTS
    return (
        ints[:rows],
        ints[space : space + rows],
        ints[2 * space : 2 * space + rows],
        ints[3 * space : 3 * space + rows * TILE_INTS],
    )


def _head(rows: int) -> int:
    """Return the integers before the blocks of a step, for a power of 2 of rows."""
    return max(rows, ALIGNED) * _ROW_INTS


def _sizes(most: int) -> list[int]:
    """Return the powers of 2 up to the first one that is not less than `most`."""
    return [1 << power for power in range((most - 1).bit_length() + 1)]


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep Python's collector from finalising CUDA objects, which would end a capture."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class CudaCapture:
    """Recorder of work on a GPU. All that it records shares one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        # One for all: each stream keeps memory of its own.
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._checked = False

    def __call__(self, work: Callable[[], Tensor]) -> tuple[Captured, Tensor]:
        """Run `work` and record it. Returns the record, and the result of each replay. Raises
        RuntimeError, before anything is recorded, for work that waits for the device."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            work()  # compiles kernels and makes workspaces, which a capture cannot
            if not self._checked:
                self._check(work)
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads copy blocks meanwhile: only this thread's calls are checked.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                result = work()
        except RuntimeError:
            torch.cuda.set_stream(current)  # a capture that fails leaves its own behind
            raise
        return graph, result

    def _check(self, work: Callable[[], Tensor]) -> None:
        """Raise RuntimeError if `work` waits for the device. PyTorch's allocator does not recover
        from a capture that such work ends."""
        torch.cuda.set_sync_debug_mode("error")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        self._checked = True

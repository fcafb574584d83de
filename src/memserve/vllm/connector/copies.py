"""Copies of KV pages between vLLM's tensors and the pool's host memory, for CPU and GPU tensors.

On a GPU, transfers between host and device run on a CUDA stream of their own, so that the forward
pass never waits for the bus. A save gathers its pages into a staging buffer on the compute stream,
after the kernels that wrote the pages and before any that could overwrite them; the copy stream
then copies the buffer to the host. A load first fills a staging buffer from the host, and then
scatters it over vLLM's blocks after the kernels launched so far, which may still read the previous
content of these blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from memserve.vllm.connector.metadata import Indices

Bytes = NDArray[np.uint8]


class Pages(NamedTuple):
    """Pages of n blocks, of the layers of one KV cache group, and their places in one segment."""

    layers: Sequence[torch.Tensor]  # for each layer uint8 [vLLM's blocks, page bytes]
    own: Indices  # vLLM's block ids [n]
    host: Bytes  # [pool's blocks, layers, page bytes]: one rank's part of the segment
    places: Indices  # indices into `host` [n]


class Mark(Protocol):
    """A position in a stream of copies, as a CUDA event."""

    def query(self) -> bool:
        """Return True if everything before the mark has run."""
        ...


class CopyStream(Protocol):
    """A queue of copies beside the compute stream. The worker's thread owns it."""

    def launch(self, work: Callable[[], None], *, behind_compute: bool) -> None:
        """Queue the kernels that `work` launches; with `behind_compute` they run after the kernels
        launched on the compute stream so far."""
        ...

    def mark(self) -> Mark:
        """Return a mark at the present end of the queue."""
        ...


class CudaCopyStream:
    """A CUDA stream of one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def launch(self, work: Callable[[], None], *, behind_compute: bool) -> None:
        if behind_compute:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            work()

    def mark(self) -> Mark:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return event


@dataclass(slots=True)
class Pending:
    """Copies of one request's load or one save. `held`: keeps their memory alive until they ran."""

    failed: bool = False
    held: list[object] = field(default_factory=list)
    mark: Mark | None = None  # the end of the copies; None: they have run

    @property
    def ended(self) -> bool:
        return self.mark is None or self.mark.query()


class Copies(Protocol):
    """Begins the copies of one worker."""

    def save(self, pages: Pages, pending: Pending) -> None:
        """Copy vLLM's pages into the pool's."""
        ...

    def load(self, pages: Pages, pending: Pending) -> None:
        """Copy the pool's pages into vLLM's."""
        ...

    def close(self, pending: Pending) -> None:
        """Set the mark of `pending` behind its last copy."""
        ...


class HostCopies:
    """Copies within host memory, complete when the call returns."""

    def save(self, pages: Pages, pending: Pending) -> None:
        ids = torch.from_numpy(pages.own)
        for number, layer in enumerate(pages.layers):
            pages.host[pages.places, number] = layer.index_select(0, ids).numpy()

    def load(self, pages: Pages, pending: Pending) -> None:
        ids = torch.from_numpy(pages.own)
        for number, layer in enumerate(pages.layers):
            layer.index_copy_(0, ids, torch.from_numpy(pages.host[pages.places, number]))

    def close(self, pending: Pending) -> None:
        pass


class StreamCopies:
    """Copies on a stream, which run after the call returns. Needs page-locked host memory."""

    def __init__(self, stream: CopyStream) -> None:
        self._stream = stream

    def save(self, pages: Pages, pending: Pending) -> None:
        device = pages.layers[0].device
        ids = torch.from_numpy(pages.own).to(device, non_blocking=True)
        staged = _stage(pages)
        for number, layer in enumerate(pages.layers):
            staged[:, number] = layer.index_select(0, ids)

        def to_host() -> None:
            for at, host in _runs(pages):
                host.copy_(staged[at].view_as(host), non_blocking=True)

        self._stream.launch(to_host, behind_compute=True)
        # If freed earlier, the allocator could give the buffer to kernels that overwrite it.
        pending.held += [staged, pages.host]

    def load(self, pages: Pages, pending: Pending) -> None:
        device = pages.layers[0].device
        brought: list[torch.Tensor] = []

        def from_host() -> None:
            staged = _stage(pages)
            for at, host in _runs(pages):
                staged[at].view_as(host).copy_(host, non_blocking=True)
            brought.append(staged)

        def spread() -> None:
            (staged,) = brought
            ids = torch.from_numpy(pages.own).to(device, non_blocking=True)
            for number, layer in enumerate(pages.layers):
                layer.index_copy_(0, ids, staged[:, number])

        self._stream.launch(from_host, behind_compute=False)
        self._stream.launch(spread, behind_compute=True)
        pending.held += [brought, pages.host]

    def close(self, pending: Pending) -> None:
        pending.mark = self._stream.mark()


def copies_of(device: torch.device) -> Copies:
    """Return the copies for KV tensors on `device`."""
    return StreamCopies(CudaCopyStream(device)) if device.type == "cuda" else HostCopies()


def _stage(pages: Pages) -> torch.Tensor:
    """Return an empty buffer uint8 [n, layers, page bytes] on the device of vLLM's tensors, with
    the axes of the pool's blocks."""
    shape = (len(pages.own), *pages.host.shape[1:])
    return torch.empty(shape, dtype=torch.uint8, device=pages.layers[0].device)


_Place = slice | tuple[int, int]


def _runs(pages: Pages) -> Iterator[tuple[_Place, torch.Tensor]]:
    """Yield the runs of bytes that are contiguous in the pool: the index into the staging buffer
    [n, layers, page bytes], and the host memory. Each takes one copy; a strided host tensor would
    make torch copy through another buffer and wait.

    A run is several adjacent blocks if this rank and group have all bytes of a block; one block if
    other groups have a part of it; one page if other ranks do.
    """
    host = torch.from_numpy(pages.host)
    whole = host.shape[1] * host.shape[2]
    if host.stride(1) != host.shape[2]:  # other ranks' pages are between the layers'
        for at, place in enumerate(pages.places.tolist()):
            for layer in range(host.shape[1]):
                yield (at, layer), host[place, layer]
        return
    ends = np.flatnonzero(np.diff(pages.places) != 1) + 1
    if host.stride(0) != whole:
        ends = np.arange(1, len(pages.places))
    for run in np.split(np.arange(len(pages.places)), ends):
        if len(run):
            first, count = int(run[0]), len(run)
            place = int(pages.places[first])
            yield slice(first, first + count), host[place : place + count]

"""Copies of KV pages between vLLM's tensors and the pool's host memory, on a CPU and on a GPU.

On a GPU they run on a stream of their own, so that the forward pass never waits for the bus. A
save gathers its pages on the stream that computes, behind the kernels that have written them and
before any that could write them again; only the way to the host is the copy stream's. A load is
brought to the GPU at once, and spread over vLLM's blocks behind the kernels launched so far, which
may still read what was in these blocks before.
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
    """Pages of the layers of one KV cache group, and their places in one segment of the pool."""

    layers: Sequence[torch.Tensor]  # uint8 [vLLM's blocks, page], of each layer
    own: Indices  # vLLM's block ids [n]
    host: Bytes  # [pool's blocks, layers, page]: one rank's part of the segment
    places: Indices  # in `host` [n]


class Mark(Protocol):
    """A place in a stream of copies: a CUDA event."""

    def query(self) -> bool:
        """True if everything before it has run."""
        ...


class CopyStream(Protocol):
    """A queue of copies beside the stream that computes. The worker's thread owns it."""

    def launch(self, work: Callable[[], None], *, behind_compute: bool) -> None:
        """Queue the kernels that `work` launches; `behind_compute`: they wait for the kernels that
        the computing stream has been given so far."""
        ...

    def mark(self) -> Mark:
        """The end of the queue as it is now."""
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
    """Copies of one request or job. `held`: memory that they use until they have run."""

    failed: bool = False
    held: list[object] = field(default_factory=list)
    mark: Mark | None = None  # None: they have run

    @property
    def ended(self) -> bool:
        return self.mark is None or self.mark.query()


class Copies(Protocol):
    """Copies of one worker."""

    def save(self, pages: Pages, pending: Pending) -> None:
        """Copy vLLM's pages into the pool's."""
        ...

    def load(self, pages: Pages, pending: Pending) -> None:
        """Copy the pool's pages into vLLM's."""
        ...

    def close(self, pending: Pending) -> None:
        """Mark the end of a request's or a job's copies."""
        ...


class HostCopies:
    """Copies within host memory, done when the call returns."""

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
    """Copies on a stream, under way when the call returns. The pool's memory is page-locked."""

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
        # Given back before, it would be the next kernels' to write.
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
    """Copies for KV tensors on `device`."""
    return StreamCopies(CudaCopyStream(device)) if device.type == "cuda" else HostCopies()


def _stage(pages: Pages) -> torch.Tensor:
    """Memory [n, layers, page] beside vLLM's tensors, in the order of the pool's blocks."""
    shape = (len(pages.own), *pages.host.shape[1:])
    return torch.empty(shape, dtype=torch.uint8, device=pages.layers[0].device)


_Place = slice | tuple[int, int]


def _runs(pages: Pages) -> Iterator[tuple[_Place, torch.Tensor]]:
    """Runs of bytes that are one run in the pool as well: what of [n, layers, page], and the host
    memory. One copy each: of another form, torch would copy through a buffer and wait for it.

    A run is as many blocks as lie behind each other, where this rank and this group have all of a
    block; a block, where the group shares it with others; else one page.
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

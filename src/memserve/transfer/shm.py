"""`ShmTransport`: copies into a peer's shared memory on the same host."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from memserve.errors import TransferError, UnknownPeer
from memserve.pool.device_queue import copy_stream_of
from memserve.pool.layout import KVLayout
from memserve.pool.segment import SHM_DIRECTORY
from memserve.transfer.base import (
    Completion,
    LocalRegion,
    Outcome,
    PoolRegions,
    Region,
    Ticket,
    TransportCounters,
    WriteList,
)
from memserve.transfer.conversion import compatibility
from memserve.transfer.copy_plan import RegionCopy, RegionTable, Shape, plan_copies, split_pieces
from memserve.transfer.mapping import Mapping, PeerMemory
from memserve.types import InstanceId, Owner

# Limit of the bytes that one `poll` copies: a few milliseconds.
POLL_BYTES = 16 * 1024 * 1024
# Bytes copied between two checks of that limit.
STEP_BYTES = 4 * 1024 * 1024
# Least bytes of a contiguous copy for which a second thread helps: one core does not use all of the
# memory's bandwidth. With shorter copies the two threads wait for the GIL.
PARALLEL_BYTES = 128 * 1024
PART_BYTES = 1024 * 1024  # unit of work of each of the two threads

# Errors that fail one copy: a lost device, or memory that does not match its description.
_INTERRUPTIONS = (RuntimeError, ValueError, IndexError, OSError)

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True, eq=False)
class _Peer:
    owner: Owner
    table: RegionTable
    memory: PeerMemory


@dataclass(slots=True, eq=False)
class _Job:
    """One ticket. `steps` keeps the memory on both sides mapped until its end."""

    peer: Owner
    nbytes: int
    steps: Iterator[int]  # each step copies, and yields the number of bytes
    copied: int = 0
    to_copy: bool = True
    cancelled: bool = False
    error: TransferError | None = None  # the error that ended the steps
    dma: torch.cuda.Event | None = None  # recorded after the GPU's last copy

    def drained(self) -> bool:
        try:
            return self.dma is None or bool(self.dma.query())  # type: ignore[no-untyped-call]
        except RuntimeError as error:  # the device is lost, so it copies nothing any more
            self.error = TransferError(f"the device was lost: {error}")
            return True


class ShmTransport:
    """Copies local memory into the peer's segments on the polling thread, for large blocks also on
    a second thread. The death of a peer is no error here: its memory stays mapped."""

    name = "shm"
    poll_interval = 0.0  # polls do the work

    def __init__(self, layout: KVLayout, directory: Path = SHM_DIRECTORY) -> None:
        """`layout`: of the local pool."""
        self.counters = TransportCounters()
        self._layout = layout
        self._directory = directory
        self._local: dict[Region, torch.Tensor] = {}
        self._table = RegionTable(layout, ())
        self._peers: dict[InstanceId, _Peer] = {}
        self._jobs: dict[Ticket, _Job] = {}  # in the order in which they are copied
        self._tickets = count(1)
        self._helper = ThreadPoolExecutor(1, "memserve-copy")  # starts its thread when needed
        self._copy_stream: Callable[[], AbstractContextManager[None]] | None = None  # the GPU's

    @property
    def in_flight(self) -> int:
        return len(self._jobs)

    def register(self, regions: Sequence[LocalRegion]) -> None:
        self._local.update((each.region, each.memory) for each in regions)
        self._table = RegionTable(self._layout, tuple(self._local))

    def unregister(self, regions: Sequence[LocalRegion]) -> None:
        for each in regions:
            del self._local[each.region]
        self._table = RegionTable(self._layout, tuple(self._local))

    def describe(self) -> bytes:
        return b""

    def add_peer(self, peer: Owner, memory: PoolRegions, description: bytes) -> None:
        compatibility(self._layout, memory.layout)
        table = RegionTable(memory.layout, memory.regions)
        known = self._peers.get(peer.instance)
        if known is not None and known.owner != peer:
            self.remove_peer(known.owner)
            known = None
        if known is None:
            on_gpu = any(region.device is not None for region in self._local)
            mapped = PeerMemory(self._directory, page_locked=on_gpu)
        else:
            mapped = known.memory
            mapped.keep_only(table.regions)
        self._peers[peer.instance] = _Peer(peer, table, mapped)

    def remove_peer(self, peer: Owner) -> None:
        known = self._peers.get(peer.instance)
        if known is None or known.owner != peer:
            return
        del self._peers[peer.instance]
        for ticket, job in self._jobs.items():
            if job.peer == peer:
                self.cancel(ticket)

    def post(self, peer: Owner, writes: WriteList) -> Ticket:
        known = self._peers.get(peer.instance)
        if known is None or known.owner != peer:
            raise UnknownPeer(f"{peer.instance!r} of epoch {peer.epoch} is not connected")
        copies = [
            (copy, self._local[copy.source], known.memory.open(copy.target))
            for copy in plan_copies(self._table, known.table, writes)
        ]
        ticket = Ticket(next(self._tickets))
        job = _Job(peer, sum(copy.nbytes for copy, *_ in copies), iter(()))
        job.steps = self._steps(job, copies)
        self._jobs[ticket] = job
        self.counters.posted += 1
        return ticket

    def poll(self) -> list[Completion]:
        left = POLL_BYTES
        ended = []
        for ticket, job in list(self._jobs.items()):
            while job.to_copy and left > 0:
                try:
                    copied = next(job.steps, None)
                except _INTERRUPTIONS as error:
                    job.error = TransferError(f"the copy was interrupted: {error}")
                    copied = None
                job.copied += copied or 0
                job.to_copy = copied is not None and job.copied < job.nbytes
                left -= copied or 0
            if not job.to_copy and job.drained():
                ended.append(self._end(ticket, job))
        return ended

    def cancel(self, ticket: Ticket) -> None:
        job = self._jobs.get(ticket)
        if job is not None and job.to_copy:
            job.to_copy = False
            job.cancelled = True

    def close(self) -> None:
        for job in self._jobs.values():
            if job.dma is not None:
                job.dma.synchronize()
        self._helper.shutdown()
        self._jobs.clear()
        self._peers.clear()
        self._local.clear()
        self._table = RegionTable(self._layout, ())

    def _end(self, ticket: Ticket, job: _Job) -> Completion:
        del self._jobs[ticket]
        self.counters.ended += 1
        if job.cancelled:
            return Completion(ticket, Outcome.CANCELLED)
        if job.error is not None or job.copied < job.nbytes:  # an exception has ended the steps
            error = job.error or TransferError("the copy was interrupted")
            return Completion(ticket, Outcome.FAILED, error)
        self.counters.bytes_moved += job.nbytes
        return Completion(ticket, Outcome.DONE)

    def _steps(
        self, job: _Job, copies: list[tuple[RegionCopy, torch.Tensor, Mapping]]
    ) -> Iterator[int]:
        for copy, memory, mapping in copies:
            if memory.is_cuda:
                yield from self._copy_from_gpu(job, copy, memory, mapping)
            else:
                self.counters.pieces += len(copy.count)
                for copied in self._copy_blocks(copy, memory.numpy(), mapping.bytes):
                    self.counters.bytes_copied += copied
                    yield copied

    def _copy_blocks(self, copy: RegionCopy, source: Bytes, target: Bytes) -> Iterator[int]:
        """Copy run by run; yield the bytes of each step."""
        ours, theirs = _views(copy, source, target)
        if copy.shape.nbytes < PARALLEL_BYTES or len(os.sched_getaffinity(0)) < 2:
            for step in copy.chunks(STEP_BYTES):
                _copy_runs(step, ours, theirs)
                yield step.nbytes
            return
        for step in copy.chunks(POLL_BYTES):
            self._copy_together(deque(step.chunks(PART_BYTES)), ours, theirs)
            yield step.nbytes

    def _copy_together(self, parts: deque[RegionCopy], ours: Bytes, theirs: Bytes) -> None:
        """Copy `parts` on both threads; each takes the next part, so that neither waits long."""

        def work() -> None:
            with suppress(IndexError):
                while True:
                    _copy_runs(parts.popleft(), ours, theirs)

        helped = self._helper.submit(work)
        work()
        if not helped.cancel():  # the second thread has begun, and may still copy the last part
            helped.result()

    def _copy_from_gpu(
        self, job: _Job, copy: RegionCopy, memory: torch.Tensor, mapping: Mapping
    ) -> Iterator[int]:
        """Copy from the device to page-locked host memory by DMA, piece by piece."""
        target = torch.from_numpy(mapping.bytes)
        if self._copy_stream is None:
            self._copy_stream = copy_stream_of(memory.device)
        for at, to, nbytes in split_pieces(copy, STEP_BYTES):
            # Beside the engine's kernels: those that wrote the blocks have run, or they would be
            # neither in the index nor told as ready.
            with self._copy_stream():
                target[to : to + nbytes].copy_(memory[at : at + nbytes], non_blocking=True)
                job.dma = torch.cuda.Event()  # type: ignore[no-untyped-call]
                job.dma.record(torch.cuda.current_stream(memory.device))
            self.counters.pieces += 1
            yield nbytes


def _copy_runs(copy: RegionCopy, ours: Bytes, theirs: Bytes) -> None:
    starts = (copy.source_start, copy.target_start)
    at, to = (start.tolist() for start in starts)
    if (copy.count > 1).any():  # indexing one block takes half the time of a slice
        at, to = (
            map(slice, first, (start + copy.count).tolist())
            for first, start in zip((at, to), starts, strict=True)
        )
    for source_run, target_run in zip(at, to, strict=True):
        theirs[target_run] = ours[source_run]


def _views(copy: RegionCopy, source: Bytes, target: Bytes) -> tuple[Bytes, Bytes]:
    """Return both sides as `[blocks, *axes, nbytes]`; only the numbers of blocks differ."""
    shape: Shape = copy.shape
    inner = (*(axis.steps for axis in shape.axes), shape.nbytes)
    # numpy refuses strides that leave the buffer.
    ours: Bytes = np.ndarray(
        (copy.source.blocks, *inner),
        np.uint8,
        source,
        shape.source_offset,
        (shape.source_stride, *(axis.source_stride for axis in shape.axes), 1),
    )
    theirs: Bytes = np.ndarray(
        (copy.target.blocks, *inner),
        np.uint8,
        target,
        shape.target_offset,
        (shape.target_stride, *(axis.target_stride for axis in shape.axes), 1),
    )
    return ours, theirs

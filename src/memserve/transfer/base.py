"""The `Transport` contract (writes of KV blocks into a peer's pool), and its data types.

A transport is one-sided: the sender writes into the peer's memory, and the peer takes no part.
The sessions above it (see `session`) agree on which blocks may be written and when. A transport
has no timers: deadlines, retries and heartbeats belong to its caller.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, NewType, Protocol, Self

import msgspec
import numpy as np
import torch
from msgspec import Meta
from numpy.typing import NDArray

from memserve.errors import LengthMismatch, TransferError
from memserve.pool.layout import KVLayout
from memserve.pool.segment import MAX_NAME
from memserve.types import MAX_BLOCKS, IndexArray, Medium, Owner, RefArray, ref_index, ref_medium

Ticket = NewType("Ticket", int)  # one posted WriteList, unique within a transport


# A number in a message: non-negative and within int64, the range of numpy and of the kernel.
Natural = Annotated[int, Meta(ge=0, le=2**63 - 1)]


# Regions that a pool describes to peers, at most: 1 TiB of DRAM in segments of 64 MiB.
MAX_REGIONS = 16_384


class Region(msgspec.Struct, frozen=True):
    """Consecutive blocks in one piece of an instance's memory, as described to peers."""

    medium: Medium
    first_block: Annotated[int, Meta(ge=0, lt=MAX_BLOCKS)]
    blocks: Annotated[int, Meta(ge=1, le=MAX_BLOCKS)]
    address: Natural  # in the address space of its owner
    nbytes: Natural
    # Name of the POSIX shared memory; None: device memory.
    segment: Annotated[str, Meta(max_length=MAX_NAME)] | None
    device: Annotated[int, Meta(ge=0, lt=1024)] | None  # CUDA ordinal; None: host memory

    @property
    def end(self) -> int:
        """The index of the last block plus 1."""
        return self.first_block + self.blocks


class HostId(msgspec.Struct, frozen=True):
    """Identity of a host: equal if, and only if, two processes share a kernel and a /dev/shm."""

    boot: Annotated[str, Meta(max_length=64)]  # the kernel's random boot id
    shm_device: Natural  # device number of the file system at /dev/shm


class PoolRegions(msgspec.Struct, frozen=True):
    """The memory of one pool, as a peer needs it to write into the pool."""

    layout: KVLayout
    host: HostId
    regions: Annotated[tuple[Region, ...], Meta(max_length=MAX_REGIONS)]


@dataclass(frozen=True, slots=True, eq=False)
class LocalRegion:
    """A region of this process's pool. A LocalRegion keeps its memory mapped."""

    region: Region
    memory: torch.Tensor  # uint8 [nbytes]


@dataclass(frozen=True, slots=True, eq=False)
class BlockList:
    """Blocks of one pool, in order: a medium [n] and an index [n] for each block."""

    medium: IndexArray
    index: IndexArray

    @classmethod
    def of(cls, refs: RefArray) -> Self:
        """Return the blocks of packed references [n]; ignores owner and generation."""
        return cls(ref_medium(refs), ref_index(refs))

    def __len__(self) -> int:
        return len(self.index)


@dataclass(frozen=True, slots=True, eq=False)
class WriteList:
    """Copies of local blocks into a peer's blocks: `source[i]` into `target[i]`.

    The order of the copies is undefined, so target blocks must be distinct. If the two layouts
    differ, the copies convert between them (see `conversion`).
    """

    source: BlockList  # of this process's pool
    target: BlockList  # of the peer's pool
    layers: range | None = None  # the layers to copy; None: all
    heads: range | None = None  # KV heads, numbered over the whole model; None: all common heads

    def __post_init__(self) -> None:
        counts = {
            len(array)
            for blocks in (self.source, self.target)
            for array in (blocks.medium, blocks.index)
        }
        if len(counts) != 1:
            raise LengthMismatch(
                f"{len(self.source)} source blocks for {len(self.target)} target blocks"
            )


class Outcome(StrEnum):
    """How a ticket ended."""

    DONE = "done"  # every byte is in the peer's memory
    FAILED = "failed"  # some bytes may have been written
    CANCELLED = "cancelled"  # some bytes may have been written


@dataclass(frozen=True, slots=True)
class Completion:
    """The end of a ticket; each ticket has exactly one. The source blocks are *drained*: the
    transport no longer reads them, so the caller may reuse them."""

    ticket: Ticket
    outcome: Outcome
    error: TransferError | None = None  # why, if FAILED
    # Whether the target blocks may be reused at once, too. False if a connection broke: bytes may
    # still sit in the peer's receive buffer until the peer's transport has forgotten this sender.
    target_drained: bool = True


@dataclass(slots=True)
class TransportCounters:
    """Totals since the start."""

    posted: int = 0  # tickets
    ended: int = 0  # tickets, however they ended
    bytes_moved: int = 0  # of KV, into the peers' memory
    bytes_copied: int = 0  # of `bytes_moved`, copied by this process's CPU
    pieces: int = 0  # contiguous runs of bytes, or copy calls, after merging neighbours
    seconds: float = 0.0  # with tickets in flight; counted by `Peers.poll`


class Transport(Protocol):
    """Writes of local blocks into peers' memory; the caller drives them with `poll`.

    All calls come from one thread, and no call waits for a peer. `post` checks its arguments: if
    `post` raises, nothing was copied and no ticket exists. Later errors become FAILED completions.
    """

    name: str  # "shm" or "nixl"; two pools can use a transport that both have
    poll_interval: float  # seconds to wait between polls while tickets are in flight
    counters: TransportCounters

    @property
    def in_flight(self) -> int:
        """Tickets without a completion."""
        ...

    def register(self, regions: Sequence[LocalRegion]) -> None:
        """Register local memory, as a source and as a target of peers' writes.

        The transport keeps the memory mapped until `unregister`. Raises TransferError.
        """
        ...

    def unregister(self, regions: Sequence[LocalRegion]) -> None:
        """Forget local memory that the pool gives back. No ticket in flight may read it."""
        ...

    def describe(self) -> bytes:
        """Return the `description` for a peer's `add_peer`; it changes when the regions do."""
        ...

    def add_peer(self, peer: Owner, memory: PoolRegions, description: bytes) -> None:
        """Prepare writes to one life of a peer; call again when its memory grew or shrank.

        Another life of the instance replaces the previous one, as by `remove_peer`. Raises
        LayoutMismatch if the two layouts have no KV in common; TransferError.
        """
        ...

    def remove_peer(self, peer: Owner) -> None:
        """Forget a life of a peer and cancel its tickets. Does nothing if it is unknown."""
        ...

    def post(self, peer: Owner, writes: WriteList) -> Ticket:
        """Start to copy. Source blocks must not change before the ticket's completion.

        Raises UnknownPeer; UnknownBlock if a local or remote block is in no region; SegmentGone
        if the peer has given the memory back; TransferError for layers or heads not in both pools.
        """
        ...

    def poll(self) -> list[Completion]:
        """Make progress; return the completions since the last call."""
        ...

    def cancel(self, ticket: Ticket) -> None:
        """Request an early end. The completion still comes; DONE if the copy finished first.

        The completion comes when the copy has really stopped. If the peer is silent but not known
        to be dead, that takes until the network gives up: possibly minutes. Until then the
        transport may read the source blocks, so the caller must not reuse them.
        """
        ...

    def close(self) -> None:
        """Release all resources. Tickets in flight end without a completion."""
        ...


def block_list(medium: Medium, index: IndexArray | list[int]) -> BlockList:
    """Return a BlockList of one medium; `index` [n]."""
    array: NDArray[np.int64] = np.asarray(index, dtype=np.int64)
    return BlockList(np.full(len(array), int(medium), dtype=np.int64), array)

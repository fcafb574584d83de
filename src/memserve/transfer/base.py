"""What moves bytes between pools: the contract that every transport keeps.

A transport is one-sided. The sender writes into the memory of a peer, which takes no part in
it; who may write where and when is agreed on a level above. A transport has no opinion on
time either: deadlines, retries and heartbeats are its caller's.
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


# What a number in a message may be: what numpy and the kernel take, too.
Natural = Annotated[int, Meta(ge=0, le=2**63 - 1)]


# Segments of a pool that peers are told about: 1 TiB of DRAM in segments of 64 MiB.
MAX_REGIONS = 16_384


class Region(msgspec.Struct, frozen=True):
    """Consecutive blocks in one piece of an instance's memory, as a peer sees it."""

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
        """The index behind the last block."""
        return self.first_block + self.blocks


class HostId(msgspec.Struct, frozen=True):
    """Equal for processes that run one kernel and see one /dev/shm, and only for those."""

    boot: Annotated[str, Meta(max_length=64)]  # the kernel's random boot id
    shm_device: Natural  # device number of the file system at /dev/shm


class PoolRegions(msgspec.Struct, frozen=True):
    """The memory of one pool: what a peer must know to write into it."""

    layout: KVLayout
    host: HostId
    regions: Annotated[tuple[Region, ...], Meta(max_length=MAX_REGIONS)]


@dataclass(frozen=True, slots=True, eq=False)
class LocalRegion:
    """A region of this process. Holding it keeps the memory mapped."""

    region: Region
    memory: torch.Tensor  # uint8 [nbytes]


@dataclass(frozen=True, slots=True, eq=False)
class BlockList:
    """Blocks of one pool, in order. A block is a medium and an index; arrays of one length."""

    medium: IndexArray
    index: IndexArray

    @classmethod
    def of(cls, refs: RefArray) -> Self:
        """The blocks of packed references [n], whoever owns them."""
        return cls(ref_medium(refs), ref_index(refs))

    def __len__(self) -> int:
        return len(self.index)


@dataclass(frozen=True, slots=True, eq=False)
class WriteList:
    """Copies of local blocks into a peer's blocks, pair by pair.

    Pairs are copied in no promised order, so no target may be named twice. Where the two
    layouts differ, the bytes are converted on the way (see `conversion`).
    """

    source: BlockList  # of this process's pool
    target: BlockList  # of the peer's pool
    layers: range | None = None  # the layers to copy; None: all
    heads: range | None = None  # KV heads, numbered over the whole model; None: all in both

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
    """The end of a ticket. Each ticket has exactly one, and it means *drained*: the transport
    reads the source blocks no more, so they may be reused."""

    ticket: Ticket
    outcome: Outcome
    error: TransferError | None = None  # why, if FAILED
    # The target blocks may be reused at once too. False where a connection broke and bytes may
    # still sit in the peer's receive buffer: they may once the peer has forgotten this one.
    target_drained: bool = True


@dataclass(slots=True)
class TransportCounters:
    """Totals since the start."""

    posted: int = 0  # tickets
    ended: int = 0  # tickets, however they ended
    bytes_moved: int = 0  # of KV, into the peers' memory
    bytes_copied: int = 0  # read and written by this process's CPU for it
    pieces: int = 0  # runs of bytes, or copy calls, after merging neighbours


class Transport(Protocol):
    """Writes into the memory of peers; driven by `poll`.

    All calls come from one thread. None of them waits for a peer. Arguments are checked at
    the call, so errors that `post` raises have copied nothing and made no ticket; whatever
    goes wrong later is a FAILED completion.
    """

    name: str  # "shm", "nixl": under which two sides find out that they both have it
    poll_interval: float  # seconds worth waiting between polls while tickets are in flight
    counters: TransportCounters

    @property
    def in_flight(self) -> int:
        """Tickets without a completion."""
        ...

    def register(self, regions: Sequence[LocalRegion]) -> None:
        """Make local memory known, for reading and for peers to write into.

        The transport keeps the memory mapped until `unregister`. Raises TransferError.
        """
        ...

    def unregister(self, regions: Sequence[LocalRegion]) -> None:
        """Forget local memory, before its blocks go. No ticket in flight may read it."""
        ...

    def describe(self) -> bytes:
        """What a peer's `add_peer` needs beside the regions; changes as they do."""
        ...

    def add_peer(self, peer: Owner, memory: PoolRegions, description: bytes) -> None:
        """Be able to write to one life of one instance.

        Again with the same peer: its memory grew or shrank. A new life of an instance ends
        the old one, as `remove_peer` does. Raises LayoutMismatch where no bytes of the two
        layouts correspond; TransferError.
        """
        ...

    def remove_peer(self, peer: Owner) -> None:
        """Forget a peer and cancel its tickets. Unknown: nothing happens."""
        ...

    def post(self, peer: Owner, writes: WriteList) -> Ticket:
        """Begin to copy. Local blocks must not change before the ticket's completion.

        Raises UnknownPeer; UnknownBlock for a block outside of every region, local or
        remote; SegmentGone where the peer's memory has left since it was described.
        """
        ...

    def poll(self) -> list[Completion]:
        """Make progress, and return the tickets that ended since the last call."""
        ...

    def cancel(self, ticket: Ticket) -> None:
        """Ask for an early end. The completion still comes, DONE if the copy was faster.

        It comes when the copy has really stopped. Where a peer is silent but not known to be
        dead that takes as long as the network needs to give up: minutes, perhaps. Until then
        a late byte may be read from the source blocks, so they must not be reused.
        """
        ...

    def close(self) -> None:
        """Let go of everything. Tickets in flight end without a completion."""
        ...


def block_list(medium: Medium, index: IndexArray | list[int]) -> BlockList:
    """Blocks of one medium."""
    array: NDArray[np.int64] = np.asarray(index, dtype=np.int64)
    return BlockList(np.full(len(array), int(medium), dtype=np.int64), array)

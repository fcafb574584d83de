"""The memory of this process's pool, and the transport that reaches a peer's."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from typing import Literal

from memserve.errors import TransferError
from memserve.pool.layout import KVLayout
from memserve.pool.pool import BlockPool
from memserve.pool.segment import SHM_DIRECTORY
from memserve.transfer.base import LocalRegion, PoolRegions, Region
from memserve.transfer.host import host_id
from memserve.types import Medium


def local_regions(pool: BlockPool) -> tuple[LocalRegion, ...]:
    """Return the current memory of a pool. Raises PoolError once the pool is closed."""
    return tuple(
        LocalRegion(
            Region(
                medium=medium,
                first_block=extent.start,
                blocks=extent.blocks,
                address=extent.memory.data_ptr(),
                nbytes=extent.memory.nbytes,
                segment=None if extent.segment is None else extent.segment.name,
                device=extent.memory.device.index if extent.memory.is_cuda else None,
            ),
            extent.memory,
        )
        for medium in Medium
        for extent in pool.extents(medium)
    )


def pool_regions(layout: KVLayout, local: Sequence[LocalRegion]) -> PoolRegions:
    """Return the description of `local` for peers."""
    return PoolRegions(layout, host_id(), tuple(each.region for each in local))


def mappable(memory: PoolRegions) -> bool:
    """Return whether this process can write into a peer's host memory through /dev/shm. Device
    memory, which has no segment, is not reached so.

    The host's identity alone does not say that this user may open the peer's segments.
    """
    segments = [region.segment for region in memory.regions if region.segment is not None]
    return (
        memory.host == host_id()
        and bool(segments)
        and all(os.access(SHM_DIRECTORY / segment, os.R_OK | os.W_OK) for segment in segments)
    )


PathName = Literal["auto", "shm", "nixl"]


def choose_transport(
    ours: Collection[str], theirs: Collection[str], memory: PoolRegions, wanted: PathName = "auto"
) -> str:
    """Return the name of the transport for writes into a peer's `memory`.

    Shared memory where it reaches all of it, otherwise NIXL, or else shared memory for what it
    reaches; `wanted` forces one. `ours` and `theirs` are the transports that the two sides have.
    Raises TransferError.
    """
    both = set(ours) & set(theirs)
    shm = wanted in ("auto", "shm") and "shm" in both and mappable(memory)
    if shm and all(region.segment is not None for region in memory.regions):
        return "shm"
    if wanted in ("auto", "nixl") and "nixl" in both:
        return "nixl"
    if shm:
        return "shm"
    reach = "can" if mappable(memory) else "cannot"
    raise TransferError(
        f"no transport to the peer (path={wanted!r}): this pool has {sorted(ours)}, the peer "
        f"{sorted(theirs)}, and the peer's memory {reach} be mapped"
    )

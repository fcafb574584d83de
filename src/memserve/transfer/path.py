"""Which transport leads to a peer."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

from memserve.errors import TransferError
from memserve.transfer.base import PoolRegions
from memserve.transfer.regions import mappable

PathName = Literal["auto", "shm", "nixl"]


def choose_transport(
    ours: Collection[str], theirs: Collection[str], memory: PoolRegions, wanted: PathName = "auto"
) -> str:
    """The name of the transport for writes into a peer's `memory`.

    Shared memory where it reaches all of it, otherwise NIXL; `wanted` forces one. `ours` and
    `theirs` are the transports that the two sides have. Raises TransferError.
    """
    both = set(ours) & set(theirs)
    if wanted in ("auto", "shm") and "shm" in both and mappable(memory):
        return "shm"
    if wanted in ("auto", "nixl") and "nixl" in both:
        return "nixl"
    reach = "can" if mappable(memory) else "cannot"
    raise TransferError(
        f"no path to the peer ({wanted} wanted): here {sorted(ours)}, there {sorted(theirs)}, "
        f"and its memory {reach} be mapped"
    )

"""One error hierarchy: everything this package raises on purpose is a `MemserveError`.

Messages carry the numbers that a person needs to act: what was asked, what there was.
"""

from __future__ import annotations


class MemserveError(Exception):
    """Root of every error raised on purpose."""


class ConfigError(MemserveError):
    """A configuration that cannot work: unknown key, wrong type, contradictory values."""


class ModelError(MemserveError):
    """A model that cannot be found, loaded or served."""


class ClusterError(MemserveError):
    """A process of a local cluster that failed; the message ends with what it said last."""


# --- pool -----------------------------------------------------------------------------


class PoolError(MemserveError):
    """A call that the memory pool refuses; the pool is unchanged after it."""


class OutOfBlocks(PoolError):
    """Not enough blocks, even after evicting all that may be evicted."""

    def __init__(self, medium: str, asked: int, free: int, evictable: int, total: int) -> None:
        super().__init__(
            f"{asked} {medium} blocks asked, {free} free and {evictable} evictable of {total}"
        )
        self.medium = medium
        self.asked = asked
        self.free = free
        self.evictable = evictable
        self.total = total


class DoubleFree(PoolError):
    """A block that is free already, or named twice in one call."""


class StaleBlock(PoolError):
    """A reference from before the block was freed and given to someone else."""


class ForeignBlock(PoolError):
    """A reference to another instance's block, or to no block at all."""


class WrongMedium(PoolError):
    """A block in DRAM where one in HBM is needed."""


class PinnedBlock(PoolError):
    """A block that somebody is reading."""


class NotOwned(PoolError):
    """A block that belongs to the index and not to the caller (or the other way round)."""


class LengthMismatch(PoolError):
    """Tokens, references or tensors whose lengths do not fit each other."""


class InvalidTokens(PoolError):
    """Tokens that are not int32."""


class LayoutMismatch(PoolError):
    """KV bytes of another shape, type or model."""


class SharedMemoryFull(PoolError):
    """The shared-memory file system has no room for the segment asked for."""


class IntegrityError(PoolError):
    """`check_integrity` found a block with no owner, with two, or an index that disagrees."""


# --- transfer -------------------------------------------------------------------------


class TransferError(MemserveError):
    """Blocks that could not be moved to a peer."""


class UnknownPeer(TransferError):
    """An instance that is not connected, or another life of it than the one that is."""


class UnknownBlock(TransferError):
    """A block outside of the memory that its owner has described."""


class SegmentGone(TransferError):
    """Shared memory that its owner has given back, or that this process cannot see."""


class PeerLost(TransferError):
    """The connection to a peer broke."""


class PeerRefused(TransferError):
    """A peer that cannot be talked to: another secret, protocol version or identity."""


class TransferCancelled(TransferError):
    """The caller cancelled."""


class TransferAborted(TransferError):
    """The destination gave up."""


class UnwrittenBlocks(TransferError):
    """Blocks whose transfer was committed, but which its source has not written."""


class TransferTimeout(TransferError, TimeoutError):
    """Not done in time; it may still be going on."""


# --- engine ---------------------------------------------------------------------------


class RequestError(MemserveError):
    """A request that can never be served as it stands; `param` names the field at fault."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class GivenUp(MemserveError):
    """What was being prepared is not wanted any more."""


class EngineStopped(MemserveError):
    """The engine no longer takes requests."""


class QueueFull(MemserveError):
    """As many requests wait as may wait."""

    def __init__(self, waiting: int, limit: int) -> None:
        super().__init__(f"{waiting} requests are waiting and at most {limit} may")
        self.waiting = waiting
        self.limit = limit


# --- scheduler ------------------------------------------------------------------------


class ProfileError(MemserveError):
    """Measurements that no cost model can be made of."""


# --- benchmarks -----------------------------------------------------------------------


class EmulationError(MemserveError):
    """A network that cannot be emulated here."""

"""The error hierarchy: every error that this package raises on purpose is a `MemserveError`.

Messages carry the numbers that a person needs to act: the amount asked for, the amount there.
"""

from __future__ import annotations


class MemserveError(Exception):
    """Base class of all errors of this package."""


class ConfigError(MemserveError):
    """A configuration that cannot work: unknown key, wrong type, contradictory values."""


class ModelError(MemserveError):
    """A model that cannot be found, loaded or served."""


class ClusterError(MemserveError):
    """A process of a local cluster that failed; the message ends with its last output."""


# --- pool -----------------------------------------------------------------------------


class PoolError(MemserveError):
    """A call that the memory pool refuses; the pool is unchanged after it."""


class OutOfBlocks(PoolError):
    """Too few blocks, even if all evictable ones are evicted. Attributes count blocks."""

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
    """A reference whose block has been freed since (its generation is over)."""


class ForeignBlock(PoolError):
    """A reference to another instance's block, or to no block at all."""


class WrongMedium(PoolError):
    """A block in DRAM where one in HBM is needed."""


class PinnedBlock(PoolError):
    """A block that a match or a read holds, and that therefore cannot be freed."""


class NotOwned(PoolError):
    """A block that the caller does not own, may not use in this call, or named twice."""


class LengthMismatch(PoolError):
    """Tokens, references or tensors of lengths that do not match, or a negative count."""


class InvalidTokens(PoolError):
    """Tokens that are not a one-dimensional array of int32 values."""


class LayoutMismatch(PoolError):
    """KV bytes of another shape, type or model."""


class SharedMemoryFull(PoolError):
    """The shared-memory file system has no room for the segment asked for."""


class IntegrityError(PoolError):
    """A contradiction in the pool's book-keeping, such as a block with no owner or with two."""


# --- transfer -------------------------------------------------------------------------


class TransferError(MemserveError):
    """Blocks that could not be moved to a peer."""


class UnknownPeer(TransferError):
    """An instance, or a life (epoch) of an instance, that is not connected."""


class UnknownBlock(TransferError):
    """A block outside the memory regions that its owner has announced."""


class SegmentGone(TransferError):
    """Shared memory that its owner has released, or that this process cannot see."""


class PeerLost(TransferError):
    """The connection to a peer broke."""


class PeerRefused(TransferError):
    """A failed handshake: the peer has another secret, protocol version or identity."""


class TransferCancelled(TransferError):
    """The caller cancelled the transfer."""


class TransferAborted(TransferError):
    """The target ended the transfer."""


class UnwrittenBlocks(TransferError):
    """Blocks of a commit that the source has not written."""


class TransferTimeout(TransferError, TimeoutError):
    """A wait for a transfer that took too long; the transfer may still be running."""


# --- engine ---------------------------------------------------------------------------


class RequestError(MemserveError):
    """A request that cannot be served unless it is changed; `param` names the invalid field."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class GrammarFailed(MemserveError):
    """A sequence whose grammar allows no further token, or needs more work for one than it may."""


class GivenUp(MemserveError):
    """The caller stopped waiting, for example for the start of a vLLM server."""


class EngineStopped(MemserveError):
    """The engine no longer takes requests."""


class QueueFull(MemserveError):
    """The queue of waiting requests has reached its limit."""

    def __init__(self, waiting: int, limit: int) -> None:
        super().__init__(f"{waiting} requests are waiting and at most {limit} may")
        self.waiting = waiting
        self.limit = limit


# --- scheduler ------------------------------------------------------------------------


class ProfileError(MemserveError):
    """Measurements from which no cost model can be fitted."""


# --- benchmarks -----------------------------------------------------------------------


class EmulationError(MemserveError):
    """A network that cannot be emulated here."""

"""Errors as they travel: by the name of their class."""

from __future__ import annotations

from memserve.errors import (
    DoubleFree,
    ForeignBlock,
    InvalidTokens,
    LayoutMismatch,
    LengthMismatch,
    MemserveError,
    NotOwned,
    OutOfBlocks,
    PeerLost,
    PeerRefused,
    PinnedBlock,
    PoolError,
    SegmentGone,
    StaleBlock,
    TransferAborted,
    TransferCancelled,
    TransferError,
    TransferTimeout,
    UnknownBlock,
    UnknownPeer,
    UnwrittenBlocks,
)
from memserve.transfer.messages import MAX_TEXT, Failure

_KINDS: dict[str, type[MemserveError]] = {
    kind.__name__: kind
    for kind in (
        DoubleFree,
        ForeignBlock,
        InvalidTokens,
        LayoutMismatch,
        LengthMismatch,
        NotOwned,
        PeerLost,
        PinnedBlock,
        PoolError,
        SegmentGone,
        StaleBlock,
        TransferAborted,
        TransferCancelled,
        TransferError,
        TransferTimeout,
        UnknownBlock,
        PeerRefused,
        UnknownPeer,
        UnwrittenBlocks,
    )
}


def to_failure(error: MemserveError) -> Failure:
    if isinstance(error, OutOfBlocks):
        numbers = (error.asked, error.free, error.evictable, error.total)
        return Failure(OutOfBlocks.__name__, error.medium, numbers)
    return Failure(type(error).__name__, _sendable(str(error)))


def _sendable(text: str) -> str:
    """What UTF-8 has no bytes for (half of a pair that a caller sent) is replaced."""
    return text[:MAX_TEXT].encode(errors="replace").decode()


def to_error(failure: Failure, peer: str) -> MemserveError:
    """The error to raise here; it says that it comes from `peer`."""
    if failure.kind == OutOfBlocks.__name__ and len(failure.numbers) == 4:
        return OutOfBlocks(f"{failure.message} (of {peer!r})", *failure.numbers)
    return _KINDS.get(failure.kind, TransferError)(f"peer {peer!r}: {failure.message}")

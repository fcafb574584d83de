"""The messages of one transfer, in msgpack, and errors as they travel; `session` has the protocol.

Block references travel as *wire_refs*: little-endian int64 without the owner, which follows from
the lives that the envelope names. Tokens travel in the format of `memserve.tokens`.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta

from memserve import errors
from memserve.errors import MemserveError, OutOfBlocks, PoolError, TransferError
from memserve.transfer.base import Natural
from memserve.types import (
    GENERATION_BITS,
    INDEX_BITS,
    MAX_BLOCKS,
    MEDIUM_BITS,
    Medium,
    RefArray,
)

WIRE_REF_BYTES = 8
# Characters of an error's text, and of a namespace (a hash, or a short name with a hash).
MAX_TEXT = 1024

_WORD = np.dtype("<i8")
_OWNER_SHIFT = GENERATION_BITS + INDEX_BITS + MEDIUM_BITS
_WORD_MASK = (1 << _OWNER_SHIFT) - 1


class Drained(IntEnum):
    """Whether an aborting source's writes may still change the destination's blocks."""

    NO = 0  # they may
    YES = 1  # they cannot
    SEVERED = 2  # they cannot once the destination has forgotten the broken connection


class Failure(msgspec.Struct, frozen=True, array_like=True):
    """An error for the caller on the other side: the name of its class, and its text."""

    kind: Annotated[str, Meta(max_length=64)]
    message: Annotated[str, Meta(max_length=MAX_TEXT)]
    numbers: Annotated[tuple[Natural, ...], Meta(max_length=4)] = ()


class _Message(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A message about transfer `number`, which is unique within the source's life."""

    number: Natural


class Prepare(_Message, frozen=True, tag=1):
    """S to D: allocate `blocks` blocks of `medium`, which S will write.

    `tokens`: the tokens of the blocks, if D shall insert them; D then allocates only blocks that
    its index lacks. `target`: wire_refs of D's blocks to write; None: D allocates them.
    """

    blocks: Annotated[int, Meta(ge=0, le=MAX_BLOCKS)]
    medium: Medium
    namespace: Annotated[str, Meta(max_length=MAX_TEXT)] = ""
    tokens: bytes | None = None
    target: bytes | None = None


class Prepared(_Message, frozen=True, tag=2):
    """D to S: write the transfer's blocks from `have` on to `wire_refs`. `attempt` identifies this
    answer; a late copy of Prepare, taken for another transfer, gets another attempt."""

    attempt: Natural
    have: Natural
    wire_refs: bytes


class AlreadyHave(_Message, frozen=True, tag=3):
    """D to S: D's index has all blocks, in `wire_refs`. Ends the transfer."""

    wire_refs: bytes


class Refused(_Message, frozen=True, tag=4):
    """D to S: D allocated nothing. Ends the transfer."""

    failure: Failure


class Commit(_Message, frozen=True, tag=5):
    """S to D: all blocks are written; publish them."""

    attempt: Natural


class Committed(_Message, frozen=True, tag=6):
    """D to S: all blocks are published; `wire_refs` names them in order. Ends the transfer."""

    attempt: Natural
    wire_refs: bytes


class Abort(_Message, frozen=True, tag=7):
    """S to D: no Commit will follow. `attempt` 0: any attempt; S has accepted none.

    `revoke`: if D has received a Commit, D takes back the blocks that it granted to S."""

    attempt: Natural
    drained: Drained
    revoke: bool = False


class Aborted(_Message, frozen=True, tag=8):
    """D to S: D has freed the attempt's blocks. `failure`: the reason, if D refused the Commit.
    Ends the transfer."""

    attempt: Natural
    failure: Failure | None = None


class Query(_Message, frozen=True, tag=9):
    """D to S: is S still writing? `stop`: D has given up; S shall stop, and report when its
    writes have drained."""

    attempt: Natural
    stop: bool


class Keep(_Message, frozen=True, tag=10):
    """S to D: S still works on this attempt."""

    attempt: Natural


SessionMessage = (
    Prepare | Prepared | AlreadyHave | Refused | Commit | Committed | Abort | Aborted | Query | Keep
)


def is_from_source(message: SessionMessage) -> bool:
    """Return whether S sends `message`, so that D must handle it."""
    return isinstance(message, Prepare | Commit | Abort | Keep)


def to_wire_refs(refs: RefArray) -> bytes:
    """Return references [n] without their owner, 8 bytes each."""
    return (refs & _WORD_MASK).astype(_WORD, copy=False).tobytes()


def from_wire_refs(wire_refs: bytes, owner: int) -> RefArray:
    """Return references [n] of the interned `owner`. Raises ValueError for malformed ones."""
    local = np.frombuffer(wire_refs, dtype=_WORD).astype(np.int64)
    if (local >> _OWNER_SHIFT).any():  # also catches negative ones
        raise ValueError("block wire_refs out of range")
    local |= owner << _OWNER_SHIFT
    return local


# Errors that a peer may name: those of pools and transfers whose only argument is a text.
_KINDS: dict[str, type[MemserveError]] = {
    name: kind
    for name, kind in vars(errors).items()
    if isinstance(kind, type)
    and issubclass(kind, PoolError | TransferError)
    and kind is not OutOfBlocks
}


def to_failure(error: MemserveError) -> Failure:
    """Return the wire form of an error: the name of its class, and its text or numbers."""
    if isinstance(error, OutOfBlocks):
        numbers = (error.asked, error.free, error.evictable, error.total)
        return Failure(OutOfBlocks.__name__, error.medium, numbers)
    return Failure(type(error).__name__, _sendable(str(error)))


def _sendable(text: str) -> str:
    """Return up to MAX_TEXT characters; those without UTF-8 (lone surrogates) become `?`."""
    return text[:MAX_TEXT].encode(errors="replace").decode()


def to_error(failure: Failure, peer: str) -> MemserveError:
    """Return the error to raise here. Its text names `peer`; an unknown kind is a TransferError."""
    if failure.kind == OutOfBlocks.__name__ and len(failure.numbers) == 4:
        return OutOfBlocks(f"{failure.message} (of {peer!r})", *failure.numbers)
    return _KINDS.get(failure.kind, TransferError)(f"peer {peer!r}: {failure.message}")

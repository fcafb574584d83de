"""What pools say to each other about transfers, as msgpack.

Block references travel as *wire_refs*: little-endian int64 without the owner, whose instance and
epoch the envelope names once. Tokens travel as `memserve.tokens` has them.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta

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
# Characters of an error's text, and of a namespace: a person reads the one, and the other is a
# hash or a short name with one.
MAX_TEXT = 1024

_WORD = np.dtype("<i8")
_OWNER_SHIFT = GENERATION_BITS + INDEX_BITS + MEDIUM_BITS
_WORD_MASK = (1 << _OWNER_SHIFT) - 1


class Drained(IntEnum):
    """What an aborting source knows about its writes."""

    NO = 0  # some may still land
    YES = 1  # none will
    SEVERED = 2  # none will once the destination has forgotten the broken connection


class Failure(msgspec.Struct, frozen=True, array_like=True):
    """An error on its way to the caller: the name of its class, and what it says."""

    kind: Annotated[str, Meta(max_length=64)]
    message: Annotated[str, Meta(max_length=MAX_TEXT)]
    numbers: Annotated[tuple[Natural, ...], Meta(max_length=4)] = ()


class _Message(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Something about transfer `number`, which its source counts within its own life."""

    number: Natural


class Prepare(_Message, frozen=True, tag=1):
    """S to D: have `blocks` blocks ready to be written.

    `tokens`: what they hold, if they are to be inserted; D then allocates only what its index
    lacks. `target`: wire_refs of blocks that somebody at D allocated for this; otherwise D does.
    """

    blocks: Annotated[int, Meta(ge=0, le=MAX_BLOCKS)]
    medium: Medium
    namespace: Annotated[str, Meta(max_length=MAX_TEXT)] = ""
    tokens: bytes | None = None
    target: bytes | None = None


class Prepared(_Message, frozen=True, tag=2):
    """D to S: write blocks `have`.. to `wire_refs`. `attempt` names this answer: it is
    another one if a late copy of Prepare is taken for a new transfer."""

    attempt: Natural
    have: Natural
    wire_refs: bytes


class AlreadyHave(_Message, frozen=True, tag=3):
    """D to S: all of it is cached here, in `wire_refs`. The end."""

    wire_refs: bytes


class Refused(_Message, frozen=True, tag=4):
    """D to S: nothing was allocated. The end."""

    failure: Failure


class Commit(_Message, frozen=True, tag=5):
    """S to D: all is written."""

    attempt: Natural


class Committed(_Message, frozen=True, tag=6):
    """D to S: all blocks of the transfer, first to last, are whole and in `wire_refs`. The end."""

    attempt: Natural
    wire_refs: bytes


class Abort(_Message, frozen=True, tag=7):
    """S to D: no commit will come. `attempt` 0: of any, S has accepted none.

    `revoke`: if a commit came all the same, take back what it gave to S."""

    attempt: Natural
    drained: Drained
    revoke: bool = False


class Aborted(_Message, frozen=True, tag=8):
    """D to S: nothing of it is left here. `failure`: why, if D gave up first. The end."""

    attempt: Natural
    failure: Failure | None = None


class Query(_Message, frozen=True, tag=9):
    """D to S: are you still at it? `stop`: I have given up; stop and say when it is drained."""

    attempt: Natural
    stop: bool


class Keep(_Message, frozen=True, tag=10):
    """S to D: I am still at it."""

    attempt: Natural


SessionMessage = (
    Prepare | Prepared | AlreadyHave | Refused | Commit | Committed | Abort | Aborted | Query | Keep
)


def is_from_source(message: SessionMessage) -> bool:
    """Whether it is for the destination."""
    return isinstance(message, Prepare | Commit | Abort | Keep)


def to_wire_refs(refs: RefArray) -> bytes:
    """References [n] without their owner."""
    return (refs & _WORD_MASK).astype(_WORD, copy=False).tobytes()


def from_wire_refs(wire_refs: bytes, owner: int) -> RefArray:
    """References [n] of the interned `owner`. Raises ValueError if `wire_refs` are none."""
    local = np.frombuffer(wire_refs, dtype=_WORD).astype(np.int64)
    if (local >> _OWNER_SHIFT).any():  # negative ones, too
        raise ValueError("block wire_refs out of range")
    local |= owner << _OWNER_SHIFT
    return local

"""Identifiers, and references to KV blocks packed into numpy arrays.

A block reference is one int64: owner, medium, index and generation. A list of blocks is an
int64 array, so that a 4096-token prompt costs one array and no object per block. An *owner*
is one life of one instance (id and epoch). Its number in a reference is valid in this process
only; messages carry the id and the epoch instead.
"""

from __future__ import annotations

import secrets
import threading
from collections import OrderedDict
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import NamedTuple, NewType

import numpy as np
from numpy.typing import NDArray

InstanceId = NewType("InstanceId", str)
RequestId = NewType("RequestId", str)
Epoch = NewType("Epoch", int)
Namespace = NewType("Namespace", str)
SchedulerId = NewType("SchedulerId", str)  # of one life of a scheduler: another after a restart

SHARED = Namespace("")  # the default namespace

TokenArray = NDArray[np.int32]
RefArray = NDArray[np.int64]
IndexArray = NDArray[np.int64]


EPOCH_BITS = 63  # the non-negative values of an int64 in a message


def new_epoch() -> Epoch:
    """Return a random epoch, never 0; two lives get equal ones with negligible probability. Epochs
    are no times: the clocks of two hosts disagree, and clocks are set back."""
    return Epoch(secrets.randbits(EPOCH_BITS) or 1)


class Medium(IntEnum):
    """The kind of memory that holds a block."""

    HBM = 0  # the engine's device memory; host memory where the engine runs on a CPU
    DRAM = 1


class Role(StrEnum):
    """The part of a request that an instance computes."""

    PREFILL = "prefill"
    DECODE = "decode"
    COLOCATED = "colocated"


# Bits of a packed reference, from low to high: 63 in all, so that a reference is never negative.
GENERATION_BITS = 24
INDEX_BITS = 24
MEDIUM_BITS = 2
OWNER_BITS = 13

MAX_GENERATION = (1 << GENERATION_BITS) - 1
MAX_BLOCKS = 1 << INDEX_BITS  # per medium and instance
MAX_OWNERS = 1 << OWNER_BITS  # instance lives that one process can know

_INDEX_SHIFT = GENERATION_BITS
_MEDIUM_SHIFT = _INDEX_SHIFT + INDEX_BITS
_OWNER_SHIFT = _MEDIUM_SHIFT + MEDIUM_BITS


# Arrays for hot paths: numpy takes as long to convert a Python int as to shift 256 references.
_INDEX_SHIFT_ARRAY = np.array(_INDEX_SHIFT)
_INDEX_MASK_ARRAY = np.array(MAX_BLOCKS - 1)


class Owner(NamedTuple):
    """One life of one instance."""

    instance: InstanceId
    epoch: Epoch


_owners: list[Owner] = []
_owner_numbers: dict[Owner, int] = {}
# Ended lives, in the order in which they ended. Their numbers are reused when all MAX_OWNERS are
# taken, thousands of lives later. A reference kept for so long then names another life's block.
_retired: OrderedDict[Owner, None] = OrderedDict()
_owner_lock = threading.Lock()


def intern_owner(instance: InstanceId, epoch: Epoch) -> int:
    """Return the number of this instance life in references of this process.

    Raises OverflowError if `MAX_OWNERS` other lives are not retired.
    """
    owner = Owner(instance, epoch)
    with _owner_lock:
        number = _owner_numbers.get(owner)
        if number is None:
            number = _new_number(owner)
        else:
            _retired.pop(owner, None)
        return number


def retire_owner(owner: Owner) -> None:
    """Mark a life as ended. Its number is reused only when none is left; see `_retired`."""
    with _owner_lock:
        if owner in _owner_numbers:
            _retired[owner] = None


def _new_number(owner: Owner) -> int:
    if len(_owners) < MAX_OWNERS:
        number = len(_owners)
        _owners.append(owner)
    elif _retired:
        number = _owner_numbers.pop(_retired.popitem(last=False)[0])
        _owners[number] = owner
    else:
        raise OverflowError(f"{MAX_OWNERS} instance lives are known to this process already")
    _owner_numbers[owner] = number
    return number


def owner_of(number: int) -> Owner:
    """Return the instance life of an interned number. Raises IndexError if there is none."""
    return _owners[number]


@dataclass(frozen=True, slots=True)
class BlockRef:
    """One unpacked reference, for error messages and tests; too slow for hot paths."""

    instance: InstanceId
    epoch: Epoch
    medium: Medium
    index: int
    generation: int


def ref_owner(refs: RefArray) -> IndexArray:
    return refs >> _OWNER_SHIFT


def ref_medium(refs: RefArray) -> IndexArray:
    return (refs >> _MEDIUM_SHIFT) & ((1 << MEDIUM_BITS) - 1)


def ref_index(refs: RefArray) -> IndexArray:
    index: IndexArray = refs >> _INDEX_SHIFT_ARRAY
    index &= _INDEX_MASK_ARRAY
    return index


def ref_generation(refs: RefArray) -> IndexArray:
    return refs & MAX_GENERATION


def unpack_ref(ref: int) -> BlockRef:
    """Return the fields of one packed reference."""
    owner = owner_of(int(ref) >> _OWNER_SHIFT)
    one = np.array([ref], dtype=np.int64)
    return BlockRef(
        owner.instance,
        owner.epoch,
        Medium(int(ref_medium(one)[0])),
        int(ref_index(one)[0]),
        int(ref_generation(one)[0]),
    )

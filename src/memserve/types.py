"""Identifiers, and references to KV blocks packed into numpy arrays.

A block reference is one int64: owner, medium, index and generation. A list of blocks is an
int64 array of them, so that a 4096-token prompt costs one array and no object per block.
An *owner* is one life of one instance (id and epoch), interned in this process; on a wire it
travels as id and epoch beside the rest.
"""

from __future__ import annotations

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

SHARED = Namespace("")  # the namespace of requests that ask for none

TokenArray = NDArray[np.int32]
RefArray = NDArray[np.int64]
IndexArray = NDArray[np.int64]


class Medium(IntEnum):
    """Where a block lives."""

    HBM = 0  # the engine's device memory; host memory where the engine runs on a CPU
    DRAM = 1


class Role(StrEnum):
    """What an instance does for a request."""

    PREFILL = "prefill"
    DECODE = "decode"
    COLOCATED = "colocated"


# Bits of a packed reference, low to high; 63 in all, so that it is never negative.
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


# On hot paths: converting a Python number takes numpy as long as shifting 256 references.
_INDEX_SHIFT_ARRAY = np.array(_INDEX_SHIFT)
_INDEX_MASK_ARRAY = np.array(MAX_BLOCKS - 1)


class Owner(NamedTuple):
    """One life of one instance."""

    instance: InstanceId
    epoch: Epoch


_owners: list[Owner] = []
_owner_numbers: dict[Owner, int] = {}
# Lives that are over, the one that ended first in front. Their numbers are given away when there
# are no others: after some thousand further lives. A reference that somebody has kept for so long
# then names another life; to free it there fails, since it was not given to whoever asks.
_retired: OrderedDict[Owner, None] = OrderedDict()
_owner_lock = threading.Lock()


def intern_owner(instance: InstanceId, epoch: Epoch) -> int:
    """The number that stands for this instance life in references of this process.

    Raises OverflowError while `MAX_OWNERS` others are alive.
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
    """This life is over. Its references stay what they are for a long while; see `_retired`."""
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
    """The instance life behind an interned number. IndexError if there is none."""
    return _owners[number]


@dataclass(frozen=True, slots=True)
class BlockRef:
    """One reference, unpacked: for messages and tests, never on a hot path."""

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
    """The fields of one packed reference."""
    owner = owner_of(int(ref) >> _OWNER_SHIFT)
    one = np.array([ref], dtype=np.int64)
    return BlockRef(
        owner.instance,
        owner.epoch,
        Medium(int(ref_medium(one)[0])),
        int(ref_index(one)[0]),
        int(ref_generation(one)[0]),
    )

"""What `Membership` tells those who follow it: the scheduler, the feeds of events."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from memserve.api.status import InstanceState
from memserve.types import Epoch, InstanceId, Role


class Change(StrEnum):
    """Of one life of an instance: `JOINED`, then `STATE` and `ROLE` in any number, then one of
    `LEFT` and `DIED`. A life that was given up too early and answers again joins again."""

    JOINED = "joined"  # it has said who it is; it may still be starting
    STATE = "state"  # starting, ready, draining
    ROLE = "role"
    LEFT = "left"  # in order, or removed: what it runs may still come to an end
    DIED = "died"  # what it runs will not be answered


@dataclass(frozen=True, slots=True)
class MemberChange:
    """One change, and the member as it is after it (for `LEFT` and `DIED`: as it was)."""

    change: Change
    id: InstanceId
    epoch: Epoch  # which of its lives
    address: str
    role: Role
    state: InstanceState


# Called on the event loop after the change, in order. It is quick, raises nothing, and may ask
# the membership, but not change it.
Observer = Callable[[MemberChange], None]

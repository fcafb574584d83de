"""Changes that `Membership` publishes to its observers, such as the scheduler and the KV feed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from memserve.api.status import InstanceState
from memserve.types import Epoch, InstanceId, Role


class Change(StrEnum):
    """Changes of one life of an instance: `JOINED`, then any number of `STATE` and `ROLE`, then
    `LEFT` or `DIED`. A life that counted as dead and answers again begins with `JOINED` again."""

    JOINED = "joined"  # it has answered with its id; it may still be starting
    STATE = "state"  # starting, ready, draining
    ROLE = "role"
    LEFT = "left"  # in order, or removed: its running requests may still finish
    DIED = "died"  # its running requests will not be answered


@dataclass(frozen=True, slots=True)
class MemberChange:
    """One change, with the member's values after it (for `LEFT` and `DIED`: before it)."""

    change: Change
    id: InstanceId
    epoch: Epoch  # of its life
    address: str
    role: Role
    state: InstanceState


# Called on the event loop after each change, in order. It must return soon and raise nothing; it
# may read the membership, but not change it.
Observer = Callable[[MemberChange], None]

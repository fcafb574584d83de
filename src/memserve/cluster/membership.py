"""Who belongs to the cluster, and in which state. No I/O: a poller tells what it has seen."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import msgspec

from memserve.api.status import (
    InstanceInfo,
    InstanceState,
    InstanceStats,
    Limits,
    MediumTotals,
)
from memserve.types import Epoch, InstanceId, Role

log = logging.getLogger(__name__)

MAX_MISSES = 3  # polls without an answer before a member counts as dead


class Member:
    """One instance as the cluster sees it. Changed by `Membership` alone."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.id = InstanceId(address)  # until it has said its own
        self.role = Role.COLOCATED
        self.state = InstanceState.STARTING
        self.epoch: Epoch | None = None  # which of its lives; None: not met yet
        self.pid: int | None = None
        self.limits: Limits | None = None
        self.stats: InstanceStats | None = None
        self.misses = 0  # in a row


class MemberView(msgspec.Struct, frozen=True):
    """A member in `GET /cluster`. Empty media and no pid: it has not answered yet."""

    id: InstanceId
    role: Role
    state: InstanceState
    address: str
    pid: int | None
    hbm: MediumTotals | dict[str, int]
    dram: MediumTotals | dict[str, int]


class ClusterView(msgspec.Struct, frozen=True):
    """`GET /cluster`."""

    epoch: Epoch
    instances: list[MemberView]


class Membership:
    """The members, by address. `epoch` grows with every change of who is in it or of a state."""

    def __init__(self, on_death: Callable[[Member], None]) -> None:
        """`on_death` is called when a member's running requests can no longer be answered."""
        self.epoch = Epoch(0)
        self._members: dict[str, Member] = {}
        self._on_death = on_death

    @property
    def members(self) -> Sequence[Member]:
        return list(self._members.values())

    def ready(self) -> list[Member]:
        """Members that take requests; without the doubtful ones, as long as there are others."""
        ready = [m for m in self._members.values() if m.state is InstanceState.READY]
        return [m for m in ready if not m.misses] or ready

    def join(self, address: str) -> Member:
        """The member at this address, added if it is new."""
        member = self._members.get(address)
        if member is None:
            member = self._members[address] = Member(address)
            self._changed()
        return member

    def answered(self, member: Member, info: InstanceInfo, stats: InstanceStats | None) -> None:
        """A poll's answer."""
        if not self._is_here(member):
            return
        self._replace_former(member, info)
        member.misses = 0
        member.stats = stats
        member.limits = info.limits
        member.pid = info.pid
        if member.epoch not in (None, info.epoch):
            log.info("%s has been restarted", member.id)
            self._on_death(member)
        before = (member.id, member.epoch, member.state, member.role)
        now = (info.id, info.epoch, info.state, info.role)
        if before != now:
            member.id, member.epoch, member.state, member.role = now
            log.info("%s is %s", member.id, member.state)
            self._changed()

    def missed(self, member: Member) -> None:
        """A poll or a request without an answer. A member that was never met is still starting."""
        if not self._is_here(member):
            return
        member.misses += 1
        if member.epoch is None or member.state is InstanceState.DEAD:
            return
        if member.misses >= MAX_MISSES:
            log.warning("%s is dead: no answer %d times", member.id, member.misses)
            member.state = InstanceState.DEAD
            self._on_death(member)
            self._changed()

    def _is_here(self, member: Member) -> bool:
        """False for a member that was replaced while the answer was on its way."""
        return self._members.get(member.address) is member

    def _replace_former(self, member: Member, info: InstanceInfo) -> None:
        """An instance that came back at another address replaces its former life."""
        for other in self.members:
            former = other is not member and other.id == info.id
            if former and other.epoch is not None and other.epoch < info.epoch:
                log.info("%s has moved from %s to %s", info.id, other.address, member.address)
                del self._members[other.address]
                self._on_death(other)

    def view(self) -> ClusterView:
        return ClusterView(self.epoch, [_view(member) for member in self._members.values()])

    def _changed(self) -> None:
        self.epoch = Epoch(self.epoch + 1)


def _view(member: Member) -> MemberView:
    pool = None if member.stats is None else member.stats.pool
    return MemberView(
        id=member.id,
        role=member.role,
        state=member.state,
        address=member.address,
        pid=member.pid,
        hbm={} if pool is None else pool.hbm,
        dram={} if pool is None else pool.dram,
    )

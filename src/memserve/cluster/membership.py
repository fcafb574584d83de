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
    MemberKind,
)
from memserve.clock import Clock, MonotonicClock
from memserve.cluster.changes import Change, MemberChange, Observer
from memserve.errors import ClusterError
from memserve.types import Epoch, InstanceId, Role

log = logging.getLogger(__name__)

MAX_MISSES = 3  # polls without an answer before a member counts as dead
# What `join` remembers: many times the instances that one gateway has ever had.
MAX_MEMBERS = 4096
# How long one that is dead, or was never met, is shown and asked: longer than a restart takes,
# a large model's load included. It is no less welcome afterwards.
FORGET_SECONDS = 600.0


class Member:
    """One instance as the cluster sees it. Changed by `Membership` alone."""

    def __init__(self, address: str, now: float) -> None:
        self.address = address
        self.id = InstanceId(address)  # until it has said its own
        self.role = Role.COLOCATED
        self.kind = MemberKind.MEMSERVE
        self.pool = False
        self.kv: str | None = None  # see `InstanceInfo`
        self.state = InstanceState.STARTING
        self.epoch: Epoch | None = None  # which of its lives; None: not met yet
        self.pid: int | None = None
        self.limits: Limits | None = None
        self.stats: InstanceStats | None = None
        self.misses = 0  # in a row
        self.lasting = False  # named by configuration: never forgotten
        self.heard = now  # the last sign of life
        self.joined = False  # this life is known to observers
        self.conflict: str | None = None  # why it is not believed who it says it is


class MemberView(msgspec.Struct, frozen=True):
    """A member in `GET /cluster`. Empty media and no pid: it has not answered yet."""

    id: InstanceId
    role: Role
    kind: MemberKind
    pool: bool
    state: InstanceState
    address: str
    pid: int | None
    hbm: MediumTotals | dict[str, int]
    dram: MediumTotals | dict[str, int]
    conflict: str | msgspec.UnsetType = msgspec.UNSET  # why it is not let in


class DegradedPair(msgspec.Struct, frozen=True, omit_defaults=True):
    """A prefill and a decode instance between which no KV moves, though it should."""

    prefill: InstanceId
    decode: InstanceId
    why: str  # in general; anybody may know
    detail: str = ""  # with addresses, if something is known; for operators


class ClusterView(msgspec.Struct, frozen=True):
    """`GET /cluster`."""

    epoch: Epoch
    instances: list[MemberView]
    degraded: tuple[DegradedPair, ...] | msgspec.UnsetType = msgspec.UNSET  # if there are any


class Membership:
    """The members, by address. `epoch` grows with every change of who is in it or of a state."""

    def __init__(
        self,
        on_death: Callable[[Member], None] | None = None,
        clock: Clock | None = None,
    ) -> None:
        """`on_death` is called when a member's running requests can no longer be answered."""
        self.epoch = Epoch(0)
        self._members: dict[str, Member] = {}
        self._on_death = on_death
        self._clock = clock or MonotonicClock()
        self._observers: list[Observer] = []
        self._ask: Callable[[Member], None] | None = None

    # --- asking ---------------------------------------------------------------------------

    @property
    def members(self) -> Sequence[Member]:
        return list(self._members.values())

    def ready(self, kind: MemberKind | None = None) -> list[Member]:
        """Members that take requests, of one kind or all; without the doubtful ones, as long as
        there are others."""
        ready = [m for m in self._members.values() if m.state is InstanceState.READY]
        if kind is not None:
            ready = [m for m in ready if m.kind is kind]
        return [m for m in ready if not m.misses] or ready

    def has(self, kind: MemberKind) -> bool:
        """Whether there is one of this kind, whatever its state: it may be restarted."""
        return any(m.kind is kind for m in self._members.values())

    def expects(self) -> bool:
        """Whether somebody may take requests soon who does not now: nobody does; or a member
        starts, is in doubt, or is dead, and may be restarted."""
        coming = (InstanceState.STARTING, InstanceState.DEAD)
        members = [m for m in self._members.values() if m.conflict is None]
        return not self.ready() or any(m.misses or m.state in coming for m in members)

    def find(self, instance: InstanceId) -> Member | None:
        """The member of this id; of several (dead ones elsewhere) the one that is there."""
        named = [m for m in self._members.values() if m.id == instance]
        alive = [m for m in named if m.state is not InstanceState.DEAD]
        return next(iter(alive or named), None)

    def at(self, address: str) -> Member | None:
        """The member at this address."""
        return self._members.get(address)

    def view(self) -> ClusterView:
        return ClusterView(self.epoch, [view_of(member) for member in self._members.values()])

    # --- following ------------------------------------------------------------------------

    def on_change(self, observer: Observer) -> Callable[[], None]:
        """Tell `observer` of every change; first, as joined, of those that are here already.

        Returns what ends it. See `Change` for what comes in which order.
        """
        for member in self.members:
            if member.joined:
                observer(_change(Change.JOINED, member))
        self._observers.append(observer)
        return lambda: self._observers.remove(observer)

    def on_question(self, ask: Callable[[Member], None]) -> None:
        """Have `ask` called with each member that should be polled now, not at its turn."""
        self._ask = ask

    # --- what happens ---------------------------------------------------------------------

    def join(self, address: str, *, lasting: bool = True) -> Member:
        """The member at this address, added if it is new, and asked how it is.

        One that is not `lasting` is forgotten `FORGET_SECONDS` after its last sign of life, of
        which this is one. Raises ClusterError where there are too many already.
        """
        member = self._members.get(address)
        if member is None:
            self._make_room()
            member = self._members[address] = Member(address, self._clock.now())
            self._changed()
        member.lasting |= lasting
        member.heard = self._clock.now()
        self._question(member)
        return member

    def leave(self, address: str, epoch: Epoch | None = None) -> bool:
        """Remove a member: it ends in order, or somebody wants it out. With `epoch`, only that
        life of it. Whether it was there."""
        member = self._members.get(address)
        if member is None or (epoch is not None and member.epoch not in (None, epoch)):
            return False
        log.info("%s has left", member.id)
        self._remove(member, Change.LEFT)
        return True

    def answered(self, member: Member, info: InstanceInfo, stats: InstanceStats | None) -> None:
        """A poll's answer. An id is its holder's as long as that lives: who else says it is
        known by its address alone, and gets no requests, until the holder is dead or has left."""
        if not self._is_here(member):
            return
        if (holder := self.holder(info.id, member.address)) is not None:
            self._refuse(member, f"'{info.id}' is the instance at {holder.address}")
            return
        member.conflict = None
        self._replace_former(member, info)
        member.misses = 0
        member.heard = self._clock.now()
        member.stats = stats
        member.limits = info.limits
        member.kind, member.pool, member.kv = info.kind, info.pool, info.kv
        member.pid = info.pid
        if (member.id, member.epoch) != (info.id, info.epoch) and member.joined:
            log.info("%s has been restarted", member.id)
            self._over(member, Change.DIED)
        before = (member.id, member.epoch, member.state, member.role)
        now = (info.id, info.epoch, info.state, info.role)
        if before != now:
            member.id, member.epoch, member.state, member.role = now
            log.info("%s is %s (%s)", member.id, member.state, member.role)
            self._changed()
        self._tell_news(member, before[2], before[3])

    def missed(self, member: Member) -> None:
        """A poll without an answer. A member that was never met is still starting."""
        if not self._is_here(member):
            return
        member.misses += 1
        if member.misses >= MAX_MISSES:
            self._died(member, f"no answer {member.misses} times")

    def refused(self, member: Member) -> None:
        """Nobody listens at its address any more: its process has gone, for certain."""
        if not self._is_here(member):
            return
        member.misses += 1
        if member.epoch is None and not member.lasting:  # gone before anybody met it
            self._remove(member, Change.LEFT)
        else:
            self._died(member, "nobody listens there")

    def doubt(self, member: Member) -> None:
        """A request to it failed: others are preferred until a poll, at once, says how it is."""
        if self._is_here(member) and member.state is not InstanceState.DEAD:
            member.misses = max(member.misses, 1)
            self._question(member)

    def forget(self) -> None:
        """Drop members that are long gone. Called from time to time."""
        until = self._clock.now() - FORGET_SECONDS
        for member in self.members:
            gone = member.epoch is None or member.state is InstanceState.DEAD
            if gone and not member.lasting and member.heard < until:
                log.info("%s is forgotten", member.id)
                self._remove(member, Change.LEFT)

    def holder(self, instance: InstanceId, address: str) -> Member | None:
        """The member that has this id and lives, if that is not who is at this address."""
        for other in self._members.values():
            alive = other.epoch is not None and other.state is not InstanceState.DEAD
            if other.id == instance and alive and other.address != address:
                return other
        return None

    def claim(self, instance: InstanceId, epoch: Epoch, address: str) -> Member | None:
        """Who holds the id that a life at this address says is its own, if that is another
        life: it is asked at once whether it is still there. None: the id is free, or its own."""
        holder = self.holder(instance, address)
        if holder is None or holder.epoch == epoch:
            return None
        self._question(holder)
        return holder

    # --- inside ---------------------------------------------------------------------------

    def _is_here(self, member: Member) -> bool:
        """False for a member that was replaced while the answer was on its way."""
        return self._members.get(member.address) is member

    def _question(self, member: Member) -> None:
        if self._ask is not None:
            self._ask(member)

    def _replace_former(self, member: Member, info: InstanceInfo) -> None:
        """An instance that came back at another address replaces its dead life."""
        for other in self.members:
            if other is not member and other.id == info.id and other.epoch is not None:
                log.info("%s has moved from %s to %s", info.id, other.address, member.address)
                if other.lasting:
                    self._forget_life(other)
                else:
                    self._remove(other, Change.DIED)

    def _refuse(self, member: Member, why: str) -> None:
        """It goes by somebody else's name."""
        if member.conflict != why:
            log.warning("%s is not let in: %s", member.address, why)
            member.conflict = why
            self._changed()
        member.misses = 0
        self._forget_life(member)

    def _forget_life(self, member: Member) -> None:
        """From now on nobody has been met there."""
        if member.epoch is None:
            return
        self._over(member, Change.DIED)
        member.id, member.epoch, member.pid = InstanceId(member.address), None, None
        member.state, member.role = InstanceState.STARTING, Role.COLOCATED
        member.limits = member.stats = None
        self._changed()

    def _make_room(self) -> None:
        """For one more: in the place of whoever was never met, the oldest first."""
        if len(self._members) < MAX_MEMBERS:
            return
        unmet = [m for m in self._members.values() if m.epoch is None and not m.lasting]
        if not unmet:
            raise ClusterError(f"there are {MAX_MEMBERS} members already")
        self._remove(min(unmet, key=lambda member: member.heard), Change.LEFT)

    def _died(self, member: Member, why: str) -> None:
        if member.epoch is None or member.state is InstanceState.DEAD:
            return
        log.warning("%s is dead: %s", member.id, why)
        member.state = InstanceState.DEAD
        self._changed()
        self._over(member, Change.DIED)

    def _remove(self, member: Member, why: Change) -> None:
        del self._members[member.address]
        self._changed()
        self._over(member, why)

    def _tell_news(self, member: Member, state: InstanceState, role: Role) -> None:
        """Tell of an answer; `state` and `role` are those before it."""
        if member.state is InstanceState.DEAD:  # it says so itself: its engine has stopped
            self._over(member, Change.DIED)
        elif not member.joined:
            member.joined = True
            self._publish(Change.JOINED, member)
        else:
            if member.role is not role:
                self._publish(Change.ROLE, member)
            if member.state is not state:
                self._publish(Change.STATE, member)

    def _over(self, member: Member, change: Change) -> None:
        """The end of a life, once."""
        if not member.joined:
            return
        member.joined = False
        if change is Change.DIED and self._on_death is not None:
            self._on_death(member)
        self._publish(change, member)

    def _publish(self, change: Change, member: Member) -> None:
        told = _change(change, member)
        for observer in tuple(self._observers):
            observer(told)

    def _changed(self) -> None:
        self.epoch = Epoch(self.epoch + 1)


def _change(change: Change, member: Member) -> MemberChange:
    assert member.epoch is not None  # it has been met
    return MemberChange(change, member.id, member.epoch, member.address, member.role, member.state)


def view_of(member: Member) -> MemberView:
    pool = None if member.stats is None else member.stats.pool
    return MemberView(
        id=member.id,
        role=member.role,
        kind=member.kind,
        pool=member.pool,
        state=member.state,
        address=member.address,
        pid=member.pid,
        hbm={} if pool is None else pool.hbm,
        dram={} if pool is None else pool.dram,
        conflict=msgspec.UNSET if member.conflict is None else member.conflict,
    )

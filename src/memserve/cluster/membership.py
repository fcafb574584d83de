"""The members of a cluster, their states, and the changes that observers hear of. No I/O."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from memserve.api.status import InstanceInfo, InstanceState, InstanceStats, MemberKind
from memserve.clock import Clock, MonotonicClock
from memserve.cluster.member import ClusterView, Member, view_of
from memserve.errors import ClusterError
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


log = logging.getLogger(__name__)

MAX_MISSES = 3  # polls without an answer before a member counts as dead
# Limit of addresses from `join`: many times the instances of one gateway.
MAX_MEMBERS = 4096
# A dead member, or one that never answered, is listed and polled for this time: longer than a
# restart, including the load of a large model. It may join again afterwards.
FORGET_SECONDS = 600.0


class Membership:
    """The members, by address. `epoch` grows with every change of a member, its state or role."""

    def __init__(
        self,
        on_death: Callable[[Member], None] | None = None,
        clock: Clock | None = None,
    ) -> None:
        """`on_death` is called when a member's running requests can no longer be answered."""
        self.epoch = Epoch(0)
        self._members: dict[str, Member] = {}
        self._named: dict[InstanceId, list[Member]] = {}  # the same, by id
        # Answers of `ready` and `has` until a member changes: each request asks for them.
        self._ready: dict[MemberKind | None, list[Member]] = {}
        self._kinds: set[MemberKind] | None = None
        self._on_death = on_death
        self._clock = clock or MonotonicClock()
        self._observers: list[Observer] = []
        self._ask: Callable[[Member], None] | None = None

    # --- queries --------------------------------------------------------------------------

    @property
    def members(self) -> Sequence[Member]:
        return list(self._members.values())

    def ready(self, kind: MemberKind | None = None) -> Sequence[Member]:
        """Return the members in state READY, of one kind or all. Members with misses are left out
        if others are ready. The same object until a member changes."""
        found = self._ready.get(kind)
        if found is None:
            ready = [m for m in self._members.values() if m.state is InstanceState.READY]
            if kind is not None:
                ready = [m for m in ready if m.kind is kind]
            found = self._ready[kind] = [m for m in ready if not m.misses] or ready
        return found

    def has(self, kind: MemberKind) -> bool:
        """Return whether a member has this kind, in any state: a dead one may be restarted."""
        if self._kinds is None:
            self._kinds = {member.kind for member in self._members.values()}
        return kind in self._kinds

    def expects(self) -> bool:
        """Return whether the set of ready members may grow soon: no member is ready, or one is
        starting, has misses, or is dead and may be restarted."""
        coming = (InstanceState.STARTING, InstanceState.DEAD)
        members = [m for m in self._members.values() if m.conflict is None]
        return not self.ready() or any(m.misses or m.state in coming for m in members)

    def find(self, instance: InstanceId) -> Member | None:
        """Return the member with this id, or None. Of several, one that is not dead."""
        named = self._named.get(instance, ())
        alive = [m for m in named if m.state is not InstanceState.DEAD]
        return next(iter(alive or named), None)

    def is_well(self, member: Member, epoch: Epoch | None) -> bool:
        """Return whether a member is in this life, and has answered the last poll."""
        alive = member.state is not InstanceState.DEAD and member.epoch is not None
        return alive and member.epoch == epoch and not member.misses and member.conflict is None

    def at(self, address: str) -> Member | None:
        """Return the member at this address, or None."""
        return self._members.get(address)

    def view(self) -> ClusterView:
        return ClusterView(self.epoch, tuple(map(view_of, self._members.values())))

    # --- observers ------------------------------------------------------------------------

    def on_change(self, observer: Observer) -> Callable[[], None]:
        """Call `observer` with every change, and at once with `JOINED` for each present member.

        Returns a function that removes the observer. See `Change` for the order of changes.
        """
        for member in self.members:
            if member.joined:
                observer(_change(Change.JOINED, member))
        self._observers.append(observer)
        return lambda: self._observers.remove(observer)

    def on_question(self, ask: Callable[[Member], None]) -> None:
        """Have `ask` called with each member that should be polled before the next heartbeat."""
        self._ask = ask

    # --- events ---------------------------------------------------------------------------

    def join(self, address: str, *, lasting: bool = True) -> Member:
        """Return the member at this address, added if it is new, and have it polled at once.

        A member that is not `lasting` is forgotten when it is dead or has never answered, and
        FORGET_SECONDS have passed since its last answer or join. Raises ClusterError if there are
        MAX_MEMBERS.
        """
        member = self._members.get(address)
        if member is None:
            self._make_room()
            member = self._members[address] = Member(address, self._clock.now())
            self._named.setdefault(member.id, []).append(member)
            self._changed()
        member.lasting |= lasting
        member.heard = self._clock.now()
        self._question(member)
        return member

    def leave(self, address: str, epoch: Epoch | None = None) -> bool:
        """Remove a member that ends in order, or that an operator removes; with `epoch`, only in
        that life. Return whether it was removed."""
        member = self._members.get(address)
        if member is None or (epoch is not None and member.epoch not in (None, epoch)):
            return False
        log.info("%s has left", member.id)
        self._remove(member, Change.LEFT)
        return True

    def answered(self, member: Member, info: InstanceInfo, stats: InstanceStats | None) -> None:
        """Take a member's answer to a poll. Another member that says an id which a living one has
        is refused: it is known by its address, and gets no requests, until the holder of the id is
        dead or has left."""
        if not self._is_here(member):
            return
        if (holder := self.holder(info.id, member.address)) is not None:
            self._refuse(member, f"'{info.id}' is the instance at {holder.address}")
            return
        member.conflict = None
        self._replace_former(member, info)
        self._count_misses(member, 0)
        member.heard = self._clock.now()
        member.stats = stats
        member.limits = info.limits
        if member.kind is not info.kind:
            self._forget_answers()
        member.kind, member.pool, member.kv = info.kind, info.pool, info.kv
        member.pool_address = None if info.pool_peer is None else info.pool_peer.address
        member.pid = info.pid
        if (member.id, member.epoch) != (info.id, info.epoch) and member.joined:
            log.info("%s has been restarted", member.id)
            self._over(member, Change.DIED)
        before = (member.id, member.epoch, member.state, member.role)
        if before != (info.id, info.epoch, info.state, info.role):
            self._name(member, info.id)
            member.epoch, member.state, member.role = info.epoch, info.state, info.role
            log.info("%s is %s (%s)", member.id, member.state, member.role)
            self._changed()
        self._tell_news(member, before[2], before[3])

    def missed(self, member: Member) -> None:
        """Count a poll without an answer; MAX_MISSES in a row make a member dead, unless it has
        never answered."""
        if not self._is_here(member):
            return
        self._count_misses(member, member.misses + 1)
        if member.misses >= MAX_MISSES:
            self._died(member, f"no answer {member.misses} times")

    def refused(self, member: Member) -> None:
        """Take a refused connection: no process listens at the address, so the member is dead."""
        if not self._is_here(member):
            return
        self._count_misses(member, member.misses + 1)
        if member.epoch is None and not member.lasting:  # it ended before its first answer
            self._remove(member, Change.LEFT)
        else:
            self._died(member, "nobody listens there")

    def doubt(self, member: Member) -> None:
        """Take a failed request to a member: have it polled at once, and prefer others until it
        answers."""
        if self._is_here(member) and member.state is not InstanceState.DEAD:
            self._count_misses(member, max(member.misses, 1))
            self._question(member)

    def forget(self) -> None:
        """Remove members that are dead or never answered, FORGET_SECONDS after their last answer
        or join. The poller calls it at each heartbeat."""
        until = self._clock.now() - FORGET_SECONDS
        for member in self.members:
            gone = member.epoch is None or member.state is InstanceState.DEAD
            if gone and not member.lasting and member.heard < until:
                log.info("%s is forgotten", member.id)
                self._remove(member, Change.LEFT)

    def holder(self, instance: InstanceId, address: str) -> Member | None:
        """Return the living member with this id at another address, or None."""
        for other in self._named.get(instance, ()):
            alive = other.epoch is not None and other.state is not InstanceState.DEAD
            if alive and other.address != address:
                return other
        return None

    def claim(self, instance: InstanceId, epoch: Epoch, address: str) -> Member | None:
        """Return the holder of an id that an instance at `address` with `epoch` wants, and have
        the holder polled at once. None: the id is free, or its holder is the same life."""
        holder = self.holder(instance, address)
        if holder is None or holder.epoch == epoch:
            return None
        self._question(holder)
        return holder

    # --- inside ---------------------------------------------------------------------------

    def _is_here(self, member: Member) -> bool:
        """Return False for a member that was removed or replaced while the answer was in flight."""
        return self._members.get(member.address) is member

    def _name(self, member: Member, name: InstanceId) -> None:
        """Give a member another id."""
        self._unname(member)
        member.id = name
        self._named.setdefault(name, []).append(member)

    def _unname(self, member: Member) -> None:
        """Take a member out of the index of ids."""
        alike = self._named[member.id]
        alike.remove(member)
        if not alike:
            del self._named[member.id]

    def _count_misses(self, member: Member, misses: int) -> None:
        if bool(misses) is not bool(member.misses):
            self._forget_answers()
        member.misses = misses

    def _forget_answers(self) -> None:
        self._ready.clear()
        self._kinds = None

    def _question(self, member: Member) -> None:
        if self._ask is not None:
            self._ask(member)

    def _replace_former(self, member: Member, info: InstanceInfo) -> None:
        """Remove dead members with the id of an instance that came back at another address; a
        lasting one stays, as not met yet."""
        for other in tuple(self._named.get(info.id, ())):
            if other is not member and other.epoch is not None:
                log.info("%s has moved from %s to %s", info.id, other.address, member.address)
                if other.lasting:
                    self._forget_life(other)
                else:
                    self._remove(other, Change.DIED)

    def _refuse(self, member: Member, why: str) -> None:
        """Refuse a member whose id belongs to another one."""
        if member.conflict != why:
            log.warning("%s is not let in: %s", member.address, why)
            member.conflict = why
            self._changed()
        self._count_misses(member, 0)
        self._forget_life(member)

    def _forget_life(self, member: Member) -> None:
        """Reset a member to the state before its first answer."""
        if member.epoch is None:
            return
        self._over(member, Change.DIED)
        self._name(member, InstanceId(member.address))
        member.epoch = member.pid = None
        member.state, member.role = InstanceState.STARTING, Role.COLOCATED
        member.limits = member.stats = None
        self._changed()

    def _make_room(self) -> None:
        """Make room for one more member: if there are MAX_MEMBERS, remove the one without an answer
        whose join is oldest. Raises ClusterError if all have answered or are lasting."""
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
        self._unname(member)
        self._changed()
        self._over(member, why)

    def _tell_news(self, member: Member, state: InstanceState, role: Role) -> None:
        """Publish the changes of an answer; `state` and `role` are the values before it."""
        if member.state is InstanceState.DEAD:  # it answers that its engine has stopped
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
        """Publish the end of a life, once."""
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
        self._forget_answers()
        self.epoch = Epoch(self.epoch + 1)


def _change(change: Change, member: Member) -> MemberChange:
    assert member.epoch is not None  # it has answered
    return MemberChange(change, member.id, member.epoch, member.address, member.role, member.state)

"""`Scaling`: what a planner starts and ends of a backend's members, within its bound."""

from __future__ import annotations

from collections.abc import Sequence

from memserve.api.status import InstanceState
from memserve.cluster.backend import Group, Groups
from memserve.cluster.member import ClusterView
from memserve.errors import ClusterError
from memserve.types import Role


class Scaling:
    """Starts and ends members for one planner. `late` is to be asked at each of its looks."""

    def __init__(self, groups: Groups, most: int | None) -> None:
        """`most`: members, ready or not, up to which some are started; None: no limit."""
        self._groups = groups
        self._most = most
        self._new: set[str] = set()  # started here, and not ready yet
        # Started here, and gone before they were ready. They count as members until another one
        # gets ready: a backend that delivers none is not asked without end.
        self._given_up: set[str] = set()

    async def late(self, view: ClusterView) -> int:
        """Return how many of the backend's members are neither ready nor drained, whether the
        gateway knows them or not: they start, or have crashed."""
        names = _names(await self._groups.groups())
        ready = {str(one.id) for one in view.instances if one.state is InstanceState.READY}
        drained = {str(one.id) for one in view.instances if one.state is InstanceState.DRAINING}
        if self._new & ready:
            self._given_up.clear()
        self._new -= ready
        self._given_up |= self._new - names
        self._new &= names
        return len(names - ready - drained)

    async def scale(self, role: Role, more: int) -> int:
        """Start up to `more` members, or end some if it is negative; return how many were started
        or, negative, ended. Raises ClusterError if none may be started, or the backend cannot.

        The group is the one that was configured with the role, or else the largest: the next look
        changes the roles of members that are ready.
        """
        found = await self._groups.groups()
        if not found:
            raise ClusterError("the backend has no group of members to scale")
        before = _names(found)
        if more > 0 and self._most is not None:
            more = min(more, self._most - len(before) - len(self._given_up))
            if more <= 0:
                raise ClusterError(self._full(len(before)))
        one = max(found, key=lambda group: (group.role is role, len(group.members)))
        try:
            await self._groups.scale(one.name, len(one.members) + more)
        finally:  # some may have been started before one failed
            now = _names(await self._groups.groups())
            self._new = (self._new & now) | (now - before)
        return more

    def _full(self, there: int) -> str:
        gone = len(self._given_up)
        given_up = f", and {gone} that it started were given up" if gone else ""
        return (
            f"planner.max_members = {self._most}: the backend has {there} members, ready or "
            f"not{given_up}"
        )


def _names(groups: Sequence[Group]) -> set[str]:
    return {name for group in groups for name in group.members}

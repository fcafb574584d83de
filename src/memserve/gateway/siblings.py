"""Calls between the workers of one gateway, over their private addresses."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Mapping, Sequence

import msgspec

from memserve.api.control import LeaveRequest
from memserve.api.peer_client import PeerClient, PeerError, decoded
from memserve.api.status import InstanceState, JoinRequest
from memserve.clock import Clock, MonotonicClock
from memserve.cluster.member import ClusterView
from memserve.cluster.membership import MAX_MEMBERS

log = logging.getLogger(__name__)

MEMBERS_PATH = "/cluster/members"
# Timeout of a call. Workers share a machine: one that takes longer is ending, or restarting, and
# will then ask for the members itself. Less than an instance's JOIN_TIMEOUT.
_ASK_SECONDS = 1.0
# Limit on meeting the members before a restarted worker takes clients: it must not answer that no
# instance is ready while its siblings have some.
MEET_SECONDS = 5.0

# Changes that all siblings took are sent again after this time: a sibling may have been restarted,
# and have got no answer when it asked for the members.
_RETELL_SECONDS = 60.0

_encode = msgspec.json.Encoder().encode
_cluster = msgspec.json.Decoder(ClusterView)


class Siblings:
    """Calls the other workers. Failures are logged; a member's registration that failed at one is
    not `told`, and so is passed on again when the member repeats it."""

    def __init__(
        self,
        peers: PeerClient,
        index: int,
        urls: Mapping[int, str],
        clock: Clock | None = None,
    ) -> None:
        """`index`: of this worker. `urls`: the others' private addresses, by index."""
        self.index = index
        self._peers = peers
        self._urls = urls
        self._clock = clock or MonotonicClock()
        self._told: dict[str, float] = {}  # when, by the address of a member that all took

    async def joined(self, request: JoinRequest) -> None:
        """Tell the others of a member: to add it, or to poll it at once."""
        self._told.pop(request.address, None)
        if await self._tell("POST", _encode(request)):
            if len(self._told) >= MAX_MEMBERS:  # of members that went without leaving
                self._told.clear()
            self._told[request.address] = self._clock.now()

    def told(self, address: str) -> bool:
        """Return whether this worker has told all others of the member at this address lately,
        and all have taken it."""
        return self._told.get(address, -math.inf) > self._clock.now() - _RETELL_SECONDS

    async def left(self, request: LeaveRequest) -> None:
        """Tell the others that a member has left."""
        self._told.pop(request.address, None)
        await self._tell("DELETE", _encode(request))

    @property
    def count(self) -> int:
        return len(self._urls)

    async def answers(self, path: str, method: str = "GET") -> dict[int, bytes]:
        """Return the body of each worker's answer, by index; without those that fail."""
        found = await asyncio.gather(*(self._ask(method, i, path) for i in self._urls))
        return {i: body for i, body in zip(self._urls, found, strict=True) if body is not None}

    async def members(self) -> Sequence[tuple[str, bool]]:
        """Return the address of each member that is not dead at some worker, and whether it is
        ready at one."""
        known: dict[str, bool] = {}
        for index, body in (await self.answers("/cluster")).items():
            try:
                view = decoded(_cluster.decode, body, f"worker {index}")
            except PeerError as error:
                log.warning("%s", error)
                continue
            for member in view.instances:
                if member.state is not InstanceState.DEAD:
                    ready = member.state is InstanceState.READY
                    known[member.address] = known.get(member.address, False) or ready
        return list(known.items())

    async def _tell(self, method: str, body: bytes) -> bool:
        """Return whether all have taken it."""
        answers = await asyncio.gather(
            *(self._ask(method, i, MEMBERS_PATH, body) for i in self._urls)
        )
        return None not in answers

    async def _ask(self, method: str, index: int, path: str, body: bytes = b"") -> bytes | None:
        url = self._urls[index] + path
        try:
            return await self._peers.call(method, url, bytes, body, seconds=_ASK_SECONDS)
        except PeerError as error:
            log.debug("worker %d cannot be reached, or refuses: %r", index, error)
            return None

"""What the workers of one gateway say to each other, over their private addresses."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence

import msgspec

from memserve.api.control import LeaveRequest
from memserve.api.peer_client import PeerClient, PeerError, decoded
from memserve.api.status import InstanceState, JoinRequest
from memserve.cluster.client import ClusterSummary

log = logging.getLogger(__name__)

MEMBERS_PATH = "/cluster/members"
# They are processes of one machine: one that takes longer is ending, or just being started again,
# and will ask for the members itself. Less than an instance's JOIN_TIMEOUT.
_ASK_SECONDS = 1.0
# A worker that is started again looks at the members before it takes clients: as long as its
# siblings have instances that serve, it must not say that there are none.
MEET_SECONDS = 5.0

_encode = msgspec.json.Encoder().encode
_cluster = msgspec.json.Decoder(ClusterSummary)


class Siblings:
    """The other workers. Those that cannot be reached are left out."""

    def __init__(self, peers: PeerClient, index: int, urls: Mapping[int, str]) -> None:
        """`index` is one's own; `urls`, by index, are the others' private addresses."""
        self.index = index
        self._peers = peers
        self._urls = urls

    async def joined(self, request: JoinRequest) -> None:
        """Tell them of a member, or that it should be asked for news."""
        await self._tell("POST", _encode(request))

    async def left(self, request: LeaveRequest) -> None:
        """Tell them that a member has left."""
        await self._tell("DELETE", _encode(request))

    async def answers(self, path: str) -> dict[int, bytes]:
        """What each of them answers to a GET, by index."""
        found = await asyncio.gather(*(self._ask("GET", i, path) for i in self._urls))
        return {i: body for i, body in zip(self._urls, found, strict=True) if body is not None}

    async def members(self) -> Sequence[tuple[str, bool]]:
        """Addresses of the members that any of them knows and has not found dead, and whether
        it takes requests."""
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

    async def _tell(self, method: str, body: bytes) -> None:
        await asyncio.gather(*(self._ask(method, i, MEMBERS_PATH, body) for i in self._urls))

    async def _ask(self, method: str, index: int, path: str, body: bytes = b"") -> bytes | None:
        url = self._urls[index] + path
        try:
            # What one of them refuses (a member that it does not know) is its own affair.
            return await self._peers.call(method, url, bytes, body, seconds=_ASK_SECONDS)
        except PeerError as error:
            log.debug("worker %d cannot be reached: %r", index, error)
            return None

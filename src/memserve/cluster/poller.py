"""Asks every member, every second, how it is."""

from __future__ import annotations

import asyncio
from typing import TypeVar

import aiohttp
import msgspec

from memserve.api.status import InstanceInfo, InstanceState, InstanceStats
from memserve.cluster.membership import Member, Membership
from memserve.types import InstanceId

POLL_SECONDS = 1.0
# A busy instance on a crowded machine answers late: three misses of these are far beyond that,
# and a process that has gone refuses the connection at once.
POLL_TIMEOUT_SECONDS = 2.0
_TIMEOUT = aiohttp.ClientTimeout(total=POLL_TIMEOUT_SECONDS)

T = TypeVar("T")
_info = msgspec.json.Decoder(InstanceInfo)
_stats = msgspec.json.Decoder(InstanceStats)


class Poller:
    """Polls the members of a `Membership` until cancelled."""

    def __init__(self, membership: Membership, session: aiohttp.ClientSession) -> None:
        self._membership = membership
        self._session = session

    async def run(self) -> None:
        # Each round has its own tasks, so that a member that hangs delays no other.
        async with asyncio.TaskGroup() as polls:
            under_way: dict[InstanceId, asyncio.Task[None]] = {}
            while True:
                for member in self._membership.members:
                    last = under_way.get(member.id)
                    if last is None or last.done():
                        under_way[member.id] = polls.create_task(self.poll(member))
                await asyncio.sleep(POLL_SECONDS)

    async def poll(self, member: Member) -> None:
        """Ask one member."""
        try:
            info = await self._get(member, "/info", _info)
            stats: InstanceStats | None = None
            if info.state is not InstanceState.STARTING:
                stats = await self._get(member, "/stats", _stats)
        except (aiohttp.ClientError, TimeoutError, msgspec.DecodeError):
            self._membership.missed(member)
        else:
            self._membership.answered(member, info, stats)

    async def _get(self, member: Member, path: str, decoder: msgspec.json.Decoder[T]) -> T:
        url = member.address + path
        async with self._session.get(url, timeout=_TIMEOUT, raise_for_status=True) as answer:
            return decoder.decode(await answer.read())

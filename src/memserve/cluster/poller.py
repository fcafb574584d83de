"""Asks every member, every second, how it is."""

from __future__ import annotations

import asyncio
import itertools

import msgspec

from memserve.api.peer_client import PeerClient, PeerError
from memserve.api.status import InstanceInfo, InstanceState, InstanceStats
from memserve.cluster.membership import Member, Membership
from memserve.vital import Vitals

# A heartbeat that is not answered in time is missed, and three make a death (`MAX_MISSES`).
# A beat does not wait for the last one's answer: a member that hangs is dead after two beats
# more than one timeout, and one that is merely late, on a crowded machine, stays alive.
POLL_SECONDS = 1.0
POLL_TIMEOUT_SECONDS = 2.0

_info = msgspec.json.Decoder(InstanceInfo)
_stats = msgspec.json.Decoder(InstanceStats)


class Poller:
    """Polls the members of a `Membership` until cancelled; between heartbeats those of whom it
    wants to know at once."""

    def __init__(
        self, membership: Membership, peers: PeerClient, vitals: Vitals | None = None
    ) -> None:
        """`vitals`: counts the polls that fail as nobody expected."""
        self._vitals = vitals or Vitals()
        self._membership = membership
        self._peers = peers
        self._group: asyncio.TaskGroup | None = None  # while running
        self._asked: set[Member] = set()  # out of turn, not answered
        self._numbers = itertools.count(1)
        self._latest: dict[Member, int] = {}  # the poll whose answer was the last one used
        membership.on_question(self._ask_now)

    async def run(self) -> None:
        # A task for each poll, so that a member that hangs delays no other.
        async with asyncio.TaskGroup() as group:
            self._group = group
            while True:
                self._membership.forget()
                members = self._membership.members
                self._latest = {m: self._latest.get(m, 0) for m in members}
                for member in members:
                    group.create_task(self.poll(member))
                await asyncio.sleep(POLL_SECONDS)

    async def poll(self, member: Member) -> None:
        """Ask one member. Whatever comes of it, others are asked all the same."""
        try:
            await self._poll(member)
        except Exception as error:  # noqa: BLE001 - what one member says must not end all polls
            self._vitals.survive("poll", error)
            self._membership.missed(member)

    async def _poll(self, member: Member) -> None:
        number = next(self._numbers)
        try:
            async with asyncio.timeout(POLL_TIMEOUT_SECONDS):
                info = await self._peers.call("GET", f"{member.address}/info", _info.decode)
                stats: InstanceStats | None = None
                if info.state is not InstanceState.STARTING:
                    stats = await self._peers.call("GET", f"{member.address}/stats", _stats.decode)
        except PeerError as error:
            if error.refused:
                self._membership.refused(member)
            else:
                self._membership.missed(member)
        except TimeoutError:
            self._membership.missed(member)
        else:
            if number > self._latest.get(member, 0):  # not overtaken by a later one
                self._latest[member] = number
                self._membership.answered(member, info, stats)

    def _ask_now(self, member: Member) -> None:
        if self._group is None or member in self._asked:
            return
        self._asked.add(member)
        task = self._group.create_task(self.poll(member))
        task.add_done_callback(lambda _: self._asked.discard(member))

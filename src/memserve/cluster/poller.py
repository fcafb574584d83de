"""Polls every member each second for its state and load."""

from __future__ import annotations

import asyncio
import itertools

import msgspec

from memserve.api.peer_client import PeerClient, PeerError
from memserve.api.status import REPORT_PATH, InstanceReport, InstanceState, InstanceStats
from memserve.cluster.member import Member
from memserve.cluster.membership import Membership
from memserve.vital import Vitals

# A heartbeat without an answer in time is a miss; MAX_MISSES in a row make a member dead. A beat
# does not wait for the answer of the beat before, so a member that hangs is dead after one timeout
# and two beats, while one that answers late, on a busy machine, stays alive.
POLL_SECONDS = 1.0
POLL_TIMEOUT_SECONDS = 2.0
# Parts of a heartbeat, each of which polls as many members: a thousand polls at once would make
# clients wait for all of them.
SLICES = 50

_reports = msgspec.json.Decoder(InstanceReport)
_stats = msgspec.json.Decoder(InstanceStats)


class Poller:
    """Polls the members of a `Membership` until cancelled: all in each heartbeat, and one at once
    when the membership asks for it."""

    def __init__(
        self, membership: Membership, peers: PeerClient, vitals: Vitals | None = None
    ) -> None:
        """`vitals`: counts polls that fail with an unexpected exception."""
        self._vitals = vitals or Vitals()
        self._membership = membership
        self._peers = peers
        self._group: asyncio.TaskGroup | None = None  # while running
        self._asked: set[Member] = set()  # polls between heartbeats in flight
        self._numbers = itertools.count(1)  # of polls
        self._latest: dict[Member, int] = {}  # number of the poll whose answer was used last
        membership.on_question(self._ask_now)

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        # A task for each poll, so that a member that hangs delays no other.
        async with asyncio.TaskGroup() as group:
            self._group = group
            while True:
                self._membership.forget()
                members = self._membership.members
                self._latest = {m: self._latest.get(m, 0) for m in members}
                beginning = loop.time()
                for number in range(SLICES):
                    for member in members[number::SLICES]:
                        group.create_task(self.poll(member))
                    until = beginning + POLL_SECONDS * (number + 1) / SLICES
                    await asyncio.sleep(max(0.0, until - loop.time()))

    async def poll(self, member: Member) -> None:
        """Poll one member. An unexpected exception counts as a miss, and ends no other poll."""
        try:
            await self._poll(member)
        except Exception as error:  # noqa: BLE001 - one member's answer must not end all polls
            self._vitals.survive("poll", error)
            self._membership.missed(member)

    async def _poll(self, member: Member) -> None:
        number = next(self._numbers)
        try:
            async with asyncio.timeout(POLL_TIMEOUT_SECONDS):
                url = member.address + REPORT_PATH
                report = await self._peers.call("GET", url, _reports.decode)
                stats = report.stats
                if stats is None and report.state is not InstanceState.STARTING:
                    # An earlier version's, in a cluster that is being upgraded.
                    stats = await self._peers.call("GET", f"{member.address}/stats", _stats.decode)
        except PeerError as error:
            if error.refused:
                self._membership.refused(member)
            else:
                self._membership.missed(member)
        except TimeoutError:
            self._membership.missed(member)
        else:
            if number > self._latest.get(member, 0):  # no later poll was answered before
                self._latest[member] = number
                self._membership.answered(member, report, stats)

    def _ask_now(self, member: Member) -> None:
        if self._group is None or member in self._asked:
            return
        self._asked.add(member)
        task = self._group.create_task(self.poll(member))
        task.add_done_callback(lambda _: self._asked.discard(member))

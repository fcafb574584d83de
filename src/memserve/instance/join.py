"""Registering with gateways, again whenever a new one is there, and leaving in order."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence

import msgspec

from memserve.api.control import LeaveRequest
from memserve.api.peer_client import PeerClient, PeerError
from memserve.api.status import JoinRequest
from memserve.types import Epoch, InstanceId

log = logging.getLogger(__name__)

# Between registrations. A gateway that knows the instance has no use for them; one that was
# started again knows its members after this, and RETRY_SECONDS if it was not there at all.
JOIN_SECONDS = 2.0
RETRY_SECONDS = 0.25
UNHEARD_TRIES = 20  # in vain, some 5 s: more than a gateway's restart takes; then it is said
JOIN_TIMEOUT = 2.0
LEAVE_TIMEOUT = 1.0  # a process that ends does not wait for long


class Registration:
    """Keeps an instance known to gateways, while `run` runs."""

    def __init__(
        self,
        peers: PeerClient,
        gateways: Sequence[str],
        address: str,
        instance: InstanceId,
        epoch: Epoch,
    ) -> None:
        """`gateways` are URLs; `address` is the instance's own."""
        self._peers = peers
        self._urls = [f"{url.rstrip('/')}/cluster/members" for url in gateways]
        self._join = msgspec.json.encode(JoinRequest(address, instance, epoch))
        self._leave = msgspec.json.encode(LeaveRequest(address, epoch))
        self._news = [asyncio.Event() for _ in gateways]

    def tell(self) -> None:
        """The instance has changed: have the gateways ask at once."""
        for news in self._news:
            news.set()

    async def run(self) -> None:
        """Register, every few seconds, until cancelled."""
        async with asyncio.TaskGroup() as group:
            for url, news in zip(self._urls, self._news, strict=True):
                group.create_task(self._keep_joined(url, news))
            await asyncio.Event().wait()  # also where there is no gateway

    async def leave(self) -> None:
        """Tell the gateways that the instance ends. After `run`, or it would join again."""

        async def leave(url: str) -> None:
            try:
                await self._peers.ask("DELETE", url, self._leave, seconds=LEAVE_TIMEOUT)
            except PeerError as error:
                log.debug("%s cannot be reached: %s", url, error)  # its polls will tell it

        await asyncio.gather(*map(leave, self._urls))

    async def _keep_joined(self, url: str, news: asyncio.Event) -> None:
        refused = ""
        unheard = 0  # tries in a row
        while True:
            news.clear()
            pause = JOIN_SECONDS
            said = ""
            try:
                await self._peers.call("POST", url, bytes, self._join, seconds=JOIN_TIMEOUT)
            except PeerError as error:
                said = str(error)
                if error.status is None:
                    unheard += 1
                    if unheard % UNHEARD_TRIES == 0:
                        log.warning("%s cannot be reached, %d times: %s", url, unheard, said)
                    said, pause = refused, RETRY_SECONDS
                elif said != refused:
                    # Perhaps for a life of the same name that has just died unnoticed: the
                    # gateway asks it now.
                    pause = RETRY_SECONDS
                    log.warning("%s refuses this instance: %s", url, said)
            else:
                unheard = 0
            refused = said
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await news.wait()

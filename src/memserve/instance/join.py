"""Registering with gateways, again whenever a new one is there, and leaving in order."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence

import aiohttp
import msgspec

from memserve.api.control import LeaveRequest
from memserve.api.status import JoinRequest
from memserve.types import Epoch, InstanceId

log = logging.getLogger(__name__)

# Between registrations. A gateway that knows the instance has no use for them; one that was
# started again knows its members after this, and RETRY_SECONDS if it was not there at all.
JOIN_SECONDS = 2.0
RETRY_SECONDS = 0.25
JOIN_TIMEOUT = aiohttp.ClientTimeout(total=2.0)
LEAVE_TIMEOUT = aiohttp.ClientTimeout(total=1.0)  # a process that ends does not wait for long


class Registration:
    """Keeps an instance known to gateways, while `run` runs."""

    def __init__(
        self, gateways: Sequence[str], address: str, instance: InstanceId, epoch: Epoch
    ) -> None:
        """`gateways` are URLs; `address` is the instance's own."""
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
        async with (
            aiohttp.ClientSession(timeout=JOIN_TIMEOUT) as session,
            asyncio.TaskGroup() as group,
        ):
            for url, news in zip(self._urls, self._news, strict=True):
                group.create_task(self._keep_joined(session, url, news))

    async def leave(self) -> None:
        """Tell the gateways that the instance ends. After `run`, or it would join again."""

        async def leave(url: str) -> None:
            try:
                async with session.delete(url, data=self._leave):
                    pass
            except (aiohttp.ClientError, TimeoutError) as error:
                log.debug("%s cannot be reached: %r", url, error)  # its polls will tell it

        async with aiohttp.ClientSession(timeout=LEAVE_TIMEOUT) as session:
            await asyncio.gather(*map(leave, self._urls))

    async def _keep_joined(
        self, session: aiohttp.ClientSession, url: str, news: asyncio.Event
    ) -> None:
        refused = ""
        while True:
            news.clear()
            pause = RETRY_SECONDS
            try:
                async with session.post(url, data=self._join) as answer:
                    said = "" if answer.status == 200 else await answer.text()
                    pause = JOIN_SECONDS
            except (aiohttp.ClientError, TimeoutError) as error:
                log.debug("%s cannot be reached: %r", url, error)
            else:
                if said and said != refused:
                    log.warning("%s refuses this instance: %s", url, said)
                refused = said
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await news.wait()

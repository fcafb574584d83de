"""Registration of an instance with gateways, repeated for gateways that restart, and leaving."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from http import HTTPStatus

import msgspec

from memserve.api.control import LeaveRequest
from memserve.api.peer_client import PeerClient, PeerError
from memserve.api.status import JoinRequest
from memserve.types import Epoch, InstanceId

log = logging.getLogger(__name__)

# Between registrations with one gateway. They are for gateways that restart: such a gateway knows
# its members after JOIN_SECONDS, or after RETRY_SECONDS if a registration failed meanwhile.
JOIN_SECONDS = 2.0
RETRY_SECONDS = 0.25
UNHEARD_TRIES = 20  # failed tries between warnings, about 5 s: longer than a gateway's restart
JOIN_TIMEOUT = 2.0
LEAVE_TIMEOUT = 1.0  # short, since the process waits for it at its end


class Registration:
    """Registers an instance with gateways while `run` runs."""

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
        join = JoinRequest(address, instance, epoch)
        self._join = msgspec.json.encode(join)
        self._again = msgspec.json.encode(msgspec.structs.replace(join, repeated=True))
        self._leave = msgspec.json.encode(LeaveRequest(address, epoch))
        self._news = [asyncio.Event() for _ in gateways]

    def tell(self) -> None:
        """Register again at once: role or state has changed, and the gateways ask for them."""
        for news in self._news:
            news.set()

    async def run(self) -> None:
        """Register every JOIN_SECONDS, until cancelled."""
        async with asyncio.TaskGroup() as group:
            for url, news in zip(self._urls, self._news, strict=True):
                group.create_task(self._keep_joined(url, news))
            await asyncio.Event().wait()  # also where there is no gateway

    async def leave(self) -> None:
        """Tell the gateways that the instance ends. Call after `run` has ended, which would
        register again."""

        async def leave(url: str) -> None:
            try:
                await self._peers.ask("DELETE", url, self._leave, seconds=LEAVE_TIMEOUT)
            except PeerError as error:
                log.debug("%s cannot be reached: %s", url, error)  # its polls notice the end

        await asyncio.gather(*map(leave, self._urls))

    async def _keep_joined(self, url: str, news: asyncio.Event) -> None:
        refused = ""
        unheard = 0  # tries in a row
        accepted = False  # the last one
        repeats = True  # the gateway knows `repeated`: one of an earlier version does not
        while True:
            again = repeats and accepted and not news.is_set()
            news.clear()
            pause = JOIN_SECONDS
            said = ""
            try:
                await self._peers.call(
                    "POST", url, bytes, self._again if again else self._join, seconds=JOIN_TIMEOUT
                )
            except PeerError as error:
                if again and error.status == HTTPStatus.BAD_REQUEST:
                    repeats = False
                    continue
                said, accepted = str(error), False
                if error.status is None:
                    unheard += 1
                    if unheard % UNHEARD_TRIES == 0:
                        log.warning("%s cannot be reached, %d times: %s", url, unheard, said)
                    said, pause = refused, RETRY_SECONDS
                elif said != refused:
                    # The gateway may still know an earlier life of this instance; it checks that
                    # one now, so retry soon.
                    pause = RETRY_SECONDS
                    log.warning("%s refuses this instance: %s", url, said)
            else:
                unheard, accepted = 0, True
            refused = said
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await news.wait()

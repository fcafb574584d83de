"""Registration of an instance with gateways, repeated for gateways that restart, and leaving.

The host name in a gateway's URL may have the addresses of several gateways, as a headless Service
of Kubernetes has: the instance registers at each address, and resolves the name again every
RESOLVE_SECONDS.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from http import HTTPStatus
from urllib.parse import urlsplit

import msgspec

from memserve.api.control import LeaveRequest
from memserve.api.peer_client import PeerClient, PeerError
from memserve.api.status import JoinRequest
from memserve.hosts import addresses_of
from memserve.logs import worth_a_line
from memserve.types import Epoch, InstanceId

log = logging.getLogger(__name__)

# Seconds between registrations with one gateway. A gateway that restarts knows its members after
# JOIN_SECONDS, or after RETRY_SECONDS if a registration failed meanwhile.
JOIN_SECONDS = 2.0
RETRY_SECONDS = 0.25
# Seconds between look-ups of a name, for gateways that are added: about the time for which name
# servers of clusters allow caching. RETRY_SECONDS after a failed look-up.
RESOLVE_SECONDS = 5.0
# Failed tries before a warning, about 5 s: longer than a gateway's restart. The next warnings come
# each time the number of tries has doubled, because a gateway's host may be away for days.
UNHEARD_TRIES = 20
JOIN_TIMEOUT = 2.0
LEAVE_TIMEOUT = 1.0  # short, because the end of the process waits for it

# Returns the IP addresses of a host. Raises OSError.
Resolve = Callable[[str], Awaitable[Sequence[str]]]


class Registration:
    """Registers an instance with gateways while `run` runs."""

    def __init__(
        self,
        peers: PeerClient,
        gateways: Sequence[str],
        address: str,
        instance: InstanceId,
        epoch: Epoch,
        resolve: Resolve = addresses_of,
    ) -> None:
        """`gateways` are URLs; `address` is the instance's own."""
        self._peers = peers
        # A gateway may be named twice: by a flag, and by the process that starts the instance.
        self._urls = tuple(dict.fromkeys(f"{url.rstrip('/')}/cluster/members" for url in gateways))
        join = JoinRequest(address, instance, epoch)
        self._join = msgspec.json.encode(join)
        self._again = msgspec.json.encode(msgspec.structs.replace(join, repeated=True))
        self._leave = msgspec.json.encode(LeaveRequest(address, epoch))
        self._resolve = resolve
        # By URL and address that the instance registers at: the event that makes it do so at once.
        self._news: dict[tuple[str, str], asyncio.Event] = {}
        self._heard: set[tuple[str, str]] = set()  # keys of `_news` that answered the last try

    def tell(self) -> None:
        """Register again at once, so that gateways poll the changed role or state."""
        for news in self._news.values():
            news.set()

    async def run(self) -> None:
        """Register every JOIN_SECONDS, until cancelled."""
        async with asyncio.TaskGroup() as group:
            for url in self._urls:
                group.create_task(self._follow(url))
            await asyncio.Event().wait()  # without gateways, too, until cancelled

    async def leave(self) -> None:
        """Tell the gateways that the instance ends. Call after `run` has ended, which would
        register again."""

        async def leave(url: str, address: str) -> None:
            try:
                await self._peers.ask(
                    "DELETE", url, self._leave, seconds=LEAVE_TIMEOUT, address=address
                )
            except PeerError as error:  # the gateway's polls notice the end
                log.debug("%s at %s cannot be reached: %s", url, address, error)

        await asyncio.gather(*(leave(*gateway) for gateway in self._news))

    async def _follow(self, url: str) -> None:
        """Keep the instance registered at every address of the URL's host. Addresses that a
        failed look-up does not confirm are kept."""
        host = urlsplit(url).hostname or ""
        joining: dict[str, asyncio.Task[None]] = {}
        unknown = 0  # look-ups that failed in a row
        async with asyncio.TaskGroup() as group:
            while True:
                try:
                    found = set(await self._resolve(host))
                except OSError as error:
                    unknown += 1
                    if worth_a_line(unknown, UNHEARD_TRIES):
                        log.warning("%s has no address, %d times: %s", host, unknown, error)
                else:
                    unknown = 0
                    for address in joining.keys() - found:
                        joining.pop(address).cancel()
                        self._news.pop((url, address), None)
                        self._heard.discard((url, address))
                    for address in found - joining.keys():
                        self._news[url, address] = asyncio.Event()
                        joining[address] = group.create_task(self._keep_joined(url, address))
                await asyncio.sleep(RETRY_SECONDS if unknown else RESOLVE_SECONDS)

    async def _keep_joined(self, url: str, address: str) -> None:
        news = self._news[url, address]
        refused = ""
        unheard = 0  # tries without an answer, in a row
        accepted = False  # whether the last try was
        repeats = True  # whether the gateway knows `repeated`; earlier versions do not
        while True:
            again = repeats and accepted and not news.is_set()
            body = self._again if again else self._join
            news.clear()
            pause = JOIN_SECONDS
            said = ""
            try:
                await self._peers.call(
                    "POST", url, bytes, body, seconds=JOIN_TIMEOUT, address=address
                )
            except PeerError as error:
                if again and error.status == HTTPStatus.BAD_REQUEST:
                    repeats = False
                    continue
                said, accepted = str(error), False
                if error.status is None:
                    self._heard.discard((url, address))
                    unheard += 1
                    pause = self._unheard(url, address, unheard, said)
                    said = refused
                elif said != refused:
                    # The gateway may still know an earlier life of this instance, and checks now
                    # whether that life has ended: retry soon.
                    pause = RETRY_SECONDS
                    log.warning("%s at %s refuses this instance: %s", url, address, said)
            else:
                unheard, accepted = 0, True
                self._heard.add((url, address))
            refused = said
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await news.wait()

    def _unheard(self, url: str, address: str, tries: int, why: str) -> float:
        """Log, at some of the tries, that a gateway did not answer; return the seconds until the
        next try. If another address of the name answers, this one may not be a gateway's (`::1` of
        localhost): it is tried less often, and logged at INFO."""
        beside = any(of == url for of, _ in self._heard)
        if worth_a_line(tries, UNHEARD_TRIES) and not (beside and tries > UNHEARD_TRIES):
            level = logging.INFO if beside else logging.WARNING
            log.log(level, "%s at %s cannot be reached, %d times: %s", url, address, tries, why)
        return JOIN_SECONDS if beside and tries > UNHEARD_TRIES else RETRY_SECONDS

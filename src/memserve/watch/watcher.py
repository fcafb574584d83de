"""`Watcher`: polls a cluster's gateways, and goes on when they go away and come back."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

import msgspec

from memserve.api.timeline import Timeline
from memserve.clock import Clock, MonotonicClock
from memserve.cluster.client import ClusterClient
from memserve.cluster.figures import STATS_PATH, ClusterFigures
from memserve.errors import ClusterError, ConfigError
from memserve.scheduler.prefix_view import PrefixReport, merged_reports
from memserve.watch.history import History
from memserve.watch.snapshot import DecisionSeen, GatewaySeen, snapshot_of

POLL_SECONDS = 1.0  # gateways poll their members as often
# Of one round: less than `CLIENT_SECONDS`, so that one silent gateway is told of soon.
ROUND_SECONDS = 5.0
PREFIX_SECONDS = 5.0  # between looks at the prompt trees: 0.3 ms of a gateway's for 500 nodes
ASKED_PREFIXES = 20
ASKED_DECISIONS = 50  # of each gateway in each round: some milliseconds of its time

_figures = msgspec.json.Decoder(ClusterFigures)


class Watcher:
    """Polls the gateways of one cluster, and an async context manager.

    `history` has what they told; `failures` has why a gateway gave no answer in the last round,
    by URL. A gateway that failed is asked anew in each round, with the secret read again: a
    cluster that was started again may have another.
    """

    def __init__(
        self,
        urls: Sequence[str],
        tls: ssl.SSLContext | None = None,
        clock: Clock | None = None,
        decisions: int = ASKED_DECISIONS,
    ) -> None:
        """`tls`: trusted authorities for https:// URLs. `decisions`: asked of each gateway."""
        self.urls = tuple(dict.fromkeys(url.rstrip("/") for url in urls))
        self.history = History()
        self.failures: dict[str, str] = {}
        self.clock = clock or MonotonicClock()
        self._tls = tls
        self._decisions = decisions
        self._clients: dict[str, ClusterClient] = {}
        self._prefixes = PrefixReport()
        self._looked = -PREFIX_SECONDS

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for client in self._clients.values():
            await client.__aexit__(None, None, None)
        self._clients.clear()

    @property
    def trouble(self) -> str | None:
        """Why the cluster is not seen at present, or only by some of its gateways; None: it is."""
        return "; ".join(self.failures.values()) or None

    @property
    def lost(self) -> bool:
        """Whether no gateway answered in the last round."""
        return len(self.failures) == len(self.urls)

    async def poll(self) -> None:
        """Ask every gateway once, and add what they say to the history."""
        found = await asyncio.gather(*map(self._ask, self.urls))
        if answers := [answer for answer in found if answer is not None]:
            self.history.add(snapshot_of(self.clock.now(), answers))

    async def prefixes(self, *, text: bool = False) -> PrefixReport:
        """Return the hottest prefixes of all gateways together: those of the last PREFIX_SECONDS,
        however many ask. `text`: asked anew, with what they say, which a gateway logs."""
        if not text and self.clock.now() - self._looked < PREFIX_SECONDS:
            return self._prefixes
        self._looked = self.clock.now()
        found = await asyncio.gather(*(self._ask_prefixes(url, text) for url in self.urls))
        reports = [report for report in found if report is not None]
        merged = merged_reports(reports, ASKED_PREFIXES) if reports else self._prefixes
        if not text:
            self._prefixes = merged
        return merged

    async def timeline(self, seen: DecisionSeen) -> Timeline | None:
        """Return when the phases of an ended request passed, as the instance that answered tells;
        None if it cannot be asked, or knows it no longer."""
        latest = self.history.latest
        member = None if latest is None else latest.find(seen.view.chosen.instance)
        client = next(iter(self._clients.values()), None)
        if member is None or client is None:
            return None
        try:
            async with asyncio.timeout(ROUND_SECONDS):
                return await client.timeline(member.summary, seen.view.request)
        except (ClusterError, TimeoutError):
            return None

    async def run(self, told: Callable[[], None], pause: float = POLL_SECONDS) -> None:
        """Poll for ever, and call `told` after each round."""
        while True:
            await self.poll()
            told()
            await asyncio.sleep(pause)

    async def _ask(self, url: str) -> GatewaySeen | None:
        try:
            async with asyncio.timeout(ROUND_SECONDS):
                client = await self._client(url)
                view = await client.view()
                figures, decisions = await asyncio.gather(
                    client.read(STATS_PATH, _figures.decode),
                    client.decisions(self._decisions),
                )
        except (ClusterError, ConfigError, TimeoutError) as error:
            self.failures[url] = _why(url, error)
            await self._give_up(url)
            return None
        self.failures.pop(url, None)
        return GatewaySeen(url, self.clock.now(), view, figures, tuple(decisions))

    async def _ask_prefixes(self, url: str, text: bool) -> PrefixReport | None:
        client = self._clients.get(url)
        if client is None:
            return None  # `poll` meets it, and says why if it cannot
        try:
            async with asyncio.timeout(ROUND_SECONDS):
                return await client.prefixes(ASKED_PREFIXES, text=text)
        except (ClusterError, TimeoutError):
            return None  # likewise

    async def _client(self, url: str) -> ClusterClient:
        client = self._clients.get(url)
        if client is None:
            client = self._clients[url] = ClusterClient(url, tls=self._tls)
            await client.__aenter__()
        return client

    async def _give_up(self, url: str) -> None:
        client = self._clients.pop(url, None)
        if client is not None:
            await client.__aexit__(None, None, None)


def _why(url: str, error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer from {url} in {ROUND_SECONDS:g} s"
    said = str(error)
    return said if url in said else f"{url}: {said}"

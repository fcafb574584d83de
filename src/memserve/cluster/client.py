"""Client of a gateway's `/cluster` API."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from types import TracebackType
from typing import Self, TypeVar
from urllib.parse import quote

import msgspec

from memserve.api.control import InstanceChange, LeaveRequest
from memserve.api.peer_client import PeerClient, PeerError
from memserve.api.signatures import Signer
from memserve.api.status import InstanceStats, JoinRequest
from memserve.api.timeline import TIMELINE_PATH, Timeline
from memserve.cluster.member import ClusterView, MemberView
from memserve.errors import ClusterError, ConfigError
from memserve.planner.contract import Decision as PlannerDecision
from memserve.planner.contract import LoadReport
from memserve.scheduler.decision_view import DecisionView
from memserve.scheduler.prefix_view import PrefixReport
from memserve.secrets import Secret, secret_of

# Longer than a gateway waits for an instance's answer (`control.CONTROL_SECONDS`).
CLIENT_SECONDS = 10.0
DECISIONS_PATH = "/cluster/decisions"
PREFIXES_PATH = "/cluster/prefixes"
LOAD_REPORTS_PATH = "/cluster/load"  # of each worker of a gateway, for the planner
PLANNER_PATH = "/cluster/planner"
FEEDS_PATH = "/cluster/feeds"  # state of a gateway's KV event subscriptions

_encode = msgspec.json.Encoder().encode


_member = msgspec.json.Decoder(MemberView)
_stats = msgspec.json.Decoder(InstanceStats)
_cluster = msgspec.json.Decoder(ClusterView)
_decisions = msgspec.json.Decoder(list[DecisionView])
_timeline = msgspec.json.Decoder(Timeline)
_prefixes = msgspec.json.Decoder(PrefixReport)
_loads = msgspec.json.Decoder(list[LoadReport])
_plans = msgspec.json.Decoder(list[PlannerDecision])
T = TypeVar("T")


class GatewayUnreachable(ClusterError):
    """No answer from the gateway's URL, or an instance's."""


class ClusterClient:
    """A client of one gateway, and an async context manager. Its methods raise GatewayUnreachable,
    or ClusterError with the gateway's message if it refuses."""

    def __init__(
        self, url: str, secret: Secret | None = None, tls: ssl.SSLContext | None = None
    ) -> None:
        """`secret`: the cluster's; None: from `secret_of`. `tls`: trusted authorities for https://
        URLs. Raises ConfigError."""
        self._url = url.rstrip("/")
        self._signer = Signer(secret or secret_of(url))
        self._tls = tls

    async def __aenter__(self) -> Self:
        self._peers = PeerClient(self._signer, self._tls)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._peers.close()

    async def view(self) -> ClusterView:
        return await self._ask("GET", "/cluster", _cluster.decode)

    async def decisions(self, n: int) -> list[DecisionView]:
        """Return the scheduler's last `n` decisions, newest first."""
        return await self._ask("GET", f"{DECISIONS_PATH}?n={n}", _decisions.decode)

    async def prefixes(self, n: int, *, text: bool = False) -> PrefixReport:
        """Return the `n` hottest prefixes; `text`: with what they say, shortened."""
        path = f"{PREFIXES_PATH}?n={n}&text={str(text).lower()}"
        return await self._ask("GET", path, _prefixes.decode)

    async def load(self) -> list[LoadReport]:
        """Return the view of each worker of the gateway."""
        return await self._ask("GET", LOAD_REPORTS_PATH, _loads.decode)

    async def plans(self, n: int) -> list[PlannerDecision]:
        """Return the planner's last `n` decisions, newest first."""
        return await self._ask("GET", f"{PLANNER_PATH}?n={n}", _plans.decode)

    async def post_plan(self, decision: PlannerDecision) -> None:
        """Have the gateway show a decision of the planner."""
        await self._ask("POST", PLANNER_PATH, bytes, _encode(decision))

    async def profile(self, member: MemberView) -> bytes:
        """Return an instance's `/profile`, from its own address."""
        return await self._call("GET", f"{member.address}/profile", bytes)

    async def read(self, path: str, decode: Callable[[bytes], T]) -> T:
        """Return the decoded answer to a GET of one of an operator's paths."""
        return await self._ask("GET", path, decode)

    async def member(self, instance: str) -> MemberView:
        """Return the member with an id. Raises ClusterError with the known ids."""
        view = await self.view()
        member = view.find(instance)
        if member is None:
            known = ", ".join(member.id for member in view.instances) or "none"
            raise ClusterError(f"there is no instance '{instance}'; there are: {known}")
        return member

    async def stats(self, member: MemberView) -> InstanceStats:
        """Return an instance's `/stats`, from its own address."""
        return await self._call("GET", f"{member.address}/stats", _stats.decode)

    async def timeline(self, member: MemberView, request: str) -> Timeline:
        """Return when the phases of a request passed that ended at an instance, which is asked at
        its own address. Raises ClusterError if it does not know it, or no longer."""
        path = f"{TIMELINE_PATH}?request={quote(request, safe='')}"
        return await self._call("GET", member.address + path, _timeline.decode)

    async def change(self, instance: str, wanted: InstanceChange) -> MemberView:
        path = f"/cluster/instances/{quote(instance, safe='')}"
        return await self._ask("POST", path, _member.decode, _encode(wanted))

    async def add(self, address: str) -> MemberView:
        """Make the instance at this URL a member. Raises ConfigError for an invalid URL."""
        try:
            body = _encode(JoinRequest(address))
        except ValueError as error:
            raise ConfigError(f"'{address}' is no http://host:port: {error}") from error
        return await self._ask("POST", "/cluster/members", _member.decode, body)

    async def forget(self, address: str) -> None:
        """Remove the member at this URL."""
        await self._ask("DELETE", "/cluster/members", bytes, _encode(LeaveRequest(address)))

    async def _ask(
        self, method: str, path: str, decode: Callable[[bytes], T], body: bytes = b""
    ) -> T:
        return await self._call(method, self._url + path, decode, body)

    async def _call(
        self, method: str, url: str, decode: Callable[[bytes], T], body: bytes = b""
    ) -> T:
        try:
            return await self._peers.call(method, url, decode, body, seconds=CLIENT_SECONDS)
        except PeerError as error:
            if error.detail is None:
                raise GatewayUnreachable(f"no answer from {url}: {error}") from error
            raise ClusterError(error.detail.message) from error

"""A gateway's `/cluster`, for those who manage it from outside."""

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
from memserve.api.status import InstanceState, InstanceStats, JoinRequest, MediumTotals, MemberKind
from memserve.cluster.membership import DegradedPair
from memserve.errors import ClusterError, ConfigError
from memserve.secrets import Secret, secret_of
from memserve.types import Epoch, InstanceId, Role

# Longer than a gateway takes to be told by an instance (`control.CONTROL_SECONDS`).
CLIENT_SECONDS = 10.0
FEEDS_PATH = "/cluster/feeds"  # how members' KV events come in at a gateway

_encode = msgspec.json.Encoder().encode


class MemberSummary(msgspec.Struct, frozen=True):
    """A `MemberView`, as it is read."""

    id: InstanceId
    role: Role
    state: InstanceState
    address: str
    pid: int | None = None
    hbm: MediumTotals = MediumTotals()
    dram: MediumTotals = MediumTotals()
    kind: MemberKind = MemberKind.MEMSERVE
    pool: bool = False
    conflict: str | msgspec.UnsetType = msgspec.UNSET

    @property
    def life(self) -> tuple[str, int | None]:
        """Differs from life to life."""
        return self.address, self.pid


class ClusterSummary(msgspec.Struct, frozen=True):
    """A `ClusterView`, as it is read."""

    epoch: Epoch
    instances: tuple[MemberSummary, ...]
    degraded: tuple[DegradedPair, ...] | msgspec.UnsetType = msgspec.UNSET

    def find(self, instance: str) -> MemberSummary | None:
        return next((member for member in self.instances if member.id == instance), None)


_member = msgspec.json.Decoder(MemberSummary)
_stats = msgspec.json.Decoder(InstanceStats)
_cluster = msgspec.json.Decoder(ClusterSummary)
T = TypeVar("T")


class GatewayUnreachable(ClusterError):
    """Nobody answers at the gateway's URL."""


class ClusterClient:
    """Asks one gateway. Its methods raise GatewayUnreachable, and ClusterError with the
    gateway's own words where it refuses. A context manager."""

    def __init__(
        self, url: str, secret: Secret | None = None, tls: ssl.SSLContext | None = None
    ) -> None:
        """`secret`: the cluster's; None: the one that `secret_of` finds. `tls`: what is asked of
        an https:// gateway. Raises ConfigError."""
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

    async def view(self) -> ClusterSummary:
        return await self._ask("GET", "/cluster", _cluster.decode)

    async def member(self, instance: str) -> MemberSummary:
        """Raises ClusterError with the ids that there are."""
        view = await self.view()
        member = view.find(instance)
        if member is None:
            known = ", ".join(member.id for member in view.instances) or "none"
            raise ClusterError(f"there is no instance '{instance}'; there are: {known}")
        return member

    async def stats(self, member: MemberSummary) -> InstanceStats:
        """What an instance says of itself, asked where it is."""
        return await self._call("GET", f"{member.address}/stats", _stats.decode)

    async def change(self, instance: str, wanted: InstanceChange) -> MemberSummary:
        path = f"/cluster/instances/{quote(instance, safe='')}"
        return await self._ask("POST", path, _member.decode, _encode(wanted))

    async def add(self, address: str) -> MemberSummary:
        """Make an instance that runs at this URL a member."""
        try:
            body = _encode(JoinRequest(address))
        except ValueError as error:
            raise ConfigError(f"'{address}' is no http://host:port: {error}") from error
        return await self._ask("POST", "/cluster/members", _member.decode, body)

    async def forget(self, address: str) -> None:
        """Take whoever is at this URL out of the view."""
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

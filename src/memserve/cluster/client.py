"""A gateway's `/cluster`, for those who manage it from outside."""

from __future__ import annotations

import os
from http import HTTPStatus
from types import TracebackType
from typing import Self

import aiohttp
import msgspec

from memserve.api.control import InstanceChange, LeaveRequest
from memserve.api.errors import ErrorBody
from memserve.api.status import InstanceState, JoinRequest, MediumTotals
from memserve.errors import ClusterError
from memserve.types import Epoch, InstanceId, Role

# Longer than a gateway takes to be told by an instance (`control.CONTROL_TIMEOUT`).
CLIENT_TIMEOUT = aiohttp.ClientTimeout(total=10.0)

_encode = msgspec.json.Encoder().encode
_error = msgspec.json.Decoder(ErrorBody)


class MemberSummary(msgspec.Struct, frozen=True):
    """A `MemberView`, as it is read."""

    id: InstanceId
    role: Role
    state: InstanceState
    address: str
    pid: int | None = None
    hbm: MediumTotals = MediumTotals()
    dram: MediumTotals = MediumTotals()

    @property
    def life(self) -> tuple[str, int | None]:
        """Differs from life to life."""
        return self.address, self.pid


class ClusterSummary(msgspec.Struct, frozen=True):
    """A `ClusterView`, as it is read."""

    epoch: Epoch
    instances: tuple[MemberSummary, ...]

    def find(self, instance: str) -> MemberSummary | None:
        return next((member for member in self.instances if member.id == instance), None)


_member = msgspec.json.Decoder(MemberSummary)
_cluster = msgspec.json.Decoder(ClusterSummary)


class GatewayUnreachable(ClusterError):
    """Nobody answers at the gateway's URL."""


class ClusterClient:
    """Asks one gateway. Its methods raise GatewayUnreachable, and ClusterError with the
    gateway's own words where it refuses. A context manager."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(timeout=CLIENT_TIMEOUT)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._session.close()

    async def view(self) -> ClusterSummary:
        return _cluster.decode(await self._ask("GET", "/cluster"))

    async def member(self, instance: str) -> MemberSummary:
        """Raises ClusterError with the ids that there are."""
        view = await self.view()
        member = view.find(instance)
        if member is None:
            known = ", ".join(member.id for member in view.instances) or "none"
            raise ClusterError(f"there is no instance '{instance}'; there are: {known}")
        return member

    async def change(self, instance: str, wanted: InstanceChange) -> MemberSummary:
        return _member.decode(
            await self._ask("POST", f"/cluster/instances/{instance}", _encode(wanted))
        )

    async def add(self, address: str) -> MemberSummary:
        """Make an instance that runs at this URL a member."""
        body = _encode(JoinRequest(address))
        return _member.decode(await self._ask("POST", "/cluster/members", body))

    async def forget(self, address: str) -> None:
        """Take whoever is at this URL out of the view."""
        await self._ask("DELETE", "/cluster/members", _encode(LeaveRequest(address)))

    async def _ask(self, method: str, path: str, body: bytes | None = None) -> bytes:
        try:
            async with self._session.request(method, self._url + path, data=body) as answer:
                data = await answer.read()
        except aiohttp.ClientConnectorError as error:
            number = error.os_error.errno or 0
            why = os.strerror(number) if number > 0 else str(error.os_error)
            raise GatewayUnreachable(f"{self._url}: {why}") from error
        except (aiohttp.ClientError, TimeoutError) as error:
            raise GatewayUnreachable(f"no answer from {self._url}: {error!r}") from error
        if answer.status != HTTPStatus.OK:
            raise ClusterError(_words(data))
        return data


def _words(body: bytes) -> str:
    try:
        return _error.decode(body).error.message
    except msgspec.DecodeError:
        return body[:500].decode(errors="replace")

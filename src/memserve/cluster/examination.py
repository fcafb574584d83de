"""Examination of a running cluster: queries its gateway, its members and this machine.

`doctor` judges the result."""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import Awaitable, Iterable
from http import HTTPStatus
from pathlib import Path
from typing import TypeVar

import msgspec

import memserve
from memserve.api import msgpack
from memserve.api.audience import origin_of
from memserve.api.generate import PrefillPeer
from memserve.api.handoff import MEET_PATH, MeetCall, MeetResult
from memserve.api.peer_client import PeerClient, PeerError, decoded
from memserve.api.signatures import Signer
from memserve.api.status import InstanceInfo, InstanceState
from memserve.cluster.client import FEEDS_PATH
from memserve.cluster.doctor import (
    Examined,
    FeedSeen,
    GatewaySeen,
    Meeting,
    MemberSeen,
    SharedMemorySeen,
)
from memserve.cluster.member import ClusterView, MemberView
from memserve.pool.segment import SHM_DIRECTORY, leftovers
from memserve.secrets import Secret, secret_of

ASK_SECONDS = 5.0  # timeout of a process's answer about itself
# Longer than a pool takes to find that a peer cannot be reached (`transfer.service.CALL_TIMEOUT`).
MEET_SECONDS = 15.0
AT_ONCE = 16  # concurrent queries of members, which also serve clients meanwhile

_cluster = msgspec.json.Decoder(ClusterView)
_feeds = msgspec.json.Decoder(tuple[FeedSeen, ...])
_info = msgspec.json.Decoder(InstanceInfo)
_meetings = msgspec.msgpack.Decoder(MeetResult)
T = TypeVar("T")


class _Version(msgspec.Struct, frozen=True):
    version: str


class _Health(msgspec.Struct, frozen=True):
    status: str


_version = msgspec.json.Decoder(_Version)
_health = msgspec.json.Decoder(_Health)


async def examine(
    url: str, tls: ssl.SSLContext | None = None, secret: Secret | None = None
) -> Examined:
    """Examine the cluster whose gateway is at `url`. `tls`, `secret`: as of `ClusterClient`. Raises
    ConfigError; failed queries are part of the result."""
    signer = Signer(secret or secret_of(url))
    async with PeerClient(signer, tls) as client, PeerClient(None, tls) as stranger:
        return await _Examination(url.rstrip("/"), signer, client, stranger).run()


class _Examination:
    """One examination: of the gateway, then the members, then each pair of pools."""

    def __init__(self, url: str, signer: Signer, client: PeerClient, stranger: PeerClient) -> None:
        """`stranger`: sends unsigned requests, for public paths."""
        self._url = url
        self._signer = signer
        self._client = client
        self._stranger = stranger
        self._turns = asyncio.Semaphore(AT_ONCE)

    async def run(self) -> Examined:
        gateway = await self._gateway()
        listed = () if gateway.view is None else gateway.view.instances
        members = await _all(map(self._member, listed))
        meetings = await _all(self._meet(one, other) for one, other in _partners(members))
        return Examined(
            memserve.__version__, gateway, tuple(members), tuple(meetings), shared_memory()
        )

    async def _gateway(self) -> GatewaySeen:
        try:
            version = await self._stranger.call(
                "GET", f"{self._url}/version", _version.decode, seconds=ASK_SECONDS
            )
            # The status is 503 if the gateway takes no requests.
            answer = await self._stranger.ask("GET", f"{self._url}/health", seconds=ASK_SECONDS)
            health = decoded(_health.decode, answer.body, self._url)
        except PeerError as error:
            return GatewaySeen(self._url, failure=str(error))
        seen = GatewaySeen(self._url, version.version, health.status)
        try:
            view = await self._ask("/cluster", _cluster)
        except PeerError as error:
            no_secret = error.status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)
            return msgspec.structs.replace(seen, refusal=str(error), no_secret=no_secret)
        feeds: tuple[FeedSeen, ...] | None = None
        try:
            feeds = await self._ask(FEEDS_PATH, _feeds)
        except PeerError as error:
            if error.status != HTTPStatus.NOT_FOUND:  # 404: a version without this path
                seen = msgspec.structs.replace(seen, refusal=str(error))
        ahead = self._signer.clock_ahead(origin_of(self._url))
        return msgspec.structs.replace(seen, view=view, feeds=feeds, clock_ahead=ahead)

    async def _ask(self, path: str, decoder: msgspec.json.Decoder[T]) -> T:
        url = self._url + path
        return await self._client.call("GET", url, decoder.decode, seconds=ASK_SECONDS)

    async def _member(self, summary: MemberView) -> MemberSeen:
        if summary.state is InstanceState.DEAD:
            return MemberSeen(summary)
        try:
            async with self._turns:
                info = await self._client.call(
                    "GET", f"{summary.address}/info", _info.decode, seconds=ASK_SECONDS
                )
        except PeerError as error:
            return MemberSeen(summary, failure=str(error))
        ahead = self._signer.clock_ahead(origin_of(summary.address))
        return MemberSeen(summary, info, clock_ahead=ahead)

    async def _meet(self, one: MemberView, other: MemberView) -> Meeting:
        body = msgpack.encode(MeetCall(PrefillPeer(other.id, other.address)))
        try:
            async with self._turns:
                met = await self._client.call(
                    "POST",
                    one.address + MEET_PATH,
                    _meetings.decode,
                    body,
                    media=msgpack.MEDIA,
                    seconds=MEET_SECONDS,
                )
        except PeerError as error:
            unknown = error.status == HTTPStatus.NOT_FOUND
            return Meeting(one.id, other.id, failure=str(error), unknown=unknown)
        return Meeting(one.id, other.id, met.transport, met.seconds)


def shared_memory(directory: Path = SHM_DIRECTORY) -> SharedMemorySeen | None:
    """Return size and leftovers of this machine's /dev/shm; None if there is none."""
    try:
        room = os.statvfs(directory)
    except OSError:
        return None
    left = tuple(sorted(path.name for path in leftovers(directory)))
    return SharedMemorySeen(room.f_bavail * room.f_frsize, room.f_blocks * room.f_frsize, left)


def _partners(members: Iterable[MemberSeen]) -> list[tuple[MemberView, MemberView]]:
    """Return all ordered pairs of ready members whose pools have the same fingerprint."""
    pools = [each for each in members if each.ready and each.kv is not None]
    return [
        (one.summary, other.summary)
        for one in pools
        for other in pools
        if one is not other and one.kv == other.kv
    ]


async def _all(work: Iterable[Awaitable[T]]) -> list[T]:
    return list(await asyncio.gather(*work))

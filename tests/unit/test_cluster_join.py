"""Registrations: news are told as such, repetitions cost a gateway next to nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import cast

import msgspec
import pytest

from memserve.api.control import LeaveRequest
from memserve.api.errors import ErrorDetail
from memserve.api.http_message import Request
from memserve.api.peer_client import PeerClient, PeerError
from memserve.api.status import InstanceState, JoinRequest
from memserve.clock import ManualClock
from memserve.cluster.member import MemberView
from memserve.cluster.membership import Membership
from memserve.gateway import siblings as siblings_module
from memserve.gateway.cluster_admin import repeated_join
from memserve.gateway.siblings import MEMBERS_PATH, Siblings
from memserve.instance import join as module
from memserve.instance.join import Registration
from memserve.types import Epoch, InstanceId
from tests.unit.test_cluster_membership import STATS, info
from tests.waiting import until

A = "http://127.0.0.1:1"


class Gateway:
    """Takes registrations; an earlier version's refuses fields that it does not know."""

    def __init__(self, *, earlier: bool = False) -> None:
        self.earlier = earlier
        self.taken: list[bool] = []  # of each accepted one: whether it is a repetition
        self.refused = 0

    async def call(
        self, method: str, url: str, decode: object, body: bytes, **limits: object
    ) -> bytes:
        if self.earlier and b"repeated" in body:
            self.refused += 1
            detail = ErrorDetail("Object contains unknown field `repeated`", "invalid_request")
            raise PeerError("400", status=HTTPStatus.BAD_REQUEST, detail=detail)
        self.taken.append(msgspec.json.decode(body, type=JoinRequest).repeated)
        return b""


@asynccontextmanager
async def registered(gateway: Gateway) -> AsyncIterator[Registration]:
    one = Registration(
        cast(PeerClient, gateway), ["http://127.0.0.1:9"], A, InstanceId("p0"), Epoch(1)
    )
    running = asyncio.ensure_future(one.run())
    try:
        yield one
    finally:
        running.cancel()
        await asyncio.wait((running,))


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "JOIN_SECONDS", 0.005)
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.005)


async def test_what_was_accepted_is_repeated_as_such_until_there_are_news() -> None:
    gateway = Gateway()
    async with registered(gateway) as one:
        await until(lambda: len(gateway.taken) >= 4, "repetitions")
        assert gateway.taken[:4] == [False, True, True, True]
        one.tell()
        await until(lambda: gateway.taken.count(False) == 2, "news")


async def test_a_gateway_of_an_earlier_version_is_not_told_that_it_is_a_repetition() -> None:
    gateway = Gateway(earlier=True)
    async with registered(gateway):
        await until(lambda: len(gateway.taken) >= 5, "registrations")
    assert not any(gateway.taken)
    assert gateway.refused == 1


def request(join: JoinRequest) -> Request:
    body = msgspec.json.encode(join)
    return Request("POST", MEMBERS_PATH, b"", [], body, False, True, MEMBERS_PATH.encode())


def test_a_repetition_is_answered_at_once_only_for_a_member_that_is_well() -> None:
    membership = Membership()
    again = JoinRequest(A, InstanceId("p0"), Epoch(1), repeated=True)
    assert repeated_join(membership, request(again), None) is None  # the gateway was restarted
    member = membership.join(A, lasting=False)
    asked: list[str] = []
    membership.on_question(lambda each: asked.append(each.address))
    assert repeated_join(membership, request(again), None) is None  # not met yet
    membership.answered(member, info("p0", 1), STATS)
    answer = repeated_join(membership, request(again), None)
    assert answer is not None
    assert msgspec.json.decode(answer, type=MemberView).state is InstanceState.READY
    assert asked == []
    news = msgspec.structs.replace(again, repeated=False)
    another = msgspec.structs.replace(again, epoch=Epoch(2))
    for other in (news, another):
        assert repeated_join(membership, request(other), None) is None
    membership.missed(member)  # it may be somebody else who answers there now
    assert repeated_join(membership, request(again), None) is None


class Workers:
    """The calls of one worker to two others, which are busy, refuse, or take a registration."""

    def __init__(self) -> None:
        self.failing: dict[str, PeerError] = {}  # by the start of the URL
        self.taken: list[tuple[str, str]] = []

    async def call(
        self, method: str, url: str, decode: object, body: bytes, **limits: object
    ) -> bytes:
        for start, error in self.failing.items():
            if url.startswith(start):
                raise error
        self.taken.append((method, url))
        return b""


BUSY = PeerError("it did not answer within 1 s")
REFUSING = PeerError("503", status=HTTPStatus.SERVICE_UNAVAILABLE)


@pytest.mark.parametrize("error", [BUSY, REFUSING])
async def test_a_registration_that_a_worker_missed_is_passed_on_when_it_is_repeated(
    error: PeerError,
) -> None:
    workers, clock, membership = Workers(), ManualClock(), Membership()
    others = {1: "http://127.0.0.1:11", 2: "http://127.0.0.1:12"}
    siblings = Siblings(cast(PeerClient, workers), 0, others, clock)
    news = JoinRequest(A, InstanceId("p0"), Epoch(1))
    again = msgspec.structs.replace(news, repeated=True)
    membership.answered(membership.join(A, lasting=False), info("p0", 1), STATS)

    def answered_at_once() -> bool:
        return repeated_join(membership, request(again), siblings) is not None

    assert not answered_at_once()  # this worker has told nobody
    workers.failing = {others[2]: error}
    for _ in range(3):
        await siblings.joined(again)
        assert not answered_at_once()
    workers.failing.clear()
    await siblings.joined(again)
    assert workers.taken[-2:] == [("POST", url + MEMBERS_PATH) for url in others.values()]
    assert answered_at_once()
    workers.failing = {others[1]: error}  # now there are news, which one misses
    await siblings.joined(news)
    assert not answered_at_once()
    workers.failing.clear()
    await siblings.joined(again)
    assert answered_at_once()
    clock.advance(siblings_module._RETELL_SECONDS)  # a worker may have forgotten all since
    assert not answered_at_once()
    await siblings.joined(again)
    await siblings.left(LeaveRequest(A))
    assert not answered_at_once()

"""Registrations: news are told as such, repetitions cost a gateway next to nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import cast

import msgspec
import pytest

from memserve.api.errors import ErrorDetail
from memserve.api.http_message import Request
from memserve.api.peer_client import PeerClient, PeerError
from memserve.api.status import InstanceState, JoinRequest
from memserve.cluster.member import MemberView
from memserve.cluster.membership import Membership
from memserve.gateway.cluster_admin import repeated_join
from memserve.gateway.siblings import MEMBERS_PATH
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
    assert repeated_join(membership, request(again)) is None  # the gateway was restarted
    member = membership.join(A, lasting=False)
    asked: list[str] = []
    membership.on_question(lambda each: asked.append(each.address))
    assert repeated_join(membership, request(again)) is None  # not met yet
    membership.answered(member, info("p0", 1), STATS)
    answer = repeated_join(membership, request(again))
    assert answer is not None
    assert msgspec.json.decode(answer, type=MemberView).state is InstanceState.READY
    assert asked == []
    news = msgspec.structs.replace(again, repeated=False)
    another = msgspec.structs.replace(again, epoch=Epoch(2))
    for other in (news, another):
        assert repeated_join(membership, request(other)) is None
    membership.missed(member)  # it may be somebody else who answers there now
    assert repeated_join(membership, request(again)) is None

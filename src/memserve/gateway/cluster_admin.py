"""`/cluster` endpoints: the members, joins and leaves, changes of role and state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import msgspec
from fastapi import APIRouter, Request, Response

from memserve.api.control import (
    MAX_CONTROL_BYTES,
    InstanceChange,
    LeaveRequest,
    conflict,
    instance_not_found,
)
from memserve.api.errors import invalid, unavailable
from memserve.api.http_message import Request as PlainRequest
from memserve.api.peer_client import DECODE_ERRORS, PeerClient
from memserve.api.status import JoinRequest
from memserve.cluster.control import change_member
from memserve.cluster.member import DegradedPair, view_of
from memserve.cluster.membership import Membership
from memserve.errors import ClusterError
from memserve.gateway.asgi import JsonResponse, read_body
from memserve.gateway.siblings import MEMBERS_PATH, Siblings
from memserve.types import InstanceId

_encode = msgspec.json.Encoder().encode
_joins = msgspec.json.Decoder(JoinRequest)
_leaves = msgspec.json.Decoder(LeaveRequest)
_changes = msgspec.json.Decoder(InstanceChange)
T = TypeVar("T")


def cluster_routes(
    membership: Membership,
    peers: PeerClient,
    siblings: Siblings | None,
    degraded: Callable[[], Sequence[DegradedPair]] = tuple,
) -> APIRouter:
    """Return the routes. Errors are `ApiError`s, which the application turns into OpenAI's shape.
    Joins, leaves and changes are passed on to `siblings`."""
    routes = APIRouter()

    @routes.get("/cluster")
    async def cluster() -> Response:
        """The members, the membership's epoch, and pairs between which no KV moves."""
        pairs = tuple(degraded()) or msgspec.UNSET
        return JsonResponse(msgspec.structs.replace(membership.view(), degraded=pairs))

    @routes.post(MEMBERS_PATH)
    async def join(request: Request) -> Response:
        """Add an instance, or poll a known one at once; its view."""
        asked = await _read(request, _joins)
        if asked.id is not None and asked.epoch is not None:
            holder = membership.claim(asked.id, asked.epoch, asked.address)
            if holder is not None:
                raise conflict(
                    f"'{asked.id}' is the name of another instance that lives, at "
                    f"{holder.address}.",
                    "instance_replaced",
                )
        try:
            member = membership.join(asked.address, lasting=False)
        except ClusterError as error:
            raise unavailable(str(error), "cluster_full") from error
        if siblings is not None:
            await siblings.joined(asked)
        return JsonResponse(view_of(member))

    @routes.delete(MEMBERS_PATH)
    async def leave(request: Request) -> Response:
        """Remove an instance; the remaining members. One that joins by itself and is not ending
        comes back."""
        asked = await _read(request, _leaves)
        left = membership.leave(asked.address, asked.epoch)
        if siblings is not None:
            await siblings.left(asked)
        if not left:
            raise instance_not_found(asked.address)
        return JsonResponse(membership.view())

    @routes.post("/cluster/instances/{instance}")
    async def change(instance: str, request: Request) -> Response:
        """Change a member's role or state at run time; its view."""
        wanted = await _read(request, _changes)
        if wanted.role is None and wanted.state is None:
            raise invalid("Neither 'role' nor 'state' is given.")
        member = membership.find(InstanceId(instance))
        if member is None:
            raise instance_not_found(instance)
        await change_member(peers, membership, member, wanted)
        if siblings is not None:
            await siblings.joined(JoinRequest(member.address))  # they poll it at once
        return JsonResponse(view_of(member))

    return routes


def repeated_join(
    membership: Membership, request: PlainRequest, siblings: Siblings | None
) -> bytes | None:
    """Return the answer to a registration that tells nothing new, here and to `siblings`; None:
    the routes have to answer.

    Each member makes one every two seconds. Through FastAPI, those of a thousand members would
    take half a core."""
    if request.path != MEMBERS_PATH or request.method != "POST":
        return None
    try:
        asked = _joins.decode(request.body)
    except DECODE_ERRORS:
        return None
    known = membership.at(asked.address)
    if not asked.repeated or known is None or not membership.is_well(known, asked.epoch):
        return None
    if siblings is not None and not siblings.told(asked.address):
        return None
    return _encode(view_of(known))


async def _read(request: Request, decoder: msgspec.json.Decoder[T]) -> T:
    body = await read_body(request, MAX_CONTROL_BYTES)
    try:
        return decoder.decode(body)
    except DECODE_ERRORS as error:
        raise invalid(str(error)) from error

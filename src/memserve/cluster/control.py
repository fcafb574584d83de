"""Changes of a member by a gateway: role, drain and resume, shutdown and restart."""

from __future__ import annotations

import logging

import msgspec

from memserve.api.control import (
    DRAIN_PATH,
    RESUME_PATH,
    ROLE_PATH,
    SHUTDOWN_PATH,
    InstanceChange,
    RoleCall,
    ShutdownCall,
    WantedState,
    conflict,
)
from memserve.api.errors import unavailable
from memserve.api.peer_client import PeerClient, PeerError
from memserve.api.status import InstanceInfo, InstanceState
from memserve.cluster.member import Member
from memserve.cluster.membership import Membership

log = logging.getLogger(__name__)

# An instance answers at once, and makes the change later.
CONTROL_SECONDS = 5.0

_encode = msgspec.json.Encoder().encode
_info = msgspec.json.Decoder(InstanceInfo)


async def change_member(
    peers: PeerClient, membership: Membership, member: Member, wanted: InstanceChange
) -> None:
    """Send a change to a member, and update the membership with its answer. Raises ApiError."""
    if member.epoch is None or member.state is InstanceState.DEAD:
        state = "not there yet" if member.epoch is None else "dead"
        raise conflict(f"Instance {member.id} is {state}.", f"instance_{member.state}")
    for path, body in _calls(wanted):
        info = await _post(peers, member, path, body)
        log.info("%s was told %s %s", member.id, path, body.decode())
        membership.answered(member, info, member.stats)


def _calls(wanted: InstanceChange) -> list[tuple[str, bytes]]:
    calls: list[tuple[str, bytes]] = []
    if wanted.role is not None:
        calls.append((ROLE_PATH, _encode(RoleCall(wanted.role))))
    match wanted.state:
        case WantedState.READY:
            calls.append((RESUME_PATH, b""))
        case WantedState.DRAINING:
            calls.append((DRAIN_PATH, b""))
        case WantedState.STOPPED:
            calls.append((SHUTDOWN_PATH, _encode(ShutdownCall())))
        case WantedState.RESTARTING:
            calls.append((SHUTDOWN_PATH, _encode(ShutdownCall(restart=True))))
        case None:
            pass
    return calls


async def _post(peers: PeerClient, member: Member, path: str, body: bytes) -> InstanceInfo:
    try:
        return await peers.call(
            "POST", member.address + path, _info.decode, body, seconds=CONTROL_SECONDS
        )
    except PeerError as error:
        refusal = error.as_api_error()
        if refusal is not None:
            raise refusal from error
        raise unavailable(
            f"Instance {member.id} did not answer: {error}", "instance_unreachable"
        ) from error

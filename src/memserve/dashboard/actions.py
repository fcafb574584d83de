"""Operators' actions on members: which are allowed, their effects, their calls. No NiceGUI."""

from __future__ import annotations

import logging
import ssl
from collections.abc import Awaitable, Callable, Mapping
from enum import StrEnum

import msgspec

from memserve.api.control import InstanceChange, WantedState
from memserve.api.status import InstanceState
from memserve.clock import MonotonicClock
from memserve.cluster.client import ClusterClient
from memserve.cluster.rolling import restart
from memserve.types import InstanceId, Role
from memserve.watch.snapshot import MemberSeen, Snapshot

log = logging.getLogger(__name__)


class Kind(StrEnum):
    """The actions, as `memserve cluster` names them."""

    DRAIN = "drain"
    RESUME = "resume"
    ROLE = "role"
    RESTART = "restart"


class Action(msgspec.Struct, frozen=True):
    """One action on one member. `role`: the new one, of Kind.ROLE."""

    kind: Kind
    member: str
    role: Role | None = None

    @property
    def title(self) -> str:
        if self.kind is Kind.ROLE:
            return f"Make {self.member} a {self.role} instance"
        return f"{self.kind.value.capitalize()} {self.member}"


def offered(member: MemberSeen) -> tuple[Kind, ...]:
    """Return the actions that make sense for a member now."""
    state = member.summary.state
    if state is InstanceState.READY:
        return Kind.DRAIN, Kind.ROLE, Kind.RESTART
    if state is InstanceState.DRAINING:
        return Kind.RESUME, Kind.ROLE, Kind.RESTART
    return ()


def consequences(action: Action, snapshot: Snapshot) -> list[str]:
    """Return what will happen, a sentence each; warnings last."""
    member = snapshot.find(action.member)
    if member is None:
        return [f"{action.member} is no longer a member."]
    match action.kind:
        case Kind.DRAIN:
            return [
                f"{member.id} gets no new requests.",
                _what_runs(member, "to its end"),
                "It stays up, with its cache. Resume undoes this.",
                *_missed(member, snapshot),
            ]
        case Kind.RESUME:
            return [
                f"{member.id} gets requests again at once, as a {member.summary.role} instance."
            ]
        case Kind.ROLE:
            return [
                f"New requests use {member.id} as a {action.role} instance instead of "
                f"{member.summary.role}.",
                _what_runs(member, "as it began"),
                "Its cache stays.",
                *_missed(member, snapshot, action.role),
            ]
        case Kind.RESTART:
            blocks = member.summary.hbm.cached + member.summary.dram.cached
            return [
                f"{member.id} gets no new requests.",
                _what_runs(member, "to its end, then the process ends"),
                f"Its cache is lost: {blocks} cached blocks.",
                "Whatever supervises it starts it again (memserve up does); without a supervisor "
                "it stays away.",
                *_missed(member, snapshot),
            ]


async def perform(
    action: Action,
    url: str,
    tls: ssl.SSLContext | None,
    progress: Callable[[str], None],
    by: str,
) -> None:
    """Do it, through the gateway at `url`. `by`: who asked, for the log. Raises ClusterError,
    ConfigError."""
    log.warning("%s asked for: %s", by, action.title)
    async with ClusterClient(url, tls=tls) as client:
        await _work(action, client, progress)
    log.warning("done for %s: %s", by, action.title)


def _work(
    action: Action, client: ClusterClient, progress: Callable[[str], None]
) -> Awaitable[object]:
    match action.kind:
        case Kind.DRAIN:
            return client.change(action.member, InstanceChange(state=WantedState.DRAINING))
        case Kind.RESUME:
            return client.change(action.member, InstanceChange(state=WantedState.READY))
        case Kind.ROLE:
            return client.change(action.member, InstanceChange(role=action.role))
        case Kind.RESTART:
            return restart(client, [action.member], MonotonicClock(), progress)


def _what_runs(member: MemberSeen, how: str) -> str:
    count = member.running + member.waiting
    if not count:
        return "Nothing runs on it now."
    return f"What runs goes on {how}: {member.running} running, {member.waiting} waiting sequences."


def _missed(member: MemberSeen, snapshot: Snapshot, role: Role | None = None) -> list[str]:
    """Return warnings of what the ready members no longer cover. `role`: the member's new one;
    None: it goes."""
    if member.summary.state is not InstanceState.READY:
        return []
    before = {m.id: m.summary.role for m in snapshot.members if m.summary.state == "ready"}
    after = {name: known for name, known in before.items() if name != member.id}
    if role is not None:
        after[member.id] = role
    if not after:
        return [
            "Warning: no other instance is ready. Requests wait for one, and are refused if none "
            "comes in time."
        ]
    warnings = []
    if _others_than(Role.DECODE, before) and not _others_than(Role.DECODE, after):
        warnings.append(
            "Warning: no ready instance is left that computes prompts for others; decode "
            "instances will compute them themselves."
        )
    if _others_than(Role.PREFILL, before) and not _others_than(Role.PREFILL, after):
        warnings.append(
            "Warning: no ready decode or colocated instance is left; prefill instances will "
            "decode, too."
        )
    return warnings


def _others_than(role: Role, roles: Mapping[InstanceId, Role]) -> bool:
    return any(each is not role for each in roles.values())

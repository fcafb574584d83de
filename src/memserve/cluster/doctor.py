"""Checks of a cluster: functions from the result of `examination` to findings. No I/O.

A check that passes also returns a finding, so that a script can see that the check was made.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from enum import StrEnum

import msgspec

from memserve.api.signatures import WINDOW_SECONDS
from memserve.api.status import InstanceInfo, InstanceState
from memserve.cluster.member import ClusterView, DegradedPair, MemberView
from memserve.types import Role

# A larger difference means that NTP, which keeps clocks within milliseconds, does not run.
# Signatures tolerate more, since they follow the server's clock.
MAX_CLOCK_SECONDS = 5.0
# Idle publishers send a batch every second; a feed that is silent for longer is broken.
MAX_SILENT_SECONDS = 5.0
# Of /dev/shm: with less, another pool, or one that grows, may not get its memory.
MIN_FREE_SHARE = 0.05
_MIB = 1 << 20


class Status(StrEnum):
    """Severity of a finding. Only a failure makes the exit code 1."""

    OK = "ok"
    WARN = "warn"  # works, but not as it should, or cannot be checked
    FAIL = "fail"


class Finding(msgspec.Struct, frozen=True):
    """A result of a check, for one member, or the cluster (None). `advice`: how to fix it."""

    check: str
    status: Status
    text: str
    member: str | None = None
    advice: str | None = None

    def __str__(self) -> str:
        word = "FAIL" if self.status is Status.FAIL else str(self.status)
        name = self.check if self.member is None else f"{self.check} {self.member}"
        return f"{word:4} {name}: {self.text}{'' if self.advice is None else f'; {self.advice}'}"


# --- results of the examination -----------------------------------------------------------------


class FeedSeen(msgspec.Struct, frozen=True):
    """State of the gateway's subscription to one member's KV events: a part of `MemberFeed`."""

    instance: str
    subscribed: bool
    synchronised: bool
    silent_seconds: float
    blocks: int
    counts: dict[str, int]


class GatewaySeen(msgspec.Struct, frozen=True):
    """The gateway. `failure`: why it cannot be reached. `refusal`: why it does not show its members
    or feeds; `no_secret`: because this process has another secret."""

    url: str
    version: str = ""
    status: str = ""  # from its /health
    failure: str = ""
    refusal: str = ""
    no_secret: bool = False
    view: ClusterView | None = None
    feeds: tuple[FeedSeen, ...] | None = None  # None: not known
    clock_ahead: float | None = None  # seconds ahead of this machine's clock; None: not known


class MemberSeen(msgspec.Struct, frozen=True):
    """A member. `summary`: from the gateway. `info`: from the member itself; None if it is dead, or
    cannot be reached from here for the reason `failure`."""

    summary: MemberView
    info: InstanceInfo | None = None
    failure: str = ""
    clock_ahead: float | None = None

    @property
    def id(self) -> str:
        return self.summary.id

    @property
    def kv(self) -> str | None:
        return None if self.info is None else self.info.kv

    @property
    def ready(self) -> bool:
        return self.summary.state is InstanceState.READY


class Meeting(msgspec.Struct, frozen=True):
    """Whether KV can move from the pool of `one` to that of `other`: `transport` and `seconds`, or
    `failure`. `unknown`: `one` has no such call (404)."""

    one: str
    other: str
    transport: str = ""
    seconds: float = 0.0
    failure: str = ""
    unknown: bool = False


class SharedMemorySeen(msgspec.Struct, frozen=True):
    """/dev/shm of this machine, in bytes; `left`: segments whose processes are dead."""

    free: int
    total: int
    left: tuple[str, ...] = ()


class Examined(msgspec.Struct, frozen=True):
    """The result of an examination."""

    version: str  # of this process
    gateway: GatewaySeen
    members: tuple[MemberSeen, ...] = ()
    meetings: tuple[Meeting, ...] = ()
    shared_memory: SharedMemorySeen | None = None


# --- checks -------------------------------------------------------------------------------------


def check_gateway(seen: Examined) -> list[Finding]:
    gateway = seen.gateway
    if gateway.failure:
        text = f"{gateway.url} cannot be reached: {gateway.failure}"
        return [_fail("gateway", text, "start it (memserve up, memserve gateway), or give --url")]
    text = f"{gateway.url} answers, version {gateway.version}"
    if gateway.status == "ready":
        return [_ok("gateway", text)]
    if gateway.status == "draining":
        return [_warn("gateway", f"{text}; it drains, and takes no requests")]
    advice = "start instances, or have them --join this URL"
    return [_fail("gateway", f"{text}, but no instance takes requests", advice)]


def check_secret(seen: Examined) -> list[Finding]:
    gateway = seen.gateway
    if gateway.failure:
        return []
    if gateway.no_secret:
        advice = "set MEMSERVE_SECRET or MEMSERVE_SECRET_FILE as the cluster's processes have it"
        return [_fail("secret", f"the gateway has another one: {gateway.refusal}", advice)]
    if gateway.view is None:
        advice = "see the gateway's log"
        return [_fail("secret", f"the gateway shows no members: {gateway.refusal}", advice)]
    return [_ok("secret", "the gateway's is ours")]


def check_members(seen: Examined) -> list[Finding]:
    found = [_member(each) for each in seen.members]
    if seen.gateway.view is not None and not found:
        advice = "have instances --join the gateway, or add them: memserve cluster add URL"
        found.append(_fail("member", "there are none", advice))
    return found


def _member(seen: MemberSeen) -> Finding:
    one, state = seen.summary, seen.summary.state
    if one.conflict:
        advice = "give each instance an --id of its own"
        return _fail("member", f"is not let in: {one.conflict}", advice, one.id)
    if state is InstanceState.DEAD:
        advice = "see its log and start it again, or memserve cluster remove it"
        return _fail("member", f"is dead, at {one.address}", advice, one.id)
    if seen.info is None:
        text = f"is {state} to the gateway, and cannot be reached from here: {seen.failure}"
        advice = "run this where the gateway runs; what only the member can tell is not checked"
        return _warn("member", text, advice, one.id)
    if seen.info.id != one.id:
        advice = "end it, or give it another address"
        return _fail("member", f"at {one.address} is now {seen.info.id}", advice, one.id)
    text = f"is {state}, {one.role}, {one.kind}, at {one.address}"
    if state is InstanceState.READY:
        return _ok("member", text, one.id)
    advice = "wait" if state is InstanceState.STARTING else "memserve cluster resume brings it back"
    return _warn("member", text, advice, one.id)


def check_versions(seen: Examined) -> list[Finding]:
    wanted = seen.gateway.version
    if not wanted:
        return []
    found = []
    advice = "run one version in a cluster: memserve cluster restart --all after an upgrade"
    if seen.version != wanted:
        found.append(_warn("version", f"{seen.version} here, {wanted} at the gateway", advice))
    for each in seen.members:
        if each.info is not None and each.info.version != wanted:
            own = each.info.version or "one that it does not say"
            found.append(_warn("version", f"{own}, {wanted} at the gateway", advice, each.id))
    return found or [_ok("version", f"{wanted} everywhere")]


def check_kv(seen: Examined) -> list[Finding]:
    """Check which members can exchange KV, and that each prefill and decode instance has a
    partner."""
    found: list[Finding] = []
    groups: defaultdict[str, list[MemberSeen]] = defaultdict(list)
    for each in seen.members:
        if each.info is None or not each.ready:
            continue
        if each.kv is not None:
            groups[each.kv].append(each)
        elif each.summary.role is not Role.COLOCATED:
            text = f"is a {each.summary.role} instance without a pool: it hands nothing over"
            found.append(_fail("kv", text, "give it one (of a vLLM server: dram)", each.id))
    for kv, members in groups.items():
        roles = {each.summary.role for each in members}
        names = ", ".join(f"{each.id} ({each.summary.role})" for each in members)
        found.append(_ok("kv", f"{kv[:8]}: KV moves among {names}"))
        for role, other in ((Role.PREFILL, Role.DECODE), (Role.DECODE, Role.PREFILL)):
            if role in roles and other not in roles:
                advice = (
                    f"start a {other} instance with the same engine, model, dtype and block size, "
                    "or change the role: memserve cluster role"
                )
                alone = [each for each in members if each.summary.role is role]
                found += [
                    _warn("kv", f"is a {role} instance without any {other} instance", advice, m.id)
                    for m in alone
                ]
    return found or ([_ok("kv", "no member has a pool")] if seen.members else [])


def check_events(seen: Examined) -> list[Finding]:
    """Check that the gateway receives its members' KV events."""
    if seen.gateway.view is None:
        return []
    if seen.gateway.feeds is None:
        return [_warn("events", "the gateway does not tell how KV events come in", "upgrade it")]
    feeds = {feed.instance: feed for feed in seen.gateway.feeds}
    return [_events(each, feeds.get(each.id)) for each in seen.members if each.info and each.ready]


def _events(member: MemberSeen, feed: FeedSeen | None) -> Finding:
    name = member.id
    if member.info is not None and member.info.kv_events is None:
        advice = "with caching = 'off' that is meant; a vLLM that runs already needs vllm_events"
        return _warn("events", "publishes none: it is routed to blindly", advice, name)
    advice = "the gateway must reach the ports that the member's /info names; see its log"
    if feed is None or not feed.subscribed:
        return _warn("events", "are not followed", advice, name)
    if feed.silent_seconds > MAX_SILENT_SECONDS:
        text = f"none for {feed.silent_seconds:.0f} s, though one is due each second"
        return _warn("events", text, advice, name)
    lost = {
        what: feed.counts[what] for what in ("malformed", "foreign") if feed.counts.get(what, 0)
    }
    gaps = feed.counts.get("gaps", 0)
    if not feed.synchronised:
        return _warn("events", f"are behind ({gaps} gaps so far)", "try again in a moment", name)
    if lost:
        text = ", ".join(f"{count} {what}" for what, count in lost.items())
        return _warn("events", f"{text} batches were thrown away", "see the gateway's log", name)
    return _ok("events", f"are followed: {feed.blocks} blocks, {gaps} gaps", name)


def check_reach(seen: Examined) -> list[Finding]:
    """Check that each pool reaches all others with the same fingerprint."""
    found: list[Finding] = []
    reached: defaultdict[str, list[str]] = defaultdict(list)
    for each in seen.meetings:
        if each.unknown:
            advice = "upgrade it"
            found.append(_warn("reach", f"{each.other}: cannot say whether", advice, each.one))
        elif each.failure:
            advice = (
                "the address that an instance tells (host, advertise) and the pools' ports must be "
                "reachable from it, and both need the same secret; between hosts, NIXL"
            )
            found.append(_fail("reach", f"{each.other}: {each.failure}", advice, each.one))
        else:
            reached[each.one].append(f"{each.other} ({each.transport}, {each.seconds:.3f} s)")
    found += [_ok("reach", f"its pool reaches {', '.join(all_)}", m) for m, all_ in reached.items()]
    if not found and seen.gateway.view is not None:
        found.append(_ok("reach", "no two pools hold the same KV"))
    return found


def check_handover(seen: Examined) -> list[Finding]:
    """Check for pairs in which the gateway has seen hand-overs fail."""
    view = seen.gateway.view
    if view is None:
        return []
    found = [_degraded(pair) for pair in view.degraded or ()]
    return found or [_ok("handover", "the gateway knows of no pair in which no KV moves")]


def _degraded(pair: DegradedPair) -> Finding:
    text = f"to {pair.decode}: {pair.why}{f' ({pair.detail})' if pair.detail else ''}"
    advice = "prompts are computed where they are decoded meanwhile; see both logs"
    return _fail("handover", text, advice, pair.prefill)


def check_clocks(seen: Examined) -> list[Finding]:
    clocks: list[tuple[str | None, float | None]] = [(None, seen.gateway.clock_ahead)]
    clocks += [(each.id, each.clock_ahead) for each in seen.members]
    found, most = [], 0.0
    for member, ahead in clocks:
        if ahead is None:
            continue
        most = max(most, abs(ahead))
        if abs(ahead) > MAX_CLOCK_SECONDS:
            whose = "the gateway's" if member is None else "its"
            text = (
                f"{whose} clock is {abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'} ours"
            )
            advice = (
                "have NTP keep the clocks: logs do not line up, and a clock that is put right by "
                f"more than {WINDOW_SECONDS:g} s has signed requests refused once"
            )
            found.append(_warn("clock", text, advice, member))
    if found or all(ahead is None for _, ahead in clocks):
        return found
    return [_ok("clock", f"no clock differs from ours by more than {most:.1f} s")]


def check_shared_memory(seen: Examined) -> list[Finding]:
    memory = seen.shared_memory
    if memory is None:
        return [_warn("memory", "there is no /dev/shm here: pools have no way within a host")]
    room = f"{memory.free // _MIB} of {memory.total // _MIB} MiB of /dev/shm here are free"
    found = []
    if memory.free < MIN_FREE_SHARE * memory.total:
        advice = "use fewer blocks, or make it larger (docker run --shm-size, mount -o remount)"
        found.append(_warn("memory", room, advice))
    if memory.left:
        text = f"{len(memory.left)} segments of dead processes are left: {', '.join(memory.left)}"
        advice = "the next instance that starts here removes them, if they are this user's"
        found.append(_warn("memory", text[:400], advice))
    return found or [_ok("memory", room)]


Check = Callable[[Examined], list[Finding]]
CHECKS: Sequence[Check] = (
    check_gateway,
    check_secret,
    check_versions,
    check_members,
    check_kv,
    check_events,
    check_reach,
    check_handover,
    check_clocks,
    check_shared_memory,
)


def diagnose(seen: Examined) -> list[Finding]:
    """Return the findings of all checks, in the order of CHECKS."""
    return [finding for check in CHECKS for finding in check(seen)]


def exit_code(findings: Sequence[Finding]) -> int:
    """Return 1 if a finding is a failure, else 0."""
    return int(any(finding.status is Status.FAIL for finding in findings))


def _ok(check: str, text: str, member: str | None = None) -> Finding:
    return Finding(check, Status.OK, text, member)


def _warn(check: str, text: str, advice: str | None = None, member: str | None = None) -> Finding:
    return Finding(check, Status.WARN, text, member, advice)


def _fail(check: str, text: str, advice: str, member: str | None = None) -> Finding:
    return Finding(check, Status.FAIL, text, member, advice)

"""Each check of `memserve doctor`, on what could be seen of a cluster."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

import memserve
from memserve.api.kv_events import KVEventsInfo
from memserve.api.signatures import Signer, Verifier, body_digest
from memserve.api.status import InstanceInfo, InstanceState, MemberKind
from memserve.cluster import doctor, examination
from memserve.cluster.doctor import (
    CHECKS,
    Examined,
    FeedSeen,
    Finding,
    GatewaySeen,
    Meeting,
    MemberSeen,
    SharedMemorySeen,
    Status,
    diagnose,
    exit_code,
)
from memserve.cluster.member import ClusterView, DegradedPair, MemberView
from memserve.pool.segment import SharedSegment, leftovers
from memserve.secrets import new_secret
from memserve.types import Epoch, InstanceId, Role

URL = "http://127.0.0.1:8000"
VERSION = "1.2.3"
KV = "ab" * 32
EVENTS = KVEventsInfo("tcp://127.0.0.1:1", "tcp://127.0.0.1:2", "t", 16)
OK, WARN, FAIL = Status.OK, Status.WARN, Status.FAIL


def summary(name: str, role: Role = Role.PREFILL, **more: Any) -> MemberView:
    fields: dict[str, Any] = {"state": InstanceState.READY, "address": f"http://{name}", **more}
    return MemberView(InstanceId(name), role, **fields)


def member(
    name: str,
    role: Role = Role.PREFILL,
    *,
    clock_ahead: float = 0.0,
    state: InstanceState = InstanceState.READY,
    **more: Any,
) -> MemberSeen:
    fields: dict[str, Any] = {"kv": KV, "kv_events": EVENTS, "version": VERSION, **more}
    info = InstanceInfo(InstanceId(name), Epoch(1), role, state, 1, "m", **fields)
    return MemberSeen(summary(name, role, state=state), info, clock_ahead=clock_ahead)


def feed(name: str, **more: Any) -> FeedSeen:
    fields: dict[str, Any] = {
        "subscribed": True,
        "synchronised": True,
        "silent_seconds": 0.5,
        "blocks": 7,
        "counts": {"gaps": 1, "malformed": 0},
        **more,
    }
    return FeedSeen(name, **fields)


P, D = member("p"), member("d", Role.DECODE)


def seen(*members: MemberSeen, **more: Any) -> Examined:
    """A cluster of these members in which all is well; `more`: fields of the gateway, or of all."""
    members = members or (P, D)
    own = {name: more.pop(name) for name in list(more) if name in Examined.__struct_fields__}
    view = ClusterView(Epoch(1), tuple(each.summary for each in members))
    feeds = tuple(feed(each.id) for each in members)
    gateway = GatewaySeen(
        URL, **{"version": VERSION, "status": "ready", "view": view, "feeds": feeds, **more}
    )
    meetings = tuple(
        Meeting(one.id, other.id, "shm", 0.002) for one in members for other in members
    )
    well = {
        "version": VERSION,
        "gateway": gateway,
        "members": members,
        "meetings": tuple(each for each in meetings if each.one != each.other),
        "shared_memory": SharedMemorySeen(900, 1000),
    }
    return Examined(**{**well, **own})


def bad(findings: list[Finding]) -> list[tuple[Status, str | None, str]]:
    """What is not well: how bad, of whom, and what. There is advice for each."""
    assert findings
    return [
        (each.status, each.member, f"{each.text}; {each.advice}")
        for each in findings
        if each.status is not OK
    ]


def one(
    check: Callable[[Examined], list[Finding]], given: Examined
) -> tuple[Status, str | None, str]:
    (found,) = bad(check(given))
    return found


def test_where_all_is_well_each_check_says_so_and_the_exit_code_is_0() -> None:
    findings = diagnose(seen())
    assert all(each.status is OK for each in findings), findings
    assert exit_code(findings) == 0
    assert len({each.check for each in findings}) == len(CHECKS)


def test_the_exit_code_is_1_only_where_something_fails() -> None:
    warning = Finding("a", WARN, "b")
    assert exit_code([warning, Finding("a", OK, "b")]) == 0
    assert exit_code([warning, Finding("a", FAIL, "b")]) == 1


def test_a_finding_is_a_line() -> None:
    assert str(Finding("kv", OK, "fine")) == "ok   kv: fine"
    assert str(Finding("kv", FAIL, "broken", "p", "mend it")) == "FAIL kv p: broken; mend it"
    assert str(Finding("kv", WARN, "odd", None, "look")) == "warn kv: odd; look"


def test_a_gateway_that_cannot_be_reached_is_all_there_is_to_say() -> None:
    gone = Examined(VERSION, GatewaySeen(URL, failure="refused"), shared_memory=None)
    assert [each.check for each in diagnose(gone)] == ["gateway", "memory"]
    status, _, text = one(doctor.check_gateway, gone)
    assert status is FAIL
    assert "refused" in text
    assert "--url" in text


@pytest.mark.parametrize(("state", "status"), [("no instance", FAIL), ("draining", WARN)])
def test_a_gateway_that_takes_no_requests(state: str, status: Status) -> None:
    assert one(doctor.check_gateway, seen(status=state))[0] is status


def test_another_secret() -> None:
    given = seen(view=None, feeds=None, refusal="401 another one was used", no_secret=True)
    status, _, text = one(doctor.check_secret, msgspec.structs.replace(given, members=()))
    assert status is FAIL
    assert "MEMSERVE_SECRET" in text
    other = seen(view=None, feeds=None, refusal="500 odd", members=(), meetings=())
    assert "500 odd" in one(doctor.check_secret, other)[2]
    # And nothing is said of what cannot be known.
    assert {each.check for each in diagnose(other)} == {"gateway", "secret", "version", "memory"}


def test_versions_that_differ() -> None:
    old = member("old", version="")
    given = seen(P, old, member("new", version="2"), version="1.2.2")
    found = bad(doctor.check_versions(given))
    assert [(status, name) for status, name, _ in found] == [
        (WARN, None),
        (WARN, "old"),
        (WARN, "new"),
    ]
    assert "does not say" in found[1][2]


@pytest.mark.parametrize(
    ("given", "status", "words"),
    [
        (MemberSeen(summary("x", state=InstanceState.DEAD)), FAIL, "is dead"),
        (MemberSeen(summary("x", conflict="'x' is another")), FAIL, "--id"),
        (MemberSeen(summary("x"), failure="no connection"), WARN, "no connection"),
        (MemberSeen(summary("x"), P.info), FAIL, "is now p"),
        (member("x", state=InstanceState.DRAINING), WARN, "resume"),
        (member("x", state=InstanceState.STARTING), WARN, "wait"),
    ],
)
def test_members_that_are_not_there(given: MemberSeen, status: Status, words: str) -> None:
    found = one(doctor.check_members, seen(given, D))
    assert found[:2] == (status, "x")
    assert words in found[2]


def test_no_members_at_all() -> None:
    nobody = seen(view=ClusterView(Epoch(1), ()), members=())
    assert one(doctor.check_members, nobody)[0] is FAIL


def test_who_finds_nobody_to_hand_over_to_is_told_of() -> None:
    other = "cd" * 32
    lonely = seen(P, member("d", Role.DECODE, kv=other), member("c", Role.COLOCATED))
    found = bad(doctor.check_kv(lonely))
    assert [(status, name) for status, name, _ in found] == [(WARN, "p"), (WARN, "d")]
    groups = [each.text for each in doctor.check_kv(lonely) if each.status is OK]
    assert groups == [
        "abababab: KV moves among p (prefill), c (colocated)",
        "cdcdcdcd: KV moves among d (decode)",
    ]


def test_a_role_without_a_pool_fails_and_a_vllm_that_takes_no_part_does_not() -> None:
    without = member("v", Role.PREFILL, kv=None, kind=MemberKind.VLLM)
    assert one(doctor.check_kv, seen(P, D, without))[:2] == (FAIL, "v")
    alone = member("v", Role.COLOCATED, kv=None, kind=MemberKind.VLLM)
    assert not bad(doctor.check_kv(seen(alone)))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (feed("p", subscribed=False), "not followed"),
        (feed("p", synchronised=False), "behind (1 gaps"),
        (feed("p", silent_seconds=60.0), "none for 60 s"),
        (feed("p", counts={"malformed": 3}), "3 malformed"),
        (feed("somebody"), "not followed"),
    ],
)
def test_events_that_do_not_come_in(given: FeedSeen, words: str) -> None:
    status, name, text = one(doctor.check_events, seen(P, feeds=(given,)))
    assert (status, name) == (WARN, "p")
    assert words in text


def test_events_that_nobody_publishes_or_tells_of() -> None:
    silent = member("p", kv_events=None)
    assert "blindly" in one(doctor.check_events, seen(silent))[2]
    assert "upgrade" in one(doctor.check_events, seen(feeds=None))[2]


def test_pools_that_cannot_meet_fail_and_old_instances_cannot_say() -> None:
    meetings = (
        Meeting("p", "d", failure="503 No way to d: silence"),
        Meeting("d", "p", failure="404", unknown=True),
        Meeting("p", "e", "nixl", 0.25),
    )
    found = bad(doctor.check_reach(seen(meetings=meetings)))
    assert [each[:2] for each in found] == [(FAIL, "p"), (WARN, "d")]
    assert "silence" in found[0][2]
    well = [each for each in doctor.check_reach(seen(meetings=meetings)) if each.status is OK]
    assert [each.text for each in well] == ["its pool reaches e (nixl, 0.250 s)"]
    assert not bad(doctor.check_reach(seen(meetings=())))


def test_degraded_pairs_fail() -> None:
    pair = DegradedPair(InstanceId("p"), InstanceId("d"), "no KV arrived", "tcp://x")
    view = ClusterView(Epoch(1), (P.summary, D.summary), (pair,))
    status, name, text = one(doctor.check_handover, seen(view=view))
    assert (status, name) == (FAIL, "p")
    assert "to d: no KV arrived (tcp://x)" in text


def test_clocks_that_differ() -> None:
    late = member("late", clock_ahead=-5.5)
    found = bad(doctor.check_clocks(seen(P, late, member("near", clock_ahead=4.9), clock_ahead=9)))
    assert [(status, name) for status, name, _ in found] == [(WARN, None), (WARN, "late")]
    assert "9.0 s ahead of ours" in found[0][2]
    assert "5.5 s behind ours" in found[1][2]


def test_shared_memory_that_is_full_or_littered() -> None:
    full = SharedMemorySeen(4 << 20, 100 << 20)
    assert "4 of 100 MiB" in one(doctor.check_shared_memory, seen(shared_memory=full))[2]
    left = SharedMemorySeen(90, 100, ("memserve-1-2-3-4",))
    assert "memserve-1-2-3-4" in one(doctor.check_shared_memory, seen(shared_memory=left))[2]
    assert one(doctor.check_shared_memory, seen(shared_memory=None))[0] is WARN


# --- what is looked at --------------------------------------------------------------------------


def test_what_dead_processes_left_is_seen_and_stays(tmp_path: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path; from memserve.pool.segment import SharedSegment;"
        "kept = SharedSegment(4096, Path(sys.argv[1])); os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)
    own = SharedSegment(4096, tmp_path)
    (path,) = leftovers(tmp_path)
    assert path != own.path
    found = examination.shared_memory(tmp_path)
    assert found is not None
    assert found.left == (path.name,)
    assert 0 < found.free <= found.total
    assert path.exists()
    assert examination.shared_memory(tmp_path / "nowhere") is None
    own.close()


def test_a_signer_knows_how_far_a_server_s_clock_is_ahead() -> None:
    secret = new_secret()
    verifier = Verifier(secret, {"there:1"}, wall_clock=lambda: 1007.5)
    signer = Signer(secret, wall_clock=lambda: 1000.0)
    origin = "http://there:1"
    assert signer.clock_ahead(origin) is None
    signed = signer.sign(origin, b"GET", b"/", body_digest(b""))
    with pytest.raises(Exception, match="another life") as caught:
        verifier.check(signed.authorization, b"GET", b"/", body_digest(b""))
    refusal: Any = caught.value
    assert signer.learn(origin, refusal.authenticate, refusal.proof, signed)
    assert signer.clock_ahead(origin) == 7.5


async def test_nobody_at_the_gateway_s_url_is_one_failure() -> None:
    found = await examination.examine("http://127.0.0.1:9")
    assert found.version == memserve.__version__
    assert "no connection" in found.gateway.failure
    assert (found.members, found.meetings) == ((), ())

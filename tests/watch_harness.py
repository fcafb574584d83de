"""Snapshots of clusters that do not exist, and the JSON of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from memserve.api.histogram import Histogram
from memserve.api.status import (
    EngineTotals,
    InstanceState,
    InstanceStats,
    Latencies,
    MediumTotals,
    MemberKind,
    PeerMoves,
    PoolTotals,
)
from memserve.cluster.figures import ClusterFigures, GatewayTotals, MemberFigures
from memserve.cluster.member import ClusterView, MemberView
from memserve.scheduler.contract import Terms
from memserve.scheduler.decision_view import CandidateView, DecisionView, Outcome
from memserve.types import Epoch, InstanceId, RequestId, Role
from memserve.watch.snapshot import GatewaySeen, Snapshot, snapshot_of

URL = "http://127.0.0.1:8000"
BLOCK_TOKENS = 16


def seen(*seconds: float) -> Histogram:
    histogram = Histogram()
    for each in seconds:
        histogram.observe(each)
    return histogram


def stats_of(
    tokens: int = 0,
    computed: int = 0,
    cached: int = 0,
    received: int = 0,
    running: int = 0,
    waiting: int = 0,
    hbm: MediumTotals | None = None,
    **more: Any,
) -> InstanceStats:
    """`more`: `moves`, `latencies`, and `evictions` of the pool."""
    engine = EngineTotals(running, waiting, 0, computed, cached, tokens, 0, 0, 0, 0.0, received)
    blocks = hbm or MediumTotals(100, 40, 10, 50, 5)
    return InstanceStats(
        engine,
        PoolTotals(blocks, MediumTotals(200, 200), evictions=more.get("evictions", 0)),
        more.get("latencies", Latencies()),
        moves=more.get("moves", {}),
    )


def member_of(
    name: str,
    role: Role = Role.COLOCATED,
    state: InstanceState = InstanceState.READY,
    pid: int = 1,
    host: str = "127.0.0.1",
    kind: MemberKind = MemberKind.MEMSERVE,
) -> MemberView:
    hbm, dram = MediumTotals(100, 40, 10, 50, 5), MediumTotals(200, 200)
    return MemberView(
        InstanceId(name), role, state, f"http://{host}:{9000 + pid}", pid, hbm, dram, kind, True
    )


def answer_of(
    at: float,
    members: Sequence[tuple[MemberView, InstanceStats | None]],
    totals: GatewayTotals | None = None,
    decisions: Sequence[DecisionView] = (),
    url: str = URL,
    ahead: float = 0.0,
    policy: str | None = None,
    others: Sequence[GatewayTotals] = (),
) -> GatewaySeen:
    """`ahead`: of the gateway's clock before the watcher's; its members were heard just now.
    `others`: of its other workers."""
    figures = ClusterFigures(
        at + ahead,
        tuple(
            MemberFigures(summary.id, at + ahead, 0, stats, BLOCK_TOKENS)
            for summary, stats in members
        ),
        (totals or GatewayTotals(), *others),
        policy,
    )
    view = ClusterView(Epoch(1), tuple(summary for summary, _ in members))
    return GatewaySeen(url, at, view, figures, tuple(decisions))


def snapshot(
    at: float,
    members: Sequence[tuple[MemberView, InstanceStats | None]],
    totals: GatewayTotals | None = None,
    decisions: Sequence[DecisionView] = (),
    policy: str | None = None,
) -> Snapshot:
    return snapshot_of(at, [answer_of(at, members, totals, decisions, policy=policy)])


def decision(
    request: str, at: float = 0.0, happened: Outcome | None = None, prefill: str | None = "p0"
) -> DecisionView:
    """Two candidates, of which the first was chosen."""
    first = CandidateView(
        InstanceId("d0"),
        None if prefill is None else InstanceId(prefill),
        None,
        100,
        64,
        0,
        Terms(queue=0.1, prefill=0.2, transfer=0.05, decode=1.0),
        score=0.5,
    )
    second = CandidateView(InstanceId("d1"), None, None, 100, 0, 0, Terms(prefill=0.4), score=0.9)
    return DecisionView(
        RequestId(request),
        "prompt-tree",
        at,
        1e-4,
        first,
        2,
        (first, second),
        happened or Outcome(),
    )


def busy_cluster(at: float) -> Snapshot:
    """A prefill and two decode instances after `at` seconds of steady work: of each second, d0 has
    generated 100 tokens and d1 50, and p0 has computed 300 prompt tokens and had 100 cached."""
    n = int(at)
    p0, d0 = InstanceId("p0"), InstanceId("d0")
    moved = {p0: PeerMoves(n << 20, n << 10)}
    times = Latencies(seen(*[0.02] * n), seen(*[0.004] * n), seen(*[0.8] * n))
    return snapshot(
        at,
        [
            (member_of("p0", Role.PREFILL, pid=1), stats_of(0, 300 * n, 100 * n, running=1)),
            (
                member_of("d0", Role.DECODE, pid=2),
                stats_of(100 * n, received=400 * n, running=3, moves=moved, latencies=times),
            ),
            (
                member_of("d1", Role.DECODE, InstanceState.DRAINING, 3, "10.0.0.7"),
                stats_of(50 * n, waiting=2, moves={d0: PeerMoves(n << 19)}),
            ),
        ],
        GatewayTotals(4, 1, 10 * n, n, 0, 0, 0, n // 4, 400 * n, seen(*[0.03] * n)),
        [decision(f"cmpl-{i}", at - i, Outcome(0.3 + i / 100, 1.5)) for i in range(1, 4)]
        + [decision("cmpl-new", at, prefill=None)],
        "prompt-tree",
    )

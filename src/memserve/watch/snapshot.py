"""`Snapshot`: everything that one round of polls told about a cluster."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from urllib.parse import urlsplit

import msgspec

from memserve.api.histogram import Histogram
from memserve.api.status import InstanceState, InstanceStats
from memserve.cluster.figures import ClusterFigures, GatewayTotals
from memserve.cluster.member import ClusterView, DegradedPair, MemberView
from memserve.scheduler.decision_view import DecisionView
from memserve.types import InstanceId

KEPT_DECISIONS = 200  # of all gateways together
UNKNOWN = "unknown"  # the policy of a gateway that does not say


class MemberSeen(msgspec.Struct, frozen=True):
    """A member: its summary, and its last statistics with the time of their gateway's clock."""

    summary: MemberView
    heard: float = 0.0
    misses: int = 0
    stats: InstanceStats | None = None
    block_tokens: int = 0

    @property
    def id(self) -> InstanceId:
        return self.summary.id

    @property
    def host(self) -> str:
        """The host of its address."""
        return urlsplit(self.summary.address).hostname or self.summary.address

    @property
    def serves(self) -> bool:
        return self.summary.state in (InstanceState.READY, InstanceState.DRAINING)

    @property
    def running(self) -> int:
        return self.stats.engine.running if self.stats and self.serves else 0

    @property
    def waiting(self) -> int:
        return self.stats.engine.waiting if self.stats and self.serves else 0


class DecisionSeen(msgspec.Struct, frozen=True):
    """A decision, and when it was made: seconds of the watcher's clock."""

    made: float
    view: DecisionView


class GatewaySeen(msgspec.Struct, frozen=True):
    """Answers of one gateway. `at`: when, by the watcher's clock."""

    url: str
    at: float
    view: ClusterView
    figures: ClusterFigures
    decisions: tuple[DecisionView, ...] = ()


class GatewayCounts(msgspec.Struct, frozen=True):
    """Counters of each worker of one gateway, and the gateway's policy. A worker that did not
    answer its sibling in time is left out."""

    url: str
    policy: str
    workers: tuple[GatewayTotals, ...]


class Snapshot(msgspec.Struct, frozen=True):
    """A cluster as its gateways told of it. `at`: seconds of the watcher's clock.

    Members are by id in alphabetical order, decisions newest first, and `totals` are sums over the
    gateways' workers.
    """

    at: float
    members: tuple[MemberSeen, ...] = ()
    totals: GatewayTotals = GatewayTotals()
    decisions: tuple[DecisionSeen, ...] = ()
    degraded: tuple[DegradedPair, ...] = ()
    gateways: tuple[str, ...] = ()  # that answered
    workers: int = 0
    by_gateway: tuple[GatewayCounts, ...] = ()  # in the order of `gateways`

    def find(self, instance: str) -> MemberSeen | None:
        return next((member for member in self.members if member.id == instance), None)


def snapshot_of(at: float, answers: Sequence[GatewaySeen]) -> Snapshot:
    """Return the snapshot that the gateways of one cluster gave. Of a member that several know,
    the first gateway's word counts, since each has a clock of its own."""
    members: dict[InstanceId, MemberSeen] = {}
    decisions: list[DecisionSeen] = []
    degraded: dict[tuple[InstanceId, InstanceId], DegradedPair] = {}
    for answer in answers:
        figures = {each.id: each for each in answer.figures.members}
        for summary in answer.view.instances:
            told = figures.get(summary.id)
            seen = MemberSeen(summary)
            if told is not None:
                figures_of = (told.heard, told.misses, told.stats, told.block_tokens)
                seen = MemberSeen(summary, *figures_of)
            members.setdefault(summary.id, seen)
        behind = answer.at - answer.figures.now
        decisions += (DecisionSeen(view.at + behind, view) for view in answer.decisions)
        for pair in answer.view.degraded or ():
            degraded.setdefault((pair.prefill, pair.decode), pair)
    decisions.sort(key=lambda decision: decision.made, reverse=True)
    by_gateway = tuple(
        GatewayCounts(a.url, a.figures.policy or UNKNOWN, a.figures.workers) for a in answers
    )
    workers = [worker for each in by_gateway for worker in each.workers]
    return Snapshot(
        at=at,
        members=tuple(sorted(members.values(), key=lambda member: member.id)),
        totals=sum_totals(workers),
        decisions=tuple(decisions[:KEPT_DECISIONS]),
        degraded=tuple(degraded.values()),
        gateways=tuple(answer.url for answer in answers),
        workers=len(workers),
        by_gateway=by_gateway,
    )


def sum_totals(workers: Iterable[GatewayTotals]) -> GatewayTotals:
    """Return the sums over workers, histograms included; without a `life`."""
    sums: dict[str, int] = {}
    histograms: dict[str, Histogram] = {}
    for worker in workers:
        for name, value in msgspec.structs.asdict(worker).items():
            if isinstance(value, Histogram):
                histograms[name] = merged((value, histograms.get(name, Histogram())))
            elif name != "life":
                sums[name] = sums.get(name, 0) + value
    return msgspec.convert({**sums, **histograms}, GatewayTotals)


def merged(histograms: Iterable[Histogram]) -> Histogram:
    """Return one histogram of all observations."""
    total = Histogram()
    for histogram in histograms:
        total.sum += histogram.sum
        total.counts = [a + b for a, b in zip(total.counts, histogram.counts, strict=True)]
    return total

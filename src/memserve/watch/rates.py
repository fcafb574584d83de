"""Rates between two snapshots of a cluster: pure functions, per second.

Counters that fall belong to a process that has begun anew: all that it counts is since then. The
workers of a gateway are compared one by one, since one that misses a poll comes back with all that
it has ever counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import TypeVar

import msgspec

from memserve.api.histogram import Histogram
from memserve.api.status import InstanceStats, Latencies
from memserve.cluster.figures import GatewayTotals
from memserve.types import InstanceId, Role
from memserve.watch.latency import GroupLatency, Percentiles, growth, percentiles
from memserve.watch.snapshot import GatewayCounts, MemberSeen, Snapshot, merged, sum_totals


class MemberRates(msgspec.Struct, frozen=True):
    """One member's rates, per second."""

    tokens: float = 0.0  # generated
    computed: float = 0.0  # prompt tokens, by where their KV came from
    cached: float = 0.0
    received: float = 0.0  # from another instance, which has counted them as one of the others
    from_dram: float = 0.0  # of the cached ones, about: whole blocks that came back to HBM
    fetched: float = 0.0  # of the cached ones, about: whole blocks from a third instance
    finished: float = 0.0  # sequences
    evicted: float = 0.0  # blocks
    swapped_out: float = 0.0  # blocks, HBM to DRAM
    swapped_in: float = 0.0
    busy: float = 0.0  # share of time that the engine spent in steps

    @property
    def in_hbm(self) -> float:
        """Cached prompt tokens that were in HBM here."""
        return max(self.cached - self.from_dram - self.fetched, 0.0)

    @property
    def hit_ratio(self) -> float | None:
        """Share of cached among the prompt tokens that were not received; None: there were none."""
        here = self.cached + self.computed
        return self.cached / here if here else None


NO_RATES = MemberRates()


class FlowKind(StrEnum):
    """Why KV moves."""

    FORWARD = "handed over or fetched"
    RETURN = "returned"


class Flow(msgspec.Struct, frozen=True):
    """KV that moves between two members, bytes per second."""

    source: InstanceId
    target: InstanceId
    kind: FlowKind
    rate: float


class Rates(msgspec.Struct, frozen=True):
    """A cluster between two snapshots. `seconds`: between them."""

    seconds: float
    members: Mapping[InstanceId, MemberRates]
    whole: MemberRates  # the sum; `busy`: the mean
    flows: tuple[Flow, ...]
    latencies: Mapping[Role, GroupLatency]
    policies: Mapping[str, GroupLatency]
    first_token: Percentiles  # of streams, at the gateways
    answered: float  # requests
    refused: float
    failed: float

    @property
    def kv_bytes(self) -> float:
        """KV moved between members, bytes per second."""
        return sum(flow.rate for flow in self.flows)

    def of(self, instance: InstanceId) -> MemberRates:
        return self.members.get(instance, NO_RATES)


def rates_between(before: Snapshot, after: Snapshot) -> Rates:
    """Return the rates between two snapshots. A member without statistics in both has none, since
    nobody knows when it counted; one that was restarted between them counts from zero."""
    then = {member.id: member for member in before.members}
    pairs = [
        (then[m.id], m) for m in after.members if m.id in then and m.stats and then[m.id].stats
    ]
    members = {now.id: _member(past, now) for past, now in pairs}
    seconds = after.at - before.at
    workers = _workers(before, after)
    counted = [pair for pairs in workers.values() for pair in pairs]
    return Rates(
        seconds=seconds,
        members=members,
        whole=_sum(members),
        flows=tuple(flow for past, now in pairs for flow in _flows(past, now)),
        latencies=_by_role(pairs),
        policies=_by_policy(workers),
        first_token=percentiles(
            merged(growth(old.first_token, new.first_token) for old, new in counted)
        ),
        answered=sum(_rate(old.answered, new.answered, seconds) for old, new in counted),
        refused=sum(_rate(old.refused, new.refused, seconds) for old, new in counted),
        failed=sum(_rate(old.failed, new.failed, seconds) for old, new in counted),
    )


def failovers_between(before: Snapshot, after: Snapshot) -> int:
    """Return how many streams another instance went on with between two snapshots."""
    pairs = [pair for each in _workers(before, after).values() for pair in each]
    return sum(_grown(old.failovers, new.failovers) for old, new in pairs)


def _member(past: MemberSeen, now: MemberSeen) -> MemberRates:
    seconds = now.heard - past.heard
    assert past.stats is not None
    assert now.stats is not None
    old, new = _counters(past.stats, now.block_tokens), _counters(now.stats, now.block_tokens)
    if now.summary.life != past.summary.life:
        old = dict.fromkeys(old, 0.0)
    return MemberRates(**{name: _rate(old[name], new[name], seconds) for name in new})


def _counters(stats: InstanceStats, block_tokens: int) -> dict[str, float]:
    """Return the counters that `MemberRates` has rates of, by its names."""
    engine, pool = stats.engine, stats.pool
    return {
        "tokens": engine.generated_tokens,
        "computed": engine.computed_prompt_tokens,
        "cached": engine.cached_prompt_tokens,
        "received": engine.received_prompt_tokens,
        "from_dram": pool.swapped_in * block_tokens,
        "fetched": stats.fetch.blocks_received * block_tokens,
        "finished": engine.finished,
        "evicted": pool.evictions,
        "swapped_out": pool.swapped_out,
        "swapped_in": pool.swapped_in,
        "busy": engine.busy_seconds,
    }


def _flows(past: MemberSeen, now: MemberSeen) -> list[Flow]:
    assert past.stats is not None
    assert now.stats is not None
    seconds = now.heard - past.heard
    known = past.stats.moves if now.summary.life == past.summary.life else {}
    flows = []
    for peer, moves in now.stats.moves.items():
        old = known.get(peer)
        here, there = (0, 0) if old is None else (old.received, old.returned)
        if rate := _rate(here, moves.received, seconds):
            flows.append(Flow(peer, now.id, FlowKind.FORWARD, rate))
        if rate := _rate(there, moves.returned, seconds):
            flows.append(Flow(now.id, peer, FlowKind.RETURN, rate))
    return flows


def _by_role(pairs: list[tuple[MemberSeen, MemberSeen]]) -> dict[Role, GroupLatency]:
    grown: dict[Role, list[_Grown]] = {}
    for past, now in pairs:
        assert past.stats is not None
        assert now.stats is not None
        found = _grown_latencies(past.stats.latencies, now.stats.latencies)
        grown.setdefault(now.summary.role, []).append(found)
    return _together(grown)


_Pair = tuple[GatewayTotals, GatewayTotals]  # the same worker's, before and after


def _workers(before: Snapshot, after: Snapshot) -> dict[str, list[_Pair]]:
    """Return the totals to compare by policy, of the gateways that are in both snapshots."""
    then = {each.url: each for each in before.by_gateway}
    pairs: dict[str, list[_Pair]] = {}
    for now in after.by_gateway:
        if (past := then.get(now.url)) is not None:
            pairs.setdefault(now.policy, []).extend(_same_workers(past, now))
    return pairs


def _same_workers(past: GatewayCounts, now: GatewayCounts) -> list[_Pair]:
    """Return the workers that are in both answers of a gateway. Those of an older gateway have no
    `life`: their sums are compared, if they are as many."""
    known = {worker.life: worker for worker in past.workers if worker.life}
    pairs = [(known[worker.life], worker) for worker in now.workers if worker.life in known]
    old, new = ([w for w in each.workers if not w.life] for each in (past, now))
    if new and len(old) == len(new):
        # Another policy: the gateway has begun anew.
        since = sum_totals(old) if past.policy == now.policy else GatewayTotals()
        pairs.append((since, sum_totals(new)))
    return pairs


def _by_policy(workers: Mapping[str, list[_Pair]]) -> dict[str, GroupLatency]:
    return _together(
        {
            policy: [_grown_latencies(old, new) for old, new in pairs]
            for policy, pairs in workers.items()
        }
    )


_T = TypeVar("_T")
_Grown = tuple[Histogram, ...]  # in the order of `GroupLatency`'s fields


def _grown_latencies(old: Latencies | GatewayTotals, new: Latencies | GatewayTotals) -> _Grown:
    return (
        growth(old.first_token, new.first_token),
        growth(old.inter_token, new.inter_token),
        growth(old.per_token, new.per_token),
        growth(old.whole, new.whole),
    )


def _together(grown: Mapping[_T, list[_Grown]]) -> dict[_T, GroupLatency]:
    """A group of which nothing is comparable has no percentiles."""
    return {
        group: GroupLatency(*(percentiles(merged(each)) for each in zip(*found, strict=True)))
        for group, found in grown.items()
    }


def _sum(members: Mapping[InstanceId, MemberRates]) -> MemberRates:
    if not members:
        return NO_RATES
    names = MemberRates.__struct_fields__
    sums = {n: sum(msgspec.structs.asdict(m)[n] for m in members.values()) for n in names}
    sums["busy"] /= len(members)
    return MemberRates(**sums)


def _grown(before: int, after: int) -> int:
    return after - before if after >= before else after


def _rate(before: float, after: float, seconds: float) -> float:
    if seconds <= 0:
        return 0.0
    return (after - before if after >= before else after) / seconds

"""Bounded history of a cluster: recent snapshots, and a point of figures for each."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

import msgspec

from memserve.types import Role
from memserve.watch.latency import GroupLatency, Percentiles
from memserve.watch.rates import NO_RATES, Rates, failovers_between, rates_between
from memserve.watch.snapshot import UNKNOWN, Snapshot

# Rates are over this time: gateways poll members once a second, so less would jump.
WINDOW_SECONDS = 5.0
KEPT_POINTS = 900  # a quarter of an hour of one poll a second


class Point(msgspec.Struct, frozen=True):
    """Figures of charts at one time, per second; `at`: seconds of the watcher's clock."""

    at: float
    tokens: float = 0.0
    answered: float = 0.0
    computed: float = 0.0  # prompt tokens, by where their KV came from
    cached: float = 0.0  # in_hbm, from_dram and fetched together
    in_hbm: float = 0.0
    from_dram: float = 0.0
    fetched: float = 0.0
    received: float = 0.0
    hit_ratio: float | None = None
    evicted: float = 0.0  # blocks
    swapped_in: float = 0.0
    kv_bytes: float = 0.0
    running: int = 0
    waiting: int = 0
    first_token: float | None = None  # seconds, median, of streams at the gateways
    latencies: Mapping[Role, GroupLatency] = {}
    policies: Mapping[str, GroupLatency] = {}  # at the gateways, by their policy
    failovers: int = 0  # since the last point


class History:
    """The last WINDOW_SECONDS of snapshots, and the last KEPT_POINTS points."""

    def __init__(self, window: float = WINDOW_SECONDS, kept: int = KEPT_POINTS) -> None:
        self._window = window
        self._snapshots: deque[Snapshot] = deque()
        self._points: deque[Point] = deque(maxlen=kept)
        self.rates = Rates(0.0, {}, NO_RATES, (), {}, {}, Percentiles(), 0.0, 0.0, 0.0)

    @property
    def latest(self) -> Snapshot | None:
        return self._snapshots[-1] if self._snapshots else None

    @property
    def points(self) -> Sequence[Point]:
        """Oldest first."""
        return tuple(self._points)

    def add(self, snapshot: Snapshot) -> None:
        """Add the next snapshot: `rates` are since the first one within the window before it."""
        last = self.latest
        if last is not None and last.gateways != snapshot.gateways:
            # Other gateways' sums and clocks: nothing before them compares.
            self._snapshots.clear()
            last = None
        self._snapshots.append(snapshot)
        while len(self._snapshots) > 2 and self._snapshots[1].at <= snapshot.at - self._window:
            self._snapshots.popleft()
        if last is None:
            return
        self.rates = rates_between(self._snapshots[0], snapshot)
        self._points.append(_point(snapshot, self.rates, failovers_between(last, snapshot)))


def policies_of(points: Sequence[Point]) -> list[str]:
    """Return the policies of the gateways at any of the points, in alphabetical order, UNKNOWN
    last."""
    found = {name for point in points for name in point.policies}
    return sorted(found, key=lambda name: (name == UNKNOWN, name))


def _point(snapshot: Snapshot, rates: Rates, failovers: int) -> Point:
    whole = rates.whole
    return Point(
        at=snapshot.at,
        tokens=whole.tokens,
        answered=rates.answered,
        computed=whole.computed,
        cached=whole.cached,
        in_hbm=whole.in_hbm,
        from_dram=whole.from_dram,
        fetched=whole.fetched,
        received=whole.received,
        hit_ratio=whole.hit_ratio,
        evicted=whole.evicted,
        swapped_in=whole.swapped_in,
        kv_bytes=rates.kv_bytes,
        running=sum(member.running for member in snapshot.members),
        waiting=sum(member.waiting for member in snapshot.members) + snapshot.totals.waiting,
        first_token=rates.first_token.p50,
        latencies=rates.latencies,
        policies=rates.policies,
        failovers=failovers,
    )

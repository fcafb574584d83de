"""`GET /cluster/stats`: what a gateway's workers have counted, and its members' last statistics."""

from __future__ import annotations

import msgspec

from memserve.api.histogram import Histogram
from memserve.api.status import Count, InstanceStats
from memserve.types import Epoch, InstanceId

STATS_PATH = "/cluster/stats"
WORKER_STATS_PATH = "/cluster/worker/stats"  # of one worker, for its siblings


class GatewayTotals(msgspec.Struct, frozen=True):
    """Counters of one worker of a gateway since its start. `running`, `waiting`: requests now.
    `life`: random, another one after a restart; 0: an older gateway, which does not say."""

    running: Count = 0
    waiting: Count = 0  # for room at the instances
    answered: Count = 0  # with any status
    refused: Count = 0  # of `answered`: 429
    failed: Count = 0  # of `answered`: 5xx
    hang_ups: Count = 0
    broken: Count = 0  # streams that ended with an error
    failovers: Count = 0
    prompt_tokens: Count = 0
    first_token: Histogram = msgspec.field(default_factory=Histogram)  # streams, from arrival
    # Answers with status 200 that came to their end; at an older gateway all, refusals included.
    whole: Histogram = msgspec.field(default_factory=Histogram)
    # Of streams with one choice, as their clients got them; not of those passed on as they are.
    inter_token: Histogram = msgspec.field(default_factory=Histogram)
    per_token: Histogram = msgspec.field(default_factory=Histogram)  # TPOT: means of streams
    life: Epoch = Epoch(0)


class MemberFigures(msgspec.Struct, frozen=True):
    """A member's last statistics. `heard`: when they came, by the gateway's clock. `misses`: polls
    since, without an answer. `block_tokens`: of its KV; 0: not known yet."""

    id: InstanceId
    heard: float
    misses: Count = 0
    stats: InstanceStats | None = None  # None: it has given none
    block_tokens: Count = 0


class ClusterFigures(msgspec.Struct, frozen=True):
    """The whole answer. `now`: the gateway's clock, which `DecisionView.at` is read from, too.
    `policy`: of the gateway's scheduling; None: an older gateway, which does not say."""

    now: float
    members: tuple[MemberFigures, ...]
    workers: tuple[GatewayTotals, ...]  # this one first
    policy: str | None = None

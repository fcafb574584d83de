"""`GET /cluster/stats`: figures that the gateway has anyway, for `memserve top` and the dashboard.

Nothing is computed for it but the encoding, which a large cluster's takes in pieces, so that the
event loop is not held up.
"""

from __future__ import annotations

import asyncio

import msgspec
from fastapi import APIRouter, Response

from memserve.clock import Clock
from memserve.cluster.figures import STATS_PATH, WORKER_STATS_PATH, GatewayTotals, MemberFigures
from memserve.cluster.member import Member
from memserve.cluster.membership import Membership
from memserve.gateway.admission_queue import AdmissionQueue
from memserve.gateway.asgi import JsonResponse
from memserve.gateway.metrics import GatewayMetrics
from memserve.gateway.siblings import Siblings

AT_ONCE = 32  # members that are encoded without a pause: about 0.2 ms
_TOO_MANY, _FAILED = 429, 500

_encode = msgspec.json.Encoder().encode


def figures_routes(
    membership: Membership,
    metrics: GatewayMetrics,
    queue: AdmissionQueue,
    clock: Clock,
    siblings: Siblings | None,
) -> APIRouter:
    """Return the routes. With `siblings`, the other workers' totals are in the answer, too."""
    routes = APIRouter()

    def totals() -> bytes:
        return _encode(totals_of(metrics, queue.waiting))

    @routes.get(STATS_PATH)
    async def stats() -> Response:
        """The members' last statistics, and the counters of this gateway's workers."""
        workers = [totals()]
        if siblings is not None:
            workers += (await siblings.answers(WORKER_STATS_PATH)).values()
        members = membership.members
        parts: list[bytes] = []
        for first in range(0, len(members), AT_ONCE):
            if first:
                await asyncio.sleep(0)
            parts += map(_encoded, members[first : first + AT_ONCE])
        body = b'{"now":%b,"members":[%b],"workers":[%b],"policy":%b}' % (
            _encode(clock.now()),
            b",".join(parts),
            b",".join(workers),
            _encode(metrics.policy),
        )
        return JsonResponse(body)

    @routes.get(WORKER_STATS_PATH, include_in_schema=False)
    async def worker_stats() -> Response:
        return JsonResponse(totals())

    return routes


def totals_of(metrics: GatewayMetrics, waiting: int) -> GatewayTotals:
    """Return a worker's counters. `waiting`: requests in its queue."""
    counts = metrics.requests
    return GatewayTotals(
        running=metrics.running,
        waiting=waiting,
        answered=sum(counts.values()),
        refused=sum(n for (_, status), n in counts.items() if status == _TOO_MANY),
        failed=sum(n for (_, status), n in counts.items() if status >= _FAILED),
        hang_ups=metrics.client_hang_ups,
        broken=metrics.streams_broken,
        failovers=metrics.failovers,
        prompt_tokens=metrics.prompt_tokens,
        first_token=metrics.time_to_first_token_seconds,
        whole=metrics.answer_seconds,
        inter_token=metrics.inter_token_seconds,
        per_token=metrics.time_per_output_token_seconds,
        life=metrics.life,
    )


def _encoded(member: Member) -> bytes:
    block_tokens = 0 if member.limits is None else member.limits.block_tokens
    return _encode(
        MemberFigures(member.id, member.heard, member.misses, member.stats, block_tokens)
    )

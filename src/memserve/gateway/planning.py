"""`/cluster/load` and `/cluster/planner`: what the planner asks a gateway, and what it decided.

The planner is a process of its own, or part of `memserve up`. It reads every gateway's view of the
load and posts its decisions to each, so that they can be read, and scraped, where all else is.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Callable
from typing import Annotated

import msgspec
from fastapi import APIRouter, Query, Request, Response

from memserve.api.errors import invalid
from memserve.api.metric import Label, MetricSpec, Page, counter, gauge
from memserve.api.peer_client import DECODE_ERRORS
from memserve.clock import Clock
from memserve.cluster.client import LOAD_REPORTS_PATH, PLANNER_PATH
from memserve.gateway.asgi import JsonResponse, read_body
from memserve.gateway.siblings import Siblings
from memserve.planner.contract import Action, Decision, LoadReport

WORKER_LOAD_PATH = "/cluster/worker/load"  # of one worker, for its siblings
WORKER_PLANNER_PATH = "/cluster/worker/planner"
KEPT_PLANS = 200  # decisions; about a quarter of an hour
SHOWN_PLANS = 10  # default n
# Of the planner's intervals: after as many without a decision, what it predicted is no news of the
# present. A look that ends members takes several, since these finish what they run.
STALE_INTERVALS = 6
MAX_PLAN_BYTES = 512 * 1024  # of a decision; the largest changes the roles of 4,096 members

_DECISIONS = counter(
    "memserve_planner_decisions_total",
    "decisions",
    "Looks of the planner at the cluster, by what it decided. `nothing` is the usual one.",
    Label("action", tuple(Action)),
)
_CHANGED = counter(
    "memserve_planner_role_changes_total",
    "changes",
    "Members whose role the planner has changed; without those of dry runs.",
    Label("role", ("prefill", "decode", "colocated"), "the new one"),
)
_FAILED = counter(
    "memserve_planner_failures_total",
    "decisions",
    "Decisions that could not be carried out; the planner's log and `memserve cluster planner` say "
    "why.",
)
_HEADROOM = gauge(
    "memserve_planner_headroom_ratio",
    "ratio",
    "The largest multiple of the present load at which the present roles meet both objectives, as "
    "the planner predicts. Below 1 requests miss them. Gone a few intervals after the last "
    "decision.",
)
_SERVED = gauge(
    "memserve_planner_served_ratio",
    "ratio",
    "Share of requests that meet both objectives with the present roles, as the planner predicts. "
    "Gone a few intervals after the last decision.",
)
_AGE = gauge(
    "memserve_planner_age_seconds",
    "seconds",
    "Time since the planner's last decision. Far beyond its interval: it has ended, or cannot "
    "reach this gateway. A decision reaches one of a gateway's workers: the least age counts.",
)

_decode = msgspec.json.Decoder(Decision).decode
_plans = msgspec.json.Decoder(list[Decision]).decode
_reports = msgspec.json.Decoder(list[LoadReport]).decode


class PlannerBoard:
    """The planner's last decisions, as they were posted. Belongs to the event loop."""

    metrics: tuple[MetricSpec, ...] = (_DECISIONS, _CHANGED, _FAILED, _HEADROOM, _SERVED, _AGE)

    def __init__(self, load: Callable[[], LoadReport], clock: Clock) -> None:
        """`load`: this worker's view, now."""
        self.load = load
        self._clock = clock
        self._kept: deque[Decision] = deque(maxlen=KEPT_PLANS)
        self._heard = 0.0
        self._actions: Counter[str] = Counter()
        self._changed: Counter[str] = Counter()
        self._failed = 0

    def post(self, decision: Decision) -> None:
        self._kept.append(decision)
        self._heard = self._clock.now()
        self._actions[decision.action] += 1
        self._failed += bool(decision.failed)
        if not decision.dry_run:
            self._changed.update(change.after.value for change in decision.changes)

    def last(self, n: int) -> list[Decision]:
        """Return the last `n` decisions, newest first."""
        return list(itertools.islice(reversed(self._kept), max(n, 0)))

    async def report(self, page: Page) -> None:
        if not self._kept:
            return
        last = self._kept[-1]
        age = self._clock.now() - self._heard
        for action, count in self._actions.items():
            page.add(_DECISIONS, count, action)
        for role, count in self._changed.items():
            page.add(_CHANGED, count, role)
        page.add(_FAILED, self._failed)
        page.add(_AGE, age)
        if age <= STALE_INTERVALS * last.interval:
            page.add(_HEADROOM, last.present.headroom)
            page.add(_SERVED, last.present.served)


def planner_routes(board: PlannerBoard, siblings: Siblings | None) -> APIRouter:
    """Return the routes. With `siblings`, loads and decisions are those of all workers."""
    routes = APIRouter()

    @routes.get(LOAD_REPORTS_PATH)
    async def load() -> Response:
        """Predictions of each worker's scheduler for its members, and its arrivals."""
        reports = [board.load()]
        if siblings is not None:
            for body in (await siblings.answers(WORKER_LOAD_PATH)).values():
                reports += _reports(body)
        return JsonResponse(reports)

    @routes.get(WORKER_LOAD_PATH, include_in_schema=False)
    async def worker_load() -> Response:
        return JsonResponse([board.load()])

    @routes.get(PLANNER_PATH)
    async def last(n: Annotated[int, Query(ge=0, le=KEPT_PLANS)] = SHOWN_PLANS) -> Response:
        """The planner's last decisions, newest first; none where no planner runs."""
        found = board.last(n)
        if siblings is not None:
            for body in (await siblings.answers(f"{WORKER_PLANNER_PATH}?n={n}")).values():
                found += _plans(body)
        found.sort(key=lambda decision: decision.at, reverse=True)
        return JsonResponse(found[:n])

    @routes.get(WORKER_PLANNER_PATH, include_in_schema=False)
    async def worker_last(n: int = SHOWN_PLANS) -> Response:
        return JsonResponse(board.last(n))

    @routes.post(PLANNER_PATH)
    async def post(request: Request) -> Response:
        """A decision of the planner, to be shown; the same decision."""
        body = await read_body(request, MAX_PLAN_BYTES)
        try:
            decision = _decode(body)
        except DECODE_ERRORS as error:
            raise invalid(str(error)) from error
        board.post(decision)
        return JsonResponse(decision)

    return routes

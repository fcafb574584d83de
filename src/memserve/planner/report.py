"""`report_of`: what a scheduler has to tell the planner."""

from __future__ import annotations

from collections.abc import Collection

from memserve.planner.contract import LoadReport, MemberLoad
from memserve.scheduler.instance_load import InstanceLoad
from memserve.scheduler.refined_costs import RefinedCosts
from memserve.scheduler.scheduler import Scheduler
from memserve.types import InstanceId, SchedulerId

REPORTED_SECONDS = 60.0  # of arrivals: longer than the planner's usual interval


def report_of(
    scheduler: Scheduler,
    life: SchedulerId,
    now: float,
    ready: Collection[InstanceId] | None = None,
) -> LoadReport:
    """Return a scheduler's view at `now`, seconds of its clock. `life`: who tells it, and counts
    from zero. `ready`: the members that take requests; None: all."""
    lines = [one for one in scheduler.load.by_slot if ready is None or one.spec.id in ready]
    return LoadReport(
        scheduler=life,
        now=now,
        members=tuple(_member(one, now) for one in lines),
        requests=scheduler.arrivals.total,
        arrivals=scheduler.arrivals.since(now - REPORTED_SECONDS),
        answers=scheduler.output_length.seen,
        output_tokens=scheduler.output_length.expected,
    )


def _member(line: InstanceLoad, now: float) -> MemberLoad:
    spec = line.spec
    prefill = step = None
    if isinstance(spec.costs, RefinedCosts):
        prefill, step = spec.costs.learnt("prefill"), spec.costs.learnt("decode")
    passed = max(0.0, now - line.queue.updated)
    return MemberLoad(
        id=spec.id,
        role=spec.role,
        queue_seconds=max(0.0, sum(line.queue.left()) - passed),
        prompts=len(line.prefills) + line.other_prefills,
        answers=line.answers + line.other_running,
        context_tokens=line.context_tokens,
        kv_tokens=line.residents.kv_tokens,
        kv_capacity=spec.kv_tokens,
        max_running=spec.max_running,
        chunk_tokens=spec.chunk_tokens,
        prefill_factor=prefill,
        step_factor=step,
        moves=spec.kv is not None,
    )

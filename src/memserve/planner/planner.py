"""`Planner`: decides, from one look to the next, whether a cluster changes its shape.

Pure but for what it remembers of former looks: no I/O, and the clock is the caller's. A change is
made only if it is worth it: `gain` are the requests that would meet their objectives during the
next `HORIZON` seconds because of it, `cost` those that would miss them while it is made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median

import msgspec

from memserve.config import PlannerConfig
from memserve.planner.capacity import MOST_HEADROOM, Capacity, Machine
from memserve.planner.contract import (
    Action,
    Decision,
    Demand,
    LoadReport,
    MemberLoad,
    Prediction,
    RoleChange,
    Split,
)
from memserve.planner.demand import DemandMeter
from memserve.scheduler.contract import Costs
from memserve.types import InstanceId, Role

HORIZON = 120.0  # seconds for which the present demand is expected to last
# Share of all requests that a change of roles has to win, beyond its cost: what the closed form
# is sure of. Without it, splits that are as good as each other would take turns.
LEAST_GAIN = 0.02
EQUAL = 0.01  # share of all requests by which splits do not differ
LOOKS = 2  # in a row that want a change of roles, before it is made
SETTLE_LOOKS = 2  # after a change, until the next one is thought of
ADD_LOOKS = 6  # in a row in which no split of the members suffices
REMOVE_LOOKS = 60  # in a row in which one member less would do
ENOUGH = 0.95  # share of requests that meet their objectives, for which members are added
PLENTY = 0.995  # the same that has to be left when a member goes
# Seconds of a member's work until it has fetched what its new role finds cached at others, if
# fetching took as long as computing; what it takes is less, in proportion.
COLD_SECONDS = 20.0
SHOWN = 8  # splits in a decision


class Planner:
    """One cluster's planner. Call `look` once in each interval."""

    def __init__(self, config: PlannerConfig) -> None:
        self._config = config
        self._demand = DemandMeter()
        self._wanting = 0  # looks in a row that want other roles
        self._short = 0  # looks in a row that want more members
        self._idle = 0  # looks in a row that could do with less
        self._settling = 0

    def look(
        self, now: float, reports: Sequence[LoadReport], costs: Costs, starting: int = 0
    ) -> Decision:
        """Decide. `now`: seconds of a clock that only grows; `reports`: of the schedulers that
        answer, in any order; `costs`: of a typical member; `starting`: members that are not ready
        yet."""
        # One gateway may have been asked at two URLs.
        reports = list({one.scheduler: one for one in reports}.values())
        traffic = self._demand.look(now, reports)
        members = merged(reports)
        split = Split.of([one.role for one in members])
        if not members or traffic is None:
            return self._without_traffic(now, members, split, starting)
        capacity = Capacity(_machine(members, costs), self._config, traffic)
        present = capacity.predict(split)
        ranked = self._ranked(capacity, members, present)
        return self._decide(now, capacity, members, present, ranked, starting, traffic.settled)

    def _without_traffic(
        self, now: float, members: Sequence[MemberLoad], split: Split, starting: int
    ) -> Decision:
        self._wanting = self._short = 0
        quiet = bool(members) and self._demand.quiet
        fewer = self._fewer(members) if quiet else []
        self._idle = self._idle + 1 if fewer else 0
        reason = "no requests" if quiet else "requests are not counted yet"
        decision = Decision(
            at=now,
            action=Action.NOTHING,
            reason=reason if members else "no member is ready",
            demand=Demand(),
            present=Prediction(split=split, headroom=MOST_HEADROOM if quiet else 0.0, served=1.0),
        )
        if self._settling:
            self._settling -= 1
        elif self._idle >= REMOVE_LOOKS and not starting:
            # All would do: of the role that has most, for the load that comes back.
            role, less = max(fewer, key=lambda one: split.count(one[0]))
            return self._removed(decision, role, f"{less} would do: {reason}")
        return decision

    def _ranked(
        self, capacity: Capacity, members: Sequence[MemberLoad], present: Prediction
    ) -> list[Prediction]:
        """All splits of as many members, with gain and cost; the best first."""
        rate = capacity.demand.requests_per_second
        changing = _change_seconds(capacity, members, present)
        found = []
        for split in self._splits(members, len(members)):
            one = capacity.predict(split)
            moved = present.split.moves_to(split)
            cost = moved / len(members) * rate * changing
            gain = rate * HORIZON * (one.served - present.served)
            found.append(msgspec.structs.replace(one, gain=gain, cost=cost))
        found.sort(key=lambda one: (one.cost - one.gain, one.split))
        if found:  # of those that are as good as the best, that with the most room
            near = found[0].gain - found[0].cost - EQUAL * rate * HORIZON
            equal = [one for one in found if one.gain - one.cost >= near]
            found.sort(key=lambda one: (one not in equal, -one.headroom if one in equal else 0.0))
        return found

    def _splits(self, members: Sequence[MemberLoad], count: int) -> Iterator[Split]:
        """Yield the splits of `count` members that bounds and members allow."""
        config = self._config
        fixed = sum(not one.moves for one in members)  # they stay as they are: colocated
        moving = count - fixed
        if config.colocated or Split.of([m.role for m in members]).colocated == count:
            yield Split(colocated=count)
        least = max(config.min_prefill, 1), max(config.min_decode, 1)
        most = config.max_prefill or moving, config.max_decode or moving
        for prefill in range(least[0], moving - least[1] + 1):
            if prefill <= most[0] and moving - prefill <= most[1]:
                yield Split(prefill, moving - prefill, fixed)

    def _decide(
        self,
        now: float,
        capacity: Capacity,
        members: Sequence[MemberLoad],
        present: Prediction,
        ranked: Sequence[Prediction],
        starting: int,
        settled: bool,
    ) -> Decision:
        decision = Decision(
            at=now,
            action=Action.NOTHING,
            reason="",
            demand=capacity.demand,
            present=present,
            considered=tuple(ranked[:SHOWN]),
        )
        rate = capacity.demand.requests_per_second
        best = ranked[0] if ranked else present
        wanted = best.split != present.split
        worth = best.gain > best.cost + LEAST_GAIN * rate * HORIZON
        self._wanting = self._wanting + 1 if wanted and worth else 0
        enough = max(present.served, best.served) >= ENOUGH
        self._short = 0 if enough else self._short + 1
        fewer = self._with_less(capacity, members)
        self._idle = self._idle + 1 if fewer is not None else 0
        if not settled:
            self._wanting = self._short = self._idle = 0
            return _with_reason(decision, "the load has turned; its answers are not known yet")
        if self._settling:
            self._settling -= 1
            return _with_reason(decision, "the last change settles")
        if self._wanting >= LOOKS:
            self._wanting, self._settling = 0, SETTLE_LOOKS
            return msgspec.structs.replace(
                decision,
                action=Action.ROLES,
                reason=f"{best.split} gains {best.gain:.0f} requests in {HORIZON:.0f} s, "
                f"for {best.cost:.0f} that the change costs",
                changes=tuple(_changes(members, best.split)),
            )
        if self._short >= ADD_LOOKS and not starting:
            more = self._with_more(capacity, members)
            if more is not None:
                self._short = 0
                return self._added(decision, present.split, more)
        if self._idle >= REMOVE_LOOKS and not starting and fewer is not None:
            role = next(
                role for role in Role if present.split.count(role) > fewer.split.count(role)
            )
            reason = f"{fewer.split} would do: headroom {fewer.headroom:.2f}"
            return self._removed(decision, role, reason)
        return _with_reason(decision, _why_not(present, best, worth, self._wanting))

    def _added(self, decision: Decision, split: Split, more: Prediction) -> Decision:
        missing = {role: more.split.count(role) - split.count(role) for role in Role}
        role = max(Role, key=lambda role: missing[role])
        count = more.split.members - split.members
        return msgspec.structs.replace(
            decision,
            action=Action.ADD,
            reason=f"no split of {split.members} members serves {ENOUGH:.0%} of the requests; "
            f"{more.split} would serve {more.served:.0%}",
            count=count,
            role=role,
        )

    def _removed(self, decision: Decision, role: Role, reason: str) -> Decision:
        self._idle, self._settling = 0, SETTLE_LOOKS
        return msgspec.structs.replace(
            decision, action=Action.REMOVE, reason=reason, count=1, role=role
        )

    def _with_more(self, capacity: Capacity, members: Sequence[MemberLoad]) -> Prediction | None:
        """The fewest members that suffice, or as many as there may be; None: no more may be."""
        most = self._config.max_members or 0
        best = None
        for count in range(len(members) + 1, min(most, 2 * len(members)) + 1):
            splits = [capacity.predict(split) for split in self._splits(members, count)]
            if not splits:
                continue
            best = max(splits, key=lambda one: one.headroom)
            if best.served >= ENOUGH:
                break
        return best

    def _with_less(self, capacity: Capacity, members: Sequence[MemberLoad]) -> Prediction | None:
        """The best split with one member less, if that is plenty; else None."""
        found = [capacity.predict(less) for _, less in self._fewer(members)]
        best = max(found, key=lambda one: one.headroom, default=None)
        return best if best is not None and best.served >= PLENTY else None

    def _fewer(self, members: Sequence[MemberLoad]) -> list[tuple[Role, Split]]:
        """The splits with one member less that bounds allow, each with the role that goes."""
        if self._config.max_members is None or len(members) <= self._config.min_members:
            return []
        split = Split.of([one.role for one in members])
        found = []
        for role in Role:
            if not split.count(role):
                continue
            less = msgspec.structs.replace(split, **{role.value: split.count(role) - 1})
            if self._allowed(less):
                found.append((role, less))
        return found

    def _allowed(self, split: Split) -> bool:
        config = self._config
        if not split.prefill and not split.decode:
            return True
        return split.prefill >= max(config.min_prefill, 1) and split.decode >= max(
            config.min_decode, 1
        )


def merged(reports: Sequence[LoadReport]) -> list[MemberLoad]:
    """Return the members of all schedulers: what each has reserved is added up."""
    found: dict[InstanceId, MemberLoad] = {}
    for report in reports:
        for one in report.members:
            known = found.get(one.id)
            if known is not None:
                one = msgspec.structs.replace(
                    one,
                    queue_seconds=one.queue_seconds + known.queue_seconds,
                    prompts=max(one.prompts, known.prompts),
                    answers=max(one.answers, known.answers),
                    context_tokens=one.context_tokens + known.context_tokens,
                    kv_tokens=one.kv_tokens + known.kv_tokens,
                )
            found[one.id] = one
    return list(found.values())


def _machine(members: Sequence[MemberLoad], costs: Costs) -> Machine:
    capacities = [one.kv_capacity for one in members if one.kv_capacity is not None]
    # What was learnt in a role that a member has no more may be of another load.
    computing = [one for one in members if one.role is not Role.DECODE] or members
    answering = [one for one in members if one.role is not Role.PREFILL] or members
    return Machine(
        costs=costs,
        prefill_factor=_typical([one.prefill_factor for one in computing]),
        step_factor=_typical([one.step_factor for one in answering]),
        kv_tokens=median(capacities) if capacities else None,
        max_running=int(median(one.max_running for one in members)),
        chunk_tokens=int(median(one.chunk_tokens for one in members)),
    )


def _typical(factors: Sequence[float | None]) -> float:
    """Return the median of the factors that are known; 1 if none is."""
    known = [factor for factor in factors if factor is not None]
    return median(known) if known else 1.0


def _change_seconds(
    capacity: Capacity, members: Sequence[MemberLoad], present: Prediction
) -> float:
    """Seconds for which a member that changes is of no use: what it has begun, which goes on beside
    its new work, and what its new role finds cached at others alone."""
    queued = sum(one.queue_seconds for one in members) / len(members)
    answers = capacity.answer_seconds(present.tpot) / 2
    demand = capacity.demand
    cached = 1 - demand.uncached_tokens / demand.prompt_tokens
    fetching = min(1.0, cached * capacity.transfer / demand.prefill_seconds)
    return max(queued, answers) + COLD_SECONDS * fetching


def _changes(members: Sequence[MemberLoad], wanted: Split) -> Iterator[RoleChange]:
    """Yield who changes: of each role that has too many, those with the least work."""
    present = Split.of([one.role for one in members])
    missing = [
        role for role in Role for _ in range(max(0, wanted.count(role) - present.count(role)))
    ]
    for role in Role:
        surplus = present.count(role) - wanted.count(role)
        own = [one for one in members if one.role is role and one.moves]
        own.sort(key=lambda one: (one.queue_seconds, one.context_tokens, one.id))
        for one in own[: max(0, surplus)]:
            if missing:
                yield RoleChange(one.id, role, missing.pop(0))


def _why_not(present: Prediction, best: Prediction, worth: bool, wanting: int) -> str:
    if best.split == present.split:
        return "no other split is better"
    if not worth:
        return (
            f"{best.split} would gain {best.gain:.0f} requests in {HORIZON:.0f} s, which is not "
            f"worth the change ({best.cost:.0f})"
        )
    return f"{best.split} is better, at {wanting} of {LOOKS} looks"


def _with_reason(decision: Decision, reason: str) -> Decision:
    return msgspec.structs.replace(decision, reason=reason)

"""Inputs and answers of the planner: frozen values, times in seconds.

A `LoadReport` comes from each gateway (or the simulator); `Planner.look` turns them into a
`Decision`, which names the members that change and shows what else was considered.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import msgspec
from msgspec import Meta

from memserve.scheduler.arrivals import Arrival
from memserve.types import InstanceId, Role, SchedulerId

Amount = Annotated[float, Meta(ge=0)]
Count = Annotated[int, Meta(ge=0)]


class MemberLoad(msgspec.Struct, frozen=True, kw_only=True):
    """One scheduler's predictions for one member, and its reservations there."""

    id: InstanceId
    role: Role
    queue_seconds: Amount = 0.0  # of prompts that are not computed
    prompts: Count = 0  # queued or in prefill
    answers: Count = 0  # that decode there, now or after their prefill
    context_tokens: Amount = 0.0  # of `answers`, half way through each
    kv_tokens: Amount = 0.0  # of HBM
    kv_capacity: Amount | None = None  # tokens; None: not known
    max_running: Annotated[int, Meta(ge=1)] = 64
    chunk_tokens: Annotated[int, Meta(ge=1)] = 512
    # Seconds of a prefill, by those of its cost model; None: not learnt.
    prefill_factor: Amount | None = None
    step_factor: Amount | None = None  # likewise, of a decode step
    moves: bool = True  # its KV moves between members, so that its role may change


class LoadReport(msgspec.Struct, frozen=True, kw_only=True):
    """One scheduler's view. Counters only grow, from its start on."""

    scheduler: SchedulerId  # whose: reports come in any order, and not from all at each look
    now: float  # seconds of the scheduler's clock
    members: tuple[MemberLoad, ...]  # that are ready
    requests: Count  # for which a place was decided, since the start
    arrivals: tuple[Arrival, ...] = ()  # the last ones, oldest first
    answers: Count = 0  # whose length is known, since the start
    output_tokens: Amount = 1.0  # expected length of an answer


class Split(msgspec.Struct, frozen=True, order=True):
    """Members by role."""

    prefill: Count = 0
    decode: Count = 0
    colocated: Count = 0

    @classmethod
    def of(cls, roles: list[Role]) -> Split:
        count = roles.count
        return cls(count(Role.PREFILL), count(Role.DECODE), count(Role.COLOCATED))

    @property
    def members(self) -> int:
        return self.prefill + self.decode + self.colocated

    def count(self, role: Role) -> int:
        if role is Role.PREFILL:
            return self.prefill
        return self.decode if role is Role.DECODE else self.colocated

    def moves_to(self, other: Split) -> int:
        """Return how many members change their role, of as many members."""
        return sum(max(0, other.count(role) - self.count(role)) for role in Role)

    def __str__(self) -> str:
        parts = [(self.prefill, "P"), (self.decode, "D"), (self.colocated, "C")]
        return "".join(f"{n}{name}" for n, name in parts if n) or "none"


class Demand(msgspec.Struct, frozen=True, kw_only=True):
    """Arrivals, per second and per request."""

    requests_per_second: Amount = 0.0
    prompt_tokens: Amount = 0.0  # mean
    uncached_tokens: Amount = 0.0  # mean, to compute
    output_tokens: Amount = 0.0  # mean
    prefill_seconds: Amount = 0.0  # mean, of a prompt that runs alone


class Prediction(msgspec.Struct, frozen=True, kw_only=True):
    """Prediction for a split at the present demand. Latencies are at the objectives' quantile;
    None: the split cannot carry the demand."""

    split: Split
    headroom: Amount  # the largest multiple of the demand at which both objectives are met
    served: Amount  # share of requests that meet both objectives, 0 to 1
    ttft: float | None = None
    tpot: float | None = None
    cost: Amount = 0.0  # requests that miss their objectives because of the change itself
    gain: float = 0.0  # requests that meet their objectives only with this split; see `HORIZON`


class Action(StrEnum):
    NOTHING = "nothing"
    ROLES = "roles"  # members change their roles
    ADD = "add"  # the backend starts members
    REMOVE = "remove"  # the backend ends members


class RoleChange(msgspec.Struct, frozen=True):
    """A member that gets another role."""

    member: InstanceId
    before: Role
    after: Role


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """One look: what is to change, why, and what else was considered."""

    at: float  # seconds of the planner's clock
    action: Action
    reason: str  # one line
    demand: Demand
    present: Prediction
    considered: tuple[Prediction, ...] = ()  # the best splits of as many members, best first
    changes: tuple[RoleChange, ...] = ()  # where it failed: those that were made before
    count: Count = 0  # members that the backend starts or ends
    role: Role | None = None  # of these
    dry_run: bool = False  # nothing was done
    interval: Amount = 5.0  # seconds until the next look
    failed: str = ""  # why not all could be done; empty: it was, or there is nothing to do

    def summary(self) -> str:
        """One line for the log."""
        now = self.present
        words = f"{now.split}: {_latencies(now)}, headroom {now.headroom:.2f}"
        return f"{self.action}{' (dry run)' if self.dry_run else ''}: {self.reason} [{words}]"


def _latencies(one: Prediction) -> str:
    if one.ttft is None or one.tpot is None:
        return "cannot carry the load"
    return f"TTFT {one.ttft:.3f} s, TPOT {one.tpot * 1e3:.1f} ms predicted"

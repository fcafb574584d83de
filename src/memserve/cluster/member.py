"""One member of a cluster as a gateway knows it, and as it shows it."""

from __future__ import annotations

import msgspec

from memserve.api.status import InstanceState, InstanceStats, Limits, MediumTotals, MemberKind
from memserve.types import Epoch, InstanceId, Role


class Member:
    """One instance as the gateway knows it. Only `Membership` changes it."""

    def __init__(self, address: str, now: float) -> None:
        self.address = address
        self.id = InstanceId(address)  # the address until the first answer
        self.role = Role.COLOCATED
        self.kind = MemberKind.MEMSERVE
        self.pool = False
        self.pool_address: str | None = None  # see `InstanceInfo.pool_peer`
        self.kv: str | None = None  # see `InstanceInfo`
        self.state = InstanceState.STARTING
        self.epoch: Epoch | None = None  # of its present life; None: it has not answered yet
        self.pid: int | None = None
        self.limits: Limits | None = None
        self.stats: InstanceStats | None = None
        self.misses = 0  # polls in a row without an answer
        self.lasting = False  # named by configuration: never forgotten
        self.heard = now  # clock time of the last answer or join
        self.joined = False  # observers were told `JOINED` for this life
        self.conflict: str | None = None  # why its id is refused; None: it is not


class MemberView(msgspec.Struct, frozen=True):
    """A member in `GET /cluster`. Before its first answer `hbm` and `dram` are NO_TOTALS, and `pid`
    is None."""

    id: InstanceId
    role: Role
    state: InstanceState
    address: str
    pid: int | None = None
    hbm: MediumTotals = MediumTotals()
    dram: MediumTotals = MediumTotals()
    kind: MemberKind = MemberKind.MEMSERVE
    pool: bool = False
    conflict: str | msgspec.UnsetType = msgspec.UNSET  # why its id is refused

    @property
    def life(self) -> tuple[str, int | None]:
        """Address and process id, which differ between the lives of an instance."""
        return self.address, self.pid


class _NoTotals(MediumTotals, frozen=True, omit_defaults=True):
    """Totals of a member that has reported none: `{}`."""


NO_TOTALS = _NoTotals()


class DegradedPair(msgspec.Struct, frozen=True, omit_defaults=True):
    """A prefill and a decode instance between which hand-overs fail."""

    prefill: InstanceId
    decode: InstanceId
    why: str  # for everybody: without addresses
    detail: str = ""  # for operators: with addresses, or empty


class ClusterView(msgspec.Struct, frozen=True):
    """`GET /cluster`."""

    epoch: Epoch
    instances: tuple[MemberView, ...]
    degraded: tuple[DegradedPair, ...] | msgspec.UnsetType = msgspec.UNSET  # if there are any

    def find(self, instance: str) -> MemberView | None:
        return next((member for member in self.instances if member.id == instance), None)


def view_of(member: Member) -> MemberView:
    pool = None if member.stats is None else member.stats.pool
    return MemberView(
        id=member.id,
        role=member.role,
        kind=member.kind,
        pool=member.pool,
        state=member.state,
        address=member.address,
        pid=member.pid,
        hbm=NO_TOTALS if pool is None else pool.hbm,
        dram=NO_TOTALS if pool is None else pool.dram,
        conflict=msgspec.UNSET if member.conflict is None else member.conflict,
    )

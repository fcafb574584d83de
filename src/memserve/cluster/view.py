"""`GET /cluster` on the wire, for gateways and clients."""

from __future__ import annotations

import msgspec

from memserve.api.status import InstanceState, MediumTotals, MemberKind
from memserve.types import Epoch, InstanceId, Role


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

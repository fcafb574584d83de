"""Wire form of hot prefixes, in `GET /cluster/prefixes`. Imports nothing heavy, for clients."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from memserve.types import InstanceId


class PrefixHolder(msgspec.Struct, frozen=True, omit_defaults=True):
    """A holder of a prefix's last blocks. `blocks`: by medium; empty if a prompt was routed there
    and its KV events have not arrived yet."""

    instance: InstanceId
    blocks: Mapping[str, int] = {}


class PrefixView(msgspec.Struct, frozen=True, omit_defaults=True):
    """A prefix that prompts share, as far as the gateway knows. It ends where prompts diverge or
    holders differ. `own_tokens`: tokens after the previous such position."""

    id: str  # digest of the tenant and of all tokens
    tenant: str
    tokens: int
    own_tokens: int
    hits: int  # routed prompts that reused it, since gateway start or eviction from all holders
    age: float  # seconds since the last hit
    holders: tuple[PrefixHolder, ...]
    text: str | None = None  # text of `own_tokens`, shortened; only on request


class TenantSpace(msgspec.Struct, frozen=True):
    """Blocks of a tenant's prompts. `held`: a block with n holders counts n times."""

    tenant: str
    blocks: int
    held: int


class PrefixReport(msgspec.Struct, frozen=True):
    """The hottest prefixes, and the largest tenants, each best first; `left_out`: tenants that are
    not listed."""

    prefixes: tuple[PrefixView, ...] = ()
    tenants: tuple[TenantSpace, ...] = ()
    left_out: int = 0


def merged_reports(reports: list[PrefixReport], n: int) -> PrefixReport:
    """Return the joint report of a gateway's workers. Hits are added, since workers route different
    prompts; tenants are those of the first report, since all workers get the same KV events."""
    if len(reports) == 1:
        return reports[0]
    found: dict[str, PrefixView] = {}
    for report in reports:
        for each in report.prefixes:
            other = found.get(each.id)
            if other is not None:
                hits, age = each.hits + other.hits, min(each.age, other.age)
                each = msgspec.structs.replace(other, hits=hits, age=age)
            found[each.id] = each
    best = sorted(found.values(), key=lambda each: each.hits * each.own_tokens, reverse=True)
    return msgspec.structs.replace(reports[0], prefixes=tuple(best[:n]))

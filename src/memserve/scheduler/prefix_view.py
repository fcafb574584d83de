"""Wire form of hot prefixes, in `GET /cluster/prefixes`. Imports nothing heavy, for clients."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from memserve.types import InstanceId


class PrefixHolder(msgspec.Struct, frozen=True, omit_defaults=True):
    """A holder of a prefix's last blocks. `blocks`: by medium; none of a prompt that was sent there
    and is not confirmed yet."""

    instance: InstanceId
    blocks: Mapping[str, int] = {}


class PrefixView(msgspec.Struct, frozen=True, omit_defaults=True):
    """A prefix that prompts share, as far as the gateway knows. It ends where prompts part or
    holders differ; `own_tokens` are those since the last such place."""

    id: str  # digest of the tenant and of all tokens
    tenant: str
    tokens: int
    own_tokens: int
    hits: int  # prompts that found it here, since the gateway began or it was evicted everywhere
    age: float  # seconds since the last one
    holders: tuple[PrefixHolder, ...]
    text: str | None = None  # of `own_tokens`, shortened; only if it was asked for


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
    """Return one report of several workers of a gateway, which hear the same KV events and route
    different prompts: their hits add up. Tenants are the first one's."""
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

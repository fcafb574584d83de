"""Compatibility of KV layouts: whether blocks of one can be written into blocks of another."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from functools import lru_cache

import msgspec

from memserve.errors import LayoutMismatch
from memserve.pool.layout import KVLayout

# Fields for the placement of a block's bytes and for its heads; the others define their meaning.
_PLACEMENT = frozenset({"aggregated", "kv_heads", "head_start"})


@dataclass(frozen=True, slots=True)
class Identical:
    """The bytes of a block are the same in both; whole blocks are copied."""


@dataclass(frozen=True, slots=True)
class Convertible:
    """The same KV, placed differently: aggregated or discrete, or other shards of the heads."""

    heads: range  # common to both, numbered over the whole model
    complete: bool  # the target holds no others; if False, other shards send the rest


@lru_cache(maxsize=64)
def meaning(layout: KVLayout) -> bytes:
    """Return the SHA-256 of everything but placement. Pools that differ in it exchange no KV."""
    fields = {name: value for name, value in asdict(layout).items() if name not in _PLACEMENT}
    return hashlib.sha256(msgspec.json.encode(fields, order="sorted")).digest()


def compatibility(source: KVLayout, target: KVLayout) -> Identical | Convertible:
    """Return how blocks of `source` are written into blocks of `target`. Raises LayoutMismatch,
    with both fingerprints, if they have no KV in common: another model, dtype or block size, or
    disjoint heads."""
    if source == target:
        return Identical()
    ours, theirs = asdict(source), asdict(target)
    different = [name for name in ours if name not in _PLACEMENT and ours[name] != theirs[name]]
    if different:
        raise _mismatch(
            source, target, [f"{name} {ours[name]!r} and {theirs[name]!r}" for name in different]
        )
    heads = common_heads(source, target)
    if not heads:
        raise _mismatch(source, target, [f"KV heads {source.heads} and {target.heads}"])
    return Convertible(heads, complete=heads == target.heads)


def require_filled(source: KVLayout, target: KVLayout, what: str) -> None:
    """Raise LayoutMismatch unless blocks of `source` fill whole blocks of `target`."""
    heads = common_heads(source, target)
    if heads != target.heads:
        raise LayoutMismatch(
            f"{what} needs KV heads {target.heads} of layout {target.fingerprint}, but layout "
            f"{source.fingerprint} has only {heads}; pass `dst`, blocks that the receiver allocated"
        )


def common_heads(source: KVLayout, target: KVLayout) -> range:
    """Return the KV heads that both hold, numbered over the whole model; may be empty."""
    first = max(source.heads.start, target.heads.start)
    return range(first, max(first, min(source.heads.stop, target.heads.stop)))


def _mismatch(source: KVLayout, target: KVLayout, differences: list[str]) -> LayoutMismatch:
    return LayoutMismatch(
        f"KV layouts {source.fingerprint} and {target.fingerprint} differ: {', '.join(differences)}"
    )

"""Whether the KV of one layout can be written into blocks of another."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from functools import lru_cache

import msgspec

from memserve.errors import LayoutMismatch
from memserve.pool.layout import KVLayout

# Where the bytes of a block lie, and which heads it holds; all else says what they mean.
_PLACEMENT = frozenset({"aggregated", "kv_heads", "head_start"})


@dataclass(frozen=True, slots=True)
class Identical:
    """The bytes of a block are the same in both; whole blocks are copied."""


@dataclass(frozen=True, slots=True)
class Convertible:
    """The same KV in other places: aggregated and discrete, or other shards of the heads."""

    heads: range  # that both hold, numbered over the whole model
    complete: bool  # they are all that the target holds; otherwise other shards send the rest


@lru_cache(maxsize=64)
def meaning(layout: KVLayout) -> bytes:
    """SHA-256 over what the bytes mean, wherever they lie: pools that differ in it have
    nothing to say to each other."""
    fields = {name: value for name, value in asdict(layout).items() if name not in _PLACEMENT}
    return hashlib.sha256(msgspec.json.encode(fields, order="sorted")).digest()


def compatibility(source: KVLayout, target: KVLayout) -> Identical | Convertible:
    """How blocks of `source` go into blocks of `target`.

    Raises LayoutMismatch, with both fingerprints, where they hold no KV in common: another
    model, type or block size, or disjoint heads.
    """
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
    """Raises LayoutMismatch unless blocks of `source` make whole blocks of `target`."""
    heads = common_heads(source, target)
    if heads != target.heads:
        raise LayoutMismatch(
            f"{what} takes KV heads {target.heads} of layout {target.fingerprint}, and layout "
            f"{source.fingerprint} has {heads} of them; send into blocks of the receiver's (dst)"
        )


def common_heads(source: KVLayout, target: KVLayout) -> range:
    """The KV heads that both hold, numbered over the whole model; may be empty."""
    first = max(source.heads.start, target.heads.start)
    return range(first, max(first, min(source.heads.stop, target.heads.stop)))


def _mismatch(source: KVLayout, target: KVLayout, differences: list[str]) -> LayoutMismatch:
    return LayoutMismatch(
        f"KV layouts {source.fingerprint} and {target.fingerprint} differ: {', '.join(differences)}"
    )

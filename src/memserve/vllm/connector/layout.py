"""The pool's layout for vLLM's KV cache, and the checks of vLLM's version and cache type."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from memserve.errors import ConfigError
from memserve.pool.layout import DTYPES, KVLayout

# Heads are outermost in a page, so the pages of all tensor-parallel ranks in order are the page of
# a server with one rank. vLLM before 0.30 has another name, and some backends' pages differ.
LAYOUT = "LBHNC"
_FORMER_LAYOUT = "HND"
_NAMES = {dtype: name for name, dtype in DTYPES.items()} | {torch.uint8: "int8"}
# The lowest and the highest supported version of vLLM.
VERSIONS = ((0, 27), (0, 33))
_FULL = (0, 30)  # from here on vLLM recomputes failed loads with several KV cache groups, too


# Fields of a model's configuration that tell its source, and do not change the computation.
_ELSEWHERE = ("_name_or_path", "_commit_hash", "transformers_version")


class Spec(Protocol):
    """vLLM's `AttentionSpec`."""

    block_size: int
    num_kv_heads: int
    head_size: int
    page_size_bytes: int
    dtype: torch.dtype


class Group(Protocol):
    """vLLM's `KVCacheGroupSpec`."""

    layer_names: list[str]
    kv_cache_spec: Spec


class Version(NamedTuple):
    """vLLM's version, as far as the connector depends on it."""

    major: int
    minor: int

    @property
    def is_full(self) -> bool:
        """Whether failed loads are reported by request; otherwise by block."""
        return self >= _FULL

    @property
    def layout(self) -> str:
        """vLLM's name for the layout of pages that the pool can hold."""
        return LAYOUT if self.is_full else _FORMER_LAYOUT


def require_version(version: str) -> Version:
    """Parse vLLM's version. Raises ConfigError if it is not supported."""
    lowest, highest = (".".join(map(str, one)) for one in VERSIONS)
    try:
        major, minor = map(int, version.split(".")[:2])
    except ValueError:
        major, minor = -1, 0
    if not VERSIONS[0] <= (major, minor) <= VERSIONS[1]:
        raise ConfigError(
            f"MemServeConnector works with vLLM {lowest} to {highest}; this is {version}"
        )
    return Version(major, minor)


class Origin(NamedTuple):
    """The source of KV: servers with equal origins compute exchangeable KV."""

    model: str
    revision: str
    settings: str  # digest of the model's configuration
    packing: str  # everything else that the bytes depend on


def settings_digest(settings: Mapping[str, Any]) -> str:
    """Return the digest of a model's configuration, without its path and library version."""
    own = {name: value for name, value in settings.items() if name not in _ELSEWHERE}
    text = json.dumps(own, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def layout_of(groups: Sequence[Group], origin: Origin, ranks: int) -> KVLayout:
    """Return the layout of the pool. A block holds the pages of all layers, in the groups' order,
    of all tensor-parallel ranks.

    Raises ConfigError for a KV cache that does not fit into such blocks.
    """
    for group in groups:
        for name in ("num_kv_heads", "head_size", "dtype"):
            if not hasattr(group.kv_cache_spec, name):
                raise ConfigError(
                    f"the pool cannot hold a KV cache of {type(group.kv_cache_spec).__name__}; "
                    "attention with keys and values works, state-space layers do not"
                )
        slots = getattr(group.kv_cache_spec, "num_head_slots", None)
        if slots not in (None, group.kv_cache_spec.num_kv_heads):
            raise ConfigError(
                "the pool cannot hold a KV cache whose pages have all heads in one (of this "
                "attention backend); another one may have them apart"
            )
    first, *others = (group.kv_cache_spec for group in groups)
    for other in others:
        if (other.block_size, other.page_size_bytes) != (first.block_size, first.page_size_bytes):
            raise ConfigError("the layers' KV pages differ in size; the pool has one size of block")
    if first.dtype not in _NAMES:
        raise ConfigError(f"the pool has no KV of {first.dtype}; known: {', '.join(DTYPES)}")
    layout = KVLayout(
        layers=sum(len(group.layer_names) for group in groups),
        kv_heads=first.num_kv_heads * ranks,
        head_dim=first.head_size,
        dtype=_NAMES[first.dtype],
        block_tokens=first.block_size,
        model=origin.model,
        revision=origin.revision,
        rope=origin.settings,
        quantization=f"vllm {origin.packing}",
    )
    if layout.block_bytes != first.page_size_bytes * layout.layers * ranks:
        raise ConfigError(
            f"a KV page has {first.page_size_bytes} bytes, not keys and values of "
            f"{first.block_size} tokens alone: padded, compressed or replicated pages are not known"
        )
    return layout

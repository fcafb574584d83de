"""Which pools may exchange KV."""

from __future__ import annotations

from dataclasses import replace

import pytest

from memserve import KVLayout
from memserve.errors import ConfigError, LayoutMismatch
from memserve.transfer.conversion import Convertible, Identical, compatibility

WHOLE = KVLayout(layers=2, kv_heads=4, head_dim=8, dtype="bfloat16", model="m", revision="r1")


def shard(start: int, heads: int) -> KVLayout:
    return replace(WHOLE, kv_heads=heads, head_start=start)


def test_equal_layouts_exchange_whole_blocks() -> None:
    assert compatibility(WHOLE, replace(WHOLE)) == Identical()


def test_naming_all_heads_is_the_same_as_naming_none() -> None:
    assert replace(WHOLE, total_kv_heads=4).fingerprint == WHOLE.fingerprint


@pytest.mark.parametrize(
    ("source", "target", "plan"),
    [
        (WHOLE, replace(WHOLE, aggregated=False), Convertible(range(4), complete=True)),
        (WHOLE, shard(2, 2), Convertible(range(2, 4), complete=True)),
        (shard(2, 2), WHOLE, Convertible(range(2, 4), complete=False)),
        (shard(0, 2), shard(1, 1), Convertible(range(1, 2), complete=True)),
    ],
)
def test_placement_is_converted(source: KVLayout, target: KVLayout, plan: Convertible) -> None:
    assert compatibility(source, target) == plan


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (replace(WHOLE, model="other"), "model"),
        (replace(WHOLE, revision="r2"), "revision"),
        (replace(WHOLE, dtype="float16"), "dtype"),
        (replace(WHOLE, block_tokens=32), "block_tokens"),
        (replace(WHOLE, rope="yarn"), "rope"),
        (replace(WHOLE, kv_heads=4, total_kv_heads=8), "total_kv_heads"),
    ],
)
def test_bytes_of_another_meaning_are_refused(change: KVLayout, named: str) -> None:
    with pytest.raises(LayoutMismatch, match=named) as refusal:
        compatibility(WHOLE, change)
    assert WHOLE.fingerprint in str(refusal.value)
    assert change.fingerprint in str(refusal.value)


def test_shards_without_a_common_head_are_refused() -> None:
    with pytest.raises(LayoutMismatch, match="KV heads"):
        compatibility(shard(0, 2), shard(2, 2))


def test_a_shard_lies_within_the_model() -> None:
    with pytest.raises(ConfigError, match="heads 3 to 5 of 4"):
        shard(3, 2)

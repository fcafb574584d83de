"""KVLayout: the same logical tensor over different bytes, and what makes two layouts differ."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from memserve import KVLayout
from memserve.errors import ConfigError, LengthMismatch

LAYOUT = KVLayout(layers=3, kv_heads=2, head_dim=4, dtype="bfloat16", block_tokens=16, model="m")


def test_sizes_count_keys_and_values_of_all_layers() -> None:
    assert LAYOUT.token_bytes == 3 * 2 * 2 * 4 * 2
    assert LAYOUT.block_bytes == 16 * LAYOUT.token_bytes


def test_an_aggregated_block_is_one_run_of_bytes() -> None:
    memory = torch.zeros(5 * LAYOUT.block_bytes, dtype=torch.uint8)
    LAYOUT.views(memory, 5)[2] = 1.0
    touched = memory.nonzero().flatten()
    assert touched.min() >= 2 * LAYOUT.block_bytes
    assert touched.max() < 3 * LAYOUT.block_bytes
    assert LAYOUT.views(memory, 5)[2].is_contiguous()


def test_a_discrete_layer_is_one_run_of_bytes() -> None:
    layout = dataclasses.replace(LAYOUT, aggregated=False)
    memory = torch.zeros(5 * layout.block_bytes, dtype=torch.uint8)
    view = layout.views(memory, 5)
    assert view.shape == (5, *layout.block_shape)
    view[:, 1, 0] = 1.0  # keys of layer 1, all blocks
    piece = memory.numel() // (3 * 2)
    touched = memory.nonzero().flatten()
    assert 2 * piece <= touched.min()
    assert touched.max() < 3 * piece


def test_views_refuse_memory_of_another_size() -> None:
    with pytest.raises(LengthMismatch, match=f"10 bytes for 5 blocks of {LAYOUT.block_bytes}"):
        LAYOUT.views(torch.zeros(10, dtype=torch.uint8), 5)


@pytest.mark.parametrize(
    ("field", "other"),
    [
        ("layers", 4),
        ("kv_heads", 1),
        ("head_dim", 8),
        ("dtype", "float16"),
        ("block_tokens", 32),
        ("aggregated", False),
        ("model", "n"),
        ("revision", "abc"),
        ("rope", "yarn"),
        ("quantization", "fp8"),
    ],
)
def test_every_field_that_changes_the_bytes_changes_the_fingerprint(
    field: str, other: object
) -> None:
    # A kept total would refuse fewer heads as an error of its own.
    changes: dict[str, object] = {field: other, "total_kv_heads": 0}
    changed = dataclasses.replace(LAYOUT, **changes)  # type: ignore[arg-type]
    assert changed.fingerprint != LAYOUT.fingerprint


def test_equal_layouts_have_equal_fingerprints() -> None:
    assert dataclasses.replace(LAYOUT).fingerprint == LAYOUT.fingerprint


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [("layers", 0, "layers is 0"), ("head_dim", -1, "head_dim is -1"), ("dtype", "f32", "'f32'")],
)
def test_impossible_layouts_are_refused(field: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(LAYOUT, **{field: value})  # type: ignore[arg-type]

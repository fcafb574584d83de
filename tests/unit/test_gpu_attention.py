"""The GPU's attention kernels, in shapes that models have, against PyTorch's attention."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from memserve.engine.attention import Span
from memserve.engine.torch_attention import TorchAttention

pytest.importorskip("triton", reason="Triton is not installed (Linux has it): pip install triton")
from memserve.engine.gpu.attention import TritonAttention
from memserve.engine.gpu.step_tables import StepTables, padding_tiles
from tests.compile_attention import output_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter does not compute in bfloat16.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
BLOCK_TOKENS = 16

# heads, kv_heads, dim: Llama 3, Gemma 3 270M, Phi 2, one KV head for very many, no groups
SHAPES = [(32, 8, 128), (4, 1, 256), (6, 6, 80), (40, 1, 64), (14, 2, 64)]


def spans_of(shapes: list[tuple[int, int]], rng: np.random.Generator) -> tuple[list[Span], int]:
    """Spans of (context, length), and the blocks of a pool that hold them."""
    held = [-(-(context + length) // BLOCK_TOKENS) for context, length in shapes]
    order = rng.permutation(sum(held) + 3)
    spans, row, taken = [], 0, 0
    for (context, length), blocks in zip(shapes, held, strict=True):
        spans.append(Span(row, length, context, order[taken : taken + blocks]))
        row, taken = row + length, taken + blocks
    return spans, sum(held) + 3


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), SHAPES)
@pytest.mark.parametrize("aggregated", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_equals_attention_of_pytorch(
    heads: int, kv_heads: int, dim: int, aggregated: bool, dtype: torch.dtype
) -> None:
    """Long and short decodes, and prefills of one tile and of more, in one step."""
    rng = np.random.default_rng(dim)
    torch.manual_seed(dim)
    decodes = [(500, 1), (3, 1), (0, 1)]
    spans, blocks = spans_of([*decodes, (0, 37), (45, 50)], rng)
    rows = sum(span.length for span in spans)
    # An aggregated block has all layers; this is one of three.
    layers = (3,) if aggregated else ()
    pool = torch.randn(blocks, *layers, 2, BLOCK_TOKENS, kv_heads, dim, device=DEVICE, dtype=dtype)
    # One product's columns are queries, keys and values: no part is contiguous.
    packed = torch.randn(rows, heads + 2 * kv_heads, dim, device=DEVICE, dtype=dtype)
    q, k, v = packed.split([heads, kv_heads, kv_heads], dim=1)
    results, pools = [], []
    for make in (lambda p: TorchAttention([p], dtype), lambda p: TritonAttention([p], heads)):
        mine = pool.clone()
        backend = make(mine[:, 1] if aggregated else mine)
        backend.plan(spans, len(decodes))
        results.append(backend.run(0, q, k, v, dim**-0.5, None, None))
        pools.append(mine)
    tolerance = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    assert torch.equal(*pools)
    torch.testing.assert_close(results[1], results[0], atol=tolerance, rtol=tolerance)


def test_padding_writes_nothing_and_sees_nothing() -> None:
    pool = torch.randn(4, 2, BLOCK_TOKENS, 2, 32, device=DEVICE)
    before = pool.clone()
    backend = TritonAttention([pool], 4)
    rows = 2
    backend.use(
        StepTables(
            places=torch.full((rows,), -1, dtype=torch.int32, device=DEVICE),
            decodes=torch.from_numpy(padding_tiles(range(rows)).astype(np.int32)).to(DEVICE),
            prefills=torch.empty(0, 4, dtype=torch.int32, device=DEVICE),
            blocks=torch.zeros(8, dtype=torch.int32, device=DEVICE),
        )
    )
    q = torch.randn(rows, 4, 32, device=DEVICE)
    k, v = torch.randn(2, rows, 2, 32, device=DEVICE)

    assert not backend.run(0, q, k, v, 1.0, None, None).any()
    assert torch.equal(pool, before)


def test_each_layer_is_told_after_its_keys_are_written() -> None:
    pools = list(torch.zeros(2, 3, 2, BLOCK_TOKENS, 1, 32, device=DEVICE))
    backend = TritonAttention(pools, 2)
    told: list[tuple[int, bool]] = []
    spans = [Span(0, 20, 0, np.array([2, 0]))]
    backend.plan(spans, 0, lambda layer: told.append((layer, bool(pools[layer][2].all()))))
    for layer in range(2):
        q, k = torch.ones(20, 2, 32, device=DEVICE), torch.ones(20, 1, 32, device=DEVICE)
        backend.run(layer, q, k, k, 1.0, None, None)
    assert told == [(0, True), (1, True)]


def test_kernels_compile_for_gpus() -> None:
    """Without a GPU too: the compiler needs none. What one multiprocessor has must suffice."""
    assert "36 kernels" in output_of("tests.compile_attention")

"""Paged attention against the definition: dense softmax over each sequence's own context.

Without a GPU, Triton's interpreter runs the GPU's kernels.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memserve.engine.attention import AttentionBackend, Span, paged_attention
from memserve.engine.torch_attention import TorchAttention
from memserve.errors import ModelError

pytest.importorskip("triton", reason="Triton is not installed (Linux has it): pip install triton")
from memserve.engine.gpu.attention import TritonAttention

BLOCK_TOKENS, DIM = 4, 8
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("torch", "triton")


def backend_of(name: str, view: torch.Tensor, heads: int) -> AttentionBackend:
    if name == "torch":
        return TorchAttention([view], view.dtype)
    return TritonAttention([view], heads)


def dense(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    first: int,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """q [queries, heads, dim] at positions first.., k and v [keys, kv_heads, dim] from 0."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    query = torch.arange(first, first + len(q), device=q.device)[:, None]
    key = torch.arange(len(k), device=q.device)
    hidden = key > query
    if window is not None:
        hidden |= key <= query - window
    weights = torch.softmax(scores.masked_fill(hidden, -torch.inf), -1)
    return torch.einsum("hqk,khd->qhd", weights, v)


lengths = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 25)), max_size=4)


@pytest.mark.parametrize("name", BACKENDS)
@settings(max_examples=60, deadline=None)
@given(
    contexts=st.lists(st.integers(0, 40), max_size=6),
    prefills=lengths,
    window=st.none() | st.integers(1, 20),
    softcap=st.none() | st.just(5.0),
    kv_heads=st.sampled_from([1, 2]),
    groups=st.sampled_from([1, 3]),
    seed=st.integers(0, 1000),
)
def test_equals_dense_attention(
    name: str,
    contexts: list[int],
    prefills: list[tuple[int, int]],
    window: int | None,
    softcap: float | None,
    kv_heads: int,
    groups: int,
    seed: int,
) -> None:
    shapes = [(c, 1) for c in contexts] + prefills
    if not shapes:
        return
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    needed = sum(-(-(c + n) // BLOCK_TOKENS) for c, n in shapes)
    # The second of two layers, so that a wrong layer shows; one block that nobody owns.
    view = torch.randn(needed + 1, 2, 2, BLOCK_TOKENS, kv_heads, DIM, device=DEVICE)[:, 1]
    order = rng.permutation(needed)
    spans, row, taken = [], 0, 0
    for context, count in shapes:
        held = -(-(context + count) // BLOCK_TOKENS)
        spans.append(Span(row, count, context, order[taken : taken + held]))
        row, taken = row + count, taken + held
    q = torch.randn(1, kv_heads * groups, row, DIM, device=DEVICE)
    k, v = torch.randn(2, 1, kv_heads, row, DIM, device=DEVICE)
    backend = backend_of(name, view, kv_heads * groups)
    backend.plan(spans, len(contexts))
    untouched = view[needed].clone()

    out, _ = paged_attention(
        SimpleNamespace(layer_idx=0),  # type: ignore[arg-type]
        q,
        k,
        v,
        None,
        backend=backend,
        scaling=0.3,
        sliding_window=window,
        softcap=softcap,
    )

    assert torch.equal(view[needed], untouched)
    for span in spans:
        rows = slice(span.start, span.start + span.length)
        blocks = torch.from_numpy(span.blocks).to(DEVICE)
        keys = view[blocks, 0].flatten(0, 1)[: span.total]
        values = view[blocks, 1].flatten(0, 1)[: span.total]
        assert torch.equal(keys[span.context :], k[0, :, rows].transpose(0, 1)), "not written"
        expected = dense(
            q[0, :, rows].transpose(0, 1), keys, values, span.context, 0.3, window, softcap
        )
        torch.testing.assert_close(out[0, rows], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", BACKENDS)
def test_what_it_cannot_compute_is_refused(name: str) -> None:
    view = torch.zeros(1, 2, BLOCK_TOKENS, 1, DIM)
    backend = backend_of(name, view, 1)
    backend.plan([Span(0, 1, 0, np.array([0]))], 1)
    layer = SimpleNamespace(layer_idx=0)
    q, wide = torch.zeros(1, 1, 1, DIM), torch.zeros(1, 1, 1, 2 * DIM)
    with pytest.raises(ModelError, match="sinks"):
        paged_attention(layer, q, q, q, None, backend=backend, s_aux=torch.zeros(1))  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="8 and 16 dimensions"):
        paged_attention(layer, q, q, wide, None, backend=backend)  # type: ignore[arg-type]

"""Models in bfloat16 on a CPU: packed weights and compiled kernels compute what Transformers' own
layers do, and one row does not depend on the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - PyTorch's own convention
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from memserve.api.generate import SamplingParams
from memserve.engine import kernels
from memserve.engine import model as engine_model
from memserve.engine.attention import Span
from memserve.engine.compiled_layers import CompiledLayers
from memserve.engine.fused import FusedGemma3Layer, FusedLayer, FusedLlamaLayer, RowNorm, fuse
from memserve.engine.linear import PackedLinear, SharedLinear, has_bfloat16_kernels
from memserve.engine.model import Model, load_model
from memserve.engine.sampler import sample
from memserve.engine.torch_attention import TorchAttention
from tests.engine_harness import running_engine
from tests.sampler_reference import state
from tests.tiny_models import QWEN2, VOCAB, WINDOW, save_tiny_model

BF16 = torch.bfloat16
BLOCK_TOKENS = 16


def load(directory: Path) -> Model:
    return load_model(directory, BF16, torch.device("cpu"))


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(BF16)


def prompt(length: int, seed: int = 0) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(3, VOCAB, length)]


class Steps:
    """A model and memory of its own, run step by step."""

    def __init__(self, model: Model, blocks: int = 32) -> None:
        self.model = model
        shape = model.shape
        block = (2, BLOCK_TOKENS, shape.kv_heads, shape.head_dim)
        views = [torch.zeros(blocks, *block, dtype=BF16) for _ in range(shape.layers)]
        self.attention = TorchAttention(views, BF16)

    def run(self, spans: list[tuple[int, list[int], list[int]]], decodes: int) -> torch.Tensor:
        """`spans`: (context, tokens, blocks). Returns the logits of each span's last token."""
        packed, keep, row = [], [], 0
        for context, tokens, blocks in spans:
            packed.append(Span(row, len(tokens), context, np.array(blocks)))
            row += len(tokens)
            keep.append(row - 1)
        self.attention.plan(packed, decodes)
        tokens_ = torch.tensor([t for _, tokens, _ in spans for t in tokens])
        positions = torch.cat([torch.arange(s.context, s.total) for s in packed])
        with torch.inference_mode():
            return self.model.forward(tokens_, positions, torch.tensor(keep), self.attention)


def run_some(model: Model) -> list[torch.Tensor]:
    """Prompts alone and together, a continued one, then a batch that decodes."""
    steps = Steps(model)
    first, second = prompt(50, 1), prompt(23, 2)
    logits = [
        steps.run([(0, first[:32], [3, 4])], 0),
        steps.run([(32, first[32:], [3, 4, 5, 6]), (0, second, [8, 9])], 0),
    ]
    for step in range(3):
        spans = [(50 + step, [7 + step], [3, 4, 5, 6]), (23 + step, [9 + step], [8, 9])]
        logits.append(steps.run(spans, 2))
    logits.append(steps.run([(53, [5], [3, 4, 5, 6])], 1))
    return logits


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen2", "qwen3", "mistral"])
def test_fused_layers_compute_what_transformers_do(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = save_tiny_model(name, tmp_path, config=QWEN2 if name == "qwen2" else None)
    model = load(directory)
    assert any(isinstance(m, FusedLayer) for m in model.module.modules())
    fused = run_some(model)
    monkeypatch.setattr(engine_model, "fuse", lambda *_: None)
    monkeypatch.setattr(engine_model, "speed_up_products", lambda _: None)
    plain = run_some(load(directory))
    for ours, theirs in zip(fused, plain, strict=True):
        scale = float(theirs.float().std())
        assert float((ours.float() - theirs.float()).abs().max()) < 0.1 * scale
        assert float((ours.float() - theirs.float()).abs().mean()) < 0.01 * scale


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_attention_is_planned_once_a_step_and_run_once_a_layer(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(save_tiny_model("gemma3", tmp_path), dtype, torch.device("cpu"))
    steps: list[list[tuple[int, int | None]]] = []  # of each: layers and windows
    plan, run = TorchAttention.plan, TorchAttention.run

    def planned(self: TorchAttention, *given: object) -> None:
        steps.append([])
        plan(self, *given)  # type: ignore[arg-type]

    def ran(self: TorchAttention, *given: Any) -> torch.Tensor:
        steps[-1].append((given[0], given[5]))
        return run(self, *given)

    monkeypatch.setattr(TorchAttention, "plan", planned)
    monkeypatch.setattr(TorchAttention, "run", ran)
    with running_engine(model, max_tokens=32) as engine:
        engine.run(prompt(70), 3)
        assert len(steps) == engine.engine.stats().steps == 3 + 2  # chunks of a prompt, then tokens
    layers = [(0, WINDOW), (1, None), (2, WINDOW), (3, None)]
    assert steps == [layers] * len(steps)


def test_which_layers_are_replaced(tmp_path: Path) -> None:
    for name, layer in (("llama", FusedLlamaLayer), ("gemma3", FusedGemma3Layer)):
        directory = save_tiny_model(name, tmp_path)
        modules = list(load(directory).module.modules())
        assert any(isinstance(m, layer) for m in modules)
        assert any(isinstance(m, RowNorm) for m in modules)
        assert any(isinstance(m, PackedLinear) for m in modules) == has_bfloat16_kernels()
        plain = load_model(directory, torch.float32, torch.device("cpu")).module.modules()
        assert not any(isinstance(m, layer | RowNorm | PackedLinear) for m in plain)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_sequence_is_the_same_alone_and_in_a_batch(name: str, tmp_path: Path) -> None:
    """Chunked, batched, cached: greedy tokens differ only where two logits are (nearly) equal."""
    model = load(save_tiny_model(name, tmp_path))
    prompts = [prompt(30 + 7 * i, i) for i in range(4)]
    with running_engine(model) as engine:
        alone = [engine.run(p, 12) for p in prompts]
    with running_engine(model, max_tokens=16) as engine:
        together = engine.finish(*(engine.submit(p, 12) for p in prompts))
        again = engine.finish(*(engine.submit(p, 12) for p in prompts))
    equal = [a[:4] == b[:4] for a, b in zip(alone * 2, [*together, *again], strict=True)]
    assert sum(equal) >= len(equal) - 2


@pytest.mark.parametrize("rows", [1, 2, 5, 40])
@pytest.mark.parametrize("bias", [False, True])
def test_products(rows: int, bias: bool) -> None:
    if not has_bfloat16_kernels():
        pytest.skip("this CPU has no bfloat16 kernels in oneDNN (AVX512 is needed)")
    plain = torch.nn.Linear(64, 96, bias=bias, dtype=BF16)
    x = random(1, rows, 64)
    with torch.inference_mode():
        expected = plain(x)
        for kind in (SharedLinear, PackedLinear):
            layer = torch.nn.Linear(64, 96, bias=bias, dtype=BF16)
            layer.load_state_dict(plain.state_dict())
            layer.__class__ = kind
            if isinstance(layer, PackedLinear):
                layer.pack()
            torch.testing.assert_close(layer(x), expected, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("kind", [Gemma3RMSNorm, LlamaRMSNorm])
@pytest.mark.parametrize("shape", [(1, 1, 64), (1, 7, 64), (1, 2, 5, 64)])
def test_norms(kind: type[torch.nn.Module], shape: tuple[int, ...]) -> None:
    norm = kind(64, eps=1e-5).to(BF16)
    norm.weight.data = random(64, seed=1)
    model = torch.nn.Sequential(norm)
    x = random(*shape).transpose(1, 2) if len(shape) == 4 else random(*shape)
    with torch.inference_mode():
        expected = norm(x)
        fuse(model, CompiledLayers(), torch.device("cpu"))
        assert isinstance(model[0], RowNorm)
        torch.testing.assert_close(model(x), expected, atol=0, rtol=0.008)  # a unit at most


def test_rotation() -> None:
    kernels.prepare()
    x = random(7, 3, 16)
    angles = torch.arange(7)[:, None] * torch.rand(16)[None]
    cos, sin = angles.cos().to(BF16), angles.sin().to(BF16)
    heads_first = x.transpose(0, 1)[None]
    expected, _ = apply_rotary_pos_emb(heads_first, heads_first, cos[None], sin[None])
    kernels.rotate.run(*(t.view(torch.uint16).numpy() for t in (x, cos, sin)))
    assert torch.equal(x, expected[0].transpose(0, 1))


def test_gelu_of_every_number() -> None:
    kernels.prepare()
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(BF16).view(1, -1)
    factor = torch.full_like(x, 1.5)
    expected = F.gelu(x.double(), approximate="tanh").to(BF16) * factor
    gate = x.clone()
    kernels.gelu_gate.run(*(t.view(torch.uint16).numpy() for t in (gate, factor)))
    finite = x.isfinite()
    # A unit, where the other one does not lose its digits to cancellation.
    torch.testing.assert_close(gate[finite], expected[finite], atol=1e-6, rtol=0.008)
    assert gate[x.isnan()].isnan().all()


@pytest.mark.parametrize("rows", [1, 2, 16])
def test_greedy_over_transposed_logits(rows: int) -> None:
    """Ties, zeros, infinities and NaNs of either sign as numpy's argmax has them."""
    columns = random(1000, rows)
    columns[100:, 0] = columns[:, 0].max()
    if rows > 1:
        columns[:, 1] = -columns[:, 1].abs()
        columns[[400, 500], 1] = torch.tensor([-0.0, 0.0], dtype=BF16)
    if rows > 4:
        columns[7, 2] = torch.inf
        columns[8, 3] = torch.nan
        columns[9:11, 4] = torch.tensor([-0x40, -0x40], dtype=torch.int16).view(BF16)  # -NaN
        columns[:, 5] = -torch.inf
    logits = columns.t()
    greedy = [state(SamplingParams(temperature=0))] * rows
    assert [s.token for s in sample(logits, greedy)] == logits.float().numpy().argmax(1).tolist()

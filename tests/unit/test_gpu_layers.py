"""Layers on a GPU: Triton's kernels compute what Transformers' modules do, in every dtype, and so
do the models that they are put into. Without a GPU, Triton's interpreter runs them."""

from __future__ import annotations

import copy
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM
from transformers.activations import ACT2FN
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from memserve.engine import attention
from memserve.engine import model as engine_model
from memserve.engine.attention import Span
from memserve.engine.fused import FusedLayer, RowNorm, fuse
from memserve.engine.layer_ops import Activation
from memserve.engine.model import layer_ops
from memserve.engine.torch_attention import TorchAttention
from tests.engine_harness import load, running_engine
from tests.tiny_models import CONFIGS, QWEN2, VOCAB, Reference, save_tiny_model

pytest.importorskip("triton", reason="Triton is not installed (Linux has it): pip install triton")
from triton.runtime import interpreter

from memserve.engine.gpu import layer_kernels as kernels
from memserve.engine.gpu.layers import TritonLayers
from tests.compile_attention import output_of

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
OPS = TritonLayers()
MODELS = {**CONFIGS, "qwen2": QWEN2}
TYPES = [torch.float32, torch.float16, torch.bfloat16]
# Relative; a unit of the two-byte types.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def _bfloat16_as_gpus_round(data: Any, source: Any, target: Any, mode: Any) -> Any:
    """Stands for the interpreter's conversion, which cuts the lower half of a float32 off."""
    if target.name == "bf16":
        rounded = torch.from_numpy(np.array(data)).to(torch.bfloat16)
        return rounded.view(torch.uint16).numpy()
    assert (source.name, target.name) == ("bf16", "fp32")
    return torch.from_numpy(np.array(data)).view(torch.bfloat16).float().numpy()


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have models fused as for a GPU, wherever they are."""
    if not ON_GPU:
        monkeypatch.setattr(interpreter, "_convert_float", _bfloat16_as_gpus_round)
        monkeypatch.setattr(engine_model, "runs_triton", lambda device: True)


def random(*shape: int, dtype: torch.dtype, seed: int = 0, scale: float = 1.0) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale
    return values.to(DEVICE, dtype)


def assert_close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=TOLERANCE[got.dtype], atol=0)


def norm_of(kind: type[nn.Module], width: int, dtype: torch.dtype, seed: int = 1) -> nn.Module:
    """Transformers' module."""
    norm = kind(width, eps=0.01).to(DEVICE, dtype)
    norm.weight.data = random(width, dtype=dtype, seed=seed)
    return norm.requires_grad_(False)


def ours_for(norm: nn.Module) -> RowNorm:
    """What takes the place of Transformers' module."""
    parent = nn.Sequential(norm)
    fuse(parent, OPS, DEVICE)
    ours = parent[0]
    assert isinstance(ours, RowNorm)
    return ours


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Gemma3RMSNorm])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(1, 1, 80), (1, 5, 640), (2, 3, 4, 32)])
def test_norms(kind: type[nn.Module], dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    norm = norm_of(kind, shape[-1], dtype)
    ours = ours_for(norm)
    x = random(*shape, dtype=dtype, scale=3)
    residual = random(*shape, dtype=dtype, seed=2)
    assert_close(ours(x), norm(x))
    assert_close(ours(x.transpose(0, 1)), norm(x.transpose(0, 1)))

    total = residual.clone()
    assert_close(ours.of_sum(total, x), norm(residual + x))
    assert torch.equal(total, residual + x)

    total = residual.clone()
    ours.add_to(total, x.clone())
    # Where the terms cancel, a unit of the norm is many of the sum.
    larger = torch.maximum(norm(x).abs(), residual.abs())
    unit = TOLERANCE[dtype] * larger.float()
    assert ((total.float() - (residual + norm(x)).float()).abs() <= unit).all()


@pytest.mark.parametrize("kind", [None, LlamaRMSNorm, Gemma3RMSNorm])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "dim"), [(1, 4, 2, 32), (3, 5, 1, 80), (2, 20, 3, 64)]
)
def test_rotation(
    kind: type[nn.Module] | None,
    dtype: torch.dtype,
    tokens: int,
    heads: int,
    kv_heads: int,
    dim: int,
) -> None:
    """Of queries and keys that are columns of one product; the values' columns stay."""
    packed = random(tokens, heads + 2 * kv_heads, dim, dtype=dtype)
    before = packed.clone()
    q, k, v = packed.split([heads, kv_heads, kv_heads], 1)
    # Unlike Transformers' angles, these differ between the halves.
    angles = torch.arange(tokens, device=DEVICE)[:, None] * random(1, dim, dtype=torch.float32) + 1
    cos, sin = angles.cos().to(dtype)[None], angles.sin().to(dtype)[None]
    parts = list(before.split([heads, kv_heads, kv_heads], 1))
    norms = None
    if kind is not None:
        q_norm, k_norm = (norm_of(kind, dim, dtype, seed) for seed in (1, 2))
        parts = [q_norm(parts[0]), k_norm(parts[1])]
        norms = (ours_for(q_norm).norm, ours_for(k_norm).norm)
    heads_first = [part.transpose(0, 1)[None] for part in parts[:2]]
    rotated = apply_rotary_pos_emb(*heads_first, cos, sin)

    OPS.rotate(q, k, cos, sin, norms)

    for got, theirs in zip((q, k), rotated, strict=True):
        want = theirs[0].transpose(0, 1)
        if kind is None:
            assert torch.equal(got, want)
        else:  # two products of numbers that may be a unit apart
            largest = got.float().abs().amax(-1, keepdim=True)
            apart = (got.float() - want.float()).abs()
            assert (apart <= 2 * TOLERANCE[dtype] * largest).all()
            if dtype is not torch.float32:  # in which hardly any sum is the same
                assert (apart > 0).float().mean() < 0.02
    assert torch.equal(v, before[:, heads + kv_heads :])


@pytest.mark.parametrize(
    ("name", "activation"),
    [("silu", Activation.SILU), ("gelu_pytorch_tanh", Activation.GELU_TANH)],
)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 80), (3, 1500)])
def test_gate(name: str, activation: Activation, dtype: torch.dtype, rows: int, width: int) -> None:
    gate, up = random(1, rows, 2 * width, dtype=dtype, scale=2).split(width, -1)
    expected = ACT2FN[name](gate) * up
    got = OPS.gate(gate, up, activation)
    assert got.is_contiguous()
    # Two roundings, each of which may go another way. PyTorch's gelu loses digits below zero.
    torch.testing.assert_close(got, expected, rtol=2 * TOLERANCE[dtype], atol=2e-6)
    if dtype is not torch.float32:
        assert (got != expected).float().mean() < 0.02


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of infinities
@pytest.mark.parametrize("name", ["silu", "gelu_pytorch_tanh"])
def test_activation_of_every_number(name: str) -> None:
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16).view(1, -1).to(DEVICE)
    kind = Activation.SILU if name == "silu" else Activation.GELU_TANH
    got = OPS.gate(x, torch.ones_like(x), kind)
    expected = ACT2FN[name](x.double()).to(torch.bfloat16)
    finite = x.isfinite()
    torch.testing.assert_close(got[finite], expected[finite], rtol=2**-7, atol=1e-6)
    assert got[x.isnan()].isnan().all()


def random_model(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """One of `MODELS` with random weights, gains and biases, and the engine's attention."""
    attention.register()
    torch.manual_seed(0)
    config = copy.deepcopy(MODELS[name])
    if name != "llama":
        config.sliding_window = config.sliding_window and 7  # short prompts are quick
    model = AutoModelForCausalLM.from_config(
        config, dtype=dtype, attn_implementation=attention.ATTENTION_NAME
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval().requires_grad_(False)


class Steps:
    """Steps of one model, with memory of its own."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        config = model.config
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        block = (2, 16, config.num_key_value_heads, dim)
        views = [
            torch.zeros(8, *block, dtype=dtype, device=DEVICE)
            for _ in range(config.num_hidden_layers)
        ]
        self._backend = TorchAttention(views, dtype)
        self._model = model.to(DEVICE)

    def run(self, spans: list[Span], decodes: int) -> Tensor:
        """The logits of all rows, for tokens that their positions tell."""
        self._backend.plan(spans, decodes)
        positions = torch.cat([torch.arange(s.context, s.total) for s in spans]).to(DEVICE)
        with torch.inference_mode():
            return self._model(
                input_ids=((positions * 7919 + 5) % VOCAB)[None],
                position_ids=positions[None],
                use_cache=False,
                backend=self._backend,
            ).logits[0]


FIRST, SECOND = np.array([4, 1]), np.array([5])  # blocks
PROMPT = [Span(0, 10, 0, FIRST), Span(10, 3, 0, SECOND)], 0  # one is longer than the window
DECODES = [Span(0, 1, 10, FIRST), Span(1, 1, 3, SECOND)], 2


def assert_near(got: Tensor, expected: Tensor) -> None:
    """Assert that logits differ as the order of a product's sums lets them."""
    scale = float(expected.float().std())
    apart = (got.float() - expected.float()).abs() / scale
    if got.dtype is torch.float32:
        assert float(apart.max()) < 1e-5
    else:
        assert float(apart.max()) < 0.1
        assert float(apart.mean()) < 0.01


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_computes_what_it_did(name: str, dtype: torch.dtype) -> None:
    model = random_model(name, dtype)
    fused = copy.deepcopy(model)
    fuse(fused, OPS, DEVICE)
    assert all(isinstance(layer, FusedLayer) for layer in fused.model.layers)
    plain, ours = Steps(model, dtype), Steps(fused, dtype)
    for step in (PROMPT, DECODES):
        assert_near(ours.run(*step), plain.run(*step))


@pytest.mark.parametrize("name", list(MODELS))
def test_a_loaded_model_generates_what_transformers_do(name: str, tmp_path: Path) -> None:
    directory = save_tiny_model(name, tmp_path, config=MODELS[name])
    model = load(directory, str(DEVICE))
    assert any(isinstance(m, FusedLayer) for m in model.module.modules())
    tokens = [int(t) for t in np.random.default_rng(3).integers(3, VOCAB, 18)]
    with running_engine(model) as engine:
        assert engine.run(tokens, 3) == Reference(directory).generate(tokens, 3)


@pytest.mark.parametrize("name", list(MODELS))
def test_no_weight_is_held_twice(name: str) -> None:
    model = random_model(name)
    fused = copy.deepcopy(model)
    fuse(fused, OPS, DEVICE)
    gains = sum(m.norm.gain.numel() for m in fused.modules() if isinstance(m, RowNorm))
    held = {p.data_ptr(): p.untyped_storage().nbytes() for p in fused.parameters()}
    assert sum(held.values()) + 4 * gains == 4 * sum(p.numel() for p in model.parameters())
    assert not any(p.requires_grad for p in fused.parameters())


def test_layers_with_unknown_parts_stay_transformers_own() -> None:
    model = random_model("llama")
    expected = Steps(copy.deepcopy(model), torch.float32).run(*PROMPT)
    quantized, relu, fused = model.model.layers
    quantized.mlp.up_proj.__class__ = type("LinearOfAnotherFormat", (nn.Linear,), {})
    relu.mlp.act_fn = nn.Identity()
    fuse(model, OPS, DEVICE)
    layers = [isinstance(layer, FusedLayer) for layer in (quantized, relu, fused)]
    assert layers == [False, False, True]
    relu.mlp.act_fn = nn.SiLU()
    assert_near(Steps(model, torch.float32).run(*PROMPT), expected)


def test_a_model_of_another_dtype_stays_as_it_is() -> None:
    model = random_model("llama", torch.float64)
    before = [type(m) for m in model.modules()]
    fuse(model, OPS, DEVICE)
    assert [type(m) for m in model.modules()] == before


def test_without_triton_a_gpu_computes_transformers_own_layers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert isinstance(layer_ops(DEVICE), TritonLayers)
    monkeypatch.setattr(engine_model, "runs_triton", lambda device: False)
    assert layer_ops(torch.device("cuda")) is None


class Launches(TorchDispatchMode):
    """Names of what PyTorch computes meanwhile, and of our kernels and attention."""

    FREE = frozenset(
        {"_unsafe_view", "empty", "empty_like", "split", "split_with_sizes", "t", "view"}
    )

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.names: list[str] = []
        for name in ("rms_norm", "add_and_norm", "norm_and_add", "rotate", "gate"):
            monkeypatch.setattr(kernels, name, self._kernel(name))

    def _kernel(self, name: str) -> dict[Any, Any]:
        launch = lambda *_, **__: self.names.append(name)  # noqa: E731
        return defaultdict(lambda: launch)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in self.FREE:
            self.names.append(name)
        return func(*args, **(kwargs or {}))

    def run(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *_: object) -> Tensor:
        """Attention."""
        self.names.append("attention")
        return torch.empty(q.shape, dtype=q.dtype, device=q.device)


LLAMA = ["rms_norm", "mm", "rotate", "attention", "mm", "add_and_norm", "mm", "gate", "mm", "add_"]
BIASED = ["rms_norm", "addmm", *LLAMA[2:]]
GEMMA3 = [*LLAMA[:5], "norm_and_add", "rms_norm", *LLAMA[6:9], "norm_and_add"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", LLAMA),
        ("mistral", LLAMA),
        ("qwen2", BIASED),
        ("qwen3", LLAMA),
        ("gemma3", GEMMA3),
    ],
)
def test_what_a_layer_launches(
    name: str, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing else: no copies of what a product or attention takes."""
    model = random_model(name)
    fuse(model, OPS, DEVICE)
    layer = model.to(DEVICE).model.layers[0]
    x, cos, sin = (torch.zeros(1, 3, n, device=DEVICE) for n in (64, *[layer.attention.dim] * 2))
    with torch.no_grad(), Launches(monkeypatch) as launches:
        layer(x, position_embeddings=(cos, sin), backend=launches)
    assert launches.names == expected


def test_kernels_compile_for_gpus() -> None:
    """Without a GPU too: the compiler needs none."""
    assert "40 kernels" in output_of("tests.compile_layers")

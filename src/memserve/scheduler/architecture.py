"""`Architecture`: sizes of a transformer, and what it computes per token on each device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from memserve.errors import ModelError

_Count = Annotated[int, Meta(ge=1)]

_DTYPE_BYTES = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int8": 1,
}


class MatMul(msgspec.Struct, frozen=True):
    """A weight matrix [outputs, inputs] that a step's tokens are multiplied with, on one device."""

    outputs: int
    inputs: int
    count: int  # number of layers with such a matrix

    @property
    def weights(self) -> int:
        return self.outputs * self.inputs * self.count


class Architecture(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A dense decoder. Each device holds 1/`tensor_parallel` of it."""

    name: str
    layers: _Count
    hidden: _Count
    heads: _Count
    kv_heads: _Count
    head_dim: _Count
    intermediate: _Count
    vocab: _Count
    gated: bool = True  # the MLP has three matrices, else two
    window: Annotated[int, Meta(ge=0)] = 0  # tokens that sliding-window layers attend to
    window_layers: Annotated[int, Meta(ge=0)] = 0
    weight_bytes: _Count = 2  # bytes of one weight
    kv_bytes: _Count = 2  # bytes of one element of K or V
    tensor_parallel: _Count = 1

    @property
    def full_layers(self) -> int:
        """Number of layers with full attention."""
        return self.layers - self.window_layers

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of K and V of one token, all layers, sum over devices."""
        return self.layers * 2 * self.kv_heads * self.head_dim * self.kv_bytes

    @property
    def layer_matmuls(self) -> tuple[MatMul, ...]:
        """Matrices that every token passes, on one device."""
        tp = self.tensor_parallel
        query = self.heads * self.head_dim
        key_value = 2 * self.kv_heads * self.head_dim
        up = self.intermediate * (2 if self.gated else 1)
        return (
            MatMul(-(-(query + key_value) // tp), self.hidden, self.layers),
            MatMul(self.hidden, -(-query // tp), self.layers),
            MatMul(-(-up // tp), self.hidden, self.layers),
            MatMul(self.hidden, -(-self.intermediate // tp), self.layers),
        )

    @property
    def output_matmul(self) -> MatMul:
        """Matrix from the last hidden state to logits, on one device; only for sampled tokens."""
        return MatMul(-(-self.vocab // self.tensor_parallel), self.hidden, 1)

    @property
    def parameters(self) -> int:
        """Number of weights in matrix products, sum over devices."""
        whole = msgspec.structs.replace(self, tensor_parallel=1)
        return sum(m.weights for m in (*whole.layer_matmuls, whole.output_matmul))

    @property
    def pair_flops(self) -> int:
        """Flops of one query attending to one key in one layer, on one device."""
        return 4 * self.heads * self.head_dim // self.tensor_parallel


class _Config(msgspec.Struct):
    """The fields of a Transformers config.json that determine an `Architecture`."""

    model_type: str = ""
    num_hidden_layers: int | None = None
    hidden_size: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int | None = None
    moe_intermediate_size: int | None = None
    num_experts_per_tok: int | None = None
    vocab_size: int | None = None
    sliding_window: int | None = None
    use_sliding_window: bool = True
    layer_types: list[str] | None = None
    text_config: _Config | None = None


# `model_type` values of families whose MLP has no gate.
_UNGATED = ("gpt2", "opt", "gpt_neox", "falcon", "phi", "bloom")


def read_architecture(directory: Path, name: str, dtype: str) -> Architecture:
    """Architecture from a model directory's config.json, with weights and KV of `dtype`.

    In a mixture of experts only the experts of one token count: compute is right, but the weights
    that a batch reads are underestimated. Raises ModelError.
    """
    path = directory / "config.json"
    try:
        config = msgspec.json.decode(path.read_bytes(), type=_Config)
    except (OSError, msgspec.DecodeError) as error:
        raise ModelError(f"cannot read {path}: {error}") from error
    text = config.text_config or config
    try:
        return msgspec.convert(dict(_fields(text, name, dtype)), Architecture)
    except msgspec.ValidationError as error:
        raise ModelError(f"{path} does not describe a decoder: {error}") from error


def _fields(text: _Config, name: str, dtype: str) -> Iterator[tuple[str, object]]:
    heads, hidden = text.num_attention_heads, text.hidden_size
    size = _DTYPE_BYTES[dtype]
    yield "name", name
    yield "layers", text.num_hidden_layers
    yield "hidden", hidden
    yield "heads", heads
    yield "kv_heads", text.num_key_value_heads or heads
    yield "head_dim", text.head_dim or (hidden // heads if hidden and heads else None)
    expert = (text.moe_intermediate_size or 0) * (text.num_experts_per_tok or 0)
    yield "intermediate", expert or text.intermediate_size or (4 * hidden if hidden else None)
    yield "vocab", text.vocab_size
    yield "gated", text.model_type not in _UNGATED
    yield "weight_bytes", size
    yield "kv_bytes", size
    if text.sliding_window and text.use_sliding_window:
        windowed = (
            text.num_hidden_layers
            if text.layer_types is None
            else text.layer_types.count("sliding_attention")
        )
        yield "window", text.sliding_window
        yield "window_layers", windowed


LLAMA2_7B = Architecture(
    name="llama2-7b",
    layers=32,
    hidden=4096,
    heads=32,
    kv_heads=32,
    head_dim=128,
    intermediate=11008,
    vocab=32000,
)
LLAMA2_13B = Architecture(
    name="llama2-13b",
    layers=40,
    hidden=5120,
    heads=40,
    kv_heads=40,
    head_dim=128,
    intermediate=13824,
    vocab=32000,
)
LLAMA2_70B = Architecture(
    name="llama2-70b",
    layers=80,
    hidden=8192,
    heads=64,
    kv_heads=8,
    head_dim=128,
    intermediate=28672,
    vocab=32000,
)
LLAMA3_8B = Architecture(
    name="llama-3-8b",
    layers=32,
    hidden=4096,
    heads=32,
    kv_heads=8,
    head_dim=128,
    intermediate=14336,
    vocab=128256,
)
LLAMA3_70B = msgspec.structs.replace(LLAMA2_70B, name="llama-3-70b", vocab=128256)
QWEN2_5_7B = Architecture(
    name="qwen2.5-7b",
    layers=28,
    hidden=3584,
    heads=28,
    kv_heads=4,
    head_dim=128,
    intermediate=18944,
    vocab=152064,
)
GEMMA3_270M = Architecture(
    name="gemma-3-270m",
    layers=18,
    hidden=640,
    heads=4,
    kv_heads=1,
    head_dim=256,
    intermediate=2048,
    vocab=262144,
    window=512,
    window_layers=15,
)

ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        LLAMA2_7B,
        LLAMA2_13B,
        LLAMA2_70B,
        LLAMA3_8B,
        LLAMA3_70B,
        QWEN2_5_7B,
        GEMMA3_270M,
    )
}

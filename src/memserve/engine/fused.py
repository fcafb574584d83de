"""Decoder layers of Transformers' models with fewer and faster kernels between the matrix products
(`layer_ops.py`).

`fuse` replaces the RMS norms and the decoder layers of Llama, Mistral, Qwen2, Qwen3 and Gemma 3.
Weights, formulas and places of rounding stay the same. Other modules stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN, GELUTanh
from transformers.models.gemma3.modeling_gemma3 import Gemma3DecoderLayer, Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer, MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3RMSNorm

from memserve.engine.attention import AttentionBackend
from memserve.engine.layer_ops import Activation, LayerOps, Norm
from memserve.engine.linear import MergedLinear

_LLAMA_NORMS = (LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm)
_LLAMA_LAYERS = (LlamaDecoderLayer, MistralDecoderLayer, Qwen2DecoderLayer, Qwen3DecoderLayer)
_WINDOW_OF_EACH_LAYER = (Qwen2DecoderLayer, Qwen3DecoderLayer, Gemma3DecoderLayer)
_NORMS_OF_HEADS = (Qwen3DecoderLayer, Gemma3DecoderLayer)

_ACTIVATIONS: dict[type[nn.Module], Activation] = {
    nn.SiLU: Activation.SILU,
    type(ACT2FN["silu"]): Activation.SILU,
    GELUTanh: Activation.GELU_TANH,
}
_QKV = ("q_proj", "k_proj", "v_proj")
_GATE_UP = ("gate_proj", "up_proj")

Rotation = tuple[Tensor, Tensor]  # cos and sin, [1, tokens, dim]
Products = Callable[[Tensor], Sequence[Tensor]]  # of one input with several weights


def fuse(model: nn.Module, ops: LayerOps, device: torch.device) -> None:
    """Replace the known modules of a loaded model that are in a dtype of `ops`, for inference
    only.

    The model runs on `device` then. It may lie elsewhere when this is called, and be moved later:
    merged weights are made on `device`, which holds no weight twice meanwhile.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if (norm := _norm_of(child, ops, device)) is not None:
                setattr(parent, name, RowNorm(norm, ops))
    for layer in list(model.modules()):
        kind = _FUSED.get(type(layer))
        if kind is not None and _can_be_fused(layer, ops):
            attention = _attention_of(layer, ops, device)
            feed_forward = _feed_forward_of(layer, ops, device)
            layer.__class__ = kind
            assert isinstance(layer, FusedLayer)
            layer.attention, layer.feed_forward = attention, feed_forward


def _norm_of(module: nn.Module, ops: LayerOps, device: torch.device) -> Norm | None:
    if isinstance(module, Gemma3RMSNorm):
        gain, eps, early = 1.0 + module.weight.detach().float(), module.eps, False
    elif isinstance(module, _LLAMA_NORMS):
        gain, eps, early = module.weight.detach().float(), module.variance_epsilon, True
    else:
        return None
    if module.weight.dtype not in ops.dtypes:
        return None
    return Norm(gain.contiguous().to(device), eps, early)


def _can_be_fused(layer: nn.Module, ops: LayerOps) -> bool:
    """Whether the layer's norms are replaced, which says that it is in a dtype of `ops`, and its
    other parts are known."""
    if not isinstance(layer.get_submodule("input_layernorm"), RowNorm):
        return False
    if type(layer.get_submodule("mlp.act_fn")) not in _ACTIVATIONS:
        return False
    products = [*(f"self_attn.{name}" for name in _QKV), *(f"mlp.{name}" for name in _GATE_UP)]
    return not ops.merges or all(type(layer.get_submodule(n)) is nn.Linear for n in products)


def _attention_of(layer: nn.Module, ops: LayerOps, device: torch.device) -> _Attention:
    module = layer.get_submodule("self_attn")
    window = None
    if isinstance(layer, MistralDecoderLayer):
        window = layer.self_attn.config.sliding_window
    elif isinstance(layer, _WINDOW_OF_EACH_LAYER):
        window = layer.self_attn.sliding_window
    norms = None
    if isinstance(layer, _NORMS_OF_HEADS):
        q_norm, k_norm = (module.get_submodule(name) for name in ("q_norm", "k_norm"))
        assert isinstance(q_norm, RowNorm)
        assert isinstance(k_norm, RowNorm)
        norms = (q_norm.norm, k_norm.norm)
    return _Attention(
        ops=ops,
        products=_products(module, _QKV, "qkv_proj", ops, device),
        output=module.get_submodule("o_proj"),
        norms=norms,
        layer=int(module.layer_idx),  # type: ignore[arg-type]
        dim=int(module.head_dim),  # type: ignore[arg-type]
        scale=float(module.scaling),  # type: ignore[arg-type]
        window=window,
    )


def _feed_forward_of(layer: nn.Module, ops: LayerOps, device: torch.device) -> _FeedForward:
    module = layer.get_submodule("mlp")
    return _FeedForward(
        ops=ops,
        products=_products(module, _GATE_UP, "gate_up_proj", ops, device),
        activation=_ACTIVATIONS[type(module.get_submodule("act_fn"))],
        output=module.get_submodule("down_proj"),
    )


def _products(
    module: nn.Module, names: Sequence[str], merged: str, ops: LayerOps, device: torch.device
) -> Products:
    """Return the products with the weights of the children `names`. If `ops` merges products,
    one child `merged` takes their place."""
    parts = [module.get_submodule(name) for name in names]
    if not ops.merges:
        return lambda x: [part(x) for part in parts]
    product = MergedLinear(parts, device)  # type: ignore[arg-type]
    for name in names:
        delattr(module, name)
    module.add_module(merged, product)
    return product


class RowNorm(nn.Module):
    """RMS norm over the last dimension."""

    def __init__(self, norm: Norm, ops: LayerOps) -> None:
        super().__init__()
        self.norm = norm
        self._ops = ops

    def forward(self, x: Tensor) -> Tensor:
        return self._ops.rms_norm(x.contiguous(), self.norm)

    def of_sum(self, residual: Tensor, x: Tensor) -> Tensor:
        """Add `x` to `residual` in place; return the norm of the sum."""
        return self._ops.add_and_norm(residual, x, self.norm)

    def add_to(self, residual: Tensor, x: Tensor) -> None:
        """Add the norm of `x` to `residual` in place. `x` is not defined afterwards."""
        self._ops.norm_and_add(residual, x, self.norm)


@dataclass(frozen=True, slots=True)
class _Attention:
    """Self-attention of one layer."""

    ops: LayerOps
    products: Products  # of queries, keys and values
    output: nn.Module
    norms: tuple[Norm, Norm] | None  # of queries and keys
    layer: int
    dim: int
    scale: float
    window: int | None  # sliding window in tokens

    def run(self, x: Tensor, rotation: Rotation, backend: AttentionBackend) -> Tensor:
        """Return the attention of `x` [1, tokens, width]."""
        tokens = x.shape[1]
        query, key, value = [part.view(tokens, -1, self.dim) for part in self.products(x)]
        self.ops.rotate(query, key, *rotation, self.norms)
        out = backend.run(self.layer, query, key, value, self.scale, self.window, None)
        result: Tensor = self.output(out.view(1, tokens, -1))
        return result


@dataclass(frozen=True, slots=True)
class _FeedForward:
    """Feed-forward network of one layer."""

    ops: LayerOps
    products: Products  # of gate and up
    activation: Activation
    output: nn.Module

    def run(self, x: Tensor) -> Tensor:
        """Return the network's output for `x` [1, tokens, width]."""
        gate, up = self.products(x)
        result: Tensor = self.output(self.ops.gate(gate, up, self.activation))
        return result


class FusedLayer(nn.Module):
    """Decoder layer whose norms are RowNorms."""

    attention: _Attention
    feed_forward: _FeedForward
    input_layernorm: RowNorm
    post_attention_layernorm: RowNorm


class FusedLlamaLayer(FusedLayer):
    """Decoder layer of Llama, Mistral, Qwen2 and Qwen3; `forward` changes [1, tokens, width] in
    place and returns it."""

    def forward(
        self,
        hidden_states: Tensor,
        *,
        position_embeddings: Rotation,
        backend: AttentionBackend,
        **_: object,
    ) -> Tensor:
        x = self.input_layernorm(hidden_states)
        x = self.attention.run(x, position_embeddings, backend)
        x = self.post_attention_layernorm.of_sum(hidden_states, x)
        return hidden_states.add_(self.feed_forward.run(x))


class FusedGemma3Layer(FusedLayer):
    """Gemma 3 decoder layer; `forward` changes [1, tokens, width] in place and returns it."""

    pre_feedforward_layernorm: RowNorm
    post_feedforward_layernorm: RowNorm

    def forward(
        self,
        hidden_states: Tensor,
        *,
        position_embeddings: Rotation,
        backend: AttentionBackend,
        **_: object,
    ) -> Tensor:
        x = self.input_layernorm(hidden_states)
        x = self.attention.run(x, position_embeddings, backend)
        self.post_attention_layernorm.add_to(hidden_states, x)
        x = self.feed_forward.run(self.pre_feedforward_layernorm(hidden_states))
        self.post_feedforward_layernorm.add_to(hidden_states, x)
        return hidden_states


def _fused(forward: type[FusedLayer], layer: type[nn.Module]) -> type[nn.Module]:
    """Return the class of a layer with another forward pass. It keeps the attributes that
    Transformers' models read from their layers."""
    return type(f"Fused{layer.__name__}", (forward, layer), {})


_FUSED: dict[type[nn.Module], type[nn.Module]] = {
    **{layer: _fused(FusedLlamaLayer, layer) for layer in _LLAMA_LAYERS},
    Gemma3DecoderLayer: _fused(FusedGemma3Layer, Gemma3DecoderLayer),
}

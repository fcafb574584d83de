"""Layers for Transformers' models in bfloat16 on a CPU, with compiled kernels (`kernels.py`)
between the matrix products.

`fuse` replaces the RMS norms of Llama, Mistral, Qwen2, Qwen3 and Gemma 3, and the decoder layers
of Llama and Gemma 3. Weights, formulas and places of rounding stay the same. Other modules stay
as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers.activations import GELUTanh
from transformers.models.gemma3.modeling_gemma3 import Gemma3DecoderLayer, Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from memserve.engine import kernels
from memserve.engine.attention import AttentionBackend
from memserve.engine.kernels import Bits

_LLAMA_NORMS = (LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm)

Rotation = tuple[Tensor, Tensor]  # cos and sin, [1, tokens, dim]


def fuse(model: nn.Module) -> None:
    """Replace the known bfloat16 modules of a loaded model on a CPU, for inference only. Compiles
    the kernels unless compiled."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if (norm := _norm_of(child)) is not None:
                setattr(parent, name, norm)
    for module in model.modules():
        if type(module) in _FUSED and _known(module):
            module.__class__ = _FUSED[type(module)]
    kernels.prepare()


def _norm_of(module: nn.Module) -> RowNorm | None:
    if isinstance(module, Gemma3RMSNorm):
        gain, eps, early = 1.0 + module.weight.detach().float(), module.eps, False
    elif isinstance(module, _LLAMA_NORMS):
        gain, eps, early = module.weight.detach().float(), module.variance_epsilon, True
    else:
        return None
    if module.weight.dtype is not torch.bfloat16:
        return None
    return RowNorm(_Norm(np.ascontiguousarray(gain.numpy()), eps, early))


def _known(layer: nn.Module) -> bool:
    """Whether the layer's norms are replaced, which means that it is in bfloat16."""
    return isinstance(layer.get_submodule("input_layernorm"), RowNorm)


def _bits(x: Tensor) -> Bits:
    """Return contiguous bfloat16 `x` [..., width] as [rows, width] uint16, in the same memory."""
    bits: Bits = x.view(-1, x.shape[-1]).view(torch.uint16).numpy()
    return bits


@dataclass(frozen=True, slots=True)
class _Norm:
    """Arguments of a norm's kernels."""

    gain: kernels.Floats  # [width]
    eps: float
    early: bool  # round before the gain, as Llama does


class RowNorm(nn.Module):
    """RMS norm over the last dimension."""

    def __init__(self, norm: _Norm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        out = torch.empty_like(x)
        norm = self.norm
        kernels.rms_norm.run(_bits(x), norm.gain, norm.eps, norm.early, _bits(out))
        return out


def _add_and_norm(residual: Tensor, x: Tensor, module: nn.Module) -> Tensor:
    """Add `x` to `residual` in place; return the norm of the sum."""
    assert isinstance(module, RowNorm)
    out = torch.empty_like(x)
    norm = module.norm
    kernels.add_and_norm.run(_bits(residual), _bits(x), norm.gain, norm.eps, norm.early, _bits(out))
    return out


def _norm_and_add(residual: Tensor, x: Tensor, module: nn.Module) -> None:
    """Replace `x` by its norm, and add the norm to `residual`, both in place."""
    assert isinstance(module, RowNorm)
    norm = module.norm
    kernels.norm_and_add.run(_bits(residual), _bits(x), norm.gain, norm.eps, norm.early)


def _attend(
    attention: nn.Module,
    x: Tensor,
    rotation: Rotation,
    backend: AttentionBackend,
    norms: tuple[nn.Module, nn.Module] | None,
    window: int | None,
) -> Tensor:
    """Self-attention of `x` [1, tokens, width]; `norms`: of queries and keys, if the model has
    them; `window`: sliding window in tokens."""
    cos, sin = (_bits(part) for part in rotation)
    dim = int(attention.head_dim)  # type: ignore[arg-type]
    tokens = x.shape[1]
    query = attention.q_proj(x).view(tokens, -1, dim)  # type: ignore[operator]
    key = attention.k_proj(x).view(tokens, -1, dim)  # type: ignore[operator]
    value = attention.v_proj(x).view(tokens, -1, dim)  # type: ignore[operator]
    if norms is not None:
        query, key = norms[0](query), norms[1](key)
    for part in (query, key):
        kernels.rotate.run(part.view(torch.uint16).numpy(), cos, sin)
    layer, scale = int(attention.layer_idx), float(attention.scaling)  # type: ignore[arg-type]
    out = backend.run(layer, query, key, value, scale, window, None)
    result: Tensor = attention.o_proj(out.view(1, tokens, -1))  # type: ignore[operator]
    return result


def _feed_forward(mlp: nn.Module, x: Tensor) -> Tensor:
    gate: Tensor = mlp.gate_proj(x)  # type: ignore[operator]
    up: Tensor = mlp.up_proj(x)  # type: ignore[operator]
    if isinstance(mlp.act_fn, GELUTanh):  # PyTorch's kernel takes three times as long
        kernels.gelu_gate.run(_bits(gate), _bits(up))
    else:
        gate = mlp.act_fn(gate).mul_(up)  # type: ignore[operator]
    result: Tensor = mlp.down_proj(gate)  # type: ignore[operator]
    return result


class FusedLlamaLayer(LlamaDecoderLayer):  # type: ignore[no-untyped-call]
    """Llama decoder layer; `forward` changes [1, tokens, width] in place and returns it."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        *,
        position_embeddings: Rotation,
        backend: AttentionBackend,
        **_: object,
    ) -> Tensor:
        x = self.input_layernorm(hidden_states)
        x = _attend(self.self_attn, x, position_embeddings, backend, None, None)
        x = _add_and_norm(hidden_states, x, self.post_attention_layernorm)
        return hidden_states.add_(_feed_forward(self.mlp, x))


class FusedGemma3Layer(Gemma3DecoderLayer):  # type: ignore[no-untyped-call]
    """Gemma 3 decoder layer; `forward` changes [1, tokens, width] in place and returns it."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        *,
        position_embeddings: Rotation,
        backend: AttentionBackend,
        **_: object,
    ) -> Tensor:
        attention = self.self_attn
        x = self.input_layernorm(hidden_states)
        norms = (attention.q_norm, attention.k_norm)
        x = _attend(attention, x, position_embeddings, backend, norms, attention.sliding_window)
        _norm_and_add(hidden_states, x, self.post_attention_layernorm)
        x = _feed_forward(self.mlp, self.pre_feedforward_layernorm(hidden_states))
        _norm_and_add(hidden_states, x, self.post_feedforward_layernorm)
        return hidden_states


_FUSED: dict[type[nn.Module], type[nn.Module]] = {
    LlamaDecoderLayer: FusedLlamaLayer,
    Gemma3DecoderLayer: FusedGemma3Layer,
}

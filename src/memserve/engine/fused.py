"""Layers of Transformers' models in bfloat16 on a CPU, with the compiled kernels between the
matrix products.

They take the place of a model's own norms, whatever the family, and of its decoder layers if it
is a Llama or a Gemma 3. Same weights, same formulas, rounded at the same places; what a layer
does not know is left as it is.
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
from memserve.engine.attention import paged_attention
from memserve.engine.kernels import Bits
from memserve.engine.paged_batch import PagedBatch

_LLAMA_NORMS = (LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm)

Rotation = tuple[Tensor, Tensor]  # cos and sin, [1, tokens, dim]


def fuse(model: nn.Module) -> None:
    """Replace what is known of a model in bfloat16 on a CPU, weights loaded, for inference.

    Compiles the kernels, if nobody has.
    """
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
    """Whether its norms have been replaced: then it is in bfloat16."""
    return isinstance(layer.get_submodule("input_layernorm"), RowNorm)


def _bits(x: Tensor) -> Bits:
    """[..., width] as [rows, width], the same memory; `x` must be contiguous."""
    bits: Bits = x.view(-1, x.shape[-1]).view(torch.uint16).numpy()
    return bits


@dataclass(frozen=True, slots=True)
class _Norm:
    """What a norm's kernels take."""

    gain: kernels.Floats  # [width]
    eps: float
    early: bool


class RowNorm(nn.Module):
    """An RMS norm over the last dimension."""

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
    """Adds `x` to `residual` in place; returns the norm of the sum."""
    assert isinstance(module, RowNorm)
    out = torch.empty_like(x)
    norm = module.norm
    kernels.add_and_norm.run(_bits(residual), _bits(x), norm.gain, norm.eps, norm.early, _bits(out))
    return out


def _norm_and_add(residual: Tensor, x: Tensor, module: nn.Module) -> None:
    """Replaces `x` by its norm, and adds that to `residual`."""
    assert isinstance(module, RowNorm)
    norm = module.norm
    kernels.norm_and_add.run(_bits(residual), _bits(x), norm.gain, norm.eps, norm.early)


def _attend(
    attention: nn.Module,
    x: Tensor,
    rotation: Rotation,
    kv: PagedBatch,
    norms: tuple[nn.Module, nn.Module] | None,
    window: int | None,
) -> Tensor:
    """Self-attention of [1, tokens, width]; `norms` are those of queries and keys."""
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
    query, key, value = (part.transpose(0, 1).unsqueeze(0) for part in (query, key, value))
    out, _ = paged_attention(
        attention,
        query,
        key,
        value,
        None,
        kv=kv,
        scaling=float(attention.scaling),  # type: ignore[arg-type]
        sliding_window=window,
    )
    result: Tensor = attention.o_proj(out.view(1, tokens, -1))  # type: ignore[operator]
    return result


def _feed_forward(mlp: nn.Module, x: Tensor) -> Tensor:
    gate: Tensor = mlp.gate_proj(x)  # type: ignore[operator]
    up: Tensor = mlp.up_proj(x)  # type: ignore[operator]
    if isinstance(mlp.act_fn, GELUTanh):  # PyTorch's takes three times as long
        kernels.gelu_gate.run(_bits(gate), _bits(up))
    else:
        gate = mlp.act_fn(gate).mul_(up)  # type: ignore[operator]
    result: Tensor = mlp.down_proj(gate)  # type: ignore[operator]
    return result


class FusedLlamaLayer(LlamaDecoderLayer):  # type: ignore[no-untyped-call]
    """[1, tokens, width] -> the same tensor, changed."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        *,
        position_embeddings: Rotation,
        kv: PagedBatch,
        **_: object,
    ) -> Tensor:
        x = self.input_layernorm(hidden_states)
        x = _attend(self.self_attn, x, position_embeddings, kv, None, None)
        x = _add_and_norm(hidden_states, x, self.post_attention_layernorm)
        return hidden_states.add_(_feed_forward(self.mlp, x))


class FusedGemma3Layer(Gemma3DecoderLayer):  # type: ignore[no-untyped-call]
    """[1, tokens, width] -> the same tensor, changed."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        *,
        position_embeddings: Rotation,
        kv: PagedBatch,
        **_: object,
    ) -> Tensor:
        attention = self.self_attn
        x = self.input_layernorm(hidden_states)
        norms = (attention.q_norm, attention.k_norm)
        x = _attend(attention, x, position_embeddings, kv, norms, attention.sliding_window)
        _norm_and_add(hidden_states, x, self.post_attention_layernorm)
        x = _feed_forward(self.mlp, self.pre_feedforward_layernorm(hidden_states))
        _norm_and_add(hidden_states, x, self.post_feedforward_layernorm)
        return hidden_states


_FUSED: dict[type[nn.Module], type[nn.Module]] = {
    LlamaDecoderLayer: FusedLlamaLayer,
    Gemma3DecoderLayer: FusedGemma3Layer,
}

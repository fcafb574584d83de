"""Operations of a decoder layer between its matrix products: the contract of their implementations,
`compiled_layers.py` for CPUs and `gpu/layers.py` for GPUs. `fused.py` puts them into models.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import torch
from torch import Tensor


class Activation(Enum):
    """Activation of a feed-forward network."""

    SILU = "silu"
    GELU_TANH = "gelu_tanh"  # the tanh form


@dataclass(frozen=True, slots=True)
class Norm:
    """Parameters of an RMS norm."""

    gain: Tensor  # [width] float32, contiguous
    eps: float
    early: bool  # round before the gain, as Llama does; Gemma 3 does not


class LayerOps(Protocol):
    """Operations on one kind of device, rounded where Transformers' models round.

    Tensors are [..., width], of one of `dtypes`, and contiguous unless said otherwise. A row's
    result depends on that row alone. On a GPU, calls queue kernels on the thread's current stream,
    wait for nothing, and can be captured in a CUDA graph.
    """

    @property
    def dtypes(self) -> Collection[torch.dtype]:
        """Types of models that the operations support."""
        ...

    @property
    def merges(self) -> bool:
        """Whether matrix products with the same input are to be one product."""
        ...

    def rms_norm(self, x: Tensor, norm: Norm) -> Tensor:
        """Return the norm of each row."""
        ...

    def add_and_norm(self, residual: Tensor, x: Tensor, norm: Norm) -> Tensor:
        """Add `x` to `residual` in place; return the norm of the sum."""
        ...

    def norm_and_add(self, residual: Tensor, x: Tensor, norm: Norm) -> None:
        """Add the norm of `x` to `residual` in place. `x` is not defined afterwards."""
        ...

    def rotate(
        self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, norms: tuple[Norm, Norm] | None
    ) -> None:
        """Rotary embedding of q and k in place, after their `norms`, if there are any.

        q [tokens, heads, dim], k [tokens, kv_heads, dim], cos and sin [1, tokens, dim]. If `merges`
        is true, tokens of q and of k may lie apart, each contiguous.
        """
        ...

    def gate(self, x: Tensor, up: Tensor, activation: Activation) -> Tensor:
        """Return activation(x) * up, contiguous. `x` is not defined afterwards. If `merges` is
        true, rows of x and of up may lie apart, each contiguous."""
        ...

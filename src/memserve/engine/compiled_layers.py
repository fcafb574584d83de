"""Layer operations for models in bfloat16 on a CPU, by the compiled kernels (`kernels.py`)."""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.nn.functional as F  # noqa: N812 - PyTorch's own convention
from torch import Tensor

from memserve.engine import kernels
from memserve.engine.kernels import Bits
from memserve.engine.layer_ops import Activation, Norm


class CompiledLayers:
    """`LayerOps` for bfloat16 on a CPU."""

    dtypes: Collection[torch.dtype] = (torch.bfloat16,)
    merges = False  # the products take long enough, and their weights are packed one by one

    def __init__(self) -> None:
        """Compile the kernels unless they are."""
        kernels.prepare()

    def rms_norm(self, x: Tensor, norm: Norm) -> Tensor:
        out = torch.empty_like(x)
        kernels.rms_norm.run(_bits(x), norm.gain.numpy(), norm.eps, norm.early, _bits(out))
        return out

    def add_and_norm(self, residual: Tensor, x: Tensor, norm: Norm) -> Tensor:
        out = torch.empty_like(x)
        kernels.add_and_norm.run(
            _bits(residual), _bits(x), norm.gain.numpy(), norm.eps, norm.early, _bits(out)
        )
        return out

    def norm_and_add(self, residual: Tensor, x: Tensor, norm: Norm) -> None:
        kernels.norm_and_add.run(_bits(residual), _bits(x), norm.gain.numpy(), norm.eps, norm.early)

    def rotate(
        self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, norms: tuple[Norm, Norm] | None
    ) -> None:
        if norms is not None:
            for part, norm in zip((q, k), norms, strict=True):
                bits = _bits(part)
                kernels.rms_norm.run(bits, norm.gain.numpy(), norm.eps, norm.early, bits)
        angles = _bits(cos), _bits(sin)
        for part in (q, k):
            kernels.rotate.run(part.view(torch.uint16).numpy(), *angles)

    def gate(self, x: Tensor, up: Tensor, activation: Activation) -> Tensor:
        if activation is Activation.SILU:
            return F.silu(x).mul_(up)
        kernels.gelu_gate.run(_bits(x), _bits(up))  # PyTorch's kernel takes three times as long
        return x


def _bits(x: Tensor) -> Bits:
    """Return contiguous bfloat16 `x` [..., width] as [rows, width] uint16, in the same memory."""
    bits: Bits = x.view(-1, x.shape[-1]).view(torch.uint16).numpy()
    return bits

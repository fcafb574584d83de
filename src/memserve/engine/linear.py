"""Linear layers: products that share their input as one, for GPUs, and products in bfloat16 at a
CPU's full memory bandwidth.

On a GPU a product of few rows costs hardly more than its launch, and a wider one fills the GPU
better.

On a CPU, `F.linear` gives oneDNN the weights in row-major order; for few rows of input oneDNN then
reaches two thirds of the memory bandwidth (float32 has no such gap). With weights in oneDNN's
blocked order it reaches the full bandwidth, from one row up, and takes a third less time for a few
hundred rows. The blocked copy replaces the original weights. An output layer that shares its matrix
with the embedding keeps the row-major weights and uses them as the left factor of the product: for
the few rows that need logits this is as fast, and saves a copy of what is often the largest matrix.
All products accumulate in float32; the results agree to bfloat16's rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812 - PyTorch's own convention
from torch import Tensor, nn


class MergedLinear(nn.Linear):
    """Several `nn.Linear` of the same input as one product; `forward` returns their results
    [..., width], views of one tensor."""

    def __init__(self, parts: Sequence[nn.Linear], device: torch.device) -> None:
        """Copy the weights of `parts` to `device`. All of the parts have a bias, or none has."""
        first = parts[0]
        bias = first.bias is not None
        widths = [part.out_features for part in parts]
        super().__init__(first.in_features, sum(widths), bias, "meta", first.weight.dtype)
        self.to_empty(device=device).requires_grad_(False)
        for name, merged in self.named_parameters():
            for part, own in zip(parts, torch.split(merged, widths), strict=True):
                own.copy_(part.get_parameter(name).detach())
        self.widths = widths

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return torch.split(F.linear(input, self.weight, self.bias), self.widths, -1)


class PackedLinear(nn.Linear):
    """`nn.Linear` with weights in oneDNN's blocked order, `packed`; it has no `weight`."""

    packed: Tensor

    def pack(self) -> None:
        """Replace `weight` by `packed`. Call once, when the weights are loaded."""
        self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach())
        del self.weight

    def forward(self, input: Tensor) -> Tensor:
        result: Tensor = torch.ops.mkldnn._linear_pointwise(
            input, self.packed, self.bias, "none", [], ""
        )
        return result


class SharedLinear(nn.Linear):
    """`nn.Linear` for few rows of input, with row-major weights that the embedding uses too.

    The result [..., out_features] is a transposed view, except for a single row.
    """

    def forward(self, input: Tensor) -> Tensor:
        rows = input.reshape(-1, self.in_features)
        if rows.shape[0] == 1:
            result = torch.mv(self.weight, rows[0]).unsqueeze(0)
        else:
            result = (self.weight @ rows.t()).t()
        if self.bias is not None:
            result = result + self.bias
        return result.view(*input.shape[:-1], self.out_features)


def has_bfloat16_kernels() -> bool:
    """Whether PyTorch has oneDNN, and oneDNN supports bfloat16 on this CPU."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def speed_up_products(model: nn.Module) -> None:
    """Replace each `nn.Linear` in bfloat16 on a CPU by PackedLinear, or by SharedLinear if an
    embedding has its weights. No effect if oneDNN has no bfloat16 kernels."""
    if not has_bfloat16_kernels():
        return
    embeddings = {m.weight.data_ptr() for m in model.modules() if isinstance(m, nn.Embedding)}
    for module in model.modules():
        if type(module) is not nn.Linear or module.weight.dtype is not torch.bfloat16:
            continue
        if module.weight.data_ptr() in embeddings:
            module.__class__ = SharedLinear
        else:
            module.__class__ = PackedLinear
            PackedLinear.pack(module)  # type: ignore[arg-type]

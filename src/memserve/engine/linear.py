"""Matrix products of a model in bfloat16 on a CPU, as fast as its memory.

`F.linear` hands oneDNN the weights as they lie, and its kernels for few rows of input then reach
two thirds of the memory's bandwidth (float32 shows no such gap). Weights in oneDNN's own blocked
order reach all of it, from one row up, and take a third less time for a few hundred rows. The
blocked copy takes the place of the original, except where the matrix is the embedding too: that
one stays as it is, the left factor of the product instead of the right one, which for the few
rows that want logits is as fast, and needs no second copy of what is often the largest matrix.
All accumulate in float32; the results agree to bfloat16's rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PackedLinear(nn.Linear):
    """`nn.Linear` whose weights lie in oneDNN's order; `weight` itself is gone."""

    packed: Tensor

    def pack(self) -> None:
        """Once, when the weights are loaded."""
        self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach())
        del self.weight

    def forward(self, input: Tensor) -> Tensor:
        result: Tensor = torch.ops.mkldnn._linear_pointwise(
            input, self.packed, self.bias, "none", [], ""
        )
        return result


class SharedLinear(nn.Linear):
    """`nn.Linear` over weights that others use as they lie, for few rows of input.

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
    """Whether oneDNN is there, and computes in bfloat16 on this CPU."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def speed_up_products(model: nn.Module) -> None:
    """Use the two above for every plain linear layer held in bfloat16 on a CPU, where oneDNN
    has kernels for it."""
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

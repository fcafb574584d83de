"""Attention over block tables: the contract of its backends, and the function that Transformers'
models call for each layer.

A step is one packed batch `[1, tokens]`: one row per decoding sequence, then the prefill chunks
one after the other. The runner has an engine's backend plan the step, and each layer runs it.
`torch_attention.py` is the backend for CPUs and any GPU. A backend with kernels of its own goes
beside it; `Runner` chooses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from memserve.errors import ModelError

ATTENTION_NAME = "memserve_paged"


@dataclass(frozen=True, slots=True)
class Span:
    """The tokens of one sequence in a step: rows `start .. start + length` of the batch."""

    start: int
    length: int
    context: int  # tokens whose KV is in the pool already
    blocks: NDArray[np.int64]  # HBM block indices that cover context + length

    @property
    def total(self) -> int:
        return self.context + self.length


class AttentionBackend(Protocol):
    """Attention over the HBM blocks of one pool. For one engine thread: `plan` once per step, then
    `run` once per layer.

    Calls queue kernels on the thread's current stream, and need not wait for them.
    """

    def plan(
        self, spans: Sequence[Span], decodes: int, on_layer: Callable[[int], None] | None = None
    ) -> None:
        """Make what the layers of a step share, as block tables on the device, in place of the
        last step's.

        The first `decodes` spans have length 1 and are the first rows. Each `run` calls `on_layer`
        with its layer, after queueing the writes of its K and V to the pool.
        """
        ...

    def run(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """Write K and V of the step's tokens to their blocks, then attend to all that each query
        sees: its own sequence up to itself, at most `window` tokens.

        q [tokens, heads, dim], k and v [tokens, kv_heads, dim], with rotary embedding applied.
        Returns [tokens, heads, dim], contiguous. Raises ModelError for heads whose size differs
        from the pool's.
        """
        ...


def checked_dim(layer: int, k: Tensor, v: Tensor, dim: int) -> None:
    """Raise ModelError unless k and v [tokens, kv_heads, dim] have the pool's `dim`."""
    if k.shape[2] != dim or v.shape[2] != dim:
        raise ModelError(
            f"layer {layer} has K and V of {k.shape[2]} and {v.shape[2]} dimensions, "
            f"the pool's blocks hold {dim}"
        )


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    backend: AttentionBackend,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Transformers' attention interface over a paged pool.

    query [1, heads, tokens, dim], key and value [1, kv_heads, tokens, dim], with rotary embedding
    applied. Returns [1, tokens, heads, dim]. Raises ModelError for attention sinks, and as `run`.
    """
    if s_aux is not None:
        raise ModelError("attention sinks are not supported by the built-in engine")
    layer = module.layer_idx
    assert isinstance(layer, int)
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    q, k, v = (part[0].transpose(0, 1) for part in (query, key, value))
    return backend.run(layer, q, k, v, scale, sliding_window, softcap).unsqueeze(0), None


def register() -> None:
    """Make `attn_implementation=ATTENTION_NAME` known to Transformers. Idempotent.

    No mask function has that name, so Transformers makes no masks: backends know what is seen from
    block tables.
    """
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, paged_attention)

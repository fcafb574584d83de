"""`CostModel`: seconds that an instance takes, as sums over a transformer's operators.

A prompt of x tokens, c of them cached, is computed in steps of at most `max_batch_tokens`. A
step's time without attention depends only on its tokens; attention is a sum over query-key pairs
(n c + n^2 / 2 for n = x - c), plus reading the context once per step. So

    exec(x, c) = base(n) + c * slope(n) + windows(x) - windows(c)

with tables `base` and `slope` over n, built once: a prediction is a few look-ups. The MemServe
paper's a x^2 y + b x^2 + c x + d, with cached ratio y = c / x, has this form.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Annotated, TypeVar

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import ArrayLike, NDArray

from memserve.scheduler.architecture import Architecture
from memserve.scheduler.compute import Measured, Table, Waves
from memserve.scheduler.contract import Costs, Seconds, TransferPath
from memserve.scheduler.look_ups import decode_look_up, link_seconds, prefill_look_up

_Seconds = Annotated[float, Meta(ge=0)]
_Ints = NDArray[np.int64]
_Number = TypeVar("_Number", np.int64, np.float64)
_Other = TypeVar("_Other", np.int64, np.float64)

# First lengths of the tables, which double for longer prompts and larger batches.
_FIRST_TOKENS = 1 << 13
_FIRST_SEQUENCES = 1 << 8
# The two context lengths that `recompute_cost` interpolates between.
_NEAR_TOKENS = 512
_FAR_TOKENS = 1 << 13
# Upper bounds of table lengths: more is a caller's mistake, and takes gigabytes.
MAX_TOKENS = 1 << 24
MAX_STEP_TOKENS = 1 << 20


class LinkCost(msgspec.Struct, frozen=True):
    """Seconds of a transfer between two pools over one transport."""

    seconds: _Seconds  # once: until the first byte moves, and for the acknowledgement
    seconds_per_byte: _Seconds
    seconds_per_piece: _Seconds  # per contiguous run of bytes


class AttentionCost(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of attention in one layer, per query-key pair or token."""

    pair: _Seconds  # query and key of one step, without context before it (causal kernel)
    masked_pair: _Seconds  # query and key of one step, with context before it
    context_pair: _Seconds  # query of the step, key of the context
    window_pair: _Seconds  # in a sliding-window layer
    gather: _Seconds  # reading one token of the context, once per step
    decode: _Seconds  # per context token of a decoding sequence
    decode_window: _Seconds  # per context token in a sliding-window layer


class CostModel(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """Implements `Costs`. Immutable but for its tables, which are made on first use and grow."""

    architecture: Architecture
    # Maximum of a step that only prefills. Bounded, because a table has a row per token, and a
    # member's profile must not fill the gateway's memory.
    max_batch_tokens: Annotated[int, Meta(ge=1, le=MAX_STEP_TOKENS)]
    compute: Waves | Measured
    attention: AttentionCost
    shm: LinkCost
    nixl: LinkCost
    host: LinkCost  # from host memory into the device's

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of K and V of one token, all layers."""
        return self.architecture.kv_bytes_per_token

    def prefill_seconds(self, prompt_tokens: ArrayLike, cached_tokens: ArrayLike) -> Seconds:
        """Return exec(x, y) of prompts that run alone, up to the first token. At least one token
        is computed. Raises ValueError for MAX_TOKENS or more, or negative counts."""
        prompt = np.asarray(prompt_tokens, dtype=np.int64)
        cached = np.asarray(cached_tokens, dtype=np.int64)
        return self._prefill.look_up(prompt, cached)

    def decode_step_seconds(self, sequences: ArrayLike, context_tokens: ArrayLike) -> Seconds:
        """Return a batch's decode step; `context_tokens`: sum over its sequences. An empty batch
        takes 0 s. Raises ValueError for MAX_TOKENS sequences or more, or negative counts."""
        rows = np.asarray(sequences, dtype=np.int64)
        context = np.asarray(context_tokens, dtype=np.float64)
        return self._decode.look_up(rows, context)

    def transfer_seconds(
        self, num_bytes: ArrayLike, pieces: ArrayLike, path: TransferPath
    ) -> Seconds:
        """Return the transfer of `num_bytes` of KV by `path` in `pieces` contiguous runs."""
        link = {"shm": self.shm, "nixl": self.nixl, "host": self.host}[path]
        moved = np.asarray(num_bytes, dtype=np.float64)
        moved, runs, each = _together(moved, np.asarray(pieces, dtype=np.float64))
        per_byte, per_piece = link.seconds_per_byte, link.seconds_per_piece
        link_seconds.run(moved, runs, link.seconds, per_byte, per_piece, each.reshape(-1))
        return each

    @cached_property
    def _prefill(self) -> _PrefillTables:
        return _PrefillTables(self)

    @cached_property
    def _decode(self) -> _DecodeTables:
        return _DecodeTables(self)


def recompute_cost(costs: Costs, block_tokens: int) -> Callable[[int], float]:
    """Return a function from the position of a block's end (tokens) to the seconds to recompute the
    block: a linear approximation, since it is called for every inserted block."""
    near, far = _NEAR_TOKENS, _FAR_TOKENS
    first = float(costs.prefill_seconds(near, 0)) / near
    later = float(costs.prefill_seconds(far + near, far)) / near
    slope = max(0.0, later - first) / far

    def cost(end: int) -> float:
        return block_tokens * (first + slope * end)

    return cost


def _together(
    first: NDArray[_Number], second: NDArray[_Other]
) -> tuple[NDArray[_Number], NDArray[_Other], Seconds]:
    """Return both arguments flattened for the look-ups, and an empty result in their broadcast
    shape."""
    if first.ndim and second.ndim and first.shape != second.shape:
        shape = np.broadcast_shapes(first.shape, second.shape)
        first, second = np.broadcast_to(first, shape), np.broadcast_to(second, shape)
    each = np.empty(second.shape if second.ndim else first.shape)
    return first.ravel(), second.ravel(), each


class Steps(msgspec.Struct, frozen=True):
    """Prefill steps of a prompt and their query-key pairs, by n = tokens to compute [any shape].
    The sums are exact, and exclude pairs with cached tokens.
    """

    steps: NDArray[np.float64]  # number of steps k
    last: _Ints  # tokens of the last step, up to max_batch_tokens
    first_pairs: NDArray[np.float64]  # within the first step
    later_pairs: NDArray[np.float64]  # within the later steps, summed
    context_pairs: NDArray[np.float64]  # of later steps with earlier steps
    gathered: NDArray[np.float64]  # tokens that later steps read back, their own included

    @classmethod
    def of(cls, tokens: _Ints, limit: int) -> Steps:
        """`limit`: most tokens of a step."""
        n = np.asarray(tokens, dtype=np.int64)
        k = np.maximum(1, -(-n // limit)).astype(np.float64)
        last = n - (k.astype(np.int64) - 1) * limit
        first = np.minimum(n, limit).astype(np.float64)
        later = np.where(k > 1, (k - 2) * limit**2 + last.astype(np.float64) ** 2, 0.0) / 2
        whole = n.astype(np.float64) ** 2 / 2
        context = whole - first**2 / 2 - later
        gathered = np.where(k > 1, limit * (k * (k - 1) / 2 - 1) + n, 0.0)
        return cls(k, last, first**2 / 2, later, context, gathered)


def window_pairs(tokens: NDArray[np.generic], window: int) -> NDArray[np.float64]:
    """Query-key pairs of the first `tokens` if each sees `window` tokens, itself included."""
    n = np.asarray(tokens, dtype=np.float64)
    return np.where(n < window, n * n / 2, window * window / 2 + window * (n - window))


class _PrefillTables:
    """Look-up tables of prefill seconds by tokens, 0 to `size` - 1."""

    def __init__(self, model: CostModel) -> None:
        self._model = model
        self._windows: Table = np.empty(0)
        self._build(_FIRST_TOKENS)

    def look_up(self, prompt: _Ints, cached: _Ints) -> Seconds:
        x, c, each = _together(prompt, cached)
        flat = each.reshape(-1)
        while longest := prefill_look_up.run(
            x, c, self._base, self._behind, self._slope, self._windows, flat
        ):
            self.grow(longest)
        return each

    def grow(self, longest: int) -> None:
        """Extend the tables to `longest` tokens. Raises ValueError for MAX_TOKENS or more."""
        if longest >= MAX_TOKENS:
            raise ValueError(f"a prompt of {longest} tokens; at most {MAX_TOKENS}")
        size = len(self._base)
        while size <= longest:
            size *= 2
        self._build(size)

    def _build(self, size: int) -> None:
        model = self._model
        cost, architecture = model.attention, model.architecture
        full = architecture.full_layers
        n = np.arange(size)
        steps = Steps.of(n, model.max_batch_tokens)
        step = model.compute.prefill_table(architecture, model.max_batch_tokens)
        base: Table = model.compute.prompt_seconds(architecture) + step[steps.last]
        base += (steps.steps - 1) * step[-1]
        base += full * (
            cost.pair * steps.first_pairs
            + cost.masked_pair * steps.later_pairs
            + cost.context_pair * steps.context_pairs
            + cost.gather * steps.gathered
        )
        first = np.minimum(n, model.max_batch_tokens)
        # After a cached context the first step is masked too, and reads its own tokens back.
        behind = (cost.masked_pair - cost.pair) * steps.first_pairs + cost.gather * first
        self._base, self._behind = base, full * behind
        self._slope: Table = full * (cost.context_pair * n + cost.gather * steps.steps)
        if architecture.window_layers:
            pairs = window_pairs(n, architecture.window)
            self._windows = architecture.window_layers * cost.window_pair * pairs


class _DecodeTables:
    """Look-up table of decode steps' seconds by sequences."""

    def __init__(self, model: CostModel) -> None:
        cost, architecture = model.attention, model.architecture
        self._model = model
        self._full = architecture.full_layers * cost.decode
        self._windowed = architecture.window_layers * cost.decode_window
        self._window = architecture.window
        self._build(_FIRST_SEQUENCES)

    def look_up(self, sequences: _Ints, context: Seconds) -> Seconds:
        rows, tokens, each = _together(sequences, context)
        flat = each.reshape(-1)
        while most := decode_look_up.run(
            rows, tokens, self._base, self._full, self._windowed, self._window, flat
        ):
            self.grow(most)
        return each

    def grow(self, most: int) -> None:
        """Extend the table to `most` sequences. Raises ValueError for MAX_TOKENS or more."""
        if most >= MAX_TOKENS:
            raise ValueError(f"a batch of {most} sequences; at most {MAX_TOKENS}")
        size = len(self._base)
        while size <= most:
            size *= 2
        self._build(size)

    def _build(self, size: int) -> None:
        model = self._model
        self._base: Table = model.compute.decode_table(model.architecture, size - 1)

"""How long an instance takes: the operators of a transformer, summed in closed form.

A prompt of x tokens, c of them cached, is computed in steps of at most `max_batch_tokens`.
What a step costs beside attention depends on its tokens alone; attention is the sum over
query-key pairs (n c + n^2 / 2 for n = x - c), and reading the context once per step. So

    exec(x, c) = base(n) + c * slope(n) + windows(x) - windows(c)

with tables `base` and `slope` over n, built once: a prediction is a few look-ups.
The same form as the paper's a x^2 y + b x^2 + c x + d, with y its cached ratio c / x.
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
from memserve.scheduler.contract import Costs, Path, Seconds
from memserve.scheduler.look_ups import decode_look_up, link_seconds, prefill_look_up

_Seconds = Annotated[float, Meta(ge=0)]
_Ints = NDArray[np.int64]
_Number = TypeVar("_Number", np.int64, np.float64)
_Other = TypeVar("_Other", np.int64, np.float64)

# Table entries to begin with; they double as longer prompts and larger batches come.
_FIRST_TOKENS = 1 << 13
_FIRST_SEQUENCES = 1 << 8
# Between which the cost of recomputing a block is taken to be linear.
_NEAR_TOKENS = 512
_FAR_TOKENS = 1 << 13
# More is a caller's mistake, and a table of gigabytes.
MAX_TOKENS = 1 << 24
MAX_STEP_TOKENS = 1 << 20


class LinkCost(msgspec.Struct, frozen=True):
    """One way between two pools."""

    seconds: _Seconds  # until the first byte moves, and for the acknowledgement
    seconds_per_byte: _Seconds
    seconds_per_piece: _Seconds  # each contiguous run of bytes


class AttentionCost(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds in one layer."""

    pair: _Seconds  # a query and a key of a prompt's first tokens (causal kernel)
    masked_pair: _Seconds  # of the same step, behind a context
    context_pair: _Seconds  # a query and a key of the context
    window_pair: _Seconds  # in a sliding-window layer
    gather: _Seconds  # reading a token of the context, once per step
    decode: _Seconds  # a token of a decoding sequence's context
    decode_window: _Seconds  # the same in a sliding-window layer


class CostModel(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """Implements `Costs`. Immutable; tables are made on first use and grow."""

    architecture: Architecture
    # Of a step that only prefills. A table has a row for each: what a member says must not make
    # one that fills the memory of whoever asks it.
    max_batch_tokens: Annotated[int, Meta(ge=1, le=MAX_STEP_TOKENS)]
    compute: Waves | Measured
    attention: AttentionCost
    shm: LinkCost
    nixl: LinkCost

    @property
    def kv_bytes_per_token(self) -> int:
        """KV of all layers, K and V, of one token."""
        return self.architecture.kv_bytes_per_token

    def prefill_seconds(self, prompt_tokens: ArrayLike, cached_tokens: ArrayLike) -> Seconds:
        """exec(x, y): prompts alone, up to their first tokens. At least one token is computed.

        Raises ValueError for prompts of over MAX_TOKENS.
        """
        prompt = np.asarray(prompt_tokens, dtype=np.int64)
        cached = np.asarray(cached_tokens, dtype=np.int64)
        return self._prefill.look_up(prompt, cached)

    def decode_step_seconds(self, sequences: ArrayLike, context_tokens: ArrayLike) -> Seconds:
        """One step of a batch whose sequences hold `context_tokens` in all; nothing takes 0 s.

        Raises ValueError for over MAX_TOKENS sequences.
        """
        rows = np.asarray(sequences, dtype=np.int64)
        context = np.asarray(context_tokens, dtype=np.float64)
        return self._decode.look_up(rows, context)

    def transfer_seconds(self, num_bytes: ArrayLike, pieces: ArrayLike, path: Path) -> Seconds:
        """Moving KV to another instance in so many contiguous pieces."""
        link = self.shm if path == "shm" else self.nixl
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
    """Seconds to recompute a block that ends at a token, by that token's number: a straight line
    through a prompt's beginning and a far context, as this is asked for every block inserted."""
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
    """Two arguments as the look-ups take them, one after the other, and room for what they find,
    in the shape of both."""
    if first.ndim and second.ndim and first.shape != second.shape:
        shape = np.broadcast_shapes(first.shape, second.shape)
        first, second = np.broadcast_to(first, shape), np.broadcast_to(second, shape)
    each = np.empty(second.shape if second.ndim else first.shape)
    return first.ravel(), second.ravel(), each


class Steps(msgspec.Struct, frozen=True):
    """How a prompt's tokens fall into steps, and what attention does in them, by n = tokens to
    compute [any shape]. The sums are exact; `context` pairs leave out what was cached before.
    """

    steps: NDArray[np.float64]  # k
    last: _Ints  # tokens of the last step, 1 to max_batch_tokens
    first_pairs: NDArray[np.float64]  # among the tokens of the first step
    later_pairs: NDArray[np.float64]  # within each of the later steps
    context_pairs: NDArray[np.float64]  # of later steps with the steps before
    gathered: NDArray[np.float64]  # tokens that the later steps read back, their own included

    @classmethod
    def of(cls, tokens: _Ints, limit: int) -> Steps:
        """`limit`: tokens of a step."""
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
    """Query-key pairs of the first so many tokens where each sees `window`, itself included."""
    n = np.asarray(tokens, dtype=np.float64)
    return np.where(n < window, n * n / 2, window * window / 2 + window * (n - window))


class _PrefillTables:
    """Look-up tables over tokens, 0 to `size` - 1."""

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
        """Hold prompts of `longest` tokens. Raises ValueError for too many."""
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
        # Behind a context the first step is masked too, and reads its own tokens back.
        behind = (cost.masked_pair - cost.pair) * steps.first_pairs + cost.gather * first
        self._base, self._behind = base, full * behind
        self._slope: Table = full * (cost.context_pair * n + cost.gather * steps.steps)
        if architecture.window_layers:
            pairs = window_pairs(n, architecture.window)
            self._windows = architecture.window_layers * cost.window_pair * pairs


class _DecodeTables:
    """A look-up table over sequences."""

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
        """Hold batches of `most` sequences. Raises ValueError for too many."""
        if most >= MAX_TOKENS:
            raise ValueError(f"a batch of {most} sequences; at most {MAX_TOKENS}")
        size = len(self._base)
        while size <= most:
            size *= 2
        self._build(size)

    def _build(self, size: int) -> None:
        model = self._model
        self._base: Table = model.compute.decode_table(model.architecture, size - 1)

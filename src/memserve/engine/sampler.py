"""Sampling of the next token of each sequence from its row of logits.

Filters apply in the order of vLLM's v1 sampler: the grammar, `allowed_token_ids`, `bad_words`,
`min_tokens`, `logit_bias` and penalties on logits, then temperature, min-p, top-k and top-p.

Rows are sampled one by one on the host, by numpy on one thread: a row's result cannot depend on
other rows, a row stays in the core's cache, and no barrier waits for a core that another process
holds (that costs milliseconds; sampling a row takes a fraction of one).

Each token uses one uniform random number, a function of the sequence's seed and the token's
position alone. Batching, preemption and failover do not change a seeded sequence.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from memserve.api.generate import SamplingParams, same_lists
from memserve.engine import kernels
from memserve.engine.constraint import Constraint
from memserve.engine.request import TokenLogprobs
from memserve.engine.token_counts import TokenCounts
from memserve.errors import GrammarFailed
from memserve.types import TokenArray

FloatArray = NDArray[np.float32]
IdArray = NDArray[np.int64]

GREEDY_BELOW = 1e-5  # temperatures this low are greedy, as in vLLM
MAX_TEMPERATURE = 1e30  # higher ones are clamped: uniform anyway, and float32 has no inverse

NOTHING_ALLOWED = (
    "the answer's grammar, allowed_token_ids and bad_words allow none of the tokens that may follow"
)

# A row of logits is reduced as a matrix of FOLD rows to one number per column. This vectorises,
# and leaves 1/64 of the vocabulary to search, then the 64 tokens of one column.
FOLD = 64

# Top-p first takes tokens with at least (1 - top_p) / 1024 of the mass, then / 8192, ...
FIRST_NUCLEUS = 1024
NUCLEUS_GROWTH = 8


class SamplerState:
    """Sampling state of one sequence, which owns it: parameters, seed, token counts."""

    __slots__ = (
        "_constraint",
        "_counts",
        "_fixed",
        "_generated",
        "_prompt_tokens",
        "_recent",
        "_seed",
        "params",
    )

    def __init__(
        self,
        params: SamplingParams,
        prompt: TokenArray,
        eos_token_ids: Sequence[int],
        like: SamplerState | None = None,
        constraint: Constraint | None = None,
    ) -> None:
        """`prompt`: [tokens] int32. `eos_token_ids`: the model's, () with `ignore_eos`. `like`:
        another state, whose `_FixedTokens` are reused if it is of the same call. `constraint`:
        the state's own.

        Without a seed in `params`, the operating system gives a random one.
        """
        self.params = params
        self._prompt_tokens = len(prompt)
        self._generated = 0
        self._recent: list[int] = []  # generated last, as many as `bad_words` look back
        self._constraint = constraint
        self._seed = secrets.randbits(64) if params.seed is None else params.seed % 2**64
        same = like is not None and like._fixed.is_of(params, eos_token_ids)
        self._fixed: _FixedTokens = (
            like._fixed if like is not None and same else _FixedTokens(params, eos_token_ids)
        )
        self._counts: TokenCounts | None = None
        if params.repetition_penalty != 1:
            self._counts = TokenCounts(prompt)
        elif params.presence_penalty or params.frequency_penalty:
            self._counts = TokenCounts(prompt[:0])

    def append(self, token: int) -> None:
        """Count `token` as the next generated token."""
        self._generated += 1
        if self._fixed.look_back:
            self._recent.append(token)
            del self._recent[: -self._fixed.look_back]
        if self._counts is not None:
            self._counts.add(token)
        if self._constraint is not None and token not in self._fixed.end_tokens:
            self._constraint.accept(token)

    @property
    def ended(self) -> bool:
        """Whether the grammar allows no further token behind those so far."""
        return self._constraint is not None and self._constraint.ended

    @property
    def end_tokens(self) -> frozenset[int]:
        """Tokens that end the sequence: the model's end tokens and the client's stop tokens."""
        return self._fixed.end_tokens

    @property
    def constrained(self) -> bool:
        """Whether there may be no token that is allowed."""
        return self._constraint is not None or self._fixed.leaves_out

    @property
    def greedy(self) -> bool:
        return self.params.temperature < GREEDY_BELOW

    @property
    def adjusts(self) -> bool:
        """Whether `adjust` changes the next token's logits."""
        fixed = self._fixed
        held_open = self._generated < self.params.min_tokens and fixed.end_ids.size > 0
        changed = held_open or fixed.bias_ids.size > 0 or self._counts is not None
        return changed or self.constrained

    @property
    def is_argmax(self) -> bool:
        """Whether the next sample is the first maximum of the raw logits, without logprobs."""
        return self.greedy and not self.adjusts and self.params.logprobs is None

    def adjust(self, logits: FloatArray) -> FloatArray:
        """Return a copy of `logits` [vocab] after grammar, `allowed_token_ids`, `bad_words`,
        `min_tokens`, `logit_bias` and penalties. Raises GrammarFailed."""
        logits = logits.copy()
        fixed = self._fixed
        if self._constraint is not None:
            self._constraint.mask(logits, fixed.end_ids)
        if fixed.leaves_out:
            logits = fixed.filtered(logits, self._recent)
        if self._generated < self.params.min_tokens:
            logits[fixed.end_ids] = -np.inf
        logits[fixed.bias_ids] += fixed.bias
        if self._counts is not None:
            self._counts.penalise(logits, self.params)
        return logits

    def uniform(self) -> float:
        """Return the next token's random number in [0, 1), a function of seed and position."""
        position = self._prompt_tokens + self._generated
        bits = int(np.random.Philox(key=self._seed, counter=position).random_raw())
        return (bits >> 11) * 2.0**-53


class _FixedTokens:
    """Arrays of the tokens that a request names, shared by its samples and steps.

    `look_back`: generated tokens that `bad_words` depend on. `leaves_out`: whether there are
    tokens that must not follow.
    """

    __slots__ = (
        "_allowed",
        "_bad",
        "_eos",
        "_lengths",
        "_params",
        "bias",
        "bias_ids",
        "end_ids",
        "end_tokens",
        "leaves_out",
        "look_back",
    )

    def __init__(self, params: SamplingParams, eos_token_ids: Sequence[int]) -> None:
        self._params = params
        self._eos = tuple(eos_token_ids)
        self.end_tokens = frozenset((*eos_token_ids, *params.stop_token_ids))
        self.end_ids: IdArray = np.array([*self.end_tokens], np.int64)
        self.bias_ids: IdArray = np.array(list(params.logit_bias), np.int64)
        self.bias: FloatArray = np.array(list(params.logit_bias.values()), np.float32)
        self._allowed: IdArray = np.array(params.allowed_token_ids, np.int64)
        bad: dict[tuple[int, ...], list[int]] = {}  # by the tokens before
        for *before, last in params.bad_words:
            bad.setdefault(tuple(before), []).append(last)
        self._bad = {before: np.array(lasts, np.int64) for before, lasts in bad.items()}
        lengths: dict[int, set[int]] = {}  # of the tokens before, by the last of them
        for tokens in bad:
            if tokens:
                lengths.setdefault(tokens[-1], set()).add(len(tokens))
        self._lengths = {token: sorted(found) for token, found in lengths.items()}
        self.look_back = max(map(len, bad), default=0)
        self.leaves_out = bool(params.allowed_token_ids or bad)

    def filtered(self, logits: FloatArray, recent: Sequence[int]) -> FloatArray:
        """Return `logits` [vocab], which may be changed, with -inf for tokens that must not follow
        the `recent` ones."""
        if self._allowed.size:
            allowed = logits[self._allowed]
            logits = np.full_like(logits, -np.inf)
            logits[self._allowed] = allowed
        if () in self._bad:
            logits[self._bad[()]] = -np.inf
        for length in self._lengths.get(recent[-1], ()) if recent else ():
            if length > len(recent):
                break
            last = self._bad.get(tuple(recent[len(recent) - length :]))
            if last is not None:
                logits[last] = -np.inf
        return logits

    def is_of(self, params: SamplingParams, eos_token_ids: Sequence[int]) -> bool:
        """Whether another request has the same tokens; False for equal ones of another call."""
        return same_lists(params, self._params) and self._eos == tuple(eos_token_ids)


@dataclass(frozen=True, slots=True)
class Sample:
    """The token chosen for one row."""

    token: int
    logprobs: TokenLogprobs | None = None  # of the raw logits, if the request asks for them
    failure: str | None = None  # why the grammar has no token here; `token` is then none


def sample(logits: torch.Tensor, states: Sequence[SamplerState]) -> list[Sample]:
    """Return one sample per row of `logits` [rows, vocab] of any float dtype, on any device.

    Changes neither logits nor states; the caller appends accepted tokens to the states. A row
    that is no distribution (a NaN, an infinite maximum, no token left) gives its argmax, so that
    one broken sequence does not stop the others. Raises ValueError if the lengths differ.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        if logits.device.type != "cpu":
            from memserve.engine.gpu.sampler import sample_on_gpu

            return sample_on_gpu(logits, states)
        maxima = _column_maxima(logits) if any(state.is_argmax for state in states) else None
        return [
            Sample(int(maxima[i]))
            if maxima is not None and maxima[i] >= 0 and state.is_argmax
            else sample_row(row, state)
            for i, (row, state) in enumerate(zip(logits, states, strict=True))
        ]


def _column_maxima(logits: torch.Tensor) -> IdArray | None:
    """Return the token of the first maximum of each row of `logits`, -1 for rows that the kernel
    does not handle. None unless `logits` are column-major bfloat16, the result of SharedLinear
    for several rows: only for these is the kernel faster."""
    if logits.dtype != torch.bfloat16 or not logits.t().is_contiguous():
        return None
    out = np.empty(len(logits), np.int64)
    kernels.prepare()
    kernels.first_maxima.run(logits.t().view(torch.int16).numpy(), out)
    return out


def sample_row(row: torch.Tensor, state: SamplerState) -> Sample:
    """Return a sample of a row of logits [vocab] on the host."""
    params = state.params
    raw = _float32(row)
    try:
        logits = state.adjust(raw) if state.adjusts else raw
    except GrammarFailed as error:
        return Sample(-1, failure=str(error))
    token = int(logits.argmax()) if state.greedy else _draw(logits, params, state.uniform())
    if state.constrained and not logits[token] > -np.inf:
        return Sample(-1, failure=NOTHING_ALLOWED)
    if params.logprobs is None:
        return Sample(token)
    return Sample(token, _logprobs(raw, token, params.logprobs))


def _float32(row: torch.Tensor) -> FloatArray:
    """Return a host row [vocab] as float32; without a copy if it is float32 already."""
    if row.dtype == torch.bfloat16:  # unknown to numpy: the upper half of a float32's bits
        bits = row.view(torch.int16).numpy().astype(np.int32)
        bits <<= 16
        return bits.view(np.float32)
    return row.numpy().astype(np.float32, copy=False)


def _draw(logits: FloatArray, params: SamplingParams, uniform: float) -> int:
    """Return the token of `logits` [vocab] at the fraction `uniform` of the filtered mass.

    Candidates are in descending order of probability, then by id; without any filter, in the
    order of `_draw_from_all`.
    """
    peak = float(logits.max())
    if not math.isfinite(peak):
        return int(logits.argmax())
    temperature = min(params.temperature, MAX_TEMPERATURE)
    if params.min_p > 0 or 0 < params.top_k < len(logits):
        ids = np.flatnonzero(logits >= _floor(logits, params, peak, temperature))
        total = None  # top-p then refers to the mass of the remaining tokens
    else:
        weights = _weights(logits, peak, temperature)
        if params.top_p == 1:
            return _draw_from_all(weights, uniform)
        total = _total(weights)
        ids = _nucleus_candidates(weights, total, params.top_p)

    ids = _most_probable_first(logits, ids)
    if 0 < params.top_k < len(ids):  # keep ties with the k-th token, as in vLLM
        ids = ids[logits[ids] >= logits[ids[params.top_k - 1]]]
    mass = _weights(logits[ids], peak, temperature).cumsum(dtype=np.float64)
    if params.top_p < 1:  # keep tokens up to and including the one that reaches top_p
        target = params.top_p * (mass[-1] if total is None else total)
        mass = mass[: np.searchsorted(mass, target) + 1]
    return int(ids[_locate(mass, uniform)[0]])


def _floor(logits: FloatArray, params: SamplingParams, peak: float, temperature: float) -> float:
    """Lower bound of the logits that pass min-p and top-k; exact for min-p."""
    floor = -math.inf
    if params.min_p > 0:
        floor = peak + temperature * math.log(params.min_p)
    if 0 < params.top_k < len(logits):
        floor = max(floor, _top_k_floor(logits, params.top_k))
    return floor


def _top_k_floor(logits: FloatArray, k: int) -> float:
    """Return a logit that at least `k` tokens reach, usually few more than `k`."""
    maxima = _fold(logits, -np.inf).max(axis=0)
    values = maxima if len(maxima) >= k else logits
    return float(np.partition(values, len(values) - k)[len(values) - k])


def _nucleus_candidates(weights: FloatArray, total: float, top_p: float) -> IdArray:
    """Return ids, ascending, of a superset of the top-p tokens.

    Tokens with less than (1 - top_p) / n of the total are left out. If at most n tokens are left
    out, the others reach top_p, so n = vocabulary always suffices. A small n suffices for most
    rows; the loop checks it and raises n otherwise.
    """
    n = FIRST_NUCLEUS
    while True:
        ids = np.flatnonzero(weights >= (1 - top_p) * total / n)
        if n >= len(weights) or weights[ids].sum(dtype=np.float64) >= top_p * total:
            return ids
        n *= NUCLEUS_GROWTH


def _most_probable_first(logits: FloatArray, ids: IdArray) -> IdArray:
    """Return `ids` by descending logit, then ascending id.

    Sorts integers that combine logit and id, ten times as fast as a stable sort of the logits.
    """
    bits = (logits[ids] + np.float32(0)).view(np.int32)  # + 0 turns -0.0 into 0.0
    ranks = bits ^ (bits >> 31 & 0x7FFFFFFF)  # ordered as the floats are
    keys = ~ranks.astype(np.int64) << 32 | ids
    keys.sort()
    return keys & 0xFFFFFFFF


def _draw_from_all(weights: FloatArray, uniform: float) -> int:
    """Return the token at the fraction `uniform` of `weights` [vocab], column by column."""
    folded = _fold(weights, 0)
    column, rest = _locate(folded.sum(axis=0).cumsum(dtype=np.float64), uniform)
    row, _ = _locate(folded[:, column].cumsum(dtype=np.float64), rest)
    return row * int(folded.shape[1]) + column


def _locate(mass: NDArray[np.float64], uniform: float) -> tuple[int, float]:
    """Return the item at the fraction `uniform` in [0, 1) of a cumulative mass, and the fraction
    in [0, 1) of that item's own mass. The item's mass is never zero.
    """
    target = uniform * mass[-1]  # less than mass[-1] even when rounded
    item = int(np.searchsorted(mass, target, side="right"))
    before = mass[item - 1] if item else 0.0
    return item, float((target - before) / (mass[item] - before))


def _weights(logits: FloatArray, peak: float, temperature: float) -> FloatArray:
    """Return unnormalised probabilities, 1 for the logit `peak`."""
    weights = logits - np.float32(peak)
    weights *= 1 / temperature
    np.exp(weights, out=weights)
    return weights


def _total(weights: FloatArray) -> float:
    return float(_fold(weights, 0).sum(axis=0).sum(dtype=np.float64))


def _fold(values: FloatArray, padding: float) -> FloatArray:
    """Return `values` [n] as [FOLD, columns], row-major, padded at the end."""
    missing = -len(values) % FOLD
    if missing:
        values = np.append(values, np.full(missing, padding, np.float32))
    return values.reshape(FOLD, -1)


def row_logprobs(row: torch.Tensor, token: int, count: int) -> TokenLogprobs:
    """Return log-probabilities of `token` and of the `count` most probable tokens in a row of
    logits [vocab] on the host."""
    return _logprobs(_float32(row), token, count)


def _logprobs(logits: FloatArray, token: int, count: int) -> TokenLogprobs:
    peak = float(logits.max())
    shift = peak + math.log(_total(_weights(logits, peak, 1.0)))
    top: IdArray = np.empty(0, np.int64)
    if count:
        floor = _top_k_floor(logits, min(count, len(logits)))
        top = _most_probable_first(logits, np.flatnonzero(logits >= floor))[:count]
    return TokenLogprobs(
        chosen=float(logits[token]) - shift,
        rank=1 + int(np.count_nonzero(logits > logits[token])),
        top=tuple((int(i), float(logits[i]) - shift) for i in top),
    )

"""Fit of a cost model to measurements. Coefficients are seconds per unit of work, and >= 0."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from memserve.errors import ProfileError
from memserve.scheduler.architecture import Architecture
from memserve.scheduler.compute import Measured
from memserve.scheduler.contract import Costs
from memserve.scheduler.cost_model import (
    AttentionCost,
    CostModel,
    LinkCost,
    Steps,
    window_pairs,
)
from memserve.scheduler.profiles import (
    DecodePoint,
    Measurements,
    PrefillPoint,
    TransferPoint,
)

Matrix = NDArray[np.float64]
Vector = NDArray[np.float64]

# Knots of the curve over step sizes [tokens]; only those with measured points near them are used.
_TOKEN_KNOTS = (1, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
# Pairs computed per visible pair: a masked step also computes the pairs that its mask hides, and
# so do the tiles of a sliding window.
_HIDDEN = 2.0
# Weight of an imagined point relative to a measured one: decides only where no points are measured.
_IMAGINED_WEIGHT = 1e-3
# Cost of an unmeasured network: a 10 Gbit/s link.
_UNMEASURED = LinkCost(2e-3, 1 / 1.1e9, 20e-6)
# Relative errors above this count linearly, so that a disturbed point has limited influence.
_HUBER = 0.1
_ROUNDS = 5  # of reweighting


def fit_costs(
    measured: Measurements,
    architecture: Architecture,
    max_batch_tokens: int,
    like: Costs | None = None,
) -> CostModel:
    """Return the cost model with the least relative error against the measurements.

    Few points suffice: coefficients that the points cannot tell apart are shared, and step sizes
    without points follow the curves of `like`, scaled to the measured points. Raises ProfileError
    for fewer than two different sizes of prefills or of decode steps.
    """
    prefills, decodes = _Weighed(measured.prefill), _Weighed(measured.decode)
    if like is not None and measured.prefill and measured.decode:
        prefills.add_imagined(_imagined_prefills(like, measured.prefill, max_batch_tokens))
        decodes.add_imagined(_imagined_decodes(like, measured.decode))
    prefill, prompt, attention = _fit_prefill(prefills, architecture, max_batch_tokens)
    decode, in_full, in_window = _fit_decode(decodes, architecture)
    shm = _fit_link([p for p in measured.transfer if p.path == "shm"])
    nixl = _fit_link([p for p in measured.transfer if p.path == "nixl"])
    host = like.host if isinstance(like, CostModel) else None
    pair, masked, context, window, gather = attention
    return CostModel(
        architecture=architecture,
        max_batch_tokens=max_batch_tokens,
        compute=Measured(prefill=prefill, decode=decode, prompt=prompt),
        attention=AttentionCost(
            pair=pair,
            masked_pair=masked,
            context_pair=context,
            window_pair=window,
            gather=gather,
            decode=in_full,
            decode_window=in_window,
        ),
        shm=shm or nixl or _UNMEASURED,
        nixl=nixl or _UNMEASURED,
        host=host or shm or _UNMEASURED,
    )


_Knots = tuple[tuple[int, float], ...]
_Point = TypeVar("_Point", PrefillPoint, DecodePoint)


class _Weighed(Generic[_Point]):
    """Points with weights, measured ones first."""

    def __init__(self, points: Sequence[_Point]) -> None:
        self.points: list[_Point] = list(points)
        self.measured = len(points)  # number of measured points
        self.weights = [1.0] * len(points)

    def add_imagined(self, imagined: Sequence[_Point]) -> None:
        self.points += imagined
        self.weights += [_IMAGINED_WEIGHT] * len(imagined)


def _imagined_prefills(
    like: Costs, measured: Sequence[PrefillPoint], limit: int
) -> list[PrefillPoint]:
    prompt = np.array([p.prompt_tokens for p in measured])
    cached = np.array([p.cached_tokens for p in measured])
    ratios = np.array([p.seconds for p in measured]) / like.prefill_seconds(prompt, cached)
    wanted = [(n, 0) for n in (1, 64, 256, 1024, 4096) if n <= 2 * limit]
    wanted += [(64, 4096), (512, 4096)]
    return [
        PrefillPoint(n + c, c, speed * float(like.prefill_seconds(n + c, c)))
        for n, c in wanted
        for speed in [_nearby(n, prompt - cached, ratios)]
    ]


def _imagined_decodes(like: Costs, measured: Sequence[DecodePoint]) -> list[DecodePoint]:
    sequences = np.array([p.sequences for p in measured])
    context = np.array([p.context_tokens for p in measured])
    ratios = np.array([p.seconds for p in measured])
    ratios = ratios / like.decode_step_seconds(sequences, context)
    wanted = [(s, s * length) for s in (1, 8, 32) for length in (64, 2048)]
    return [
        DecodePoint(s, c, speed * float(like.decode_step_seconds(s, c)))
        for s, c in wanted
        for speed in [_nearby(s, sequences, ratios)]
    ]


def _nearby(size: int, sizes: NDArray[np.int64], ratios: NDArray[np.float64]) -> float:
    """Return the ratio of measured to typical seconds at a step size, interpolated over `sizes`.
    It depends on the size: a machine may have typical memory and much faster arithmetic."""
    order = np.argsort(sizes, kind="stable")
    return float(np.interp(np.log(size), np.log(sizes[order]), ratios[order]))


def _fit_prefill(
    weighed: _Weighed[PrefillPoint], model: Architecture, limit: int
) -> tuple[_Knots, float, tuple[float, float, float, float, float]]:
    """Return the curve over step sizes [tokens], seconds per prompt, and the coefficients of
    attention: pair, masked pair, context pair, window pair, gathered token."""
    points = weighed.points
    cached = np.array([p.cached_tokens for p in points], dtype=np.int64)
    prompt = np.array([p.prompt_tokens for p in points], dtype=np.int64)
    n = prompt - cached
    steps = Steps.of(n, limit)
    behind = cached > 0
    first = np.minimum(n, limit)
    full = model.full_layers
    knots = _knots(steps.last, _TOKEN_KNOTS, limit)
    curve = _hats(steps.last, knots)
    curve += (steps.steps - 1)[:, None] * _hats(np.array([limit]), knots)
    causal = full * np.where(behind, 0, steps.first_pairs)
    masked = full * (np.where(behind, steps.first_pairs, 0) + steps.later_pairs)
    context = full * (n * cached + steps.context_pairs)
    windowed = np.zeros(len(points))
    if model.window_layers:
        windowed = window_pairs(prompt, model.window) - window_pairs(cached, model.window)
        windowed *= model.window_layers
    gather = full * (cached * steps.steps + np.where(behind, first, 0) + steps.gathered)
    pairs = [causal, _HIDDEN * masked + context, _HIDDEN * windowed]
    columns = pairs if weighed.measured > len(knots) + 6 else [np.sum(pairs, axis=0)]
    # Only prompts of several steps separate the cost per prompt from the cost per step.
    once = np.where((steps.steps > 1).any(), np.ones(len(points)), 0.0)
    matrix = np.column_stack([curve, once, *columns, gather])
    found = fit_relative(
        matrix, np.array([p.seconds for p in points]), np.array(weighed.weights)
    ).tolist()
    increments, (constant, *costs, read) = found[: len(knots)], found[len(knots) :]
    pair, behind_pair, window = costs if len(costs) > 1 else costs * 3
    attention = (pair, _HIDDEN * behind_pair, behind_pair, _HIDDEN * window, read)
    return _curve(knots, increments), constant, attention


def _fit_decode(weighed: _Weighed[DecodePoint], model: Architecture) -> tuple[_Knots, float, float]:
    """Return the curve over numbers of sequences, and seconds per token of context in a layer with
    full attention and in one with a sliding window."""
    points = weighed.points
    sequences = np.array([p.sequences for p in points], dtype=np.int64)
    context = np.array([p.context_tokens for p in points], dtype=np.int64)
    knots = _knots(sequences, sorted(set(sequences.tolist())), None)
    in_window = model.window_layers * np.minimum(context, sequences * model.window)
    attention = [model.full_layers * context, in_window]
    if weighed.measured <= len(knots) + 2:
        attention = [attention[0] + attention[1]]
    matrix = np.column_stack([_hats(sequences, knots), *attention])
    found = fit_relative(
        matrix, np.array([p.seconds for p in points]), np.array(weighed.weights)
    ).tolist()
    per_token = found[len(knots) :]
    return _curve(knots, found[: len(knots)]), per_token[0], per_token[-1]


def _fit_link(points: Sequence[TransferPoint]) -> LinkCost | None:
    """Return the cost of a link, or None without points."""
    if not points:
        return None
    matrix = np.array([[1.0, p.num_bytes, p.pieces] for p in points])
    found = fit_relative(matrix, np.array([p.seconds for p in points]))
    return LinkCost(*found.tolist())


def fit_relative(features: Matrix, seconds: Vector, weights: Vector | None = None) -> Vector:
    """Return coefficients >= 0 [columns] with the least relative error of `features` [points,
    columns] @ coefficients against `seconds` [points] > 0.

    Errors are squared and multiplied by `weights` [points]; those above _HUBER count linearly.
    Raises ProfileError if no solution is found.
    """
    scaled = features / seconds[:, None]
    ones = np.ones(len(seconds))
    given = ones if weights is None else weights
    pull = given
    coefficients = np.zeros(features.shape[1])
    for _ in range(_ROUNDS):
        root = np.sqrt(pull)
        coefficients = non_negative(scaled * root[:, None], ones * root)
        off = np.abs(scaled @ coefficients - 1)
        pull = given * _HUBER / np.maximum(off, _HUBER)
    return coefficients


def non_negative(a: Matrix, b: Vector) -> Vector:
    """Return argmin |a x - b| over x >= 0. Raises ProfileError if none is found."""
    from scipy.optimize import nnls  # the import takes 0.5 s, and a stored profile needs no fit

    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ProfileError(f"the {len(b)} measurements cannot be fitted: not all are finite")
    # Scale the columns to norm 1: they range from 1 for a constant to 1e12 for attention's pairs.
    norms = np.linalg.norm(a, axis=0)
    norms[norms == 0] = 1.0
    try:
        x, _ = nnls(a / norms, b)
    except RuntimeError as error:
        raise ProfileError(f"the {len(b)} measurements cannot be fitted: {error}") from error
    coefficients: Vector = x / norms
    return coefficients


def _knots(sizes: NDArray[np.int64], wanted: Sequence[int], limit: int | None) -> list[int]:
    """Return the knots, ascending measured step sizes: for each wanted size the largest measured
    one up to it, if above the previous knot. `limit`: largest knot. Raises ProfileError for fewer
    than two knots."""
    there = sorted(set(sizes.tolist()))
    if limit is not None:
        there = [size for size in there if size <= limit]
    knots: list[int] = []
    for top in wanted:
        below = [size for size in there if size <= top and (not knots or size > knots[-1])]
        if below:
            knots.append(below[-1])
    if len(knots) < 2:
        raise ProfileError(f"measured at step sizes {there} only; at least two are needed")
    return knots


def _hats(sizes: NDArray[np.int64], knots: Sequence[int]) -> Matrix:
    """Return features [sizes, knots] whose coefficients are the curve's first value and its
    increments from knot to knot."""
    columns = [np.ones(len(sizes))]
    for low, high in pairwise(knots):
        share = np.maximum(0.0, (sizes - low) / (high - low))
        columns.append(share if high == knots[-1] else np.minimum(1.0, share))
    return np.column_stack(columns)


def _curve(knots: Sequence[int], increments: Sequence[float]) -> _Knots:
    values: Vector = np.cumsum(increments)
    return tuple(zip(knots, values.tolist(), strict=True))


class ArchitectureLevel:
    """Baseline for the operator-level cost model: a constant plus seconds per FLOP of the whole
    forward pass, without steps, sliding windows and reads of the context.
    """

    def __init__(self, points: Sequence[PrefillPoint], model: Architecture) -> None:
        self._model = model
        self._coefficients = fit_relative(
            self._features(points), np.array([p.seconds for p in points])
        )

    def _features(self, points: Sequence[PrefillPoint]) -> Matrix:
        prompt = np.array([p.prompt_tokens for p in points], dtype=np.float64)
        cached = np.array([p.cached_tokens for p in points], dtype=np.float64)
        pairs = (prompt**2 - cached**2) / 2
        flops = 2.0 * self._model.parameters * (prompt - cached)
        flops += self._model.pair_flops * self._model.layers * pairs
        return np.column_stack([np.ones(len(points)), flops])

    def predict(self, points: Sequence[PrefillPoint]) -> Vector:
        """Return predicted seconds [points]."""
        predicted: Vector = self._features(points) @ self._coefficients
        return predicted


def relative_errors(predicted: NDArray[np.float64], measured: NDArray[np.float64]) -> Vector:
    """Return |predicted - measured| / measured."""
    errors: Vector = np.abs(predicted - measured) / measured
    return errors

"""The sampler's semantics, spelled out densely: float64, full sorts, no shortcuts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from memserve.api.generate import SamplingParams
from memserve.engine.sampler import SamplerState, sample

Dense = NDArray[np.float64]


class Fixed(SamplerState):
    """A state whose next uniform number the test chooses."""

    __slots__ = ("point",)

    def __init__(self, params: SamplingParams, point: float) -> None:
        super().__init__(params, np.empty(0, np.int32), ())
        self.point = point

    def uniform(self) -> float:
        return self.point


def state(
    params: SamplingParams,
    prompt: Sequence[int] = (),
    output: Sequence[int] = (),
    eos: Sequence[int] = (),
) -> SamplerState:
    """The state of a sequence after `prompt` and `output`."""
    made = SamplerState(params, np.array(prompt, np.int32), eos)
    for token in output:
        made.append(token)
    return made


def tokens(logits: torch.Tensor, states: Sequence[SamplerState]) -> list[int]:
    return [one.token for one in sample(logits, states)]


def sampled_counts(logits: ArrayLike, params: SamplingParams, points: int) -> NDArray[np.int64]:
    """How many of evenly spaced uniform numbers choose each token.

    Sampling by an inverse cumulative distribution makes this `points` times the token's
    probability to within one, so that it measures the whole distribution without chance.
    """
    row = torch.as_tensor(np.asarray(logits, np.float32))
    states = [Fixed(params, (i + 0.5) / points) for i in range(points)]
    return np.bincount(tokens(row.expand(points, -1), states), minlength=len(row))


def adjusted(
    logits: ArrayLike,
    params: SamplingParams,
    prompt: Sequence[int] = (),
    output: Sequence[int] = (),
    eos: Sequence[int] = (),
) -> Dense:
    """Logits before temperature: tokens left out, min_tokens, logit_bias, then penalties."""
    row = np.asarray(logits).astype(np.float64)
    if params.allowed_token_ids:
        others = sorted({*range(len(row))} - {*params.allowed_token_ids})
        row[others] = -np.inf
    for *before, last in params.bad_words:
        if list(output[len(output) - len(before) :]) == before:
            row[last] = -np.inf
    if len(output) < params.min_tokens:
        row[[*eos, *params.stop_token_ids]] = -np.inf
    for token, bias in params.logit_bias.items():
        row[token] += bias
    for token in {*prompt, *output}:
        factor = params.repetition_penalty
        row[token] = row[token] / factor if row[token] > 0 else row[token] * factor
    for token in {*output}:
        row[token] -= params.frequency_penalty * output.count(token) + params.presence_penalty
    return row


def probabilities(logits: ArrayLike, params: SamplingParams) -> Dense:
    """The filtered distribution of adjusted logits: temperature, min-p, top-k, top-p."""
    row = np.asarray(logits).astype(np.float64)
    weights: Dense = np.exp((row - row.max()) / params.temperature)
    weights[weights < params.min_p] = 0
    if 0 < params.top_k < len(row):
        weights[row < np.sort(row)[-params.top_k]] = 0
    order = np.lexsort((np.arange(len(row)), -row))
    reached = np.cumsum(weights[order])
    before = np.concatenate([[0.0], reached[:-1]])
    if params.top_p < 1:
        weights[order[before >= params.top_p * reached[-1]]] = 0
    weights /= weights.sum()
    return weights

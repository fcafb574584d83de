"""Sampling on a GPU: all rows that need no host in one batch, and one copy of token ids back.

Filters, order of candidates and random numbers are those of `engine/sampler.py`, so that a seed
gives the same token on a GPU and on a CPU, but for sums that differ in their last bits.

Vocabularies are not sorted: the CANDIDATES most probable tokens of each row are enough for nearly
all filters. Of a row for which they are not, the token is -1, and the host samples it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from memserve.engine.sampler import FOLD, MAX_TEMPERATURE, Sample, SamplerState, sample_row

CANDIDATES = 1024
_NO_TOKEN = -1


def sample_on_gpu(logits: Tensor, states: Sequence[SamplerState]) -> list[Sample]:
    """Return one sample per row of `logits` [rows, vocab] on a GPU, as `sample`. The host gets the
    rows of states that change logits or report log-probabilities, all by one copy."""
    tokens = draw_tokens(logits, states)
    host = [
        row
        for row, (token, state) in enumerate(zip(tokens, states, strict=True))
        if token == _NO_TOKEN or not _filters_only(state)
    ]
    samples = [Sample(token) for token in tokens]
    if host:
        for row, values in zip(host, logits[host].cpu(), strict=True):
            samples[row] = sample_row(values, states[row])
    return samples


def draw_tokens(logits: Tensor, states: Sequence[SamplerState]) -> list[int]:
    """Return the token of each row of `logits` [rows, vocab], by filters alone; -1 for rows whose
    filters keep more than CANDIDATES."""
    width = logits.shape[1]
    first = logits.argmax(1, keepdim=True)  # of equal ones the first; NaN is highest
    rows = [_Row.of(state, width) for state in states]
    if all(row.greedy for row in rows):
        return first[:, 0].tolist()
    settings = torch.tensor(rows, dtype=torch.float64)
    if logits.is_cuda:
        settings = settings.pin_memory()  # or the copy waits for the model's kernels
    settings = settings.to(logits.device, non_blocking=True)
    values = logits.float()
    row = _Rows(*settings.unsqueeze(2).unbind(1))
    peak = values.gather(1, first)
    weights = torch.exp((values - peak) * (1 / row.temperature).float())
    token = first
    if any(r.plain and not r.greedy for r in rows):
        token = _draw_from_all(weights, row.uniform)
    if not all(r.plain for r in rows):
        filtered = _draw_filtered(values, peak, weights, row)
        token = torch.where(row.plain > 0, token, filtered)
    token = torch.where((row.greedy > 0) | ~torch.isfinite(peak), first, token)
    return token[:, 0].tolist()


class _Row(NamedTuple):
    """Settings of a row; filters that are off have values that keep everything."""

    greedy: float  # 1: true
    plain: float  # no filter but the temperature
    temperature: float
    min_p: float
    top_k: float
    top_p: float
    uniform: float

    @classmethod
    def of(cls, state: SamplerState, width: int) -> _Row:
        params = state.params
        if state.greedy or not _filters_only(state):
            return cls(1.0, 1.0, 1.0, 0.0, width, 1.0, 0.0)
        top_k = params.top_k if 0 < params.top_k < width else width
        plain = top_k == width and params.min_p == 0 and params.top_p == 1
        temperature = min(params.temperature, MAX_TEMPERATURE)
        uniform = state.uniform()
        return cls(0.0, plain, temperature, params.min_p, top_k, params.top_p, uniform)


class _Rows(NamedTuple):
    """The same of all rows, [rows, 1] float64 each."""

    greedy: Tensor
    plain: Tensor
    temperature: Tensor
    min_p: Tensor
    top_k: Tensor
    top_p: Tensor
    uniform: Tensor


def _draw_filtered(values: Tensor, peak: Tensor, weights: Tensor, row: _Rows) -> Tensor:
    """Return tokens [rows, 1] drawn from what the filters keep, -1 where that may be more than the
    candidates."""
    width = values.shape[1]
    ids = _most_probable(values, min(CANDIDATES, width))
    last = ids.shape[1] - 1
    found = values.gather(1, ids)
    place = torch.arange(last + 1, device=ids.device)
    least = found.gather(1, (row.top_k.long() - 1).clamp(0, last))
    kept = (place < row.top_k) | (found >= least)  # ties with the k-th token stay, as in vLLM
    kept &= found >= (peak + row.temperature * torch.log(row.min_p)).float()
    narrowed = (row.top_k < width) | (row.min_p > 0)
    mass = (weights.gather(1, ids) * kept).cumsum(1, dtype=torch.float64)
    total = weights.sum(1, keepdim=True, dtype=torch.float64)
    target = row.top_p * torch.where(narrowed, mass[:, -1:], total)
    nucleus = (mass < target).sum(1, keepdim=True).clamp(max=last)
    nucleus = nucleus.masked_fill(row.top_p >= 1, last)
    drawn = (mass <= row.uniform * mass.gather(1, nucleus)).sum(1, keepdim=True).minimum(nucleus)
    if last + 1 == width:
        return ids.gather(1, drawn)
    # Whether no token behind the last candidate passes.
    enough = torch.where(narrowed, ~kept[:, -1:], mass[:, -1:] >= target)
    return ids.gather(1, drawn).masked_fill(~enough, _NO_TOKEN)


def _filters_only(state: SamplerState) -> bool:
    """Whether the next token depends on nothing but logits, filters and random number."""
    return state.params.logprobs is None and not state.adjusts


def _most_probable(values: Tensor, count: int) -> Tensor:
    """Return the ids [rows, count] of the highest `values` [rows, vocab] float32, in descending
    order; of equal ones, and of all candidates for the last place, the first ids."""
    width = values.shape[1]
    bits = (values + 0.0).view(torch.int32)  # + 0 turns -0.0 into 0.0
    ranks = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # ordered as the floats are
    behind = torch.arange(width - 1, -1, -1, device=values.device)
    keys = (ranks.long() << 32) | behind
    return width - 1 - (keys.topk(count, dim=1).values & 0xFFFFFFFF)


def _draw_from_all(weights: Tensor, uniform: Tensor) -> Tensor:
    """Return the tokens [rows, 1] at the fractions `uniform` [rows, 1] of `weights` [rows, vocab],
    column by column of FOLD rows, as the host's `_draw_from_all`."""
    rows, width = weights.shape
    columns = -(-width // FOLD)
    padded = torch.nn.functional.pad(weights, (0, FOLD * columns - width))
    folded = padded.view(rows, FOLD, columns)
    column, rest = _locate(folded.sum(1).cumsum(1, dtype=torch.float64), uniform)
    chosen = folded.gather(2, column[:, None].expand(rows, FOLD, 1))[:, :, 0]
    row, _ = _locate(chosen.cumsum(1, dtype=torch.float64), rest)
    return row * columns + column


def _locate(mass: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Return the item [rows, 1] at the fraction `uniform` [rows, 1] of a cumulative mass
    [rows, items], and the fraction of that item's own mass."""
    target = uniform * mass[:, -1:]
    item = (mass <= target).sum(1, keepdim=True).clamp(max=mass.shape[1] - 1)
    before = mass.gather(1, (item - 1).clamp(min=0)).masked_fill(item == 0, 0.0)
    own = mass.gather(1, item) - before
    return item, (target - before) / own.masked_fill(~(own > 0), 1.0)

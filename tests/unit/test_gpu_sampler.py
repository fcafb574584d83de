"""A batch sampled by tensor operations gives the tokens that the host's sampler gives row by row.

The operations run on any device; `make gpu-test` runs them on a GPU.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from memserve.api.generate import SamplingParams
from memserve.engine.gpu.sampler import draw_tokens, sample_on_gpu
from memserve.engine.sampler import SamplerState, sample

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROMPT = np.array([3, 4, 5], np.int32)
FILTERS: list[dict[str, Any]] = [
    {"top_k": top_k, "top_p": top_p, "min_p": min_p}
    for top_k, top_p, min_p in itertools.product(
        (0, 1, 2, 50, 700, 5000), (1.0, 0.9, 0.3, 1e-6), (0.0, 0.05, 1.0)
    )
]
TEMPERATURES = (1e-4, 0.3, 1.0, 2.5, 1e30)


def state(seed: int = 0, **params: Any) -> SamplerState:
    return SamplerState(SamplingParams(seed=seed, **params), PROMPT, (2,))


def on_gpu(logits: torch.Tensor, states: Sequence[SamplerState]) -> list[int]:
    with torch.inference_mode():
        return [s.token for s in sample_on_gpu(logits.to(DEVICE), states)]


def on_host(logits: torch.Tensor, states: Sequence[SamplerState]) -> list[int]:
    return [s.token for s in sample(logits, states)]


def rows(count: int, width: int, seed: int, scale: float, dtype: torch.dtype) -> torch.Tensor:
    made = torch.Generator().manual_seed(seed)
    return (torch.randn(count, width, generator=made) * scale).to(dtype)


class Movable(SamplerState):
    """A state whose random number a test can choose."""

    __slots__ = ("uniform",)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("width", "scale"), [(500, 1.0), (4096, 3.0), (4096, 0.0)])
def test_tokens_are_those_of_the_host(dtype: torch.dtype, width: int, scale: float) -> None:
    """`scale` 0: all logits are equal, so their order is all there is."""
    states = [
        state(seed, temperature=temperature, **filters)
        for seed, (temperature, filters) in enumerate(itertools.product(TEMPERATURES, FILTERS))
    ]
    logits = rows(len(states), width, width, scale, dtype)
    ours, theirs = on_gpu(logits, states), on_host(logits, states)
    differ = [i for i in range(len(states)) if ours[i] != theirs[i]]
    assert len(differ) <= len(states) // 200
    for i in differ:
        assert near(logits[i], states[i], ours[i], theirs[i]), states[i].params


def near(row: torch.Tensor, given: SamplerState, ours: int, theirs: int) -> bool:
    """Whether a random number that differs by a millionth has the host take our token."""
    found = set()
    for step in (-1e-6, 1e-6):
        moved = Movable(given.params, PROMPT, (2,))
        value = min(max(given.uniform() + step, 0.0), math.nextafter(1, 0))
        moved.uniform = lambda value=value: value  # type: ignore[method-assign, misc]
        found.add(sample(row[None], [moved])[0].token)
    return {ours, theirs} <= found | {theirs}


def test_a_large_vocabulary_goes_to_the_host_only_where_it_must() -> None:
    logits = rows(6, 151_936, 1, 4.0, torch.bfloat16)
    states = [
        state(1, temperature=0.7, top_p=0.9),
        state(2, temperature=1.0),
        state(3, temperature=1.0, top_k=40),
        state(4, temperature=1e30, top_p=0.9),  # uniform: 90% of the vocabulary
        state(5, temperature=1.0, top_k=2000),
        state(6, temperature=0.0),
    ]
    drawn = draw_tokens(logits.to(DEVICE), states)
    assert [token < 0 for token in drawn] == [False, False, False, True, True, False]
    assert on_gpu(logits, states) == on_host(logits, states)


def test_greedy_is_the_first_maximum() -> None:
    logits = rows(4, 1000, 2, 1.0, torch.bfloat16)
    logits[0, [700, 30, 31]] = 9.0
    logits[1, [5, 900]] = math.nan
    logits[2, :] = -math.inf
    logits[3, [40, 60]] = math.inf
    logits[3, 70] = math.nan
    greedy = [state(temperature=0.0)] * 4
    assert on_gpu(logits, greedy) == [30, 5, 0, 70]
    assert on_gpu(logits, [state(1, temperature=0.8, top_p=0.5)] * 4)[1:] == [5, 0, 70]
    assert on_gpu(logits, greedy) == on_host(logits, greedy)
    negative = torch.tensor([0xFFC0], dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    logits[2, 44] = negative[0]  # a NaN with a sign is one, too
    assert on_gpu(logits[2:3], greedy[:1]) == [44]
    zeros = torch.tensor([[-0.0, 0.0, -1.0]])
    assert on_gpu(zeros, greedy[:1]) == [0]


def test_a_row_does_not_depend_on_the_others() -> None:
    states = [state(seed, temperature=0.9, **FILTERS[seed % len(FILTERS)]) for seed in range(40)]
    logits = rows(40, 900, 3, 2.0, torch.float32)
    together = on_gpu(logits, states)
    order = np.random.default_rng(0).permutation(40)
    shuffled = on_gpu(logits[order], [states[i] for i in order])
    assert shuffled == [together[i] for i in order]
    assert [on_gpu(logits[i : i + 1], [states[i]])[0] for i in range(40)] == together


def test_rows_that_need_the_host_are_sampled_there() -> None:
    logits = rows(4, 600, 4, 2.0, torch.float32)
    states = [
        state(1, temperature=0.8, top_p=0.9),
        state(2, temperature=0.0, logit_bias={7: 100.0}),
        state(3, temperature=0.9, logprobs=3),
        state(4, temperature=0.7, repetition_penalty=1.3),
    ]
    ours = sample_on_gpu(logits.to(DEVICE), states)
    assert ours == sample(logits, states)
    assert ours[1].token == 7
    assert ours[2].logprobs is not None


def test_nothing_waits_for_the_device_before_the_tokens() -> None:
    """One copy of token ids back: no value of a tensor is read before."""
    read: list[str] = []

    class Watched(torch.Tensor):
        @classmethod
        def __torch_function__(
            cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func.__name__ in {"item", "tolist", "nonzero", "__bool__", "__int__", "cpu"}:
                read.append(func.__name__)
            return super().__torch_function__(func, types, args, kwargs or {})

    logits = rows(3, 600, 5, 2.0, torch.float32).as_subclass(Watched)
    states = [state(1, temperature=0.8, top_p=0.9), state(2, temperature=1.0), state(3, top_k=4)]
    draw_tokens(logits, states)
    assert read == ["tolist"]
    read.clear()
    draw_tokens(logits, [state(temperature=0.0)] * 3)
    assert read == ["tolist"]

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import (
    LogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from memserve.api.generate import SamplingParams, validate_sampling
from memserve.engine.gpu.sampler import sample_on_gpu
from memserve.engine.sampler import _FixedTokens, sample
from memserve.engine.token_counts import SORTED_BELOW
from memserve.errors import RequestError
from tests.sampler_reference import Fixed, adjusted, probabilities, sampled_counts, state, tokens

GREEDY = SamplingParams(temperature=0)
VOCAB = 1000  # not a multiple of the sampler's fold


def random_logits(*shape: int, seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def mixed_params() -> list[SamplingParams]:
    """One of each way through the sampler."""
    return [
        GREEDY,
        SamplingParams(temperature=0, repetition_penalty=1.3, logprobs=2),
        SamplingParams(seed=1),
        SamplingParams(seed=2, temperature=0.7, top_p=0.9),
        SamplingParams(seed=3, top_k=40, top_p=0.8, logprobs=0),
        SamplingParams(seed=4, min_p=0.02, presence_penalty=0.5),
        SamplingParams(seed=5, logit_bias={3: 5.0}, min_tokens=4, stop_token_ids=(7,)),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_greedy_takes_the_lowest_of_equal_maxima(dtype: torch.dtype) -> None:
    """As `generate` of Transformers does, so that outputs can be compared token by token."""
    logits = random_logits(3, VOCAB).clamp(max=3.0).to(dtype)
    assert tokens(logits, [state(GREEDY)] * 3) == logits.argmax(dim=-1).tolist()
    assert (logits == logits.amax(dim=-1, keepdim=True)).sum() > 3  # there were ties


def test_every_dtype_samples_as_its_values_in_float32_do() -> None:
    states = [state(params) for params in mixed_params()]
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        logits = random_logits(len(states), VOCAB).to(dtype)
        assert sample(logits, states) == sample(logits.float(), states)


def test_tiny_temperatures_are_greedy_and_huge_ones_uniform() -> None:
    """Neither end may overflow into NaN, with masked tokens in the row least of all."""
    logits = torch.tensor([1.0, 1.5, -math.inf, 0.5])
    for temperature in (1e-5, 1e-6, 1e-300):
        cold = SamplingParams(temperature=temperature, seed=0)
        assert tokens(logits[None], [state(cold)]) == [1]
    hot = sampled_counts(logits, SamplingParams(temperature=1e300), 300)
    assert hot.tolist() == [100, 100, 0, 100]


@pytest.mark.parametrize(
    ("params", "processor"),
    [
        (SamplingParams(top_k=50), TopKLogitsWarper(50)),
        (SamplingParams(top_k=1), TopKLogitsWarper(1)),
        (SamplingParams(top_p=0.9), TopPLogitsWarper(0.9)),
        (SamplingParams(top_p=0.05), TopPLogitsWarper(0.05)),
        (SamplingParams(min_p=0.1), MinPLogitsWarper(0.1)),
    ],
)
def test_filters_keep_what_transformers_keeps(
    params: SamplingParams, processor: LogitsProcessor
) -> None:
    logits = random_logits(VOCAB, seed=1)
    kept = processor(torch.zeros(1, 1, dtype=torch.long), logits[None])[0].isfinite().numpy()
    counts = sampled_counts(logits, params, 4000)  # finer than the least probable kept token
    assert ((counts > 0) == kept).all()


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.5),
        SamplingParams(top_k=7),
        SamplingParams(top_k=900),
        SamplingParams(top_k=VOCAB + 1),
        SamplingParams(temperature=1.7, top_p=0.999),
        SamplingParams(min_p=0.3),
        SamplingParams(temperature=1.5, min_p=0.05, top_k=60, top_p=0.7),
    ],
)
def test_samples_the_whole_filtered_distribution(params: SamplingParams) -> None:
    logits = random_logits(VOCAB, seed=2)
    expected = probabilities(logits, params) * 3000
    assert np.abs(sampled_counts(logits, params, 3000) - expected).max() <= 1.01


def test_a_nucleus_larger_than_the_first_guess_is_found_whole() -> None:
    """Nearly flat over 5000 tokens: none of them is above 1 / 1024 of what may be left out."""
    params = SamplingParams(top_p=0.5)
    logits = random_logits(5000, scale=0.01)
    counts = sampled_counts(logits, params, 10_000)
    assert (counts > 0).sum() == (probabilities(logits, params) > 0).sum()


def test_top_k_is_exact_where_the_best_tokens_share_a_column() -> None:
    """The bound on the k-th largest comes from column maxima; one column may hold them all."""
    logits = torch.full((6400,), -math.inf)
    logits[5::100] = torch.arange(64.0) / 64
    counts = sampled_counts(logits, SamplingParams(top_k=10), 1000)
    assert np.flatnonzero(counts).tolist() == list(range(5405, 6400, 100))


def test_top_k_keeps_the_ties_of_the_last_one() -> None:
    logits = torch.tensor([0.0, 1.0, 1.0, 2.0, 1.0])
    counts = sampled_counts(logits, SamplingParams(top_k=2), 1000)
    assert np.flatnonzero(counts).tolist() == [1, 2, 3, 4]


def test_order_is_min_p_then_top_k_then_top_p() -> None:
    """Each filter sees the mass that the one before left: 0.5 of all is more than 0.5 of it."""
    logits = torch.tensor([0.4, 0.25, 0.2, 0.15]).log()
    for one in (SamplingParams(min_p=0.6, top_p=0.6), SamplingParams(top_k=2, top_p=0.6)):
        assert np.flatnonzero(sampled_counts(logits, one, 100)).tolist() == [0]
    both = sampled_counts(logits, SamplingParams(top_p=0.6), 100)
    assert np.flatnonzero(both).tolist() == [0, 1]


@pytest.mark.parametrize("length", [10, SORTED_BELOW, 3 * SORTED_BELOW])
def test_penalties_are_the_same_however_long_the_prompt_is(length: int) -> None:
    rng = np.random.default_rng(length)
    params = SamplingParams(repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=-0.25)
    prompt = rng.integers(0, 300, length).tolist()
    output = rng.integers(0, 500, 40).tolist()
    row = rng.normal(size=500).astype(np.float32)
    made = state(params, prompt, output)
    np.testing.assert_allclose(made.adjust(row), adjusted(row, params, prompt, output), rtol=1e-5)


def test_repetition_penalty_is_that_of_transformers() -> None:
    prompt, output = [1, 2, 2, 900], [5, 2, 7]
    penalty = 1.7
    logits = random_logits(VOCAB, seed=3)
    processor = RepetitionPenaltyLogitsProcessor(penalty)
    expected = processor(torch.tensor([prompt + output]), logits[None])[0]
    made = state(SamplingParams(repetition_penalty=penalty), prompt, output)
    assert np.array_equal(made.adjust(logits.numpy()), expected.numpy())


def test_presence_and_frequency_count_output_only() -> None:
    params = SamplingParams(presence_penalty=1.0, frequency_penalty=0.5)
    made = state(params, prompt=[1, 1, 2], output=[2, 3, 3])
    change = made.adjust(np.zeros(5, np.float32))
    assert change.tolist() == [0, 0, -1.5, -2.0, 0]


def test_changes_to_logits_match_the_dense_reference_at_every_step() -> None:
    params = SamplingParams(
        repetition_penalty=0.8,
        presence_penalty=-0.3,
        frequency_penalty=0.7,
        logit_bias={4: 2.0, 9: -100.0},
        min_tokens=3,
        stop_token_ids=(4, 11),
    )
    prompt, output, eos = [4, 9, 30], [9, 12, 12, 4, 9], (2,)
    logits = random_logits(VOCAB).numpy()
    made = state(params, prompt, eos=eos)
    for done in range(len(output) + 1):
        expected = adjusted(logits, params, prompt, output[:done], eos)
        np.testing.assert_allclose(made.adjust(logits), expected, rtol=1e-6)
        if done < len(output):
            made.append(output[done])


def test_end_tokens_wait_for_min_tokens() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    made = state(SamplingParams(temperature=0, min_tokens=2, stop_token_ids=(3,)), eos=(2,))
    for expected in (1, 1, 3):
        assert tokens(logits, [made]) == [expected]
        made.append(expected)


def test_logits_stay_as_they_are() -> None:
    """Other readers of the same tensor (prompt logprobs, another sample) see raw logits."""
    states = [state(params, [1], [2]) for params in mixed_params()]
    logits = random_logits(len(states), VOCAB)
    before = logits.clone()
    sample(logits, states)
    assert torch.equal(logits, before)


def test_logprobs_are_of_the_raw_distribution() -> None:
    logits = random_logits(1, VOCAB, seed=4)
    raw = logits[0].log_softmax(-1)
    params = SamplingParams(temperature=0.3, logit_bias={17: 100.0}, logprobs=5, seed=0)
    [one] = sample(logits, [state(params)])
    assert one.token == 17
    assert one.logprobs is not None
    assert one.logprobs.chosen == pytest.approx(float(raw[17]), abs=1e-5)
    assert one.logprobs.rank == 1 + int((raw > raw[17]).sum())
    values, ids = raw.topk(5)
    assert [token for token, _ in one.logprobs.top] == ids.tolist()
    assert [p for _, p in one.logprobs.top] == pytest.approx(values.tolist(), abs=1e-5)


def test_logprobs_of_ties_and_of_small_vocabularies() -> None:
    logits = torch.tensor([[-1.0, -0.0, 0.0, -0.0]])
    [one] = sample(logits, [state(SamplingParams(temperature=0, logprobs=20))])
    assert one.logprobs is not None
    assert [token for token, _ in one.logprobs.top] == [1, 2, 3, 0]
    assert one.logprobs.rank == 1
    [none] = sample(logits, [state(SamplingParams(temperature=0, logprobs=0))])
    assert none.logprobs is not None
    assert none.logprobs.top == ()


def chi_square(counts: NDArray[np.int64], expected: NDArray[np.float64]) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(top_k=12)])
@pytest.mark.parametrize("vary", ["position", "seed"])
def test_draws_follow_the_distribution(params: SamplingParams, vary: str) -> None:
    """Along one sequence, and over neighbouring seeds at one position."""
    draws, vocab = 20_000, 16
    logits = random_logits(vocab, scale=1.0)
    if vary == "position":
        one = state(msgspec.structs.replace(params, seed=9))
        chosen = []
        for _ in range(draws):
            chosen += tokens(logits[None], [one])
            one.append(chosen[-1])
    else:
        states = [state(msgspec.structs.replace(params, seed=i), [0] * 5) for i in range(draws)]
        chosen = tokens(logits.expand(draws, -1), states)
    counts = np.bincount(chosen, minlength=vocab)
    expected = probabilities(logits, params) * draws
    kept = expected > 0
    assert counts[~kept].sum() == 0
    # 15 degrees of freedom at most: 50 is passed once in 100,000 by a right sampler.
    assert chi_square(counts[kept], expected[kept]) < 50


def test_seed_and_position_alone_decide() -> None:
    """A sequence that goes on elsewhere, its output now in the prompt, draws the same."""
    params = SamplingParams(seed=-3)
    whole = state(params, prompt=[1, 2, 3, 4, 5, 6])
    assert state(params, [1, 2, 3], output=[4, 5, 6]).uniform() == whole.uniform()
    assert state(params, [1, 2, 3], output=[4, 5]).uniform() != whole.uniform()
    assert state(SamplingParams(seed=-4), [0] * 6).uniform() != whole.uniform()


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(top_k=3)])
def test_the_ends_of_the_unit_interval_choose_tokens_with_mass(params: SamplingParams) -> None:
    logits = torch.full((1, 200), -math.inf)
    logits[0, 70:72] = 0.0
    ends = [Fixed(params, point) for point in (0.0, math.nextafter(1.0, 0.0))]
    assert tokens(logits.expand(2, -1), ends) == [70, 71]


def test_without_a_seed_sequences_differ() -> None:
    first, second = state(SamplingParams()), state(SamplingParams())
    assert first.uniform() != second.uniform()
    assert first.uniform() == first.uniform()


def test_extreme_seeds_are_different_ones() -> None:
    seeds = (-(2**63), -1, 0, 1, 2**63 - 1)
    assert len({state(SamplingParams(seed=seed)).uniform() for seed in seeds}) == len(seeds)


def test_a_broken_row_stops_nobody() -> None:
    """NaN, an infinity, and a row with nothing left give some token; the others theirs."""
    for params in mixed_params():
        states = [state(params)] * 4
        logits = random_logits(4, VOCAB)
        alone = sample(logits[3:], states[3:])
        logits[0, 10] = math.nan
        logits[1, 11] = math.inf
        logits[2] = -math.inf
        result = sample(logits, states)
        assert result[3:] == alone
        assert all(0 <= one.token < VOCAB for one in result)


def test_rows_and_states_must_be_as_many() -> None:
    with pytest.raises(ValueError, match="shorter"):
        sample(random_logits(2, VOCAB), [state(GREEDY)])


def test_rows_from_a_device_give_the_same_samples() -> None:
    """The path of logits on a GPU, run where there may be none."""
    states = [state(params, [1], [2]) for params in mixed_params()]
    logits = random_logits(len(states), VOCAB).bfloat16()
    assert sample_on_gpu(logits, states) == sample(logits, states)
    assert sample_on_gpu(logits[:1], states[:1]) == sample(logits[:1], states[:1])


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_logits_give_the_same_samples() -> None:
    states = [state(params, [1], [2]) for params in mixed_params()]
    logits = random_logits(len(states), VOCAB).bfloat16()
    assert sample(logits.cuda(), states) == sample(logits, states)


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("param", "values"),
    [
        ("max_tokens", [0, -1]),
        ("min_tokens", [-1, 17]),
        ("temperature", [-0.1, NAN, INF]),
        ("top_k", [-2]),
        ("top_p", [0.0, -0.5, 1.01, NAN]),
        ("min_p", [-0.1, 1.1, NAN]),
        ("repetition_penalty", [0.0, -1.0, NAN, INF]),
        ("presence_penalty", [-2.1, 2.1, NAN]),
        ("frequency_penalty", [-2.1, 2.1, NAN]),
        ("logprobs", [-1, 21]),
        ("seed", [2**63, -(2**63) - 1]),
        ("stop_token_ids", [(5, -1), (VOCAB,)]),
        ("logit_bias", [{VOCAB: 0.0}, {-1: 0.0}, {1: 100.5}, {1: NAN}]),
    ],
)
def test_values_out_of_range_are_refused_by_name(param: str, values: list[object]) -> None:
    for value in values:
        with pytest.raises(RequestError, match=param) as caught:
            validate_sampling(SamplingParams(**{param: value}), VOCAB)  # type: ignore[arg-type]
        assert caught.value.param == param


def test_the_ends_of_every_range_are_allowed() -> None:
    validate_sampling(SamplingParams(), VOCAB)
    low = SamplingParams(
        max_tokens=1,
        temperature=0,
        top_k=-1,
        presence_penalty=-2,
        frequency_penalty=-2,
        logprobs=0,
        seed=-(2**63),
        stop_token_ids=(0,),
        logit_bias={0: -100},
    )
    high = SamplingParams(
        min_tokens=16,
        temperature=100,
        top_k=10**6,
        min_p=1,
        presence_penalty=2,
        frequency_penalty=2,
        logprobs=20,
        seed=2**63 - 1,
        stop_token_ids=(VOCAB - 1,),
        logit_bias={VOCAB - 1: 100},
    )
    validate_sampling(low, VOCAB)
    validate_sampling(high, VOCAB)


def test_bad_words_cost_nothing_behind_other_tokens() -> None:
    """Of words of many lengths, those are compared that the last token belongs to."""

    class Counted(list[int]):
        compared = 0

        def __getitem__(self, at: Any) -> Any:
            if isinstance(at, slice):
                self.compared += 1
            return super().__getitem__(at)

    words = tuple((*[1] * length, 2, 3) for length in range(85))
    fixed = _FixedTokens(SamplingParams(bad_words=words), ())
    for last, compared in ((1, 0), (3, 0), (2, 85)):
        recent = Counted([*[1] * 85, last])
        logits = fixed.filtered(np.zeros(9, np.float32), recent)
        assert recent.compared == compared
        assert np.isneginf(logits).tolist() == [last == 2 and token == 3 for token in range(9)]

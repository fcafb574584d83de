from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memserve.api.generate import SamplingParams
from memserve.engine.sampler import sample
from tests.sampler_reference import adjusted, probabilities, sampled_counts, state

VOCAB = 130  # two columns and a bit, so that the best tokens share columns and rows

# Coarse, so that ties are common; masked tokens among them.
logit = st.one_of(st.integers(-24, 24).map(lambda n: n / 8), st.just(-np.inf))
logit_row = st.lists(logit, min_size=VOCAB, max_size=VOCAB).filter(lambda row: max(row) > -np.inf)
token = st.integers(0, VOCAB - 1)

filters = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.3, 0.7, 1.0, 1.9]),
    top_k=st.sampled_from([-1, 0, 1, 2, 3, 10, 64, 129, 130, 500]),
    top_p=st.sampled_from([0.013, 0.37, 0.81, 0.97, 1.0]),
    min_p=st.sampled_from([0.0, 1e-4, 0.043, 0.51, 1.0]),
    seed=st.integers(-(2**63), 2**63 - 1),
)
penalties = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.9]),
    repetition_penalty=st.sampled_from([1.0, 0.7, 1.4]),
    presence_penalty=st.sampled_from([0.0, 0.6]),
    frequency_penalty=st.sampled_from([0.0, -0.4]),
    logit_bias=st.dictionaries(token, st.floats(-100, 100, width=32), max_size=3),
    allowed_token_ids=st.just(()) | st.lists(token, min_size=1, max_size=60).map(tuple),
    bad_words=st.lists(st.lists(token | st.integers(1, 3), min_size=1, max_size=3).map(tuple)).map(
        tuple
    ),
    min_tokens=st.integers(0, 6),
    stop_token_ids=st.lists(token, max_size=2).map(tuple),
    logprobs=st.sampled_from([None, 0, 3]),
    seed=st.integers(0, 9),
)


@settings(deadline=None)
@given(row=logit_row, params=filters)
def test_the_distribution_is_that_of_a_full_sort(row: list[float], params: SamplingParams) -> None:
    points = 400
    counts = sampled_counts(row, params, points)
    expected = probabilities(row, params)
    assert not counts[expected == 0].any()
    assert np.abs(counts - points * expected).max() <= 1.01


@settings(deadline=None)
@given(
    row=logit_row,
    params=penalties,
    prompt=st.lists(token, min_size=1, max_size=9),
    output=st.lists(token | st.integers(1, 3), max_size=9),
)
def test_counts_kept_token_by_token_give_the_dense_logits(
    row: list[float], params: SamplingParams, prompt: list[int], output: list[int]
) -> None:
    made = state(params, prompt, eos=(2,))
    for done in range(len(output) + 1):
        expected = adjusted(row, params, prompt, output[:done], (2,))
        actual = made.adjust(np.array(row, np.float32))
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-4)
        assert made.adjusts or np.array_equal(actual, np.array(row, np.float32))
        if done < len(output):
            made.append(output[done])


@settings(deadline=None)
@given(
    batch=st.lists(st.tuples(logit_row, st.one_of(filters, penalties)), min_size=1, max_size=5),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    data=st.data(),
)
def test_a_row_does_not_depend_on_the_others(
    batch: list[tuple[list[float], SamplingParams]], dtype: torch.dtype, data: st.DataObject
) -> None:
    logits = torch.tensor([row for row, _ in batch]).to(dtype)
    states = [state(params, [1, 2], [3, 3]) for _, params in batch]
    together = sample(logits, states)
    alone = [sample(logits[i : i + 1], states[i : i + 1])[0] for i in range(len(batch))]
    assert alone == together
    order = data.draw(st.permutations(range(len(batch))))
    permuted = sample(logits[order], [states[i] for i in order])
    assert permuted == [together[i] for i in order]

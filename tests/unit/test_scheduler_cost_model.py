"""The closed form against step-by-step sums, and what a scheduler relies on."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memserve.scheduler.architecture import GEMMA3_270M, LLAMA2_13B, Architecture
from memserve.scheduler.compute import Measured, Waves
from memserve.scheduler.cost_model import (
    MAX_TOKENS,
    AttentionCost,
    CostModel,
    LinkCost,
    recompute_cost,
)
from memserve.scheduler.hardware import cost_model

LIMIT = 96
WINDOW = 40
MODEL = Architecture(
    name="small",
    layers=5,
    hidden=64,
    heads=4,
    kv_heads=2,
    head_dim=16,
    intermediate=128,
    vocab=512,
    window=WINDOW,
    window_layers=3,
)
COSTS = CostModel(
    architecture=MODEL,
    max_batch_tokens=LIMIT,
    compute=Measured(
        prefill=((1, 0.5), (32, 0.7), (LIMIT, 2.1)),
        decode=((1, 0.4), (8, 0.6)),
        prompt=0.25,
    ),
    attention=AttentionCost(
        pair=1e-4,
        masked_pair=3e-4,
        context_pair=2e-4,
        window_pair=5e-5,
        gather=7e-4,
        decode=1e-3,
        decode_window=2e-3,
    ),
    shm=LinkCost(1e-3, 1e-9, 1e-6),
    nixl=LinkCost(2e-3, 4e-9, 3e-6),
    host=LinkCost(0.0, 5e-10, 0.0),
)


def step_by_step(prompt: int, cached: int) -> float:
    """The definition: a sum over steps, and in each over layers, queries and keys."""
    knots = COSTS.compute
    assert isinstance(knots, Measured)
    at, seconds = zip(*knots.prefill, strict=True)
    cost = COSTS.attention
    total = knots.prompt
    done = cached
    while done < prompt:
        tokens = min(LIMIT, prompt - done)
        total += float(np.interp(tokens, at, seconds))
        own = tokens**2 / 2
        full = MODEL.full_layers
        if done == 0:
            total += full * cost.pair * own
        else:
            total += full * (cost.masked_pair * own + cost.context_pair * tokens * done)
            total += full * cost.gather * (done + tokens)
        done += tokens

    def in_window(tokens: int) -> float:
        if tokens < WINDOW:
            return tokens**2 / 2
        return WINDOW**2 / 2 + (tokens - WINDOW) * WINDOW

    total += MODEL.window_layers * cost.window_pair * (in_window(prompt) - in_window(cached))
    return total


@given(st.integers(1, 1000), st.floats(0, 0.999))
def test_the_closed_form_is_the_sum_over_steps(prompt: int, ratio: float) -> None:
    cached = int(prompt * ratio)
    predicted = float(COSTS.prefill_seconds(prompt, cached))
    assert predicted == pytest.approx(step_by_step(prompt, cached), rel=1e-9)


def test_arguments_broadcast() -> None:
    cached = np.array([0, 16, 160, 480])
    together = COSTS.prefill_seconds(500, cached)
    assert together.shape == (4,)
    assert together.tolist() == [float(COSTS.prefill_seconds(500, c)) for c in cached]
    table = COSTS.prefill_seconds(np.array([[300], [500]]), np.array([0, 16]))
    assert table.shape == (2, 2)
    assert table[1].tolist() == together[:2].tolist()


def test_a_prompt_that_is_all_cached_computes_its_last_token() -> None:
    assert float(COSTS.prefill_seconds(64, 64)) > 0.5


def test_tables_grow_with_what_is_asked() -> None:
    long = float(cost_model("h800", "llama2-13b", tp=2).prefill_seconds(200_000, 0))
    assert long > float(cost_model("h800", "llama2-13b", tp=2).prefill_seconds(100_000, 0))
    assert float(COSTS.decode_step_seconds(5000, 0)) > float(COSTS.decode_step_seconds(500, 0))


def test_absurd_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match=r"a prompt of \d+ tokens"):
        COSTS.prefill_seconds(MAX_TOKENS, 0)
    with pytest.raises(ValueError, match=r"a batch of \d+ sequences"):
        COSTS.decode_step_seconds(MAX_TOKENS, 0)


def test_a_decode_step_reads_what_its_layers_see() -> None:
    # 4 sequences of 100 tokens: the 2 full layers read 400 each, the 3 others 40 of each.
    expected = np.interp(4, (1, 8), (0.4, 0.6)) + 2 * 1e-3 * 400 + 3 * 2e-3 * 4 * WINDOW
    assert float(COSTS.decode_step_seconds(4, 400)) == pytest.approx(expected)
    assert float(COSTS.decode_step_seconds(0, 0)) == 0.0


def test_transfers_cost_latency_bytes_and_pieces() -> None:
    assert float(COSTS.transfer_seconds(10**6, 100, "shm")) == pytest.approx(2.1e-3)
    assert float(COSTS.transfer_seconds(10**6, 100, "nixl")) == pytest.approx(6.3e-3)
    assert COSTS.transfer_seconds(np.array([1, 2]), 1, "shm").shape == (2,)


@pytest.mark.parametrize("model", [COSTS, cost_model("h800", "llama2-13b", tp=2)])
def test_a_model_survives_json(model: CostModel) -> None:
    again = msgspec.json.decode(msgspec.json.encode(model), type=CostModel)
    assert again == model
    assert float(again.prefill_seconds(3000, 512)) == float(model.prefill_seconds(3000, 512))


@pytest.mark.parametrize(
    "knots", [((1, 0.1),), ((4, 0.1), (2, 0.2)), ((2, 0.1), (2, 0.2)), ((0, 0.1), (2, 0.2))]
)
def test_measured_step_sizes_must_ascend(knots: tuple[tuple[int, float], ...]) -> None:
    with pytest.raises(ValueError, match="at least two, ascending"):
        Measured(prefill=knots, decode=((1, 0.1), (2, 0.2)), prompt=0.0)


def test_more_costs_more_and_cached_tokens_save() -> None:
    model = cost_model("h800", "llama2-13b", tp=2)
    prompts = np.arange(1, 20_000, 37)
    seconds = model.prefill_seconds(prompts, 0)
    assert (np.diff(seconds) > -1e-3).all()  # kernels of other tiles cost a little less
    cached = model.prefill_seconds(20_000, np.arange(0, 20_000, 512))
    assert (np.diff(cached) < 0).all()
    steps = model.decode_step_seconds(np.arange(1, 65), np.arange(1, 65) * 1000)
    assert (np.diff(steps) > 0).all()


def test_a_last_wave_takes_as_long_as_a_full_one() -> None:
    waves = Waves(
        units=10, tile=(16, 64), flops=1e12, bandwidth=1e15, step_seconds=0.0, token_seconds=0.0
    )
    table = waves.prefill_table(LLAMA2_13B, 4096)
    # Full tiles: from one token more a whole row of tiles is computed.
    assert table[2048 + 1] > table[2048]
    assert table[2048 + 2] == table[2048 + 16]


def test_small_steps_take_as_long_as_reading_the_weights() -> None:
    table = cost_model("h100", "llama2-13b").compute.decode_table(LLAMA2_13B, 8)
    reading = 2 * LLAMA2_13B.parameters / (3.35e12 * 0.8)
    assert table[1] == pytest.approx(reading, rel=0.25)
    assert table[8] == pytest.approx(table[1], rel=0.02)


def test_recomputing_a_block_costs_more_behind_a_long_context() -> None:
    model = cost_model("cpu", GEMMA3_270M)
    cost = recompute_cost(model, 16)
    assert 0 < cost(16) < cost(32768)
    # The blocks of a prompt together are about the prompt.
    whole = sum(cost(end) for end in range(16, 8192 + 1, 16))
    assert whole == pytest.approx(float(model.prefill_seconds(8192, 0)), rel=0.3)

"""Fits recover the model that points were made with, few points are enough, outliers are not
believed."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memserve.errors import ModelError, ProfileError
from memserve.instance.fit import (
    ArchitectureLevel,
    fit_costs,
    fit_relative,
    non_negative,
    relative_errors,
)
from memserve.instance.profiler import FULL, QUICK
from memserve.scheduler.architecture import GEMMA3_270M, read_architecture
from memserve.scheduler.compute import Measured
from memserve.scheduler.cost_model import AttentionCost, CostModel, LinkCost
from memserve.scheduler.hardware import HARDWARE, cores, derive
from memserve.scheduler.profiles import (
    DecodePoint,
    Measurements,
    PrefillPoint,
    TransferPoint,
)

LIMIT = 2048
# An instance much like a CPU's.
TRUTH = CostModel(
    architecture=GEMMA3_270M,
    max_batch_tokens=LIMIT,
    compute=Measured(
        prefill=((1, 0.09), (64, 0.12), (256, 0.2), (1024, 0.7), (2048, 1.5)),
        decode=((1, 0.09), (2, 0.11), (16, 0.13), (32, 0.16)),
        prompt=0.02,
    ),
    attention=AttentionCost(
        pair=2e-8,
        masked_pair=3.2e-8,
        context_pair=1.6e-8,
        window_pair=2.4e-8,
        gather=8e-7,
        decode=4e-7,
        decode_window=4e-7,
    ),
    shm=LinkCost(1e-3, 2e-10, 8e-6),
    nixl=LinkCost(2e-3, 4e-10, 2e-6),
    host=LinkCost(0.0, 2e-10, 0.0),
)
_RNG = np.random.default_rng(0)
HELD_OUT = [
    (int(x), int(x * y) // 16 * 16)
    for x, y in zip(2 ** _RNG.uniform(6, 13, 60), _RNG.uniform(0, 0.95, 60), strict=True)
]


def measured(plan_prefill, plan_decode, disturb=lambda _: 1.0) -> Measurements:  # type: ignore[no-untyped-def]
    """What an instance like TRUTH would show."""
    prefill = [
        PrefillPoint(n + c, c, float(TRUTH.prefill_seconds(n + c, c)) * disturb(i))
        for i, (n, c) in enumerate(plan_prefill)
    ]
    decode = [
        DecodePoint(s, s * c, float(TRUTH.decode_step_seconds(s, s * c)) * disturb(i))
        for i, (s, c) in enumerate(plan_decode)
    ]
    transfer = [
        TransferPoint(path, size, pieces, float(TRUTH.transfer_seconds(size, pieces, path)))
        for path in ("shm", "nixl")
        for size, pieces in ((300_000, 1), (300_000, 36), (5_000_000, 16), (40_000_000, 2304))
    ]
    return Measurements(tuple(prefill), tuple(decode), tuple(transfer))


def errors(costs: CostModel) -> np.ndarray:
    prompts, cached = zip(*HELD_OUT, strict=True)
    truth = TRUTH.prefill_seconds(prompts, cached)
    return relative_errors(costs.prefill_seconds(prompts, cached), truth)


def test_a_full_profile_predicts_points_that_were_held_out() -> None:
    costs = fit_costs(measured(FULL.prefill, FULL.decode), GEMMA3_270M, LIMIT)
    found = errors(costs)
    assert np.median(found) < 0.02
    assert found.max() < 0.08
    for sequences, context in ((3, 700), (12, 4000), (32, 9000)):
        truth = float(TRUTH.decode_step_seconds(sequences, context))
        predicted = float(costs.decode_step_seconds(sequences, context))
        assert predicted == pytest.approx(truth, rel=0.05)


def test_links_are_told_apart_by_latency_bytes_and_pieces() -> None:
    costs = fit_costs(measured(FULL.prefill, FULL.decode), GEMMA3_270M, LIMIT)
    for path in ("shm", "nixl"):
        truth = float(TRUTH.transfer_seconds(20_000_000, 500, path))
        assert float(costs.transfer_seconds(20_000_000, 500, path)) == pytest.approx(
            truth, rel=0.01
        )


def test_a_quick_profile_is_enough_to_begin_with() -> None:
    found = errors(fit_costs(measured(QUICK.prefill, QUICK.decode), GEMMA3_270M, LIMIT))
    assert np.median(found) < 0.1
    assert np.percentile(found, 95) < 0.25


def test_two_points_of_each_kind_are_enough_for_something() -> None:
    costs = fit_costs(measured(QUICK.prefill[:2], QUICK.decode[:2]), GEMMA3_270M, LIMIT)
    assert float(costs.prefill_seconds(256, 0)) == pytest.approx(
        float(TRUTH.prefill_seconds(256, 0)), rel=0.05
    )
    assert np.isfinite(costs.prefill_seconds(30_000, 512))


def test_disturbed_points_are_not_believed() -> None:
    rng = np.random.default_rng(3)
    slow = set(rng.choice(len(FULL.prefill), 3, replace=False).tolist())
    found = errors(
        fit_costs(
            measured(FULL.prefill, FULL.decode, lambda i: 3.0 if i in slow else 1.0),
            GEMMA3_270M,
            LIMIT,
        )
    )
    assert np.median(found) < 0.1


def test_the_architecture_level_fit_is_worse() -> None:
    points = measured(FULL.prefill, FULL.decode)
    costs = fit_costs(points, GEMMA3_270M, LIMIT)
    held_out = [PrefillPoint(x, c, float(TRUTH.prefill_seconds(x, c))) for x, c in HELD_OUT]
    truth = np.array([point.seconds for point in held_out])
    simple = ArchitectureLevel(points.prefill, GEMMA3_270M).predict(held_out)
    assert np.median(relative_errors(simple, truth)) > 2 * np.median(errors(costs))


@pytest.mark.parametrize(("prefill", "decode"), [(((64, 0),), QUICK.decode), (QUICK.prefill, ())])
def test_one_step_size_is_no_measurement(
    prefill: tuple[tuple[int, int], ...], decode: tuple[tuple[int, int], ...]
) -> None:
    with pytest.raises(ProfileError, match="at least two are needed"):
        fit_costs(measured(prefill, decode), GEMMA3_270M, LIMIT)


def test_what_was_not_measured_follows_a_typical_machine() -> None:
    """Two small points of each kind: nothing of contexts, nothing of large steps."""
    points = measured(((1, 0), (64, 0)), ((1, 64), (8, 64)))
    typical = derive(cores(HARDWARE["cpu"], 1), GEMMA3_270M, LIMIT)
    alone = fit_costs(points, GEMMA3_270M, LIMIT)
    leaning = fit_costs(points, GEMMA3_270M, LIMIT, typical)
    for costs in (alone, leaning):
        assert float(costs.prefill_seconds(64, 0)) == pytest.approx(
            float(TRUTH.prefill_seconds(64, 0)), rel=0.1
        )
    assert float(alone.decode_step_seconds(8, 50_000)) < 0.2
    assert float(leaning.decode_step_seconds(8, 50_000)) > float(
        leaning.decode_step_seconds(8, 1000)
    )
    assert np.median(errors(leaning)) < np.median(errors(alone))


def test_measured_points_win_over_a_typical_machine() -> None:
    typical = derive(cores(HARDWARE["cpu"], 16), GEMMA3_270M, LIMIT)
    points = measured(QUICK.prefill, QUICK.decode)
    found = errors(fit_costs(points, GEMMA3_270M, LIMIT, typical))
    assert np.median(found) < 0.1
    assert np.percentile(found, 95) < 0.25


def test_a_path_that_was_not_measured_has_a_cost_nevertheless() -> None:
    points = measured(QUICK.prefill, QUICK.decode)
    only_shm = tuple(p for p in points.transfer if p.path == "shm")
    costs = fit_costs(msgspec.structs.replace(points, transfer=only_shm), GEMMA3_270M, LIMIT)
    assert float(costs.transfer_seconds(10**9, 1, "nixl")) > 0.5


@given(st.data())
def test_least_squares_without_negatives_is_optimal(data: st.DataObject) -> None:
    """Against the conditions of Karush, Kuhn and Tucker."""
    rows, columns = data.draw(st.integers(3, 12)), data.draw(st.integers(1, 6))
    rng = np.random.default_rng(data.draw(st.integers(0, 10_000)))
    a, b = rng.normal(size=(rows, columns)), rng.normal(size=rows)
    if data.draw(st.booleans()):
        a[:, -1] = a[:, 0]  # what cannot be told apart
    x = non_negative(a, b)
    gradient = a.T @ (b - a @ x)
    assert (x >= 0).all()
    assert (gradient <= 1e-6).all()
    assert np.abs(gradient[x > 1e-9]).max(initial=0.0) < 1e-6


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_numbers_that_are_none_cannot_be_fitted(wrong: float) -> None:
    with pytest.raises(ProfileError, match="2 measurements cannot be fitted"):
        non_negative(np.array([[1.0], [wrong]]), np.ones(2))


def test_relative_errors_count_and_not_absolute_ones() -> None:
    features = np.array([[1.0], [1000.0], [1000.0]])
    assert fit_relative(features, np.array([2.0, 2000.0, 2000.0])) == pytest.approx([2.0])


def test_an_architecture_is_read_from_a_model_directory(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    text = {
        "model_type": "gemma3_text",
        "num_hidden_layers": 6,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": 128,
        "vocab_size": 500,
        "sliding_window": 512,
        "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
    }
    path.write_bytes(msgspec.json.encode({"text_config": text}))
    found = read_architecture(tmp_path, "x", "float32")
    assert (found.layers, found.full_layers, found.window, found.kv_bytes) == (6, 1, 512, 4)
    path.write_bytes(msgspec.json.encode({"hidden_size": 64}))
    with pytest.raises(ModelError, match="does not describe a decoder"):
        read_architecture(tmp_path, "x", "float32")
    with pytest.raises(ModelError, match="cannot read"):
        read_architecture(tmp_path / "absent", "x", "float32")

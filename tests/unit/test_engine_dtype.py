"""The choice of a dtype must be the same for all instances of a cluster, on a busy machine too."""

from __future__ import annotations

import pytest
import torch

from memserve.engine.dtype import FLOAT32_GAIN, choose_dtype, chosen
from memserve.engine.model import WeightCount


@pytest.mark.parametrize(
    ("bfloat16", "float32", "dtype"),
    [
        (2.0, 10.0, torch.bfloat16),
        (58.2, 50.1, torch.bfloat16),  # measured while eight other processes computed
        (FLOAT32_GAIN * 10, 10.0, torch.float32),  # a CPU without bfloat16 products
    ],
)
def test_float32_must_be_much_faster(bfloat16: float, float32: float, dtype: torch.dtype) -> None:
    choice = chosen(bfloat16, float32)
    assert choice.dtype is dtype
    assert f"bfloat16 {bfloat16:.2f} s, float32 {float32:.2f} s" in str(choice)


def test_the_measured_times_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memserve.engine.dtype.SAMPLE_WEIGHTS", 64 * 64)
    choice = choose_dtype(WeightCount(hidden=64, layers=1, output=1), torch.device("cpu"), 1)
    assert [name for name, seconds in choice.seconds if seconds > 0] == ["bfloat16", "float32"]
    assert choice.dtype in (torch.bfloat16, torch.float32)

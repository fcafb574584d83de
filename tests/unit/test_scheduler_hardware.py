"""Models of hardware that is not here, against measurements that others published."""

from __future__ import annotations

import pytest

from memserve.errors import ConfigError
from memserve.scheduler.architecture import ARCHITECTURES, LLAMA2_7B, LLAMA2_13B, LLAMA3_70B
from memserve.scheduler.hardware import HARDWARE, cost_model

# lmdeploy v0.1.0a1, A100-80G, FP16: docs/en/benchmark/a100_fp16.md. First token latency at
# batch 1 and 2048 prompt tokens; seconds per step by (batch, context of each).
PUBLISHED_PREFILL = {("llama2-7b", 1): 0.139, ("llama2-13b", 1): 0.242, ("llama2-70b", 4): 0.402}
PUBLISHED_DECODE = {
    ("llama2-7b", 1, 1, 128): 0.010,
    ("llama2-7b", 1, 16, 2048): 0.0205,
    ("llama2-7b", 1, 32, 2048): 0.0315,
    ("llama2-13b", 1, 1, 128): 0.017,
    ("llama2-13b", 1, 1, 2048): 0.019,
    ("llama2-13b", 1, 16, 2048): 0.0335,
    ("llama2-13b", 1, 32, 2048): 0.0465,
    ("llama2-70b", 4, 1, 128): 0.029,
    ("llama2-70b", 4, 16, 2048): 0.0355,
}


@pytest.mark.parametrize(("which", "seconds"), PUBLISHED_PREFILL.items())
def test_prefill_of_2048_tokens_on_an_a100(which: tuple[str, int], seconds: float) -> None:
    name, tp = which
    model = cost_model("a100", name, tp, max_batch_tokens=8192)
    assert float(model.prefill_seconds(2048, 0)) == pytest.approx(seconds, rel=0.15)


@pytest.mark.parametrize(("which", "seconds"), PUBLISHED_DECODE.items())
def test_decode_steps_on_an_a100(which: tuple[str, int, int, int], seconds: float) -> None:
    name, tp, batch, context = which
    step = cost_model("a100", name, tp).decode_step_seconds(batch, batch * context)
    assert float(step) == pytest.approx(seconds, rel=0.15)


def test_architectures_have_the_sizes_of_their_models() -> None:
    # Without embeddings, which are looked up and not multiplied with.
    assert LLAMA2_7B.parameters == pytest.approx(6.61e9, rel=0.01)
    assert LLAMA2_13B.parameters == pytest.approx(12.85e9, rel=0.01)
    assert LLAMA3_70B.parameters == pytest.approx(69.5e9, rel=0.01)
    assert LLAMA2_13B.kv_bytes_per_token == 40 * 2 * 5120 * 2
    assert LLAMA3_70B.kv_bytes_per_token == 327_680


def test_an_h800_differs_from_an_h100_in_its_links() -> None:
    h100, h800 = (cost_model(name, "llama2-13b", tp=2) for name in ("h100", "h800"))
    gib = 1 << 30
    assert h800.transfer_seconds(gib, 1, "shm") > 2 * h100.transfer_seconds(gib, 1, "shm")
    slower = h800.prefill_seconds(4096, 0) / h100.prefill_seconds(4096, 0)
    assert 1.0 < slower < 1.2


def test_tensor_parallelism_saves_less_than_its_devices() -> None:
    one, two = (
        float(cost_model("h800", "llama2-13b", tp).prefill_seconds(4096, 0)) for tp in (1, 2)
    )
    assert one / 2 < two < one


@pytest.mark.parametrize("hardware", HARDWARE)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_pair_has_a_model(hardware: str, architecture: str) -> None:
    model = cost_model(hardware, architecture)
    assert 0 < float(model.prefill_seconds(1, 0)) < float(model.prefill_seconds(4096, 0))


def test_unknown_names_say_what_is_known() -> None:
    with pytest.raises(ConfigError, match="no hardware 'h900'; known: a100, cpu, h100, h800"):
        cost_model("h900", "llama2-13b")
    with pytest.raises(ConfigError, match=r"no architecture 'gpt-5'; known: .*llama2-13b"):
        cost_model("h800", "gpt-5")

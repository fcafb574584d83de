"""The same engine on a GPU: HBM on the device, DRAM pinned, swapping between them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.engine_harness import load, running_engine
from tests.tiny_models import CONFIGS, VOCAB, Reference, save_tiny_model

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs a CUDA device and a CUDA build of PyTorch"
    ),
]


@pytest.mark.parametrize("name", list(CONFIGS))
def test_tokens_equal_generate_cold_cached_and_swapped(name: str, tmp_path: Path) -> None:
    directory = save_tiny_model(name, tmp_path)
    rng = np.random.default_rng(0)
    prompts = [[int(t) for t in rng.integers(3, VOCAB, n)] for n in (20, 90, 91, 150)]
    reference = Reference(directory)
    expected = [reference.generate(p, 30) for p in prompts]
    with running_engine(load(directory, "cuda"), hbm_blocks=28, dram_blocks=60) as engine:
        assert engine.pool.layer_views()[0].is_cuda
        for _ in range(2):
            requests = [engine.submit(p, 30) for p in prompts]
            assert engine.finish(*requests) == expected
            engine.pool.swap_out(28)
        assert engine.pool.stats().swapped_in > 0

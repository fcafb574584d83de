"""In bfloat16, tokens near a tie may differ, so the demo model is compared by its perplexity.

It must be that of Transformers in float32, on prose, with the prompt in chunks.
"""

from __future__ import annotations

from math import exp
from pathlib import Path
from statistics import mean

import pytest
import torch
from transformers import AutoModelForCausalLM

from memserve.config import ModelConfig
from memserve.engine.model import load_model
from memserve.errors import ModelError
from memserve.models.resolve import resolve_model
from memserve.models.tokenizer import Tokenizer
from tests.device import DEVICE
from tests.engine_harness import Harness, running_engine

PROSE = Path(__file__).parents[2] / "docs/architecture.md"
TOKENS = 700
CLOSE = 0.02  # of the perplexity: bfloat16 keeps 8 bits of each number


@pytest.fixture(scope="module")
def directory() -> Path:
    try:
        return resolve_model(ModelConfig(path="demo"), lambda _: None).path
    except ModelError as error:
        pytest.skip(f"no demo model: {error}; pip install 'memserve[demo]'")


def perplexity(engine: Harness, tokens: list[int]) -> float:
    request = engine.submit(tokens, 1, prompt_logprobs=0)
    engine.finish(request)
    return exp(-mean(score.chosen for score in engine.outputs.of(request)[0].prompt_logprobs))


def test_the_demo_model_has_the_perplexity_of_transformers(directory: Path) -> None:
    text = PROSE.read_text("utf-8")
    tokens = list(Tokenizer.load(directory).encode(text))[:TOKENS]
    assert len(tokens) == TOKENS
    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = reference(torch.tensor([tokens])).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(tokens[1:]))
    expected = exp(float(loss))
    del reference, logits

    model = load_model(directory, torch.bfloat16, torch.device(DEVICE))
    with running_engine(model, hbm_blocks=100, max_tokens=300, threads=2) as engine:
        assert perplexity(engine, tokens) == pytest.approx(expected, rel=CLOSE)

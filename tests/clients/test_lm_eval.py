"""lm-evaluation-harness measures a model behind a cluster as it would in Transformers."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from memserve.bench.vllm_engine import python_of, why_missing
from memserve.models.tokenizer import Tokenizer
from tests.clients.install import ROOT
from tests.e2e.test_disaggregation import CLUSTER, running
from tests.fakes import save_tiny_tokenizer
from tests.tiny_models import Reference, save_tiny_model

pytestmark = pytest.mark.skipif(
    not os.environ.get("MEMSERVE_TEST_CLIENTS"), reason="`make clients-test` runs these"
)
GENERATED = 8  # tokens, as the script's task says


def encoded(tokenizer: Tokenizer, text: str) -> list[int]:
    """A text's tokens as the harness sends them: without <bos>, unless it is told to add one."""
    return tokenizer.encode(text, add_special_tokens=False)


def score(model: torch.nn.Module, tokenizer: Tokenizer, context: str, rest: str) -> float:
    """The log-probability of `rest` behind `context`."""
    before, ids = len(encoded(tokenizer, context)), encoded(tokenizer, context + rest)
    with torch.inference_mode():
        rows = torch.log_softmax(model(torch.tensor([ids])).logits[0], dim=-1)
    return sum(float(rows[at - 1, ids[at]]) for at in range(before, len(ids)))


def test_loglikelihoods_and_answers_are_those_of_transformers(tmp_path: Path) -> None:
    missing = why_missing("lm_eval", ROOT)
    assert missing is None, missing
    model = save_tiny_model("llama", tmp_path)
    save_tiny_tokenizer(model)
    tokenizer = Tokenizer.load(model)
    config, tasks = tmp_path / "cluster.toml", tmp_path / "tasks"
    config.write_text(CLUSTER.format(model=model, caching="full", mode="by-request-agg"))
    tasks.mkdir()
    script = Path(__file__).with_name("use_lm_eval.py")
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    with running(config) as url:
        done = subprocess.run(
            [python_of("lm_eval", ROOT), "-P", str(script), url, "tiny", str(model), str(tasks)],
            capture_output=True,
            text=True,
            check=False,
            timeout=240,
            env={**os.environ, **offline, "PYTHONPATH": ""},
        )
    assert done.returncode == 0, done.stderr[-4000:]
    told = json.loads(done.stdout.splitlines()[-1])
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    assert len(told["scores"]) == 4
    for context, rest, value, _ in told["scores"]:
        assert value == pytest.approx(score(reference, tokenizer, context, rest), abs=1e-3)
    assert len(told["answers"]) == 2
    greedy = Reference(model)
    for prompt, text in told["answers"]:
        expected = tokenizer.decode(greedy.generate(encoded(tokenizer, prompt), GENERATED))
        assert text == expected.partition("\n")[0]

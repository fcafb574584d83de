"""Scores of prompts are those of Transformers, however the prompt is computed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from memserve.engine import scoring
from memserve.engine.model import Model
from memserve.engine.request import TokenLogprobs
from tests.engine_harness import Harness, load, running_engine
from tests.tiny_models import VOCAB, save_tiny_model

TOP = 5


class Scored:
    """A model here, and the log-probabilities that Transformers gives."""

    def __init__(self, directory: Path) -> None:
        self.model: Model = load(directory)
        self._reference = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager"
        ).eval()

    def expected(self, prompt: Sequence[int]) -> np.ndarray:
        """[tokens - 1, vocab]: row p is the distribution of token p + 1."""
        with torch.inference_mode():
            logits = self._reference(torch.tensor([list(prompt)])).logits[0, :-1]
        scores: np.ndarray = torch.log_softmax(logits, dim=-1).numpy()
        return scores


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def scored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Scored:
    return Scored(save_tiny_model(request.param, tmp_path_factory.mktemp("models")))


def prompt(length: int, seed: int = 0) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(3, VOCAB, length)]


def scores_of(engine: Harness, request: str) -> tuple[TokenLogprobs, ...]:
    engine.finish(request)
    first, *others = engine.outputs.of(request)
    assert not any(output.prompt_logprobs for output in others)
    return first.prompt_logprobs


def check(scored: Scored, tokens: Sequence[int], scores: Sequence[TokenLogprobs]) -> None:
    expected = scored.expected(tokens)
    assert len(scores) == len(tokens) - 1
    for row, token, score in zip(expected, tokens[1:], scores, strict=True):
        assert score.chosen == pytest.approx(row[token], abs=1e-4)
        # Neighbours closer than rounding may change places.
        assert (row > row[token] + 1e-4).sum() < score.rank <= (row >= row[token] - 1e-4).sum()
        assert [value for _, value in score.top] == pytest.approx(
            sorted(row, reverse=True)[: len(score.top)], abs=1e-4
        )
        assert all(row[other] == pytest.approx(value, abs=1e-4) for other, value in score.top)


@pytest.mark.parametrize("rows", [16, 10_000])
def test_each_token_but_the_first_has_its_score(
    scored: Scored, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "MAX_SCORED_LOGITS", rows * VOCAB)
    with running_engine(scored.model) as engine:
        for length in (1, 2, 16, 17, 90):
            tokens = prompt(length, length)
            scores = scores_of(engine, engine.submit(tokens, 2, prompt_logprobs=TOP))
            check(scored, tokens, scores)
            assert all(len(score.top) == TOP for score in scores)


def test_steps_hold_the_logits_of_few_rows(scored: Scored, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "MAX_SCORED_LOGITS", 16 * VOCAB)
    with running_engine(scored.model) as engine:
        requests = [engine.submit(prompt(64, seed), 1, prompt_logprobs=0) for seed in (1, 2)]
        for seed, request in zip((1, 2), requests, strict=True):
            check(scored, prompt(64, seed), scores_of(engine, request))
        assert engine.engine.stats().steps >= 2 * 64 // 16


def test_a_scored_prompt_is_computed_whole_and_leaves_its_kv(scored: Scored) -> None:
    tokens = prompt(70)
    with running_engine(scored.model) as engine:
        plain = engine.run(tokens, 4)
        request = engine.submit(tokens, 4, prompt_logprobs=0)
        check(scored, tokens, scores_of(engine, request))
        assert engine.finish(request) == [plain]
        assert engine.cached(request) == 0
        other = prompt(70, 1)
        engine.finish(engine.submit(other, 1, prompt_logprobs=0))
        again = engine.submit(other, 1)
        engine.finish(again)
        assert engine.cached(again) == 64


def test_scores_beside_decoding_sequences_and_over_preemptions(
    scored: Scored, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "MAX_SCORED_LOGITS", 64 * VOCAB)
    prompts = [prompt(100, seed) for seed in range(4)]
    with running_engine(scored.model, hbm_blocks=16, dram_blocks=4, mixed_tokens=32) as engine:
        steady = [engine.submit(prompt(10, 20 + seed), 120, priority=-1) for seed in range(2)]
        for request in steady:
            engine.outputs.wait_tokens(request, 1)
        requests = [engine.submit(tokens, 60, prompt_logprobs=1) for tokens in prompts]
        for tokens, request in zip(prompts, requests, strict=True):
            check(scored, tokens, scores_of(engine, request))
        engine.finish(*steady)
        stats = engine.engine.stats()
        assert stats.preemptions > 0
        # Each prompt token is counted once, however often it was computed.
        assert stats.computed_prompt_tokens + stats.cached_prompt_tokens == 4 * 100 + 2 * 10


def test_a_resumed_sequence_has_no_scores_and_uses_the_cache(scored: Scored) -> None:
    tokens = prompt(70)
    with running_engine(scored.model) as engine:
        plain = engine.run(tokens, 4)
        resumed = engine.submit(tokens, 4, output=plain[:2], prompt_logprobs=3)
        assert scores_of(engine, resumed) == ()
        assert engine.finish(resumed) == [plain[2:]]
        assert engine.cached(resumed) == 64

"""Grammars in the sampler and the engine: where they stand among the other parameters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from memserve.api.generate import FinishReason, SamplingParams
from memserve.engine.constraint import Constraint
from memserve.engine.model import Model
from memserve.engine.request import EngineRequest
from memserve.engine.sampler import NOTHING_ALLOWED, Sample, SamplerState, sample
from memserve.errors import GrammarFailed, RequestError
from memserve.types import RequestId
from tests.engine_harness import load, running_engine
from tests.grammar_harness import compiler_of, save_model, schema_grammar

VOCAB = 20
EOS = 19


class Script:
    """A grammar of so many tokens, any of `text`; it may end behind `least` of them."""

    def __init__(self, text: Sequence[int], least: int, most: int, fails_at: int = 99) -> None:
        self.text, self.least, self.most, self.fails_at = text, least, most, fails_at

    def matcher(self) -> ScriptState:
        return ScriptState(self)


class ScriptState:
    def __init__(self, script: Script) -> None:
        self.script, self.count = script, 0

    def allowed(self) -> tuple[NDArray[np.uint8], bool]:
        if self.count >= self.script.fails_at:
            raise GrammarFailed("so it failed")
        flags = np.zeros(VOCAB - 3, np.uint8)  # of fewer tokens than there are logits
        if self.count < self.script.most:
            flags[[token for token in self.script.text if token < len(flags)]] = 1
        return np.packbits(flags, bitorder="little"), self.count >= self.script.least

    def accept(self, token: int) -> None:
        self.count += 1

    @property
    def ended(self) -> bool:
        return self.count == self.script.most


def state(
    grammar: Script, output: Sequence[int] = (), ignore_eos: bool = False, **params: Any
) -> SamplerState:
    settings = SamplingParams(**{"temperature": 0.0, "ignore_eos": ignore_eos, **params})
    eos = () if ignore_eos else (EOS,)
    constraint = Constraint(grammar, (EOS,))
    made = SamplerState(settings, np.array([1], np.int32), eos, None, constraint)
    for token in output:
        made.append(token)
    return made


def chosen(made: SamplerState, logits: Sequence[float] = tuple(range(VOCAB))) -> Sample:
    (one,) = sample(torch.tensor([logits], dtype=torch.float32), [made])
    return one


DIGITS = Script([3, 4, 5], least=1, most=3)


def test_only_what_is_allowed_is_chosen() -> None:
    assert chosen(state(DIGITS)).token == 5
    hot = [chosen(state(DIGITS, temperature=2.0, seed=seed)).token for seed in range(50)]
    assert set(hot) == {3, 4, 5}


def test_end_tokens_come_only_where_the_text_may_end() -> None:
    assert chosen(state(DIGITS)).token == 5
    assert chosen(state(DIGITS, [5])).token == EOS
    assert chosen(state(DIGITS, [5], ignore_eos=True)).token == 5
    # A model's end token is no text of a grammar, even if the grammar has it.
    text = Script([2, 10, 16, EOS], least=9, most=9)
    assert chosen(state(text)).token == 16
    assert chosen(state(text, ignore_eos=True)).token == 16


def test_stop_tokens_are_texts_and_ends() -> None:
    assert chosen(state(DIGITS, stop_token_ids=(18,))).token == 5
    assert chosen(state(DIGITS, [5], ignore_eos=True, stop_token_ids=(18,))).token == 18
    assert chosen(state(DIGITS, stop_token_ids=(5,))).token == 5
    ended = state(DIGITS, [5, 5], stop_token_ids=(4,))
    ended.append(4)  # ends the sequence, so that the grammar has nothing more to say
    assert not ended.ended


def test_min_tokens_holds_open_what_can_go_on() -> None:
    assert chosen(state(DIGITS, [5], min_tokens=2)).token == 5
    assert chosen(state(DIGITS, [5, 5], min_tokens=2)).token == EOS
    assert state(DIGITS, [5, 5, 5], min_tokens=9).ended


def test_a_bias_and_penalties_bring_back_nothing_and_take_away_nothing() -> None:
    assert chosen(state(DIGITS, logit_bias={10: 100.0, 3: 50.0})).token == 3
    banned = dict.fromkeys((3, 4, 5), -100.0)
    assert chosen(state(DIGITS, logit_bias=banned)).token == 5
    punished = state(DIGITS, [5], presence_penalty=2.0, repetition_penalty=50.0, ignore_eos=True)
    assert chosen(punished).token == 4


@pytest.mark.parametrize("how", [{"top_k": 2}, {"top_p": 0.9}, {"min_p": 0.2}, {}])
def test_filters_count_only_what_is_allowed(how: dict[str, Any]) -> None:
    logits = [9.0] * VOCAB
    logits[3:6] = [1.0, 1.5, 2.0]
    found = {chosen(state(DIGITS, temperature=1.0, seed=s, **how), logits).token for s in range(80)}
    assert found <= {3, 4, 5}
    assert len(found) == (2 if "top_k" in how else 3)


def test_logprobs_are_those_of_the_raw_logits() -> None:
    one = chosen(state(DIGITS, logprobs=2))
    assert one.logprobs is not None
    raw = np.arange(VOCAB) - np.log(np.exp(np.arange(VOCAB)).sum())
    assert one.logprobs.chosen == pytest.approx(raw[5], abs=1e-5)
    assert one.logprobs.rank == VOCAB - 5
    assert [token for token, _ in one.logprobs.top] == [19, 18]


def test_where_nothing_is_allowed_the_sample_says_so() -> None:
    nothing = Script([], least=9, most=9)
    assert chosen(state(nothing)) == Sample(-1, failure=NOTHING_ALLOWED)
    assert chosen(state(nothing, temperature=1.0)) == Sample(-1, failure=NOTHING_ALLOWED)
    # It may end, but no token ends it.
    ends = Script([], least=0, most=9)
    assert chosen(state(ends, ignore_eos=True)).failure == NOTHING_ALLOWED
    assert chosen(state(ends, min_tokens=1)).failure == NOTHING_ALLOWED
    assert chosen(state(Script([3], 9, 9, fails_at=0))).failure == "so it failed"
    broken = [float("nan")] * VOCAB
    assert chosen(state(DIGITS), broken).failure == NOTHING_ALLOWED


def test_rows_without_a_grammar_are_as_they_were() -> None:
    free = SamplerState(SamplingParams(temperature=0.0), np.array([1], np.int32), (EOS,))
    fails = state(Script([3], 9, 9, fails_at=0))
    rows = torch.arange(VOCAB, dtype=torch.float32).repeat(3, 1)
    assert [one.token for one in sample(rows, [free, fails, state(DIGITS)])] == [19, -1, 5]
    wide = torch.arange(VOCAB).repeat(3, 1).to(torch.bfloat16).t().contiguous().t()
    assert [one.token for one in sample(wide, [free, fails, state(DIGITS)])] == [19, -1, 5]


# --- the engine ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def model(directory: Path) -> Model:
    return load(directory)


def test_a_sequence_ends_with_its_grammar_without_any_end_token(
    model: Model, directory: Path
) -> None:
    grammar = compiler_of(directory).compile(schema_grammar({"const": {"a": [1, 2]}}, True))
    with running_engine(model) as engine:
        for options in ({}, {"ignore_eos": False}, {"min_tokens": 30}):
            request = engine.submit([5, 6], 40, grammar=grammar, **options)
            engine.finish(request)
            last = engine.outputs.of(request)[-1]
            assert (last.finish_reason, last.stop_token) == (FinishReason.STOP, None)
        short = engine.submit([5, 6], 3, grammar=grammar)
        assert len(engine.finish(short)[0]) == 3
        assert engine.outputs.of(short)[-1].finish_reason is FinishReason.LENGTH


def test_a_failure_ends_its_sequence_alone(model: Model) -> None:
    fails = Script([3, 4], least=9, most=9, fails_at=2)
    with running_engine(model) as engine:
        alone = engine.run([7, 8, 9], 12)
        other = engine.submit([7, 8, 9], 12)
        request = engine.submit([5, 6], 12, grammar=fails)
        engine.finish(request, other)
        last = engine.outputs.of(request)[-1]
        assert (last.finish_reason, last.error) == (FinishReason.ERROR, "so it failed")
        assert last.at_fault
        assert len(engine.outputs.tokens(request)) == 2
        assert engine.outputs.tokens(other) == alone


def test_a_grammar_that_nobody_has_compiled_is_refused(model: Model) -> None:
    params = SamplingParams(grammar=schema_grammar({"type": "object"}))
    request = EngineRequest(RequestId("r"), np.array([5], np.int32), params)
    with running_engine(model) as engine, pytest.raises(RequestError) as refused:
        engine.engine.submit([request])
    assert refused.value.param == "response_format"

"""Answers of random weights to random schemas: each that ends obeys its schema, and is the same
after preemption, hand-over and failover."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memserve.api.generate import FinishReason
from memserve.engine.model import Model
from memserve.grammars.compiler import GrammarCompiler
from memserve.models.tokenizer import Tokenizer
from tests.engine_harness import Harness, load, running_engine
from tests.grammar_harness import check, compiler_of, matches, save_model, schema_grammar
from tests.handoff_harness import prompt_of
from tests.schemas import Schema, random_schema, random_value

HOT = {"temperature": 2.0}
LONGEST = 300
PROMPT = prompt_of(40, seed=3)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def model(directory: Path) -> Model:
    return load(directory)


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Tokenizer:
    return Tokenizer.load(directory)


@pytest.fixture(scope="module")
def compiler(directory: Path) -> GrammarCompiler:
    return compiler_of(directory)


def submit(engine: Harness, compiler: GrammarCompiler, schema: Schema, seed: int) -> str:
    grammar = compiler.compile(schema_grammar(schema, compact=bool(seed % 3)))
    own = {"seed": seed, "ignore_eos": bool(seed % 2), **HOT}
    return engine.submit(PROMPT[: 1 + seed % 40], LONGEST, grammar=grammar, **own)


def answer(engine: Harness, request: str) -> tuple[list[int], FinishReason | None]:
    """The tokens before an end token."""
    engine.outputs.wait_finished(request)
    last = engine.outputs.of(request)[-1]
    tokens = engine.outputs.tokens(request)
    return tokens[:-1] if last.stop_token is not None else tokens, last.finish_reason


def test_answers_obey_their_schemas(
    model: Model, tokenizer: Tokenizer, compiler: GrammarCompiler
) -> None:
    ends: Counter[FinishReason | None] = Counter()
    with running_engine(model, hbm_blocks=600, max_waiting=400) as engine:
        asked = []
        for seed in range(300):
            schema = random_schema(Random(seed))
            asked.append((submit(engine, compiler, schema, seed), schema))
        for request, schema in asked:
            tokens, end = answer(engine, request)
            ends[end] += 1
            if end is FinishReason.STOP:
                check(tokenizer.decode(tokens), schema)
    assert ends[FinishReason.STOP] + ends[FinishReason.LENGTH] == 300
    assert ends[FinishReason.STOP] > 270  # the others are numbers of 300 digits


def test_preemption_changes_no_answer(model: Model, compiler: GrammarCompiler) -> None:
    schemas = [random_schema(Random(seed)) for seed in range(40)]

    def answers(blocks: int) -> tuple[list[Any], int]:
        with running_engine(model, hbm_blocks=blocks, dram_blocks=0) as engine:
            asked = [submit(engine, compiler, schema, at) for at, schema in enumerate(schemas)]
            return [answer(engine, request) for request in asked], engine.engine.stats().preemptions

    (roomy, none), (tight, some) = answers(600), answers(26)
    assert none == 0
    assert some > 0
    assert tight == roomy


@given(seed=st.integers(0, 100_000))
@settings(max_examples=200, deadline=None)
def test_what_a_schema_allows_can_be_said(
    tokenizer: Tokenizer, compiler: GrammarCompiler, seed: int
) -> None:
    """Values of a generator that knows nothing of the grammar."""
    random = Random(seed)
    schema = random_schema(random)
    value = random_value(random, schema, schema)
    text = msgspec.json.encode(value).decode()
    check(text, schema)
    assert matches(compiler.compile(schema_grammar(schema)), tokenizer, text)

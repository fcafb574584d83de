"""The demo model, as people get it: the same words as Transformers' `generate`."""

from __future__ import annotations

import pytest

from memserve.config import ModelConfig
from memserve.errors import ModelError
from memserve.models.resolve import resolve_model
from memserve.models.tokenizer import Tokenizer
from tests.engine_harness import load, running_engine
from tests.tiny_models import Reference

TEXT = """The lighthouse keeper's daughter counted ships. On most days there were four or five,
and on the first Monday of the month the supply boat came, which she counted twice because it
stayed overnight. Her father wrote the names into a ledger with a brown cover, and beside each
name the hour, the wind and the colour of the sky. When she was nine she asked him why he wrote
down the colour of the sky, since nobody would ever read it, and he said that"""


def test_a_conversation_gives_the_tokens_of_generate() -> None:
    try:
        directory = resolve_model(ModelConfig(path="demo"), print).path
    except ModelError as error:
        pytest.skip(f"{error} (then run again)")
    tokenizer = Tokenizer.load(directory)
    reference = Reference(directory)
    tokens = tokenizer.encode(TEXT)
    assert tokens[0] == tokenizer.bos_token_id, "the model is useless without <bos>"
    with running_engine(load(directory), hbm_blocks=40, threads=2) as engine:
        for turn in range(3):
            request = engine.submit(tokens, 16)
            [answer] = engine.finish(request)
            assert answer == reference.generate(tokens, 16)
            assert (engine.cached(request) > 0) == (turn > 0)
            tokens = tokens + answer + tokenizer.encode(" And then", add_special_tokens=False)
    assert "sky" in tokenizer.decode(tokens)

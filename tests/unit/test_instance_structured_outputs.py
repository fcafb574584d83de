"""Constrained answers over two instances: handed over, and continued when the first is lost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest

from memserve.api.errors import ApiError
from memserve.api.generate import CallKind, GenerateCall, PrefillPeer
from memserve.api.grammar import Grammar, GrammarKind
from memserve.models.tokenizer import Tokenizer
from memserve.types import InstanceId, Role
from tests.grammar_harness import check, save_model, schema_grammar
from tests.handoff_harness import Completion, Node, call_of, node, pair, prompt_of
from tests.schemas import random_schema
from tests.stream_harness import Event, events_of, resumed, stream_of

PROMPT = prompt_of(40, seed=3)
END = 2  # the model's end token
HOT: dict[str, Any] = {"temperature": 2.0, "ignore_eos": False}
YES = Grammar(GrammarKind.CHOICE, '["y"]')  # one token


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Tokenizer:
    return Tokenizer.load(model)


def options_of(seed: int) -> tuple[Any, dict[str, Any]]:
    """A schema, and a request for two answers that obey it."""
    schema = random_schema(Random(seed))
    grammar = schema_grammar(schema, compact=bool(seed % 2))
    return schema, {**HOT, "tokens": 150, "seed": seed, "n": 2, "grammar": grammar}


def check_answer(tokenizer: Tokenizer, answer: Completion, schema: Any) -> int:
    """The choices that ended, all of which obey the schema."""
    ended = 0
    for tokens, reason in zip(answer.tokens, answer.reasons, strict=True):
        if reason == "stop":
            ended += 1
            check(tokenizer.decode([token for token in tokens if token != END]), schema)
    return ended


async def test_a_hand_over_changes_no_answer(model: Path, tokenizer: Tokenizer) -> None:
    ended = 0
    async with pair(model) as (p, d), node(model, Role.COLOCATED) as alone:
        for seed in range(40):
            schema, options = options_of(seed)
            expected = await alone.answer(*PROMPT, **options)
            ended += check_answer(tokenizer, expected, schema)
            handed = await d.answer(*PROMPT, prefill=[p], **options)
            assert (handed.tokens, handed.reasons) == (expected.tokens, expected.reasons)
        assert d.totals.asked == 40
        assert d.totals.failed == 0
    assert ended >= 70


def stream_call(seed: int, prefill: Sequence[Node] = (), **more: Any) -> GenerateCall:
    _, options = options_of(seed)
    call = call_of(PROMPT, prefill=prefill, **{**options, **more})
    return msgspec.structs.replace(call, stream=True, return_token_ids=False, kind=CallKind.CHAT)


def told(events: Sequence[Event], choices: int = 2) -> tuple[Any, ...]:
    """Tokens, text and end of each choice."""
    ids: list[list[int]] = [[] for _ in range(choices)]
    texts, ends = [""] * choices, [None] * choices
    for event in events:
        if event.choice is not None:
            ids[event.choice] += event.token_ids
        if event.data in (b"", b"[DONE]"):
            continue
        for choice in msgspec.json.decode(event.data)["choices"]:
            texts[choice["index"]] += choice["delta"].get("content", "")
            ends[choice["index"]] = choice["finish_reason"] or ends[choice["index"]]
    return ids, texts, ends


async def test_a_stream_goes_on_elsewhere_as_if_nothing_had_been(model: Path) -> None:
    cuts = 0
    async with pair(model) as (p, d), node(model, Role.COLOCATED) as alone:
        for seed in range(20):
            events = events_of(await stream_of(alone.instance, stream_call(seed)))
            random = Random(seed)
            for at in {1, len(events) - 1, *(random.randrange(len(events)) for _ in range(2))}:
                for other, prefill in ((alone, ()), (d, (p,))):
                    again = resumed(stream_call(seed, prefill), events[:at])
                    rest = events_of(await stream_of(other.instance, again))
                    assert told([*events[:at], *rest]) == told(events)
                    cuts += 1
    assert cuts >= 120


async def test_the_first_token_may_be_the_whole_answer(model: Path, tokenizer: Tokenizer) -> None:
    (y,) = tokenizer.encode("y", add_special_tokens=False)
    async with pair(model) as (p, d):
        for caching in ({}, {"logprobs": 1}):
            answer = await d.answer(*PROMPT, tokens=9, prefill=[p], grammar=YES, n=2, **caching)
            assert answer.tokens == [[y], [y]]
            assert answer.reasons == ["stop", "stop"]
        assert d.totals.failed == 0
        again = resumed(stream_call(1, grammar=YES), [Event(0, (y,), b"")])
        events = events_of(await stream_of(d.instance, again))
        assert [event.choice for event in events] == [1, None]


async def test_what_cannot_be_compiled_is_refused_before_anybody_works(model: Path) -> None:
    nobody = PrefillPeer(InstanceId("nobody"), "http://127.0.0.1:9", "tcp://127.0.0.1:9")
    bad = schema_grammar({"properties": {"a": {"not": {}}}})
    async with node(model, Role.DECODE) as d:
        for _ in range(2):
            with pytest.raises(ApiError) as refused:
                await d.answer(*PROMPT, prefill=[nobody], grammar=bad)
            assert refused.value.status == 400
            assert refused.value.detail.param == "response_format"
            assert "'not' at #/properties/a" in refused.value.detail.message
        assert d.totals.asked == 0


async def test_a_grammar_that_fails_in_mid_answer_is_the_request_s_fault(model: Path) -> None:
    """The more letters, the more ways there are to divide them."""
    grammar = Grammar(GrammarKind.EBNF, "start: (a{0,100000}){0,100000}\na: /[a-z]/")
    async with pair(model) as (p, d):
        for prefill in ((), (p,)):
            with pytest.raises(ApiError) as refused:
                await d.answer(*PROMPT, prefill=prefill, tokens=400, grammar=grammar)
            assert refused.value.status == 400
            assert refused.value.detail.code == "grammar_failed"
            await d.settled()
        assert (await d.answer(*PROMPT, tokens=2)).reasons == ["length"]


async def test_an_engine_without_grammars_refuses_them(model: Path) -> None:
    async with node(model, Role.COLOCATED) as one:
        served = one.instance._served
        assert served is not None
        object.__setattr__(served.parts, "grammars", None)
        with pytest.raises(ApiError) as refused:
            await one.answer(*PROMPT, grammar=YES)
        assert refused.value.status == 400
        # And so does the engine itself.
        with pytest.raises(ApiError) as refused, one.instance.run(call_of(PROMPT, grammar=YES)):
            pass
        assert (refused.value.status, refused.value.detail.param) == (400, "response_format")

"""From a request's bytes to the call of an instance: tokens, limits, defaults."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from memserve.api.errors import ApiError
from memserve.api.generate import CallKind, GenerateCall
from memserve.api.limits import MAX_SEQUENCES
from memserve.api.status import Limits
from memserve.api.stop_strings import StopStrings
from memserve.gateway.call_builder import INLINE_CHARACTERS, CallBuilder
from memserve.models.chat_template import (
    DEFAULT_CHAT_STOPS,
    DEFAULT_CHAT_TEMPLATE,
    ChatTemplate,
)
from memserve.models.tokenizer import Tokenizer
from tests.fakes import MODEL, tiny_tokenizer
from tests.packed import listed

LIMITS = Limits(
    vocab_size=320,
    max_model_len=64,
    pool_tokens=1024,
    max_tokens=64,
    block_tokens=16,
    dtype="float32",
    device="cpu",
    threads=1,
    max_waiting=MAX_SEQUENCES,
)
TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
BOS = 0


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory: Path = tmp_path_factory.mktemp("tokenizer")
    return tiny_tokenizer(directory, TEMPLATE)


@pytest.fixture(scope="module")
def builder(tokenizer: Tokenizer) -> Iterator[CallBuilder]:
    builder = CallBuilder(tokenizer, MODEL, threads=1)
    yield builder
    builder.close()


async def completion(builder: CallBuilder, prompt: object = "hi", **fields: Any) -> GenerateCall:
    body = json.dumps({"prompt": prompt, **fields}).encode()
    return await builder.completion(body, LIMITS)


async def chat(builder: CallBuilder, content: str = "hi", **fields: Any) -> GenerateCall:
    messages = [{"role": "developer", "content": content}]
    body = json.dumps({"messages": messages, **fields}).encode()
    return await builder.chat(body, LIMITS)


async def refused(work: Any) -> tuple[int, str | None, str | None]:
    with pytest.raises(ApiError) as error:
        await work
    return error.value.status, error.value.detail.param, error.value.detail.code


async def test_prompts_come_as_text_or_tokens_one_or_several(
    builder: CallBuilder, tokenizer: Tokenizer
) -> None:
    text = tokenizer.encode("hi")
    assert text[0] == BOS
    for prompt, expected in [
        ("hi", [text]),
        (["hi", "hi"], [text, text]),
        ([5, 6], [[5, 6]]),
        ([[5], [6, 7]], [[5], [6, 7]]),
        (["hi", [5]], [text, [5]]),
    ]:
        assert listed((await completion(builder, prompt)).prompts) == expected


async def test_special_tokens_can_be_left_out(builder: CallBuilder) -> None:
    call = await completion(builder, "hi", add_special_tokens=False)
    assert call.prompts[0][0] != BOS


@pytest.mark.parametrize(
    "prompt", ["", [], [[]], ["hi", ""], [1, "hi"], [1, [2]], [320], [[319, 320]]]
)
async def test_prompts_that_no_model_could_take_are_refused(
    builder: CallBuilder, prompt: object
) -> None:
    status, param, _ = await refused(completion(builder, prompt))
    assert (status, param) == (400, "prompt")


async def test_chat_goes_through_the_template(builder: CallBuilder, tokenizer: Tokenizer) -> None:
    call = await chat(builder)
    assert call.kind is CallKind.CHAT
    assert listed(call.prompts) == [tokenizer.encode("[system]hi")]


async def test_long_texts_are_tokenised_on_a_thread_with_the_same_result(
    builder: CallBuilder, tokenizer: Tokenizer
) -> None:
    long = "the quick brown fox " * (INLINE_CHARACTERS // 10)
    wide = msgspec.structs.replace(LIMITS, max_tokens=10**6)
    call = await builder.completion(json.dumps({"prompt": long}).encode(), wide)
    assert listed(call.prompts) == [tokenizer.encode(long)]


async def test_the_answer_s_default_length(builder: CallBuilder) -> None:
    assert (await completion(builder, [1] * 10)).sampling.max_tokens == 16
    assert (await completion(builder, [1] * 60)).sampling.max_tokens == 4
    call = await chat(builder)
    assert call.sampling.max_tokens == LIMITS.max_tokens - len(call.prompts[0])


async def test_more_than_the_context_is_refused_with_the_numbers(builder: CallBuilder) -> None:
    assert (await completion(builder, [1] * 60, max_tokens=4)).sampling.max_tokens == 4
    with pytest.raises(
        ApiError, match=r"64 tokens.* 65 tokens.* 60 in the prompt.* 5 for"
    ) as error:
        await completion(builder, [1] * 60, max_tokens=5)
    assert error.value.detail.code == "context_length_exceeded"
    assert await refused(completion(builder, [[1], [1] * 64])) == (
        400,
        "prompt",
        "context_length_exceeded",
    )
    assert await refused(chat(builder, "x" * 100)) == (400, "messages", "context_length_exceeded")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"min_tokens": 17}, "min_tokens"),
        ({"logit_bias": {"320": 1}}, "logit_bias"),
        ({"stop_token_ids": [320]}, "stop_token_ids"),
    ],
)
async def test_values_out_of_range_are_refused_before_an_instance_sees_them(
    builder: CallBuilder, fields: dict[str, Any], param: str
) -> None:
    assert await refused(completion(builder, **fields)) == (400, param, None)


async def test_a_request_has_only_so_many_sequences(builder: CallBuilder) -> None:
    prompts = [[1]] * MAX_SEQUENCES
    assert len((await completion(builder, prompts)).prompts) == MAX_SEQUENCES
    assert await refused(completion(builder, prompts, n=2)) == (400, "n", None)


async def test_only_the_served_model_is_known(builder: CallBuilder) -> None:
    assert (await completion(builder, model=MODEL)).model == MODEL
    assert await refused(completion(builder, model="gpt-4")) == (404, "model", "model_not_found")


async def test_what_concerns_the_answer_reaches_the_instance(builder: CallBuilder) -> None:
    call = await chat(
        builder,
        n=3,
        stop="END",
        stream=True,
        stream_options={"include_usage": True},
        cache_salt="tenant",
        priority=-1,
        return_token_ids=True,
        skip_special_tokens=False,
        include_stop_str_in_output=True,
        logprobs=True,
    )
    assert (call.n, call.stop, call.stream, call.include_usage) == (3, ("END",), True, True)
    assert (call.cache_salt, call.priority, call.return_token_ids) == ("tenant", -1, True)
    assert (call.skip_special_tokens, call.include_stop_str_in_output) == (False, True)
    assert call.sampling.logprobs == 0


async def test_calls_have_names_of_their_own(builder: CallBuilder) -> None:
    assert len({(await completion(builder)).id for _ in range(100)}) == 100


@pytest.fixture(scope="module")
def without_template(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CallBuilder]:
    builder = CallBuilder(tiny_tokenizer(tmp_path_factory.mktemp("plain")), MODEL, threads=1)
    yield builder
    builder.close()


STOPS = ("\n\nUser:", "\nUser:", "\n\nAssistant:", "\nAssistant:", "\n\nSystem:", "\nSystem:")
LONG = msgspec.structs.replace(LIMITS, max_tokens=100_000, max_model_len=100_000)


async def long_chat(builder: CallBuilder, **fields: Any) -> GenerateCall:
    body = json.dumps({"messages": [{"role": "user", "content": "hi"}], **fields}).encode()
    return await builder.chat(body, LONG)


async def test_a_chat_without_a_template_ends_where_the_other_side_would_speak(
    without_template: CallBuilder, builder: CallBuilder
) -> None:
    call = await long_chat(without_template)
    assert call.stop == STOPS
    assert call.sampling.max_tokens == 256
    # A short context leaves less room.
    assert (await chat(without_template)).sampling.max_tokens < 64
    # A model's own template knows its end of an answer.
    own = await long_chat(builder)
    assert own.stop == ()
    assert own.sampling.max_tokens == LONG.max_tokens - len(own.prompts[0])


@pytest.mark.parametrize(
    ("fields", "stop", "tokens"),
    [
        ({"max_tokens": 5000}, STOPS, 5000),
        ({"max_completion_tokens": 7}, STOPS, 7),
        ({"stop": []}, (), 256),
        ({"stop": "x"}, ("x",), 256),
        ({"stop": None}, STOPS, 256),
        ({"ignore_eos": True, "max_tokens": 900}, (), 900),
    ],
)
async def test_a_request_overrides_what_stands_for_the_template(
    without_template: CallBuilder, fields: dict[str, Any], stop: tuple[str, ...], tokens: int
) -> None:
    call = await long_chat(without_template, **fields)
    assert call.stop == stop
    assert call.sampling.max_tokens == tokens


async def test_completions_are_left_alone(without_template: CallBuilder) -> None:
    call = await completion(without_template)
    assert (call.stop, call.sampling.max_tokens) == ((), 16)


def test_the_answer_is_what_the_next_turn_sends_back() -> None:
    """Its prompt begins with the last one's tokens, which are cached."""
    messages = [{"role": "user", "content": "hi"}]
    template = ChatTemplate(DEFAULT_CHAT_TEMPLATE, {})
    prompt = template.render(messages, add_generation_prompt=True)
    generated = "Hello!\n\nUser:\nhi"
    answer, stop = StopStrings(DEFAULT_CHAT_STOPS).push(generated)
    assert (answer, stop) == ("Hello!", "\n\nUser:")
    messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": "hi"}]
    assert template.render(messages, add_generation_prompt=True).startswith(prompt + generated)

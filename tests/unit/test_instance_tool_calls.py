"""Tool calls and reasoning in an instance's answers: whole, streamed, and continued elsewhere."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from memserve.api.answer.delta import tool_call_id
from memserve.api.answer.format import AnswerFormat, Function, ReasoningFormat, ToolFormat
from memserve.api.generate import CallKind, GenerateCall, SamplingParams
from memserve.api.status import PoolTotals
from memserve.clock import ManualClock
from memserve.engine.request import EngineRequest
from memserve.instance.instance import Instance
from memserve.instance.parts import Identity, Parts
from memserve.models.response_template import response_template
from memserve.models.tokenizer import Tokenizer
from memserve.tokens import from_ids
from memserve.types import Epoch, InstanceId, Role
from tests.fakes import FakeEngine, tiny_tokenizer
from tests.stream_harness import by_choice, events_of, resumed, stream_of

EOS = 1
FUNCTIONS = (Function("weather", ("city",)), Function("add"))
HERMES = AnswerFormat(ToolFormat.HERMES, FUNCTIONS)
SAID = (
    "<think>\nWhich city? 你好 👍\n</think>\n\nLet me look.\n"
    '<tool_call>\n{"name": "weather", "arguments": {"city": "Malmö", "days": [1, 2]}}\n'
    "</tool_call>\n"
    '<tool_call>{"name": "add", "arguments": {}}</tool_call>'
)
CALLED = [("weather", '{"city": "Malmö", "days": [1, 2]}'), ("add", "{}")]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory: Path = tmp_path_factory.mktemp("tokenizer")
    return tiny_tokenizer(directory)


@asynccontextmanager
async def instance(
    tokenizer: Tokenizer, said: str = SAID, others: Sequence[str] = (), end: int = EOS
) -> AsyncIterator[tuple[Instance, FakeEngine]]:
    """On an engine that says this; a request's further samples say `others`."""
    texts = [said, *others]
    answers = [[*tokenizer.encode(text, add_special_tokens=False), end] for text in texts]

    def answer(request: EngineRequest) -> Sequence[int]:
        return answers[(request.sampling.seed or 0) % len(answers)]

    engine = FakeEngine(answer=answer, max_model_len=4096)
    made = Instance(Identity(InstanceId("i"), Epoch(1), Role.COLOCATED, "m"), ManualClock())
    try:
        await made.start(Parts(engine, tokenizer, PoolTotals, lambda: None))
        engine.submitted.clear()
        yield made, engine
    finally:
        engine.stop()


def call_of(answer: AnswerFormat = HERMES, stream: bool = True, **fields: Any) -> GenerateCall:
    own = {name: fields.pop(name) for name in set(fields) & set(SamplingParams.__struct_fields__)}
    return GenerateCall(
        id="chatcmpl-1",
        kind=CallKind.CHAT,
        model="m",
        created=1,
        prompts=(from_ids((5,)),),
        sampling=SamplingParams(**{"max_tokens": 900, "seed": 0, **own}),
        stream=stream,
        include_usage=stream,
        answer=answer,
        **fields,
    )


async def body_of(made: Instance, call: GenerateCall) -> Any:
    with made.run(call, await made.constraints(call)) as run:
        while not run.generation.finished:
            await run.step()
        return json.loads(run.generation.body())


def message_of(stream: bytes, choice: int = 0) -> tuple[dict[str, Any], str]:
    """The message of a stream's deltas, added up as clients do, and its finish reason."""
    message: dict[str, Any] = {"content": None, "tool_calls": []}
    reason = ""
    for event in events_of(stream):
        if not event.data or event.data == b"[DONE]":
            continue
        for part in json.loads(event.data)["choices"]:
            if part["index"] != choice:
                continue
            delta = part["delta"]
            for name in ("content", "reasoning", "reasoning_content"):
                if delta.get(name) is not None:
                    message[name] = (message.get(name) or "") + delta[name]
            for called in delta.get("tool_calls", ()):
                if called["index"] == len(message["tool_calls"]):
                    assert called["type"] == "function"
                    function = {"name": called["function"]["name"], "arguments": ""}
                    message["tool_calls"].append({"id": called["id"], "function": function})
                else:
                    assert called.keys() == {"index", "function"}
                    assert called["function"].keys() == {"arguments"}
                last = message["tool_calls"][called["index"]]["function"]
                last["arguments"] += called["function"]["arguments"]
            reason = part["finish_reason"] or reason
    return message, reason


def called(message: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        (call["function"]["name"], call["function"]["arguments"]) for call in message["tool_calls"]
    ]


BOTH = AnswerFormat(ToolFormat.HERMES, FUNCTIONS, reasoning=ReasoningFormat.QWEN3)


async def test_a_whole_answer_has_its_parts_apart(tokenizer: Tokenizer) -> None:
    async with instance(tokenizer) as (made, _):
        (choice,) = (await body_of(made, call_of(BOTH, stream=False)))["choices"]
    message = choice["message"]
    assert choice["finish_reason"] == "tool_calls"
    assert message["content"] == "Let me look."
    assert message["reasoning"] == message["reasoning_content"] == "Which city? 你好 👍"
    assert called(message) == CALLED
    assert [call["type"] for call in message["tool_calls"]] == ["function"] * 2
    ids = [tool_call_id("chatcmpl-1", 0, index, ToolFormat.HERMES) for index in range(2)]
    assert [call["id"] for call in message["tool_calls"]] == ids


async def test_a_stream_adds_up_to_the_whole_answer(tokenizer: Tokenizer) -> None:
    async with instance(tokenizer) as (made, _):
        (choice,) = (await body_of(made, call_of(BOTH, stream=False)))["choices"]
        stream = await stream_of(made, call_of(BOTH))
    message, reason = message_of(stream)
    assert reason == choice["finish_reason"] == "tool_calls"
    for name in ("content", "reasoning", "reasoning_content"):
        assert message[name] == choice["message"][name]
    assert [dict(call, type="function") for call in message["tool_calls"]] == [
        {**call, "type": "function"} for call in choice["message"]["tool_calls"]
    ]
    # As they come: the city's name is not one piece.
    fragments = [
        part["function"]["arguments"]
        for event in events_of(stream)
        if event.data not in (b"", b"[DONE]")
        for choice in json.loads(event.data)["choices"]
        for part in choice["delta"].get("tool_calls", ())
    ]
    assert len(fragments) > 10


CALLS = {
    "tools": call_of(),
    "tools and reasoning": call_of(BOTH),
    "reasoning alone": call_of(AnswerFormat(reasoning=ReasoningFormat.QWEN3)),
    "reasoning that is left out": call_of(
        AnswerFormat(reasoning=ReasoningFormat.QWEN3, include_reasoning=False)
    ),
    "one call": call_of(AnswerFormat(ToolFormat.HERMES, FUNCTIONS, parallel=False)),
    "samples": call_of(BOTH, n=3),
    "log-probabilities": call_of(BOTH, logprobs=1),
    "token ids": call_of(BOTH, return_token_ids=True),
    "a stop string in a call": call_of(BOTH, stop=("Malm",), n=2),
    "cut off in a call": call_of(BOTH, max_tokens=150),
}


@pytest.mark.parametrize("what", CALLS)
async def test_a_stream_cut_after_any_event_goes_on_as_if_it_had_not_been(
    tokenizer: Tokenizer, what: str
) -> None:
    call = CALLS[what]
    others = ["no call at all", '<tool_call>{"name": "sub", "arguments": {}}</tool_call>']
    async with instance(tokenizer, others=others) as (made, _):
        events = events_of(await stream_of(made, call))
        whole = by_choice(call, events)
        for end in range(len(events)):
            rest = await stream_of(made, resumed(call, events[:end]))
            assert by_choice(call, [*events[:end], *events_of(rest)]) == whole


async def test_samples_have_calls_of_their_own(tokenizer: Tokenizer) -> None:
    others = ["no call at all", '<tool_call>{"name": "sub", "arguments": {}}</tool_call>']
    async with instance(tokenizer, others=others) as (made, _):
        choices = (await body_of(made, call_of(BOTH, stream=False, n=3)))["choices"]
        stream = await stream_of(made, call_of(BOTH, n=3))
    assert called(choices[0]["message"]) == CALLED
    assert choices[1]["message"] == {
        "role": "assistant",
        "content": "no call at all",
        "refusal": None,
    }
    assert choices[2]["message"]["content"] == others[1]  # no such function
    reasons = [choice["finish_reason"] for choice in choices]
    assert reasons == ["tool_calls", "stop", "stop"]
    for index, choice in enumerate(choices):
        message, reason = message_of(stream, index)
        assert (message["content"], reason) == (
            choice["message"]["content"],
            choice["finish_reason"],
        )


async def test_an_answer_of_one_call_ends_behind_it(tokenizer: Tokenizer) -> None:
    one = AnswerFormat(ToolFormat.HERMES, FUNCTIONS, parallel=False)
    end = SAID.index("}}") + 2
    tokens = len(tokenizer.encode(SAID[:end], add_special_tokens=False))
    async with instance(tokenizer) as (made, _):
        body = await body_of(made, call_of(one, stream=False))
        message, reason = message_of(await stream_of(made, call_of(one)))
    assert called(body["choices"][0]["message"]) == called(message) == CALLED[:1]
    assert body["choices"][0]["finish_reason"] == reason == "tool_calls"
    assert body["usage"]["completion_tokens"] == tokens


@pytest.mark.parametrize(
    ("fields", "calls", "reason"),
    [
        ({"max_tokens": 150}, [("weather", '{"city": "M')], "length"),
        ({"stop": ("days",)}, [("weather", '{"city": "Malmö", "')], "tool_calls"),
        ({"stop": ("look",)}, [], "stop"),
    ],
)
async def test_an_answer_that_ends_early_has_what_there_is(
    tokenizer: Tokenizer, fields: dict[str, Any], calls: list[tuple[str, str]], reason: str
) -> None:
    async with instance(tokenizer) as (made, _):
        if "max_tokens" in fields:
            lead = SAID[: SAID.index("Malm") + 1]
            fields = {"max_tokens": len(tokenizer.encode(lead, add_special_tokens=False))}
        message, told = message_of(await stream_of(made, call_of(BOTH, **fields)))
    assert (called(message), told) == (calls, reason)


async def test_a_named_function_s_answer_stops_as_openai_s_does(tokenizer: Tokenizer) -> None:
    named = AnswerFormat(ToolFormat.JSON_ARGUMENTS, FUNCTIONS[:1], named=True)
    async with instance(tokenizer, '{"city": "Malmö"}') as (made, _):
        (choice,) = (await body_of(made, call_of(named, stream=False)))["choices"]
        message, reason = message_of(await stream_of(made, call_of(named)))
    assert called(choice["message"]) == called(message) == [("weather", '{"city": "Malmö"}')]
    assert choice["message"]["content"] is None
    assert choice["finish_reason"] == reason == "stop"


async def test_log_probabilities_are_of_all_tokens(tokenizer: Tokenizer) -> None:
    count = len(tokenizer.encode(SAID, add_special_tokens=False)) + 1
    async with instance(tokenizer) as (made, _):
        (choice,) = (await body_of(made, call_of(BOTH, stream=False, logprobs=0)))["choices"]
        events = events_of(await stream_of(made, call_of(BOTH, logprobs=0)))
    assert len(choice["logprobs"]["content"]) == count
    told = [
        choice["logprobs"]["content"]
        for event in events
        if event.data not in (b"", b"[DONE]")
        for choice in json.loads(event.data)["choices"]
    ]
    assert len(told) == count  # tokens without any text of the answer, too


MARKERS = ["[TOOL_CALLS]", "[ARGS]", "<tool_call>", "</tool_call>", "[THINK]", "[/THINK]"]
CHANNELS = ["<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|call|>", "<|constrain|>"]
# A model's own template, whose delimiters are special tokens, too.
TEMPLATE = {
    "start_anchor": "<turn>",
    "fields": {
        "thinking": {"open": "[THINK]", "close": "[/THINK]"},
        "tool_calls": {
            "open_pattern": r"\s*\[TOOL_CALLS\](?P<name>\w+)\[ARGS\]",
            "close_pattern": r"(?=\[TOOL_CALLS\])",
            "repeats": True,
            "content": "json",
            "transform": {"function": {"name": "{name}", "arguments": "{content}"}},
        },
        "content": {},
    },
}


def special_tokenizer() -> Tokenizer:
    """With markers as special tokens, as Mistral's and others have them."""
    specials = ["<bos>", "<eos>", "<turn>", *MARKERS, *CHANNELS]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate([*specials, *alphabet])}
    made = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    made.add_special_tokens(specials)
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    own = response_template(TEMPLATE)
    return Tokenizer(made, bos_token_id=0, eos_token_ids=(EOS,), response_template=own)


@pytest.mark.parametrize(
    ("form", "said"),
    [
        (
            AnswerFormat(ToolFormat.RESPONSE_TEMPLATE, FUNCTIONS),
            '[THINK]Which?[/THINK]Let me look.\n[TOOL_CALLS]weather[ARGS]{"city": "Malmö"}'
            "[TOOL_CALLS]add[ARGS]{}",
        ),
        (
            AnswerFormat(ToolFormat.OPENAI, FUNCTIONS),
            "<|channel|>analysis<|message|>Which?<|end|><|start|>assistant<|channel|>commentary"
            "<|message|>Let me look.<|end|><|start|>assistant<|channel|>commentary to=functions."
            'weather <|constrain|>json<|message|>{"city": "Malmö"}<|call|><|start|>assistant '
            "to=functions.add<|channel|>commentary<|message|>{}<|call|>",
        ),
    ],
)
async def test_an_answer_that_a_template_reads_goes_on_after_any_event(
    form: AnswerFormat, said: str
) -> None:
    call = call_of(form)
    async with instance(special_tokenizer(), said) as (made, _):
        (choice,) = (await body_of(made, call_of(form, stream=False)))["choices"]
        events = events_of(await stream_of(made, call))
        whole = by_choice(call, events)
        for end in range(len(events)):
            rest = await stream_of(made, resumed(call, events[:end]))
            assert by_choice(call, [*events[:end], *events_of(rest)]) == whole
        message, reason = message_of(await stream_of(made, call))
    assert (message["content"], message["reasoning"]) == ("Let me look.", "Which?")
    assert called(message) == called(choice["message"])
    assert called(message) == [("weather", '{"city": "Malmö"}'), ("add", "{}")]
    assert reason == choice["finish_reason"] == "tool_calls"


@pytest.mark.parametrize(
    ("form", "said", "content"),
    [
        (HERMES, 'a<turn><tool_call>{"name": "add"}</tool_call>', "a"),
        (
            AnswerFormat(ToolFormat.MISTRAL, FUNCTIONS, reasoning=ReasoningFormat.MISTRAL),
            "[THINK]é[/THINK]a[TOOL_CALLS]add[ARGS]{}<turn>",
            "a",
        ),
    ],
)
async def test_markers_that_are_special_tokens_are_seen(
    form: AnswerFormat, said: str, content: str
) -> None:
    tokenizer = special_tokenizer()
    async with instance(tokenizer, said) as (made, _):
        message, reason = message_of(await stream_of(made, call_of(form)))
        assert (called(message), message["content"], reason) == (
            [("add", "{}")],
            content,
            "tool_calls",
        )
        # What is asked for is shown, and what is no marker is not.
        shown, _ = message_of(await stream_of(made, call_of(form, skip_special_tokens=False)))
        assert "<turn>" in (shown["content"] or "")
        plain, _ = message_of(await stream_of(made, call_of(AnswerFormat())))
        assert not any(marker in plain["content"] for marker in [*MARKERS, "<turn>"])

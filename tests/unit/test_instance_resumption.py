"""Streams of instances that are lost, continued by others: clients see no seam."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memserve.api.errors import ApiError
from memserve.api.generate import CallKind, FinishReason, GenerateCall, SamplingParams
from memserve.api.status import Latencies, PoolTotals
from memserve.clock import ManualClock
from memserve.engine.request import EngineInfo, EngineRequest, TokenOutput, Usage
from memserve.instance.generation import Generation, engine_requests
from memserve.instance.instance import Instance
from memserve.instance.parts import Identity, Parts
from memserve.models.tokenizer import Tokenizer
from memserve.tokens import from_ids
from memserve.types import Epoch, InstanceId, Role
from tests.fakes import FakeEngine, tiny_tokenizer
from tests.stream_harness import by_choice, events_of, resumed, stream_of

EOS = 1
VOCAB = 320
TEXT = " naïve café 你好 👍 fox jumps over the lazy dog"  # characters in pieces of one byte
ENGINE = EngineInfo("m", VOCAB, 256, 1024, 16, "float32", "cpu", 1, (EOS,))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory: Path = tmp_path_factory.mktemp("tokenizer")
    return tiny_tokenizer(directory)


@asynccontextmanager
async def instance(tokenizer: Tokenizer, **settings: Any) -> AsyncIterator[Instance]:
    """On an engine that says TEXT, and then <eos>; later samples begin further on."""
    text = tokenizer.encode(TEXT, add_special_tokens=False)

    def answer(request: EngineRequest) -> Sequence[int]:
        skip = 3 * ((request.sampling.seed or 0) + len(request.prompt) - 1)
        return [*text[skip % len(text) :], EOS, *text]

    engine = FakeEngine(**{"answer": answer, **settings})
    identity = Identity(InstanceId("i"), Epoch(1), Role.COLOCATED, "m")
    made = Instance(identity, ManualClock())
    try:
        await made.start(Parts(engine, tokenizer, PoolTotals, lambda: None))
        engine.submitted.clear()
        yield made
    finally:
        engine.stop()


def call_of(*, kind: CallKind = CallKind.COMPLETION, **fields: Any) -> GenerateCall:
    own = {name: fields.pop(name) for name in set(fields) & set(SamplingParams.__struct_fields__)}
    return GenerateCall(
        id="c",
        kind=kind,
        model="m",
        created=1,
        prompts=tuple(map(from_ids, fields.pop("prompts", ((5,),)))),
        sampling=SamplingParams(**{"max_tokens": 100, "seed": 0, **own}),
        stream=True,
        include_usage=True,
        resumed=tuple(map(from_ids, fields.pop("resumed", ()))),
        **fields,
    )


CHAT = CallKind.CHAT
CALLS = {
    "a completion": call_of(),
    "a chat": call_of(kind=CHAT),
    "samples that end apart": call_of(kind=CHAT, n=3),
    "prompts and samples": call_of(prompts=((5,), (6, 7)), n=2, max_tokens=20),
    "a stop string": call_of(stop=("e lazy",)),
    "a stop string that is kept": call_of(stop=("e lazy", "zy"), include_stop_str_in_output=True),
    "a stop string for one sample": call_of(stop=(" naïve café 你",), n=2),
    "a stop string that does not come": call_of(kind=CHAT, stop=("lazy dog!", "dog?"), n=2),
    "a stop string and min_tokens": call_of(stop=("a", "over"), min_tokens=4),
    "a stop token": call_of(stop_token_ids=(309,), kind=CHAT),
    "an end token with text": call_of(include_stop_str_in_output=True, skip_special_tokens=False),
    "no end token": call_of(ignore_eos=True, max_tokens=60),
    "max_tokens": call_of(max_tokens=9, n=2),
    "one token": call_of(kind=CHAT, max_tokens=1, n=2),
    "logprobs": call_of(logprobs=2, n=2),
    "logprobs of a chat": call_of(kind=CHAT, logprobs=2, stop=("lazy dog",)),
    "token ids": call_of(return_token_ids=True, stop=("lazy",)),
    "scores of a prompt": call_of(
        echo=("\x00\x01 as sent", None),
        prompts=((5, 6, 7), (8,)),
        logprobs=1,
        prompt_logprobs=2,
        max_tokens=3,
    ),
    "scores of a prompt alone": call_of(
        echo=("the quick",), logprobs=0, prompt_logprobs=0, max_tokens=1, n=2, prompt_only=True
    ),
    "a prompt alone": call_of(kind=CHAT, max_tokens=1, n=2, prompt_only=True),
    "echo": call_of(echo=("\x00 as sent",), prompts=((5, 6, 7),), logprobs=0),
}


@pytest.mark.parametrize("what", CALLS)
async def test_a_stream_cut_after_any_event_goes_on_as_if_it_had_not_been(
    tokenizer: Tokenizer, what: str
) -> None:
    call = CALLS[what]
    async with instance(tokenizer) as lost, instance(tokenizer) as other:
        stream = await stream_of(lost, call)
        events = events_of(stream)
        whole = by_choice(call, events)
        for cut in range(len(events)):
            rest = await stream_of(other, resumed(call, events[:cut]))
            assert by_choice(call, [*events[:cut], *events_of(rest)]) == whole


async def test_a_stream_may_be_cut_more_than_once(tokenizer: Tokenizer) -> None:
    call = call_of(kind=CHAT, n=2, stop=("e lazy",), logprobs=1)
    async with instance(tokenizer) as one:
        whole = events_of(await stream_of(one, call))
        seen: list[Any] = []
        while not seen or seen[-1].data != b"[DONE]":
            seen += events_of(await stream_of(one, resumed(call, seen)))[:5]
        assert by_choice(call, seen) == by_choice(call, whole)


async def test_what_an_earlier_run_left_on_its_way_is_not_the_next_one_s(
    tokenizer: Tokenizer,
) -> None:
    call = call_of(stop=("e lazy",))
    engine = FakeEngine(answer=tokenizer.encode(TEXT, add_special_tokens=False))
    made = Instance(Identity(InstanceId("i"), Epoch(1), Role.COLOCATED, "m"), ManualClock())
    await made.start(Parts(engine, tokenizer, PoolTotals, lambda: None))
    try:
        first = events_of(await stream_of(made, call))
        late = TokenOutput(id=engine.submitted[-1].id, token_ids=(309,), usage=Usage(1, 0, 9))
        with made.run(resumed(call, first[:2])) as run:
            engine.sink([late])
            rest = b""
            while not run.generation.finished:
                rest += await run.step()
        assert by_choice(call, [*first[:2], *events_of(rest)]) == by_choice(call, first)
    finally:
        engine.stop()


def test_only_what_is_not_over_is_generated_and_the_first_of_it_leads(
    tokenizer: Tokenizer,
) -> None:
    call = call_of(n=3, max_tokens=2, resumed=((5, 5), (5,), ()))
    generation = Generation(call, tokenizer, ENGINE, Latencies(), 0.0)
    assert generation.over == {"c.0-0-0"}
    leader, follower = engine_requests(call, 0, over=generation.over)
    assert (leader.id, leader.follows, leader.output.tolist()) == ("c.0-0-1", None, [5])
    assert (follower.id, follower.follows, len(follower.output)) == ("c.0-0-2", "c.0-0-1", 0)


REFUSED = {
    "tokens behind an end token": (call_of(resumed=((5, EOS, 5),)), 400),
    "tokens behind a stop string": (call_of(resumed=((308, 5),), stop=("fox",)), 400),
    "more than max_tokens": (call_of(resumed=((5, 5, 5),), max_tokens=2), 400),
    "another number of choices": (call_of(resumed=((5,), (5,))), 400),
    "no stream": (msgspec.structs.replace(call_of(resumed=((5,),)), stream=False), 400),
    "more than this instance can": (call_of(resumed=((5,) * 300,), max_tokens=400), 503),
}


@pytest.mark.parametrize("what", REFUSED)
async def test_what_cannot_be_resumed_is_refused(tokenizer: Tokenizer, what: str) -> None:
    call, status = REFUSED[what]
    async with instance(tokenizer) as one:
        with pytest.raises(ApiError) as refused, one.run(call):
            pass
        assert refused.value.status == status
        await one.lifecycle.idle()


# --- any tokens ---------------------------------------------------------------------------------

IDS = st.lists(st.integers(2, VOCAB - 1), min_size=1, max_size=40)
STOPS = st.lists(st.sampled_from([" ", "e", "qu", "the", "é", "\ufffd", "你"]), max_size=2)


@given(
    ids=IDS,
    stops=STOPS,
    sizes=st.lists(st.integers(1, 4), min_size=40, max_size=40),
    cut=st.integers(0, 40),
    chat=st.booleans(),
    include=st.booleans(),
)
def test_whatever_the_tokens_the_text_is_the_same(
    tokenizer: Tokenizer,
    ids: list[int],
    stops: list[str],
    sizes: list[int],
    cut: int,
    chat: bool,
    include: bool,
) -> None:
    call = call_of(
        kind=CHAT if chat else CallKind.COMPLETION,
        stop=tuple(stops),
        include_stop_str_in_output=include,
        max_tokens=len(ids),
    )
    whole = events_of(_fed(call, tokenizer, ids, sizes))
    seen = whole[: min(cut, len(whole) - 1)]
    again = resumed(call, seen)
    rest = events_of(_fed(again, tokenizer, ids[len(again.resumed[0]) :], sizes[::-1]))
    got, expected = _told(call, [*seen, *rest]), _told(call, whole)
    assert got == expected


def _fed(
    call: GenerateCall, tokenizer: Tokenizer, ids: Sequence[int], sizes: Sequence[int]
) -> bytes:
    """What is streamed when the engine's outputs are of these sizes."""
    generation = Generation(call, tokenizer, ENGINE, Latencies(), 0.0)
    data, left = b"", list(ids)
    for size in sizes:
        if not generation.unfinished:
            break
        now, left = left[:size], left[size:]
        finish = None if left else FinishReason.LENGTH
        (request_id,) = generation.unfinished
        output = TokenOutput(request_id, tuple(now), Usage(1, 0, 0), finish_reason=finish)
        data += generation.feed([output], 0.0)
    return data if generation.finished else data + generation.feed([], 0.0)


def _told(call: GenerateCall, events: Sequence[Any]) -> tuple[Any, ...]:
    """What a client makes of it: roles, text, ends, usage."""
    roles, text, ends, ids = 0, "", [], []
    for event in events:
        ids += event.token_ids
        if not event.data or event.data == b"[DONE]":
            continue
        for choice in msgspec.json.decode(event.data)["choices"]:
            delta = choice.get("delta", {})
            roles += "role" in delta
            text += delta.get("content", "") + choice.get("text", "")
            if choice["finish_reason"]:
                ends.append((choice["finish_reason"], choice["stop_reason"]))
    return roles, text, ends, ids, by_choice(call, events)[-1]

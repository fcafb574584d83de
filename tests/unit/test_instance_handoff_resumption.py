"""Streams that go on at another instance, with real engines: alone, and with a prefill instance."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from memserve.api.errors import ApiError
from memserve.api.generate import CallKind, GenerateCall, PrefillPeer
from memserve.tokens import from_ids
from memserve.types import InstanceId, Role
from tests.fakes import save_tiny_tokenizer
from tests.handoff_harness import call_of, completed, node, pair, prompt_of
from tests.stream_harness import Event, events_of, resumed, stream_of
from tests.tiny_models import Reference, save_tiny_model
from tests.waiting import until

PROMPT = prompt_of(70, seed=1)
TOKENS = 14
SAMPLED = {"temperature": 1.0, "seed": 7, "top_p": 0.95}
CALLS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {**SAMPLED, "n": 2},
    "penalties": {**SAMPLED, "repetition_penalty": 1.3, "presence_penalty": 0.7},
    "min_tokens": {"min_tokens": 9, "stop_token_ids": tuple(range(0, 512, 3)), **SAMPLED},
    "a stop string": {"stop": (" ", "e"), **SAMPLED, "min_tokens": 5, "n": 2},
    "logprobs": {"logprobs": 2},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = save_tiny_model("llama", tmp_path_factory.mktemp("models"))
    save_tiny_tokenizer(directory)
    return directory


def stream_call(**options: Any) -> GenerateCall:
    call = call_of(PROMPT, TOKENS, **options)
    return msgspec.structs.replace(
        call, stream=True, include_usage=True, return_token_ids=False, kind=CallKind.CHAT
    )


def told(events: Sequence[Event], choices: int) -> tuple[Any, ...]:
    """What a client makes of it. Scores of one run are those of another only nearly."""
    texts, ids, ends = [""] * choices, [[] for _ in range(choices)], [[] for _ in range(choices)]
    roles, scores, counted = [0] * choices, [[] for _ in range(choices)], None  # type: ignore[var-annotated]
    for event in events:
        if event.choice is not None:
            ids[event.choice] += event.token_ids  # type: ignore[arg-type]
        if event.data in (b"", b"[DONE]"):
            continue
        data = json.loads(event.data)
        if data.get("usage"):
            counted = (data["usage"]["prompt_tokens"], data["usage"]["completion_tokens"])
        for choice in data["choices"]:
            own = choice["index"]
            texts[own] += choice["delta"].get("content", "")
            roles[own] += "role" in choice["delta"]
            if choice["finish_reason"]:
                ends[own].append((choice["finish_reason"], choice["stop_reason"]))
            for score in (choice["logprobs"] or {}).get("content", ()):
                top = [other["token"] for other in score["top_logprobs"]]
                scores[own].append((score["token"], top, pytest.approx(score["logprob"], abs=1e-3)))
    return texts, ids, ends, roles, scores, counted, events[-1].data


@pytest.mark.parametrize("what", CALLS)
async def test_an_answer_goes_on_at_another_instance(model: Path, what: str) -> None:
    options = CALLS[what]
    call = stream_call(**options)
    async with node(model, Role.COLOCATED) as lost, node(model, Role.COLOCATED) as other:
        events = events_of(await stream_of(lost.instance, call))
        whole = told(events, call.n)
        for cut in range(0, len(events), 2):
            rest = await stream_of(other.instance, resumed(call, events[:cut]))
            assert told([*events[:cut], *events_of(rest)], call.n) == whole
            await other.settled()


@pytest.mark.parametrize("caching", ["off", "full"])
@pytest.mark.parametrize("what", ["greedy", "penalties", "a stop string"])
async def test_an_answer_goes_on_with_a_prefill_instance(
    model: Path, what: str, caching: Any
) -> None:
    async with pair(model, caching) as (p, d), node(model, Role.COLOCATED) as alone:
        call = stream_call(prefill=[p], **CALLS[what])
        events = events_of(await stream_of(alone.instance, call))
        whole = told(events, call.n)
        for number, cut in enumerate((1, 7, len(events) - 3)):
            again = msgspec.structs.replace(resumed(call, events[:cut]), id=f"again-{number}")
            asked = d.totals.asked
            rest = await stream_of(d.instance, again)
            assert told([*events[:cut], *events_of(rest)], call.n) == whole
            assert d.totals.asked > asked
            assert d.totals.failed == 0
            await d.settled()
            await p.settled()


async def test_what_was_generated_elsewhere_goes_back_too(model: Path) -> None:
    """To the prefill instance, with what came after it."""
    expected = Reference(model).generate(PROMPT, 40)
    async with pair(model) as (p, d):
        call = call_of(PROMPT, 40, prefill=[p])
        call = msgspec.structs.replace(call, stream=True, resumed=(from_ids(expected[:20]),))
        events = events_of(await stream_of(d.instance, call))
        assert [t for event in events for t in event.token_ids] == expected[20:]
        await until(lambda: d.totals.returns == 1, "the return")
        await p.settled()
        await d.settled()
        assert p.has([*PROMPT, *expected]) == d.has([*PROMPT, *expected]) == 96
        # P computed the prompt and the 20 tokens, and sent what is whole of them.
        assert d.totals.blocks_received == 5


async def test_an_answer_that_ends_with_its_next_token(model: Path) -> None:
    expected = Reference(model).generate(PROMPT, 6)
    async with pair(model) as (p, d):
        call = call_of(PROMPT, 6, prefill=[p])
        call = msgspec.structs.replace(call, stream=True, resumed=(from_ids(expected[:5]),))
        events = events_of(await stream_of(d.instance, call))
        assert [t for event in events for t in event.token_ids] == expected[5:]
        assert b'"finish_reason":"length"' in events[0].data
        assert events[1].data == b"[DONE]"
        await until(lambda: d.totals.returns == 1, "the return")


# --- before anybody is asked ---------------------------------------------------------------------


async def test_nobody_is_asked_for_what_would_be_refused_here(model: Path) -> None:
    """The prefill would be wasted."""
    nobody = PrefillPeer(InstanceId("nobody"), "http://127.0.0.1:9", "tcp://127.0.0.1:9")
    async with node(model, Role.DECODE, max_running=1, max_waiting=1) as d:
        for bad in (call_of(prompt_of(5000, 1)), call_of([600]), call_of(PROMPT, top_p=7.0)):
            call = msgspec.structs.replace(bad, prefill=(nobody,))
            with pytest.raises(ApiError) as refused, d.instance.run(call):
                pass
            assert refused.value.status == 400
        with d.instance.run(call_of(prompt_of(9, 1), 400)):
            await until(lambda: d.engine.stats().running == 1, "one that runs")
            with d.instance.run(call_of(prompt_of(9, 2), 400)):
                await until(lambda: d.engine.stats().waiting == 1, "one that waits")
                call = msgspec.structs.replace(call_of(PROMPT), prefill=(nobody,))
                with pytest.raises(ApiError) as refused, d.instance.run(call):
                    pass
                assert refused.value.status == 429
                assert refused.value.retry_after is not None
        assert d.totals.asked == 0


async def test_a_prefill_instance_refuses_before_it_fetches(model: Path) -> None:
    async with pair(model, max_running=1, max_waiting=1) as (p, d):
        with p.instance.run(call_of(prompt_of(9, 1), 400)):
            await until(lambda: p.engine.stats().running == 1, "one that runs")
            with p.instance.run(call_of(prompt_of(9, 2), 400)):
                await until(lambda: p.engine.stats().waiting == 1, "one that waits")
                call = msgspec.structs.replace(call_of(PROMPT, prefill=[p]), fetch=d.peer)
                with d.instance.run(call) as run:
                    await completed(run)
                assert d.totals.failed == 1
                assert p.fetches.asked == 0

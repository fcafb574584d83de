"""`allowed_token_ids`, `bad_words`: what must not follow does not, wherever answers are made.

And what `truncate_prompt_tokens` leaves of a prompt.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from memserve.api.errors import ApiError
from memserve.api.generate import GenerateCall, SamplingParams, validate_sampling
from memserve.config import ModelConfig
from memserve.errors import RequestError
from memserve.models.tokenizer import Tokenizer
from memserve.types import Role
from tests.fakes import save_tiny_tokenizer
from tests.handoff_harness import node, pair
from tests.stream_harness import events_of, resumed, stream_of
from tests.tiny_models import save_tiny_model
from tests.unit.test_instance_required_calls import LIMITS, builder_of
from tests.unit.test_instance_tool_calls import body_of

ALLOWED = [*range(20, 40)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = save_tiny_model("llama", tmp_path_factory.mktemp("models"))
    save_tiny_tokenizer(made, "{{ messages }}")
    return made


async def call_of(model: Path, **fields: Any) -> GenerateCall:
    with builder_of(model, ModelConfig()) as builder:
        asked = {"prompt": [5, 6, 7] * 12, "max_tokens": 60, "temperature": 2.0, **fields}
        return await builder.completion(json.dumps(asked).encode(), LIMITS)


def _ids(events: list[Any]) -> list[int]:
    return [token for event in events for token in event.token_ids]


async def test_answers_obey_over_hand_over_and_failover(model: Path) -> None:
    tokenizer = Tokenizer.load(model)
    words = [tokenizer.decode([a, b]) for a in ALLOWED[:8] for b in ALLOWED[:8]]
    async with pair(model) as (p, d), node(model, Role.COLOCATED) as alone:
        for seed in range(3):
            call = await call_of(
                model, seed=seed, stream=True, allowed_token_ids=ALLOWED, bad_words=words
            )
            assert call.sampling.bad_words
            events = events_of(await stream_of(alone.instance, call))
            whole = _ids(events)
            assert set(whole) <= set(ALLOWED)  # the end token is not among them
            assert len(whole) == 60
            for word in call.sampling.bad_words:
                found = zip(*(whole[at:] for at in range(len(word))), strict=False)
                assert word not in set(found)
            for at in (1, 20, 59):
                again = resumed(call, events[:at])
                for other in (alone, d, p):
                    rest = events_of(await stream_of(other.instance, again))
                    assert _ids([*events[:at], *rest]) == whole


async def test_where_no_token_is_left_the_request_ends_with_the_reason(model: Path) -> None:
    tokenizer = Tokenizer.load(model)
    text = tokenizer.decode([30])
    call = await call_of(model, allowed_token_ids=[30], bad_words=[text])
    assert (30,) in call.sampling.bad_words
    async with node(model, Role.COLOCATED) as alone:
        with pytest.raises(ApiError, match="allowed_token_ids"):
            await body_of(alone.instance, call)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"allowed_token_ids": [10**6]}, "allowed_token_ids"),
        ({"allowed_token_ids": [-1]}, "allowed_token_ids"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"allowed_token_ids": [1] * 1_000_000}, "allowed_token_ids"),
        ({"allowed_token_ids": [1] * 16_385}, "allowed_token_ids"),
        ({"bad_words": ["x"] * 100_000}, "bad_words"),
        ({"bad_words": ["x" * 257]}, "bad_words"),
        ({"bad_words": [""]}, "bad_words"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        ({"truncation_side": "middle"}, "truncation_side"),
    ],
)
async def test_what_is_too_much_is_refused_by_name(
    model: Path, fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(ApiError) as refused:
        await call_of(model, **fields)
    assert (refused.value.status, refused.value.detail.param) == (400, param)


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({"truncate_prompt_tokens": 3}, [8, 9, 10]),
        ({"truncate_prompt_tokens": 3, "truncation_side": "left"}, [8, 9, 10]),
        ({"truncate_prompt_tokens": 3, "truncation_side": "right"}, [5, 6, 7]),
        ({"truncate_prompt_tokens": 300}, [5, 6, 7, 8, 9, 10]),
        ({"truncate_prompt_tokens": -1, "max_tokens": 1020}, [7, 8, 9, 10]),
        ({"truncation_side": "right"}, [5, 6, 7, 8, 9, 10]),
        ({"truncate_prompt_tokens": None}, [5, 6, 7, 8, 9, 10]),
    ],
)
async def test_a_prompt_is_truncated_as_by_vllm(
    model: Path, fields: dict[str, Any], kept: list[int]
) -> None:
    call = await call_of(model, prompt=[5, 6, 7, 8, 9, 10], **fields)
    assert call.prompts[0].tolist() == kept


async def test_a_prompt_that_is_too_long_fits_when_it_is_truncated(model: Path) -> None:
    long = {"prompt": [5] * 3000}
    with pytest.raises(ApiError):
        await call_of(model, **long)
    call = await call_of(model, **long, truncate_prompt_tokens=-1)
    assert len(call.prompts[0]) == LIMITS.max_tokens - 60


async def test_the_echo_of_a_truncated_text_is_what_was_kept(model: Path) -> None:
    call = await call_of(model, prompt="abcdef", echo=True, truncate_prompt_tokens=2)
    assert call.echo == (None,)
    call = await call_of(model, prompt="abcdef", echo=True, truncate_prompt_tokens=200)
    assert call.echo == ("abcdef",)


async def test_only_our_engine_is_told_of_bad_words(model: Path) -> None:
    assert (await call_of(model, bad_words=["x"])).own_engine
    assert not (await call_of(model, allowed_token_ids=[5])).own_engine


async def test_the_tokens_of_all_bad_words_together_are_bounded(model: Path) -> None:
    # 768 tokens of one text: all that is permitted by itself is taken.
    call = await call_of(model, bad_words=["\U0001f9ff" * 256])
    assert max(map(len, call.sampling.bad_words)) == 768
    decoded = msgspec.msgpack.decode(msgspec.msgpack.encode(call.sampling), type=SamplingParams)
    assert decoded == call.sampling
    words = [f"{at}" + "\U0001f9ff" * 250 for at in range(6)]
    with pytest.raises(ApiError, match="at most 4096") as refused:
        await call_of(model, bad_words=words)
    assert (refused.value.status, refused.value.detail.param) == (400, "bad_words")
    # An instance does not rely on gateways.
    many = SamplingParams(bad_words=((1,) * 4000, (2,) * 97))
    with pytest.raises(RequestError, match="4097"):
        validate_sampling(many, LIMITS.vocab_size)

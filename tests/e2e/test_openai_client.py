"""What users of the openai package get, through a gateway and an instance."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from memserve.models.tokenizer import Tokenizer
from tests.e2e.conftest import StartCluster
from tests.fakes import MODEL, FakeCluster, FakeEngine, until

ANSWER = " jumps over the lazy dog. 你好 👍"
EOS = 1
HI: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hi"}]


def says(tokenizer: Tokenizer, text: str, **engine: object) -> FakeEngine:
    """An engine that answers everything with `text`."""
    ids = [*tokenizer.encode(text, add_special_tokens=False), EOS]
    return FakeEngine(answer=ids, **engine)  # type: ignore[arg-type]


def client_of(cluster: FakeCluster) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0)


@pytest.fixture
def cluster(start_cluster: StartCluster, tokenizer: Tokenizer) -> FakeCluster:
    return start_cluster(says(tokenizer, ANSWER, cached_tokens=16))


@pytest.fixture
def client(cluster: FakeCluster) -> Iterator[openai.OpenAI]:
    with client_of(cluster) as client:
        yield client


def test_chat(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=HI)
    assert answer.choices[0].message.content == ANSWER
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len(tokenizer.encode(ANSWER))  # <eos> for <bos>
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 16


def test_chat_streamed(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model=MODEL,
            messages=HI,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    *parts, usage = chunks
    assert "".join(part.choices[0].delta.content or "" for part in parts) == ANSWER
    assert parts[0].choices[0].delta.role == "assistant"
    assert parts[-1].choices[0].finish_reason == "stop"
    assert usage.choices == []
    assert usage.usage is not None
    assert usage.usage.total_tokens == usage.usage.prompt_tokens + usage.usage.completion_tokens
    assert len({chunk.id for chunk in chunks}) == 1


def test_completions_of_several_prompts_and_samples(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt=["a", "b"], n=2, max_tokens=2, seed=1, echo=True
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text[0] for choice in answer.choices] == ["a", "a", "b", "b"]
    assert {choice.finish_reason for choice in answer.choices} == {"length"}
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8


def test_completions_streamed_in_samples(client: openai.OpenAI) -> None:
    texts = ["", ""]
    for chunk in client.completions.create(
        model=MODEL, prompt=[5, 6, 7], n=2, max_tokens=64, stream=True
    ):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [ANSWER, ANSWER]


def test_a_stop_string_ends_the_engine_s_work(
    start_cluster: StartCluster, tokenizer: Tokenizer
) -> None:
    endless = tokenizer.encode(ANSWER, add_special_tokens=False)
    engine = FakeEngine(answer=endless, step_seconds=0.005)
    with client_of(start_cluster(engine)) as client:
        asked: dict[str, Any] = {
            "model": MODEL,
            "prompt": "a",
            "max_tokens": 200,
            "stop": ["zy d", "nothing"],
        }
        whole = client.completions.create(**asked).choices[0]
        assert (whole.text, whole.finish_reason) == (" jumps over the la", "stop")
        chunks = list(client.completions.create(**asked, stream=True))
        assert "".join(chunk.choices[0].text for chunk in chunks) == whole.text
        assert chunks[-1].choices[0].finish_reason == "stop"
    until(lambda: len(engine.cancels) == 2)


def test_logprobs_of_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=HI,
        logprobs=True,
        top_logprobs=2,
        max_completion_tokens=2,
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [len(entry.top_logprobs) for entry in logprobs.content] == [2, 2]
    assert answer.choices[0].message.content == "".join(e.token for e in logprobs.content)


def test_logprobs_of_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="a", logprobs=1, max_tokens=3)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert "".join(logprobs.tokens) == answer.choices[0].text
    assert logprobs.text_offset == [0, len(logprobs.tokens[0]), len("".join(logprobs.tokens[:2]))]


def test_token_ids_where_they_are_asked_for(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    asked = {"return_token_ids": True, "ignore_eos": True, "cache_salt": "tenant"}
    whole = client.completions.create(model=MODEL, prompt="a", max_tokens=40, extra_body=asked)
    ids = whole.choices[0].model_extra["token_ids"]  # type: ignore[index]
    assert len(ids) == 40  # past <eos>
    assert tokenizer.decode(ids) == whole.choices[0].text
    streamed = client.completions.create(
        model=MODEL, prompt="a", max_tokens=40, extra_body=asked, stream=True
    )
    parts = [chunk.choices[0].model_extra["token_ids"] for chunk in streamed]  # type: ignore[index]
    assert [token_id for part in parts for token_id in part] == ids


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_errors_are_the_client_s_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model=MODEL, prompt="a", temperature=-1)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.NotFoundError) as unknown:
        client.completions.create(model="other", prompt="a")
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model=MODEL, prompt=[5] * 250, max_tokens=10)
    assert long.value.code == "context_length_exceeded"


def test_what_reaches_the_engine(client: openai.OpenAI, cluster: FakeCluster) -> None:
    client.chat.completions.create(
        model=MODEL,
        messages=HI,
        n=2,
        seed=5,
        temperature=0.5,
        extra_body={"top_k": 7, "cache_salt": "tenant", "priority": 3},
    )
    first, second = cluster.engines[0].submitted[-2:]
    assert "tenant" in first.namespace
    assert first.namespace == second.namespace
    assert first.sampling.top_k == 7
    assert first.priority == 0  # it orders this tenant's requests, at the gateway
    assert (first.sampling.seed, second.sampling.seed) == (5, 6)
    assert second.follows == first.id
    assert first.sampling.max_tokens == 256 - len(first.prompt)

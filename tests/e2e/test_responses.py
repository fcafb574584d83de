"""What users of the openai package's `responses` get, through a gateway and an instance."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai.types.responses import ResponseItem
from pydantic import TypeAdapter

from memserve.api.serving import bind, url_of
from memserve.config import GatewayConfig
from memserve.gateway.siblings import Siblings
from memserve.models.tokenizer import Tokenizer
from tests.e2e.conftest import StartCluster
from tests.e2e.test_openai_client import ANSWER, client_of, says
from tests.fakes import MODEL, FakeCluster, FakeEngine, until
from tests.scripted_model import FOUND, TEXT, scripted_engine

ITEM: TypeAdapter[Any] = TypeAdapter(ResponseItem)


@pytest.fixture
def engine(tokenizer: Tokenizer) -> FakeEngine:
    return says(tokenizer, ANSWER, cached_tokens=16)


@pytest.fixture
def cluster(start_cluster: StartCluster, engine: FakeEngine) -> FakeCluster:
    return start_cluster(engine)


@pytest.fixture
def client(cluster: FakeCluster) -> Iterator[openai.OpenAI]:
    with client_of(cluster) as client:
        yield client


def prompt(engine: FakeEngine) -> list[int]:
    """The last one that the engine got."""
    return list(engine.submitted[-1].prompt)


def test_a_response(client: openai.OpenAI, engine: FakeEngine, tokenizer: Tokenizer) -> None:
    answer = client.responses.create(
        model=MODEL, input="hi", instructions="be", metadata={"a": "b"}, user="u"
    )
    assert answer.output_text == ANSWER
    assert (answer.status, answer.model, answer.metadata) == ("completed", MODEL, {"a": "b"})
    assert answer.usage is not None
    assert answer.usage.output_tokens == len(tokenizer.encode(ANSWER))  # <eos> for <bos>
    assert answer.usage.input_tokens_details.cached_tokens == 16
    asked = prompt(engine)
    client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "system", "content": "be"}, {"role": "user", "content": "hi"}],
    )
    assert asked == prompt(engine)


def test_the_tokens_of_an_input_are_counted(client: openai.OpenAI, engine: FakeEngine) -> None:
    asked: dict[str, Any] = {"model": MODEL, "input": "hi", "instructions": "be"}
    first = client.responses.create(**asked)
    counted = client.responses.input_tokens.count(**asked)
    assert counted.object == "response.input_tokens"
    assert counted.input_tokens == len(prompt(engine)) == first.usage.input_tokens  # type: ignore[union-attr]
    follows = client.responses.input_tokens.count(
        model=MODEL, input="and?", previous_response_id=first.id
    )
    assert follows.input_tokens > counted.input_tokens
    # More than the context, by which a client knows how much to leave out.
    long = client.responses.input_tokens.count(model=MODEL, input="x " * 300)
    assert long.input_tokens > engine.max_model_len
    with pytest.raises(openai.NotFoundError):
        client.responses.input_tokens.count(model="other", input="hi")
    with pytest.raises(openai.BadRequestError, match="not found"):
        client.responses.input_tokens.count(
            model=MODEL, input="hi", previous_response_id="resp_none"
        )


def test_streamed(client: openai.OpenAI) -> None:
    events = list(client.responses.create(model=MODEL, input="hi", stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == ANSWER
    last = events[-1]
    assert last.type == "response.completed"
    assert last.response.output_text == ANSWER
    assert client.responses.retrieve(last.response.id) == last.response


def test_the_client_s_own_stream(client: openai.OpenAI) -> None:
    with client.responses.stream(model=MODEL, input="hi") as stream:
        for _ in stream:
            pass
        assert stream.get_final_response().output_text == ANSWER


def test_cut_off(client: openai.OpenAI) -> None:
    answer = client.responses.create(model=MODEL, input="hi", max_output_tokens=2)
    assert answer.status == "incomplete"
    assert answer.incomplete_details is not None
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert answer.usage is not None
    assert answer.usage.output_tokens == 2


def test_log_probabilities(client: openai.OpenAI) -> None:
    answer = client.responses.create(
        model=MODEL, input="hi", include=["message.output_text.logprobs"], top_logprobs=2,
        max_output_tokens=2,
    )  # fmt: skip
    text = answer.output[0]
    assert text.type == "message"
    assert text.content[0].type == "output_text"
    scores = text.content[0].logprobs
    assert scores is not None
    assert [len(score.top_logprobs) for score in scores] == [2, 2]
    assert "".join(score.token for score in scores) == answer.output_text


def test_a_conversation_goes_on(client: openai.OpenAI, engine: FakeEngine) -> None:
    first = client.responses.create(model=MODEL, input="a", instructions="be")
    second = client.responses.create(model=MODEL, input="b", previous_response_id=first.id)
    third = client.responses.create(
        model=MODEL, input=[{"role": "user", "content": "c"}], previous_response_id=second.id
    )
    asked = prompt(engine)
    turns: list[Any] = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": ANSWER},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": ANSWER},
        {"role": "user", "content": "c"},
    ]
    client.chat.completions.create(model=MODEL, messages=turns)
    assert asked == prompt(engine)
    assert third.previous_response_id == second.id
    items = list(client.responses.input_items.list(third.id, order="asc", limit=2))
    assert len(items) == 5  # the client asks for all pages
    assert [ITEM.validate_python(item.model_dump()).type for item in items] == ["message"] * 5
    latest = client.responses.input_items.list(third.id, limit=2)
    assert latest.data == items[:-3:-1]
    assert latest.has_more


def test_what_is_deleted_is_gone(client: openai.OpenAI) -> None:
    answer = client.responses.create(model=MODEL, input="a")
    client.responses.delete(answer.id)
    for ask in (client.responses.retrieve, client.responses.delete):
        with pytest.raises(openai.NotFoundError) as missing:
            ask(answer.id)
        assert missing.value.code == "response_not_found"
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(model=MODEL, input="b", previous_response_id=answer.id)
    assert refused.value.code == "previous_response_not_found"
    assert refused.value.param == "previous_response_id"


def test_what_is_not_to_be_stored_is_not(client: openai.OpenAI, cluster: FakeCluster) -> None:
    answer = client.responses.create(model=MODEL, input="a", store=False)
    assert answer.model_dump()["store"] is False
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(answer.id)


def test_a_gateway_that_stores_nothing(start_cluster: StartCluster, tokenizer: Tokenizer) -> None:
    gateway = GatewayConfig(port=0, response_store_bytes=0)
    with client_of(start_cluster(says(tokenizer, ANSWER), gateway=gateway)) as client:
        answer = client.responses.create(model=MODEL, input="a")
        assert answer.output_text == ANSWER
        assert answer.model_dump()["store"] is False
        with pytest.raises(openai.NotFoundError, match="response_store_bytes"):
            client.responses.retrieve(answer.id)
        with pytest.raises(openai.BadRequestError) as refused:
            client.responses.create(model=MODEL, input="a", store=True)
        assert refused.value.param == "store"


def test_an_engine_that_fails(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.fails = "no memory"
    with pytest.raises(openai.InternalServerError):
        client.responses.create(model=MODEL, input="a")


def test_a_client_that_leaves_ends_the_engine_s_work(
    start_cluster: StartCluster, tokenizer: Tokenizer
) -> None:
    endless = tokenizer.encode(ANSWER, add_special_tokens=False)
    engine = FakeEngine(answer=endless, step_seconds=0.005)
    with client_of(start_cluster(engine)) as client:
        stream = client.responses.create(model=MODEL, input="a", stream=True, max_output_tokens=200)
        next(iter(stream))
        stream.close()
        until(lambda: len(engine.cancels) == 1)


def test_a_large_body_is_read_beside_the_loop(client: openai.OpenAI, engine: FakeEngine) -> None:
    thought: Any = {
        "type": "reasoning",
        "id": "r",
        "summary": [],
        "encrypted_content": "x" * 300_000,
    }
    turn: Any = {"role": "user", "content": "hi"}
    first = client.responses.create(model=MODEL, input=[thought, turn])
    asked = prompt(engine)
    assert first.output_text == ANSWER
    client.responses.create(model=MODEL, input="hi")
    assert asked == prompt(engine)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"background": True}, "background"),
        ({"max_output_tokens": 10_000}, "input"),
        ({"input": "x " * 2000}, "input"),
        ({"temperature": -1}, "temperature"),
        ({"model": "other"}, "model"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
    ],
)
def test_a_refusal_names_the_field(
    client: openai.OpenAI, fields: dict[str, Any], param: str
) -> None:
    asked: dict[str, Any] = {"model": MODEL, "input": "hi", **fields}
    with pytest.raises(openai.APIStatusError) as refused:
        client.responses.create(**asked, stream=True)
    assert refused.value.param == param
    assert "max_completion_tokens" not in json.dumps(refused.value.body)


def test_background_responses_are_refused_by_name(client: openai.OpenAI) -> None:
    answer = client.responses.create(model=MODEL, input="hi")
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.cancel(answer.id)
    assert refused.value.param == "background"


def test_workers_of_a_gateway_find_each_other_s_responses(
    start_cluster: StartCluster, tokenizer: Tokenizer
) -> None:
    one, other = start_cluster(says(tokenizer, ANSWER)), start_cluster(says(tokenizer, ANSWER))
    sock = bind("127.0.0.1", 0)
    url = url_of(sock)
    other.wait(other.gateway.hear_siblings(sock))
    siblings = Siblings(one.gateway._peers, 0, {1: url})
    one.call(lambda: setattr(one.gateway._app._responses, "_siblings", siblings))
    with client_of(one) as here, client_of(other) as there:
        first = there.responses.create(model=MODEL, input="a")
        assert here.responses.retrieve(first.id) == first
        second = here.responses.create(model=MODEL, input="b", previous_response_id=first.id)
        items = here.responses.input_items.list(second.id, order="asc").data
        assert items[0] == here.responses.input_items.list(first.id).data[0]
        assert len(items) == 3
        here.responses.delete(first.id)
        for client in (here, there):
            with pytest.raises(openai.NotFoundError):
                client.responses.retrieve(first.id)
        # Others that are no workers of the same gateway are not asked.
        with pytest.raises(openai.NotFoundError, match="made itself"):
            there.responses.retrieve(second.id)


def test_a_worker_that_does_not_answer_may_have_what_is_asked_for(
    start_cluster: StartCluster, tokenizer: Tokenizer
) -> None:
    one = start_cluster(says(tokenizer, ANSWER))
    with socket.socket() as nobody, client_of(one) as client:
        nobody.bind(("127.0.0.1", 0))
        siblings = Siblings(one.gateway._peers, 0, {1: url_of(nobody)})
        one.call(lambda: setattr(one.gateway._app._responses, "_siblings", siblings))
        for ask in (client.responses.retrieve, client.responses.delete):
            with pytest.raises(openai.InternalServerError) as failed:
                ask("resp_0a")
            assert (failed.value.status_code, failed.value.code) == (503, "worker_unavailable")


def test_siblings_are_not_asked_for_what_is_no_id(cluster: FakeCluster) -> None:
    asked: list[str] = []

    class Nobody(Siblings):
        async def answers(self, path: str, method: str = "GET") -> dict[int, bytes]:
            asked.append(path)
            return {}

    nobody = Nobody(cluster.gateway._peers, 0, {})
    cluster.call(lambda: setattr(cluster.gateway._app._responses, "_siblings", nobody))
    with client_of(cluster) as client:
        for name in ("resp_..%2f..%2fmembers", "x", "resp_a?b", "resp_", "resp_é"):
            with pytest.raises(openai.NotFoundError):
                client.responses.retrieve(name)
        assert not asked
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve("resp_0a")
        assert len(asked) == 1


WEATHER: Any = {
    "type": "function",
    "name": "weather",
    "description": "The weather of a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    "strict": False,
}


@pytest.mark.parametrize("stream", [False, True])
def test_a_function_is_called_and_its_result_answered(
    start_cluster: StartCluster, tokenizer: Tokenizer, stream: bool
) -> None:
    with client_of(start_cluster(scripted_engine(tokenizer))) as client:

        def create(**fields: Any) -> Any:
            asked: dict[str, Any] = {"model": MODEL, "tools": [WEATHER], **fields}
            if not stream:
                return client.responses.create(**asked)
            with client.responses.stream(**asked) as events:
                for _ in events:
                    pass
                return events.get_final_response()

        first = create(input="What is the weather?")
        (call,) = [item for item in first.output if item.type == "function_call"]
        assert (call.name, json.loads(call.arguments)) == ("weather", {"city": TEXT})
        assert call.status == "completed"
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
        second = create(input=[result], previous_response_id=first.id)
        assert second.output_text == f"{FOUND}rain"
        # The same without anything that is stored.
        turns = [{"role": "user", "content": "What is the weather?"}, *first.output, result]
        assert create(input=turns, store=False).output_text == second.output_text

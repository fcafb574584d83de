"""`engine = "vllm"` with a vLLM in it: the same tokens as the built-in engine's, and its cache."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from memserve.api.forward import ForwardPath
from memserve.api.status import Limits
from memserve.gateway.call_builder import CallBuilder
from memserve.gateway.forward_builder import ForwardBuilder
from memserve.models.tokenizer import Tokenizer
from tests.fakes import metric, save_tiny_tokenizer, until
from tests.tiny_models import VOCAB, Reference, save_tiny_model
from tests.vllm_cluster import BLOCK, MISSING, START_SECONDS, Instances, prompt_of, up

KEY = "sk-real"
TEMPLATE = (
    "{% for t in tools or [] %}<{{ t.function.name }}>{% endfor %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% for c in m.tool_calls or [] %}({{ c.function.arguments.place }}){% endfor %}{% endfor %}"
)
SCHEMA = {
    "type": "object",
    "properties": {"sure": {"type": "boolean"}, "kind": {"enum": ["a", "b"]}},
    "required": ["sure", "kind"],
    "additionalProperties": False,
}
pytestmark = [
    pytest.mark.real_vllm,
    pytest.mark.skipif(MISSING is not None, reason=f"vLLM is {MISSING}, or `make vllm`"),
    pytest.mark.timeout(START_SECONDS + 120),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = save_tiny_model("qwen3", tmp_path_factory.mktemp("model"))
    save_tiny_tokenizer(directory, TEMPLATE)
    return directory


@pytest.fixture(scope="module")
def client(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    keys = f'gateway.api_keys = ["{KEY}"]\n'
    with (
        up(model, tmp_path_factory.mktemp("cluster"), Instances(), more=keys) as cluster,
        openai.OpenAI(base_url=f"{cluster.url}/v1", api_key=KEY) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def reference(model: Path) -> Reference:
    return Reference(model)


def complete(client: openai.OpenAI, model: Path, prompt: list[int], **more: Any) -> Any:
    extra = {"return_token_ids": True, "ignore_eos": True}
    settings = {"max_tokens": 8, "temperature": 0.0} | more
    return client.completions.create(model=str(model), prompt=prompt, extra_body=extra, **settings)


@pytest.mark.parametrize("tokens", [3, BLOCK, 100])
def test_tokens_are_those_of_the_model_cold_and_from_its_cache(
    client: openai.OpenAI, model: Path, reference: Reference, tokens: int
) -> None:
    prompt = prompt_of(tokens, tokens)
    wanted = reference.generate(prompt, 8)
    cached = []
    for _ in range(2):
        done = complete(client, model, prompt)
        assert done.choices[0].token_ids == wanted
        assert done.choices[0].finish_reason == "length"
        cached.append(done.usage.prompt_tokens_details.cached_tokens)
    assert cached == [0, (tokens - 1) // BLOCK * BLOCK]


def test_a_stream_has_the_same_tokens(
    client: openai.OpenAI, model: Path, reference: Reference
) -> None:
    prompt = prompt_of(7, 60)
    chunks = list(complete(client, model, prompt, stream=True))
    tokens = [token for chunk in chunks for token in chunk.choices[0].token_ids]
    assert tokens == reference.generate(prompt, 8)


def test_its_events_tell_the_gateway_what_it_holds(client: openai.OpenAI, model: Path) -> None:
    prompt = prompt_of(8, 200)
    complete(client, model, prompt)
    url = str(client.base_url).removesuffix("/v1/")

    def known() -> float:
        """Prompt tokens that plans have counted as cached."""
        complete(client, model, prompt)
        return metric(url, "memserve_scheduler_cached_tokens_total")

    until(lambda: known() > 0)


def test_an_end_token_and_a_stop_string_end_it(client: openai.OpenAI, model: Path) -> None:
    done = client.completions.create(
        model=str(model), prompt=[5, 6, 7], max_tokens=9, logit_bias={"2": 100}
    )
    assert (done.choices[0].finish_reason, done.usage.completion_tokens) == ("stop", 1)
    reply = client.completions.create(
        model=str(model), prompt=[5, 6, 7], max_tokens=9, logit_bias={"70": 100}
    )
    letter = reply.choices[0].text[0]
    assert reply.choices[0].text == 9 * letter
    done = client.completions.create(
        model=str(model), prompt=[5, 6, 7], max_tokens=9, logit_bias={"70": 100}, stop=[2 * letter]
    )
    assert (done.choices[0].finish_reason, done.choices[0].text) == ("stop", "")


def test_a_choice_that_only_vllm_can_make_passes_through(
    client: openai.OpenAI, model: Path
) -> None:
    for stream in (False, True):
        answer: Any = client.completions.create(
            model=str(model),
            prompt="Is it? ",
            max_tokens=20,
            stream=stream,
            extra_body={"structured_outputs": {"choice": ["yes", "no"]}},
        )
        chunks = list(answer) if stream else [answer]
        assert "".join(chunk.choices[0].text for chunk in chunks) in ("yes", "no")


def test_an_answer_has_the_form_of_a_schema(client: openai.OpenAI, model: Path) -> None:
    """Whether it comes to its end or not: random weights like long spaces."""
    answer = client.chat.completions.create(
        model=str(model),
        messages=[{"role": "user", "content": "Is it?"}],
        max_tokens=60,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "s", "schema": SCHEMA, "strict": True},
        },
    )
    choice, usage = answer.choices[0], answer.usage
    assert usage is not None
    assert choice.message.content is not None
    if choice.finish_reason == "stop":
        said = json.loads(choice.message.content)
        assert said.keys() == {"sure", "kind"}
    else:
        assert choice.message.content.lstrip().startswith("{")


async def test_the_gateway_has_the_tokens_that_vllm_makes_of_a_chat_with_tools(
    client: openai.OpenAI, model: Path
) -> None:
    """So that its events tell where the prefix is."""
    root = str(client.base_url).removesuffix("/v1/")
    parameters = {"type": "object", "properties": {"place": {"type": "string"}}}
    function = {"name": "weather", "parameters": parameters}
    called = {"name": "weather", "arguments": '{"place": "here"}'}
    asked = {
        "model": str(model),
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Is"}] * 2},
            {
                "role": "assistant",
                "tool_calls": [{"id": "1", "type": "function"} | {"function": called}],
            },
            {"role": "tool", "tool_call_id": "1", "content": "sun"},
        ],
        "tools": [{"type": "function", "function": function}],
    }
    said: Any = client.post(f"{root}/tokenize", body=asked, cast_to=object)
    tokenizer = Tokenizer.load(model)
    calls = CallBuilder(tokenizer, str(model), threads=1)
    limits = Limits(VOCAB, 1024, 4096, 1024, BLOCK, "float32", "cpu", 1)
    forwards = ForwardBuilder(calls, tokenizer)
    call = await forwards.build(ForwardPath.CHAT, json.dumps(asked).encode(), limits)
    assert list(call.prompts[0]) == said["tokens"]
    calls.close()


def test_other_endpoints_and_errors_are_vllms_own(client: openai.OpenAI, model: Path) -> None:
    root = str(client.base_url).removesuffix("/v1/")
    said: Any = client.post(f"{root}/tokenize", body={"prompt": "the quick"}, cast_to=object)
    assert said["count"] == len(said["tokens"]) > 0
    back: Any = client.post(f"{root}/detokenize", body={"tokens": said["tokens"]}, cast_to=object)
    assert back["prompt"].endswith("the quick")
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(
            model=str(model),
            prompt="x",
            extra_body={"structured_outputs": {"regex": "("}},
        )
    assert refused.value.status_code == 400
    with pytest.raises(openai.NotFoundError):  # this model embeds nothing, and vLLM says so
        client.embeddings.create(model=str(model), input="x")


def test_responses_and_messages(client: openai.OpenAI, model: Path) -> None:
    """Of OpenAI's and Anthropic's newer endpoints, whole and as streams."""
    text = "Is it? "
    done = client.responses.create(model=str(model), input=text, max_output_tokens=4)
    assert done.usage is not None
    assert done.usage.output_tokens == 4
    kinds = [
        event.type
        for event in client.responses.create(
            model=str(model), input=text, max_output_tokens=4, stream=True
        )
    ]
    assert kinds[0] == "response.created"
    assert kinds[-1] in ("response.completed", "response.incomplete")
    root = str(client.base_url).removesuffix("/")
    asked: dict[str, Any] = {
        "model": str(model),
        "max_tokens": 4,
        "messages": [{"role": "user", "content": [{"type": "text", "text": text}]}],
    }
    said: Any = client.post(f"{root}/messages", body=asked, cast_to=object)
    assert (said["type"], said["usage"]["output_tokens"]) == ("message", 4)
    del asked["max_tokens"]
    said = client.post(f"{root}/messages/count_tokens", body=asked, cast_to=object)
    assert said["input_tokens"] > 0

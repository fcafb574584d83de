"""Log-probabilities of prompts, as the openai package and vLLM's users ask for them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM

from memserve.models.tokenizer import Tokenizer
from tests.e2e.test_disaggregation import CLUSTER, get, running
from tests.fakes import save_tiny_tokenizer
from tests.tiny_models import save_tiny_model

TEXT = "the quick brown fox jumps over the lazy dog, naïve café " * 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = save_tiny_model("llama", tmp_path_factory.mktemp("models"))
    save_tiny_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def url(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A cluster of a prefill and a decode instance."""
    config = tmp_path_factory.mktemp("cluster") / "cluster.toml"
    config.write_text(CLUSTER.format(model=model, caching="full", mode="by-request-agg"))
    with running(config) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def expected(model: Path) -> torch.Tensor:
    """[tokens - 1, vocab]: Transformers' log-probabilities for the tokens of TEXT."""
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    ids = Tokenizer.load(model).encode(TEXT)
    with torch.inference_mode():
        return torch.log_softmax(reference(torch.tensor([ids])).logits[0, :-1], dim=-1)


def chosen(expected: torch.Tensor, ids: list[int]) -> list[float]:
    return [float(row[token]) for row, token in zip(expected, ids[1:], strict=True)]


@pytest.mark.parametrize("max_tokens", [0, 3])
@pytest.mark.parametrize("stream", [False, True])
def test_an_echo_has_the_prompts_scores(
    client: openai.OpenAI, model: Path, expected: torch.Tensor, max_tokens: int, stream: bool
) -> None:
    ids = Tokenizer.load(model).encode(TEXT)
    asked = client.completions.create(
        model="tiny",
        prompt=TEXT,
        echo=True,
        logprobs=2,
        max_tokens=max_tokens,
        temperature=0,
        stream=stream,
        extra_body={"ignore_eos": True},
    )
    choices = [chunk.choices[0] for chunk in asked] if stream else asked.choices
    text = "".join(choice.text for choice in choices)
    scores = [choice.logprobs for choice in choices if choice.logprobs is not None]
    values = [value for part in scores for value in part.token_logprobs]
    top = [entry for part in scores for entry in part.top_logprobs]
    assert text.startswith(TEXT)
    assert len(values) == len(top) == len(ids) + max_tokens
    assert (values[0], top[0]) == (None, None)
    assert values[1 : len(ids)] == pytest.approx(chosen(expected, ids), abs=1e-4)
    best = expected.max(dim=-1).values
    assert [max(entry.values()) for entry in top[1 : len(ids)]] == pytest.approx(
        best.tolist(), abs=1e-4
    )


def test_vllms_form_for_completions_and_chats(
    client: openai.OpenAI, model: Path, expected: torch.Tensor
) -> None:
    ids = Tokenizer.load(model).encode(TEXT)
    asked = {"prompt_logprobs": 0, "return_token_ids": True}
    done = client.completions.create(model="tiny", prompt=ids, max_tokens=1, extra_body=asked)
    first, *others = done.choices[0].prompt_logprobs
    assert first is None
    values = [entry[str(token)]["logprob"] for entry, token in zip(others, ids[1:], strict=True)]
    assert values == pytest.approx(chosen(expected, ids), abs=1e-4)
    chat = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "hi"}], max_tokens=1, extra_body=asked
    )
    assert len(chat.prompt_logprobs) == len(chat.prompt_token_ids)


def test_scored_prompts_are_computed_whole_where_they_are_answered(
    client: openai.OpenAI, url: str
) -> None:
    prompt = [5, 6, 7, 8] * 12

    def tokens(source: str) -> int:
        members = get(f"{url}/cluster", url)["instances"]
        totals = [get(f"{member['address']}/stats", url) for member in members]
        assert all(one["handoff"]["failed"] == 0 for one in totals)
        return sum(one["engine"][f"{source}_prompt_tokens"] for one in totals)

    # Handed over, which leaves its KV at both.
    client.completions.create(model="tiny", prompt=prompt, max_tokens=2)
    before = tokens("computed"), tokens("received")
    client.completions.create(
        model="tiny", prompt=prompt, max_tokens=2, extra_body={"prompt_logprobs": 0}
    )
    assert (tokens("computed"), tokens("received")) == (before[0] + len(prompt), before[1])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"echo": True, "logprobs": 20, "prompt": [list(range(3, 203))] * 63}, "logprobs"),
    ],
)
def test_what_cannot_be_answered_is_refused(
    client: openai.OpenAI, fields: dict[str, object], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.post("/completions", body={"model": "tiny", "prompt": "a", **fields}, cast_to=object)
    assert refused.value.param == param

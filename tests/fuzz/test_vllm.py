"""What a vLLM server should never answer: from what it was seen to say, changed a little."""

from __future__ import annotations

import contextlib
import json

import numpy as np
import pytest

from memserve.api.generate import SamplingParams
from memserve.engine.request import EngineRequest, TokenOutput
from memserve.types import RequestId
from memserve.vllm.answers import AnswerReader, MalformedAnswer
from memserve.vllm.metrics import UnknownMetrics, read_load, read_memory
from tests.fuzz.mutate import mutators
from tests.unit.test_vllm_answers import METRICS, STREAM

REQUEST = EngineRequest(
    RequestId("r"),
    np.array([5, 6, 7], dtype=np.int32),
    SamplingParams(max_tokens=8, temperature=0.0, logprobs=1),
)
SCORES = {
    "tokens": ["token_id:11"],
    "token_logprobs": [-0.5],
    "top_logprobs": [{"token_id:11": -0.5, "token_id:12": -1.5}],
}
EVENTS = (
    {"choices": [{"token_ids": [11], "logprobs": SCORES, "finish_reason": None}]},
    {"choices": [{"token_ids": [2], "logprobs": SCORES, "finish_reason": "stop"}]},
    {"choices": [], "usage": {"prompt_tokens_details": {"cached_tokens": 2}}},
    {"error": {"message": "no", "type": "BadRequestError", "code": 400}},
)


def check(output: TokenOutput) -> None:
    assert all(0 <= token < 1 << 31 for token in output.token_ids)
    cached = output.usage.cached_tokens
    assert cached is None or 0 <= cached <= 3
    if output.token_ids:
        assert len(output.logprobs) in (0, len(output.token_ids))
    for scores in output.logprobs:
        assert all(isinstance(token, int) for token, _ in scores.top)


def test_an_answer_is_read_or_refused_with_one_error() -> None:
    fine = 0
    for mutator in mutators("vllm answer"):
        reader, body = AnswerReader(REQUEST), b""
        for event in EVENTS[: mutator.random.randrange(1, 5)]:
            text = json.dumps(event).encode()
            damaged = mutator.json(text) if mutator.random.randrange(2) else text
            body += b"data: %b\n\n" % damaged
        body += b"data: [DONE]\n\n"
        cut = mutator.random.randrange(len(body))
        try:
            for output in (*reader.feed(body[:cut]), *reader.feed(body[cut:])):
                check(output)
        except MalformedAnswer:
            continue
        except Exception as error:  # noqa: BLE001 - whatever comes out is what is sought
            pytest.fail(f"{mutator!r}: {error!r:.300} for {body[:300]!r}")
        fine += 1
    assert fine > 0


@pytest.mark.parametrize("text", [STREAM, METRICS.encode()], ids=["stream", "metrics"])
def test_bytes_are_read_or_refused_with_one_error(text: bytes) -> None:
    for mutator in mutators("vllm bytes", 2000):
        damaged = mutator.bytes(text)
        with contextlib.suppress(MalformedAnswer):
            AnswerReader(REQUEST).feed(damaged)
        said = damaged.decode("utf-8", "replace")
        for read in (read_load, read_memory):
            with contextlib.suppress(UnknownMetrics):
                read(said)

"""Bodies from mutants of valid ones: a call, or an ApiError that names what is wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from memserve.api import limits, msgpack
from memserve.api.answer.format import ReasoningFormat, ToolFormat
from memserve.api.errors import ApiError
from memserve.api.forward import FIELDS, GIVEN_FIELDS, ForwardPath
from memserve.api.generate import GenerateCall
from memserve.api.handoff import PrefillCall, PushCall
from memserve.api.namespaces import salted
from memserve.api.status import Limits
from memserve.gateway.body_scan import check_body, count_elements
from memserve.gateway.call_builder import CallBuilder
from memserve.gateway.forward_builder import ForwardBuilder
from memserve.gateway.model_formats import ModelFormats
from memserve.instance import calls
from memserve.models.tokenizer import Tokenizer
from memserve.types import TokenArray
from memserve.vllm.forwarder import forwarded_body
from tests.fakes import MODEL, tiny_tokenizer
from tests.fuzz.json_mutants import mutants
from tests.fuzz.mutate import mutators
from tests.packed import ids, listed, packed

SERVED = Limits(
    vocab_size=320,
    max_model_len=256,
    pool_tokens=1024,
    max_tokens=256,
    block_tokens=16,
    dtype="float32",
    device="cpu",
    threads=1,
)
SHARED: dict[str, Any] = {
    "model": MODEL, "max_tokens": 3, "n": 2, "stop": ["a", "bc"], "stream": True,
    "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    "logit_bias": {"7": 1.5}, "seed": 4,
    "stop_token_ids": [5, 6], "user": "u", "metadata": {"a": "b"}, "temperature": 0.5,
    "top_p": 0.9, "top_k": 5, "min_p": 0.1, "min_tokens": 1, "priority": -1, "cache_salt": "s",
    "repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": -0.5,
    "ignore_eos": True, "return_token_ids": True, "tools": [], "response_format": {"type": "text"},
}  # fmt: skip
COMPLETIONS = [
    {**SHARED, "prompt": "hi there"},
    {"prompt": [1, 2, 3], "max_tokens": 2},
    {"prompt": ["a", [4, 5]], "logprobs": 2},
    {"prompt": [[1], [2, 3]], "echo": True, "n": 3},
]
CHATS = [
    {**SHARED, "messages": [{"role": "user", "content": "hi", "name": "x"}]},
    {
        "messages": [
            {"role": "system", "content": "be"},
            {"role": "assistant", "content": None, "tool_calls": [], "refusal": None},
            {"role": "user", "content": [{"type": "text", "text": "a"}]},
        ],
        "logprobs": True,
        "top_logprobs": 3,
        "max_completion_tokens": 4,
    },
    {
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "reasoning": "b", "tool_calls": [
                {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
            ]},
            {"role": "tool", "tool_call_id": "c", "content": "d"},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "strict": True, "parameters": {
            "type": "object", "properties": {"a": {"$ref": "#/$defs/x"}}, "$defs": {"x": {}}}}}],
        "tool_choice": "required", "parallel_tool_calls": False, "include_reasoning": False,
        "chat_template_kwargs": {"a": [1]}, "reasoning_effort": "low", "max_tokens": 2,
    },
    {
        "messages": [{"role": "user", "content": "a"}], "continue_final_message": True,
        "tools": [{"type": "function", "function": {"name": "f"}}], "max_tokens": 2,
        "tool_choice": {"type": "allowed_tools", "allowed_tools": {
            "mode": "auto", "tools": [{"type": "function", "function": {"name": "f"}}]}},
    },
]  # fmt: skip
TOLD = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}
FUNCTION = {"name": "f", "parameters": {"type": "object"}, "arguments": '{"a": 1}'}
FORWARDS: dict[ForwardPath, dict[str, Any]] = {
    ForwardPath.CHAT: {
        **SHARED, "messages": [TOLD, {"role": "assistant", "tool_calls": [{"function": FUNCTION}]}],
        "tools": [{"type": "function", "function": FUNCTION}], "tool_choice": "auto",
        "chat_template_kwargs": {"a": True}, "reasoning_effort": "low", "prompt_logprobs": 1,
    },
    ForwardPath.COMPLETIONS: {"prompt": ["hi", [1, 2]], "response_format": {"type": "json_object"}},
    ForwardPath.RESPONSES: {
        "input": [TOLD, {"type": "function_call_output", "output": "x"}], "instructions": "be",
        "tools": [{"type": "function", **FUNCTION}], "text": {"format": {"type": "text"}},
    },
    ForwardPath.MESSAGES: {
        "messages": [TOLD, {"role": "user", "content": [{"type": "image", "source": {}}]}],
        "system": [{"type": "text", "text": "a"}], "tools": [FUNCTION], "max_tokens": 3,
    },
    ForwardPath.EMBEDDINGS: {"input": [[1, 2], "a"], "encoding_format": "float", "priority": 1},
    ForwardPath.TOKENIZE: {"prompt": "hi", "return_token_strs": True},
    ForwardPath.DETOKENIZE: {"tokens": [1, 2, 3]},
}  # fmt: skip
CALL = {
    "id": "c", "kind": "completion", "model": "m", "created": 1, "n": 2,
    "prompts": [ids(1, 2), ids(3)], "resumed": [ids(1), b"", ids(2), b""],
    "sampling": {"max_tokens": 3, "stop_token_ids": [1], "logit_bias": {1: 2.0}, "seed": 1},
    "stop": ["a"], "stream": True, "session": "s", "priority": 1,
    "prefill": [{"id": "p", "address": "http://127.0.0.1:1"}],
    "fetch": {"id": "p", "address": "http://127.0.0.1:1"}, "cache_salt": "x",
    "forward": {"path": "/v1/embeddings", "body": b'{"input": "x"}'}, "extended": True,
    "answer": {"tools": "qwen3_coder", "functions": [{"name": "f", "texts": ["a"]}],
               "reasoning": "qwen3", "reasoning_begun": True, "parallel": False},
}  # fmt: skip
TARGET = {"id": "d", "address": "tcp://127.0.0.1:1"}
PREFILL = {
    "id": "c", "prompt": ids(1, 2), "sampling": {"max_tokens": 1}, "namespace": "",
    "output": ids(3), "ephemeral": False, "target": TARGET,
    "target_namespace": "salt:x", "priority": 0,
}  # fmt: skip
PUSH = {"tokens": ids(1, 2), "namespace": "", "target": TARGET, "target_namespace": ""}
MEET = {"peer": {"id": "p", "address": "http://127.0.0.1:1"}}


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CallBuilder]:
    directory: Path = tmp_path_factory.mktemp("tokenizer")
    tokenizer: Tokenizer = tiny_tokenizer(
        directory,
        "{% for m in messages %}{{ m.role }}{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}{% endfor %}"
        "{% endfor %}"
        "{{ tools | tojson }}<think>",
    )
    formats = ModelFormats(ToolFormat.QWEN3_CODER, ReasoningFormat.QWEN3)
    builder = CallBuilder(tokenizer, MODEL, 1, formats)
    yield builder
    builder.close()


def refused_by(work: Callable[[], object]) -> ApiError | None:
    try:
        work()
    except ApiError as error:
        return error
    return None


@pytest.mark.parametrize("kind", ["completion", "chat"])
@pytest.mark.timeout(0)  # as long as many examples take
async def test_a_body_is_a_call_or_refused(builder: CallBuilder, kind: str) -> None:
    build = builder.chat if kind == "chat" else builder.completion
    served = refused = 0
    for body in mutants(CHATS if kind == "chat" else COMPLETIONS):
        call: GenerateCall | ApiError
        try:
            call = await build(body, SERVED)
        except ApiError as error:
            call = error
        if isinstance(call, ApiError):
            refused += 1
            assert 400 <= call.status < 500, body[:300]
            assert len(call.body()) < 4096, body[:300]
        else:
            served += 1
            assert 1 <= len(call.prompts) * call.n <= limits.DEFAULT_MAX_WAITING
            read = calls.GENERATE.read(msgpack.encode(call))
            assert listed(read.prompts) == listed(call.prompts)
    assert served > refused / 20  # mutants reach what comes behind the parser
    assert refused > served / 20


@pytest.mark.parametrize("path", FORWARDS)
@pytest.mark.timeout(0)
async def test_what_is_passed_on_is_an_object_of_known_fields_or_refused(
    builder: CallBuilder, path: ForwardPath
) -> None:
    forwards = ForwardBuilder(builder, builder._tokenizer)
    known = FIELDS[path] - GIVEN_FIELDS
    passed = refused = 0
    for body in mutants([FORWARDS[path]]):
        call: GenerateCall | ApiError
        try:
            call = await forwards.build(path, body, SERVED)
        except ApiError as error:
            call = error
        if isinstance(call, ApiError):
            refused += 1
            assert 400 <= call.status < 500, body[:300]
            continue
        passed += 1
        read = calls.GENERATE.read(msgpack.encode(call))
        assert read.forward is not None
        said = forwarded_body(read, read.forward, salted("a tenant's"), MODEL)
        fields = msgspec.json.decode(said)
        assert fields.keys() <= known | GIVEN_FIELDS
        assert fields["model"] == MODEL
        assert fields.get("cache_salt", "a tenant's") == "a tenant's"
    assert passed
    assert refused


@pytest.mark.parametrize(
    ("reader", "valid"),
    [(calls.GENERATE, CALL), (calls.PREFILL, PREFILL), (calls.PUSH, PUSH), (calls.MEET, MEET)],
    ids=["generate", "prefill", "push", "meet"],
)  # fmt: skip
@pytest.mark.timeout(0)
def test_a_call_is_one_or_refused(reader: calls.CallReader[Any], valid: dict[str, Any]) -> None:
    read = 0
    for mutator in mutators(f"call {sorted(valid)}"):
        body = mutator.msgpack(packed(valid))
        refusal = refused_by(lambda body=body: reader.read(body))
        if refusal is not None:
            assert refusal.status == 400, repr(mutator)
            assert len(refusal.body()) < 4096, repr(mutator)
            continue
        read += 1
        for tokens in tokens_of(reader.read(body)):
            assert tokens.dtype == np.int32, repr(mutator)
            assert not (tokens < 0).any(), repr(mutator)
    assert read


def tokens_of(call: Any) -> list[TokenArray]:
    if isinstance(call, GenerateCall):
        assert all(map(len, call.prompts))
        return [*call.prompts, *call.resumed]
    if isinstance(call, PrefillCall):
        return [call.prompt, call.output]
    return [call.tokens] if isinstance(call, PushCall) else []


@pytest.mark.parametrize(
    ("reader", "valid"),
    [(calls.ROLE, {"role": "prefill"}), (calls.SHUTDOWN, {"restart": True})],
    ids=["role", "shutdown"],
)
@pytest.mark.timeout(0)
def test_a_control_call_is_one_or_refused(
    reader: calls.CallReader[Any], valid: dict[str, Any]
) -> None:
    read = 0
    for body in mutants([valid]):
        refusal = refused_by(lambda body=body: reader.read(body))
        read += refusal is None
        if refusal is not None:
            assert refusal.status == 400, body[:300]
            assert len(refusal.body()) < 4096, body[:300]
    assert read


@pytest.mark.timeout(0)
def test_the_scan_never_fails_and_counts_as_a_parser_does(builder: CallBuilder) -> None:
    for body in mutants([*COMPLETIONS, *CHATS]):
        refusal = refused_by(lambda body=body: check_body(body))
        if refusal is not None:
            assert refusal.status == 400
            continue
        try:
            tree = msgspec.json.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            continue
        if isinstance(tree, dict):
            assert _depth(tree) <= limits.MAX_DEPTH
            ids = tree.get("stop_token_ids")
            assert not isinstance(ids, list) or len(ids) <= limits.MAX_STOP_TOKEN_IDS
        if isinstance(tree, list) and tree:
            assert count_elements(memoryview(body.strip())) == len(tree)
    assert np.int64(count_elements(memoryview(b'["a,[", [1,2], "\\",", {"a":1,"b":2}]'))) == 4


def _depth(tree: object) -> int:
    if isinstance(tree, dict):
        return 1 + max(map(_depth, tree.values()), default=0)
    if isinstance(tree, list):
        return 1 + max(map(_depth, tree), default=0)
    return 0

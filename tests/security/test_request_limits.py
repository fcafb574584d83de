"""What one request may ask for: at each limit it passes, beyond it is refused by the field's
name, and nothing has been tokenised for it."""

from __future__ import annotations

import asyncio
import json
import threading
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from memserve.api import limits, msgpack
from memserve.api.errors import ApiError
from memserve.api.generate import CallKind, GenerateCall, PrefillPeer, SamplingParams
from memserve.api.status import Limits
from memserve.gateway.call_builder import CallBuilder, with_session
from memserve.instance import calls
from memserve.models.tokenizer import Tokenizer
from memserve.tokens import from_ids
from memserve.types import InstanceId
from tests.fakes import MODEL, tiny_tokenizer
from tests.packed import fields_of, ids, listed, packed

VOCABULARY = 4096
SERVED = Limits(
    vocab_size=VOCABULARY,
    max_model_len=1 << 20,
    pool_tokens=1 << 20,
    max_tokens=1 << 20,
    block_tokens=16,
    dtype="float32",
    device="cpu",
    threads=1,
)
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
NAME = "n" * limits.MAX_NAME_CHARACTERS


class Counting:
    """A tokenizer that says how often it was asked, and waits while its gate is closed."""

    has_chat_template = True

    def __init__(self, own: Tokenizer) -> None:
        self._own = own
        self._encode = own.encode
        self.has_chat_template = own.has_chat_template
        self.encoded = 0
        self.threads: set[str] = set()
        self.gate = threading.Event()
        self.gate.set()

    def longest_token(self) -> int | None:
        return self._own.longest_token()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        self.encoded += 1
        self.threads.add(threading.current_thread().name)
        self.gate.wait(30)
        return self._encode(text, add_special_tokens)

    def apply_chat_template(
        self,
        messages: Any,
        add_generation_prompt: bool = True,
        tools: object = None,
        variables: object = None,
    ) -> str:
        return self._own.apply_chat_template(messages, add_generation_prompt)


class Office:
    """A builder of calls, and its tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = Counting(tokenizer)
        self.builder = CallBuilder(self.tokenizer, MODEL, threads=1)  # type: ignore[arg-type]

    async def ask(self, body: bytes | dict[str, Any], served: Limits = SERVED) -> GenerateCall:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        build = self.builder.chat if b'"messages"' in data[:4000] else self.builder.completion
        return await build(data, served)

    async def refused(self, body: bytes | dict[str, Any], served: Limits = SERVED) -> ApiError:
        before = self.tokenizer.encoded
        with pytest.raises(ApiError) as refusal:
            await self.ask(body, served)
        assert self.tokenizer.encoded == before
        assert len(refusal.value.detail.message) < 600
        return refusal.value


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory: Path = tmp_path_factory.mktemp("tokenizer")
    return tiny_tokenizer(directory, TEMPLATE)


@pytest.fixture
def office(own: Tokenizer) -> Iterator[Office]:
    office = Office(own)
    yield office
    office.tokenizer.gate.set()
    office.builder.close()


def completion(**fields: Any) -> dict[str, Any]:
    return {"prompt": "hi", "max_tokens": 2, **fields}


def chat(
    messages: Sequence[Any] = ({"role": "user", "content": "hi"},), **fields: Any
) -> dict[str, Any]:
    return {"messages": list(messages), "max_tokens": 2, **fields}


def message(**fields: Any) -> dict[str, Any]:
    return {"role": "user", "content": "a", **fields}


def parts(count: int) -> list[dict[str, str]]:
    return [{"type": "text", "text": "a"}] * count


def tool(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


CALL = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
Asks = Callable[[int], dict[str, Any]]
FIELDS: list[tuple[str, int, Asks]] = [
    ("stop", limits.MAX_STOP_STRINGS, lambda n: completion(stop=["s"] * n)),
    ("stop", limits.MAX_STOP_CHARACTERS, lambda n: completion(stop=["s" * n])),
    ("stop", limits.MAX_STOP_CHARACTERS, lambda n: completion(stop="s" * n)),
    ("stop_token_ids", limits.MAX_STOP_TOKEN_IDS, lambda n: completion(stop_token_ids=[*range(n)])),
    (
        "logit_bias",
        limits.MAX_LOGIT_BIASES,
        lambda n: completion(logit_bias=dict.fromkeys(map(str, range(n)), 1)),
    ),
    ("n", limits.MAX_SAMPLES, lambda n: completion(n=n)),
    ("n", limits.MAX_SAMPLES, lambda n: completion(n=n, prompt=["hi", [1]])),
    ("prompt", limits.DEFAULT_MAX_WAITING, lambda n: completion(prompt=["hi"] * n)),
    ("user", limits.MAX_NAME_CHARACTERS, lambda n: completion(user="n" * n)),
    ("cache_salt", limits.MAX_NAME_CHARACTERS, lambda n: completion(cache_salt="n" * n)),
    ("prompt_cache_key", limits.MAX_NAME_CHARACTERS, lambda n: chat(prompt_cache_key="n" * n)),
    ("safety_identifier", limits.MAX_NAME_CHARACTERS, lambda n: chat(safety_identifier="n" * n)),
    (
        "metadata",
        limits.MAX_METADATA_ENTRIES,
        lambda n: chat(metadata=dict.fromkeys(map(str, range(n)), "")),
    ),
    ("metadata", limits.MAX_NAME_CHARACTERS, lambda n: chat(metadata={"n" * n: ""})),
    ("metadata", limits.MAX_NAME_CHARACTERS, lambda n: chat(metadata={"": "n" * n})),
    ("messages", limits.MAX_NAME_CHARACTERS, lambda n: chat([message(name="n" * n)])),
    ("messages", limits.MAX_MESSAGES, lambda n: chat([message()] * n)),
    ("messages", limits.MAX_PARTS, lambda n: chat([message(content=parts(n))])),
    ("messages", limits.MAX_TOOLS, lambda n: chat([message(tool_calls=[CALL] * n)])),
    ("messages", limits.MAX_NAME_CHARACTERS, lambda n: chat([message(tool_call_id="n" * n)])),
    ("tools", limits.MAX_TOOLS, lambda n: chat(tools=[tool(f"f{i}") for i in range(n)])),
    ("tools", limits.MAX_FUNCTION_NAME, lambda n: chat(tools=[tool("f" * n)])),
    (
        "chat_template_kwargs",
        limits.MAX_NAME_CHARACTERS,
        lambda n: chat(chat_template_kwargs={"n" * n: 1}),
    ),
]


@pytest.mark.parametrize(("param", "limit", "asks"), FIELDS)
async def test_each_field_has_its_limit(office: Office, param: str, limit: int, asks: Asks) -> None:
    await office.ask(asks(limit))
    refusal = await office.refused(asks(limit + 1))
    assert (refusal.status, refusal.detail.param) == (400, param)
    assert refusal.detail.type == "invalid_request_error"


async def test_a_model_s_name_is_repeated_in_part(office: Office) -> None:
    assert (await office.refused(completion(model=NAME))).status == 404
    refusal = await office.refused(completion(model=NAME + "n"))
    assert (refusal.status, refusal.detail.param) == (400, "model")


async def test_an_unknown_field_is_named_in_part(office: Office) -> None:
    refusal = await office.refused(completion(**{"x" * 50_000: 1}))
    assert (refusal.status, refusal.detail.param) == (400, "x" * 64)


async def test_the_sequences_are_those_that_an_instance_s_queue_takes(office: Office) -> None:
    small = msgspec.structs.replace(SERVED, max_waiting=4)
    assert (await office.ask(completion(n=4), small)).n == 4
    assert (await office.refused(completion(n=5), small)).detail.param == "n"
    assert (await office.refused(completion(prompt=["a"] * 5), small)).detail.param == "prompt"
    large = msgspec.structs.replace(SERVED, max_waiting=10**9)
    at = completion(prompt=[[1]] * limits.MAX_SEQUENCES)
    assert len((await office.ask(at, large)).prompts) == limits.MAX_SEQUENCES
    beyond = completion(prompt=[[1]] * (limits.MAX_SEQUENCES + 1))
    assert (await office.refused(beyond, large)).detail.param == "prompt"


async def test_a_session_s_name_has_its_limit(office: Office) -> None:
    call = await office.ask(completion())
    at = b"\xff" * limits.MAX_NAME_CHARACTERS
    assert with_session(call, at).session == at.decode("latin-1")
    with pytest.raises(ApiError, match="X-Session-Id"):
        with_session(call, at + b"x")


# --- large bodies ---------------------------------------------------------------------------

MEGABYTE = 1 << 20


def many(item: bytes, size: int = MEGABYTE) -> bytes:
    return b"[" + b",".join([item] * (size // (len(item) + 1))) + b"]"


@pytest.mark.parametrize(
    ("param", "body"),
    [
        ("prompt", b'{"prompt":' + many(b'"hi"') + b"}"),
        ("prompt", b'{"prompt":' + many(b"[1]") + b"}"),
        ("prompt", b'{"prompt":' + many(b"1,\"a\"") + b"}"),
        ("stop", b'{"prompt":"hi","stop":' + many(b'"a"') + b"}"),
        ("stop_token_ids", b'{"prompt":"hi","stop_token_ids":' + many(b"1") + b',"n":128}'),
        ("tools", b'{"prompt":"hi","tools":' + many(b"[]") + b"}"),
        ("metadata", b'{"prompt":"hi","metadata":{' + many(b'"a":1')[1:-1] + b"}}"),
        ("messages", b'{"messages":' + many(b'{"role":"user"}', 4 * MEGABYTE) + b"}"),
        ("messages", b'{"messages":[{"role":"user","tool_calls":' + many(b"{}") + b"}]}"),
        ("xyz", b'{"prompt":"hi","xyz":' + many(b"1") + b"}"),
        ("tools", b'{"prompt":"hi","tools":' + b"[" * 33 + b" " * MEGABYTE + b"]" * 33 + b"}"),
        (None, b"{" + many(b'"a":1')[1:-1] + b"}"),
        (None, b"[" * MEGABYTE),
    ],
)  # fmt: skip
async def test_what_would_become_many_objects_is_counted_first(
    office: Office, param: str | None, body: bytes
) -> None:
    tracemalloc.start()
    try:
        refusal = await office.refused(body)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (refusal.status, refusal.detail.param) == (400, param)
    assert peak < 3 * len(body)


@pytest.mark.parametrize("depth", [33, 500, 60_000])
async def test_depth_is_refused_in_small_bodies_too(office: Office, depth: int) -> None:
    nested = b"[" * depth + b"]" * depth
    for field, asked in [
        (b"tools", b'{"prompt":"hi","tools":%b}'),
        (b"prompt", b'{"prompt":%b}'),
        (b"metadata", b'{"prompt":"hi","metadata":{"a":%b}}'),
        (b"messages", b'{"messages":[{"role":"user","content":%b}]}'),
        (b"messages", b'{"messages":[{"role":"user","annotations":%b}]}'),
    ]:
        refusal = await office.refused(asked % nested)
        assert refusal.status == 400
        assert refusal.detail.param in (field.decode(), None)


async def test_large_bodies_that_ask_for_little_are_served(office: Office) -> None:
    text = "the quick brown fox " * (MEGABYTE // 40)
    small = await office.ask(completion(prompt=text[:100]))
    long = await office.ask(completion(prompt=text))
    assert listed([long.prompts[0][:20]]) == listed([small.prompts[0][:20]])
    assert "large-body_0" in office.tokenizer.threads
    await office.ask(chat([message(content=text)]))
    ids = [7] * 200_000
    for spaced in (json.dumps(ids), json.dumps(ids, indent=1)):
        call = await office.ask(b'{"prompt":%b}' % spaced.encode())
        assert len(call.prompts[0]) == len(ids)
    several = json.dumps({"prompt": [ids, ids, "hi"]}).encode()
    assert [*map(len, (await office.ask(several)).prompts)][:2] == [len(ids)] * 2


async def test_so_many_large_bodies_are_worked_on_and_so_many_wait(office: Office) -> None:
    body = json.dumps(completion()).encode() + b" " * limits.LARGE_BODY_BYTES
    office.tokenizer.gate.clear()
    most = limits.LARGE_BODIES_AT_ONCE + limits.LARGE_BODIES_WAITING
    asked = [asyncio.ensure_future(office.ask(body)) for _ in range(most)]
    await asyncio.sleep(0)
    with pytest.raises(ApiError) as full:
        await office.ask(body)
    assert (full.value.status, full.value.detail.code) == (429, "queue_full")
    assert full.value.retry_after
    small = asyncio.ensure_future(office.ask(completion(prompt=[1, 2])))
    assert listed((await small).prompts) == [[1, 2]]  # small ones go on
    office.tokenizer.gate.set()
    await asyncio.gather(*asked)
    assert {name[:10] for name in office.tokenizer.threads} == {"large-body"}
    assert len(office.tokenizer.threads) <= limits.LARGE_BODIES_AT_ONCE
    assert len((await office.ask(body)).prompts) == 1


# --- calls at an instance -------------------------------------------------------------------


def call(**fields: Any) -> dict[str, Any]:
    made = GenerateCall(
        "c", CallKind.COMPLETION, "m", 1, (from_ids((1, 2)),), SamplingParams(max_tokens=3)
    )
    return {**fields_of(made), **fields}


def sampling(**fields: Any) -> dict[str, Any]:
    return call(sampling={"max_tokens": 3, **fields})


PEER = {"id": "p", "address": "http://127.0.0.1:1"}
PREFILL = {
    "id": "c", "prompt": ids(1), "sampling": {}, "namespace": "", "ephemeral": False,
    "target": {"id": "d", "address": "tcp://127.0.0.1:1"}, "target_namespace": "",
}  # fmt: skip
PUSH = {key: PREFILL[key] for key in ("namespace", "target", "target_namespace")} | {
    "tokens": ids(1)
}


@pytest.mark.parametrize(
    ("at", "beyond"),
    [
        (call(n=128), call(n=129)),
        (call(n=1), call(n=2**63 - 1)),
        (call(n=1), call(n=0)),
        (call(n=1), call(n=-1)),
        (call(prompts=[ids(1)] * 1024), call(prompts=[ids(1)] * 1025)),
        (call(prompts=[ids(1)] * 8, n=128), call(prompts=[ids(1)] * 9, n=128)),
        (call(), call(prompts=[])),
        (call(), call(prompts=[[ids(1)]])),
        (call(), call(prompts=[[1]])),
        (call(), call(prompts=ids(1))),
        (call(), call(prompts=[b""])),
        (call(prompts=[ids(1)]), call(prompts=[ids(1)[:3]])),
        (call(prompts=[ids(0)]), call(prompts=[ids(5, -1)])),
        (call(stop=["s" * 256] * 64), call(stop=["s"] * 65)),
        (call(), call(stop=["s" * 257])),
        (call(), call(stop=[""])),
        (call(id="i" * 256), call(id="i" * 257)),
        (call(), call(id="")),
        (call(model=NAME, cache_salt=NAME, session=NAME), call(model=NAME + "n")),
        (call(), call(cache_salt=NAME + "n")),
        (call(), call(session=NAME + "n")),
        (call(priority=-(2**31)), call(priority=-(2**31) - 1)),
        (call(created=0), call(created=-1)),
        (call(prefill=[PEER] * 1024), call(prefill=[PEER] * 1025)),
        (call(fetch=PEER), call(fetch={**PEER, "address": "h" * 257})),
        (call(resumed=[ids(1)], stream=True), call(resumed=[ids(1)] * 2, stream=True)),
        (call(resumed=[b""], stream=True), call(resumed=[ids(-1)], stream=True)),
        (call(resumed=[ids(1)], stream=True), call(resumed=[b"abcde"], stream=True)),
        (sampling(stop_token_ids=[1] * 1024), sampling(stop_token_ids=[1] * 1025)),
        (sampling(), sampling(stop_token_ids=[1] * 500_000)),
        (sampling(), sampling(logit_bias=dict.fromkeys(range(1025), 1))),
        (sampling(max_tokens=2**31 - 1), sampling(max_tokens=2**31)),
        (sampling(), sampling(max_tokens=-1)),
        (sampling(seed=-(2**63)), sampling(seed=2**63)),
        (sampling(top_k=-1), sampling(top_k=2**64 - 1)),
    ],
)
def test_an_instance_looks_at_calls_again(at: dict[str, Any], beyond: dict[str, Any]) -> None:
    calls.GENERATE.read(packed(at))
    with pytest.raises(ApiError) as refused:
        calls.GENERATE.read(packed(beyond))
    assert refused.value.status == 400
    assert len(refused.value.detail.message) < 300


@pytest.mark.parametrize(
    "body",
    [b"", b"\xff", b'{"id":"\xff"}', b"[" * 100_000, b'{"id":' * 100_000, b"null", b"1e999",
     b'{"id":"\\ud800"}', b'{"n":' + b"9" * 10_000 + b"}", b'{"' + b"x" * 100_000 + b'":1}',
     b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc1",
     b"\x81\xa7prompts\xdd\xff\xff\xff\xff", b"\x81\xa1\xff\x01", b"\x81\xa1x" * 100_000,
     b"\x81\xa6tokens\xc6\xff\xff\xff\xff"],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["GENERATE", "PREFILL", "PUSH", "MEET", "ROLE", "SHUTDOWN"])
def test_whatever_is_no_call_is_a_400(kind: str, body: bytes) -> None:
    reader = getattr(calls, kind)
    with pytest.raises(ApiError) as refused:
        reader.read(body)
    assert refused.value.status == 400
    assert len(refused.value.detail.message) < 300


@pytest.mark.parametrize(
    ("reader", "valid", "wrong"),
    [
        (calls.PREFILL, PREFILL, {"id": "i" * 513}),
        (calls.PREFILL, PREFILL, {"namespace": "n" * 2000}),
        (calls.PREFILL, PREFILL, {"target": {"id": "d", "address": "inproc://zeromq.zap.01"}}),
        (calls.PREFILL, PREFILL, {"target": {"id": "d" * 257, "address": "tcp://127.0.0.1:1"}}),
        (calls.PREFILL, PREFILL, {"sampling": {"stop_token_ids": [1] * 1025}}),
        (calls.PREFILL, PREFILL, {"priority": 2**31}),
        (calls.PREFILL, PREFILL, {"prompt": [1]}),
        (calls.PREFILL, PREFILL, {"prompt": ids(1, -1)}),
        (calls.PREFILL, PREFILL, {"prompt": ids(1)[1:]}),
        (calls.PREFILL, PREFILL, {"output": [1]}),
        (calls.PREFILL, PREFILL, {"output": ids(-(2**31))}),
        (calls.PUSH, PUSH, {"tokens": [1]}),
        (calls.PUSH, PUSH, {"tokens": ids(-1)}),
        (calls.PUSH, PUSH, {"tokens": b"a"}),
        (calls.PUSH, PUSH, {"target": {"id": "d", "address": "ipc:///tmp/x"}}),
        (calls.PUSH, PUSH, {"target_namespace": "n" * 2000}),
    ],
)
def test_calls_between_instances_are_looked_at_too(
    reader: calls.CallReader[Any], valid: dict[str, Any], wrong: dict[str, Any]
) -> None:
    reader.read(packed(valid))
    with pytest.raises(ApiError):
        reader.read(packed({**valid, **wrong}))


async def test_large_calls_wait_for_their_turn_and_only_so_many_do() -> None:
    large = calls.LargeCalls()
    body = packed(call(prompts=[ids(*([10**6] * 300_000))]))
    reading = [large.read(calls.GENERATE, body) for _ in range(limits.LARGE_BODIES_WAITING + 1)]
    done = await asyncio.gather(*reading, return_exceptions=True)
    refused = [error for error in done if isinstance(error, ApiError)]
    assert [error.status for error in refused] == [429]
    assert len((await large.read(calls.GENERATE, body)).prompts[0]) == 300_000


def test_what_gateways_send_is_within_the_limits() -> None:
    peers = (PrefillPeer(InstanceId("p"), "http://127.0.0.1:1"),)
    sent = GenerateCall(
        "c", CallKind.CHAT, "m", 1, (from_ids((1,)),), n=2, stop=("a",), prefill=peers
    )
    assert calls.GENERATE.read(msgpack.encode(sent)).prefill == peers

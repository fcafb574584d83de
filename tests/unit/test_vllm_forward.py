"""What passes through to a vLLM server: gateway, instance, and a server that has no model."""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from memserve.api.forward import FIELDS, WHOLE_PATHS, ForwardPath
from memserve.api.generate import GENERATE_PATH
from memserve.config import GatewayConfig
from memserve.models.tokenizer import Tokenizer
from memserve.vllm.place import ServerPlace
from tests.fake_vllm import Server
from tests.fakes import MODEL, FakeCluster, FakeEngine, tiny_tokenizer, until
from tests.insider import ask
from tests.packed import HEADERS, ids, packed

MESSAGES = [{"role": "user", "content": "What is the weather like?"}]
FUNCTION = {"name": "weather", "parameters": {"type": "object", "properties": {}}}
CALL = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
TOOLS = [{"type": "function", "function": FUNCTION}]
PIXEL = "data:image/png;base64,iVBORw0KGgo="
TEMPLATE = (
    "{% for t in tools or [] %}<{{ t.function.name }}>{% endfor %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
)


class Answer:
    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status = response.status
        self.media = response.headers["content-type"]
        self.retry_after = response.headers["retry-after"]
        self.text = response.read()

    @property
    def json(self) -> Any:
        return json.loads(self.text)


def post(cluster: FakeCluster, path: str, key: str | None = None, **fields: Any) -> Answer:
    connection = send(cluster, path, key, **fields)
    answer = Answer(connection.getresponse())
    connection.close()
    return answer


def send(
    cluster: FakeCluster, path: str, key: str | None = None, **fields: Any
) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection(urlsplit(cluster.url).netloc, timeout=30)
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    connection.request("POST", path, json.dumps(fields), headers)
    return connection


def chat(cluster: FakeCluster, **fields: Any) -> Answer:
    return post(cluster, ForwardPath.CHAT, **{"messages": MESSAGES, **fields})


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"), TEMPLATE)


@contextmanager
def running(
    tokenizer: Tokenizer,
    servers: dict[int, Server | Path],
    instances: int = 1,
    api_keys: tuple[str, ...] = (),
) -> Iterator[FakeCluster]:
    """Instances, of which some have the server that listens at a path."""
    places = {
        number: ServerPlace(path=server if isinstance(server, Path) else server.path)
        for number, server in servers.items()
    }
    gateway = GatewayConfig(port=0, api_keys=api_keys)
    engines = [FakeEngine() for _ in range(instances)]
    with FakeCluster(tokenizer, engines, gateway, places) as cluster:
        yield cluster


@contextmanager
def serving(path: Path, **settings: Any) -> Iterator[Server]:
    server = Server(path / "s", **settings)
    try:
        yield server
    finally:
        server.end()


@pytest.fixture(scope="module")
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, stack: ExitStack) -> Server:
    return stack.enter_context(serving(tmp_path_factory.mktemp("server")))


@pytest.fixture(scope="module")
def cluster(tokenizer: Tokenizer, server: Server, stack: ExitStack) -> FakeCluster:
    """A built-in instance, and one with a server."""
    return stack.enter_context(running(tokenizer, {1: server}, instances=2))


@pytest.fixture(scope="module")
def vllm_only(tokenizer: Tokenizer, server: Server, stack: ExitStack) -> FakeCluster:
    return stack.enter_context(running(tokenizer, {0: server}))


@pytest.fixture(scope="module")
def keyed(tokenizer: Tokenizer, server: Server, stack: ExitStack) -> FakeCluster:
    keys = ("sk-a name=a tenant=red", "sk-b name=b tenant=blue priority")
    return stack.enter_context(running(tokenizer, {0: server}, api_keys=keys))


@pytest.fixture(scope="module")
def built_in(tokenizer: Tokenizer, stack: ExitStack) -> FakeCluster:
    return stack.enter_context(running(tokenizer, {}))


def passed(server: Server, answer: Answer) -> dict[str, Any]:
    """What the server got last."""
    assert answer.status == 200, answer.text
    body: dict[str, Any] = server.fake.bodies[-1]
    assert answer.json["body"] == body
    return body


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_object"}},
        {"structured_outputs": {"choice": ["yes", "no"]}},
        {"prompt_logprobs": 2, "n": 3, "seed": 2**62, "logit_bias": {"5": -1.5}},
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "What is this?"},
                        {"type": "image_url", "image_url": {"url": PIXEL}},
                    ],
                }
            ]
        },
    ],
    ids=lambda fields: "-".join(fields),
)
def test_what_only_vllm_members_can_answer_gets_to_the_server_as_it_is(
    vllm_only: FakeCluster, server: Server, fields: dict[str, Any]
) -> None:
    answer = chat(vllm_only, **fields)
    wanted = {"messages": MESSAGES, "model": MODEL, **fields}
    assert passed(server, answer) == wanted
    assert answer.json["path"] == ForwardPath.CHAT
    assert answer.media.startswith("application/json")


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": TOOLS},
        {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "weather"}}},
        {"reasoning_effort": "low", "include_reasoning": False},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {
            "messages": [
                *MESSAGES,
                {"role": "assistant", "tool_calls": [CALL]},
                {"role": "tool", "tool_call_id": "c", "content": "rain"},
            ]
        },
    ],
    ids=lambda fields: "-".join(fields),
)
def test_what_a_built_in_engine_would_take_gets_to_a_server_where_there_is_none(
    vllm_only: FakeCluster, cluster: FakeCluster, server: Server, fields: dict[str, Any]
) -> None:
    wanted = {"messages": MESSAGES, "model": MODEL, **fields}
    assert passed(server, chat(vllm_only, **fields)) == wanted
    before = len(server.fake.paths)
    assert chat(cluster, max_tokens=2, **fields).status == 200
    assert len(server.fake.paths) == before


def test_what_the_gateway_knows_goes_the_usual_way(cluster: FakeCluster, server: Server) -> None:
    before = len(server.fake.paths)
    assert chat(cluster, max_tokens=2, tools=[], response_format={"type": "text"}).status == 200
    assert len(server.fake.paths) == before


def test_a_stream_is_the_servers_byte_for_byte(vllm_only: FakeCluster) -> None:
    answer = chat(vllm_only, tools=TOOLS, stream=True, max_tokens=3)
    events = [{"choices": [{"index": 0, "delta": {"content": f"<{n}>"}}]} for n in range(3)]
    said = b"".join(b"data: %b\n\n" % json.dumps(event).encode() for event in events)
    assert answer.text == said + b"data: [DONE]\n\n"
    assert answer.media.startswith("text/event-stream")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("kv_transfer_params", {"do_remote_prefill": True}),
        ("ec_transfer_params", {"x": 1}),
        ("vllm_xargs", {"x": 1}),
        ("session_id", "mine"),
        ("mm_processor_kwargs", {"x": 1}),
        ("media_io_kwargs", {"image": {"x": 1}}),
        ("chat_template", "{{ messages }}"),
        ("chat_template_kwargs", {"chat_template": "x"}),
        ("watermarking", False),
        ("nonsense", 1),
        ("n", 1000),
        ("max_tokens", 0),
        ("stop", ["x"] * 1000),
        ("top_logprobs", 21),
        ("cache_salt", "x" * 1025),
        ("tools", [{"type": "mcp", "server_url": "http://10.0.0.1"}]),
        ("messages", [{"role": "user", "content": "x"}] * 5000),
    ],
)
def test_what_steers_the_server_or_is_too_much_is_refused(
    vllm_only: FakeCluster, server: Server, field: str, value: object
) -> None:
    before = len(server.fake.bodies)
    answer = chat(vllm_only, **{"tools": TOOLS, field: value})
    assert answer.status == 400, answer.text
    assert field in answer.json["error"]["message"] + str(answer.json["error"]["param"])
    assert len(server.fake.bodies) == before


def test_another_model_is_not_found(cluster: FakeCluster) -> None:
    assert chat(cluster, tools=TOOLS, model="other").json["error"]["code"] == "model_not_found"


PLACES = ["http://10.0.0.1/x.png", "https://x", "file:///etc/passwd", " data:x", "//x", "ftp://x"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "part",
    [
        lambda place: {"type": "image_url", "image_url": {"url": place}},
        lambda place: {"type": "image_url", "image_url": place},
        lambda place: {"image_url": place, "uuid": None},
        lambda place: {"type": "video_url", "video_url": {"url": place}},
        lambda place: {"type": "audio_url", "audio_url": {"url": place}},
        lambda place: {"type": "input_image", "image_url": place},
        lambda place: {"type": "image", "source": {"type": "url", "url": place}},
    ],
)
def test_nothing_is_fetched_for_a_client(
    cluster: FakeCluster, server: Server, part: Callable[[str], object], place: str
) -> None:
    before = len(server.fake.bodies)
    messages = [{"role": "user", "content": [part(place)]}]
    for path in (ForwardPath.CHAT, ForwardPath.MESSAGES, ForwardPath.POOLING):
        answer = post(cluster, path, messages=messages)
        assert answer.json["error"]["code"] == "unsupported_url"
    assert post(cluster, ForwardPath.RESPONSES, input=messages).status == 400
    assert len(server.fake.bodies) == before


def test_nobody_gets_an_image_by_the_name_that_another_tenant_gave_it(
    cluster: FakeCluster, server: Server
) -> None:
    before = len(server.fake.bodies)
    for place in (None, {"url": PIXEL}):
        part = {"type": "image_url", "image_url": place, "uuid": "logo"}
        answer = chat(cluster, messages=[{"role": "user", "content": [part]}])
        assert answer.json["error"]["message"] == "'uuid' is not supported."
    assert len(server.fake.bodies) == before


def test_words_that_look_like_addresses_are_no_content(cluster: FakeCluster) -> None:
    place = {"type": "string", "default": "http://example.com"}
    schema = {"type": "object", "properties": {"url": place, "image_url": place}}
    tools = [{"type": "function", "function": {"name": "get", "parameters": schema}}]
    assert chat(cluster, tools=tools).status == 200
    documents = [{"title": "a", "source_url": "http://example.com", "uuid": "1"}]
    assert chat(cluster, documents=documents).status == 200
    ranked = [{"content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]
    assert post(cluster, ForwardPath.RERANK, query="x", documents=ranked).status == 400
    used = {"type": "tool_use", "id": "1", "name": "get", "input": {"url": "http://x"}}
    messages = [{"role": "assistant", "content": [used]}]
    assert post(cluster, ForwardPath.MESSAGES, messages=messages, max_tokens=1).status == 200


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_object"}},
        {"structured_outputs": {"choice": ["yes", "no"]}},
    ],
)
def test_constraints_are_for_a_built_in_engine_where_there_is_one(
    cluster: FakeCluster, keyed: FakeCluster, server: Server, fields: dict[str, Any]
) -> None:
    answer = post(keyed, ForwardPath.CHAT, "sk-a", messages=MESSAGES, **fields)
    assert passed(server, answer).items() >= fields.items()
    before = len(server.fake.paths)
    assert chat(cluster, max_tokens=2, **fields).status == 200
    assert len(server.fake.paths) == before
    broken = chat(cluster, structured_outputs={"regex": "(a"})
    assert (broken.status, broken.json["error"]["param"]) == (400, "structured_outputs.regex")


def test_guided_fields_are_refused_where_vllm_would_ignore_them(vllm_only: FakeCluster) -> None:
    answer = chat(vllm_only, guided_choice=["yes"])
    assert (answer.status, answer.json["error"]["param"]) == (400, "guided_choice")


def test_tenants_have_salts_of_their_own(keyed: FakeCluster, server: Server) -> None:
    salts = []
    for key in ("sk-a", "sk-b"):
        for salt in ({}, {"cache_salt": "x"}):
            answer = post(keyed, ForwardPath.CHAT, key, messages=MESSAGES, tools=TOOLS, **salt)
            salts.append(passed(server, answer)["cache_salt"])
            # As of what goes the usual way.
            done = post(keyed, ForwardPath.COMPLETIONS, key, prompt="hi", max_tokens=1, **salt)
            assert done.status == 200
            assert keyed.engines[0].submitted[-1].namespace == f"salt:{salts[-1]}"
    assert len(set(salts)) == 4
    for path in (ForwardPath.EMBEDDINGS, ForwardPath.RESPONSES):
        answer = post(keyed, path, "sk-a", input="hi", cache_salt="x")
        assert passed(server, answer)["cache_salt"] == salts[1]
    answer = post(keyed, ForwardPath.TOKENIZE, "sk-a", prompt="hi")
    assert passed(server, answer) == {"prompt": "hi", "model": MODEL}


def test_a_key_is_asked_for_everywhere(keyed: FakeCluster, server: Server) -> None:
    before = len(server.fake.bodies)
    for path in ForwardPath:
        assert post(keyed, path, messages=MESSAGES, tools=TOOLS).status == 401
        assert post(keyed, path, "sk-c", messages=MESSAGES, tools=TOOLS).status == 401
    assert len(server.fake.bodies) == before


def test_a_priority_is_told_for_those_who_may_have_one(keyed: FakeCluster, server: Server) -> None:
    said = []
    for key in ("sk-a", "sk-b"):
        answer = post(keyed, ForwardPath.CHAT, key, messages=MESSAGES, tools=TOOLS, priority=-3)
        said.append(passed(server, answer).get("priority"))
    assert said == [None, -3]


def test_an_error_of_the_server_is_the_clients(vllm_only: FakeCluster) -> None:
    for stream in (False, True):
        answer = chat(vllm_only, tools=TOOLS, temperature=-1, stream=stream)
        error = {"message": "not this one", "type": "BadRequestError", "code": 400}
        assert (answer.status, answer.json) == (400, {"error": error})


def test_who_hangs_up_before_an_answer_ends_what_the_server_does(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    with (
        serving(tmp_path, answer_seconds=60) as server,
        running(tokenizer, {0: server}) as cluster,
    ):
        connection = send(cluster, ForwardPath.EMBEDDINGS, input="x")
        until(lambda: server.fake.running == 1)
        connection.close()
        until(lambda: server.fake.cancelled == 1)
        assert server.fake.running == 0
        cluster.wait(cluster.instances[0].lifecycle.idle())


def test_who_hangs_up_ends_what_the_server_does(vllm_only: FakeCluster, server: Server) -> None:
    cancelled = server.fake.cancelled
    fields = {"messages": MESSAGES, "tools": TOOLS, "stream": True, "max_tokens": 100_000}
    connection = send(vllm_only, ForwardPath.CHAT, **fields)
    assert connection.getresponse().read(20)
    assert server.fake.running == 1
    connection.close()
    until(lambda: server.fake.running == 0)
    assert server.fake.cancelled == cancelled + 1


def test_a_drain_waits_for_what_was_passed_on(
    tokenizer: Tokenizer, server: Server, tmp_path: Path
) -> None:
    with running(tokenizer, {0: server}) as cluster:
        fields = {"messages": MESSAGES, "tools": TOOLS, "stream": True, "max_tokens": 200}
        connection = send(cluster, ForwardPath.CHAT, **fields)
        response = connection.getresponse()
        assert response.read(10)
        instance = cluster.instances[0]
        assert not cluster.call(instance.lifecycle._idle.is_set)
        cluster.call(instance.lifecycle.drain)
        assert response.read().endswith(b'<199>"}}]}\n\ndata: [DONE]\n\n')
        cluster.wait(instance.lifecycle.idle())
        assert cluster.engines[0].submitted[1:] == []  # but for the self-test
        connection.close()


def test_a_server_that_is_not_there_is_passed_over(
    tokenizer: Tokenizer, server: Server, tmp_path: Path
) -> None:
    with running(tokenizer, {0: tmp_path / "nobody", 1: server}, instances=2) as cluster:
        for _ in range(4):
            assert chat(cluster, tools=TOOLS).status == 200
    with running(tokenizer, {0: tmp_path / "nobody"}) as cluster:
        answer = chat(cluster, tools=TOOLS)
        assert (answer.status, answer.json["error"]["code"]) == (503, "server_lost")


def test_one_that_is_lost_in_mid_stream_is_told_at_once(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    with (
        serving(tmp_path, break_after=2) as server,
        running(tokenizer, {0: server, 1: server}, instances=2) as cluster,
    ):
        answer = chat(cluster, tools=TOOLS, stream=True, max_tokens=9)
        *events, last, nothing = answer.text.split(b"\n\n")
        assert nothing == b""
        assert len(events) == 3
        error = json.loads(last.removeprefix(b"data: "))["error"]
        assert error["code"] == "instance_lost"
        assert len(server.fake.paths) == 1  # nobody can go on with it


@pytest.mark.parametrize("path", sorted(WHOLE_PATHS))
def test_other_endpoints_of_the_servers(
    vllm_only: FakeCluster, server: Server, path: ForwardPath
) -> None:
    cluster = vllm_only
    contents: dict[str, Any] = {
        "input": "a text",
        "messages": MESSAGES,
        "prompt": "a text",
        "tokens": [5, 6, 7],
        "query": "what?",
        "text_1": "what?",
        "documents": ["a", {"content": [{"type": "text", "text": "b"}]}],
        "encoding_format": "float",
        "max_tokens": 5,
    }
    fields = {name: value for name, value in contents.items() if name in FIELDS[path]}
    body = passed(server, post(cluster, path, model=MODEL, **fields))
    more = {"store": False} if path is ForwardPath.RESPONSES else {}
    assert body == fields | more | {"model": MODEL}
    assert server.fake.paths[-1] == path
    assert post(cluster, path, kv_transfer_params={"x": 1}, **fields).status == 400


@pytest.mark.parametrize(
    "fields", [{"store": True}, {"previous_response_id": "x"}, {"background": True}]
)
def test_no_answer_is_kept_at_one_server(vllm_only: FakeCluster, fields: dict[str, Any]) -> None:
    answer = post(vllm_only, ForwardPath.RESPONSES, input="hi", **fields)
    assert answer.json["error"]["code"] == "unsupported_parameter"
    assert answer.json["error"]["param"] in fields


@pytest.mark.parametrize(
    ("field", "value"),
    [("request_id", "mine"), ("store", True), ("service_tier", "flex"), ("metadata", {"a": "b"})],
)
def test_what_no_answer_depends_on_is_not_passed_on(
    vllm_only: FakeCluster, server: Server, field: str, value: Any
) -> None:
    body = passed(server, chat(vllm_only, **{"tools": TOOLS, field: value}))
    assert field not in body


NATIVE: dict[ForwardPath, dict[str, Any]] = {
    ForwardPath.RESPONSES: {"input": "hi"},
    ForwardPath.TOKENIZE: {"prompt": "hi"},
    ForwardPath.DETOKENIZE: {"tokens": [5]},
}


@pytest.mark.parametrize("path", sorted(NATIVE))
def test_the_gateway_answers_itself_where_it_has_a_built_in_engine(
    cluster: FakeCluster, server: Server, path: ForwardPath
) -> None:
    before = len(server.fake.bodies)
    answer = post(cluster, path, model=MODEL, **NATIVE[path])
    assert answer.status == 200, answer.text
    assert "body" not in answer.json
    assert len(server.fake.bodies) == before


def test_what_the_gateway_does_not_understand_of_a_response_goes_to_a_server(
    cluster: FakeCluster, server: Server
) -> None:
    image = {"type": "input_image", "image_url": "data:image/png;base64,eA=="}
    asked = [{"role": "user", "content": [image]}]
    body = passed(server, post(cluster, ForwardPath.RESPONSES, input=asked))
    assert (body["input"], body["store"]) == (asked, False)
    assert server.fake.paths[-1] == ForwardPath.RESPONSES


def test_tokens_of_what_the_gateway_does_not_understand_are_a_server_s(
    cluster: FakeCluster, server: Server
) -> None:
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,eA=="}}
    messages = [{"role": "user", "content": [part]}]
    assert passed(server, post(cluster, ForwardPath.TOKENIZE, messages=messages))
    assert server.fake.paths[-1] == ForwardPath.TOKENIZE
    answer = post(cluster, ForwardPath.TOKENIZE, prompt="hi", nonsense=1)
    assert (answer.status, answer.json["error"]["param"]) == (400, "nonsense")


def test_without_a_server_everything_is_as_it_was(built_in: FakeCluster) -> None:
    answer = chat(built_in, functions=[FUNCTION])
    assert answer.status == 400
    assert answer.json["error"] == {
        "message": "'functions' is not supported.",
        "type": "invalid_request_error",
        "param": "functions",
        "code": "unsupported_parameter",
    }
    assert chat(built_in, nonsense=1).json["error"]["param"] == "nonsense"
    for path in WHOLE_PATHS - NATIVE.keys():
        answer = post(built_in, path, input="hi")
        assert (answer.status, answer.json["error"]["code"]) == (404, "not_found")
        assert path in answer.json["error"]["message"]


def test_a_built_in_engine_takes_nothing_as_it_is(built_in: FakeCluster) -> None:
    call: dict[str, Any] = {"id": "c", "kind": "chat", "model": MODEL, "created": 1}
    call |= {"prompts": [ids(0)], "forward": {"path": "/v1/chat/completions", "body": b"{}"}}
    answer = ask(built_in.urls[0], GENERATE_PATH, packed(call), "POST", **HEADERS)
    assert (answer.status, answer.json["error"]["code"]) == (400, "no_forwarding")


@pytest.mark.parametrize(
    "forward",
    [
        {"path": "/metrics", "body": b"{}"},
        {"path": "/v1/load_lora_adapter", "body": b"{}"},
        {"path": "/v1/embeddings/../../sleep", "body": b"{}"},
        {"path": "/v1/embeddings", "body": b"[]"},
        {"path": "/v1/embeddings", "body": "{}"},
        {"path": "/v1/embeddings", "body": {}},
        {"path": "/v1/embeddings", "body": b""},
        {"path": "/v1/embeddings", "body": b"{1}"},
        {"path": "/v1/embeddings", "body": b"{} {}"},
        {"path": "/v1/embeddings"},
        {"path": "/v1/embeddings", "body": b"{}", "more": 1},
    ],
)
def test_instances_pass_on_objects_to_known_endpoints_only(
    cluster: FakeCluster, server: Server, forward: dict[str, Any]
) -> None:
    before = len(server.fake.bodies)
    call = {"id": "c", "kind": "chat", "model": MODEL, "created": 1, "prompts": [ids(0)]}
    body = packed({**call, "forward": forward})
    assert ask(cluster.urls[1], GENERATE_PATH, body, "POST", **HEADERS).status == 400
    assert len(server.fake.bodies) == before

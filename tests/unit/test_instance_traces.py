"""The spans of hand-overs and fetches between instances with real engines."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import msgspec
import pytest

from memserve.api import msgpack
from memserve.api.generate import GENERATE_PATH, PrefillPeer
from memserve.config import TracesConfig
from memserve.instance import fetch
from memserve.instance.request_trace import MAX_SEQUENCES
from memserve.tracing import otlp
from memserve.tracing.settings import open_tracer
from memserve.tracing.span import Span, Tracer, headers_of
from memserve.transfer import kv_link
from memserve.types import InstanceId, Role
from tests.fakes import save_tiny_tokenizer
from tests.handoff_harness import Node, call_of, node, prompt_of
from tests.insider import peers
from tests.otlp_receiver import Receiver, receiver
from tests.tiny_models import save_tiny_model
from tests.waiting import until

PROMPT = prompt_of(70, seed=1)  # four whole blocks and six tokens


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = save_tiny_model("llama", tmp_path_factory.mktemp("models"))
    save_tiny_tokenizer(directory)
    return directory


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(otlp, "EXPORT_SECONDS", 0.01)
    monkeypatch.setattr(kv_link, "LINGER_SECONDS", 0.3)
    monkeypatch.setattr(fetch, "MIN_FETCH_SECONDS", 5.0)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def got(stack: ExitStack) -> Receiver:
    return stack.enter_context(receiver())


@pytest.fixture
def tracer(stack: ExitStack, got: Receiver) -> Tracer:
    opened = stack.enter_context(open_tracer(TracesConfig(endpoint=got.url), "m", "test", {}))
    assert opened is not None
    return opened


async def generate(at: Node, span: Span | None, **options: object) -> None:
    """Have an instance answer as a gateway would."""
    fetched = options.pop("fetch", None)
    call = call_of(PROMPT, **options)  # type: ignore[arg-type]
    if isinstance(fetched, Node):
        call = msgspec.structs.replace(call, fetch=fetched.peer)
    async with peers() as client:
        await client.call(
            "POST",
            at.url + GENERATE_PATH,
            bytes,
            msgpack.encode(call),
            media=msgpack.MEDIA,
            headers=headers_of(span),
        )
    await at.settled()


async def test_a_hand_over_with_a_fetch_is_one_tree(
    model: Path, tracer: Tracer, got: Receiver
) -> None:
    async with (
        node(model, Role.PREFILL, name="p", tracer=tracer) as p,
        node(model, Role.DECODE, name="d", tracer=tracer) as d,
        node(model, Role.COLOCATED, name="third", tracer=tracer) as third,
    ):
        await generate(third, None)
        assert got.spans == []  # nobody asked for a trace of that
        root = tracer.accept("root", [], tracer.clock.now())
        await generate(d, root, prefill=[p], fetch=third, tokens=30)
        await until(lambda: d.totals.returns == 1, "the return")
        root.finish()
        names = {"root", "generate", "ask prefill", "prefill", "fetch", "push", "return"}
        await until(lambda: names <= {span.name for span in got.spans}, "all spans")
        assert got.tree(got.named("root")) == {
            "root": [
                {
                    "generate": [
                        {
                            "ask prefill": [
                                {"prefill": [{"fetch": ["push"]}, "queue", "compute", "transfer"]}
                            ]
                        },
                        "queue",
                        "decode",
                        "return",
                    ]
                }
            ]
        }
    generated, prefill, push = (got.named(n) for n in ("generate", "prefill", "push"))
    assert generated.attributes["gen_ai.usage.input_tokens"] == 70
    assert generated.attributes["gen_ai.usage.output_tokens"] == 30
    assert generated.attributes["memserve.blocks.received"] == 4
    assert generated.attributes["memserve.blocks.fetched"] == 4
    assert generated.attributes["memserve.bytes.received"] == 4 * d.link.block_bytes
    assert got.named("ask prefill").attributes["memserve.instance"] == "p"
    assert got.named("fetch").attributes["memserve.instance"] == "third"
    assert got.named("fetch").attributes["memserve.blocks.received"] == 4
    assert (push.attributes["memserve.target"], push.attributes["memserve.blocks.sent"]) == ("p", 4)
    assert (prefill.attributes["memserve.cached_tokens"], prefill.kind) == (64, 2)
    assert got.named("compute").events == ["chunk"]
    transfer = got.named("transfer").attributes
    assert transfer["memserve.blocks.sent"] == 4
    assert transfer["memserve.bytes.sent"] == 4 * p.link.block_bytes
    assert transfer["memserve.transport"] == "shm"
    compute, decode = got.named("compute"), got.named("decode")
    assert prefill.start <= compute.start <= compute.end <= prefill.end
    assert compute.end <= decode.start <= decode.end <= generated.end
    assert got.named("return").attributes["memserve.blocks.sent"] == 2
    assert not any(span.failed for span in got.spans)


async def test_a_prefill_instance_that_is_not_there_is_a_failed_span(
    model: Path, tracer: Tracer, got: Receiver
) -> None:
    async with node(model, Role.DECODE, tracer=tracer) as d:
        root = tracer.accept("root", [], tracer.clock.now())
        gone = PrefillPeer(InstanceId("gone"), "http://127.0.0.1:9", "tcp://127.0.0.1:9")
        await generate(d, root, prefill=[gone])
        await until(lambda: any(span.name == "generate" for span in got.spans), "the span")
        asked = got.named("ask prefill")
        assert asked.failed
        assert asked.attributes["error.type"] == "Unanswered"
        parts = [span.name for span in got.children(got.named("generate"))]
        assert parts == ["ask prefill", "queue", "compute", "decode"]


async def test_a_call_with_many_sequences_has_spans_of_some(
    model: Path, tracer: Tracer, got: Receiver
) -> None:
    async with node(model, Role.COLOCATED, tracer=tracer) as one:
        root = tracer.accept("root", [], tracer.clock.now())
        await generate(one, root, n=MAX_SEQUENCES + 2, tokens=2)
        await until(lambda: any(span.name == "generate" for span in got.spans), "the span")
        decodes = [span for span in got.spans if span.name == "decode"]
        numbers = sorted(span.attributes["memserve.sequence"] for span in decodes)
        assert numbers == list(range(MAX_SEQUENCES))
        assert got.named("generate").attributes["memserve.sequences"] == MAX_SEQUENCES + 2
        assert got.named("generate").events == ["first_token"] * MAX_SEQUENCES


async def test_what_is_not_sampled_is_passed_on_and_not_exported(
    model: Path, tracer: Tracer, got: Receiver
) -> None:
    async with (
        node(model, Role.PREFILL, tracer=tracer) as p,
        node(model, Role.DECODE, tracer=tracer) as d,
    ):
        parent = b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00"
        root = tracer.accept("root", [(b"traceparent", parent)], 0.0)
        await generate(d, root, prefill=[p])
        assert d.totals.blocks_received == 4
        root.finish()
        recorded = tracer.accept("last", [], 0.0)
        recorded.finish()
        await until(lambda: bool(got.spans), "a span")
        assert [span.name for span in got.spans] == ["last"]

"""A vLLM server as an engine: what an instance may rely on, with a server that has no model."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memserve.api.generate import FinishReason, SamplingParams
from memserve.api.namespaces import salted
from memserve.clock import ManualClock
from memserve.engine.request import EngineInfo, EngineRequest, TokenOutput
from memserve.errors import EngineStopped, QueueFull, RequestError
from memserve.tokens import from_ids
from memserve.tracing.span import Sampler, Tracer
from memserve.types import RequestId
from memserve.vllm import engine as vllm_engine
from memserve.vllm.engine import Decoded, VllmEngine
from memserve.vllm.metrics import ServerLoad
from memserve.vllm.place import ServerPlace
from tests.fake_vllm import BLOCK, BLOCKS, LENGTH, Server, expected
from tests.fakes import until

INFO = EngineInfo("m", 300, LENGTH, BLOCK * BLOCKS, BLOCK, "vllm", "vllm", 1, max_waiting=4)


class Sink:
    """What the engine has said, by sequence."""

    def __init__(self) -> None:
        self.said: dict[str, list[TokenOutput]] = {}

    def __call__(self, outputs: Any) -> None:
        for output in outputs:
            self.said.setdefault(output.id, []).append(output)

    def whole(self, name: str) -> list[TokenOutput]:
        """Waits for its end."""
        until(lambda: self.said.get(name, [None])[-1] is not None and self._ended(name))
        return self.said[name]

    def _ended(self, name: str) -> bool:
        return self.said[name][-1].finish_reason is not None

    def tokens(self, name: str) -> list[int]:
        return [token for output in self.whole(name) for token in output.token_ids]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path / "s")
    yield server
    server.end()


@pytest.fixture
def sink() -> Sink:
    return Sink()


@pytest.fixture
def engine(server: Server, sink: Sink, tmp_path: Path) -> Iterator[VllmEngine]:
    engine = VllmEngine(ServerPlace(path=tmp_path / "s"), INFO)
    engine.start(sink)
    yield engine
    engine.stop()
    assert not engine.thread.is_alive()


def request(name: str, prompt: list[int], tokens: int = 6, **fields: Any) -> EngineRequest:
    sampling = fields.pop("sampling", SamplingParams(max_tokens=tokens, temperature=0.0))
    return EngineRequest(RequestId(name), np.array(prompt, dtype=np.int32), sampling, **fields)


PROMPT = list(range(10, 40))


def test_tokens_are_the_servers_and_what_was_cached_is_told(engine: VllmEngine, sink: Sink) -> None:
    engine.submit([request("a", PROMPT)])
    assert sink.tokens("a") == expected(PROMPT, 6)
    engine.submit([request("b", PROMPT)])
    last = sink.whole("b")[-1]
    assert (last.usage.cached_tokens, last.finish_reason) == (BLOCK, FinishReason.LENGTH)
    stats = engine.stats()
    assert (stats.finished, stats.generated_tokens) == (2, 12)
    assert (stats.cached_prompt_tokens, stats.computed_prompt_tokens) == (BLOCK, 60 - BLOCK)


def test_a_sequence_goes_on_where_another_one_stopped(engine: VllmEngine, sink: Sink) -> None:
    whole = expected(PROMPT, 6)
    engine.submit([request("a", PROMPT, output=from_ids(whole[:2]))])
    assert sink.tokens("a") == whole[2:]


def test_tenants_share_nothing(engine: VllmEngine, sink: Sink, server: Server) -> None:
    for name, salt in (("a", None), ("b", "x"), ("c", "x"), ("d", "y")):
        engine.submit([request(name, PROMPT, namespace=salted(salt))])
        sink.whole(name)
    cached = [sink.whole(name)[-1].usage.cached_tokens for name in "abcd"]
    assert cached == [0, 0, BLOCK, 0]
    assert [body.get("cache_salt") for body in server.fake.bodies] == [None, "x", "x", "y"]


def test_the_server_gets_the_context_of_a_traced_sequence(
    engine: VllmEngine, sink: Sink, server: Server
) -> None:
    clock = ManualClock()
    tracer = Tracer(clock, Sampler(1.0, 0.0, clock), lambda span: None)
    span = tracer.accept("generate", [], 0.0)
    for name, of in (("a", None), ("b", span)):
        engine.submit([request(name, PROMPT, span=of)])
        sink.whole(name)
    assert server.fake.parents == [None, span.context.traceparent]


def test_what_is_cancelled_says_no_more_and_is_dropped_by_the_server(
    engine: VllmEngine, sink: Sink, server: Server
) -> None:
    engine.submit([request("a", PROMPT, tokens=200)])
    until(lambda: "a" in sink.said)
    engine.cancel([RequestId("a"), RequestId("unknown")])
    said = len(sink.said["a"])
    until(lambda: server.fake.running == 0)
    assert len(sink.said["a"]) <= said + 1  # one may have been on its way
    assert engine.stats().cancelled == 1
    engine.submit([request("b", PROMPT)])
    assert sink.tokens("b") == expected(PROMPT, 6)


def test_samples_wait_until_their_prompt_is_cached(engine: VllmEngine, sink: Sink) -> None:
    first = request("a", PROMPT)
    engine.submit([first, *(request(name, PROMPT, follows=first.id) for name in "bc")])
    assert [sink.whole(name)[-1].usage.cached_tokens for name in "abc"] == [0, BLOCK, BLOCK]


def test_a_leader_that_is_cancelled_holds_up_nobody(engine: VllmEngine, sink: Sink) -> None:
    first = request("a", PROMPT)
    engine.submit([first, request("b", PROMPT, follows=first.id)])
    engine.cancel([first.id])
    assert sink.tokens("b") == expected(PROMPT, 6)


def test_a_servers_steps_are_counted_where_no_prompt_was_computed() -> None:
    decoded = Decoded()
    quiet = ServerLoad(2, steps=10, prompt_tokens=100, generated_tokens=20, kv_used=0.5)
    polls = (
        quiet,
        replace(quiet, steps=30, generated_tokens=60),
        replace(quiet, steps=50, generated_tokens=100, prompt_tokens=101),
        replace(quiet, steps=70, generated_tokens=140, prompt_tokens=None),  # it does not say
        replace(quiet, steps=90, generated_tokens=180, prompt_tokens=None),
    )
    for last, now in itertools.pairwise(polls):
        decoded.add(last, now, 1.0, 1000)
    assert decoded == Decoded(steps=20, tokens=40, context_tokens=20 * 500, seconds=1.0)


def test_a_servers_prefill_that_is_under_way_is_no_decode_step() -> None:
    """vLLM counts a prompt at its end, and no step without an output."""
    decoded = Decoded()
    alone = ServerLoad(1, steps=10, prompt_tokens=100, generated_tokens=10)
    decoded.add(alone, replace(alone), 1.0, 1000)
    beside = replace(alone, running=2, steps=15, generated_tokens=15)
    decoded.add(alone, beside, 1.0, 1000)
    decoded.add(beside, replace(beside, steps=20, generated_tokens=20), 1.0, 1000)
    assert decoded == Decoded()


def test_the_steps_of_several_engines_take_each_their_own_time() -> None:
    decoded = Decoded()
    last = ServerLoad(4, steps=0, prompt_tokens=1, generated_tokens=0, engines=2)
    decoded.add(last, replace(last, steps=40, generated_tokens=80), 1.0, 1000)
    assert (decoded.steps, decoded.seconds) == (40, 2.0)


def test_a_refusal_of_the_server_ends_the_sequence(engine: VllmEngine, sink: Sink) -> None:
    engine.submit([request("a", PROMPT, namespace=salted("refuse"))])
    (output,) = sink.whole("a")
    assert output.finish_reason is FinishReason.ERROR
    assert "not this one" in (output.error or "")


def test_what_can_never_run_is_refused_as_any_engine_does(engine: VllmEngine) -> None:
    with pytest.raises(RequestError, match="outside the vocabulary"):
        engine.submit([request("a", [5, 300])])
    with pytest.raises(RequestError, match="at most 256 are possible"):
        engine.check([request("a", [5] * LENGTH)])
    with pytest.raises(QueueFull):
        engine.check([request(str(n), PROMPT) for n in range(5)])


def test_a_server_that_is_lost_ends_the_engine_and_what_runs_there(
    server: Server, sink: Sink, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_engine, "POLL_SECONDS", 0.01)
    engine = VllmEngine(ServerPlace(path=tmp_path / "s"), INFO)
    engine.start(sink)
    engine.submit([request("a", PROMPT, tokens=220)])
    until(lambda: "a" in sink.said)
    server.fake.lost = True
    engine.thread.join()
    assert sink.whole("a")[-1].finish_reason in (FinishReason.CANCELLED, FinishReason.ERROR)
    with pytest.raises(EngineStopped):
        engine.submit([request("b", PROMPT)])
    engine.stop()


def test_what_a_lost_server_fails_with_others_may_take_over(
    engine: VllmEngine, sink: Sink, server: Server
) -> None:
    """Its error is not the request's; and nobody waits for the next look at it."""
    engine.submit([request("a", PROMPT, tokens=220)])
    until(lambda: "a" in sink.said)
    server.fake.lost = True
    assert sink.whole("a")[-1].finish_reason is FinishReason.CANCELLED
    engine.thread.join()


def test_own_sequences_that_waited_at_the_last_poll_do_not_wait_for_ever(
    server: Server, sink: Sink, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM counts sequences whose KV is on its way as waiting; by the next poll they may be over,
    and an instance that seems to be busy gives no KV back."""
    monkeypatch.setattr(vllm_engine, "POLL_SECONDS", 0.01)
    engine = VllmEngine(ServerPlace(path=tmp_path / "s"), INFO)
    engine.start(sink)
    engine.submit([request("a", PROMPT, tokens=220)])
    until(lambda: "a" in sink.said)
    server.fake.waiting = 3  # ours, and two of other clients
    until(lambda: engine.stats().waiting == 2)
    monkeypatch.setattr(vllm_engine, "POLL_SECONDS", 300.0)
    engine.cancel([RequestId("a")])
    assert engine.stats().waiting in (2, 3)  # as of a poll before or behind the end
    server.fake.waiting = 0
    engine.stop()


def test_the_servers_memory_is_told(engine: VllmEngine) -> None:
    until(lambda: engine.pool_totals().hbm.active > 0)
    hbm = engine.pool_totals().hbm
    assert (hbm.total, hbm.active, hbm.free) == (BLOCKS, BLOCKS // 4, BLOCKS * 3 // 4)

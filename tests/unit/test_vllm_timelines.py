"""Time lines, decisions and spans of what passes through to a vLLM server that has no model."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from memserve.api.forward import Forward, ForwardPath
from memserve.api.generate import GenerateCall, PrefillPeer
from memserve.api.timeline import MAX_PAUSES, TIMELINE_PATH, Forwarded, Timeline
from memserve.clock import ManualClock
from memserve.cluster.client import DECISIONS_PATH
from memserve.dashboard import views
from memserve.instance import request_trace
from memserve.instance.forwarded_run import ForwardedRun
from memserve.instance.timelines import Timelines, forwarded_timeline
from memserve.models.tokenizer import Tokenizer
from memserve.scheduler.decision_view import DecisionView, Outcome
from memserve.tracing.span import Sampler, Span, Tracer
from memserve.types import InstanceId
from memserve.vllm.forwarder import BrokenOff, ForwardedAnswer, Forwarder
from memserve.vllm.place import ServerPlace
from tests.fakes import FakeCluster, save_tiny_tokenizer, tiny_tokenizer, until
from tests.handoff_harness import Node, call_of, pair, prompt_of
from tests.insider import ask
from tests.tiny_models import save_tiny_model
from tests.unit.test_vllm_forward import MESSAGES, TEMPLATE, TOOLS, post, running, send, serving
from tests.watch_harness import decision, snapshot

FIRST = 0.1  # seconds that the server sleeps before a first token
SLEPT = 0.9 * FIRST
PROMPT = prompt_of(70, seed=1)
BODY = Forward(ForwardPath.CHAT, b'{"messages": []}', True)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"), TEMPLATE)


def ended(cluster: FakeCluster) -> tuple[DecisionView, Timeline, Forwarded]:
    """The last decision, once its request is over, and the time line at the first instance."""

    def last() -> DecisionView:
        answer = ask(cluster.url, f"{DECISIONS_PATH}?n=1")
        return msgspec.convert(answer.json, list[DecisionView])[0]

    until(lambda: last().happened.whole is not None)
    view = last()
    path = f"{TIMELINE_PATH}?request={view.request}"
    until(lambda: ask(cluster.urls[0], path).status == 200)
    told = msgspec.convert(ask(cluster.urls[0], path).json, Timeline)
    assert told.forwarded is not None
    return view, told, told.forwarded


def names(told: Timeline) -> list[str]:
    return [phase.name for phase in views.phases(told)]


def test_a_stream_has_its_first_token_and_its_end(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with (
        serving(tmp_path, first_token_seconds=FIRST, step_seconds=0.01) as server,
        running(tokenizer, {0: server}) as cluster,
    ):
        fields = {"messages": MESSAGES, "tools": TOOLS, "stream": True, "max_tokens": 5}
        answer = post(cluster, ForwardPath.CHAT, **fields)
        view, told, seen = ended(cluster)
        assert (told.ended, told.handed_over, seen.stream) == (True, False, True)
        assert (seen.path, seen.status, seen.error) == (ForwardPath.CHAT, 200, None)
        assert seen.bytes == len(answer.text)
        assert seen.sent is not None
        assert seen.first is not None
        assert 0 <= seen.sent < seen.sent + SLEPT <= seen.first < seen.first + 0.04 <= seen.end
        assert names(told) == ["prepare", "server", "answer"]
        # What only the server knows is not told.
        assert told.prompt_tokens is told.cached_tokens is told.output_tokens is None
        assert told.queue == told.prefill == told.decode == 0
        assert view.happened.first_token is not None
        assert view.happened.whole is not None
        assert SLEPT <= seen.first <= view.happened.first_token < view.happened.whole


def test_events_before_a_first_token_are_none(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with (
        serving(tmp_path, first_token_seconds=FIRST) as server,
        running(tokenizer, {0: server}) as cluster,
    ):
        answer = post(cluster, ForwardPath.RESPONSES, input="hi", stream=True)
        assert answer.text.startswith(b"event: response.created\n")
        view, _, seen = ended(cluster)
        assert seen.sent is not None
        assert seen.first is not None
        assert seen.first - seen.sent >= SLEPT
        assert view.happened.first_token is not None
        assert view.happened.first_token >= SLEPT


def test_a_first_token_of_a_response_is_found_in_any_piece() -> None:
    forward = Forward(ForwardPath.RESPONSES, b"{}")
    before = b"event: response.created\ndata: {}\n\nevent: response.in_progress\ndata: {}\n\n"
    behind = b"event: response.output_item.added\ndata: {}\n\n"
    assert not forward.tells_token(before)
    assert not forward.tells_token(before[:20])  # in the middle of a name
    assert forward.tells_token(behind)
    assert forward.tells_token(before + behind)
    assert BODY.tells_token(b"data: {}\n\n")


def test_a_whole_answer_has_no_first_token(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with (
        serving(tmp_path, answer_seconds=FIRST) as server,
        running(tokenizer, {0: server}) as cluster,
    ):
        answer = post(cluster, ForwardPath.EMBEDDINGS, input="a text")
        view, told, seen = ended(cluster)
        assert (told.ended, seen.stream, seen.bytes) == (True, False, len(answer.text))
        assert seen.sent is not None
        assert seen.first is not None
        assert seen.first - seen.sent >= SLEPT
        assert view.happened.first_token is None
        assert view.happened.whole is not None
        assert view.happened.whole >= seen.end >= seen.first


def test_an_error_of_the_server_is_no_end(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with serving(tmp_path) as server, running(tokenizer, {0: server}) as cluster:
        for stream in (False, True):
            fields = {"messages": MESSAGES, "tools": TOOLS, "stream": stream}
            assert post(cluster, ForwardPath.CHAT, temperature=-1, **fields).status == 400
            view, told, seen = ended(cluster)
            assert (told.ended, seen.status, seen.error) == (False, 400, None)
            assert view.happened.first_token is None


def test_who_hangs_up_is_told_of(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with (
        serving(tmp_path, answer_seconds=60) as server,
        running(tokenizer, {0: server}) as cluster,
    ):
        connection = send(cluster, ForwardPath.EMBEDDINGS, input="x")
        until(lambda: server.fake.running == 1)
        connection.close()
        _, told, seen = ended(cluster)
        assert (told.ended, seen.error, seen.status, seen.first) == (False, "cancelled", None, None)
        assert names(told) == ["prepare", "server"]
        fields = {"messages": MESSAGES, "tools": TOOLS, "stream": True, "max_tokens": 100_000}
        connection = send(cluster, ForwardPath.CHAT, **fields)
        assert connection.getresponse().read(20)
        connection.close()
        _, told, seen = ended(cluster)
        assert (told.ended, seen.error, seen.status) == (False, "cancelled", 200)
        assert names(told) == ["prepare", "server", "answer"]
        assert seen.bytes >= 20


def test_a_server_that_is_lost_is_told_of(tokenizer: Tokenizer, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"messages": MESSAGES, "tools": TOOLS, "stream": True}
    with serving(tmp_path, break_after=2) as server, running(tokenizer, {0: server}) as cluster:
        post(cluster, ForwardPath.CHAT, **fields)
        _, told, seen = ended(cluster)
        assert (told.ended, seen.error, seen.status) == (False, "server_lost", 200)
        assert seen.bytes > 0
    with running(tokenizer, {0: tmp_path / "nobody"}) as cluster:
        assert post(cluster, ForwardPath.CHAT, **fields).status == 503
        _, told, seen = ended(cluster)
        assert (told.ended, seen.error, seen.status) == (False, "server_lost", None)


def test_what_is_refused_pushes_out_no_time_line(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with serving(tmp_path) as server, running(tokenizer, {0: server}) as cluster:
        served = cluster.instances[0]._served
        assert served is not None
        assert served.parts.forwarder is not None
        cluster.instances[0].timelines = Timelines(kept=1)
        forwarder = served.parts.forwarder
        assert post(cluster, ForwardPath.EMBEDDINGS, input="x").status == 200
        view, _, _ = ended(cluster)
        forwarder._sequences = 10**9
        assert post(cluster, ForwardPath.EMBEDDINGS, input="x").status == 429
        assert cluster.instances[0].timelines.find(view.request) is not None
        refused = msgspec.convert(
            ask(cluster.url, f"{DECISIONS_PATH}?n=1").json, list[DecisionView]
        )[0]
        assert refused.request != view.request
        assert ask(cluster.urls[0], f"{TIMELINE_PATH}?request={refused.request}").status == 404


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = save_tiny_model("llama", tmp_path_factory.mktemp("models"))
    save_tiny_tokenizer(directory)
    return directory


async def forwarded(d: Node, call: GenerateCall, place: ServerPlace) -> Timeline:
    """The time line of a call at an instance that has a link and a server."""
    served = d.instance._served
    assert served is not None
    forwarder = Forwarder(place, d.engine.info)
    d.instance._served = replace(served, parts=replace(served.parts, forwarder=forwarder))
    try:
        async with d.instance.forward(call, BODY) as run:
            async for _ in run.pieces():
                pass
    finally:
        d.instance._served = served
        await forwarder.close()
    told = d.instance.timelines.find(call.id)
    assert told is not None
    return told


async def test_a_hand_over_is_in_it(model: Path, tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        place = ServerPlace(path=server.path)
        async with pair(model) as (p, d):
            told = await forwarded(d, call_of(PROMPT, prefill=[p]), place)
            assert (told.ended, told.handed_over) == (True, True)
            assert (told.prompt_tokens, told.cached_tokens) == (70, 0)
            assert sum(chunk.tokens for chunk in told.chunks) == 70
            assert min(told.prefill, told.transfer) > 0
            assert told.forwarded is not None
            assert told.forwarded.sent is not None
            parts = told.queue + told.prefill + told.transfer
            assert told.prepare + parts == pytest.approx(told.forwarded.sent)
            assert told.forwarded.sent <= told.forwarded.end == told.whole
            # A longer prefix from another instance is a fetch.
            other = prompt_of(70, seed=2)
            await p.complete(*other)
            fetching = msgspec.structs.replace(call_of(other), fetch=p.peer)
            told = await forwarded(d, fetching, place)
            assert (told.handed_over, told.prompt_tokens) == (False, None)
            assert told.fetch > 0
            # One that does not answer is in `prepare`.
            nobody = PrefillPeer(InstanceId("x"), "http://127.0.0.1:1", "tcp://127.0.0.1:9")
            told = await forwarded(d, call_of(prompt_of(70, seed=3), prefill=[nobody]), place)
            assert names(told) == ["prepare", "server", "answer"]


class Pieces(ForwardedAnswer):
    """An answer whose pieces come after so many seconds each; the last one never comes."""

    def __init__(self, clock: ManualClock, *after: float) -> None:
        self.status = 200
        self._clock = clock
        self._after = after

    async def pieces(self) -> AsyncIterator[bytes]:
        for seconds in self._after:
            self._clock.advance(seconds)
            yield b"data: {}\n\n"
        raise BrokenOff("lost")


async def run_of(clock: ManualClock, parent: Span | None, *after: float) -> ForwardedRun:
    """A stream whose client takes a minute for each piece."""
    call = msgspec.structs.replace(call_of(PROMPT), stream=True)
    run = ForwardedRun(call, BODY, clock, parent)
    clock.advance(2.0)
    with run:
        run.sending()
        run.answered(Pieces(clock, *after))
        with suppress(BrokenOff):
            async for _ in run.pieces():
                clock.advance(60.0)
    return run


async def test_pauses_are_those_of_the_server_alone() -> None:
    told = forwarded_timeline(await run_of(ManualClock(100.0), None, 3.0, 0.1, 0.6, 0.2))
    assert [(round(p.begin, 6), round(p.seconds, 6)) for p in told.pauses] == [(125.1, 0.6)]
    many = forwarded_timeline(await run_of(ManualClock(), None, *[1.0] * (MAX_PAUSES + 9)))
    assert len(many.pauses) == MAX_PAUSES


async def test_the_span_has_the_moments_of_the_time_line() -> None:
    clock = ManualClock(100.0)
    spans: list[Span] = []
    tracer = Tracer(clock, Sampler(1.0, 0.0, clock), spans.append)
    parent = tracer.accept("generate", [], clock.now())
    run = await run_of(clock, parent, 3.0, 1.0)
    request_trace.forwarded(run)
    seen = forwarded_timeline(run).forwarded
    assert seen is not None
    assert (seen.sent, seen.first, seen.end) == (2.0, 5.0, 126.0)
    (span,) = spans
    assert (span.name, span.start - 100, span.end) == ("vllm", seen.sent, 100 + seen.end)
    assert [(event.name, event.at) for event in span.events] == [("first_token", 105.0)]
    assert span.attributes == {"http.response.body.size": 20, "http.response.status_code": 200}
    assert span.error == parent.error == seen.error == "server_lost"


def test_the_dashboard_shows_it() -> None:
    told = Timeline(
        request=decision("x", 18.0).request,
        ended=False,
        handed_over=True,
        prompt_tokens=100,
        cached_tokens=16,
        output_tokens=None,
        preemptions=None,
        fetch=0.0,
        queue=0.2,
        prefill=0.4,
        transfer=0.1,
        queue_here=0.0,
        decode=0.0,
        forwarded=Forwarded(ForwardPath.CHAT, True, 1.0, 1.5, 2.0, 200, 2048, "server_lost"),
    )
    assert [(name, round(begin, 6), round(end, 6)) for name, begin, end in views.phases(told)] == [
        ("prepare", 0.0, 0.3),
        ("queue", 0.3, 0.2),
        ("prefill", 0.5, 0.4),
        ("transfer", 0.9, 0.1),
        ("server", 1.0, 0.5),
        ("answer", 1.5, 0.5),
    ]
    seen = snapshot(20.0, [], decisions=[decision("x", 18.0, Outcome(1.6, 2.1))])

    def page(told: Timeline) -> str:
        return views.requests_html(seen, 20.0, "", views.Opened("x", 18.0), None, told)

    assert "queue 200 ms · prefill 400 ms · transfer 100 ms · server 500 ms" in page(told)
    assert "forwarded to /v1/chat/completions, answered 200 with" in page(told)
    assert "16 of 100 tokens cached; not to its end: server_lost" in page(told)
    assert 'class="server" title="server 500 ms, from 1.0 s"' in page(told)
    unknown = msgspec.structs.replace(told, prompt_tokens=None, cached_tokens=None)
    assert "tokens known to the server alone" in page(unknown)
    assert "None" not in page(unknown)

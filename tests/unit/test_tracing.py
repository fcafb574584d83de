"""Trace contexts, what is sampled, settings, and the export of spans."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from memserve.clock import ManualClock
from memserve.cluster.launches import instance_launches
from memserve.config import TracesConfig, parse_config
from memserve.errors import ConfigError
from memserve.flags import flags_of, to_flags, with_flags
from memserve.secrets import Secret
from memserve.tracing import otlp, settings
from memserve.tracing.context import MAX_STATE_CHARACTERS, TraceContext, read_context
from memserve.tracing.otlp import SpanQueue, otlp_exporter
from memserve.tracing.settings import open_tracer, sample_ratio, traces_endpoint
from memserve.tracing.span import MAX_EVENTS, Sampler, Span, SpanKind, Tracer, timed
from tests.otlp_receiver import receiver

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SAMPLED = f"00-{TRACE}-{SPAN}-01".encode()


def read(parent: bytes, *states: bytes) -> TraceContext | None:
    return read_context([(b"traceparent", parent), *((b"tracestate", s) for s in states)])


# --- contexts


def test_a_traceparent_is_read() -> None:
    assert read(SAMPLED) == TraceContext(int(TRACE, 16), int(SPAN, 16), True)
    assert read(SAMPLED[:-2] + b"00") == TraceContext(int(TRACE, 16), int(SPAN, 16), False)
    assert read(b" " + SAMPLED[:-2] + b"ff\t") == read(SAMPLED)  # other flags are not passed on
    later = read(b"cc" + SAMPLED[2:] + b"-what-comes")
    assert later == read(SAMPLED)


@pytest.mark.parametrize(
    "parent",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"ff" + SAMPLED[2:], id="version ff"),
        pytest.param(SAMPLED + b"-more", id="more than version 00 has"),
        pytest.param(SAMPLED.upper(), id="upper case"),
        pytest.param(SAMPLED[:-1], id="short"),
        pytest.param(b"00-" + b"0" * 32 + SAMPLED[35:], id="trace 0"),
        pytest.param(SAMPLED[:36] + b"0" * 16 + b"-01", id="span 0"),
        pytest.param(SAMPLED[:-1] + b"\xc3\xa4", id="not ASCII"),
        pytest.param(SAMPLED + b"\r\nx: y", id="a line break"),
        pytest.param(b"cc" + SAMPLED[2:] + b"more", id="a later version's, without a dash"),
        pytest.param(SAMPLED + b"," + SAMPLED, id="two in one"),
    ],
)
def test_a_malformed_traceparent_is_none(parent: bytes) -> None:
    assert read(parent) is None


def test_two_traceparents_are_none() -> None:
    assert read_context([(b"traceparent", SAMPLED), (b"traceparent", SAMPLED)]) is None
    assert read_context([(b"tracestate", b"a=b")]) is None


def test_tracestates_are_joined_and_passed_on() -> None:
    context = read(SAMPLED, b"rojo=00f067aa0ba902b7 ,\tcongo=t61rcWkgMzE,", b"t1@vendor=x y")
    assert context is not None
    assert context.state == "rojo=00f067aa0ba902b7,congo=t61rcWkgMzE,t1@vendor=x y"
    assert context.headers() == {"traceparent": SAMPLED.decode(), "tracestate": context.state}
    assert context.lines() == b"traceparent: %b\r\ntracestate: %b\r\n" % (
        SAMPLED,
        context.state.encode(),
    )


@pytest.mark.parametrize(
    "state",
    [
        b"a",
        b"A=b",
        b"a=b,a=c",
        b"a=b=c",
        b"a=\xc3\xa4",
        b"a=b\r\nx: y",
        b"a=" + b"b" * MAX_STATE_CHARACTERS,
        b",".join(b"k%d=1" % n for n in range(33)),
    ],
)
def test_a_malformed_tracestate_is_dropped(state: bytes) -> None:
    context = read(SAMPLED, state)
    assert context is not None
    assert context.state == ""


@given(st.lists(st.tuples(st.sampled_from([b"traceparent", b"tracestate", b"host"]), st.binary())))
def test_no_headers_raise(headers: list[tuple[bytes, bytes]]) -> None:
    read_context(headers)


_PARTS = st.sampled_from(
    [b"00", b"-", b"01", b"ff", TRACE.encode(), SPAN.encode(), b" ", b"=", b","]
)


@given(st.lists(_PARTS, max_size=12), st.lists(st.sampled_from("ab=, @\t\r\nü*/-_1")))
def test_what_is_read_can_be_sent_and_read_again(parts: list[bytes], state: list[str]) -> None:
    context = read(b"".join(parts), "".join(state).encode())
    if context is not None:
        again = [tuple(line.split(b": ", 1)) for line in context.lines().split(b"\r\n") if line]
        assert len(again) <= 2
        assert read_context(again) == context  # type: ignore[arg-type]


@given(
    st.integers(1, 2**128 - 1),
    st.integers(1, 2**64 - 1),
    st.booleans(),
)
def test_contexts_survive_their_headers(trace: int, span: int, sampled: bool) -> None:
    context = TraceContext(trace, span, sampled, "a=b")
    headers = [(k.encode(), v.encode()) for k, v in context.headers().items()]
    assert read_context(headers) == context


# --- sampling


def tracer_of(ratio: float, rate: float = 0.0) -> tuple[Tracer, ManualClock, list[Span]]:
    clock, ended = ManualClock(100.0), []
    return Tracer(clock, Sampler(ratio, rate, clock), ended.append), clock, ended


def asked(flags: bytes = b"01", trace: bytes = TRACE.encode()) -> list[tuple[bytes, bytes]]:
    return [(b"traceparent", b"00-%b-%b-%b" % (trace, SPAN.encode(), flags))]


def test_a_request_without_a_context_begins_a_trace() -> None:
    tracer, _, ended = tracer_of(1.0)
    one, two = tracer.accept("a", [], 99.0), tracer.accept("b", [(b"traceparent", b"?")], 99.0)
    assert one.recording
    assert one.parent == two.parent == 0
    assert one.context.trace_id != two.context.trace_id
    child = one.child("part", SpanKind.CLIENT)
    child.finish()
    one.finish()
    assert [span.name for span in ended] == ["part", "a"]
    assert (child.parent, child.start, child.end) == (one.context.span_id, 100.0, 100.0)
    assert child.context.trace_id == one.context.trace_id
    assert child.context.span_id != one.context.span_id


def test_a_client_that_does_not_sample_is_not_sampled() -> None:
    tracer, _, ended = tracer_of(1.0, rate=100.0)
    span = tracer.accept("a", asked(b"00"), 0.0)
    assert not span.recording
    assert span.context.trace_id == int(TRACE, 16)
    assert span.child("part") is span
    span.event("e")
    span.finish(error="x")
    assert ended == []


def test_clients_have_only_so_many_traces_a_second_recorded() -> None:
    tracer, clock, _ = tracer_of(0.0, rate=2.0)

    def recorded() -> int:
        # Ids that a ratio of the id alone would take.
        return sum(
            tracer.accept("a", asked(trace=b"0" * 31 + b"1"), 0.0).recording for _ in range(9)
        )

    assert recorded() == 2
    clock.advance(0.5)
    assert recorded() == 1
    clock.advance(60.0)
    assert recorded() == 2
    assert not tracer.accept("a", [], 0.0).recording


def test_without_a_rate_clients_have_no_say() -> None:
    tracer, _, _ = tracer_of(0.0)
    assert not any(tracer.accept("a", asked(), 0.0).recording for _ in range(5))
    everything, _, _ = tracer_of(1.0)
    assert everything.accept("a", asked(), 0.0).recording


def test_the_ratio_is_about_kept() -> None:
    tracer, _, _ = tracer_of(0.25)
    assert 800 < sum(tracer.accept("a", [], 0.0).recording for _ in range(4000)) < 1200


def test_other_processes_obey_the_gateway() -> None:
    tracer, _, _ = tracer_of(0.0)
    joined = tracer.join("a", asked())
    assert joined is not None
    assert joined.recording
    assert (joined.parent, joined.kind) == (int(SPAN, 16), SpanKind.SERVER)
    unsampled = tracer.join("a", asked(b"00"))
    assert unsampled is not None
    assert not unsampled.recording
    assert tracer.join("a", []) is None


def test_an_exception_is_its_spans_error() -> None:
    tracer, _, ended = tracer_of(1.0)
    root = tracer.accept("a", [], 0.0)
    with pytest.raises(KeyError), timed(root, "part"):
        raise KeyError
    assert (ended[0].name, ended[0].error) == ("part", "KeyError")
    with timed(None, "part") as nothing:
        assert nothing is None


def test_events_are_bounded() -> None:
    tracer, _, _ = tracer_of(1.0)
    root = tracer.accept("a", [], 0.0)
    for _ in range(2 * MAX_EVENTS):
        root.event("chunk")
    assert len(root.events) == MAX_EVENTS


# --- settings


def test_the_environment_turns_traces_on() -> None:
    off = TracesConfig()
    assert traces_endpoint(off, {}) is None
    base = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318/"}
    assert traces_endpoint(off, base) == "http://collector:4318/v1/traces"
    whole = {**base, "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "https://other/x"}
    assert traces_endpoint(off, whole) == "https://other/x"
    assert traces_endpoint(off, {**base, "OTEL_SDK_DISABLED": "true"}) is None
    assert traces_endpoint(off, {**base, "OTEL_TRACES_EXPORTER": "none"}) is None
    own = TracesConfig(endpoint="http://mine:4318")
    assert traces_endpoint(own, base) == "http://mine:4318/v1/traces"
    assert traces_endpoint(TracesConfig(endpoint="http://m/v1/traces"), {}) == "http://m/v1/traces"
    with pytest.raises(ConfigError, match="http/protobuf"):
        traces_endpoint(off, {**base, "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"})


@pytest.mark.parametrize(
    "url", ["collector:4318", "ftp://x", "http://", "http://[::1", "http://h:0"]
)
def test_an_endpoint_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="OTLP receiver"):
        traces_endpoint(TracesConfig(endpoint=url), {})


def test_the_share_comes_from_the_configuration_or_the_environment() -> None:
    assert sample_ratio(TracesConfig(), {}) == 1.0
    assert sample_ratio(TracesConfig(), {"OTEL_TRACES_SAMPLER_ARG": "0.25"}) == 0.25
    assert sample_ratio(TracesConfig(sample=0.5), {"OTEL_TRACES_SAMPLER_ARG": "0.25"}) == 0.5
    assert sample_ratio(TracesConfig(), {"OTEL_TRACES_SAMPLER": "parentbased_always_off"}) == 0.0
    for wrong in ("2", "-1", "nan", "many"):
        with pytest.raises(ConfigError, match="from 0 to 1"):
            sample_ratio(TracesConfig(), {"OTEL_TRACES_SAMPLER_ARG": wrong})


def test_settings_have_flags_and_keys_of_one_name() -> None:
    config = parse_config('[traces]\nendpoint = "http://h:4318"\nsample = 0.1\nclient_rate = 0.0')
    assert config.traces == TracesConfig(endpoint="http://h:4318", sample=0.1, client_rate=0.0)
    flags = to_flags(config.traces)
    assert flags == [
        *("--traces-endpoint", "http://h:4318"),
        *("--traces-sample", "0.1"),
        *("--traces-client-rate", "0.0"),
    ]
    given: dict[str, Any] = {flag.parameter: None for flag in flags_of(TracesConfig)}
    given |= {"traces_sample": "0.1", "traces_endpoint": "http://h:4318", "traces_client_rate": "0"}
    assert with_flags(TracesConfig(), given) == config.traces
    with pytest.raises(ConfigError):
        parse_config("[traces]\nsample = 1.5")
    for launch in instance_launches(config, Secret(("x",))):
        assert " ".join(flags) in " ".join(launch.arguments)


def test_missing_packages_are_an_error_where_traces_are_configured(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(settings, "_NEEDED", ("opentelemetry.not_there.at_all",))
    wanted = TracesConfig(endpoint="http://127.0.0.1:9")
    with pytest.raises(ConfigError, match=r"memserve\[traces\]"), open_tracer(wanted, "s", "i"):
        pass
    variables = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}
    with open_tracer(TracesConfig(), "s", "i", variables) as tracer:
        assert tracer is None
    assert "memserve[traces]" in caplog.text


def test_where_traces_are_off_nothing_of_them_is_imported() -> None:
    script = (
        "import sys, memserve.gateway.run, memserve.instance.run\n"
        "from memserve.config import TracesConfig\n"
        "from memserve.tracing.settings import open_tracer\n"
        "with open_tracer(TracesConfig(), 's', 'i', {}) as tracer: assert tracer is None\n"
        # FastAPI imports OpenTelemetry's API, which does nothing without the SDK.
        "names = ('opentelemetry.sdk', 'opentelemetry.exporter', 'google.protobuf')\n"
        "print([m for m in sys.modules if m.startswith(names)])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


# --- export


class Exporter(SpanExporter):
    """Takes what it is given, or fails."""

    def __init__(self, outcome: SpanExportResult | Exception = SpanExportResult.SUCCESS) -> None:
        self.outcome = outcome
        self.batches: list[list[str]] = []
        self.came = threading.Semaphore(0)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.batches.append([span.name for span in spans])
        self.came.release()
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome

    def shutdown(self) -> None:
        pass


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(otlp, "EXPORT_SECONDS", 0.005)


def test_what_does_not_fit_is_dropped(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(otlp, "MAX_WAITING", 3)
    monkeypatch.setattr(otlp, "BATCH", 2)
    exporter, clock = Exporter(), ManualClock()
    queue = SpanQueue(exporter, {}, clock)
    tracer = Tracer(clock, Sampler(1.0, 0.0, clock), queue.put)
    for number in range(5):
        tracer.accept(f"s{number}", [], 0.0).finish()
    queue.start()
    queue.close()
    assert exporter.batches == [["s0", "s1"], ["s2"]]
    assert (queue.counts.exported, queue.counts.dropped, queue.counts.failed) == (3, 2, 0)
    assert caplog.text.count("some are dropped") == 1


@pytest.mark.parametrize("outcome", [SpanExportResult.FAILURE, OSError("broken")])
def test_a_failure_is_logged_once_and_the_export_goes_on(
    quick: None, caplog: pytest.LogCaptureFixture, outcome: SpanExportResult | Exception
) -> None:
    caplog.set_level(logging.INFO)
    exporter, clock = Exporter(outcome), ManualClock()
    queue = SpanQueue(exporter, {}, clock)
    tracer = Tracer(clock, Sampler(1.0, 0.0, clock), queue.put)
    queue.start()
    for _ in range(3):
        tracer.accept("a", [], 0.0).finish()
        assert exporter.came.acquire(timeout=15)
    exporter.outcome = SpanExportResult.SUCCESS
    tracer.accept("b", [], 0.0).finish()
    assert exporter.came.acquire(timeout=15)
    queue.close()
    assert caplog.text.count("traces cannot be exported") == 1
    assert caplog.text.count("traces are exported again") == 1
    assert (queue.counts.exported, queue.counts.failed) == (1, 3)


def test_a_receiver_that_refuses_or_is_not_there_is_logged_once(
    quick: None, caplog: pytest.LogCaptureFixture
) -> None:
    with receiver() as got:
        got.status = 400
        clock = ManualClock()
        queue = SpanQueue(otlp_exporter(got.url + "/v1/traces"), {}, clock)
        tracer = Tracer(clock, Sampler(1.0, 0.0, clock), queue.put)
        queue.start()
        tracer.accept("a", [], 0.0).finish()
        queue.close()
        assert got.requests == 1
    assert (queue.counts.exported, queue.counts.failed) == (0, 1)
    (record,) = caplog.records
    assert "traces cannot be exported" in record.getMessage()
    assert "400" in record.getMessage()


def test_a_span_arrives_as_it_was() -> None:
    variables = {"OTEL_SERVICE_NAME": "mine"}
    with receiver() as got:
        config = TracesConfig(endpoint=got.url)
        with open_tracer(config, "service", "here-1", variables) as tracer:
            assert tracer is not None
            root = tracer.accept(
                "a" * 1000, [*asked(), (b"tracestate", b"k=v")], tracer.clock.now()
            )
            root.attributes |= {"n": 1, "x": 0.5, "yes": True, "text": "é\n" * 1000}
            root.attributes["list"] = ("p", "q")
            root.event("first_token")
            root.links.append(TraceContext(5, 6, True))
            root.finish(root.start + 1.5, error="boom")
        (span,) = got.spans
    assert span.name.startswith("a" * 256)
    assert (span.trace, span.parent, span.kind, span.state) == (TRACE, SPAN, 2, "k=v")
    assert span.end - span.start == pytest.approx(1.5e9, abs=1e4)
    assert (span.attributes["n"], span.attributes["x"], span.attributes["yes"]) == (1, 0.5, True)
    assert len(span.attributes["text"]) < 600
    assert "\n" not in span.attributes["text"]
    assert span.attributes["list"] == ["p", "q"]
    assert span.attributes["error.type"] == "boom"
    assert span.failed
    assert (span.events, span.links) == (["first_token"], ["0000000000000006"])
    assert span.resource["service.name"] == "mine"
    assert span.resource["service.instance.id"] == "here-1"

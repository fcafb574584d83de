"""Export of finished spans by OTLP over HTTP, on a thread.

The only module that imports OpenTelemetry: `settings.open_tracer` imports it when traces are on.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import ExitStack

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, TraceFlags, TraceState
from opentelemetry.trace.status import Status, StatusCode

from memserve.clock import Clock
from memserve.logs import shown
from memserve.tracing.context import TraceContext
from memserve.tracing.span import Attribute, Attributes, Span, SpanCounts

log = logging.getLogger(__name__)

# Spans that wait for the thread, of 1 to 2 KB each; more are dropped and counted.
MAX_WAITING = 8192
BATCH = 512  # spans in one request
EXPORT_SECONDS = 0.5  # between two looks for finished spans
# For one batch, tries included. Spans that end meanwhile wait, or are dropped.
TIMEOUT_SECONDS = 5.0
# For the last spans of a process: less than what its parent gives it to end (`gateway/workers.py`).
CLOSE_SECONDS = 1.0
END_SECONDS = 0.2  # then, for the thread to give up
MAX_TEXT = 256  # characters of an attribute
_SDK_LOGGERS = (
    "opentelemetry.exporter.otlp.proto.http.trace_exporter",
    "opentelemetry.exporter.otlp.common.http",
)
_KINDS = {kind.value: kind for kind in SpanKind}


def otlp_exporter(endpoint: str) -> SpanExporter:
    """Return the exporter to the URL `endpoint`. Further settings come from OpenTelemetry's own
    variables, as OTEL_EXPORTER_OTLP_HEADERS."""
    return OTLPSpanExporter(endpoint=endpoint, timeout=TIMEOUT_SECONDS)


class SpanQueue:
    """Takes finished spans from one event loop, and exports them on a thread of its own.

    A failure to export costs the spans, and is logged when it begins and when it is over.
    """

    def __init__(
        self,
        exporter: SpanExporter,
        resource: Mapping[str, str],
        clock: Clock,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """`resource`: what describes this process, beside OTEL_RESOURCE_ATTRIBUTES. `clock`: the
        tracer's."""
        self.counts = SpanCounts()
        self._exporter = exporter
        self._resource = Resource.create(dict(resource))
        self._scope = InstrumentationScope("memserve")
        self._clock = clock
        self._wall_clock = wall_clock
        self._waiting: deque[Span] = deque()
        self._closing = threading.Event()
        self._failing = False
        self._told_dropped = False
        self._said = _LastWords()
        self._thread = threading.Thread(target=self._main, name="traces", daemon=True)

    def start(self) -> None:
        for name in _SDK_LOGGERS:
            logging.getLogger(name).addFilter(self._said)
        self._thread.start()

    def put(self, span: Span) -> None:
        """Queue a finished span, or drop it if too many wait. Does not block."""
        if len(self._waiting) < MAX_WAITING:
            self._waiting.append(span)
        else:
            self.counts.dropped += 1

    def close(self) -> None:
        """Export what waits, for up to CLOSE_SECONDS, and end the thread, which does not hold the
        process up if it is still in a request."""
        self._closing.set()
        self._thread.join(CLOSE_SECONDS)
        self._exporter.shutdown()  # ends the wait before another try
        self._thread.join(END_SECONDS)
        for name in _SDK_LOGGERS:
            logging.getLogger(name).removeFilter(self._said)

    def _main(self) -> None:
        with ExitStack() as stack:
            stack.callback(self._ended)
            while not self._closing.wait(EXPORT_SECONDS):
                self._export_all()
            self._export_all()

    def _ended(self) -> None:
        """Requests are served without traces, too: the end of the thread ends nothing else."""
        if not self._closing.is_set():
            log.error("the export of traces has ended: there are no traces from now on")

    def _export_all(self) -> None:
        if self.counts.dropped and not self._told_dropped:
            self._told_dropped = True
            log.warning(
                "spans end faster than they are exported, and some are dropped: sample less"
            )
        while self._waiting:
            batch = [self._waiting.popleft() for _ in range(min(BATCH, len(self._waiting)))]
            try:
                ahead = self._wall_clock() - self._clock.now()
                readable = [self._readable(span, ahead) for span in batch]
                done = self._exporter.export(readable) is SpanExportResult.SUCCESS
            except Exception as error:  # noqa: BLE001 - nothing that fails here may harm serving
                done, self._said.text = False, repr(error)
            self._note(len(batch), done)

    def _note(self, spans: int, done: bool) -> None:
        if done:
            self.counts.exported += spans
            if self._failing:
                log.info("traces are exported again; %d spans were lost", self.counts.failed)
        else:
            self.counts.failed += spans
            if not self._failing:
                log.warning("traces cannot be exported: %s", shown(self._said.text or "no reason"))
        self._failing = not done

    def _readable(self, span: Span, ahead: float) -> ReadableSpan:
        """Return the SDK's form of a span; `ahead`: the wall clock's seconds less the tracer's."""

        def at(seconds: float) -> int:
            return round((seconds + ahead) * 1e9)

        context = _sdk_context(span.context)
        parent = None
        if span.parent:
            of_parent = TraceContext(span.context.trace_id, span.parent, True, span.context.state)
            parent = _sdk_context(of_parent, span.remote)
        attributes = _bounded(span.attributes)
        status = Status(StatusCode.UNSET)
        if span.error is not None:
            attributes["error.type"] = _value(span.error)
            status = Status(StatusCode.ERROR, shown(span.error))
        end = span.start if span.end is None else span.end
        return ReadableSpan(
            name=shown(span.name),
            context=context,
            parent=parent,
            resource=self._resource,
            attributes=attributes,
            events=[Event(e.name, _bounded(e.attributes), at(e.at)) for e in tuple(span.events)],
            links=[Link(_sdk_context(link)) for link in span.links],
            kind=_KINDS[span.kind.value],
            status=status,
            start_time=at(span.start),
            end_time=at(max(span.start, end)),
            instrumentation_scope=self._scope,
        )


class _LastWords(logging.Filter):
    """Keeps the SDK's last message as the reason of a failure, instead of logging each of them."""

    def __init__(self) -> None:
        super().__init__()
        self.text = ""

    def filter(self, record: logging.LogRecord) -> bool:
        self.text = record.getMessage()
        return False


def _sdk_context(context: TraceContext, remote: bool = False) -> SpanContext:
    state = TraceState.from_header([context.state]) if context.state else None
    return SpanContext(
        context.trace_id, context.span_id, remote, TraceFlags(int(context.sampled)), state
    )


def _bounded(attributes: Attributes) -> dict[str, Attribute]:
    return {name: _value(value) for name, value in attributes.items()}


def _value(value: Attribute) -> Attribute:
    if isinstance(value, str):
        return shown(value, MAX_TEXT)
    return tuple(shown(one, MAX_TEXT) for one in value) if isinstance(value, tuple) else value

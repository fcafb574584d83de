"""Spans: the timed operations of a request, and the tracer that begins and collects them.

This is the contract that the rest of memserve uses. Nothing here imports OpenTelemetry: a finished
span goes to the tracer's sink, which must not block (`otlp.SpanQueue`). A process without a tracer
passes None where a span would be.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum

from memserve.clock import Clock
from memserve.tracing.context import TraceContext, read_context

Attribute = str | int | float | bool | tuple[str, ...]
Attributes = Mapping[str, Attribute]
MAX_EVENTS = 64  # of a span; later ones are dropped

_NOTHING: Attributes = {}


class SpanKind(IntEnum):
    """OpenTelemetry's kinds of spans, by the numbers of its SDK."""

    INTERNAL = 0
    SERVER = 1
    CLIENT = 2


class Event:
    """A moment of a span. `at`: seconds of the tracer's clock."""

    __slots__ = ("at", "attributes", "name")

    def __init__(self, name: str, at: float, attributes: Attributes) -> None:
        self.name = name
        self.at = at
        self.attributes = attributes


class Span:
    """An operation. `start`, `end`: seconds of the tracer's clock.

    A span of a request that is not sampled has a context to pass on; it is its own child, and its
    end is not told to anybody.
    """

    __slots__ = (
        "_tracer",
        "attributes",
        "context",
        "end",
        "error",
        "events",
        "kind",
        "links",
        "name",
        "parent",
        "remote",
        "start",
    )

    def __init__(
        self,
        tracer: Tracer,
        name: str,
        context: TraceContext,
        parent: int,
        kind: SpanKind,
        start: float,
        remote: bool = False,
    ) -> None:
        """`parent`: the parent span's id; 0: none. `remote`: it is another process's."""
        self._tracer = tracer
        self.name = name
        self.context = context
        self.parent = parent
        self.remote = remote
        self.kind = kind
        self.start = start
        self.end: float | None = None
        self.error: str | None = None  # `error.type`; None: the operation did not fail
        self.attributes: dict[str, Attribute] = {}
        self.events: list[Event] = []
        self.links: list[TraceContext] = []  # other spans that have to do with it

    @property
    def recording(self) -> bool:
        return self.context.sampled

    def now(self) -> float:
        return self._tracer.clock.now()

    def child(
        self,
        name: str,
        kind: SpanKind = SpanKind.INTERNAL,
        start: float | None = None,
        attributes: Attributes = _NOTHING,
    ) -> Span:
        """Begin a part of this operation; `start`: now, unless given."""
        if not self.context.sampled:
            return self
        context = self._tracer.next_context(self.context)
        start = self.now() if start is None else start
        span = Span(self._tracer, name, context, self.context.span_id, kind, start)
        span.attributes.update(attributes)
        return span

    def event(self, name: str, at: float | None = None, attributes: Attributes = _NOTHING) -> None:
        """Add a moment; `at`: now, unless given."""
        if self.context.sampled and len(self.events) < MAX_EVENTS:
            self.events.append(Event(name, self.now() if at is None else at, attributes))

    def finish(self, at: float | None = None, error: str | None = None) -> None:
        """End the span; `at`: now, unless given. A second time is ignored."""
        if self.end is None and self.context.sampled:
            self.end = self.now() if at is None else at
            if error is not None:
                self.error = error
            self._tracer.sink(self)


class Sampler:
    """Decides which requests are recorded."""

    def __init__(self, ratio: float, client_rate: float, clock: Clock) -> None:
        """`ratio`: share of requests, from 0 to 1. `client_rate`: requests a second that are
        recorded because their client asks for it; more of them are sampled by `ratio`."""
        self._ratio = ratio
        self._rate = client_rate
        self._burst = max(1.0, client_rate) if client_rate else 0.0
        self._left = self._burst
        self._clock = clock
        self._last = clock.now()
        self._random = random.Random(os.urandom(16))

    def bits(self, count: int) -> int:
        """Return a random number of so many bits, not 0."""
        return self._random.getrandbits(count) or 1

    def wants(self, parent: TraceContext | None) -> bool:
        """Decide for a request from outside. Not by its trace id, which the client chooses."""
        if parent is not None and (not parent.sampled or self._take()):
            return parent.sampled
        return self._random.random() < self._ratio

    def _take(self) -> bool:
        now = self._clock.now()
        self._left = min(self._burst, self._left + (now - self._last) * self._rate)
        self._last = now
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True


@dataclass(slots=True)
class SpanCounts:
    """Counts of finished spans: `dropped` because too many waited, `failed` to be sent."""

    exported: int = 0
    dropped: int = 0
    failed: int = 0


class Tracer:
    """Begins the spans of a process. Belongs to its event loop."""

    def __init__(
        self,
        clock: Clock,
        sampler: Sampler,
        sink: Callable[[Span], None],
        counts: SpanCounts | None = None,
    ) -> None:
        """`sink` gets finished spans, and must not block; `counts`: what it has counted."""
        self.clock = clock
        self.sink = sink
        self.counts = counts or SpanCounts()
        self._sampler = sampler

    def accept(self, name: str, headers: Iterable[tuple[bytes, bytes]], start: float) -> Span:
        """Begin the span of a request from outside: the client's `traceparent` is its parent."""
        parent, sampler = read_context(headers), self._sampler
        sampled = sampler.wants(parent)
        if parent is None:
            context = TraceContext(sampler.bits(128), sampler.bits(64), sampled)
        else:
            context = TraceContext(parent.trace_id, sampler.bits(64), sampled, parent.state)
        span_id = 0 if parent is None else parent.span_id
        return Span(self, name, context, span_id, SpanKind.SERVER, start, remote=True)

    def join(self, name: str, headers: Iterable[tuple[bytes, bytes]]) -> Span | None:
        """Begin the span of a request from this cluster, recorded if its sender records; None
        without a context."""
        parent = read_context(headers)
        if parent is None:
            return None
        context = self.next_context(parent)
        now = self.clock.now()
        return Span(self, name, context, parent.span_id, SpanKind.SERVER, now, remote=True)

    def next_context(self, parent: TraceContext) -> TraceContext:
        """Return the context of another span in the parent's trace."""
        return TraceContext(parent.trace_id, self._sampler.bits(64), parent.sampled, parent.state)


@contextmanager
def timed(
    parent: Span | None,
    name: str,
    kind: SpanKind = SpanKind.INTERNAL,
    attributes: Attributes = _NOTHING,
) -> Iterator[Span | None]:
    """Context of a part of `parent`; None: of nothing. An exception is the span's error, and
    passes on."""
    if parent is None:
        yield None
        return
    span = parent.child(name, kind, attributes=attributes)
    try:
        yield span
    except BaseException as error:
        span.finish(error=error_type(error))
        raise
    span.finish()


def error_type(error: BaseException) -> str:
    """Return `error.type` of an exception."""
    if isinstance(error, asyncio.CancelledError):
        return "cancelled"
    return type(error).__name__.lstrip("_")


def headers_of(span: Span | None) -> dict[str, str]:
    """Return the headers that pass a span on to another process; none without a span."""
    return {} if span is None else span.context.headers()

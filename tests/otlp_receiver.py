"""A receiver of OTLP over HTTP on a thread, and the spans that it has got, as a tree."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

PATIENCE = 60.0


@dataclass(frozen=True)
class Received:
    """One span."""

    name: str
    trace: str
    id: str
    parent: str  # "": none
    kind: int  # OTLP's: 1 internal, 2 server, 3 client
    start: int  # ns
    end: int
    attributes: dict[str, Any]
    resource: dict[str, Any]
    events: list[str]
    links: list[str]  # span ids
    failed: bool
    state: str


@dataclass
class Receiver:
    url: str
    status: int = 200  # that it answers
    spans: list[Received] = field(default_factory=list)
    requests: int = 0
    headers: list[dict[str, str]] = field(default_factory=list)

    def named(self, name: str) -> Received:
        """The only span of that name."""
        (span,) = [span for span in self.spans if span.name == name]
        return span

    def wait_for(self, *names: str) -> None:
        """Wait until there is a span of each name."""
        end = time.monotonic() + PATIENCE
        while missing := set(names) - {span.name for span in self.spans}:
            assert time.monotonic() < end, f"never came: {missing}"
            time.sleep(0.01)

    def children(self, span: Received) -> list[Received]:
        """The parts of a span, by their begin."""
        found = [one for one in self.spans if one.parent == span.id and one.trace == span.trace]
        return sorted(found, key=lambda one: one.start)

    def tree(self, span: Received) -> Any:
        """A span's name, or its name with its parts."""
        parts = [self.tree(child) for child in self.children(span)]
        return {span.name: parts} if parts else span.name

    def take(self, body: bytes) -> None:
        request = ExportTraceServiceRequest.FromString(body)
        for of_resource in request.resource_spans:
            resource = {a.key: _value(a.value) for a in of_resource.resource.attributes}
            for of_scope in of_resource.scope_spans:
                for s in of_scope.spans:
                    self.spans.append(
                        Received(
                            name=s.name,
                            trace=s.trace_id.hex(),
                            id=s.span_id.hex(),
                            parent=s.parent_span_id.hex(),
                            kind=s.kind,
                            start=s.start_time_unix_nano,
                            end=s.end_time_unix_nano,
                            attributes={a.key: _value(a.value) for a in s.attributes},
                            resource=resource,
                            events=[event.name for event in s.events],
                            links=[link.span_id.hex() for link in s.links],
                            failed=s.status.code == 2,
                            state=s.trace_state,
                        )
                    )


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    found = getattr(value, kind)
    return [_value(one) for one in found.values] if kind == "array_value" else found


@contextmanager
def receiver() -> Iterator[Receiver]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            got.requests += 1
            got.headers.append(dict(self.headers.items()))
            if got.status == 200 and self.path == "/v1/traces":
                got.take(body)
            self.send_response(got.status)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    got = Receiver(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield got
    finally:
        server.shutdown()
        thread.join()
        server.server_close()

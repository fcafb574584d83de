"""The spans of one request in a gateway.

`chat MODEL` (the request) has the parts `tokenise`, `admission`, and for each instance that is
tried `decide` and `attempt`. Each part begins where the one before has ended. The span of an
instance is a child of its attempt.
"""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import urlsplit

import msgspec

from memserve.api.forward import ForwardPath
from memserve.api.generate import CallKind, GenerateCall
from memserve.api.http_message import Request
from memserve.gateway.route import Route
from memserve.gateway.stream import ClientStream
from memserve.tracing.span import Attribute, Span, SpanKind, Tracer

_FAILED = 500  # statuses from here on are errors of the server
_OPERATIONS = {
    ForwardPath.RESPONSES: "chat",
    ForwardPath.MESSAGES: "chat",
    ForwardPath.EMBEDDINGS: "embeddings",
    ForwardPath.POOLING: "embeddings",
}


class _Usage(msgspec.Struct):
    completion_tokens: int = 0


class _Choice(msgspec.Struct):
    finish_reason: str | None = None


class _Answer(msgspec.Struct):
    choices: list[_Choice]
    usage: _Usage


_read_answer = msgspec.json.Decoder(_Answer).decode


class RequestTrace:
    """One request's spans. If the request is not sampled, it has only a context to pass on."""

    __slots__ = ("_attempt", "_attempts", "_last_lost", "_mark", "_root")

    def __init__(self, tracer: Tracer, request: Request, started: float) -> None:
        """`started`: seconds of the tracer's clock."""
        name = f"{request.method[:16]} {request.path}"
        self._root = tracer.accept(name, request.headers, started)
        self._mark = started  # end of the part before
        self._attempt: Span | None = None
        self._attempts = 0
        self._last_lost: Span | None = None  # the last attempt, if its instance was lost
        if self._root.recording:
            self._root.attributes["http.request.method"] = request.method[:16]
            self._root.attributes["url.path"] = request.path

    @property
    def id(self) -> str | None:
        """The trace's id; None if it is not sampled."""
        root = self._root
        return f"{root.context.trace_id:032x}" if root.recording else None

    def accepted(self, call: GenerateCall, body_bytes: int) -> None:
        """The request has been read and tokenised."""
        root = self._root
        if not root.recording:
            return
        operation = _operation(call)
        root.name = f"{operation} {call.model}"
        root.attributes |= _asked(call)
        root.attributes["gen_ai.operation.name"] = operation
        tokens = sum(map(len, call.prompts))
        self._part(
            "tokenise",
            {"http.request.body.size": body_bytes, "gen_ai.usage.input_tokens": tokens},
        )

    def admitted(self) -> None:
        """The request has had its turn."""
        if self._root.recording:
            self._part("admission", {})

    def decided(self, route: Route) -> None:
        """The router has chosen a route."""
        if self._root.recording:
            self._part("decide", _planned(route))

    def attempt(self, route: Route, call: GenerateCall) -> bytes:
        """Begin the call at a route's instance. Return the lines for the head of its request."""
        root = self._root
        if not root.recording:
            return root.context.lines()
        self._attempts += 1
        span = self._attempt = root.child("attempt", SpanKind.CLIENT, self._mark)
        parts = urlsplit(route.member.address)
        span.attributes |= {
            "memserve.instance": route.member.id,
            "memserve.attempt": self._attempts,
            "server.address": parts.hostname or route.member.address,
        }
        if parts.port is not None:
            span.attributes["server.port"] = parts.port
        if self._last_lost is not None:
            span.links.append(self._last_lost.context)
            lost = self._last_lost.attributes["memserve.instance"]
            span.attributes["memserve.failover_from"] = lost
        if call.resumed:
            span.attributes["memserve.resumed_tokens"] = sum(map(len, call.resumed))
        return span.context.lines()

    def attempted(self, status: int, lost: str | None) -> None:
        """End the call. `lost`: how the instance failed; None: it has not."""
        span, self._attempt = self._attempt, None
        if span is None:
            return
        self._mark = span.now()
        self._last_lost = None if lost is None else span
        if status:
            span.attributes["http.response.status_code"] = status
        if lost is not None:
            span.attributes["memserve.lost"] = lost
        error = "instance_lost" if lost is not None else _error(status)
        span.finish(self._mark, error)

    def streamed(self, stream: ClientStream) -> None:
        """Say how a stream has ended, or how far it has come."""
        if self._root.recording:
            self._answered(sum(map(len, stream.tokens())), stream.finish_reasons or ())

    def answered(self, body: bytes) -> None:
        """Say how a whole answer has ended."""
        if not self._root.recording:
            return
        try:
            told = _read_answer(body)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return  # an error, or of another endpoint
        reasons = tuple(each.finish_reason or "" for each in told.choices)
        self._answered(told.usage.completion_tokens, reasons)

    def _answered(self, tokens: int, reasons: Sequence[str]) -> None:
        self._root.attributes["gen_ai.usage.output_tokens"] = tokens
        if reasons:
            self._root.attributes["gen_ai.response.finish_reasons"] = tuple(reasons)

    def end(self, status: int, first_token: float | None, broken: bool) -> None:
        """End the request. `first_token`: when it went to the client, for streams."""
        root = self._root
        if not root.recording:
            return
        self.attempted(0, "given up")
        if first_token is not None:
            root.event("first_token", first_token)
        root.attributes["http.response.status_code"] = status
        root.finish(error="stream_broken" if broken else _error(status))

    def _part(self, name: str, attributes: dict[str, Attribute]) -> None:
        root = self._root
        now = root.now()
        root.child(name, start=self._mark, attributes=attributes).finish(now)
        self._mark = now


def _operation(call: GenerateCall) -> str:
    """Return `gen_ai.operation.name`."""
    if call.forward is not None and call.forward.path in _OPERATIONS:
        return _OPERATIONS[call.forward.path]
    if call.forward is not None and call.forward.path not in (
        ForwardPath.CHAT,
        ForwardPath.COMPLETIONS,
    ):
        return call.forward.path.rpartition("/")[2]
    return "chat" if call.kind is CallKind.CHAT else "text_completion"


def _asked(call: GenerateCall) -> dict[str, Attribute]:
    """Return the parameters of a request: numbers, and nothing of its texts."""
    sampling = call.sampling
    asked: dict[str, Attribute] = {
        "gen_ai.provider.name": "memserve",
        "gen_ai.request.model": call.model,
        "gen_ai.response.id": call.id,
        "gen_ai.request.max_tokens": sampling.max_tokens,
        "gen_ai.request.choice.count": call.n,
        "gen_ai.usage.input_tokens": sum(map(len, call.prompts)),
        "memserve.stream": call.stream,
    }
    if call.forward is None:  # else only the vLLM server reads them
        asked["gen_ai.request.temperature"] = sampling.temperature
        asked["gen_ai.request.top_p"] = sampling.top_p
        asked["gen_ai.request.top_k"] = sampling.top_k
        asked["gen_ai.request.frequency_penalty"] = sampling.frequency_penalty
        asked["gen_ai.request.presence_penalty"] = sampling.presence_penalty
    return asked


def _planned(route: Route) -> dict[str, Attribute]:
    """Return what a route says: who does what, and what is predicted (seconds)."""
    said: dict[str, Attribute] = {"memserve.instance": route.member.id}
    if route.prefill:
        said["memserve.prefill"] = route.prefill[0].id
    if route.fetch is not None:
        said["memserve.fetch"] = route.fetch.id
    if (decision := route.decision) is not None:
        chosen = decision.plan
        said |= {
            "memserve.policy": decision.policy,
            "memserve.candidates": decision.considered,
            "memserve.cached_tokens": chosen.cached_tokens,
            "memserve.fetched_tokens": chosen.fetched_tokens,
            "memserve.predicted.queue": chosen.terms.queue,
            "memserve.predicted.fetch": chosen.terms.fetch,
            "memserve.predicted.prefill": chosen.terms.prefill,
            "memserve.predicted.transfer": chosen.terms.transfer,
            "memserve.predicted.decode": chosen.terms.decode,
            "memserve.predicted.first_token": chosen.terms.first_token,
        }
    return said


def _error(status: int) -> str | None:
    return str(status) if status >= _FAILED else None

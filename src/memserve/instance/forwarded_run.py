"""A forwarded call, from its arrival at the instance to the end of the vLLM server's answer."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from types import TracebackType

from memserve.api.errors import ApiError
from memserve.api.forward import Forward
from memserve.api.generate import GenerateCall
from memserve.api.timeline import MAX_PAUSES, Pause
from memserve.clock import Clock
from memserve.instance.sequence_stats import PAUSE_SECONDS, SequenceStats
from memserve.tracing.span import Span, SpanKind, error_type, headers_of
from memserve.types import RequestId
from memserve.vllm.forwarder import BrokenOff, ForwardedAnswer

_OK = 200
LOST = "server_lost"  # error code: the server has gone, or ended an answer before it was complete


class ForwardedRun:
    """Times and outcome of a forwarded call, for its time line and its trace. A context manager
    that ends with the call.

    Times are seconds of the instance's clock; None: not reached yet.
    """

    def __init__(
        self, call: GenerateCall, forward: Forward, clock: Clock, parent: Span | None = None
    ) -> None:
        self.parent = parent  # the call's span, if it is traced
        self.id = RequestId(call.id)
        self.path = forward.path
        self.stream = call.stream
        self.prompt_tokens = len(call.prompts[0])  # of the server; valid only if `brought`
        self.arrived = self.end = clock.now()
        self.brought: SequenceStats | None = None  # statistics of a hand-over or fetch before it
        self.sent: float | None = None  # when the body went to the server
        self.first: float | None = None  # the answer's first byte; of a stream, the first token's
        self.size = 0  # bytes of the answer's body so far
        self.pauses: list[Pause] = []  # of the server, in a stream
        self.error: str | None = None  # why the answer is not complete
        self.span: Span | None = None  # span of the call at the server; `request_trace` ends it
        self._forward = forward
        self._clock = clock
        self._answer: ForwardedAnswer | None = None

    def __enter__(self) -> ForwardedRun:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end = self._clock.now()
        if error is not None:
            self.error = error.reason if isinstance(error, ApiError) else error_type(error)

    def sending(self) -> Mapping[str, str]:
        """Record that the body goes to the server; return the headers for its trace context."""
        self.sent = self._clock.now()
        if self.parent is not None:
            self.span = self.parent.child("vllm", SpanKind.CLIENT, self.sent)
        return headers_of(self.span)

    def answered(self, answer: ForwardedAnswer) -> None:
        """Record that the server has begun to answer."""
        self._answer = answer

    @property
    def answer(self) -> ForwardedAnswer:
        """The server's answer. Its body is read by `pieces`."""
        assert self._answer is not None
        return self._answer

    @property
    def status(self) -> int | None:
        return None if self._answer is None else self._answer.status

    def since_arrival(self, moment: float | None) -> float | None:
        return None if moment is None else moment - self.arrived

    async def pieces(self) -> AsyncIterator[bytes]:
        """Yield the bytes of the answer's body as they arrive. Raises BrokenOff."""
        # Pauses are waits for the server; waits for a slow client do not count.
        asked = self._clock.now()
        try:
            async for data in self.answer.pieces():
                self._take(data, asked)
                yield data
                asked = self._clock.now()
        except BrokenOff:
            self.error = LOST
            raise

    def _take(self, data: bytes, asked: float) -> None:
        now = self._clock.now()
        self.size += len(data)
        streams = self.stream and self.status == _OK
        if self.first is None:
            if not streams or self._forward.tells_token(data):
                self.first = now
        elif streams and now - asked >= PAUSE_SECONDS and len(self.pauses) < MAX_PAUSES:
            self.pauses.append(Pause(asked - self.arrived, now - asked))

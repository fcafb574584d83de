"""The reply of `/v1/responses`: it takes a chat's stream, and gives its client a Response, whole or
as events.

The instance always streams, so that an answer that is not streamed goes on elsewhere, too, when
the instance is lost. An answer is a list of items (reasoning, a message, function calls), one
open at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from http import HTTPStatus
from typing import Final

import msgspec

from memserve.api.errors import ApiError, ErrorBody, ErrorDetail, internal, unavailable
from memserve.api.http_message import (
    EVENTS_HEADERS,
    JSON_HEADER,
    Body,
    Header,
    Headers,
    Reply,
    Request,
)
from memserve.api.limits import MAX_ANSWER_BYTES, MAX_SCORED_RESPONSE_BYTES
from memserve.api.responses import (
    IncompleteDetails,
    Response,
    ResponseError,
)
from memserve.gateway.chat_chunks import Choice, ToolCall, Usage, decode_chunk, response_usage
from memserve.gateway.responses_items import CallItem, Item, MessageItem, ReasoningItem, event
from memserve.gateway.responses_request import renamed

EVENT_END: Final = b"\n\n"
_DATA: Final = b"data: "
_DONE: Final = b"[DONE]"
_encode = msgspec.json.Encoder().encode
_error = msgspec.json.Decoder(ErrorBody)
Keep = Callable[[bytes, Sequence[bytes]], None]


class _NoWire:
    """The wire of a reply that writes to another reply."""

    def send(self, data: bytes) -> None: ...

    def replied(self, keep_alive: bool) -> None: ...


class ResponsesReply(Reply):
    """Adapter from a chat's answer to a Response. `begin` it with the answer's first state; before,
    errors go to the client as they are, and with `pass_through` the whole answer does."""

    __slots__ = (
        "_events",
        "_failed",
        "_finish_reason",
        "_headers",
        "_item",
        "_keep",
        "_most",
        "_outer",
        "_outputs",
        "_passes",
        "_response",
        "_rest",
        "_sequence",
        "_size",
        "_stem",
        "_stream",
        "_usage",
    )

    def __init__(self, outer: Reply, request: Request) -> None:
        super().__init__(_NoWire(), request, outer.writable)
        self._outer = outer
        self._response: Response | None = None
        self._stem = ""  # of the ids of items
        self._keep: Keep | None = None
        self._stream = False
        self._passes = False
        self._headers: tuple[Header, ...] = ()
        self._rest = b""  # of an event that has not come whole
        self._events: list[bytes] = []  # to be written
        self._sequence = 0
        self._item: Item | None = None  # the open one
        self._outputs: list[bytes] = []  # items that are done
        self._finish_reason: str | None = None
        self._usage: Usage | None = None
        self._failed: ErrorDetail | None = None
        self._size = 0
        self._most = MAX_ANSWER_BYTES
        self.gone = outer.gone
        outer.on_gone, outer.on_flow = self.hung_up, self._flow

    def begin(
        self, response: Response, stream: bool, keep: Keep | None, scored: bool = False
    ) -> None:
        """`keep`: called with the complete Response's JSON, and that of its items. `scored`: with
        log-probabilities, which the last events repeat."""
        self._most = MAX_SCORED_RESPONSE_BYTES if scored else MAX_ANSWER_BYTES
        self._response, self._stream, self._keep = response, stream, keep
        self._stem = response.id.removeprefix("resp_")

    def pass_through(self) -> None:
        """The answer is a Response already, made by a vLLM server."""
        self._passes = True

    # --- Reply

    def send(
        self, status: int, body: bytes, headers: Headers = (), media: Header = JSON_HEADER
    ) -> None:
        self.status = status
        self.started = True
        if status >= HTTPStatus.BAD_REQUEST and not self._passes:
            body = _renamed(body)
        if status >= HTTPStatus.BAD_REQUEST:
            self.refusal = body
        self._end()
        self._outer.added = self.added
        self._outer.send(status, body, headers, media)

    def start(
        self, status: int, headers: Headers, *, sized: bool = False, whole: Body | None = None
    ) -> None:
        self.status = status
        self.started = True
        self._outer.added = self.added
        if self._passes:
            self._outer.start(status, headers, sized=sized, whole=whole)
            return
        self._headers = tuple(headers)
        if self._stream and self._response is not None:
            self._outer.start(status, self._headers)
            self._tell("response.created", response=self._response)
            self._tell("response.in_progress", response=self._response)

    def write(self, data: bytes) -> None:
        if self._passes:
            self._outer.write(data)
            return
        self._take(data)
        if self._failed is not None:
            give_up = self.on_gone
            self._fail(self._failed)
            self.gone = True
            if give_up is not None:
                give_up()  # what the instance still does for it
        elif self._stream and self._events:
            self._outer.write(self._flush())

    def end(self, data: bytes = b"") -> None:
        if self._passes:
            self._end()
            self._outer.end(data)
            return
        self._take(data)
        if self._failed is not None:
            self._fail(self._failed)
        elif self._finish_reason is None:
            self._fail(unavailable("The answer broke off.", "instance_lost").detail)
        else:
            self._complete()

    def abort(self) -> None:
        self._end()
        self._outer.abort()

    def _flow(self, paused: bool) -> None:
        self.writable = not paused
        if self.on_flow is not None:
            self.on_flow(paused)

    def _end(self) -> None:
        if self.ended:
            raise RuntimeError("a reply ends once")
        self.ended = True
        self.on_gone = self.on_flow = None

    # --- the chat's stream

    def _take(self, data: bytes) -> None:
        """Translate the whole events of `data`; keep the rest."""
        if self._rest:
            data = self._rest + data
            self._rest = b""
        *events, rest = data.split(EVENT_END)
        self._rest = rest
        if len(rest) > self._most:
            self._failed = _too_large(self._most)
        for text in events:
            if self._failed is None and text.startswith(_DATA):
                payload = text[len(_DATA) :]
                if payload != _DONE:
                    self._chunk(payload)

    def _chunk(self, payload: bytes) -> None:
        self._size += len(payload)
        if self._size > self._most:
            self._failed = _too_large(self._most)
            return
        try:
            chunk = decode_chunk(payload)
            self._failed = chunk.error
            self._usage = chunk.usage or self._usage
            for choice in chunk.choices[:1]:
                self._delta(choice)
        except (msgspec.MsgspecError, UnicodeError, RecursionError):
            self._failed = internal("The instance's answer cannot be read.").detail

    def _delta(self, choice: Choice) -> None:
        delta = choice.delta
        if thought := delta.reasoning or delta.reasoning_content:
            self._text_item(ReasoningItem).add(thought, self._tell_raw)
        scores = choice.logprobs.content or () if choice.logprobs is not None else ()
        if delta.content or scores:
            self._text_item(MessageItem).add(delta.content or "", self._tell_raw, scores)
        for call in delta.tool_calls or ():
            part = call.function
            item = self._call(call)
            if part is not None and part.arguments:
                item.add(part.arguments, self._tell_raw)
        if choice.finish_reason is not None:
            self._finish_reason = choice.finish_reason

    # --- items and events

    def _text_item(self, kind: type[MessageItem] | type[ReasoningItem]) -> Item:
        """Return the open item if it is of this kind, or else a new one."""
        item = self._item
        if not isinstance(item, kind):
            self._close()
            item = self._begun(kind(self._stem, len(self._outputs)))
        return item

    def _call(self, call: ToolCall) -> Item:
        """Return the open item if this is a part of its call, or else a new one."""
        item = self._item
        if (
            not isinstance(item, CallItem)
            or item.number != call.index
            or call.id not in (None, item.call_id)
        ):
            self._close()
            name = "" if call.function is None else call.function.name or ""
            new = CallItem(self._stem, len(self._outputs), call.index, call.id, name)
            return self._begun(new)
        return item

    def _begun(self, item: Item) -> Item:
        self._item = item
        item.open(self._tell_raw)
        return item

    def _close(self, status: str = "completed") -> None:
        if self._item is not None:
            self._outputs.append(self._item.close(status, self._tell_raw))
            self._item = None

    def _tell(self, name: str, **fields: object) -> None:
        self._tell_raw(name, _encode(fields)[1:-1])

    def _tell_raw(self, name: str, fields: bytes) -> None:
        """Add an event; `fields`: of its JSON object, without braces."""
        if self._stream:
            self._events.append(event(name, self._sequence, fields))
            self._sequence += 1

    def _flush(self) -> bytes:
        data = b"".join(self._events)
        self._events.clear()
        return data

    # --- the end

    def _complete(self) -> None:
        cut = self._finish_reason in ("length", "content_filter")
        if self._item is None and not self._outputs:
            self._text_item(MessageItem)  # an empty answer is a message, too
        self._close("incomplete" if cut else "completed")
        reason = "max_output_tokens" if self._finish_reason == "length" else "content_filter"
        response = self._final(
            "incomplete" if cut else "completed",
            incomplete_details=IncompleteDetails(reason) if cut else None,
        )
        body = _encode(response)
        if self._keep is not None:
            self._keep(body, tuple(self._outputs))
        self._end()
        if self._stream:
            self._tell_raw(f"response.{response.status}", b'"response":' + body)
            self._outer.end(self._flush())
        else:
            self._outer.send(HTTPStatus.OK, body, self._own_headers())

    def _fail(self, detail: ErrorDetail) -> None:
        if self._stream:
            self._close("incomplete")
            error = ResponseError("server_error", detail.message)
            self._tell("response.failed", response=self._final("failed", error=error))
            self._end()
            self._outer.end(self._flush())
            return
        self.send(_status_of(detail), _encode(ErrorBody(detail)), self._own_headers())

    def _own_headers(self) -> list[Header]:
        """Return the headers without those of a stream."""
        return [header for header in self._headers if header not in EVENTS_HEADERS]

    def _final(self, status: str, **changes: object) -> Response:
        assert self._response is not None
        return msgspec.structs.replace(
            self._response,
            status=status,
            completed_at=int(time.time()) if status == "completed" else None,
            output=[msgspec.Raw(item) for item in self._outputs],
            usage=response_usage(self._usage),
            **changes,
        )


def _status_of(detail: ErrorDetail) -> HTTPStatus:
    """Return the status of an error that ended a stream."""
    if detail.type == "invalid_request_error":
        return HTTPStatus.BAD_REQUEST
    if detail.type == "rate_limit_error":
        return HTTPStatus.TOO_MANY_REQUESTS
    if detail.code == "internal_error":
        return HTTPStatus.INTERNAL_SERVER_ERROR
    return HTTPStatus.SERVICE_UNAVAILABLE


def _renamed(body: bytes) -> bytes:
    """Return an instance's refusal of a chat as that of this request."""
    try:
        detail = _error.decode(body).error
    except (msgspec.MsgspecError, UnicodeError, RecursionError):  # a vLLM server's own form
        return body
    return _encode(ErrorBody(renamed(detail)))


def _too_large(most: int) -> ErrorDetail:
    return ApiError(
        HTTPStatus.BAD_REQUEST,
        f"The answer is larger than {most} bytes.",
        code="answer_too_large",
    ).detail

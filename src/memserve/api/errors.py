"""HTTP errors in OpenAI's shape: a status, and `{"error": {...}}` as the body."""

from __future__ import annotations

from http import HTTPStatus

import msgspec

from memserve.errors import MemserveError

# Characters of a message, including text from a request. Our own text has fewer than 200.
MAX_MESSAGE_CHARACTERS = 256

GRAMMAR_FAILED = "grammar_failed"  # a code
_TAIL_CHARACTERS = 80  # kept at the end of a shortened message, which names the valid values
_encode = msgspec.json.Encoder().encode


class ErrorDetail(msgspec.Struct, frozen=True):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(msgspec.Struct, frozen=True):
    error: ErrorDetail


class ApiError(MemserveError):
    """An HTTP error answer.

    `retry_after` (seconds) is set if the request may succeed later. `close` asks the client to
    open a new connection for that, because this process ends. `allow`: the methods that the path
    supports. `authenticate`: a 401's WWW-Authenticate header. Messages that are too long lose
    their middle, so that no answer, event or log line repeats more than MAX_MESSAGE_CHARACTERS of
    a request.
    """

    def __init__(
        self,
        status: HTTPStatus,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
        close: bool = False,
        allow: str | None = None,
        authenticate: str | None = None,
    ) -> None:
        message = bounded(message)
        super().__init__(message)
        self.status = status
        self.detail = ErrorDetail(message, type, None if param is None else bounded(param), code)
        self.retry_after = retry_after
        self.close = close
        self.allow = allow
        self.authenticate = authenticate

    @property
    def reason(self) -> str:
        """The code, or else the status: for logs, traces and time lines."""
        return self.detail.code or str(int(self.status))

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Return the error's own headers."""
        headers = []
        if self.retry_after is not None:
            headers.append((b"retry-after", b"%d" % self.retry_after))
        if self.close:
            headers.append((b"connection", b"close"))
        if self.allow is not None:
            headers.append((b"allow", self.allow.encode()))
        if self.authenticate is not None:
            headers.append((b"www-authenticate", self.authenticate.encode()))
        return headers

    def body(self) -> bytes:
        """Return the JSON body."""
        return _encode(ErrorBody(self.detail))

    def event(self) -> bytes:
        """Return the body as a server-sent event, which ends a broken stream."""
        return b"data: " + self.body() + b"\n\n"


class NotUnderstood(ApiError):
    """400: the gateway does not support a field of the request, or its form. A vLLM server may."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(HTTPStatus.BAD_REQUEST, message, param=param, code=code)


def bounded(text: str) -> str:
    """Return a text of at most MAX_MESSAGE_CHARACTERS: a longer one without its middle.
    Characters that UTF-8 cannot encode become `?`."""
    if len(text) > MAX_MESSAGE_CHARACTERS:
        head = MAX_MESSAGE_CHARACTERS - _TAIL_CHARACTERS - 1
        text = f"{text[:head]}\N{HORIZONTAL ELLIPSIS}{text[-_TAIL_CHARACTERS:]}"
    return text if text.isascii() else text.encode(errors="replace").decode()


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """400: a request that can never be served in this form."""
    return ApiError(HTTPStatus.BAD_REQUEST, message, param=param, code=code)


def not_json(error: Exception, param: str | None = None) -> ApiError:
    """400: the body, or the field `param`, cannot be decoded."""
    what = "The request body" if param is None else f"'{param}'"
    return invalid(f"{what} is not valid JSON: {error}", param, "invalid_json")


def model_not_found(model: str, served: str) -> ApiError:
    return ApiError(
        HTTPStatus.NOT_FOUND,
        f"The model '{model}' does not exist; this server has '{served}'.",
        param="model",
        code="model_not_found",
    )


def path_not_found(path: str) -> ApiError:
    return ApiError(HTTPStatus.NOT_FOUND, f"Unknown path: {path}", code="not_found")


def method_not_allowed(method: str, path: str, allow: str | None) -> ApiError:
    return ApiError(
        HTTPStatus.METHOD_NOT_ALLOWED,
        f"{path} does not answer {method}.",
        code="method_not_allowed",
        allow=allow,
    )


def unsupported_media(path: str, media: str) -> ApiError:
    """415: the body's type is not `media`, the only one that this path takes."""
    return ApiError(
        HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
        f"{path} takes a body of content-type '{media}'.",
        code="unsupported_media_type",
    )


def body_too_large(limit: int) -> ApiError:
    return ApiError(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        f"The request body is larger than {limit} bytes.",
        code="request_too_large",
    )


def context_length_exceeded(
    limit: int, prompt_tokens: int, max_tokens: int | None, param: str
) -> ApiError:
    """400: prompt and answer exceed the context length `limit`, in tokens. `max_tokens`: None if
    the client gave none, and the prompt leaves no room for any."""
    if max_tokens is None:
        asked = f"Your prompt has {prompt_tokens} tokens, which leaves no room for an answer."
    else:
        asked = (
            f"You requested {prompt_tokens + max_tokens} tokens: "
            f"{prompt_tokens} in the prompt and {max_tokens} for the answer."
        )
    return invalid(
        f"This model's maximum context length is {limit} tokens. {asked}",
        param,
        "context_length_exceeded",
    )


def grammar_failed(message: str | None) -> ApiError:
    """400: a sequence cannot obey its grammar within its limits; another instance could not."""
    return invalid(message or "The answer's grammar failed.", code=GRAMMAR_FAILED)


def queue_full(message: str, retry_after: int) -> ApiError:
    return ApiError(
        HTTPStatus.TOO_MANY_REQUESTS,
        message,
        type="rate_limit_error",
        code="queue_full",
        retry_after=retry_after,
    )


def unavailable(message: str, code: str, retry_after: int = 1, close: bool = False) -> ApiError:
    """503: the server cannot take the request now; another server, or this one later, may."""
    return ApiError(
        HTTPStatus.SERVICE_UNAVAILABLE,
        message,
        type="server_error",
        code=code,
        retry_after=retry_after,
        close=close,
    )


def internal(message: str, code: str = "internal_error") -> ApiError:
    return ApiError(HTTPStatus.INTERNAL_SERVER_ERROR, message, type="server_error", code=code)

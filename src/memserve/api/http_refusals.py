"""Errors with which the HTTP server itself, before any handler, refuses requests."""

from __future__ import annotations

from http import HTTPStatus

from memserve.api.errors import ApiError, unavailable


def head_too_large(limit: int) -> ApiError:
    return ApiError(
        HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
        f"The request's line and headers are larger than {limit} bytes.",
        code="headers_too_large",
    )


def too_many_headers(limit: int) -> ApiError:
    return ApiError(
        HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
        f"The request has more than {limit} headers.",
        code="headers_too_large",
    )


def version_not_supported(version: str) -> ApiError:
    return ApiError(
        HTTPStatus.HTTP_VERSION_NOT_SUPPORTED,
        f"This server speaks HTTP/1.1, not HTTP/{version}.",
        code="http_version_not_supported",
    )


def coding_not_implemented() -> ApiError:
    return ApiError(
        HTTPStatus.NOT_IMPLEMENTED,
        "Of transfer codings this server knows chunked alone.",
        code="transfer_coding_not_implemented",
    )


def timed_out(part: str) -> ApiError:
    """408: `part` of a request (head, body) did not come in time."""
    return ApiError(
        HTTPStatus.REQUEST_TIMEOUT,
        f"The request's {part} took too long to come.",
        code="request_timeout",
    )


def too_many_connections() -> ApiError:
    return unavailable("Too many connections.", "too_many_connections", close=True)


def too_many_bodies() -> ApiError:
    return unavailable("Too much is being sent at once.", "too_many_bodies")

"""Errors with which a gateway itself refuses a request."""

from __future__ import annotations

from http import HTTPStatus

from memserve.api.errors import ApiError, unavailable


def no_instance() -> ApiError:
    return unavailable("No instance is ready.", "no_instance")


def stopping() -> ApiError:
    """For running and waiting requests that a stopping gateway ends."""
    return unavailable("The gateway is shutting down.", "gateway_stopping", close=True)


def draining() -> ApiError:
    """For requests that come while the running ones finish."""
    return unavailable("The gateway is shutting down.", "gateway_draining", close=True)


def no_member_can(path: str) -> ApiError:
    """404: the path exists, and only a vLLM server could answer it."""
    return ApiError(
        HTTPStatus.NOT_FOUND,
        f"No member of this cluster can answer {path}: a vLLM server with such a model could.",
        code="not_found",
    )

"""Errors with which a gateway itself refuses a request (503)."""

from __future__ import annotations

from memserve.api.errors import ApiError, unavailable


def no_instance() -> ApiError:
    return unavailable("No instance is ready.", "no_instance")


def stopping() -> ApiError:
    """For running and waiting requests that a stopping gateway ends."""
    return unavailable("The gateway is shutting down.", "gateway_stopping", close=True)


def draining() -> ApiError:
    """For requests that come while the running ones finish."""
    return unavailable("The gateway is shutting down.", "gateway_draining", close=True)

"""Why a gateway itself refuses a request: no instance had a part in it."""

from __future__ import annotations

from memserve.api.errors import ApiError, unavailable


def no_instance() -> ApiError:
    return unavailable("No instance is ready.", "no_instance")


def stopping() -> ApiError:
    """What runs or waits is ended."""
    return unavailable("The gateway is shutting down.", "gateway_stopping", close=True)


def draining() -> ApiError:
    """Nothing new is taken; what runs goes on."""
    return unavailable("The gateway is shutting down.", "gateway_draining", close=True)

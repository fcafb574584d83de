"""Epochs: random numbers that distinguish the lives of an instance. They are not times: the
clocks of two hosts disagree, and clocks are set back."""

from __future__ import annotations

import secrets

from memserve.types import Epoch

EPOCH_BITS = 63  # the non-negative values of an int64 in a message


def new_epoch() -> Epoch:
    """Return a random epoch, never 0; two lives get the same one with negligible probability."""
    return Epoch(secrets.randbits(EPOCH_BITS) or 1)

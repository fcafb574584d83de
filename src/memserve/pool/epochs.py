"""Epochs: numbers that tell an instance's lives apart. They say nothing about time: the clocks
of two hosts disagree, and clocks are set back."""

from __future__ import annotations

import secrets

from memserve.types import Epoch

EPOCH_BITS = 63  # what a signed number on a wire holds


def new_epoch() -> Epoch:
    """Of no other life, of any pool or instance anywhere: random, and never 0."""
    return Epoch(secrets.randbits(EPOCH_BITS) or 1)

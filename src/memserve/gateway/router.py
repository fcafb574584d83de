"""Which instance a call goes to."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Protocol

from memserve.api.generate import GenerateCall
from memserve.cluster.membership import Member


class Router(Protocol):
    """Chooses among members that would take the call. Called on the event loop, so it is quick."""

    def choose(self, call: GenerateCall, candidates: Sequence[Member]) -> Member:
        """One of `candidates`, which are not empty."""


class RoundRobin:
    """One after the other."""

    def __init__(self) -> None:
        self._turns = itertools.count()

    def choose(self, call: GenerateCall, candidates: Sequence[Member]) -> Member:
        return candidates[next(self._turns) % len(candidates)]

"""One instance's work, and what a request takes up of it."""

from __future__ import annotations

import msgspec

from memserve.scheduler.contract import InstanceSpec
from memserve.scheduler.queue import PrefillQueue
from memserve.scheduler.residents import Residents
from memserve.types import Namespace, RequestId, TokenArray


class Reservation(msgspec.Struct, frozen=True, eq=False):
    """What one request takes up. Owned by `Load` until it is released."""

    request: RequestId
    namespace: Namespace
    tokens: TokenArray
    cached_tokens: int  # of them, found or fetched where the prompt is computed
    prefill_seconds: float
    context_tokens: int  # of its sequence, half way through its answer
    output_tokens: int
    kv_tokens: int  # that it takes up in HBM where it is answered, besides what is shared
    computes: InstanceLoad
    answers: InstanceLoad


class InstanceLoad:
    """One instance's work. Changed by `Load` alone."""

    __slots__ = (
        "answers",
        "context_tokens",
        "decoding",
        "other_prefills",
        "other_running",
        "output_tokens",
        "prefills",
        "queue",
        "residents",
        "slot",
        "spec",
        "used",
    )

    def __init__(self, spec: InstanceSpec, used: float) -> None:
        self.spec = spec
        self.slot = -1  # its place in the arrays; -1: removed
        self.used = used  # turn in which it was last chosen, for ties
        self.queue = PrefillQueue(spec.short_share)
        self.prefills: dict[RequestId, Reservation] = {}  # those of the queue, in order
        self.residents = Residents()
        self.answers = 0  # decoded here, or to be when their prompts are computed
        self.decoding = 0  # of them
        self.context_tokens = 0
        self.output_tokens = 0
        self.other_prefills = 0  # what the instance says it has beyond these reservations
        self.other_running = 0

    def append(self, reservation: Reservation, now: float) -> None:
        self.queue.append(reservation.request, reservation.prefill_seconds, now)
        self.prefills[reservation.request] = reservation

    def discard(self, request: RequestId, now: float) -> bool:
        """Computed, or given up. False: neither waits nor runs here."""
        self.prefills.pop(request, None)
        return self.queue.discard(request, now)

    @property
    def idle(self) -> bool:
        """Nothing is reserved here."""
        counts = (self.answers, self.decoding, self.context_tokens, self.output_tokens)
        return not self.prefills and not self.residents and not any(counts)

"""`InstanceLoad`, the reserved work of one instance, and `Reservation`, one request's share."""

from __future__ import annotations

import msgspec

from memserve.scheduler.contract import InstanceSpec
from memserve.scheduler.queue import PrefillQueue
from memserve.scheduler.residents import Residents
from memserve.types import Namespace, RequestId, TokenArray


class Reservation(msgspec.Struct, frozen=True, eq=False):
    """The predicted resources of one request. Owned by `Load` until `release`."""

    request: RequestId
    namespace: Namespace
    tokens: TokenArray
    cached_tokens: int  # of `tokens`: cached on, or fetched to, the instance that computes them
    prefill_seconds: float
    context_tokens: int  # of the sequence, half way through the answer
    output_tokens: int
    kv_tokens: int  # in HBM of the answering instance, without blocks shared with others
    computes: InstanceLoad  # of the instance that computes the prompt
    answers: InstanceLoad  # of the instance that decodes


class InstanceLoad:
    """The reserved work of one instance. Only `Load` changes it."""

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
        self.slot = -1  # position in the arrays of `Load`; -1: removed
        self.used = used  # turn of the last choice, for ties
        self.queue = PrefillQueue(spec.short_share)
        self.prefills: dict[RequestId, Reservation] = {}  # of the requests in `queue`, in order
        self.residents = Residents()
        self.answers = 0  # answers that decode here, now or after their prefill
        self.decoding = 0  # of `answers`: decoding now
        self.context_tokens = 0  # sum over `answers`
        self.output_tokens = 0  # sum over `answers`
        self.other_prefills = 0  # prompts that the instance reports beyond the reservations
        self.other_running = 0  # decoding sequences, likewise

    def append(self, reservation: Reservation, now: float) -> None:
        self.queue.append(reservation.request, reservation.prefill_seconds, now)
        self.prefills[reservation.request] = reservation

    def discard(self, request: RequestId, now: float) -> bool:
        """Take a prompt off the queue: it is computed, or given up. False: it is not queued."""
        self.prefills.pop(request, None)
        return self.queue.discard(request, now)

    @property
    def idle(self) -> bool:
        """Whether nothing is reserved here."""
        counts = (self.answers, self.decoding, self.context_tokens, self.output_tokens)
        return not self.prefills and not self.residents and not any(counts)

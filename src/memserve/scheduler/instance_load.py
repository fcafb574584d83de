"""`InstanceLoad`, the reserved work of one instance: a queue of prefills, and residents of HBM."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from memserve.scheduler.contract import InstanceSpec
from memserve.types import Namespace, RequestId, TokenArray


class PrefillQueue:
    """Predicted seconds left of each prompt, in order of arrival, advanced with the clock."""

    __slots__ = ("_left", "_shortest", "_updated", "short_share")

    def __init__(self, short_share: float) -> None:
        self.short_share = short_share
        self._left: dict[RequestId, float] = {}
        self._shortest: RequestId | None = None  # the prompt with the least left; None: unknown
        self._updated = 0.0

    def __len__(self) -> int:
        return len(self._left)

    def __contains__(self, request: RequestId) -> bool:
        return request in self._left

    @property
    def updated(self) -> float:
        """Time of the figures, seconds of the caller's clock."""
        return self._updated

    def left(self) -> Iterable[float]:
        """The seconds left of each prompt at `updated`, the oldest first; 0, until `discard`, for a
        prompt that takes longer than predicted."""
        return self._left.values()

    def append(self, request: RequestId, seconds: float, now: float) -> None:
        self._advance(now)
        shortest = self._shortest
        if shortest is not None and seconds < self._left[shortest]:
            self._shortest = request
        self._left[request] = seconds

    def discard(self, request: RequestId, now: float) -> bool:
        """Remove a prompt: it is computed, or given up. Returns False if it is not queued."""
        if request not in self._left:
            return False
        self._advance(now)
        del self._left[request]
        if request == self._shortest:
            self._shortest = None
        return True

    def under_way(self) -> float:
        """Seconds left, at `updated`, of the prompts in prefill: the oldest and the shortest."""
        if not self._left:
            return 0.0
        oldest, shortest = self._served()
        seconds = self._left[oldest]
        return seconds if oldest == shortest else seconds + self._left[shortest]

    def _served(self) -> tuple[RequestId, RequestId]:
        oldest = next(iter(self._left))
        if not self.short_share or len(self._left) == 1:
            return oldest, oldest
        if self._shortest is None:
            self._shortest = min(self._left, key=self._left.__getitem__)
        return oldest, self._shortest

    def _advance(self, now: float) -> None:
        elapsed = now - self._updated
        self._updated = now
        left, share = self._left, self.short_share
        if not left or elapsed <= 0:
            return
        # A prompt with 0 left keeps its share until `discard`: the others do not advance.
        oldest, shortest = self._served()
        if oldest == shortest:
            left[oldest] = max(0.0, left[oldest] - elapsed)
        else:
            left[oldest] = max(0.0, left[oldest] - elapsed * (1 - share))
            left[shortest] = max(0.0, left[shortest] - elapsed * share)
        known = self._shortest
        if known is not None and left[oldest] <= left[known]:
            self._shortest = oldest  # ties: the oldest


class Resident(msgspec.Struct, eq=False):
    """One request's share of HBM."""

    namespace: Namespace
    prompt: TokenArray
    kv_tokens: int  # without tokens shared with other requests there
    output_tokens: int  # expected; 0: a prefill only, which ends with its prompt
    decodes_since: float | None = None  # seconds of the clock; None: the prompt is not computed


class Residents:
    """The `Resident` of each request on one instance."""

    __slots__ = ("_by_request", "kv_tokens")

    def __init__(self) -> None:
        self._by_request: dict[RequestId, Resident] = {}
        self.kv_tokens = 0  # sum over all

    def __len__(self) -> int:
        return len(self._by_request)

    def add(self, request: RequestId, resident: Resident) -> None:
        self._by_request[request] = resident
        self.kv_tokens += resident.kv_tokens

    def prefilled(self, request: RequestId, now: float) -> None:
        """Report that a prompt is computed: the request decodes now, or is removed if it is a
        prefill only. Unknown requests are ignored."""
        resident = self._by_request.get(request)
        if resident is None:
            return
        if resident.output_tokens:
            resident.decodes_since = now
        else:
            self.remove(request)

    def remove(self, request: RequestId) -> None:
        resident = self._by_request.pop(request, None)
        if resident is not None:
            self.kv_tokens -= resident.kv_tokens

    def wait(self, excess: float, queue: float, step: float, now: float) -> float:
        """Return the predicted seconds until `excess` tokens are free, if all queued prompts are
        computed after `queue` seconds and a decode step takes `step` seconds."""
        ends = []
        for resident in self._by_request.values():
            lasts = resident.output_tokens * step
            since = resident.decodes_since
            # At least a quarter of the predicted time is left: an answer may exceed it.
            ends_in = queue + lasts if since is None else max(since + lasts - now, lasts / 4)
            ends.append((ends_in, resident.kv_tokens))
        wait = 0.0
        for ends_in, tokens in sorted(ends):
            if excess <= 0:
                break
            wait = ends_in
            excess -= tokens
        return wait

    def shared(self, namespace: Namespace, tokens: TokenArray) -> int:
        """Return the largest number of leading `tokens`, all cached here, that are in the prompt of
        a request of this instance, and therefore in HBM."""
        most = 0
        for held in self._by_request.values():
            size = min(len(held.prompt), len(tokens))
            # Skip prompts that cannot beat the best so far, by comparing one token.
            if held.namespace != namespace or size <= most or held.prompt[most] != tokens[most]:
                continue
            differs = held.prompt[:size] != tokens[:size]
            first = int(differs.argmax())
            most = max(most, first if differs[first] else size)
        return most


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
        """Remove a prompt that is computed or given up. Returns False if it is not queued."""
        self.prefills.pop(request, None)
        return self.queue.discard(request, now)

    @property
    def idle(self) -> bool:
        """Whether nothing is reserved here."""
        counts = (self.answers, self.decoding, self.context_tokens, self.output_tokens)
        return not self.prefills and not self.residents and not any(counts)

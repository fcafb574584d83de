"""Which sequences run in the next step: continuous batching with chunked prefill.

Every decoding sequence is in every step. Prefill takes what is left of the step's token
budget, which is small while anything decodes (a long prompt must not hold up the others'
next token) and large otherwise. Half of it goes to the first prompt in the order of priority
and arrival, which therefore never starves, the rest to the shortest ones: a long prompt does
not hold up short ones behind it. Memory is taken in the order of priority and arrival; who came
last gives way.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from memserve.engine.sequence import Sequence
from memserve.errors import OutOfBlocks
from memserve.types import RequestId

# Prompts computed at a time: each more holds memory longer than it must.
MAX_PREFILLING = 8


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """Per step."""

    max_tokens: int  # computed when nothing decodes
    mixed_tokens: int  # prefilled beside decoding sequences
    max_running: int  # sequences that hold memory


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """`count` tokens of a sequence, from its first token without KV."""

    sequence: Sequence
    count: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step: the decoding sequences (one token each), then the prefill chunks."""

    decodes: tuple[ScheduledSequence, ...]
    prefills: tuple[ScheduledSequence, ...]

    @property
    def scheduled(self) -> tuple[ScheduledSequence, ...]:
        return self.decodes + self.prefills


class BatchScheduler:
    """Queues of one engine. Used by the engine's thread only, except `len`-like counts."""

    def __init__(self, limits: BatchLimits) -> None:
        self._limits = limits
        self._waiting: list[Sequence] = []  # in order
        self._running: list[Sequence] = []  # in order
        self._known: dict[RequestId, Sequence] = {}
        self.preemptions = 0

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    def add(self, sequence: Sequence) -> None:
        self._known[sequence.id] = sequence
        bisect.insort(self._waiting, sequence, key=_order)

    def remove(self, request_id: RequestId) -> Sequence | None:
        """Forget a sequence, wherever it is, and free its memory."""
        sequence = self._known.pop(request_id, None)
        if sequence is None:
            return None
        queue = self._running if sequence in self._running else self._waiting
        queue.remove(sequence)
        sequence.close()
        return sequence

    def drain(self) -> list[Sequence]:
        """Forget everything."""
        return [s for s in map(self.remove, list(self._known)) if s is not None]

    def plan(self) -> StepPlan | None:
        """The next step, with memory reserved for it; None when there is nothing to run."""
        decodes = self._plan_decodes()
        budget = self._limits.mixed_tokens if decodes else self._limits.max_tokens
        self._admit()
        decoding = {scheduled.sequence for scheduled in decodes}
        # With those whose prompt was all cached but for the last token.
        prefilling = [sequence for sequence in self._running if sequence not in decoding]
        counts = share_budget(budget, [sequence.remaining for sequence in prefilling])
        prefills = tuple(
            ScheduledSequence(sequence, count)
            for sequence, count in zip(prefilling, counts, strict=True)
            if count
        )
        if not decodes and not prefills:
            return None
        return StepPlan(tuple(decodes), prefills)

    def _plan_decodes(self) -> list[ScheduledSequence]:
        """Reserve one token for every decoding sequence, at the expense of the last ones."""
        decodes = []
        for sequence in list(self._running):
            if sequence.prefilling or sequence not in self._running:
                continue
            if self._reserve(sequence):
                decodes.append(ScheduledSequence(sequence, 1))
        return decodes

    def _reserve(self, sequence: Sequence) -> bool:
        """Room for the sequence's last token; False if it had to give way itself."""
        while True:
            try:
                sequence.table.reserve(sequence.length)
            except OutOfBlocks:
                victim = self._running[-1]
                self._preempt(victim)
                if victim is sequence:
                    return False
            else:
                return True

    def _preempt(self, victim: Sequence) -> None:
        self._running.remove(victim)
        victim.preempt()
        self.preemptions += 1
        bisect.insort(self._waiting, victim, key=_order)

    def _admit(self) -> None:
        """Start waiting sequences in order while there is memory.

        A sequence whose prompt another one is computing right now is passed over, not waited
        for; one that does not fit stops the queue, or small ones would starve it. Each that
        runs is left a block to grow into, or it would be preempted at once.
        """
        prefilling = [sequence for sequence in self._running if sequence.prefilling]
        for sequence in list(self._waiting):
            if len(self._running) >= self._limits.max_running or len(prefilling) >= MAX_PREFILLING:
                break
            if self._leader_prefills(sequence) or any(
                sequence.gains_from(other) for other in prefilling
            ):
                continue
            try:
                sequence.admit(headroom=len(self._running))
            except OutOfBlocks:
                break
            self._waiting.remove(sequence)
            bisect.insort(self._running, sequence, key=_order)
            if sequence.prefilling:
                prefilling.append(sequence)

    def _leader_prefills(self, sequence: Sequence) -> bool:
        leader_id = sequence.request.follows
        leader = None if leader_id is None else self._known.get(leader_id)
        return leader is not None and leader.computed < leader.prompt_tokens


def share_budget(budget: int, remaining: Seq[int]) -> list[int]:
    """How many tokens of each prompt are computed in a step of `budget` tokens, given how many
    each lacks, first come first.

    The first has half of it, and what the shortest ones leave.
    """
    if not remaining:
        return []
    counts = [0] * len(remaining)
    counts[0] = min(remaining[0], budget - budget // 2)
    left = budget - counts[0]
    for at in sorted(range(1, len(remaining)), key=remaining.__getitem__):
        counts[at] = min(remaining[at], left)
        left -= counts[at]
    counts[0] += min(remaining[0] - counts[0], left)
    return counts


def _order(sequence: Sequence) -> tuple[int, int]:
    return sequence.order

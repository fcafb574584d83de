"""Scheduler of one engine's steps: continuous batching with chunked prefill.

Every decoding sequence is in every step. The prefill token budget of a step is small while any
sequence decodes (a long prompt must not delay their next tokens) and large otherwise. Half of
the budget goes to the first prompt in the order of priority and arrival, which therefore never
starves. The other half goes to the prompts with the fewest tokens left, so a long prompt does
not block short ones behind it. Memory is given in the order of priority and arrival; the last
running sequence is preempted first.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from memserve.engine.sequence import Sequence
from memserve.errors import OutOfBlocks
from memserve.types import RequestId

# Maximum of sequences in prefill. Prefills that share the budget hold memory for longer.
MAX_PREFILLING = 8


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """Limits of one step."""

    max_tokens: int  # prefill tokens of a step without decoding sequences
    mixed_tokens: int  # prefill tokens of a step with decoding sequences
    max_running: int  # sequences that hold memory


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """The next `count` tokens of a sequence to compute, from its first token without KV."""

    sequence: Sequence
    count: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step: decoding sequences (one token each) and prefill chunks."""

    decodes: tuple[ScheduledSequence, ...]
    prefills: tuple[ScheduledSequence, ...]

    @property
    def scheduled(self) -> tuple[ScheduledSequence, ...]:
        return self.decodes + self.prefills


class BatchScheduler:
    """Waiting and running sequences of one engine. For the engine's thread only; any thread may
    read `waiting`, `running` and `preemptions`."""

    def __init__(self, limits: BatchLimits, scored_rows: int) -> None:
        """`scored_rows`: maximum of prompt tokens to score in a step without decoding sequences,
        whose logits are all in memory at once."""
        self._limits = limits
        self._scored_rows = scored_rows
        self._waiting: list[Sequence] = []  # sorted by `Sequence.order`
        self._running: list[Sequence] = []  # sorted by `Sequence.order`
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
        """Remove a sequence from its queue and free its memory. Returns None for an unknown id."""
        sequence = self._known.pop(request_id, None)
        if sequence is None:
            return None
        queue = self._running if sequence in self._running else self._waiting
        queue.remove(sequence)
        sequence.close()
        return sequence

    def drain(self) -> list[Sequence]:
        """Remove all sequences, free their memory, and return them."""
        return [s for s in map(self.remove, list(self._known)) if s is not None]

    def plan(self) -> StepPlan | None:
        """Return the next step, with memory reserved for it; None if no sequence can run."""
        decodes = self._plan_decodes()
        budget = self._limits.mixed_tokens if decodes else self._limits.max_tokens
        self._admit()
        decoding = {scheduled.sequence for scheduled in decodes}
        # Includes admitted sequences whose tokens are all cached except the last one.
        prefilling = [sequence for sequence in self._running if sequence not in decoding]
        counts = share_budget(budget, self._wanted(prefilling, bool(decodes)))
        prefills = tuple(
            ScheduledSequence(sequence, count)
            for sequence, count in zip(prefilling, counts, strict=True)
            if count
        )
        if not decodes and not prefills:
            return None
        return StepPlan(tuple(decodes), prefills)

    def _wanted(self, prefilling: Seq[Sequence], mixed: bool) -> list[int]:
        """Return the tokens that each sequence may compute in this step; `mixed`: others decode,
        and must not wait for the logits of many rows."""
        room = self._scored_rows // 4 if mixed else self._scored_rows
        wanted = []
        for sequence in prefilling:
            count = sequence.remaining
            if sequence.scores is not None and not sequence.scores.complete:
                count = min(count, room)
                room -= count
            wanted.append(count)
        return wanted

    def _plan_decodes(self) -> list[ScheduledSequence]:
        """Reserve memory for one token of each decoding sequence; preempt the last running
        sequences if memory is short."""
        decodes = []
        for sequence in list(self._running):
            if sequence.prefilling or sequence not in self._running:
                continue
            if self._reserve(sequence):
                decodes.append(ScheduledSequence(sequence, 1))
        return decodes

    def _reserve(self, sequence: Sequence) -> bool:
        """Reserve memory for the sequence's last token. Returns False if the sequence itself was
        preempted."""
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
        """Admit waiting sequences in order while there is memory.

        A sequence that gains from a prefill in progress is skipped until that prefill is done.
        A sequence that does not fit stops the queue; otherwise small sequences would starve it.
        Each running sequence keeps a headroom of one block, or it would be preempted at once.
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
    """Return the number of tokens to compute of each prompt in a step of `budget` tokens.

    `remaining`: the most for each prompt, in the order of priority and arrival. The
    first prompt gets half of the budget, then the others by ascending `remaining`; the first
    prompt also gets the rest.
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
